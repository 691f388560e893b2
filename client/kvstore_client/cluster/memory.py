"""The memory of a client that nodes read from and write to: an arena for puts, a ring for gets."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from sortedcontainers import SortedDict

from kvstore import commands as c
from kvstore.errors import InvalidArgument, KVStoreError
from kvstore.session.buffers import HeldBlocks
from kvstore.session.parts import Part
from kvstore.transfer.apart import Mortal
from kvstore.transfer.base import Agent, Bytes1D
from kvstore_client.cluster.backing import Backing, HostBacking, MakeBacking

_ALIGN = 4096


def landing_bytes(nbytes: int) -> int:
    """What a block of so many bytes takes of the ring."""
    return -(-nbytes // 64) * 64


class Extents:
    """Free runs of a memory, first fit; neighbours that come back are joined."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._free: SortedDict[int, int] = SortedDict({0: nbytes})

    def take(self, nbytes: int) -> int | None:
        """Where a run of so many bytes begins, None where there is none."""
        nbytes = -(-nbytes // _ALIGN) * _ALIGN
        for at, size in self._free.items():
            if size >= nbytes:
                del self._free[at]
                if size > nbytes:
                    self._free[at + nbytes] = size - nbytes
                return int(at)
        return None

    def give(self, at: int, nbytes: int) -> None:
        """A run is free again."""
        nbytes = -(-nbytes // _ALIGN) * _ALIGN
        below = self._free.bisect_left(at) - 1
        if below >= 0:
            before, size = self._free.peekitem(below)
            if before + size == at:
                del self._free[before]
                at, nbytes = before, size + nbytes
        after = self._free.pop(at + nbytes, None)
        self._free[at] = nbytes + (after or 0)

    @property
    def free_bytes(self) -> int:
        """All that is free."""
        return int(sum(self._free.values()))


class _Life:
    """One agent, with the memory that it exports: the arena, then the ring. It ends when nobody
    uses it any more."""

    def __init__(self, agent: Agent, backing: Backing, arena_bytes: int, ring_bytes: int) -> None:
        self.agent, self.backing = agent, backing
        try:
            backing.show(agent)
            self.description = agent.describe()
        except BaseException:
            backing.close()
            raise
        none = np.empty(0, np.uint8)
        self.arena = backing.block(0, arena_bytes, writable=True) if arena_bytes else none
        self.start = backing.address + arena_bytes  # of the ring
        self.end = self.start + ring_bytes
        self.extents = Extents(ring_bytes)
        self.lost_bytes = 0
        self.users = 0
        self.dead = False

    def close(self) -> None:
        """When it returns, nothing lands any more where anybody looks, and the memory is given
        back for good: see `Agent.close`."""
        self.agent.close()
        self.arena = np.empty(0, np.uint8)
        self.backing.close()

    def row(self, address: int, nbytes: int, *, writable: bool) -> Bytes1D:
        """The bytes at an address of the ring."""
        return self.backing.block(address - self.backing.address, nbytes, writable=writable)


class LandingRing:
    """Implements `ClientMemory`, and has the arena beside it.

    A part of the ring that somebody may still write to is never used again: once half of the ring
    is lost so, a new agent with new memory takes its place. Closing the old agent is what makes
    sure that nothing lands any more; its memory goes after that.

    make_backing: makes memory of so many bytes. With a GPU's there is no arena (arena_bytes is 0):
    what is put lies in buffers of the ring.
    """

    def __init__(
        self,
        make_agent: Callable[[], Agent],
        *,
        arena_bytes: int,
        ring_bytes: int,
        make_backing: MakeBacking = HostBacking,
    ) -> None:
        self._make_agent, self._make_backing = make_agent, make_backing
        self._arena_bytes, self.ring_bytes = arena_bytes, ring_bytes
        self._lock = threading.RLock()
        self._closed = False
        self._held_bytes = 0
        self.generation = 0
        self._life = self._new_life()
        self._old: list[_Life] = []
        self._taken: dict[int, tuple[_Life, int, int]] = {}  # by its first address

    def _new_life(self) -> _Life:
        agent = self._make_agent()
        try:
            backing = self._make_backing(self._arena_bytes + self.ring_bytes)
            life = _Life(agent, backing, self._arena_bytes, self.ring_bytes)
        except BaseException:
            agent.close()
            raise
        if isinstance(agent, Mortal):
            agent.on_death = lambda: self._died(life)
        return life

    def _died(self, life: _Life) -> None:
        """What exported a ring is gone, and with it whatever was on its way there."""
        with self._lock:
            life.dead = True
            if life is self._life and not self._closed:
                self._renew()

    @property
    def kind(self) -> str:
        """See `ClientMemory.kind`."""
        return self._life.agent.kind

    @property
    def on_device(self) -> bool:
        """Whether the memory is a GPU's."""
        return self._life.backing.on_device

    @property
    def arena(self) -> Bytes1D:
        """Where what is put lies meanwhile; whoever uses it holds `arena_use`."""
        return self._life.arena

    def describe(self) -> bytes:
        """See `ClientMemory.describe`."""
        return self._life.description

    def take(self, blocks: int, nbytes: int) -> c.U64 | None:
        """See `ClientMemory.take`."""
        with self._lock:
            life = self._life
            step = landing_bytes(nbytes)
            total = blocks * step
            if total > self.ring_bytes:
                raise InvalidArgument(
                    "ring_bytes", f"{blocks} blocks of {nbytes} bytes do not fit into the ring"
                )
            at = life.extents.take(total)
            if at is None:
                return None
            life.users += 1
            self._taken[life.start + at] = (life, at, total)
            return (life.start + at + step * np.arange(blocks)).astype(np.uint64)

    def row(self, address: int, nbytes: int, *, writable: bool = True) -> Bytes1D:
        """The bytes at an address of the ring; in a GPU's memory a `DeviceBytes`."""
        return self._life_of(address).row(address, nbytes, writable=writable)

    def sums(self, part: Part, addresses: c.U64) -> c.U64:
        """The checksums of a part's cells, (n, cells), of its bytes at addresses (n,) here."""
        return self._life.backing.sums(part, addresses)

    def reserve(self, n: int, nbytes: int) -> RingView | None:
        """A view that may hold so many blocks for longer than a call, None where that is too much:
        half of the ring may be held, so that gets always find room."""
        step = landing_bytes(nbytes)
        with self._lock:
            if 2 * (self._held_bytes + n * step) > self.ring_bytes:
                return None
            self._held_bytes += n * step
            return RingView(self, n, step)

    def unhold(self, nbytes: int) -> None:
        """They are held no more."""
        with self._lock:
            self._held_bytes -= nbytes

    def registered(self, addresses: c.U64, nbytes: int) -> bool:
        """Whether nodes can read so many bytes at each address."""
        life = self._life
        first, last = life.backing.address, life.end - nbytes
        return bool(first <= int(addresses.min()) and int(addresses.max()) <= last)

    def give(self, addresses: c.U64) -> None:
        """See `ClientMemory.give`."""
        with self._lock:
            life, at, nbytes = self._taken.pop(int(addresses[0]))
            life.extents.give(at, nbytes)
            life.users -= 1

    def lose(self, addresses: c.U64) -> None:
        """See `ClientMemory.lose`."""
        with self._lock:
            life, _at, nbytes = self._taken.pop(int(addresses[0]))
            life.lost_bytes += nbytes
            life.users -= 1
            if life is self._life and 2 * life.lost_bytes >= self.ring_bytes:
                self._renew()

    def _renew(self) -> None:
        fresh = self._new_life()
        self._old.append(self._life)
        self._life = fresh
        self.generation += 1

    def sweep(self) -> None:
        """Ends old lives that nobody uses any more. May block: not for a loop's thread."""
        if not self._old:
            return
        with self._lock:
            over = [life for life in self._old if not life.users]
            self._old = [life for life in self._old if life.users]
        for life in over:
            life.close()

    def close(self) -> None:
        """Ends the agents: nothing lands any more. `KVStoreError` where that cannot be had; then
        the memory stays."""
        error: KVStoreError | None = None
        with self._lock:
            self._closed = True
        for life in (*self._old, self._life):
            try:
                life.close()
            except KVStoreError as found:
                error = found
                _KEPT.append(life)
        self._old.clear()
        if error:
            raise error

    def _life_of(self, address: int) -> _Life:
        for life in (self._life, *self._old):
            if life.start <= address < life.end:
                return life
        raise AssertionError("an address of no ring")


class RingView(HeldBlocks):
    """Parts of the ring that their user holds; implements `View`. Made by `LandingRing.reserve`."""

    def __init__(self, ring: LandingRing, n: int, step: int) -> None:
        super().__init__([])
        self._ring, self._step = ring, step
        self._nbytes = n * step  # held
        self._lock = threading.Lock()
        self._parts: list[c.U64] = []
        self._lost: list[c.U64] = []  # of these, those where somebody may still write
        self._released = False

    def keep(self, addresses: c.U64, *, lost: bool = False) -> bool:
        """See `Keep`; not once this was released."""
        with self._lock:
            if not self._released:
                (self._lost if lost else self._parts).append(addresses)
            return not self._released

    def keep_only(self, addresses: c.U64) -> None:
        """Gives back the parts without any of these, and holds no more than the rest."""
        wanted = set(addresses.tolist())
        with self._lock:
            over = [part for part in self._parts if wanted.isdisjoint(part.tolist())]
            self._parts = [part for part in self._parts if not wanted.isdisjoint(part.tolist())]
            nbytes = sum(len(part) for part in self._parts) * self._step
            self._ring.unhold(self._nbytes - nbytes)
            self._nbytes = nbytes
        for part in over:
            self._ring.give(part)

    def release(self) -> None:
        """See `View.release`."""
        with self._lock:
            if self._released:
                return
            self._released = True
        super().release()
        for part in self._parts:
            self._ring.give(part)
        for part in self._lost:
            self._ring.lose(part)
        self._ring.unhold(self._nbytes)


_KEPT: list[_Life] = []  # memory that may still be written to must never be anybody else's
