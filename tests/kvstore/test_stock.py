"""Slots held ahead and commits in them, on the pure store: `check()` after each step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from store_rig import BLOCKS_PER_MIB, LAYOUT, SLOT_BYTES, Rig, keys

from kvstore import commands as c
from kvstore import limits
from kvstore.block import unpack
from kvstore.errors import (
    InvalidArgument,
    LayoutMismatch,
    PermissionDenied,
    ResourceExhausted,
    StaleNamespace,
)
from kvstore.index import IndexReader, IndexView
from kvstore.layout import Layout

BIG = Layout.opaque(model="test", block_bytes=70_000, block_tokens=16)


def granted(rig: Rig, n: int, **options: Any) -> c.U32:
    who = options.pop("connection", None)
    result = rig.do(c.Grant(**{"namespace": rig.ns, "blocks": n, **options}), who)
    assert isinstance(result, c.Granted)
    return result.granules


def commit(hashes: c.U8, granules: c.U32, namespace: int, **options: Any) -> c.Commit:
    sums = np.arange(len(hashes) * LAYOUT.n_cells, dtype=np.uint64).reshape(len(hashes), -1)
    fields = {"namespace": namespace, "put_id": b"p" * 16, "checksums": sums, **options}
    return c.Commit(hashes=hashes, granules=granules, **fields)


def committed(rig: Rig, hashes: c.U8, granules: c.U32, **options: Any) -> c.Committed:
    who = options.pop("connection", None)
    result = rig.do(commit(hashes, granules, rig.ns, **options), who)
    assert isinstance(result, c.Committed)
    return result


def numbers(*slots: int) -> c.U32:
    return np.array(slots, np.uint32)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_a_commit_shows_blocks_with_their_headers_and_stable_slots(n: int) -> None:
    rig = Rig()
    slots, hashes = granted(rig, n), keys(*range(n))
    before = rig.generations[slots].copy()
    parent = keys(99)[0].tobytes()
    answer = committed(rig, hashes, slots, parent=parent, position=5)
    assert answer.status.tolist() == [c.CommitStatus.STORED] * n
    assert len(answer.granules) == 0
    rows = IndexReader(IndexView.open(rig.indexes[-1])).lookup(rig.ns, hashes)
    assert rows.found.all()
    assert rows.granules.tolist() == slots.tolist()
    assert rows.generations.tolist() == rig.generations[slots].tolist()
    assert (rows.generations % 2 == 0).all()
    assert (rows.generations == before).all()  # so that it can be posted with it too
    chain = [parent, *(h.tobytes() for h in hashes)]
    for i, slot in enumerate(slots.tolist()):
        header = unpack(rig.pool[slot * limits.GRANULE_BYTES :])
        assert (header.key, header.parent, header.position) == (chain[i + 1], chain[i], 5 + i)
        assert header.checksums.tolist() == [i * LAYOUT.n_cells + j for j in range(LAYOUT.n_cells)]


@pytest.mark.parametrize("n", [1, 3])
def test_what_is_there_already_leaves_its_slot_with_the_client(n: int) -> None:
    rig = Rig()
    rig.put(keys(*range(n)))
    slots = granted(rig, n)
    before = rig.generations[slots].copy()
    answer = committed(rig, keys(*range(n)), slots)
    assert answer.status.tolist() == [c.CommitStatus.EXISTS] * n
    assert (rig.generations[slots] % 2 == 0).all()
    assert (rig.generations[slots] > before).all()  # nothing was shown with these
    others = keys(*range(10, 10 + n))
    assert committed(rig, others, slots).status.tolist() == [c.CommitStatus.STORED] * n


@pytest.mark.parametrize("n", [1, 3])
def test_what_ranks_are_putting_is_theirs(n: int) -> None:
    rig = Rig()
    ranks = rig.store.connect()
    rig.reserve(keys(0), cells=numbers(0), connection=ranks)
    answer = committed(rig, keys(*range(n)), granted(rig, n))
    expected = [c.CommitStatus.IN_PROGRESS] + [c.CommitStatus.STORED] * (n - 1)
    assert answer.status.tolist() == expected


def test_one_of_equal_keys_is_stored() -> None:
    rig = Rig()
    answer = committed(rig, keys(1, 2, 1), granted(rig, 3))
    assert sorted(answer.status.tolist()) == [0, 0, c.CommitStatus.EXISTS]
    assert rig.store.stats().blocks == 2


def test_blocks_without_a_slot_are_those_between_which_others_lie() -> None:
    rig = Rig()
    rig.put(keys(0, 2))
    slots = granted(rig, 2)
    none = c.NO_SLOT
    places = numbers(none, slots[0], none, slots[1], none)
    answer = committed(rig, keys(0, 1, 2, 3, 4), places, position=0)
    there, stored, absent = (
        c.CommitStatus.EXISTS,
        c.CommitStatus.STORED,
        c.CommitStatus.NO_SPACE,
    )
    assert answer.status.tolist() == [there, stored, there, stored, absent]


@pytest.mark.parametrize("together", [True, False])
def test_a_committed_chain_is_evicted_from_its_tail(together: bool) -> None:
    rig = Rig(max_blocks=64)
    chain = keys(*range(8))
    if together:
        committed(rig, chain, granted(rig, 8), position=0)
    else:
        for i in range(8):
            parent = chain[i - 1].tobytes() if i else b""
            committed(rig, chain[i : i + 1], granted(rig, 1), parent=parent, position=i)
    for i in range(100, 100 + 60):
        rig.put(keys(i))
    kept = rig.stored(chain)
    assert kept == sorted(kept, reverse=True)
    assert 0 < sum(kept) < 8


def test_a_block_is_linked_to_a_parent_that_was_there_already() -> None:
    rig = Rig(max_blocks=16)
    committed(rig, keys(1), granted(rig, 1), position=1)
    answer = committed(rig, keys(0, 1, 2), granted(rig, 3), position=0)
    assert answer.status.tolist() == [0, c.CommitStatus.EXISTS, 0]
    found = rig.store._shelf.catalog.find(rig.ns, keys(0, 1, 2))
    # The block that was there first does not know what comes before it.
    assert rig.store._shelf.blocks.children[found].tolist() == [0, 1, 0]


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_a_block_that_names_itself_its_parent_can_still_be_evicted(policy: str) -> None:
    rig = Rig(policy=policy)
    own = keys(0)[0].tobytes()
    committed(rig, keys(0), granted(rig, 1), parent=own, position=0)
    committed(rig, keys(1, 0, 1), granted(rig, 3), parent=own, position=0)
    rig.hint(c.HintKind.SESSION_ENDS, 0, keys(0, 1))  # whatever the policy: they go first
    for i in range(1000, 1000 + BLOCKS_PER_MIB):
        rig.put(keys(i))
    assert rig.stored(keys(0, 1)) == [False, False]


@pytest.mark.parametrize("n", [1, 3])
def test_a_committed_block_expires(n: int) -> None:
    rig = Rig()
    committed(rig, keys(*range(n)), granted(rig, n), ttl_ms=1000)
    rig.pass_ms(900)
    assert rig.stored(keys(0)) == [True]
    rig.pass_ms(200)
    assert rig.explain(keys(*range(n))) == [c.ExplainStatus.EXPIRED] * n


def test_slots_held_ahead_are_a_small_part_of_the_pool() -> None:
    rig = Rig(pool=4 << 20)
    answer = committed(rig, keys(0), granted(rig, 1), more=1000)
    own = (4 << 20) // limits.AHEAD_SHARE // SLOT_BYTES
    assert len(answer.granules) == own
    for i in range(1, 100):
        who = rig.store.connect()
        slots = granted(rig, 1, connection=who)
        assert len(committed(rig, keys(i), slots, connection=who, more=1000).granules) <= own
    assert rig.store.stats().ahead_bytes <= (4 << 20) // limits.ALL_AHEAD_SHARE


def test_a_full_pool_grants_what_it_can_by_evicting() -> None:
    rig = Rig()
    for i in range(BLOCKS_PER_MIB):
        rig.put(keys(i))
    assert len(granted(rig, 4)) == 4
    assert rig.store.stats().evicted == 4


def test_room_for_the_next_put_is_made_once_the_answer_is_out() -> None:
    rig = Rig()
    slots = granted(rig, 2)
    for i in range(BLOCKS_PER_MIB - 4):
        rig.put(keys(i + 10))
    assert rig.store.stats().evicted == 0
    ahead = committed(rig, keys(0, 1), slots, more=2).granules
    assert len(ahead) == 2
    rig.store.make_room()
    rig.store.check()
    assert rig.store.stats().evicted == 2
    assert rig.stored(keys(10, 11, 12)) == [False, False, True]
    rig.store.make_room()  # once for each commit that asked
    assert rig.store.stats().evicted == 2
    # The next one finds the room, and asks for as much.
    assert len(committed(rig, keys(2, 3), ahead, more=2).granules) == 2
    assert rig.store.stats().evicted == 2


def all_there_is(rig: Rig, layout: Layout) -> int:
    """Slots for blocks of a layout that connections get until there are no more."""
    count = 0
    while True:
        who = rig.store.connect()
        opened = rig.do(c.OpenNamespace(name="all", layout=layout.encode()), who)
        assert isinstance(opened, c.NamespaceOpened)
        try:
            count += len(granted(rig, 64, connection=who, namespace=opened.namespace))
        except ResourceExhausted:
            return count


@pytest.mark.parametrize("layout", [LAYOUT, BIG], ids=["the same size", "another size"])
def test_what_was_got_ready_for_one_is_room_for_all(layout: Layout) -> None:
    rig = Rig()
    ahead = committed(rig, keys(0, 1), granted(rig, 2), more=2).granules
    rig.do(c.GiveBack(granules=ahead))
    rig.do(c.Drop(namespace=rig.ns, hashes=keys(0, 1)))
    rig.store.make_room()
    rig.store.check()
    assert rig.store.stats().used_bytes == 0
    assert len(rig.store._shelf.ready.ids) == 2
    assert all_there_is(rig, layout) == all_there_is(Rig(), layout) > 8
    rig.store.check()


def test_room_is_not_made_by_what_was_just_put() -> None:
    """Where all else is leased, nothing goes."""
    rig = Rig()
    slots = granted(rig, 2)
    others = keys(*range(10, 10 + BLOCKS_PER_MIB - 4))
    for i in range(len(others)):
        rig.put(others[i : i + 1])
    assert isinstance(rig.do(c.Lease(namespace=rig.ns, hashes=others)), c.Leased)
    assert len(committed(rig, keys(0, 1), slots, more=2).granules) == 2
    rig.store.make_room()
    rig.store.check()
    assert rig.stored(keys(0, 1)) == [True, True]
    assert rig.store.stats().evicted == 0


def test_no_more_is_granted_than_one_connection_may_hold() -> None:
    rig = Rig()
    most = int((1 << 20) * limits.MAX_GRANTED_SHARE) // SLOT_BYTES
    assert len(granted(rig, 1000)) == most
    with pytest.raises(ResourceExhausted, match="slots"):
        granted(rig, 1)
    assert rig.store.stats().refused == 1000 - most + 1


def test_stock_of_a_living_process_stays_and_a_dead_ones_comes_back() -> None:
    rig = Rig()
    other = rig.store.connect()
    granted(rig, 5, connection=other)
    assert not rig.store.disconnect(other)
    rig.store.check()
    assert rig.store.stats().ahead_bytes == 5 * SLOT_BYTES
    rig.store.holder_died(other)
    rig.store.check()
    assert rig.store.stats().ahead_bytes == 0


def test_stock_of_who_cannot_write_comes_back_at_once() -> None:
    rig = Rig()
    other = rig.store.connect()
    granted(rig, 5, connection=other)
    assert rig.store.disconnect(other, writes=False)
    rig.store.check()
    assert rig.store.stats().ahead_bytes == 0


def test_slots_given_back_are_others() -> None:
    rig = Rig()
    slots = granted(rig, 5)
    before = rig.generations[slots].copy()
    rig.do(c.GiveBack(granules=slots[:3]))
    assert rig.store.stats().ahead_bytes == 2 * SLOT_BYTES
    assert (rig.generations[slots[:3]] > before[:3]).all()
    assert (rig.generations[slots[:3]] % 2 == 0).all()
    with pytest.raises(PermissionDenied):
        committed(rig, keys(1), slots[:1])


def test_bad_commits_change_nothing() -> None:
    rig = Rig()
    other, big = rig.store.connect(), rig.open("big", BIG)
    mine, theirs = granted(rig, 3), granted(rig, 1, connection=other)
    large = granted(rig, 1, namespace=big)
    good = commit(keys(1, 2), mine[:2], rig.ns)
    bad: list[tuple[type[Exception], dict[str, Any]]] = [
        (PermissionDenied, {"granules": numbers(mine[0], theirs[0])}),
        (PermissionDenied, {"granules": numbers(mine[0], 1 << 20)}),
        (InvalidArgument, {"granules": numbers(mine[0], mine[0])}),
        (LayoutMismatch, {"granules": numbers(mine[0], large[0])}),
        (InvalidArgument, {"granules": mine}),
        (LayoutMismatch, {"checksums": np.zeros((2, LAYOUT.n_cells + 1), np.uint64)}),
        (LayoutMismatch, {"checksums": np.zeros((1, LAYOUT.n_cells), np.uint64)}),
        (InvalidArgument, {"put_id": b"short"}),
        (InvalidArgument, {"parent": b"short"}),
        (InvalidArgument, {"position": -2}),
        (InvalidArgument, {"ttl_ms": -1}),
        (InvalidArgument, {"more": -1}),
        (StaleNamespace, {"namespace": 999}),
    ]
    before = rig.store.stats()
    for error, fields in bad:
        with pytest.raises(error):
            rig.do(replace(good, **fields))
        rig.store.check()
        assert rig.store.stats() == before
    with pytest.raises(PermissionDenied):
        rig.do(c.GiveBack(granules=theirs))
    with pytest.raises(PermissionDenied):
        rig.do(c.GiveBack(granules=numbers(mine[0], mine[0])))
    with pytest.raises(InvalidArgument):
        rig.do(c.Grant(namespace=rig.ns, blocks=0))
    assert rig.store.stats() == before
    answer = rig.do(good)
    assert isinstance(answer, c.Committed)
    assert answer.status.tolist() == [c.CommitStatus.STORED] * 2


def test_a_commit_that_meets_a_full_index_leaves_the_slots() -> None:
    rig = Rig(max_blocks=4)
    slots = granted(rig, 4)
    view = rig.store._shelf.catalog._index
    view._limit = 2
    assert committed(rig, keys(0, 1), slots[:2]).status.tolist() == [0, 0]
    for n in (1, 2):
        answer = committed(rig, keys(*range(5, 5 + n)), slots[2 : 2 + n])
        assert answer.status.tolist() == [c.CommitStatus.NO_SPACE] * n
        assert (rig.generations[slots[2 : 2 + n]] % 2 == 0).all()
