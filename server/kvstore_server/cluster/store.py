"""`NodeStore` over the same-host channel: the daemon's store, its pool mapped here."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.block import copied_headers
from kvstore.channel.port import ChannelPort
from kvstore.errors import DeadlineExceeded, InvalidArgument, KVStoreError, Unavailable
from kvstore.layout import Layout
from kvstore.session.channel import ChannelLink
from kvstore.session.copies import groups_of, in_parallel
from kvstore.session.link import Memory
from kvstore.session.parts import ALL_CELLS, part_of
from kvstore_server.cluster.ahead import Ahead
from kvstore_server.cluster.port import LoopPort

_WAITERS = 4  # calls that may wait for the disks at one time; each needs a connection of its own
_WAITING = (c.Fetch, c.Persist, c.Drop)
_PART_THREADS = 4  # of seats; no command of a put of parts waits for anything
_HASH_S = 60.0
_HASH_HERE_BYTES = 1 << 20  # takes less than it takes to wake another thread
_PATIENCE_S = 10.0


class ChannelNodeStore:
    """The store of the daemon at `path`; everything it holds goes back when this process ends.

    `Unavailable` where no daemon answers, `InvalidArgument` where this process may not write the
    pool.
    """

    def __init__(self, path: str, *, timeout_s: float) -> None:
        self._link = ChannelLink(path, timeout_s)
        if not self._link.writes_pool:
            self._link.close()
            raise InvalidArgument(
                "trust", "a node of a cluster writes the pool itself: run the daemon with direct"
            )
        self._path, self._timeout_s = path, timeout_s
        try:
            self._memory = self._link.memory(timeout_s)
            self._port = LoopPort(path, timeout_s)
        except BaseException:
            self._link.close()
            raise
        self._hashes = ThreadPoolExecutor(1, "kvstore-node-hash")
        self._waits = ThreadPoolExecutor(_WAITERS, "kvstore-node-wait")
        self._idle: list[ChannelLink] = []
        self._parts = ThreadPoolExecutor(_PART_THREADS, "kvstore-node-part")
        self._seats = asyncio.Semaphore(limits.MAX_PARTS_AT_ONCE)
        self._ports: list[ChannelPort] = []  # of seats that nobody has
        # Set once the connection is over. What was held by it goes back when this process ends.
        self.lost = asyncio.Event()
        self._ahead = Ahead(self._port, self._mapped)
        if self._port.welcome.instance != self._memory.instance:
            self.close()
            raise Unavailable("the daemon was restarted meanwhile")

    @property
    def pool(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The pool's memory."""
        return self._memory.pool

    @property
    def pool_fd(self) -> int:
        """The memfd that the pool is mapped from; the link's."""
        return self._link.pool_fd

    @property
    def instance(self) -> int:
        """See `NodeStore.instance`."""
        return self._memory.instance

    async def command(self, command: c.Command, timeout_ms: float) -> Any:
        """See `NodeStore.command`."""
        # A call that ends too early ends its connection, and with the first one this process.
        timeout_s = max(timeout_ms / 1e3, _PATIENCE_S)
        if isinstance(command, _WAITING):
            # Not with the rest: while a call waits, its connection serves no other.
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._waits, self._wait, command, timeout_s)
        try:
            return await self._ahead.ask(command, timeout_s)
        except (Unavailable, DeadlineExceeded):
            if self._port.closed:
                self.lost.set()
            raise

    def _mapped(self) -> Memory:
        return self._link.memory(self._timeout_s)

    def _wait(self, command: c.Command, timeout_s: float) -> Any:
        link = self._idle.pop() if self._idle else ChannelLink(self._path, self._timeout_s)
        try:
            result = link.call(command, timeout_s)
        except Unavailable:
            link.close()
            raise
        except BaseException:
            self._give(link)
            raise
        self._give(link)
        return result

    def _give(self, link: ChannelLink) -> None:
        if link.closed:
            link.close()
        else:
            self._idle.append(link)

    @asynccontextmanager
    async def seat(self, timeout_ms: float) -> AsyncIterator[ChannelSeat]:
        """See `NodeStore.seat`."""
        try:
            async with asyncio.timeout(timeout_ms / 1e3):
                await self._seats.acquire()
        except TimeoutError:
            raise DeadlineExceeded("other puts of parts take too long") from None
        try:
            port = self._ports.pop() if self._ports else await self._connect()
            try:
                yield ChannelSeat(port, self._parts, self.lost)
            except BaseException as error:
                if not isinstance(error, KVStoreError):
                    port.close()  # nobody knows what is held by it
                raise
            finally:
                if port.closed:
                    port.close()  # its descriptors as well
                else:
                    self._ports.append(port)
        finally:
            self._seats.release()

    async def _connect(self) -> ChannelPort:
        make = functools.partial(ChannelPort, self._path, self._timeout_s)
        return await asyncio.get_running_loop().run_in_executor(self._parts, make)

    def look(self, namespace: int, hashes: c.U8) -> c.U8:
        """See `NodeStore.look`."""
        if not len(hashes):
            return np.empty(0, np.uint8)
        return self._mapped().index.lookup(namespace, hashes).tiers.copy()

    def addresses(self, layout: Layout, granules: c.U32) -> c.U64:
        """See `NodeStore.addresses`."""
        return self._memory.payload_addresses(layout, granules)

    def headers(self, layout: Layout, granules: c.U32) -> c.U8:
        """See `NodeStore.headers`."""
        return copied_headers(self._memory.slot_addresses(granules), layout.n_cells)

    def sums_here(self, layout: Layout, granules: c.U32) -> c.U64:
        """See `NodeStore.sums_here`."""
        return part_of(layout).sums(self._memory.payload_addresses(layout, granules))

    async def sums(self, layout: Layout, granules: c.U32, cells: c.U32 = ALL_CELLS) -> c.U64:
        """See `NodeStore.sums`."""
        if len(granules) * part_of(layout, cells).nbytes <= _HASH_HERE_BYTES:
            return self._sums(layout, granules, cells)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._hashes, self._sums, layout, granules, cells)

    def _sums(self, layout: Layout, granules: c.U32, cells: c.U32) -> c.U64:
        part = part_of(layout, cells)
        sums = np.empty((len(granules), len(part.cell_runs)), np.uint64)

        payloads = self._memory.payload_addresses(layout, granules)

        def hash_some(first: int, end: int) -> None:
            sums[first:end] = part.sums(payloads[first:end])

        nbytes = len(granules) * part.nbytes
        in_parallel(
            hash_some, groups_of(len(granules), part.nbytes), nbytes, time.monotonic() + _HASH_S
        )
        return sums

    def close(self) -> None:
        """Ends the connections; nothing may move from or to the pool any more."""
        for pool in (self._hashes, self._waits, self._parts):
            pool.shutdown(cancel_futures=True)
        for port in self._ports:
            port.close()
        self._ahead.close()  # first: another client may have the board next
        self._port.close()
        for link in (*self._idle, self._link):
            link.close()


class ChannelSeat:
    """See `Seat`."""

    def __init__(self, port: ChannelPort, threads: ThreadPoolExecutor, lost: asyncio.Event) -> None:
        self._port, self._threads, self._lost = port, threads, lost

    async def command(self, command: c.Command, timeout_ms: float) -> Any:
        """See `Seat.command`."""
        call = functools.partial(self._port.call, command, max(timeout_ms / 1e3, _PATIENCE_S))
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, call)
        except (Unavailable, DeadlineExceeded):
            if self._port.closed:  # what was reserved by it is nobody's as long as this process is
                self._lost.set()
            raise

    async def lose(self) -> None:
        """See `Seat.lose`."""
        self._port.close()
