"""`Transfers` over an agent: its calls block, so each is made on a worker thread."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import structlog

from kvstore.errors import DeadlineExceeded, InvalidArgument, KVStoreError
from kvstore.transfer.apart import Mortal, export
from kvstore.transfer.base import Agent, Arrived, Bytes1D, Pieces, Remote
from kvstore.transfer.choose import KINDS

log = structlog.get_logger()

_THREADS = 64  # most of which wait for others
_OF_ONE = 2  # of one other process: the next one is ready, and few that hang leave threads
_CLOSES = 8


class AgentTransfers:
    """agent: not yet described. pool: the store's, mapped from `fd`, exported here as a whole."""

    def __init__(self, agent: Agent, pool: Bytes1D, fd: int) -> None:
        self._agent = agent
        self.moved_bytes = {kind: 0 for kind in KINDS if kind != "auto"}  # by what moved them
        export(agent, pool, fd, writable=False)
        self._description = agent.describe()
        if isinstance(agent, Mortal):
            agent.on_death = self._again
        self._threads = ThreadPoolExecutor(_THREADS, "kvstore-transfer")
        # Not with the others: what hangs there is ended by a close.
        self._closes = ThreadPoolExecutor(_CLOSES, "kvstore-transfer-end")

    @property
    def kind(self) -> str:
        """See `Transfers.kind`."""
        return self._agent.kind

    def describe(self) -> bytes:
        """See `Transfers.describe`."""
        return self._description

    def _again(self) -> None:
        """The process that exported the pool has died; the next one."""
        try:
            self._description = self._agent.describe()
        except KVStoreError as error:  # others copy from here no more; the rest goes on
            log.error("the pool cannot be exported again", reason=str(error))

    async def connect(self, kind: str, agent: bytes, timeout_ms: float) -> AgentMemory:
        """See `Transfers.connect`."""
        if kind != self.kind:
            raise InvalidArgument(
                "transfer", f"this node transfers by {self.kind}, the other side by {kind}"
            )
        loop = asyncio.get_running_loop()
        connect = functools.partial(self._agent.connect, agent, timeout_ms / 1e3)
        remote = await loop.run_in_executor(self._threads, connect)
        return AgentMemory(remote, self._threads, self._closes, self.moved_bytes)

    def close(self) -> None:
        """Ends the agent: nothing is moved to the pool any more, and no read of it that is not over
        by then succeeds."""
        self._agent.close()
        self._threads.shutdown()
        self._closes.shutdown()


class AgentMemory:
    """`Memory` of a remote. moved_bytes: by kind, to be counted up."""

    def __init__(
        self,
        remote: Remote,
        threads: ThreadPoolExecutor,
        closes: ThreadPoolExecutor,
        moved_bytes: dict[str, int],
    ) -> None:
        self._moved_bytes = moved_bytes
        self._remote, self._threads, self._closes = remote, threads, closes
        self._turns = asyncio.Semaphore(_OF_ONE)

    async def read(self, pieces: Pieces, timeout_ms: float, arrived: Arrived | None = None) -> None:
        """See `Memory.read`."""
        read = functools.partial(self._remote.read, arrived=arrived)
        await self._move(read, pieces, timeout_ms)

    async def write(self, pieces: Pieces, timeout_ms: float) -> None:
        """See `Memory.write`."""
        await self._move(self._remote.write, pieces, timeout_ms)

    async def _move(
        self, move: Callable[[Pieces, float], None], pieces: Pieces, timeout_ms: float
    ) -> None:
        loop = asyncio.get_running_loop()
        end_s = loop.time() + timeout_ms / 1e3
        try:
            async with asyncio.timeout_at(end_s):
                await self._turns.acquire()
        except TimeoutError:
            raise DeadlineExceeded("earlier transfers with that process take too long") from None
        try:
            work = functools.partial(move, pieces, max(end_s - loop.time(), 1e-3))
            await loop.run_in_executor(self._threads, work)
            self._moved_bytes[self._remote.kind] += pieces.total
        finally:
            self._turns.release()

    async def close(self) -> None:
        """See `Memory.close`."""
        await asyncio.get_running_loop().run_in_executor(self._closes, self._remote.close)
