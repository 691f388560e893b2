"""Memory of processes at made-up addresses, and copies between them that take time.

A copy moves in chunks. What was begun goes on, whatever its caller does meanwhile, until its
`close` has returned, its target is revoked (`SimAgent.close`), or either process is dead; a paused
process moves nothing, and goes on when it is resumed.
"""

from __future__ import annotations

import bisect
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from cluster.sim.loop import Dead, Future, Loop, Process
from cluster.sim.network import Network

from kvstore.errors import DeadlineExceeded, InvalidArgument, ProtocolError
from kvstore.transfer.base import Arrived, Pieces, TransferFailed

Guard = Callable[[int], int]
Bytes1D = npt.NDArray[np.uint8]
_AWAY_MS = 20.0  # between two attempts to get a chunk through


@dataclass(frozen=True, slots=True, kw_only=True)
class Carriage:
    """How bytes travel. flips: chance that a chunk has one bit turned over on its way. hardware:
    whether a paused process's memory takes bytes all the same. fails_to_close: chance that `close`
    cannot say that it is over. patience_ms: how long an unreachable process is tried."""

    chunk_bytes: int = 1500
    chunk_ms: float = 0.2
    flips: float = 0.0
    hardware: bool = True
    fails_to_close: float = 0.0
    patience_ms: float = 3000.0


class Space:
    """One process's memory: arrays at addresses that are the same in each run."""

    def __init__(self, number: int) -> None:
        self._next = (number + 1) << 40
        self._starts: list[int] = []
        self._arrays: list[Bytes1D] = []

    def add(self, array: Bytes1D) -> int:
        """Gives an array its address."""
        start, self._next = self._next, self._next + (array.size | 0xFFFFF) + 1
        self._starts.append(start)
        self._arrays.append(array)
        return start

    def at(self, address: int, nbytes: int) -> Bytes1D:
        """The bytes there; AssertionError where nothing is."""
        number = bisect.bisect_right(self._starts, address) - 1
        assert number >= 0, f"no memory at {address:#x}"
        offset = address - self._starts[number]
        assert offset + nbytes <= self._arrays[number].size, f"{address:#x} is beyond its memory"
        return self._arrays[number][offset : offset + nbytes]

    def start_of(self, array: Bytes1D) -> int:
        """The address that an array has."""
        return next(s for s, a in zip(self._starts, self._arrays, strict=True) if a is array)


class Fabric:
    """All agents, by what describes them."""

    def __init__(self, loop: Loop, network: Network, rng: random.Random) -> None:
        self.loop, self.network, self.rng = loop, network, rng
        self.carriage = Carriage()
        # Called once, in the middle of the next transfer, with both of its processes.
        self.interrupt: Callable[[Process, Process], None] | None = None
        self.agents: dict[str, SimAgent] = {}
        self.moved = self.late = self.flipped = self.revoked = 0
        self._numbers = 0

    def name_for(self, process: Process) -> str:
        self._numbers += 1
        return f"sim/{process.name}/{self._numbers}"

    def flip(self, data: Bytes1D) -> Bytes1D:
        """The bytes as they arrive."""
        if self.rng.random() >= self.carriage.flips:
            return data
        self.flipped += 1
        data = data.copy()
        data[self.rng.randrange(data.size)] ^= np.uint8(1 << self.rng.randrange(8))
        return data


class SimAgent:
    """See `kvstore.transfer.base.Agent`; what blocks there is awaited here."""

    kind = "sim"

    def __init__(self, fabric: Fabric, process: Process, space: Space) -> None:
        self.fabric, self.process, self.space = fabric, process, space
        self.open = True
        self.name = fabric.name_for(process)
        self.remotes: list[SimRemote] = []
        self._registered: list[tuple[int, int]] = []
        # What memory at an address is used for now: bytes that move for another use are a bug.
        # guard: of what others write here. own_guard: of what this side reads to and writes from.
        self.guard: Guard | None = None
        self.own_guard: Guard | None = None
        self.incoming: list[SimRemote] = []
        fabric.agents[self.name] = self
        process.at_death.append(self._died)

    def _died(self) -> None:
        gone = TransferFailed("the other side is gone")
        for remote in self.incoming:
            for move in list(remote.moves):
                soon_ms = self.fabric.rng.uniform(0.1, 50.0)
                end = functools.partial(move.end, gone)
                self.fabric.loop.after(soon_ms, end, remote.agent.process)

    def register(self, memory: Bytes1D) -> None:
        """See `Agent.register`; memory is in the process's `Space`."""
        self._registered.append((self.space.start_of(memory), memory.size))

    def describe(self) -> bytes:
        """See `Agent.describe`."""
        return self.name.encode()

    def reaches(self, address: int, nbytes: int) -> bool:
        """Whether others may read and write there."""
        return any(s <= address and address + nbytes <= s + n for s, n in self._registered)

    async def connect(self, kind: str, agent: bytes, timeout_ms: float) -> SimRemote:
        """See `Transfers.connect`."""
        if kind != self.kind:
            raise InvalidArgument("kind", f"{kind!r} is not {self.kind!r}")
        fabric = self.fabric
        other = fabric.agents.get(agent.decode(errors="replace"))
        if other is None:
            raise ProtocolError("that describes no agent")
        trip = fabric.network.delay(self.process, other.process) * 2
        await fabric.loop.sleep(min(trip, timeout_ms), self.process)
        if trip > timeout_ms or not _joined(fabric, self, other):
            raise DeadlineExceeded("the other agent did not answer in time")
        if not other.open or not other.process.alive:
            raise TransferFailed("the other agent is not there")
        remote = SimRemote(self, other)
        self.remotes.append(remote)
        other.incoming.append(remote)
        return remote

    async def close(self) -> None:
        """See `Agent.close`."""
        await self.fabric.loop.sleep(self.fabric.rng.uniform(0.1, 5.0), self.process)
        self.open = False
        for remote in list(self.remotes):
            await remote.close()


class SimRemote:
    """See `kvstore.cluster.world.Memory`."""

    def __init__(self, agent: SimAgent, other: SimAgent) -> None:
        self.agent, self.other = agent, other
        self.closed = False
        self.moves: dict[_Move, None] = {}

    async def read(self, pieces: Pieces, timeout_ms: float, arrived: Arrived | None = None) -> None:
        """See `Remote.read`; tells of each piece as it comes."""
        await self._move(pieces, timeout_ms, writes=False, arrived=arrived)

    async def write(self, pieces: Pieces, timeout_ms: float) -> None:
        """See `Remote.write`."""
        await self._move(pieces, timeout_ms, writes=True)

    async def _move(
        self, pieces: Pieces, timeout_ms: float, *, writes: bool, arrived: Arrived | None = None
    ) -> None:
        if self.closed:
            raise TransferFailed("the connection is closed")
        if not self.agent.process.alive:
            raise Dead(self.agent.process.name)
        move = _Move(self, pieces, writes=writes, arrived=arrived)
        error = DeadlineExceeded("the transfer did not end in time")
        timer = self.agent.fabric.loop.after(
            timeout_ms, lambda: move.told.fail(error), self.agent.process
        )
        try:
            await move.told
        finally:
            timer.cancel()

    async def close(self) -> None:
        """See `Remote.close`."""
        fabric, process = self.agent.fabric, self.agent.process
        await fabric.loop.sleep(fabric.rng.uniform(0.05, 3.0), process)
        if self.moves and fabric.rng.random() < fabric.carriage.fails_to_close:
            raise TransferFailed("it cannot be told whether it is over")
        self.closed = True
        for move in list(self.moves):
            move.end(TransferFailed("the connection was closed"))
        if self in self.agent.remotes:
            self.agent.remotes.remove(self)


def _joined(fabric: Fabric, one: SimAgent, other: SimAgent) -> bool:
    network = fabric.network
    return network.passes(one.process, other.process) and network.passes(other.process, one.process)


class _Move:
    """One read or write under way: a chunk at a time leaves, and lands a moment later."""

    def __init__(
        self, remote: SimRemote, pieces: Pieces, *, writes: bool, arrived: Arrived | None = None
    ) -> None:
        self.remote, self.writes, self._arrived = remote, writes, arrived
        self.fabric = remote.agent.fabric
        self.told: Future[None] = Future()
        self._chunks = self._cut(pieces)
        self._ends = self._ends_of(pieces)
        self._guarded = self._numbers_there() if writes else []
        guard = remote.agent.own_guard
        self._own = [guard(at) for at, _, _ in self._chunks] if guard is not None else []
        self._next = 0
        self._tried_ms = 0.0
        remote.moves[self] = None
        self._soon()

    def _cut(self, pieces: Pieces) -> list[tuple[int, int, int]]:
        most = self.fabric.carriage.chunk_bytes
        rows = zip(
            pieces.local.tolist(), pieces.remote.tolist(), pieces.nbytes.tolist(), strict=True
        )
        return [
            (local + first, remote + first, min(most, nbytes - first))
            for local, remote, nbytes in rows
            for first in range(0, nbytes, most)
        ]

    def _ends_of(self, pieces: Pieces) -> dict[int, int]:
        """By the chunks that have landed, how many pieces are whole; but for the last one."""
        most, ends, chunks = self.fabric.carriage.chunk_bytes, dict[int, int](), 0
        for number, nbytes in enumerate(pieces.nbytes.tolist()[:-1], 1):
            chunks += -(-nbytes // most)
            ends[chunks] = number
        return ends

    def _numbers_there(self) -> list[int]:
        """What each chunk's target is used for as the write begins."""
        other = self.remote.other
        for _, remote, nbytes in self._chunks:
            assert other.reaches(remote, nbytes), f"{remote:#x} of {other.name} is not registered"
        return [other.guard(at) for _, at, _ in self._chunks] if other.guard is not None else []

    def _soon(self, ms: float = 0.0) -> None:
        self.fabric.loop.after(ms, self._depart, self.remote.agent.process)

    def _after(self, ms: float, action: Callable[[], None]) -> None:
        """At the other side: where its process is paused, only if it moves bytes itself."""
        process = None if self.fabric.carriage.hardware else self.remote.other.process
        self.fabric.loop.after(ms, action, process)

    def _depart(self) -> None:
        """In the active process: the next chunk leaves, or is asked for."""
        fabric, agent, other = self.fabric, self.remote.agent, self.remote.other
        if self not in self.remote.moves:
            return
        if self._next == len(self._chunks):
            self.end(None)
            return
        if not other.process.alive or not other.open:
            fabric.revoked += not other.open
            self.end(TransferFailed("the other side is gone"))
            return
        if not _joined(fabric, agent, other):
            self._tried_ms += _AWAY_MS
            if self._tried_ms > fabric.carriage.patience_ms:
                self.end(TransferFailed("the other side cannot be reached"))
            else:
                self._soon(_AWAY_MS)
            return
        interrupt, fabric.interrupt = fabric.interrupt, None
        if interrupt is not None:
            interrupt(agent.process, other.process)
        local, remote, nbytes = self._chunks[self._next]
        assert other.reaches(remote, nbytes), f"{remote:#x} of {other.name} is not registered"
        on_way_ms = fabric.carriage.chunk_ms * fabric.rng.uniform(0.2, 2.0)
        if self.writes:
            self._check_own("a block was written over while it was sent")
            data = fabric.flip(agent.space.at(local, nbytes).copy())
            self._after(on_way_ms, lambda: self._land(data, remote))
        else:
            self._after(on_way_ms, lambda: self._fetch(remote, local, nbytes, on_way_ms))

    def _land(self, data: Bytes1D, at: int) -> None:
        """A chunk of a write arrives, unless it was revoked or given up."""
        other = self.remote.other
        if self not in self.remote.moves:
            return
        if (
            not other.open
            or not other.process.alive
            or not _joined(self.fabric, self.remote.agent, other)
        ):
            self._soon()  # which sees what is the matter
            return
        if self._guarded and other.guard is not None:
            now = other.guard(at)
            assert now == self._guarded[self._next], "a late write landed in memory used anew"
        other.space.at(at, data.size)[:] = data
        self._landed()

    def _fetch(self, at: int, to: int, nbytes: int, on_way_ms: float) -> None:
        """A chunk of a read leaves the other side."""
        other, agent = self.remote.other, self.remote.agent
        if not other.open or not other.process.alive or not _joined(self.fabric, agent, other):
            self._soon()
            return
        data = self.fabric.flip(other.space.at(at, nbytes).copy())

        def arrive() -> None:
            # A process has ended when its store sees that: by then its network card has let go.
            if self in self.remote.moves and agent.process.alive:
                self._check_own("late bytes came to a slot used anew")
                agent.space.at(to, nbytes)[:] = data
                self._landed()

        process = None if self.fabric.carriage.hardware else agent.process
        self.fabric.loop.after(on_way_ms, arrive, process)

    def _check_own(self, problem: str) -> None:
        guard = self.remote.agent.own_guard
        if guard is not None:
            assert guard(self._chunks[self._next][0]) == self._own[self._next], problem

    def _landed(self) -> None:
        self.fabric.moved += 1
        self.fabric.late += self.told.done
        self._next += 1
        if self._arrived is not None and not self.told.done and self._next in self._ends:
            self._arrived(self._ends[self._next])
        self._soon()

    def end(self, error: TransferFailed | None) -> None:
        """Nothing of it moves any more."""
        self.remote.moves.pop(self, None)
        if error is None:
            self.told.set(None)
        else:
            self.told.fail(error)
