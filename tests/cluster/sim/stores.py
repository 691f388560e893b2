"""The real `Store`, over plain memory, as one node's process sees it."""

from __future__ import annotations

import functools
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
from cluster.sim.loop import Dead, Future, Loop, Process, Timer
from cluster.sim.transfers import Space
from nvme.sim_disk import SimDisk, aligned

from kvstore import commands as c
from kvstore import limits
from kvstore.block import cell_checksums
from kvstore.errors import DeadlineExceeded, KVStoreError, ResourceExhausted, Unavailable
from kvstore.index.format import IndexView
from kvstore.index.reader import IndexReader
from kvstore.layout import Layout
from kvstore.nvme.format import Geometry, Superblock
from kvstore.nvme.opening import write_superblock
from kvstore.nvme.ops import Op, Outcome
from kvstore.nvme.perform import perform
from kvstore.nvme.recovery import recover, survey
from kvstore.nvme.volume import Volume
from kvstore.session.parts import ALL_CELLS, part_of, payload_offset
from kvstore.store import NvmePolicy, Store, StoreMemory
from kvstore.store.tickets import Deferred

SECRET = b"s" * 32  # of all nodes: chains have the same keys everywhere
_WAITERS = 4  # calls that may wait for disks at one time
CALL_MS = 0.05  # one way of a command
SUMS_MS = 0.2
EPOCH_MS = 1_000_000_000  # Unix time at the start of a run

Bytes1D = npt.NDArray[np.uint8]


GEOMETRY = Geometry(segment_granules=17, n_segments=12, log_granules=3)
_EVERY = NvmePolicy(every=True)


def new_disk(seed: int) -> SimDisk:
    """A disk with an empty volume."""
    disk = SimDisk(GEOMETRY.nbytes, seed=seed)
    write_superblock(disk, Superblock(volume_id=b"v" * 16, geometry=GEOMETRY))
    return disk


class SimStore:
    """One life of a host's store; its process is the daemon's core."""

    def __init__(
        self,
        loop: Loop,
        name: str,
        *,
        instance: int,
        slots: int,
        rng: random.Random,
        disk: SimDisk | None = None,
        skew_ms: float = 0.0,
        check_every: int = 1,
    ) -> None:
        """disk: what its last life left behind. skew_ms: of the wall clock. check_every: commands
        between two walks through all invariants of the store."""
        self.loop, self.instance, self.rng = loop, instance, rng
        self.process = Process(loop, f"{name}-store")
        self.pool = aligned(slots * limits.GRANULE_BYTES)
        self.generations = np.zeros(slots, np.uint64)
        self._indexes: list[Bytes1D] = []
        self.spy: Callable[[SimStore, int, c.Command, Any], None] | None = None
        self.full = False  # whether it grants no slots: as if all of its blocks were in use
        self._hung_up: set[int] = set()
        self._answers: dict[int, Callable[[Any], None]] = {}
        self._timer: Timer | None = None
        self._check_every, self._commands = check_every, 0
        self._disk, self._skew_ms = disk, skew_ms
        volumes = [Volume(0, 0, GEOMETRY, b"v" * 16)] if disk is not None else []
        self.store = Store(
            StoreMemory(pool=self.pool, generations=self.generations, new_index=self._new_index),
            secret=SECRET,
            instance_id=instance,
            max_blocks=2 * slots + (GEOMETRY.n_segments * GEOMETRY.segment_granules if disk else 0),
            now_ms=self.now_ms(),
            volumes=volumes,
            nvme=_EVERY,
        )
        self._reader: tuple[int, IndexReader] | None = None
        if disk is not None:
            self._recovery = self._recover(disk)
            loop.after(1.0, self._go_on_recovering, self.process)

    def _new_index(self, nbytes: int) -> Bytes1D:
        self._indexes.append(np.zeros(nbytes, np.uint8))
        return self._indexes[-1]

    def now_ms(self) -> int:
        """Unix time."""
        return EPOCH_MS + int(self.loop.now + self._skew_ms)

    @property
    def index(self) -> IndexReader:
        """A reader of the index as it is now."""
        number = len(self._indexes)
        if self._reader is None or self._reader[0] != number:
            self._reader = (number, IndexReader(IndexView.open(self._indexes[-1])))
        return self._reader[1]

    def handle(self, connection: int, command: c.Command, then: Callable[[Any], None]) -> None:
        """One command, at this moment; its result may come later."""
        if self.full and isinstance(command, c.Grant):
            raise ResourceExhausted("all blocks are in use", retry_after_ms=limits.RETRY_AFTER_MS)
        due_ms = self.store.next_due_ms
        if due_ms is not None and due_ms <= self.now_ms():
            self.store.tick(self.now_ms())
        try:
            result = self.store.handle(connection, command, self.now_ms())
            if self.spy is not None:
                self.spy(self, connection, command, result)
            if isinstance(result, Deferred):
                self._answers[result.ticket] = then
        finally:
            self._settle()
        if not isinstance(result, Deferred):
            then(result)

    def store_knows(self, connection: int) -> bool:
        """Whether the connection is open."""
        return connection in self.store._connections and connection not in self._hung_up

    def hang_up(self, connection: int) -> None:
        """A connection was closed, by a process that may live."""
        self._hung_up.add(connection)
        self.store.disconnect(connection)

    def left_ms(self, name: str, layout: Layout, hashes: c.U8) -> list[int]:
        """How long the leading blocks of a chain have yet; 0 for ever."""
        connection = self.store.connect()
        opening = c.OpenNamespace(name=name, layout=layout.encode())
        opened = self.store.handle(connection, opening, self.now_ms())
        lease = c.Lease(namespace=opened.namespace, hashes=hashes)
        leased = self.store.handle(connection, lease, self.now_ms())
        if leased.lease:
            self.store.handle(connection, c.Release(lease=leased.lease), self.now_ms())
        self.store.disconnect(connection)
        left_ms: list[int] = leased.left_ms.tolist()
        return left_ms

    def check(self) -> None:
        """The store's own invariants."""
        self.store.check()

    def _settle(self) -> None:
        """After each change of the store."""
        self._commands += 1
        if self._commands % self._check_every == 0:
            self.check()
        if self._disk is None:
            return
        for op in self.store.nvme.take_ops():
            carry_out = functools.partial(self._carry_out, op)
            self.loop.after(self.rng.uniform(0.1, 3.0), carry_out, self.process)
        for ticket, result in self.store.nvme.tickets.take():
            then = self._answers.pop(ticket, None)
            if then is not None:
                then(result)
        if self._timer is not None:
            self._timer.cancel()
        due_ms = self.store.next_due_ms
        if due_ms is not None:
            later_ms = max(due_ms - self.now_ms(), 1)
            self._timer = self.loop.after(later_ms, self._tick, self.process)

    def _tick(self) -> None:
        self.store.tick(self.now_ms())
        self._settle()

    def _carry_out(self, op: Op) -> None:
        assert self._disk is not None
        outcome = perform(op, [self._disk], self.pool)
        hear = functools.partial(self._hear, outcome)
        self.loop.after(self.rng.uniform(0.05, 1.0), hear, self.process)

    def _hear(self, outcome: Outcome) -> None:
        self.store.hear(outcome, self.now_ms())
        self._settle()

    def _recover(self, disk: SimDisk) -> Iterator[None]:
        """As `kvstore.nvme.runner.Runner` does it."""
        superblock = Superblock(volume_id=b"v" * 16, geometry=GEOMETRY)
        found = survey(disk, superblock, stop=lambda: False)
        assert found is not None
        yield
        self.store.nvme.found(0, found)
        for segment in recover(disk, superblock, stop=lambda: False, found=found):
            yield
            self.store.nvme.adopt(0, segment)
        yield
        self.store.nvme.recovered(0, "")

    def _go_on_recovering(self) -> None:
        try:
            next(self._recovery)
        except StopIteration:
            self._settle()
            return
        self._settle()
        self.loop.after(self.rng.uniform(0.1, 20.0), self._go_on_recovering, self.process)

    def disk_after(self, *, power_cut: bool) -> SimDisk | None:
        """What the next life finds on its disk."""
        if self._disk is None:
            return None
        if power_cut:
            return self._disk.crash(np.random.default_rng(self.rng.getrandbits(32)))
        self._disk.sync()  # what a process has written stays when it dies
        return self._disk

    def view_of(self, layout: Layout, granule: int) -> tuple[Bytes1D, Bytes1D]:
        """Header and payload of a slot."""
        start, offset = granule * limits.GRANULE_BYTES, payload_offset(layout)
        whole = self.pool[start : start + offset + layout.block_bytes]
        return whole[:offset], whole[offset:]


class _Link:
    """One connection of a node to its store, commands in their order. One that was not answered in
    time is over, because nobody can tell what its next answer would be of."""

    def __init__(self, host: SimStore, process: Process, rng: random.Random) -> None:
        self._host, self._process, self._rng = host, process, rng
        self.number = host.store.connect()
        self.closed = False
        self._last_at = 0.0  # when the last command arrives
        self._waiting: dict[Future[Any], None] = {}
        host.process.at_death.append(self.close)

    async def call(self, command: c.Command, timeout_ms: float) -> Any:
        """Carried out once it was sent, whoever waits for it."""
        host, loop, process = self._host, self._host.loop, self._process
        if not process.alive:
            raise Dead(process.name)
        if self.closed or not host.process.alive:
            raise Unavailable("the store is gone")
        answer: Future[Any] = Future()
        self._waiting[answer] = None

        def late() -> None:
            # What came while the process stood still is due as well, and is looked at first.
            loop.after(0.0, judge, process)

        def judge() -> None:
            if not answer.done:
                answer.fail(DeadlineExceeded("the store did not answer in time"))
                self.close()

        def tell(result: Any) -> None:
            loop.after(self._trip(), lambda: answer.set(result), process)

        def arrive() -> None:
            if not host.store_knows(self.number):
                return
            try:
                host.handle(self.number, command, tell)
            except KVStoreError as problem:
                error = problem
                loop.after(self._trip(), lambda: answer.fail(error), process)

        timer = loop.after(max(timeout_ms, 1.0), late, process)
        self._last_at = max(self._last_at, loop.now + self._trip())
        loop.after(self._last_at - loop.now, arrive, host.process)
        try:
            return await answer
        finally:
            timer.cancel()
            self._waiting.pop(answer, None)

    def _trip(self) -> float:
        return CALL_MS * self._rng.uniform(0.2, 3.0)

    def close(self) -> None:
        """What was sent before is carried out; what the connection holds is in quarantine then."""
        if self.closed:
            return
        self.closed = True
        for answer in list(self._waiting):
            answer.fail(Unavailable("the store is gone"))
        host = self._host
        after_all_ms = max(self._last_at - host.loop.now, 0.0)
        host.loop.after(after_all_ms, lambda: host.hang_up(self.number), host.process)

    def died(self) -> None:
        """The store sees by a pidfd that the process is gone, and takes back what was held."""
        self.close()
        host = self._host
        seen_ms = max(self._last_at - host.loop.now, 0.0) + self._rng.uniform(0.5, 20.0)
        host.loop.after(seen_ms, lambda: host.store.holder_died(self.number), host.process)


class SimNodeStore:
    """See `kvstore.cluster.world.NodeStore`; `lost` is called once nothing works any more."""

    def __init__(
        self,
        host: SimStore,
        process: Process,
        space: Space,
        rng: random.Random,
        lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._host, self._process, self._rng, self._lost = host, process, rng, lost
        self._base = space.add(host.pool)
        self._main = _Link(host, process, rng)
        self._links = [self._main]
        self._idle: list[_Link] = []
        self._vacant: list[_Link] = []  # seats that nobody has
        self._turns: list[Future[None]] = []
        self._at_work = 0
        process.at_death.append(self._died)

    @property
    def pool(self) -> Bytes1D:
        """What an agent registers."""
        return self._host.pool

    def use_of(self, address: int) -> int:
        """Differs whenever the slot at an address of the pool is used for something else."""
        return int(self._host.generations[(address - self._base) // limits.GRANULE_BYTES])

    def _died(self) -> None:
        for link in self._links:
            link.died()

    @property
    def instance(self) -> int:
        return self._host.instance

    async def command(self, command: c.Command, timeout_ms: float) -> Any:
        """See `NodeStore.command`."""
        if isinstance(command, c.Fetch | c.Persist | c.Drop):
            return await self._call_that_waits(command, timeout_ms)
        try:
            return await self._main.call(command, timeout_ms)
        except (DeadlineExceeded, Unavailable):
            if self._main.closed:
                self._lost()
            raise

    async def _call_that_waits(self, command: c.Command, timeout_ms: float) -> Any:
        """On a connection of its own, because meanwhile that serves no other call."""
        while self._at_work >= _WAITERS:
            turn: Future[None] = Future()
            self._turns.append(turn)
            await turn
        self._at_work += 1
        try:
            if not self._host.process.alive:
                raise Unavailable("the store is gone")
            link = self._idle.pop() if self._idle else self._new_link()
            try:
                return await link.call(command, timeout_ms)
            finally:
                if not link.closed:
                    self._idle.append(link)
        finally:
            self._at_work -= 1
            turns, self._turns = self._turns, []
            for turn in turns:
                turn.set(None)

    def _new_link(self) -> _Link:
        link = _Link(self._host, self._process, self._rng)
        self._links.append(link)
        return link

    def look(self, namespace: int, hashes: c.U8) -> c.U8:
        """See `NodeStore.look`."""
        if not len(hashes):
            return np.empty(0, np.uint8)
        found = self._host.index.lookup(namespace, hashes)
        return np.where(found.found, found.tiers, 0).astype(np.uint8)

    def addresses(self, layout: Layout, granules: c.U32) -> c.U64:
        """See `NodeStore.addresses`."""
        first = np.uint64(self._base + payload_offset(layout))
        return granules.astype(np.uint64) * np.uint64(limits.GRANULE_BYTES) + first

    def headers(self, layout: Layout, granules: c.U32) -> c.U8:
        """See `NodeStore.headers`."""
        found = [self._host.view_of(layout, granule)[0] for granule in granules.tolist()]
        return np.array(found, np.uint8).reshape(len(granules), payload_offset(layout))

    def sums_here(self, layout: Layout, granules: c.U32, cells: c.U32 = ALL_CELLS) -> c.U64:
        """See `NodeStore.sums_here`."""
        part = part_of(layout, cells)
        found = []
        for granule in granules.tolist():
            whole = self._host.view_of(layout, granule)[1]
            own = [whole[at : at + nbytes] for at, _own, nbytes in part.cell_runs]
            found.append(cell_checksums(np.concatenate(own), part.bounds))
        return np.array(found, np.uint64).reshape(len(granules), len(part.cell_runs))

    async def sums(self, layout: Layout, granules: c.U32, cells: c.U32 = ALL_CELLS) -> c.U64:
        """See `NodeStore.sums`: reads the bytes at some moment, and answers later."""
        await self._host.loop.sleep(SUMS_MS * self._rng.random(), self._process)
        found = self.sums_here(layout, granules, cells)
        await self._host.loop.sleep(SUMS_MS * self._rng.random(), self._process)
        return found

    @asynccontextmanager
    async def seat(self, timeout_ms: float) -> AsyncIterator[SimSeat]:
        """See `NodeStore.seat`; there are as many as are wanted."""
        del timeout_ms
        if not self._host.process.alive:
            raise Unavailable("the store is gone")
        link = self._vacant.pop() if self._vacant else self._new_link()
        try:
            yield SimSeat(link, self._lost)
        except BaseException as error:
            if not isinstance(error, KVStoreError):
                link.close()  # nobody knows what is held by it
            raise
        finally:
            if not link.closed:
                self._vacant.append(link)


class SimSeat:
    """See `kvstore.cluster.world.Seat`."""

    def __init__(self, link: _Link, lost: Callable[[], None]) -> None:
        self._link, self._lost = link, lost

    async def command(self, command: c.Command, timeout_ms: float) -> Any:
        """See `Seat.command`."""
        try:
            return await self._link.call(command, timeout_ms)
        except (DeadlineExceeded, Unavailable):
            if self._link.closed:
                self._lost()
            raise

    async def lose(self) -> None:
        """See `Seat.lose`."""
        self._link.close()
