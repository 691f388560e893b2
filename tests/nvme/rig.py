"""A store on simulated disks, where every operation is done when the seed says so.

The rig plays the shell, which carries operations out and tells their outcomes, both in any order
and the one inside another; the clients; and power cuts. `Judge` knows what may come of it.
"""

from __future__ import annotations

import contextlib
import errno
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from nvme.judge import SLOT_GRANULES, SPACES, Judge, Name, Promise, chain, payload, sums
from nvme.sim_disk import SimDisk

from kvstore import commands as c
from kvstore import limits
from kvstore.block import header_bytes, unpack
from kvstore.errors import KVStoreError, ResourceExhausted
from kvstore.index import IndexReader, IndexView
from kvstore.index.format import NVME_TIER
from kvstore.nvme import geometry as on_disk
from kvstore.nvme.disk import WaryDisk
from kvstore.nvme.format import (
    HEADER_GRANULES,
    Geometry,
    Superblock,
    aligned,
    unpack_segment_header,
)
from kvstore.nvme.opening import write_superblock
from kvstore.nvme.ops import Op, Outcome
from kvstore.nvme.perform import perform
from kvstore.nvme.recovery import recover, survey
from kvstore.nvme.slots import check_slot
from kvstore.nvme.volume import Health, Use, Volume
from kvstore.store import NvmePolicy, Store, StoreMemory, forgetting
from kvstore.store.blocks import BlockState
from kvstore.store.deadlines import Due
from kvstore.store.tickets import Deferred

UNIT = limits.GRANULE_BYTES
PATIENT_MS = limits.MAX_DEADLINE_MS
U8 = npt.NDArray[np.uint8]
Then = Callable[[Any], None]
FEW_BLOCKS = 64  # a store of so many has to forget blocks on disk, for want of ids
EVERY = NvmePolicy(every=True)
_CONNECTIONS = 6
_STARTS_IOS = 14  # behind the log, about as many as there are until a start knows all segments
_IDLE_ROUNDS = 60  # moments of time that may pass until all calls are answered


def tight(segment_granules: int = 17, n_segments: int = 6, log_granules: int = 3) -> Geometry:
    return Geometry(
        segment_granules=segment_granules, n_segments=n_segments, log_granules=log_granules
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """nesting: how often something else happens inside an operation, before one of its I/Os.
    pauses: how many things happen in the middle of a put or a get, less one.
    honest: whether the disks keep what they say is synced, so that acknowledgements are checked
    there. excused: whether a persisted block may be lost, because reads fail or bytes rot.
    blind: how often a read fails while a life begins. keeps_unread: whether nothing is dropped in
    such a life, which would be the end of all that could not be read. away: how often one of
    several volumes is off for a life, because its log cannot be read."""

    geometries: tuple[Geometry, ...] = (tight(),)
    pool_bytes: int = 192 << 10
    max_blocks: int = 256
    policy: str = "lru"
    nvme: NvmePolicy = EVERY
    nesting: float = 0.2
    pauses: int = 3
    honest: bool = True
    excused: bool = False
    blind: float = 0.0
    keeps_unread: bool = False
    away: float = 0.0
    check_each: int = 1


@dataclass(slots=True)
class Asked:
    """A call that waits."""

    connection: int
    due_ms: int
    then: Then


@dataclass(slots=True)
class Held:
    """A view: blocks under a lease. slots: name, granule, version."""

    lease: int
    connection: int
    slots: list[tuple[Name, int, int]] = field(default_factory=list)


class Wire:
    """A disk under the rig's hand."""

    def __init__(self, rig: Rig, sim: SimDisk) -> None:
        self.rig, self.disk = rig, WaryDisk(sim)

    @property
    def nbytes(self) -> int:
        return self.disk.nbytes

    def read(self, offset: int, buffers: Sequence[U8]) -> None:
        self.rig.between("read")
        self.disk.read(offset, buffers)

    def write(self, offset: int, buffers: Sequence[U8]) -> None:
        self.rig.between("write")
        self.disk.write(offset, buffers)

    def sync(self) -> None:
        self.rig.between("sync")
        self.disk.sync()


def formatted(geometry: Geometry, number: int) -> SimDisk:
    """A disk with an empty volume."""
    disk = SimDisk(geometry.nbytes, seed=number)
    write_superblock(disk, Superblock(volume_id=bytes([number + 1]) * 16, geometry=geometry))
    disk.ios = 0
    return disk


@contextlib.contextmanager
def small_limits() -> Iterator[None]:
    """Batches, reads and log sectors of a few blocks, so that there are many; and disks that are
    hardly larger than their segments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_disk, "FIRST_SEGMENT_MULTIPLE", 1)
        patch.setattr(limits, "NVME_WRITE_BYTES", 36 << 10)
        patch.setattr(limits, "NVME_READ_BYTES", 24 << 10)
        patch.setattr(forgetting, "LOG_RECORDS", 5)
        yield


class Rig:
    """One life of a store; `crash`, `restart` and `fork` make the next."""

    def __init__(
        self,
        seed: int,
        plan: Plan = Plan(),
        *,
        sims: Sequence[SimDisk] | None = None,
        judge: Judge | None = None,
        now_ms: int = 1_000_000,
        recovers: bool = True,
    ) -> None:
        """recovers: at once; else as `step` comes to it."""
        self.seed, self.plan = seed, plan
        self.rng = random.Random(seed)
        self.sims = list(sims or [formatted(g, i) for i, g in enumerate(plan.geometries)])
        self.judge = judge or Judge()
        self.now_ms = now_ms
        self.on_io: Callable[[Rig, str], None] | None = None
        self.out: list[Op] = []
        self.done: list[Outcome] = []
        self.asked: dict[int, Asked] = {}
        self.held: list[Held] = []
        self.depth = self.changes = 0
        self.stopped = False
        self._indexes: list[U8] = []
        self._reader: tuple[int, IndexReader] | None = None
        self._open_store()
        self.blind = plan.blind > 0 and self.rng.random() < plan.blind
        if self.blind:
            sim = self.rng.choice(self.sims)
            sim.fail_at(sim.ios + self.rng.randrange(4, _STARTS_IOS), errno.EIO, of="read")
        if plan.away and len(self.sims) > 1 and self.rng.random() < plan.away:
            _hide_log(self.rng.choice(self.sims))
        self._recoveries = [self._recovery(i) for i in range(len(self.sims))]
        self.recovering = len(self._recoveries)
        if recovers:
            self.recover()

    def _open_store(self) -> None:
        self.pool = aligned(self.plan.pool_bytes)
        self.generations = np.zeros(self.plan.pool_bytes // UNIT, np.uint64)
        self.volumes, base = list[Volume](), 0
        for number, geometry in enumerate(self.plan.geometries):
            self.volumes.append(Volume(number, base, geometry, bytes([number + 1]) * 16))
            base += geometry.n_segments
        self.store = Store(
            StoreMemory(pool=self.pool, generations=self.generations, new_index=self._new_index),
            secret=b"s" * 32,
            instance_id=self.rng.getrandbits(62),
            max_blocks=self.plan.max_blocks,
            policy=self.plan.policy,
            now_ms=self.now_ms,
            volumes=self.volumes,
            nvme=self.plan.nvme,
        )
        self.disks = [Wire(self, sim) for sim in self.sims]
        self.health = [Health.OK for _ in self.volumes]
        self.me = self.store.connect()
        self.idle = [self.store.connect() for _ in range(_CONNECTIONS)]
        self.ids = [self._opened(space) for space in range(len(SPACES))]

    def _new_index(self, nbytes: int) -> U8:
        self._indexes.append(np.zeros(nbytes, np.uint8))
        return self._indexes[-1]

    def _opened(self, space: int) -> int:
        name, layout = SPACES[space]
        command = c.OpenNamespace(name=name, layout=layout.encode())
        opened = self.store.handle(self.me, command, self.now_ms)
        assert isinstance(opened, c.NamespaceOpened)
        return opened.namespace

    # -- the shell ---------------------------------------------------------------------

    def step(self) -> bool:
        """Something that is under way goes on; False if nothing is."""
        choices = [self._perform] * len(self.out) + [self._hear] * len(self.done)
        choices += [self._go_on_recovering] * len(self._recoveries)
        if not choices:
            return False
        self.rng.choice(choices)()
        return True

    def _perform(self) -> None:
        op = self.out.pop(self.rng.randrange(len(self.out)))
        self.done.append(perform(op, self.disks, self.pool))

    def _hear(self) -> None:
        outcome = self.done.pop(self.rng.randrange(len(self.done)))
        self.store.hear(outcome, self.now_ms)
        self._changed()

    def perform_one(self, kind: type[Op], volume: int = 0) -> None:
        """Carries out the first operation of a kind that is out, and tells nobody."""
        op = next(op for op in self.out if isinstance(op, kind) and op.volume == volume)
        self.out.remove(op)
        self.done.append(perform(op, self.disks, self.pool))

    def hear_one(self) -> None:
        """Tells what came of the operation that was carried out first."""
        self.store.hear(self.done.pop(0), self.now_ms)
        self._changed()

    def carry_out(self, kind: type[Op], volume: int = 0) -> None:
        """Both."""
        self.perform_one(kind, volume)
        self.hear_one()

    def between(self, kind: str) -> None:
        """Before an I/O."""
        if self.on_io:
            self.on_io(self, kind)
        if self.depth < 3 and self.rng.random() < self.plan.nesting:
            self.depth += 1
            self.step()
            self.depth -= 1

    def recover(self) -> None:
        """Until all is found that the volumes hold."""
        while self._recoveries:
            self._go_on_recovering()

    def _go_on_recovering(self) -> None:
        # Not among the others meanwhile: its own reads may have something else happen.
        one = self._recoveries.pop(self.rng.randrange(len(self._recoveries)))
        if next(one, None):
            self._recoveries.append(one)
            return
        self.recovering -= 1
        if not self.recovering:
            self._find_again()

    def _recovery(self, number: int) -> Iterator[bool]:
        """As `Runner` does it."""
        nvme, disk, error = self.store.nvme, self.disks[number], ""
        volume = self.volumes[number]
        superblock = Superblock(volume_id=volume.id, geometry=volume.geometry)
        try:
            _reopen(self.sims[number])
            found = survey(disk, superblock, stop=lambda: False)
            assert found is not None
            yield True
            nvme.found(number, found)
            for segment in recover(disk, superblock, stop=lambda: False, found=found):
                yield True
                nvme.adopt(number, segment)
                self._changed()
        except (OSError, KVStoreError) as problem:
            error = str(problem)
        yield True
        nvme.recovered(number, error)
        self._changed()

    def _find_again(self) -> None:
        """What must be there after a restart is."""
        self._look_at_promises()
        for name, promise in list(self.judge.must.items()):
            if promise.use is None:
                assert self._may_lose(), f"{name} was persisted, and is not there"
                del self.judge.must[name]

    def _changed(self) -> None:
        """The store did something: begins what it wants, takes answers, looks at all promises."""
        self.out += self.store.nvme.take_ops()
        for number, result in self.store.nvme.tickets.take():
            asked = self.asked.pop(number)
            self.idle.append(asked.connection)
            asked.then(result)
        self.changes += 1
        if self.changes % self.plan.check_each == 0:
            self.check()
        for number, volume in enumerate(self.volumes):
            assert volume.health >= self.health[number], "a volume got better"
            self.health[number] = volume.health
        self._look_at_promises()

    def check(self) -> None:
        """The store's books, and that what is only on disk is there."""
        self.store.check()
        shelf = self.store._shelf
        cold = np.isin(shelf.blocks.state, (BlockState.COLD, BlockState.COMING))
        assert shelf.places.there(np.flatnonzero(cold)).all(), "a block that is nowhere"
        if not self.plan.excused and self.plan.honest:
            assert not shelf.counters.corrupted, "sound disks gave other bytes"

    def _look_at_promises(self) -> None:
        for name, promise in list(self.judge.must.items()):
            if self._is_kept(promise):
                continue
            use, uses = promise.use, self._uses_of(name)
            if use is None and uses:
                if found := self._use_with(name, promise.version):
                    self.judge.must[name] = self._promise(name, promise.version, found)
            elif use and use not in uses:
                gone = all(use is not other for v in self.volumes for other in v.uses.values())
                assert gone or self._may_lose(), f"{name} was persisted, and is no longer"
                del self.judge.must[name]

    def _is_kept(self, promise: Promise) -> bool:
        """Whether its block still is where it was, which is quickly seen."""
        shelf, use = self.store._shelf, promise.use
        if use is None or shelf.blocks.birth[promise.block] != promise.birth:
            return False
        return bool(shelf.places._segment[promise.block] == shelf.places._number(use))

    def _promise(self, name: Name, version: int, use: Use) -> Promise:
        block = self._block(name)
        return Promise(version, use, block, int(self.store._shelf.blocks.birth[block]))

    def _block(self, name: Name) -> int:
        return int(self.store._shelf.catalog.find(self.ids[name[0]], chain(*name, 1))[0])

    def _may_lose(self) -> bool:
        few_ids = self.plan.max_blocks < FEW_BLOCKS
        return self.plan.excused or few_ids or Health.OFF in self.health

    def _uses_of(self, name: Name) -> list[Use]:
        """Where its block lies, and second copies of it."""
        places, block = self.store._shelf.places, self._block(name)
        if block < 0:
            return []
        first = [places.use_of(block)] if places.there(np.array([block])).all() else []
        return first + places.copies_of(block)

    def _use_with(self, name: Name, version: int) -> Use | None:
        """Where that version of its block lies, of which another may be found first."""
        store, block = self.store._shelf, self._block(name)
        for copy in store.places._copies.get(block, []):
            if int.from_bytes(copy.entry["put_id"].tobytes(), "little") == version:
                return copy.use
        same = int.from_bytes(store.blocks.put_id[block].tobytes(), "little") == version
        return self._uses_of(name)[0] if same or not self.recovering else None

    # -- time --------------------------------------------------------------------------

    def pass_ms(self, ms: int) -> None:
        """Time goes by, and the shell ticks where something is due."""
        self.now_ms += ms
        self.judge.expire(self.now_ms)
        self.store.tick(self.now_ms)
        self._changed()
        due_ms = self.store.next_due_ms
        assert due_ms is None or due_ms > self.now_ms, "the shell would tick without end"

    def finish_ops(self) -> None:
        """Until nothing is out."""
        while self.step():
            pass

    def settle(self, ticket: int | None = None) -> None:
        """Until a call is answered, or all are; they must be, long before their time is over."""
        for _ in range(_IDLE_ROUNDS):
            while self._waits(ticket) and self.step():
                pass
            if not self._waits(ticket):
                return
            due_ms = self.store.next_due_ms
            last_ms = min(asked.due_ms for asked in self.asked.values())
            assert due_ms is not None, "calls wait, and nothing is to come"
            assert due_ms < last_ms, "calls wait for nothing but their deadline"
            self.pass_ms(max(due_ms - self.now_ms, 0))
        raise AssertionError("calls wait, however much time passes")

    def _waits(self, ticket: int | None) -> bool:
        return bool(self.asked) if ticket is None else ticket in self.asked

    # -- calls -------------------------------------------------------------------------

    def do(self, command: c.Command) -> Any:
        """A call that is answered at once."""
        try:
            result = self.store.handle(self.me, command, self.now_ms)
        finally:
            self._changed()
        assert not isinstance(result, Deferred)
        return result

    def ask(self, command: c.Command, wait_ms: int, then: Then) -> int | None:
        """A call that may wait; `then` gets its answer. Returns its ticket, if it waits."""
        if not self.idle:
            self.settle(next(iter(self.asked)))
        connection = self.idle.pop(0)
        result = self.store.handle(connection, command, self.now_ms)
        if isinstance(result, Deferred):
            self.asked[result.ticket] = Asked(connection, self.now_ms + wait_ms, then)
            self._changed()
            return result.ticket
        self.idle.append(connection)
        self._changed()
        then(result)
        return None

    def wait(self, command: c.Command, wait_ms: int) -> Any:
        """Its answer, however long that takes."""
        answers: list[Any] = []
        ticket = self.ask(command, wait_ms, answers.append)
        if ticket is not None:
            self.settle(ticket)
        return answers[0]

    def pause(self) -> None:
        """Others get a turn."""
        for _ in range(self.rng.randrange(self.plan.pauses)):
            self.step()

    # -- what clients do ---------------------------------------------------------------

    def put(
        self, space: int, first: int, n: int = 1, *, ttl_ms: int = 0, by_parts: bool = False
    ) -> int:
        """Stores neighbours of the chain; returns how many were new."""
        put = self._put_by_parts if by_parts else self._put_whole
        self.judge.versions += 1
        version = self.judge.versions
        try:
            stored = put(space, first, n, version, ttl_ms)
        except ResourceExhausted:
            return 0
        return len(stored)

    def _note_stored(
        self, space: int, first: int, ok: Sequence[bool], version: int, ttl_ms: int
    ) -> list[int]:
        tick = limits.TICK_MS
        expires = -(-(self.now_ms + ttl_ms) // tick) * tick if ttl_ms else 0
        stored = [first + i for i, each in enumerate(ok) if each]
        for number in stored:
            # Before all is found on the disks, an older one may still take its place.
            older = self.judge.of((space, number)).later if self.recovering else set()
            self.judge.stored((space, number), version, expires, older)
        return stored

    def _write(self, space: int, number: int, version: int, granule: int) -> None:
        layout = SPACES[space][1]
        start = granule * UNIT + header_bytes(layout.n_cells)
        self.pool[start : start + layout.block_bytes] = payload(space, number, version)

    def _chain_fields(self, space: int, first: int) -> dict[str, Any]:
        parent = chain(space, first - 1, 1).tobytes() if first else b""
        return {"parent": parent, "position": first}

    def _put_whole(self, space: int, first: int, n: int, version: int, ttl_ms: int) -> list[int]:
        granted = self.do(c.Grant(namespace=self.ids[space], blocks=n)).granules
        n = len(granted)
        for i, granule in enumerate(granted.tolist()):
            self._write(space, first + i, version, granule)
            self.pause()
        command = c.Commit(
            namespace=self.ids[space],
            put_id=version.to_bytes(16, "little"),
            hashes=chain(space, first, n),
            granules=granted,
            checksums=np.array([sums(space, first + i, version) for i in range(n)]),
            ttl_ms=ttl_ms,
            **self._chain_fields(space, first),
        )
        result = self.store.handle(self.me, command, self.now_ms)
        ok = result.status == c.CommitStatus.STORED
        stored = self._note_stored(space, first, ok.tolist(), version, ttl_ms)
        self._changed()
        if not ok.all():
            self.do(c.GiveBack(granules=granted[~ok]))
        return stored

    def _put_by_parts(self, space: int, first: int, n: int, version: int, ttl_ms: int) -> list[int]:
        put_id, hashes = version.to_bytes(16, "little"), chain(space, first, n)
        reserved = self.do(
            c.Reserve(
                namespace=self.ids[space],
                put_id=put_id,
                hashes=hashes,
                cells=np.empty(0, np.uint32),
                ttl_ms=ttl_ms,
                **self._chain_fields(space, first),
            )
        )
        granted = np.flatnonzero(reserved.status == c.ReserveStatus.GRANTED)
        if not len(granted):
            return []
        for i in granted.tolist():
            self._write(space, first + i, version, int(reserved.granules[i]))
            self.pause()
        command = c.Seal(
            namespace=self.ids[space],
            put_id=put_id,
            hashes=hashes[granted],
            checksums=np.array([sums(space, first + i, version) for i in granted.tolist()]),
        )
        result = self.store.handle(self.me, command, self.now_ms)
        ok = np.zeros(n, np.bool_)
        ok[granted] = result.status == c.SealStatus.STORED
        stored = self._note_stored(space, first, ok.tolist(), version, ttl_ms)
        self._changed()
        return stored

    def reader(self) -> IndexReader:
        """Of the newest index, as a client finds it."""
        if self._reader is None or self._reader[0] != len(self._indexes):
            view = IndexView.open(self._indexes[-1])
            self._reader = len(self._indexes), IndexReader(view)
        return self._reader[1]

    def get(self, space: int, first: int, n: int = 1, *, wait_ms: int = PATIENT_MS) -> int:
        """Reads neighbours of the chain as a client does; returns how many leading ones it got."""
        done = stalls = 0
        while done < n:
            rows = self.reader().match(self.ids[space], chain(space, first + done, n - done))
            warm = _leading(rows.tiers != NVME_TIER)
            granules, generations = rows.granules, rows.generations
            got = 0
            while got < warm and self._copy(
                space, first + done + got, int(granules[got]), int(generations[got])
            ):
                got += 1
            if got:
                self.do(
                    c.Touch(
                        granules=granules[:got].astype(np.uint32),
                        generations=generations[:got],
                        lookups=got,
                        hits=got,
                        cold_hits=0,
                    )
                )
            done += got
            if got < warm or warm == rows.count:
                break
            stalls = 0 if got else stalls + 1
            if stalls > 3:
                break
            fetch = c.Fetch(
                namespace=self.ids[space],
                hashes=chain(space, first + done, n - done),
                wait_ms=wait_ms,
            )
            if not self.wait(fetch, wait_ms).blocks:
                break
        return done

    def _copy(self, space: int, number: int, granule: int, generation: int) -> bool:
        """One block, checked before and after, with time between for it to be taken away."""
        if self.generations[granule] != generation:
            return False
        may = set(self.judge.may((space, number)))
        layout = SPACES[space][1]
        nbytes = header_bytes(layout.n_cells) + layout.block_bytes
        source, copied = self.pool[granule * UNIT :][:nbytes], np.empty(nbytes, np.uint8)
        half = self.rng.randrange(nbytes)
        copied[:half] = source[:half]
        self.pause()
        copied[half:] = source[half:]
        if self.generations[granule] != generation:
            return False
        self.must_be(space, number, copied, may | self.judge.may((space, number)))
        return True

    def must_be(self, space: int, number: int, slot: U8, may: set[int]) -> int:
        """The slot holds one of those versions of the key, every byte of it; returns which."""
        layout = SPACES[space][1]
        start = header_bytes(layout.n_cells)
        header = unpack(slot[:start])
        version = int.from_bytes(header.put_id, "little")
        assert header.key == chain(space, number, 1).tobytes(), "a block of another key"
        assert version in may, f"({space}, {number}) has version {version}, may have {may}"
        right = payload(space, number, version)
        assert np.array_equal(slot[start : start + layout.block_bytes], right), "wrong bytes"
        self.judge.served += 1
        return version

    def view(self, space: int, first: int, n: int) -> None:
        """Takes a lease, and looks; `let_go` looks again."""
        command = c.Lease(namespace=self.ids[space], hashes=chain(space, first, n))
        leased = self.do(command)
        if not leased.lease:
            return
        held = Held(leased.lease, self.me)
        for i, granule in enumerate(leased.granules.tolist()):
            name = space, first + i
            version = self.must_be(*name, self.pool[granule * UNIT :], self.judge.may(name))
            held.slots.append((name, granule, version))
        self.held.append(held)

    def let_go(self) -> None:
        """Ends the oldest view."""
        if self.held:
            held = self.held.pop(0)
            for name, granule, version in held.slots:
                self.must_be(*name, self.pool[granule * UNIT :], {version})
            self.do(c.Release(lease=held.lease))

    def persist(
        self, space: int, first: int, n: int = 1, *, wait_ms: int = PATIENT_MS
    ) -> int | None:
        """Asks for durability; what is acknowledged is looked for on the disk itself."""
        command = c.Persist(
            namespace=self.ids[space], hashes=chain(space, first, n), wait_ms=wait_ms
        )
        return self.ask(
            command, wait_ms, lambda answer: self._persisted(space, first, answer.durable)
        )

    def _persisted(self, space: int, first: int, durable: U8) -> None:
        for i in np.flatnonzero(durable).tolist():
            name = space, first + i
            if uses := self._uses_of(name):  # else its segment has made room since the answer
                self.judge.acknowledged += 1
                version = self._on_disk(name, uses[0])
                self.judge.must[name] = self._promise(name, version, uses[0])

    def _on_disk(self, name: Name, use: Use) -> int:
        """The version that a power cut leaves there."""
        shelf, space = self.store._shelf, name[0]
        key = chain(*name, 1)
        ids = np.array([self._block(name)])
        _, places, stamps = shelf.places.of(ids)
        volume, sim = self.volumes[use.volume], self.sims[use.volume]
        kept = sim._durable if self.plan.honest else sim._content
        at = volume.offset(use, int(places[0]))
        slot = kept[at : at + SLOT_GRANULES[space] * UNIT]
        if not self.plan.honest:
            return int.from_bytes(slot[52:68].tobytes(), "little")
        header = check_slot(slot, key.tobytes(), int(stamps[0]), SPACES[space][1])
        at = volume.offset(use, 0)
        segment = unpack_segment_header(kept[at : at + HEADER_GRANULES * UNIT])
        assert segment.sequence == use.sequence, "the segment's header is not durable"
        version = int.from_bytes(header.put_id, "little")
        assert version in self.judge.may(name), f"{name} has version {version} on disk"
        return version

    def drop(self, space: int, first: int, n: int = 1) -> int | None:
        """Forgets neighbours of the chain; once that is acknowledged they never come back."""
        names = [(space, number) for number in range(first, first + n)]
        return self._drop(space, names, chain(space, first, n))

    def drop_namespace(self, space: int) -> int | None:
        """Forgets all of a space."""
        names = [name for name in self.judge.known if name[0] == space]
        self.let_go_of_all()
        return self._drop(space, names, np.empty((0, 32), np.uint8))

    def let_go_of_all(self) -> None:
        while self.held:
            self.let_go()

    def _drop(self, space: int, names: list[Name], hashes: U8) -> int | None:
        due_ms = self.now_ms + limits.MAX_FORGET_MS
        gone = self.judge.hidden(names)

        def dropped(_: object) -> None:
            # A volume that is written no more cannot keep the promise, nor who was out of time.
            if self.now_ms < due_ms and all(v.health is Health.OK for v in self.volumes):
                self.judge.dropped(gone)

        command = c.Drop(namespace=self.ids[space], hashes=hashes)
        if len(hashes):
            return self.ask(command, limits.MAX_FORGET_MS, dropped)
        # The number of the namespace is another one from here on.
        connection = self.idle.pop(0) if self.idle else self.me
        result = self.store.handle(connection, command, self.now_ms)
        self.ids[space] = self._opened(space)
        if isinstance(result, Deferred):
            self.asked[result.ticket] = Asked(connection, due_ms, dropped)
        else:
            self.idle.append(connection)
            dropped(result)
        self._changed()
        return result.ticket if isinstance(result, Deferred) else None

    def hint(self, kind: c.HintKind, space: int, first: int, n: int, for_ms: int) -> None:
        with contextlib.suppress(ResourceExhausted):
            self.do(
                c.Hint(
                    namespace=self.ids[space],
                    kind=int(kind),
                    for_ms=for_ms,
                    hashes=chain(space, first, n),
                )
            )

    def demote_all(self) -> None:
        """Makes all of memory free of blocks that are on NVMe too, as later puts would."""
        shelf = self.store._shelf
        live = np.flatnonzero(shelf.blocks.state == BlockState.LIVE).astype(np.uint32)
        may_go = (shelf.blocks.leases[live] == 0) & ~shelf.deadlines.has(Due.PIN, live)
        free = live[may_go & shelf.places.there(live)]
        shelf.policy.forget(free)
        shelf.evict(free)
        self._changed()

    # -- restarts ----------------------------------------------------------------------

    def restart(self, seed: int | None = None, *, clean: bool = True, recovers: bool = True) -> Rig:
        """The next life, on the same disks: after an orderly end, or a kill (clean=False)."""
        if clean:
            self.store.nvme.flush()
            self._changed()
            self.finish_ops()
        after = self._next(self.sims, self._seed(seed), recovers=recovers)
        after.on_io = self.on_io
        return after

    def killed(self, seed: int, *, recovers: bool = True) -> Rig:
        """The next life after a kill, on copies of the disks, so that this one can go on."""
        return self._next([_copied(sim) for sim in self.sims], seed, recovers=recovers)

    def crash(self, seed: int | None = None, *, recovers: bool = True) -> Rig:
        """The next life, after a power cut."""
        seed = self._seed(seed)
        rng = np.random.default_rng(seed)
        sims = []
        for sim in self.sims:
            crashed, sim.crashed = sim.crashed, False
            sims.append(sim.crash(rng))
            sim.crashed = crashed
        return self._next(sims, seed, recovers=recovers)

    def _seed(self, seed: int | None) -> int:
        return self.rng.getrandbits(32) if seed is None else seed

    def _next(self, sims: Sequence[SimDisk], seed: int, *, recovers: bool) -> Rig:
        judge = self.judge.fork()
        judge.restart()
        self.stopped = True
        return Rig(
            seed,
            self.plan,
            sims=sims,
            judge=judge,
            now_ms=self.now_ms,
            recovers=recovers,
        )

    # -- at the end --------------------------------------------------------------------

    def get_all(self) -> int:
        """Reads every key there ever was, one by one; returns how many are there."""
        return sum(self.get(*name) for name in sorted(self.judge.known))

    def get_musts(self) -> None:
        """Every block that must be there is, and its bytes."""
        for name in sorted(self.judge.must):
            if name in self.judge.must:  # it may be over by what was read before
                got = self.get(*name)
                assert got or name not in self.judge.must, f"{name} was persisted, and is lost"

    def finish(self) -> None:
        """Nothing is left behind once all is over: no lease, no slot, no id."""
        self.settle()
        self.finish_ops()
        self.let_go_of_all()
        for space in range(len(SPACES)):
            self.drop_namespace(space)
        self.settle()
        self.pass_ms(2 * limits.NVME_GATHER_MS)
        self.finish_ops()
        self.check()
        stats, shelf = self.store.stats(), self.store._shelf
        assert not stats.leased_blocks
        assert not stats.blocks
        assert not stats.used_bytes + stats.ahead_bytes
        assert not stats.nvme_blocks
        assert not stats.nvme_queued_bytes
        assert shelf.blocks.n_free == self.plan.max_blocks
        assert not self.store.nvme.under_way


def with_unread_header(rig: Rig, segment: int, volume: int = 0) -> Rig:
    """The next life, in which that header cannot be read."""
    rig.pass_ms(10)
    after = rig.restart(clean=False, recovers=False)
    after.plan = replace(after.plan, excused=True)
    sim = after.sims[volume]
    sim.fail_at(sim.ios + 4 + segment, errno.EIO)  # behind the sync and the two halves of the log
    after.recover()
    assert segment in after.volumes[volume]._unknown
    return after


def with_one_off(rig: Rig, number: int) -> Rig:
    """The next life, in which a volume is off, because its log cannot be read."""
    after = rig.restart(clean=False, recovers=False)
    _hide_log(after.sims[number])
    after.recover()
    assert after.volumes[number].health is Health.OFF
    return after


def _hide_log(sim: SimDisk) -> None:
    """What is read first, behind the sync."""
    sim.fail_at(sim.ios + 2, errno.EIO)


def _reopen(sim: SimDisk) -> None:
    """As `FileDisk.open`: what is not durable by now is not read."""
    sim.sync()
    sim._content[:] = sim._durable


def _copied(sim: SimDisk) -> SimDisk:
    copied = SimDisk(sim.nbytes, seed=0)
    for name in ("_content", "_durable", "_before"):
        getattr(copied, name)[:] = getattr(sim, name)
    copied._unsynced = [(offset, data.copy()) for offset, data in sim._unsynced]
    return copied


def _leading(holds: npt.NDArray[np.bool_]) -> int:
    return len(holds) if holds.all() else int(holds.argmin())
