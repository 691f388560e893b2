"""Random histories of the store against a dict with legal misses, bytes and all.

The model knows what may be found and whose bytes those must be. A block may go for a reason that
the store counts, and for no other; a slot may be written by its writers until they say that they
are done, or die, and what they write then is garbage here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvstore import commands as c
from kvstore import limits
from kvstore.block import NO_PARENT, cell_checksums, header_bytes, pack_parts, unpack
from kvstore.errors import ResourceExhausted, StaleNamespace
from kvstore.index import IndexReader, IndexView
from kvstore.index.boards import BOARDS_BYTES, Boards
from kvstore.index.format import key_words
from kvstore.layout import Attention, Layout
from kvstore.store import Store, StoreMemory

POOL_BYTES = 1 << 20
MAX_BLOCKS = 32
FIRST_INDEX_BLOCKS = 4  # so that the index grows
N_KEYS = 48
NO_HASH = np.empty((0, 32), np.uint8)
KEYS = np.random.default_rng(0).integers(0, 256, (N_KEYS, 32), np.uint8)
KEYS[-1] = 0  # all zeros stand for no parent
NUMBERS = {row.tobytes(): i for i, row in enumerate(KEYS)}
PUT_IDS = [bytes([i]) * 16 for i in range(1, 4)]
SMALL = Layout(
    model="test",
    attention=Attention.GQA,
    layers=2,
    kv_heads=2,
    head_dim=16,
    dtype="float32",
    block_tokens=16,
)
BIG = Layout.opaque(model="test", block_bytes=70_000, block_tokens=16)
SPACES = [("a", SMALL), ("b", BIG), ("c", SMALL)]
SOME_KEYS = st.one_of(
    st.tuples(st.integers(0, N_KEYS - 1), st.integers(1, 8)).map(
        lambda run: [i % N_KEYS for i in range(run[0], sum(run))]
    ),
    st.lists(st.integers(0, N_KEYS - 1), min_size=1, max_size=6),
)
SPACE, WHO = st.integers(0, len(SPACES) - 1), st.integers(0, 2)

Key = tuple[int, bytes]  # namespace id, hash


@functools.cache
def cell(key: bytes, put_id: bytes, number: int, nbytes: int) -> npt.NDArray[np.uint8]:
    """What this put writes to that cell: different for each key, put id and cell."""
    tag = hashlib.blake2b(key + put_id + bytes([number]), digest_size=8).digest()
    return np.frombuffer(tag * (nbytes // 8), np.uint8)


@functools.cache
def checksum(key: bytes, put_id: bytes, number: int, nbytes: int) -> int:
    return int(cell_checksums(cell(key, put_id, number, nbytes), np.array([0, nbytes]))[0])


def due(now_ms: int, for_ms: int) -> int:
    return -(-(now_ms + for_ms) // limits.TICK_MS) * limits.TICK_MS


@dataclass(eq=False)
class Put:
    """One block under way. writers: connection -> its cells; missing: cells not sealed."""

    key: Key
    put_id: bytes
    granule: int
    layout: Layout
    ttl_ms: int
    missing: set[int]
    writers: dict[int, set[int]] = field(default_factory=dict)
    dropped: bool = False
    alone_until_ms: int = 0


@dataclass(eq=False)
class Stored:
    put_id: bytes
    granule: int
    expires_ms: int
    pinned_until_ms: int = 0


@dataclass(eq=False)
class Lease:
    connection: int
    number: int
    blocks: list[tuple[Key, bytes, int, int, Layout]]  # key, put id, granule, generation, layout


class StoreMachine(RuleBasedStateMachine):
    @initialize(policy=st.sampled_from(["lru", "arc", "s3fifo"]))
    def begin(self, policy: str) -> None:
        self.now_ms = 1_000_000
        self.pool = np.zeros(POOL_BYTES, np.uint8)
        self.generations = np.zeros(POOL_BYTES // limits.GRANULE_BYTES, np.uint64)
        self.boards = Boards.create(np.zeros(BOARDS_BYTES, np.uint8))
        self.readers: list[IndexReader] = []
        self.indexes: list[npt.NDArray[np.uint8]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "FIRST_INDEX_BLOCKS", FIRST_INDEX_BLOCKS)
            self.store = Store(
                StoreMemory(
                    pool=self.pool,
                    generations=self.generations,
                    new_index=self.new_index,
                    boards=self.boards,
                ),
                secret=b"s" * 32,
                instance_id=7,
                max_blocks=MAX_BLOCKS,
                policy=policy,
                now_ms=self.now_ms,
            )
        self.connections = [self.store.connect() for _ in range(3)]
        self.closed: list[int] = []
        self.puts: dict[Key, Put] = {}
        self.held: dict[tuple[int, Key, bytes], Put] = {}  # what a connection may write
        self.stock: dict[tuple[int, int], Layout] = {}  # connection, granule -> what it is for
        self.stored: dict[Key, Stored] = {}
        self.leases: list[Lease] = []
        self.layouts: dict[int, Layout] = {}
        self.seen: list[tuple[Key, int, int]] = []  # rows that readers remember
        self.gone = 0  # blocks that were evicted
        self.ids = [self.open(i) for i in range(len(SPACES))]

    # -- what the world does ------------------------------------------------------------

    def new_index(self, nbytes: int) -> npt.NDArray[np.uint8]:
        self.indexes.append(np.zeros(nbytes, np.uint8))
        return self.indexes[-1]

    def reader(self) -> IndexReader:
        """Where a client looks: in the newest index, once the one before is retired."""
        while len(self.readers) < len(self.indexes):
            if self.readers:
                assert self.readers[-1].retired
            view = IndexView.open(self.indexes[len(self.readers)])
            self.readers.append(IndexReader(view, self.boards))
        assert not self.readers[-1].retired
        return self.readers[-1]

    def open(self, space: int) -> int:
        name, layout = SPACES[space]
        opened = self.do(c.OpenNamespace(name=name, layout=layout.encode()), 0)
        assert isinstance(opened, c.NamespaceOpened)
        self.layouts[opened.namespace] = layout
        return opened.namespace

    def do(self, command: c.Command, who: int) -> c.Result:
        return self.store.handle(self.connections[who], command, self.now_ms)

    def slot(self, granule: int, layout: Layout) -> range:
        nbytes = header_bytes(layout.n_cells) + layout.block_bytes
        return range(granule, granule - (-nbytes // limits.GRANULE_BYTES))

    def some_keys(self, data: st.DataObject, space: int) -> list[int]:
        """Numbers of keys; more often than not of stored ones."""
        stored = [NUMBERS[key[1]] for key in self.stored if key[0] == self.ids[space]]
        if not stored:
            return data.draw(SOME_KEYS)
        of_stored = st.lists(st.sampled_from(stored), min_size=1, max_size=8)
        return data.draw(st.one_of(of_stored, of_stored, SOME_KEYS))

    def cell_of(self, put: Put, number: int) -> npt.NDArray[np.uint8]:
        start = put.granule * limits.GRANULE_BYTES + header_bytes(put.layout.n_cells)
        bounds = put.layout.cell_bounds
        return self.pool[start + int(bounds[number]) : start + int(bounds[number + 1])]

    def write(self, put: Put, cells: set[int]) -> npt.NDArray[np.uint64]:
        sums: list[int] = []
        for number in sorted(cells):
            target = self.cell_of(put, number)
            target[:] = cell(put.key[1], put.put_id, number, target.size)
            sums.append(checksum(put.key[1], put.put_id, number, target.size))
        return np.array(sums, np.uint64)

    def must_hold(self, key: Key, granule: int, layout: Layout, put_id: bytes | None) -> None:
        """The slot holds one put of the key, and that put's if it is given."""
        start = granule * limits.GRANULE_BYTES
        header = unpack(self.pool[start : start + header_bytes(layout.n_cells)])
        assert (header.namespace, header.key) == key
        assert put_id in (None, header.put_id), "another put's block"
        start += header_bytes(layout.n_cells)
        for number in range(layout.n_cells):
            at, end = (start + int(edge) for edge in layout.cell_bounds[number : number + 2])
            want = cell(key[1], header.put_id, number, end - at)
            assert np.array_equal(self.pool[at:end], want), "bytes of another put"
            assert header.checksums[number] == checksum(key[1], header.put_id, number, end - at)

    # -- what the model thinks ------------------------------------------------------------

    def let_go(self, connection: int, key: Key, put_id: bytes) -> Put:
        put = self.held.pop((connection, key, put_id))
        del put.writers[connection]
        return put

    def drop_put(self, put: Put) -> None:
        if not put.dropped:
            put.dropped = True
            del self.puts[put.key]

    def forget(self, keys: list[Key]) -> int:
        return sum(self.stored.pop(key, None) is not None for key in set(keys))

    def pass_time(self, now_ms: int) -> None:
        self.now_ms = now_ms
        self.store.tick(now_ms)
        self.forget([k for k, s in self.stored.items() if s.expires_ms and s.expires_ms <= now_ms])
        for put in list(self.puts.values()):
            if put.alone_until_ms and put.alone_until_ms <= now_ms:
                self.drop_put(put)

    # -- rules ----------------------------------------------------------------------------

    @rule(
        who=WHO,
        space=SPACE,
        numbers=SOME_KEYS,
        put_id=st.sampled_from(PUT_IDS),
        part=st.sampled_from([(), (0,), (1,), (0, 1)]),
        position=st.sampled_from([-1, 0, 5]),
        parent=st.integers(-1, N_KEYS - 1),
        ttl_ms=st.sampled_from([0, 0, 250, 61_000]),
        seal=st.booleans(),
    )
    def reserve(
        self,
        who: int,
        space: int,
        numbers: list[int],
        put_id: bytes,
        part: tuple[int, ...],
        position: int,
        parent: int,
        ttl_ms: int,
        seal: bool,
    ) -> None:
        namespace, layout = self.ids[space], SPACES[space][1]
        cells = set(part) & set(range(layout.n_cells)) or set(range(layout.n_cells))
        me = self.connections[who]
        command = c.Reserve(
            namespace=namespace,
            put_id=put_id,
            hashes=KEYS[numbers],
            cells=np.array(sorted(cells), np.uint32),
            parent=KEYS[parent].tobytes() if parent >= 0 else b"",
            position=position,
            ttl_ms=ttl_ms,
        )
        try:
            result = self.do(command, who)
        except ResourceExhausted:
            self.none_was_possible(namespace, numbers)
            return
        assert isinstance(result, c.Reserved)
        met: set[Key] = set()
        for number, status, granule in zip(
            numbers, result.status.tolist(), result.granules.tolist(), strict=True
        ):
            key = (namespace, KEYS[number].tobytes())
            ours = self.held.get((me, key, put_id))
            put = self.puts.get(key)
            if status == c.ReserveStatus.EXISTS:
                assert key in self.stored
                assert self.reader().lookup(namespace, KEYS[number : number + 1]).found[0]
            elif (
                key in met or (ours and ours.dropped) or (put and not joins(put, put_id, me, cells))
            ):
                assert status == c.ReserveStatus.IN_PROGRESS
            elif put:
                assert (status, granule) == (c.ReserveStatus.GRANTED, put.granule)
            else:
                assert status in (c.ReserveStatus.GRANTED, c.ReserveStatus.NO_SPACE)
            met.add(key)
            if status == c.ReserveStatus.GRANTED:
                put = put or self.granted(key, put_id, granule, layout, ttl_ms)
                put.writers[me] = put.writers.get(me, set()) | cells
                put.alone_until_ms = 0
                self.held[me, key, put_id] = put
        if seal:
            self.seal(who, space, put_id, numbers)

    @rule(
        who=WHO,
        space=SPACE,
        first=st.integers(0, N_KEYS - 1),
        n=st.integers(4, 16),
        put_id=st.sampled_from(PUT_IDS),
        ttl_ms=st.sampled_from([0, 0, 0, 250]),
    )
    def put_a_chain(
        self, who: int, space: int, first: int, n: int, put_id: bytes, ttl_ms: int
    ) -> None:
        numbers = [i % N_KEYS for i in range(first, first + n)]
        self.reserve(who, space, numbers, put_id, (), 0, first - 1, ttl_ms, True)

    @rule(
        who=WHO,
        space=st.sampled_from([0, 2]),
        numbers=SOME_KEYS,
        put_id=st.sampled_from(PUT_IDS),
        seal=st.booleans(),
    )
    def two_ranks_put(
        self, who: int, space: int, numbers: list[int], put_id: bytes, seal: bool
    ) -> None:
        self.reserve(who, space, numbers, put_id, (0,), -1, -1, 0, False)
        self.reserve((who + 1) % 3, space, numbers, put_id, (1,), -1, -1, 0, seal)

    def granted(self, key: Key, put_id: bytes, granule: int, layout: Layout, ttl_ms: int) -> Put:
        assert int(self.generations[granule]) % 2, "a slot that is written has an odd generation"
        self.is_nobodys(granule, layout)
        put = Put(key, put_id, granule, layout, ttl_ms, set(range(layout.n_cells)))
        self.puts[key] = put
        return put

    def is_nobodys(self, granule: int, layout: Layout) -> None:
        """A slot that was just granted."""
        taken = {
            g
            for put in {*self.puts.values(), *self.held.values()}
            for g in self.slot(put.granule, put.layout)
        }
        taken |= {g for lease in self.leases for b in lease.blocks for g in self.slot(b[2], b[4])}
        taken |= {g for (_, at), of in self.stock.items() for g in self.slot(at, of)}
        assert not taken & set(self.slot(granule, layout)), "a slot that is somebody else's"

    def add_to_stock(self, me: int, granules: list[int], layout: Layout) -> None:
        for granule in granules:
            self.is_nobodys(granule, layout)
            self.stock[me, granule] = layout
            assert int(self.generations[granule]) % 2 == 0, "what is posted keeps its generation"

    @rule(who=WHO, space=SPACE, n=st.sampled_from([1, 2, 5]))
    def grant(self, who: int, space: int, n: int) -> None:
        with contextlib.suppress(ResourceExhausted):
            result = self.do(c.Grant(namespace=self.ids[space], blocks=n), who)
            assert isinstance(result, c.Granted)
            assert 0 < len(result.granules) <= n
            self.add_to_stock(self.connections[who], result.granules.tolist(), SPACES[space][1])

    def stock_of(self, me: int, layout: Layout) -> list[int]:
        """What a connection holds of the size that this layout needs."""
        size = len(self.slot(0, layout))
        return [
            at for (who, at), of in self.stock.items() if (who, len(self.slot(0, of))) == (me, size)
        ]

    @rule(
        who=WHO,
        space=SPACE,
        numbers=SOME_KEYS,
        put_id=st.sampled_from(PUT_IDS),
        position=st.sampled_from([-1, 0, 5]),
        parent=st.integers(-1, N_KEYS - 1),
        ttl_ms=st.sampled_from([0, 0, 250]),
        more=st.sampled_from([0, 0, 3]),
        omitted=st.sets(st.integers(0, 7), max_size=3),
        fresh=st.booleans(),
    )
    def commit(
        self,
        who: int,
        space: int,
        numbers: list[int],
        put_id: bytes,
        position: int,
        parent: int,
        ttl_ms: int,
        more: int,
        omitted: set[int],
        fresh: bool,
    ) -> None:
        if fresh:
            self.grant(who, space, len(numbers))
            self.found_blocks()  # what was evicted for that is gone
        me, namespace, layout = self.connections[who], self.ids[space], SPACES[space][1]
        slots, places = self.stock_of(me, layout), dict[int, int]()
        for row in range(len(numbers)):
            if row not in omitted and slots:
                places[row] = slots.pop()
        sums = np.zeros((len(numbers), layout.n_cells), np.uint64)
        for row, granule in places.items():
            key = (namespace, KEYS[numbers[row]].tobytes())
            every = set(range(layout.n_cells))
            sums[row] = self.write(Put(key, put_id, granule, layout, ttl_ms, every), every)
        command = c.Commit(
            namespace=namespace,
            put_id=put_id,
            hashes=KEYS[numbers],
            granules=np.array([places.get(i, c.NO_SLOT) for i in range(len(numbers))], np.uint32),
            checksums=sums,
            parent=KEYS[parent].tobytes() if parent >= 0 else b"",
            position=position,
            ttl_ms=ttl_ms,
            more=more,
        )
        result = self.do(command, who)
        assert isinstance(result, c.Committed)
        self.after_commit(me, command, places, result.status.tolist())
        self.add_to_stock(me, result.granules.tolist(), layout)

    def after_commit(
        self, me: int, command: c.Commit, places: dict[int, int], status: list[int]
    ) -> None:
        keys = [(command.namespace, row.tobytes()) for row in command.hashes]
        for row, granule in places.items():
            if keys[row] in self.puts:
                assert status[row] == c.CommitStatus.IN_PROGRESS
            elif keys[row] in self.stored:
                assert status[row] == c.CommitStatus.EXISTS
            elif status[row] == c.CommitStatus.STORED:
                expires_ms = due(self.now_ms, command.ttl_ms) if command.ttl_ms else 0
                self.stored[keys[row]] = Stored(command.put_id, granule, expires_ms)
                del self.stock[me, granule]
            else:
                assert status[row] == c.CommitStatus.NO_SPACE
        for row in set(range(len(keys))) - set(places):
            there = keys[row] in self.stored
            assert status[row] == (c.CommitStatus.EXISTS if there else c.CommitStatus.NO_SPACE)

    @rule(
        who=WHO,
        space=SPACE,
        numbers=SOME_KEYS,
        put_id=st.sampled_from(PUT_IDS),
        parent=st.integers(-1, N_KEYS - 1),
        more=st.sampled_from([0, 0, 3]),
        told=st.booleans(),
    )
    def post(
        self,
        who: int,
        space: int,
        numbers: list[int],
        put_id: bytes,
        parent: int,
        more: int,
        told: bool,
    ) -> None:
        """A client shows blocks by itself; the store hears of it, or finds out as it does next."""
        me, namespace, layout = self.connections[who], self.ids[space], SPACES[space][1]
        keys = [(namespace, KEYS[n].tobytes()) for n in numbers]
        keys = [key for key in keys if key not in self.puts]
        slots = self.stock_of(me, layout)[: len(keys)]
        keys = keys[: len(slots)]
        number = self.store.board_of(me)
        if number is None or not keys:
            return
        before = KEYS[parent].tobytes() if parent >= 0 else NO_PARENT
        for key, granule in zip(keys, slots, strict=True):
            every = set(range(layout.n_cells))
            sums = self.write(Put(key, put_id, granule, layout, 0, every), every)
            header = pack_parts(
                namespace=namespace,
                key=key[1],
                put_id=put_id,
                length=layout.block_bytes,
                checksums=sums,
                parent=before,
                position=-1,
            )
            start = granule * limits.GRANULE_BYTES
            self.pool[start : start + len(header)] = np.frombuffer(header, np.uint8)
            before = key[1]
        hashes = np.frombuffer(b"".join(key for _, key in keys), np.uint8).reshape(-1, 32)
        posted = self.boards.post(
            number,
            namespace,
            key_words(hashes),
            length=layout.block_bytes,
            granules=np.array(slots, np.uint32),
            generations=self.generations,
        )
        assert posted
        assert self.reader().lookup(namespace, hashes).found.all()
        granted, dropped = np.empty(0, np.uint32), self.store.stats().dropped
        if told:
            result = self.do(c.Adopt(namespace=namespace, more=more), who)
            assert isinstance(result, c.Granted)
            granted = result.granules
        else:
            self.store.adopt()
        rows = self.reader().lookup(namespace, hashes)
        for key, granule, place in zip(keys, slots, rows.granules.tolist(), strict=True):
            del self.stock[me, granule]
            if place == granule:
                assert key not in self.stored
                self.stored[key] = Stored(put_id, granule, 0)
        # Of those that are not there the store had no room for some, and has the others evicted
        # for the slots that were asked for.
        missed = {keys[i] for i in np.flatnonzero(~rows.found).tolist()} - set(self.stored)
        evicted = len(missed) - (self.store.stats().dropped - dropped)
        assert 0 <= evicted <= (len(missed) if more and told else 0)
        self.gone += evicted
        self.add_to_stock(me, granted.tolist(), layout)

    @precondition(lambda self: self.stock)
    @rule(data=st.data(), how=st.sampled_from(["write", "write", "give back"]))
    def use_stock(self, data: st.DataObject, how: str) -> None:
        """Who holds a slot may write to it, also when its connection is closed."""
        me, granule = data.draw(st.sampled_from(list(self.stock)))
        if how == "write":
            start = granule * limits.GRANULE_BYTES
            self.pool[start : start + len(self.slot(0, self.stock[me, granule])) * 4096] = 0xEE
        elif me in self.connections:
            give = c.GiveBack(granules=np.array([granule], np.uint32))
            assert self.do(give, self.connections.index(me)) == c.Count(blocks=1)
            del self.stock[me, granule]

    def none_was_possible(self, namespace: int, numbers: list[int]) -> None:
        """It is not true that all of the keys are stored or under way."""
        keys = [(namespace, KEYS[number].tobytes()) for number in numbers]
        assert not any(key in self.puts for key in keys)

    @rule(who=WHO, space=SPACE, put_id=st.sampled_from(PUT_IDS), numbers=SOME_KEYS)
    def seal(self, who: int, space: int, put_id: bytes, numbers: list[int]) -> None:
        me, namespace, layout = self.connections[who], self.ids[space], SPACES[space][1]
        # A command seals the same cells of all blocks, as the session does.
        keys = [(namespace, KEYS[number].tobytes()) for number in numbers]
        mine = [self.held[me, key, put_id] for key in keys if (me, key, put_id) in self.held]
        cells = mine[0].writers[me] if mine else set(range(layout.n_cells))
        chosen = [
            (key, put)
            for key, put in ((key, self.held.get((me, key, put_id))) for key in keys)
            if put is None or put.writers[me] == cells
        ]
        if not chosen:
            return
        sums = np.zeros((len(chosen), len(cells)), np.uint64)
        for i, (_, put) in enumerate(chosen):
            if put:
                sums[i] = self.write(put, cells)
        hashes = np.frombuffer(b"".join(key[1] for key, _ in chosen), np.uint8).reshape(-1, 32)
        command = c.Seal(namespace=namespace, put_id=put_id, hashes=hashes, checksums=sums)
        sealed = self.do(command, who)
        assert isinstance(sealed, c.Sealed)
        for (key, _), status in zip(chosen, sealed.status.tolist(), strict=True):
            assert status == self.after_seal(me, key, put_id)

    def after_seal(self, me: int, key: Key, put_id: bytes) -> c.SealStatus:
        if (me, key, put_id) not in self.held:
            return c.SealStatus.DROPPED
        cells = self.held[me, key, put_id].writers[me]
        put = self.let_go(me, key, put_id)
        if put.dropped:
            return c.SealStatus.DROPPED
        put.missing -= cells
        if put.missing:
            alone = not put.writers
            put.alone_until_ms = due(self.now_ms, limits.MAX_PARTS_WAIT_MS) if alone else 0
            return c.SealStatus.WAITING
        del self.puts[key]
        expires_ms = due(self.now_ms, put.ttl_ms) if put.ttl_ms else 0
        self.stored[key] = Stored(put_id, put.granule, expires_ms)
        return c.SealStatus.STORED

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["seal", "seal", "abort"]))
    def end_what_is_held(self, data: st.DataObject, how: str) -> None:
        me, key, put_id = data.draw(st.sampled_from(list(self.held)))
        if me in self.connections and key[0] in self.ids:
            who, space = self.connections.index(me), self.ids.index(key[0])
            end = self.seal if how == "seal" else self.abort
            end(who, space, put_id, [NUMBERS[key[1]]])

    @precondition(lambda self: self.puts)
    @rule(data=st.data(), who=WHO, seal=st.booleans())
    def another_rank_joins(self, data: st.DataObject, who: int, seal: bool) -> None:
        key = data.draw(st.sampled_from(list(self.puts)))
        number = NUMBERS[key[1]]
        part = tuple(data.draw(st.sampled_from([sorted(self.puts[key].missing), [0], [1]])))
        put_id = data.draw(st.sampled_from([self.puts[key].put_id] * 2 + PUT_IDS))
        self.reserve(who, self.ids.index(key[0]), [number], put_id, part, -1, -1, 0, seal)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def scribble(self, data: st.DataObject) -> None:
        """Who has a grant may write, also when its connection is closed or its put is dropped."""
        me, key, put_id = data.draw(st.sampled_from(list(self.held)))
        put = self.held[me, key, put_id]
        for number in put.writers[me]:
            self.cell_of(put, number)[:] = 0xEE

    @rule(who=WHO, space=SPACE, put_id=st.sampled_from(PUT_IDS), numbers=SOME_KEYS)
    def abort(self, who: int, space: int, put_id: bytes, numbers: list[int]) -> None:
        me, namespace = self.connections[who], self.ids[space]
        self.do(c.Abort(namespace=namespace, put_id=put_id, hashes=KEYS[numbers]), who)
        for number in set(numbers):
            key = (namespace, KEYS[number].tobytes())
            if (me, key, put_id) in self.held:
                self.drop_put(self.let_go(me, key, put_id))

    @precondition(lambda self: any(key[0] not in self.ids for _, key, _ in self.held))
    @rule(how=st.booleans())
    def end_a_put_of_a_dropped_namespace(self, how: bool) -> None:
        me, key, put_id = next(held for held in self.held if held[1][0] not in self.ids)
        if me not in self.connections:
            return
        who, hashes = self.connections.index(me), np.frombuffer(key[1], np.uint8).reshape(1, 32)
        sums = np.zeros((1, len(self.held[me, key, put_id].writers[me])), np.uint64)
        if how:
            self.do(c.Abort(namespace=key[0], put_id=put_id, hashes=hashes), who)
        else:
            with pytest.raises(StaleNamespace):
                self.do(c.Seal(namespace=key[0], put_id=put_id, hashes=hashes, checksums=sums), who)
        self.let_go(me, key, put_id)

    @rule(who=WHO)
    def disconnect(self, who: int) -> None:
        me = self.connections[who]
        for (holder, _, _), put in self.held.items():
            if holder == me:
                self.drop_put(put)
        holds = any(h[0] == me for h in self.held) or any(x.connection == me for x in self.leases)
        holds |= any(holder == me for holder, _ in self.stock)
        assert self.store.disconnect(me) == (not holds)
        if holds:
            self.closed.append(me)
        self.connections[who] = self.store.connect()

    @precondition(lambda self: self.closed)
    @rule()
    def die(self) -> None:
        me = self.closed.pop(0)
        self.store.holder_died(me)
        for holder, key, put_id in [held for held in self.held if held[0] == me]:
            self.let_go(holder, key, put_id)
        self.leases = [lease for lease in self.leases if lease.connection != me]
        self.stock = {slot: of for slot, of in self.stock.items() if slot[0] != me}

    @rule(who=WHO, space=SPACE, data=st.data())
    def lease(self, who: int, space: int, data: st.DataObject) -> None:
        numbers = self.some_keys(data, space)
        namespace, layout = self.ids[space], SPACES[space][1]
        leased = self.do(c.Lease(namespace=namespace, hashes=KEYS[numbers]), who)
        assert isinstance(leased, c.Leased)
        keys = [(namespace, KEYS[number].tobytes()) for number in numbers]
        present = [key in self.stored for key in keys]
        assert len(leased.granules) == (present.index(False) if False in present else len(keys))
        if leased.lease:
            blocks = [
                (key, self.stored[key].put_id, int(granule), int(generation), layout)
                for key, granule, generation in zip(
                    keys, leased.granules, leased.generations, strict=False
                )
            ]
            self.leases.append(Lease(self.connections[who], leased.lease, blocks))

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        if lease.connection in self.connections:
            who = self.connections.index(lease.connection)
            count = self.do(c.Release(lease=lease.number), who)
            assert count == c.Count(blocks=len(lease.blocks))
            self.leases.remove(lease)

    @rule(who=WHO, space=SPACE, data=st.data())
    def drop(self, who: int, space: int, data: st.DataObject) -> None:
        numbers = self.some_keys(data, space)
        namespace = self.ids[space]
        dropped = self.do(c.Drop(namespace=namespace, hashes=KEYS[numbers]), who)
        gone = self.forget([(namespace, KEYS[number].tobytes()) for number in numbers])
        assert dropped == c.Count(blocks=gone)
        result = self.do(c.Explain(namespace=namespace, hashes=KEYS[numbers]), who)
        assert isinstance(result, c.Explained)
        assert not (result.status == c.ExplainStatus.STORED).any()

    @rule(who=WHO, space=SPACE, rarely=st.sampled_from([False, False, False, True]))
    def drop_namespace(self, who: int, space: int, rarely: bool) -> None:
        if not rarely:
            return
        namespace = self.ids[space]
        dropped = self.do(c.Drop(namespace=namespace, hashes=NO_HASH), who)
        gone = self.forget([key for key in self.stored if key[0] == namespace])
        assert dropped == c.Count(blocks=gone)
        for put in [put for put in self.puts.values() if put.key[0] == namespace]:
            self.drop_put(put)
        self.ids[space] = self.open(space)
        assert self.ids[space] > namespace

    @rule(
        who=WHO,
        space=SPACE,
        data=st.data(),
        kind=st.sampled_from(c.HintKind),
        for_ms=st.sampled_from([0, 150, 1_000]),
    )
    def hint(
        self, who: int, space: int, data: st.DataObject, kind: c.HintKind, for_ms: int
    ) -> None:
        numbers = self.some_keys(data, space)
        namespace = self.ids[space]
        keys = {(namespace, KEYS[number].tobytes()) for number in numbers} & set(self.stored)
        command = c.Hint(namespace=namespace, kind=kind, for_ms=for_ms, hashes=KEYS[numbers])
        try:
            assert self.do(command, who) == c.Count(blocks=len(keys))
        except ResourceExhausted:
            assert kind is c.HintKind.PIN_UNTIL
            return
        if kind is c.HintKind.PIN_UNTIL:
            for key in keys:
                until_ms = due(self.now_ms, for_ms) if for_ms else 0
                self.stored[key].pinned_until_ms = until_ms

    @rule()
    def room_is_made(self) -> None:
        """As after the answer to a commit that asked for slots ahead."""
        self.store.make_room()

    @rule(ms=st.sampled_from([0, 40, 100, 300, 300, 60_000]))
    def time_passes(self, ms: int) -> None:
        self.pass_time(self.now_ms + ms)

    @rule()
    def the_next_deadline_comes(self) -> None:
        if self.store.next_due_ms:
            self.pass_time(max(self.now_ms, self.store.next_due_ms))

    @rule(space=SPACE, data=st.data())
    def remember(self, space: int, data: st.DataObject) -> None:
        """A reader looks now, and copies later."""
        numbers = self.some_keys(data, space)
        found = self.reader().lookup(self.ids[space], KEYS[numbers])
        for i in np.flatnonzero(found.found).tolist():
            key = (self.ids[space], KEYS[numbers[i]].tobytes())
            self.seen.append((key, int(found.granules[i]), int(found.generations[i])))
        self.seen = self.seen[-60:]

    @precondition(lambda self: self.seen)
    @rule(who=WHO)
    def touch(self, who: int) -> None:
        granules, generations = zip(*[(g, n) for _, g, n in self.seen], strict=True)
        command = c.Touch(
            granules=np.array(granules, np.uint32),
            generations=np.array(generations, np.uint64),
            lookups=len(granules),
            hits=len(granules) - 1,
            cold_hits=0,
        )
        count = self.do(command, who)
        assert isinstance(count, c.Count)
        assert count.blocks == sum(self.is_there(*row) for row in self.seen)

    def is_there(self, key: Key, granule: int, generation: int) -> bool:
        row = self.reader().lookup(key[0], np.frombuffer(key[1], np.uint8).reshape(1, 32))
        return bool(
            row.found[0]
            and (int(row.granules[0]), int(row.generations[0])) == (granule, generation)
        )

    # -- what must hold after each step -----------------------------------------------------

    @invariant()
    def sound(self) -> None:
        self.store.check()
        visible = self.found_blocks()
        self.readers_never_see_wrong_bytes()
        self.leased_blocks_stay()
        self.no_slot_is_lost(visible)

    def found_blocks(self) -> dict[Key, int]:
        """All that can be found is the model's; what is missing was evicted, and was free to go."""
        visible: dict[Key, int] = {}
        for namespace, layout in self.layouts.items():
            rows = self.reader().lookup(namespace, KEYS)
            for i in np.flatnonzero(rows.found).tolist():
                key, granule = (namespace, KEYS[i].tobytes()), int(rows.granules[i])
                assert key in self.stored, "found, but never sealed or gone"
                assert int(self.generations[granule]) == int(rows.generations[i])
                self.must_hold(key, granule, layout, self.stored[key].put_id)
                visible[key] = granule
        missing = [key for key in self.stored if key not in visible]
        leased = {block[2] for lease in self.leases for block in lease.blocks}
        for key in missing:
            block = self.stored.pop(key)
            assert block.pinned_until_ms <= self.now_ms, "a pinned block was evicted"
            assert block.granule not in leased, "a leased block was evicted"
        self.gone += len(missing)
        assert self.gone == self.store.stats().evicted
        return visible

    def readers_never_see_wrong_bytes(self) -> None:
        """What was looked up long ago, or in an index given up, is as it was, or not current."""
        for key, granule, generation in self.seen:
            if int(self.generations[granule]) == generation:
                self.must_hold(key, granule, self.layouts[key[0]], None)
        for reader in self.readers[-3:-1]:
            for namespace, layout in self.layouts.items():
                rows = reader.lookup(namespace, KEYS)
                for i in np.flatnonzero(rows.found).tolist():
                    granule = int(rows.granules[i])
                    if int(self.generations[granule]) == int(rows.generations[i]):
                        self.must_hold((namespace, KEYS[i].tobytes()), granule, layout, None)

    def leased_blocks_stay(self) -> None:
        for lease in self.leases:
            for key, put_id, granule, generation, layout in lease.blocks:
                assert int(self.generations[granule]) == generation
                self.must_hold(key, granule, layout, put_id)

    def no_slot_is_lost(self, visible: dict[Key, int]) -> None:
        slots = {granule: self.layouts[key[0]] for key, granule in visible.items()}
        slots |= {b[2]: b[4] for lease in self.leases for b in lease.blocks}
        writing = {*self.puts.values(), *self.held.values()}
        slots |= {put.granule: put.layout for put in writing}
        used = sum(len(self.slot(granule, layout)) for granule, layout in slots.items())
        stats = self.store.stats()
        assert stats.used_bytes == used * limits.GRANULE_BYTES
        ahead = sum(len(self.slot(granule, of)) for (_, granule), of in self.stock.items())
        assert stats.ahead_bytes == ahead * limits.GRANULE_BYTES
        assert stats.pending_blocks == len(self.puts)
        assert stats.quarantined_blocks == len(writing) - len(self.puts)
        assert stats.blocks == len(visible) == len(self.stored)
        pinned = [block for block in self.stored.values() if block.pinned_until_ms > self.now_ms]
        assert stats.pinned_blocks == len(pinned)

    def teardown(self) -> None:
        """When all clients are dead and all time has passed, the pool is empty again."""
        if not hasattr(self, "store"):
            return
        for connection in self.connections + self.closed:
            with contextlib.suppress(KeyError):
                self.store.disconnect(connection)
            self.store.holder_died(connection)
        self.connections = [self.store.connect()]
        self.store.tick(self.now_ms + limits.MAX_PARTS_WAIT_MS + limits.TICK_MS)
        for namespace in self.ids:
            self.do(c.Drop(namespace=namespace, hashes=NO_HASH), 0)
        self.store.check()
        stats = self.store.stats()
        assert (stats.used_bytes, stats.pending_blocks, stats.quarantined_blocks) == (0, 0, 0)
        assert stats.ahead_bytes == 0


def joins(put: Put, put_id: bytes, me: int, cells: set[int]) -> bool:
    written = {number for part in put.writers.values() for number in part}
    free = not cells & written and cells <= put.missing
    return put_id == put.put_id and me not in put.writers and free


def hunt(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        StoreMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            derandomize=True,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_store_is_a_dict_with_legal_misses() -> None:
    hunt(200, 50)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_the_store_is_a_dict_with_legal_misses_in_long_histories() -> None:
    hunt(3000, 150)
