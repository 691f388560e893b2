"""A client process: a `Router`, a landing ring, and calls whose outcomes the truth is told."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
from cluster.sim.history import SPACES, Bytes1D, Name, Truth, keys, payload
from cluster.sim.loop import Loop
from cluster.sim.network import Network
from cluster.sim.transfers import Fabric, SimAgent
from cluster.sim.world import SimWorld

from kvstore import commands as c
from kvstore.block import cell_checksums, unpack
from kvstore.cluster.contacts import ClusterSpace, RouterPolicy
from kvstore.cluster.members import MemberState
from kvstore.cluster.messages import PutStatus
from kvstore.cluster.placement import place_of, places_of, segment_blocks
from kvstore.cluster.puts import Puts
from kvstore.cluster.router import Router
from kvstore.errors import Corrupted, KVStoreError, ProtocolError
from kvstore.session.parts import part_of

_SLOT = 4096
_NO_CELLS = np.empty(0, np.uint32)


class _Life:
    """One agent and its landing memory. Every entry has a number that changes whenever it is given
    back, so that a byte which lands for an earlier get is seen."""

    def __init__(self, world: SimWorld, slots: int, sources: Bytes1D) -> None:
        self.agent: SimAgent = world.agent()
        self.memory = np.zeros(slots * _SLOT, np.uint8)
        self.start = world.space.add(self.memory)
        for memory in (self.memory, sources):
            self.agent.register(memory)
        self.agent.guard = lambda address: self.numbers[(address - self.start) // _SLOT]
        self.numbers = [0] * slots
        self.free = list(range(slots))
        self.lost = self.users = 0

    def holds(self, address: int) -> bool:
        """Whether it is the ring that an address is of."""
        return self.start <= address < self.start + self.memory.size


class SimRing:
    """See `kvstore.cluster.router.ClientMemory`: a landing ring and a place to put from, as the
    client's: what may still be written to is lost, and where too much is, another ring is made."""

    def __init__(self, world: SimWorld, slots: int) -> None:
        self._world, self._slots = world, slots
        self.generation = 0
        self.sources = np.zeros(slots * _SLOT, np.uint8)
        self._sources_at = world.space.add(self.sources)
        self._next_source = 0
        self._life = _Life(world, slots, self.sources)
        self._old: list[_Life] = []

    @property
    def kind(self) -> str:
        """See `ClientMemory.kind`."""
        return self._life.agent.kind

    @property
    def ring_bytes(self) -> int:
        """See `ClientMemory.ring_bytes`."""
        return self._slots * _SLOT

    def describe(self) -> bytes:
        """See `ClientMemory.describe`."""
        return self._life.agent.describe()

    def take(self, blocks: int, nbytes: int) -> c.U64 | None:
        """See `ClientMemory.take`."""
        assert nbytes <= _SLOT
        life = self._life
        if len(life.free) < blocks:
            return None
        life.users += 1
        taken = [life.free.pop(0) for _ in range(blocks)]
        return np.array([life.start + slot * _SLOT for slot in taken], np.uint64)

    def give(self, addresses: c.U64) -> None:
        """See `ClientMemory.give`."""
        life = self._life_of(addresses)
        for address in addresses.tolist():
            slot = (address - life.start) // _SLOT
            assert slot not in life.free, "an entry of the ring is given back twice"
            life.numbers[slot] += 1
            life.free.append(slot)
        self._leave(life)

    def lose(self, addresses: c.U64) -> None:
        """See `ClientMemory.lose`."""
        life = self._life_of(addresses)
        life.lost += len(addresses)
        if life is self._life and 2 * life.lost >= self._slots:
            self._old.append(life)
            self._life = _Life(self._world, self._slots, self.sources)
            self.generation += 1
        self._leave(life)

    def _life_of(self, addresses: c.U64) -> _Life:
        lives = (self._life, *self._old)
        return next(life for life in lives if life.holds(int(addresses[0])))

    def _leave(self, life: _Life) -> None:
        """One user less; an old ring that has none any more is revoked."""
        life.users -= 1
        if life in self._old and not life.users:
            self._old.remove(life)
            self._world.spawn(life.agent.close())

    def at(self, address: int, nbytes: int) -> Bytes1D:
        """Bytes of the ring."""
        return self._world.space.at(address, nbytes)

    def source(self, data: Bytes1D) -> int:
        """Puts bytes where nodes can read them; what was there before is overwritten."""
        slot = self._next_source = (self._next_source + 1) % self._slots
        self.sources[slot * _SLOT : slot * _SLOT + data.size] = data
        return self._sources_at + slot * _SLOT


def places(space: int, chain: int, first: int, n: int) -> c.U64:
    """The places of neighbours in a chain."""
    segment = segment_blocks(SPACES[space][1].block_tokens)
    head = place_of(keys(space, chain, first // segment * segment, 1)[0].tobytes())
    return places_of(
        keys(space, chain, first, n), position=first, segment=segment, first_place=head
    )


class SimClient:
    """One process and its calls. What it is told is checked against the truth at once."""

    def __init__(
        self,
        network: Network,
        fabric: Fabric,
        name: str,
        *,
        number: int,
        rng: random.Random,
        seeds: list[str],
        truth: Truth,
        slots: int = 16,
        policy: RouterPolicy | None = None,
    ) -> None:
        self.loop: Loop = network.loop
        self.world = SimWorld(network, fabric, name, number=number, rng=rng)
        self.process = self.world.process
        self.truth = truth
        self.ring = SimRing(self.world, slots)
        self.router = Router(self.world, self.ring, seeds, policy)
        self._spaces: dict[int, ClusterSpace] = {}
        self.world.spawn(self.router.run())

    async def _space(self, number: int) -> ClusterSpace:
        if number not in self._spaces:
            self._spaces[number] = await self.router.open(*SPACES[number])
        return self._spaces[number]

    async def put(
        self,
        space: int,
        chain: int,
        first: int,
        n: int,
        *,
        copies: int,
        persist: bool = False,
        ttl_ms: int = 0,
        timeout_ms: float = 2000.0,
    ) -> int:
        """Puts neighbours of a chain; how many are on `copies` nodes."""
        now, truth = self.loop.now, self.truth
        names: list[Name] = [(space, chain, first + i) for i in range(n)]
        numbers = [truth.begin_put(name, now, ttl_ms) for name in names]
        layout = SPACES[space][1]
        sources = [payload(space, number) for number in numbers]
        found, failed_before = np.zeros(n, np.uint8), self.router.counters.failed_over
        sure = np.zeros(n, bool)
        try:
            opened = await self._space(space)
            puts = Puts(
                hashes=keys(space, chain, first, n),
                addresses=np.array([self.ring.source(data) for data in sources], np.uint64),
                checksums=np.array(
                    [cell_checksums(data, layout.cell_bounds) for data in sources], np.uint64
                ),
                places=places(space, chain, first, n),
                parent=keys(space, chain, first - 1, 1).tobytes() if first else b"",
                position=first,
                ttl_ms=ttl_ms,
                copies=copies,
                persist=persist,
            )
            outcome = await self.router.put(opened, puts, timeout_ms)
            found = outcome.copies
            # Where somebody took too long, what it was asked for may come later.
            if self.router.counters.failed_over == failed_before:
                sure = np.isin(outcome.status, (PutStatus.STORED, PutStatus.EXISTS))
        except KVStoreError as error:
            self.loop.say(f"{self.world.name}: put of {names[0]}+{n}: {error!r}")
        for number, on, once in zip(numbers, found.tolist(), sure.tolist(), strict=True):
            truth.end_put(number, self.loop.now, on, epoch=self.router.epoch, sure=once)
        self.loop.say(
            f"{self.world.name}: put {names[0]} as {numbers} for {ttl_ms}: {found.tolist()}"
        )
        return int(np.count_nonzero(found >= copies))

    async def put_part(
        self,
        space: int,
        chain: int,
        first: int,
        numbers: list[int],
        cell: int,
        *,
        agreed: bytes,
        copies: int,
        timeout_ms: float = 2000.0,
    ) -> None:
        """Puts one cell of each of the neighbours, of puts that others put the rest of."""
        truth, layout, n = self.truth, SPACES[space][1], len(numbers)
        for number in numbers:
            truth.begin_part(number, cell)
        part = part_of(layout, np.array([cell], np.uint32))
        ((at, _own, nbytes),) = part.cell_runs
        sources = [payload(space, number)[at : at + nbytes] for number in numbers]
        found = np.zeros(n, np.uint8)
        try:
            opened = await self._space(space)
            puts = Puts(
                hashes=keys(space, chain, first, n),
                addresses=np.array([self.ring.source(data) for data in sources], np.uint64),
                checksums=np.array(
                    [cell_checksums(data, part.bounds) for data in sources], np.uint64
                ),
                places=places(space, chain, first, n),
                parent=keys(space, chain, first - 1, 1).tobytes() if first else b"",
                position=first,
                ttl_ms=0,
                copies=copies,
                persist=False,
                cells=part.cells,
                agreed=agreed,
            )
            found = (await self.router.put(opened, puts, timeout_ms)).copies
        except KVStoreError as error:
            self.loop.say(f"{self.world.name}: put of cell {cell} of {numbers}: {error!r}")
        for number, on in zip(numbers, found.tolist(), strict=True):
            truth.end_put(number, self.loop.now, on, epoch=self.router.epoch)
        self.loop.say(
            f"{self.world.name}: put cell {cell} of {(space, chain, first)} as {numbers}:"
            f" {found.tolist()}"
        )

    async def get(
        self,
        space: int,
        chain: int,
        first: int,
        n: int,
        *,
        cells: bool = False,
        timeout_ms: float = 1500.0,
    ) -> list[int | None]:
        """Gets neighbours of a chain; the number of the put that each block is of, None for a miss.

        cells: only the first cell of each, of a layout that has several.
        """
        began, epoch, layout = self.loop.now, self.router.epoch, SPACES[space][1]
        some = np.array([0], np.uint32) if cells and layout.n_cells > 1 else _NO_CELLS
        part = part_of(layout, some)
        got: dict[int, Bytes1D] = {}
        hashes = keys(space, chain, first, n)

        async def accept(
            rows: npt.NDArray[np.intp], addresses: c.U64, headers: c.U8
        ) -> npt.NDArray[np.bool_]:
            copied = [self.ring.at(int(at), part.nbytes).copy() for at in addresses]
            await self.world.sleep(0.05)
            sound = np.zeros(len(rows), np.bool_)
            for i, (row, data) in enumerate(zip(rows.tolist(), copied, strict=True)):
                try:
                    header = unpack(headers[i])
                except (Corrupted, ProtocolError):
                    continue
                sums = header.checksums[some] if len(some) else header.checksums
                sound[i] = header.key == hashes[row].tobytes() and np.array_equal(
                    cell_checksums(data, part.bounds), sums
                )
                if sound[i]:
                    got[row] = data
            return sound

        try:
            opened = await self._space(space)
            tiers = await self.router.get(
                opened,
                hashes,
                places(space, chain, first, n),
                cells=some,
                nbytes=part.nbytes,
                accept=accept,
                timeout_ms=timeout_ms,
            )
        except KVStoreError as error:
            self.loop.say(f"{self.world.name}: get of {(space, chain, first)}: {error!r}")
            return [None] * n
        found: list[int | None] = [None] * n
        for row in np.flatnonzero(tiers).tolist():
            name = (space, chain, first + row)
            found[row] = self.truth.check_get(name, got[row], part, began=began, epoch=epoch)
        self.truth.misses += found.count(None)
        self.loop.say(f"{self.world.name}: got {(space, chain, first)}: {found}")
        return found

    async def match(self, space: int, chain: int, n: int, *, timeout_ms: float = 1500.0) -> int:
        """How many leading blocks of a chain are said to be there."""
        try:
            opened = await self._space(space)
            tiers = await self.router.match(
                opened, keys(space, chain, 0, n), places(space, chain, 0, n), timeout_ms
            )
        except KVStoreError as error:
            self.loop.say(f"{self.world.name}: match of {(space, chain)}: {error!r}")
            return 0
        return len(tiers)

    async def drop(self, space: int, *, timeout_ms: float = 3000.0) -> bool:
        """Forgets a namespace; whether it was said to be forgotten."""
        drop = self.truth.begin_drop(space, self.loop.now)
        try:
            await self.router.drop_namespace(await self._space(space), timeout_ms)
        except KVStoreError as error:
            self.loop.say(f"{self.world.name}: drop of {space}: {error!r}")
            return False
        drop.epoch = self.router.epoch
        if drop.epoch != self.truth.present_epoch():
            # Those who have been cut off from etcd cannot know that there are other members.
            self.loop.say(f"{self.world.name}: dropped {space} under an earlier view")
            return False
        drop.ended = self.loop.now
        self.loop.say(f"{self.world.name}: dropped {space}")
        return True

    async def drop_keys(
        self, space: int, chain: int, first: int, n: int, *, timeout_ms: float = 3000.0
    ) -> bool:
        """Drops neighbours of a chain; whether all who may have them have said that they did."""
        names: list[Name] = [(space, chain, first + i) for i in range(n)]
        drop = self.truth.begin_key_drop(names, self.loop.now)
        try:
            dropped = await self.router.drop(
                await self._space(space), keys(space, chain, first, n), timeout_ms
            )
        except KVStoreError as error:
            self.loop.say(f"{self.world.name}: drop of {names[0]}+{n}: {error!r}")
            return False
        view = self.router.view
        assert view is not None
        known = {member.name for member in view.members if member.state != MemberState.OUT}
        # One that is no member, or none any more, keeps what it has.
        if not dropped.everywhere or known != self.truth.hosts():
            self.loop.say(f"{self.world.name}: dropped {names[0]}+{n}, but not everywhere")
            return False
        drop.ended = self.loop.now
        self.loop.say(f"{self.world.name}: dropped {names[0]}+{n}")
        return True
