"""The store's promises, on the pure class: no process, no socket, `check()` after each step."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from store_rig import BLOCKS_PER_MIB, LAYOUT, NO_CELLS, SLOT_BYTES, Rig, keys

from kvstore import commands as c
from kvstore import limits
from kvstore.errors import (
    InvalidArgument,
    LayoutMismatch,
    PermissionDenied,
    ResourceExhausted,
    StaleNamespace,
)
from kvstore.index import IndexReader, IndexTable, IndexView
from kvstore.layout import Layout
from kvstore.store import catalog
from kvstore.store.deadlines import Due


def test_a_block_is_found_only_after_it_was_sealed() -> None:
    rig = Rig()
    rig.reserve(keys(1))
    assert rig.explain(keys(1)) == [c.ExplainStatus.NOT_SEALED]
    assert rig.seal(keys(1)).status.tolist() == [c.SealStatus.STORED]
    assert rig.explain(keys(1)) == [c.ExplainStatus.STORED]


def test_two_ranks_seal_one_block_together() -> None:
    rig = Rig()
    other = rig.store.connect()
    first = rig.reserve(keys(1), cells=np.array([0], np.uint32))
    second = rig.reserve(keys(1), cells=np.array([1], np.uint32), connection=other)
    assert first.granules.tolist() == second.granules.tolist()
    assert rig.seal(keys(1), cells=1).status.tolist() == [c.SealStatus.WAITING]
    assert rig.seal(keys(1), cells=1, connection=other).status.tolist() == [c.SealStatus.STORED]


def test_another_put_id_waits_and_never_mixes() -> None:
    rig = Rig()
    rig.reserve(keys(1))
    other = rig.store.connect()
    status = rig.reserve(keys(1), put_id=b"q" * 16, connection=other).status
    assert status.tolist() == [c.ReserveStatus.IN_PROGRESS]
    dropped = rig.seal(keys(1), put_id=b"q" * 16, connection=other).status
    assert dropped.tolist() == [c.SealStatus.DROPPED]


def test_a_dead_writer_gives_back_its_slots_and_shows_nothing() -> None:
    rig = Rig()
    writer = rig.store.connect()
    rig.reserve(keys(1, 2), connection=writer)
    assert not rig.store.disconnect(writer)  # closed, but it may still write
    rig.store.check()
    assert rig.store.stats().quarantined_blocks == 2
    rig.store.holder_died(writer)
    rig.store.check()
    assert rig.store.stats().used_bytes == 0
    assert rig.explain(keys(1)) == [c.ExplainStatus.NEVER_STORED]


def test_a_full_pool_evicts_the_oldest_and_never_a_leased_block() -> None:
    rig = Rig()
    first = keys(0)
    rig.reserve(first)
    rig.seal(first)
    leased = rig.do(c.Lease(namespace=rig.ns, hashes=first))
    assert isinstance(leased, c.Leased)
    for i in range(1, 300):
        rig.reserve(keys(i))
        rig.seal(keys(i))
    assert rig.explain(first) == [c.ExplainStatus.STORED]
    assert rig.explain(keys(1)) != [c.ExplainStatus.STORED]
    assert rig.store.stats().evicted > 0
    rig.do(c.Release(lease=leased.lease))


def test_a_pool_of_leased_blocks_has_no_space() -> None:
    rig = Rig()
    for i in range(BLOCKS_PER_MIB):
        rig.put(keys(i))
        rig.do(c.Lease(namespace=rig.ns, hashes=keys(i)))
    with pytest.raises(ResourceExhausted, match="in use") as caught:
        rig.reserve(keys(999))
    assert caught.value.retry_after_ms > 0
    assert rig.store.stats().refused == 1
    mixed = rig.reserve(keys(0, 999)).status.tolist()
    assert mixed == [c.ReserveStatus.EXISTS, c.ReserveStatus.NO_SPACE]


def test_chains_are_evicted_from_the_tail() -> None:
    rig = Rig()
    chain = keys(*range(40))
    rig.reserve(chain, position=0)
    rig.seal(chain)
    other = keys(*range(100, 100 + 20))
    rig.reserve(other)
    rig.seal(other)
    for start in range(200, 1200, 10):
        rig.reserve(keys(*range(start, start + 10)), put_id=b"z" * 16)
        rig.seal(keys(*range(start, start + 10)), put_id=b"z" * 16)
        stored = [s == c.ExplainStatus.STORED for s in rig.explain(chain)]
        assert stored == sorted(stored, reverse=True), "a head went before its tail"


def test_the_oldest_chain_goes_whole_before_a_younger_one_loses_its_tail() -> None:
    rig = Rig()
    chains = [keys(*range(100 * i, 100 * i + 20)) for i in range(4)]
    for chain in chains:  # 80 of 85 slots
        rig.put(chain, position=0)
    rig.put(keys(*range(1_000, 1_025)))
    stored = [sum(rig.stored(chain)) for chain in chains]
    assert stored == [0, 20, 20, 20]


def test_a_leased_tail_keeps_its_chain_and_no_other() -> None:
    rig = Rig()
    chains = [keys(*range(100 * i, 100 * i + 20)) for i in range(4)]
    for chain in chains:
        rig.put(chain, position=0)
    lease = c.Lease(namespace=rig.ns, hashes=chains[0])
    held = rig.do(lease)
    assert isinstance(held, c.Leased)
    tail = rig.do(c.Lease(namespace=rig.ns, hashes=chains[0][-1:]))
    assert isinstance(tail, c.Leased)
    rig.do(c.Release(lease=held.lease))  # what is left holds the tail alone
    for n in (22, 23):  # 5 slots are free, so these evict 40
        rig.put(keys(*range(1_000 * n, 1_000 * n + n)))
    assert [sum(rig.stored(chain)) for chain in chains] == [20, 0, 0, 20]


def test_a_slot_changes_its_generation_when_it_is_given_up() -> None:
    rig = Rig()
    reserved = rig.reserve(keys(1))
    rig.seal(keys(1))
    generations = rig.generations
    before = int(generations[reserved.granules[0]])
    assert before % 2 == 0
    rig.do(c.Drop(namespace=rig.ns, hashes=keys(1)))
    assert int(generations[reserved.granules[0]]) != before


def test_dropping_a_namespace_moves_its_generation_on() -> None:
    rig = Rig()
    rig.reserve(keys(1))
    rig.seal(keys(1))
    rig.do(c.Drop(namespace=rig.ns, hashes=np.empty((0, 32), np.uint8)))
    with pytest.raises(StaleNamespace, match="open it again"):
        rig.reserve(keys(1))
    rig.ns = rig.open()
    assert rig.explain(keys(1, 2)) == [c.ExplainStatus.DROPPED, c.ExplainStatus.NEVER_STORED]


@pytest.mark.parametrize(
    ("command", "error", "field"),
    [
        ({"put_id": b"short"}, InvalidArgument, "put_id"),
        ({"hashes": np.zeros((0, 32), np.uint8)}, InvalidArgument, "hashes"),
        ({"hashes": np.zeros((1, 31), np.uint8)}, InvalidArgument, "hashes"),
        ({"hashes": np.zeros((65_537, 32), np.uint8)}, InvalidArgument, "hashes"),
        ({"cells": np.array([99], np.uint32)}, LayoutMismatch, "cells"),
    ],
)
def test_bad_input_names_its_field_and_changes_nothing(
    command: dict[str, object], error: type[InvalidArgument], field: str
) -> None:
    rig = Rig()
    before = rig.store.stats()
    with pytest.raises(error) as caught:
        rig.reserve(**{"hashes": keys(1), **command})  # type: ignore[arg-type]
    assert caught.value.field == field
    assert rig.store.stats() == before


def test_a_lease_is_its_holders_alone() -> None:
    rig = Rig()
    with pytest.raises(PermissionDenied):
        rig.do(c.Release(lease=1))


def test_a_block_lives_no_longer_than_its_time_to_live() -> None:
    rig = Rig()
    rig.put(keys(1), ttl_ms=500)
    rig.put(keys(2), ttl_ms=5_000)
    assert rig.store.next_due_ms == rig.now_ms + 500
    rig.pass_ms(499)
    assert rig.stored(keys(1, 2)) == [True, True]
    rig.pass_ms(1)
    assert rig.explain(keys(1, 2)) == [c.ExplainStatus.EXPIRED, c.ExplainStatus.STORED]
    assert rig.store.stats().expired == 1
    rig.pass_ms(10_000)
    assert rig.store.next_due_ms is None
    assert rig.store.stats().used_bytes == 0


def test_a_lease_says_how_long_its_blocks_have_yet() -> None:
    rig = Rig()
    rig.put(keys(1), ttl_ms=5_000)
    rig.put(keys(2))
    rig.pass_ms(2_000)
    leased = rig.do(c.Lease(namespace=rig.ns, hashes=keys(1, 2)))
    assert isinstance(leased, c.Leased)
    assert leased.left_ms.tolist() == [3_000, 0]


def test_an_expired_block_keeps_its_slot_while_a_view_holds_it() -> None:
    rig = Rig()
    rig.put(keys(1), ttl_ms=100)
    lease = rig.do(c.Lease(namespace=rig.ns, hashes=keys(1)))
    assert isinstance(lease, c.Leased)
    rig.pass_ms(1_000)
    assert rig.stored(keys(1)) == [False]
    assert rig.store.stats().used_bytes > 0
    assert rig.generations[lease.granules[0]] == lease.generations[0]
    rig.do(c.Release(lease=lease.lease))
    assert rig.store.stats().used_bytes == 0
    assert rig.generations[lease.granules[0]] != lease.generations[0]


@pytest.mark.parametrize("whole", [True, False])
def test_a_drop_hides_leased_blocks_at_once_and_frees_them_in_time(whole: bool) -> None:
    rig = Rig()
    rig.put(keys(1, 2), position=0)
    reader = rig.store.connect()
    rig.do(c.Lease(namespace=rig.ns, hashes=keys(1, 2)), reader)
    hashes = np.empty((0, 32), np.uint8) if whole else keys(1, 2)
    dropped = rig.do(c.Drop(namespace=rig.ns, hashes=hashes))
    assert dropped == c.Count(blocks=2)
    rig.ns = rig.open()
    assert rig.stored(keys(1, 2)) == [False, False]
    assert rig.store.stats().used_bytes > 0
    rig.put(keys(1, 2))  # they can be put again meanwhile
    rig.store.disconnect(reader)
    rig.store.holder_died(reader)
    rig.store.check()
    assert rig.store.stats().blocks == 2


def test_pinned_blocks_outlive_a_flood_until_their_time() -> None:
    rig = Rig()
    rig.put(keys(0, 1), position=0)
    assert rig.hint(c.HintKind.PIN_UNTIL, 60_000, keys(0, 1, 2)) == 2
    assert rig.store.stats().pinned_blocks == 2
    flood(rig, 3)
    assert rig.stored(keys(0, 1)) == [True, True]
    rig.pass_ms(60_000)
    assert rig.store.stats().pinned_blocks == 0
    flood(rig, 4)
    assert rig.stored(keys(0, 1)) == [False, False]


def test_no_more_than_a_share_of_the_pool_can_be_pinned() -> None:
    rig = Rig()
    every = keys(*range(BLOCKS_PER_MIB))
    for i in range(BLOCKS_PER_MIB):
        rig.put(every[i : i + 1])
    half = every[: BLOCKS_PER_MIB // 2]
    assert rig.hint(c.HintKind.PIN_UNTIL, 1_000, half) == len(half)
    before = rig.store.stats()
    with pytest.raises(ResourceExhausted, match="pinned"):
        rig.hint(c.HintKind.PIN_UNTIL, 1_000, every[len(half) :])
    assert rig.store.stats() == before
    assert rig.hint(c.HintKind.PIN_UNTIL, 0, half) == len(half)  # ends the pins
    assert rig.store.stats().pinned_blocks == 0


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_an_ended_session_goes_first_and_an_expected_one_last(policy: str) -> None:
    rig = Rig(policy=policy)
    n = BLOCKS_PER_MIB // 4
    ended, expected = keys(*range(n)), keys(*range(1_000, 1_000 + n))
    rig.put(expected)
    for start in range(2 * n):
        rig.put(keys(2_000 + start))
    rig.put(ended)
    rig.hint(c.HintKind.SESSION_ENDS, 0, ended)
    rig.hint(c.HintKind.NEXT_TURN_BY, 1_000, expected)
    for i in range(n + 1):
        rig.put(keys(3_000 + i))
    assert not any(rig.stored(ended))
    assert all(rig.stored(expected))
    for i in range(2 * n):
        rig.put(keys(4_000 + i))
    assert all(rig.stored(expected))
    rig.pass_ms(1_000)  # the turn never came
    for i in range(n + 1):
        rig.put(keys(5_000 + i))
    assert not any(rig.stored(expected))


def test_a_turn_that_came_is_no_longer_waited_for() -> None:
    rig = Rig()
    rig.put(keys(1))
    rig.hint(c.HintKind.NEXT_TURN_BY, 1_000, keys(1))
    lease = rig.do(c.Lease(namespace=rig.ns, hashes=keys(1)))
    assert isinstance(lease, c.Leased)
    rig.do(c.Release(lease=lease.lease))
    rig.put(keys(2))
    rig.pass_ms(2_000)
    assert rig.store.next_due_ms is None
    flood(rig, 1, n=BLOCKS_PER_MIB - 2)
    assert rig.stored(keys(1)) == [True]  # it was not demoted when the time was over


def test_explain_knows_why_and_when_a_block_went() -> None:
    rig = Rig()
    rig.put(keys(1, 2))
    rig.now_ms += 77
    rig.do(c.Drop(namespace=rig.ns, hashes=keys(1)))
    flood(rig, 2)
    result = rig.do(c.Explain(namespace=rig.ns, hashes=keys(1, 2, 3)))
    assert isinstance(result, c.Explained)
    assert result.status.tolist() == [
        c.ExplainStatus.DROPPED,
        c.ExplainStatus.EVICTED,
        c.ExplainStatus.NEVER_STORED,
    ]
    assert result.when_ms.tolist() == [rig.now_ms, rig.now_ms, 0]
    rig.put(keys(1))
    assert rig.explain(keys(1)) == [c.ExplainStatus.STORED]


def test_explain_finds_a_key_under_another_layout_of_the_name() -> None:
    rig = Rig()
    rig.put(keys(1))
    rig.ns = rig.open(layout=Layout.opaque(model="test", block_bytes=999, block_tokens=16))
    assert rig.explain(keys(1)) == [c.ExplainStatus.OTHER_LAYOUT]


@pytest.mark.parametrize("max_blocks", [100_000, 70_000])
def test_the_index_grows_and_tells_its_readers(max_blocks: int) -> None:
    rig = Rig(pool=256 << 20, max_blocks=max_blocks)
    rig.ns = rig.open(layout=Layout.opaque(model="test", block_bytes=512, block_tokens=16))
    hashes = np.random.default_rng(0).integers(0, 256, (60_000, 32), np.uint8)
    for start in range(0, len(hashes), 6_000):
        some = hashes[start : start + 6_000]
        fields = {"namespace": rig.ns, "put_id": b"p" * 16, "hashes": some}
        rig.store.handle(rig.me, c.Reserve(cells=NO_CELLS, **fields), rig.now_ms)
        sums = np.zeros((len(some), 1), np.uint64)
        rig.store.handle(rig.me, c.Seal(checksums=sums, **fields), rig.now_ms)
    rig.store.check()
    assert len(rig.indexes) > 1
    readers = [IndexReader(IndexView.open(index)) for index in rig.indexes]
    assert [reader.retired for reader in readers] == [True] * (len(readers) - 1) + [False]
    assert readers[-1].match(rig.ns, hashes).count == len(hashes)
    assert readers[-1].view.capacity >= 2 * len(hashes)
    rig.do(c.Drop(namespace=rig.ns, hashes=hashes[: len(hashes) // 2]))  # so many make it anew
    assert IndexReader(IndexView.open(rig.indexes[-1])).match(rig.ns, hashes[30_000:]).count
    assert rig.store.stats().blocks == 30_000


def test_a_dropped_put_gives_its_slots_back_when_its_writer_stops_writing() -> None:
    rig = Rig()
    rank = rig.store.connect()
    rig.reserve(keys(1), cells=np.array([0], np.uint32))
    rig.reserve(keys(1), cells=np.array([1], np.uint32), connection=rank)
    rig.do(c.Abort(namespace=rig.ns, put_id=b"p" * 16, hashes=keys(1)), rank)
    assert rig.store.stats().quarantined_blocks == 1
    # The slot is not let go by asking again under the same put id...
    assert rig.reserve(keys(1)).status.tolist() == [c.ReserveStatus.IN_PROGRESS]
    # ...but by the seal, which says that the writing is over.
    assert rig.seal(keys(1), cells=1).status.tolist() == [c.SealStatus.DROPPED]
    assert rig.store.stats().used_bytes == 0


@pytest.mark.parametrize("how", [c.Seal, c.Abort])
def test_a_writer_in_a_dropped_namespace_lets_go_with_its_next_word(how: type) -> None:
    rig = Rig()
    rig.reserve(keys(1))
    rig.do(c.Drop(namespace=rig.ns, hashes=np.empty((0, 32), np.uint8)))
    assert rig.store.stats().quarantined_blocks == 1
    if how is c.Seal:
        with pytest.raises(StaleNamespace):
            rig.seal(keys(1))
    else:
        rig.do(c.Abort(namespace=rig.ns, put_id=b"p" * 16, hashes=keys(1)))
    assert rig.store.stats().used_bytes == 0


def test_one_client_cannot_reserve_the_whole_pool() -> None:
    rig = Rig()
    granted = rig.reserve(keys(*range(BLOCKS_PER_MIB))).status == c.ReserveStatus.GRANTED
    assert granted.sum() == int((1 << 20) * limits.MAX_GRANTED_SHARE) // SLOT_BYTES
    other = rig.store.connect()
    assert rig.reserve(keys(999), connection=other).status.tolist() == [c.ReserveStatus.GRANTED]
    rig.seal(keys(*range(BLOCKS_PER_MIB)))
    assert rig.reserve(keys(888)).status.tolist() == [c.ReserveStatus.GRANTED]


def test_a_key_twice_in_one_batch_is_written_once() -> None:
    rig = Rig()
    status = rig.reserve(keys(1, 1)).status.tolist()
    assert status == [c.ReserveStatus.GRANTED, c.ReserveStatus.IN_PROGRESS]
    assert rig.seal(keys(1, 1)).status.tolist() == [c.SealStatus.STORED, c.SealStatus.DROPPED]


def test_a_put_does_not_evict_the_head_of_its_own_chain() -> None:
    rig = Rig()
    head = keys(1, 2, 3)
    rig.put(head)  # the coldest of all
    flood(rig, 1, n=BLOCKS_PER_MIB - 3)
    status = rig.reserve(np.concatenate([head, keys(10, 11)])).status.tolist()
    assert status == [c.ReserveStatus.EXISTS] * 3 + [c.ReserveStatus.GRANTED] * 2
    assert all(rig.stored(head))


def test_a_slab_is_not_emptied_in_vain() -> None:
    """Blocks of another size go only where their slab can go with them."""
    rig = Rig()
    small = rig.ns
    every = keys(*range(BLOCKS_PER_MIB))
    for i in range(BLOCKS_PER_MIB):
        rig.put(every[i : i + 1])
    leased = [i for i in range(BLOCKS_PER_MIB) if i % 2]  # one at least in each slab
    for i in leased:
        rig.do(c.Lease(namespace=small, hashes=every[i : i + 1]))
    rig.ns = rig.open(layout=Layout.opaque(model="test", block_bytes=30_000, block_tokens=16))
    with pytest.raises(ResourceExhausted):
        rig.reserve(keys(500))
    rig.ns = small
    assert all(rig.stored(every))


def test_a_namespace_too_many_takes_the_place_of_the_longest_unused_empty_one() -> None:
    rig = Rig()
    rig.put(keys(1))
    for i in range(limits.MAX_NAMESPACES - 1):
        opened = rig.store.handle(
            rig.me, c.OpenNamespace(name=f"n{i}", layout=LAYOUT.encode()), rig.now_ms
        )
        assert isinstance(opened, c.NamespaceOpened)
    epoch = IndexReader(IndexView.open(rig.indexes[-1])).namespace_epoch
    assert rig.open("one more") > limits.MAX_NAMESPACES
    assert IndexReader(IndexView.open(rig.indexes[-1])).namespace_epoch == epoch + 1
    assert rig.stored(keys(1)) == [True]


FIRST, SECOND = np.array([0], np.uint32), np.array([1], np.uint32)


@pytest.mark.parametrize("dies", [True, False])
def test_a_block_whose_other_ranks_never_come_is_dropped_in_time(dies: bool) -> None:
    rig = Rig()
    rank = rig.store.connect()
    rig.reserve(keys(1, 2), cells=FIRST, connection=rank)
    assert rig.seal(keys(1, 2), cells=1, connection=rank).status.tolist() == [1, 1]
    if dies:
        assert rig.store.disconnect(rank)
        rig.store.holder_died(rank)
    rig.pass_ms(limits.MAX_PARTS_WAIT_MS - 1)
    # Another rank of the put comes just in time for the first, and now that one waits for nobody.
    rig.reserve(keys(1), cells=SECOND)
    rig.pass_ms(1)
    assert rig.explain(keys(1, 2)) == [c.ExplainStatus.NOT_SEALED, c.ExplainStatus.NEVER_STORED]
    assert rig.store.stats().used_bytes == SLOT_BYTES
    assert rig.reserve(keys(2), put_id=b"q" * 16).status.tolist() == [c.ReserveStatus.GRANTED]
    assert rig.seal(keys(1), cells=1).status.tolist() == [c.SealStatus.STORED]


def test_dropping_a_namespace_frees_what_waits_for_other_ranks() -> None:
    rig = Rig()
    rig.reserve(keys(1), cells=FIRST)
    rig.seal(keys(1), cells=1)
    rig.do(c.Drop(namespace=rig.ns, hashes=np.empty((0, 32), np.uint8)))
    assert rig.store.stats().used_bytes == rig.store.stats().quarantined_blocks == 0
    assert rig.store.stats().dropped == 1


def test_a_key_of_zeros_is_a_key_and_as_a_parent_it_is_none() -> None:
    rig = Rig()
    zeros = np.zeros((1, 32), np.uint8)
    chain = np.concatenate([zeros, keys(1)])
    rig.put(chain, position=0)
    assert all(rig.stored(chain))
    rig.reserve(keys(2), parent=bytes(32), position=5)
    rig.seal(keys(2))
    assert rig.stored(keys(2)) == [True]


def test_blocks_that_name_each_other_as_parents_can_be_evicted() -> None:
    rig = Rig()
    for i in range(0, BLOCKS_PER_MIB - 1, 2):
        pair = keys(i, i + 1)
        rig.reserve(pair, parent=pair[1].tobytes(), position=7)
        rig.seal(pair)
    own = keys(BLOCKS_PER_MIB)
    rig.reserve(own, parent=own.tobytes(), position=7)
    rig.seal(own)
    flood(rig, 1)
    assert not any(rig.stored(keys(*range(BLOCKS_PER_MIB + 1))))


def test_a_put_id_again_does_not_replace_what_is_not_let_go() -> None:
    rig = Rig()
    rank = rig.store.connect()
    first = rig.reserve(keys(1), cells=FIRST)
    rig.reserve(keys(1), cells=SECOND, connection=rank)
    rig.do(c.Abort(namespace=rig.ns, put_id=b"p" * 16, hashes=keys(1)), rank)
    again = rig.reserve(keys(1), cells=SECOND, connection=rank)  # the same put id, another try
    assert again.granules.tolist() != first.granules.tolist()
    assert rig.reserve(keys(1), cells=FIRST).status.tolist() == [c.ReserveStatus.IN_PROGRESS]
    assert rig.seal(keys(1), cells=1).status.tolist() == [c.SealStatus.DROPPED]
    assert rig.reserve(keys(1), cells=FIRST).granules.tolist() == again.granules.tolist()


def test_a_turn_that_comes_twice_in_one_batch_is_counted_once() -> None:
    rig = Rig()
    rig.put(keys(1, 2))
    rig.hint(c.HintKind.NEXT_TURN_BY, 1_000, keys(1, 2))
    lease = rig.do(c.Lease(namespace=rig.ns, hashes=keys(1, 1)))
    assert isinstance(lease, c.Leased)
    touch = c.Touch(
        granules=np.repeat(lease.granules, 3),
        generations=np.repeat(lease.generations, 3),
        lookups=6,
        hits=6,
        cold_hits=0,
    )
    assert rig.do(touch) == c.Count(blocks=6)
    assert rig.do(c.Release(lease=lease.lease)) == c.Count(blocks=2)


def test_look_ups_beyond_counting_are_refused() -> None:
    rig = Rig()
    none = {"granules": NO_CELLS, "generations": np.empty(0, np.uint64)}
    most = limits.MAX_LOOKUPS_PER_TOUCH
    rig.do(c.Touch(lookups=most, hits=most, **none, cold_hits=0))
    for lookups, hits in ((most + 1, 0), (1, 2), (1, -1)):
        with pytest.raises(InvalidArgument, match="lookups"):
            rig.do(c.Touch(lookups=lookups, hits=hits, **none, cold_hits=0))
    assert rig.store.stats().lookups == most


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_what_exists_at_the_reply_is_still_there(policy: str) -> None:
    rig = Rig(policy=policy)
    head, tail = keys(*range(50)), keys(*range(50, 100))
    rig.put(head)
    status = rig.reserve(np.concatenate([head, tail])).status
    assert (status[:50] == c.ReserveStatus.EXISTS).all()
    assert all(rig.stored(head))
    assert (status[50:] == c.ReserveStatus.GRANTED).sum() == BLOCKS_PER_MIB - 50


def test_a_put_does_not_evict_the_parent_that_it_names() -> None:
    rig = Rig()
    rig.put(keys(0))
    flood(rig, 1, n=BLOCKS_PER_MIB - 1)
    rig.reserve(keys(1, 2), parent=keys(0).tobytes(), position=1)
    assert rig.stored(keys(0)) == [True]


def test_no_more_slabs_of_another_size_are_emptied_than_needed() -> None:
    rig = Rig(pool=8 << 20, max_blocks=4096)
    every = keys(*range(672))
    for start in range(0, 672, 96):
        rig.put(every[start : start + 96])
    for i in np.random.default_rng(0).permutation(672).tolist():  # the coldest lie in all slabs
        touch = rig.store.handle(
            rig.me, c.Lease(namespace=rig.ns, hashes=every[i : i + 1]), rig.now_ms
        )
        assert isinstance(touch, c.Leased)
        rig.store.handle(rig.me, c.Release(lease=touch.lease), rig.now_ms)
    full = rig.store.stats().blocks
    rig.ns = rig.open(layout=Layout.opaque(model="test", block_bytes=30_000, block_tokens=16))
    status = rig.reserve(keys(*range(5_000, 5_020))).status
    assert (status == c.ReserveStatus.GRANTED).all()
    # 20 slots of 32 KiB are 3 of the 32 slabs.
    assert rig.store.stats().evicted == full - rig.store.stats().blocks <= 3 * 21


def test_a_slab_that_would_not_hold_the_block_is_not_emptied() -> None:
    rig = Rig(max_blocks=64)
    every = keys(*range(16))
    rig.ns = rig.open("units", Layout.opaque(model="test", block_bytes=65_000, block_tokens=16))
    units = rig.ns
    rig.reserve(every[:8])
    rig.seal(every[:8], cells=1)
    rig.reserve(every[8:])
    rig.seal(every[8:], cells=1)
    for i in range(0, 16, 2):  # each second unit of the pool is in use
        rig.do(c.Lease(namespace=units, hashes=every[i : i + 1]))
    rig.ns = rig.open("wide", Layout.opaque(model="test", block_bytes=70_000, block_tokens=16))
    with pytest.raises(ResourceExhausted):
        rig.reserve(keys(500))
    rig.ns = units
    assert all(rig.stored(every))


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_blocks_in_use_at_the_front_do_not_hide_those_that_may_go(policy: str) -> None:
    rig = Rig(pool=8 << 20, max_blocks=1_000, policy=policy)
    rig.ns = rig.open(layout=Layout.opaque(model="test", block_bytes=512, block_tokens=16))
    every = keys(*range(1_000))
    rig.reserve(every)
    rig.seal(every, cells=1)
    rig.do(c.Lease(namespace=rig.ns, hashes=every[:900]))
    rig.hint(c.HintKind.SESSION_ENDS, 0, every[:900])
    rig.hint(c.HintKind.SESSION_ENDS, 0, every[900:])  # the last of those that ended
    assert rig.reserve(keys(5_000)).status.tolist() == [c.ReserveStatus.GRANTED]


def test_keys_that_collide_are_dropped_and_the_reply_says_so() -> None:
    rig = Rig(pool=8 << 20, max_blocks=2_048)
    rig.ns = rig.open(layout=Layout.opaque(model="test", block_bytes=512, block_tokens=16))
    same_home = keys(*range(200)).copy()
    same_home[:, :8] = 7
    rig.reserve(same_home)
    status = rig.seal(same_home, cells=1).status
    stored = status == c.SealStatus.STORED
    assert stored.sum() == limits.MAX_INDEX_PROBE
    assert (status[~stored] == c.SealStatus.DROPPED).all()
    assert rig.stored(same_home) == stored.tolist()
    assert rig.store.stats().dropped == 200 - limits.MAX_INDEX_PROBE


def test_without_memory_for_another_index_the_old_one_serves_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "FIRST_INDEX_BLOCKS", 16)
    monkeypatch.setattr(catalog, "_MANY", 4)
    rig = Rig()
    some = keys(*range(40))

    def no_memory(nbytes: int) -> npt.NDArray[np.uint8]:
        raise OSError("too many open files")

    rig.store._shelf.catalog._new_index = no_memory
    rig.reserve(some)
    stored = rig.seal(some).status == c.SealStatus.STORED
    assert stored.sum() == 16
    assert rig.stored(some) == stored.tolist()
    assert rig.do(c.Drop(namespace=rig.ns, hashes=some)) == c.Count(blocks=16)
    rig.store._shelf.catalog._new_index = rig._new_index
    rig.put(some)
    assert all(rig.stored(some))


def test_deadlines_that_are_set_and_taken_back_do_not_pile_up() -> None:
    rig = Rig()
    rig.put(keys(1, 2, 3))
    rig.hint(c.HintKind.NEXT_TURN_BY, 400_000, keys(3))
    for i in range(5_000):
        for_ms = 1_000 + 100 * i
        hint = c.Hint(namespace=rig.ns, kind=2, for_ms=for_ms, hashes=keys(1, 2))
        rig.store.handle(rig.me, hint, rig.now_ms)
    rig.store.check()
    queue = rig.store._shelf.deadlines._queue
    assert sum(len(batch) for batches in queue.values() for batch in batches) < 1_100
    rig.pass_ms(1_000 + 100 * 4_999 - 1)
    assert rig.store._shelf.deadlines.has(Due.TURN, np.arange(2, dtype=np.uint32)).all()
    rig.pass_ms(1)
    assert rig.store.next_due_ms is None


def test_time_that_goes_backwards_stands_still() -> None:
    rig = Rig()
    rig.pass_ms(1_000)
    rig.store.handle(rig.me, c.Stat(), 5)
    rig.put(keys(1), ttl_ms=500)
    assert rig.store.next_due_ms == rig.now_ms + 500
    rig.store.tick(7)
    assert rig.stored(keys(1)) == [True]


def test_an_expired_block_that_was_pinned_is_pinned_no_more() -> None:
    rig = Rig()
    rig.put(keys(1), ttl_ms=500)
    rig.hint(c.HintKind.PIN_UNTIL, 60_000, keys(1))
    rig.pass_ms(500)
    assert rig.store.stats().pinned_blocks == rig.store.stats().used_bytes == 0
    rig.put(keys(1))
    assert rig.store.stats().pinned_blocks == 0


def test_a_parents_second_life_has_no_children_of_the_first() -> None:
    rig = Rig()
    chain = keys(1, 2)
    rig.put(chain, position=0)
    rig.do(c.Drop(namespace=rig.ns, hashes=chain[:1]))
    rig.put(chain[:1])  # most likely under the same block id
    flood(rig, 1, n=BLOCKS_PER_MIB - 2)
    rig.put(keys(77))
    assert rig.stored(chain) == [True, False]  # the older one goes, whatever it is the child of
    rig.put(keys(78))
    assert rig.stored(chain[:1]) == [False]


def test_a_child_of_an_earlier_life_is_not_taken_from_the_next() -> None:
    rig = Rig(max_blocks=3)  # so that ids come back at once
    rig.put(keys(1, 2), position=0)
    rig.do(c.Drop(namespace=rig.ns, hashes=keys(1)))
    rig.put(keys(5, 6), position=0)  # 5 has the id that 1 had, and a child of its own
    rig.do(c.Drop(namespace=rig.ns, hashes=keys(2)))
    rig.put(keys(7))
    rig.put(keys(8))
    assert rig.stored(keys(5, 6)) == [True, False]  # the tail went first


def test_another_put_id_does_not_join_even_where_cells_are_left() -> None:
    rig = Rig()
    other = rig.store.connect()
    rig.reserve(keys(1), cells=FIRST)
    status = rig.reserve(keys(1), cells=SECOND, put_id=b"q" * 16, connection=other).status
    assert status.tolist() == [c.ReserveStatus.IN_PROGRESS]
    rig.seal(keys(1), cells=1)
    status = rig.reserve(keys(1), cells=SECOND, put_id=b"q" * 16, connection=other).status
    assert status.tolist() == [c.ReserveStatus.IN_PROGRESS]


def test_an_index_is_given_up_only_when_the_next_one_is_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "FIRST_INDEX_BLOCKS", 16)
    rig = Rig()
    some = keys(*range(16))
    rig.put(some)
    counts: list[int] = []

    def retire(table: IndexTable) -> None:
        newest = IndexReader(IndexView.open(rig.indexes[-1]))
        counts.append(newest.match(rig.ns, some).count)
        real(table)

    real = IndexTable.retire
    monkeypatch.setattr(IndexTable, "retire", retire)
    rig.put(keys(*range(16, 40)))
    assert counts == [16]
    assert [IndexReader(IndexView.open(index)).retired for index in rig.indexes] == [True, False]


def test_why_a_block_went_is_remembered_under_its_name_alone() -> None:
    rig = Rig()
    for ns in (rig.open("other"), rig.ns):
        rig.ns = ns
        rig.put(keys(1))
    rig.do(c.Drop(namespace=rig.ns, hashes=np.empty((0, 32), np.uint8)))
    rig.ns = rig.open()  # another generation of the name, and another id
    rig.put(keys(2))
    rig.do(c.Drop(namespace=rig.ns, hashes=keys(2)))
    assert rig.explain(keys(1, 2)) == [c.ExplainStatus.DROPPED] * 2
    rig.ns = rig.open("other")
    assert rig.explain(keys(1, 2)) == [c.ExplainStatus.STORED, c.ExplainStatus.NEVER_STORED]


def test_a_touch_of_what_was_in_the_slot_before_is_not_counted() -> None:
    rig = Rig()
    reserved = rig.reserve(keys(1))
    rig.seal(keys(1))
    stale = rig.generations[reserved.granules].copy()
    touch = c.Touch(granules=reserved.granules, generations=stale, lookups=1, hits=1, cold_hits=0)
    assert rig.do(touch) == c.Count(blocks=1)
    rig.do(c.Drop(namespace=rig.ns, hashes=keys(1)))
    assert rig.do(touch) == c.Count(blocks=0)
    assert rig.reserve(keys(2)).granules.tolist() == reserved.granules.tolist()
    rig.seal(keys(2))
    assert rig.do(touch) == c.Count(blocks=0)
    beyond = np.array([len(rig.generations)], np.uint32)
    assert rig.do(replace(touch, granules=beyond)) == c.Count(blocks=0)


def flood(rig: Rig, seed: int, n: int = 4 * BLOCKS_PER_MIB) -> None:
    """Puts n blocks of nobody's, one a batch."""
    for i in range(n):
        rig.put(keys(1_000_000 * seed + 10_000 + i))


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
@pytest.mark.parametrize("seed", range(5))
def test_random_histories_keep_every_invariant(seed: int, policy: str) -> None:
    rng = np.random.default_rng(seed)
    rig = Rig(max_blocks=64, policy=policy)
    spaces_layout = Layout.opaque(model="m", block_bytes=70_000, block_tokens=1)
    spaces = [rig.ns, rig.open("big", spaces_layout)]
    cells = [LAYOUT.n_cells, 1]
    peers = [rig.me, rig.store.connect(), rig.store.connect()]
    leases: list[tuple[int, int]] = []
    for step in range(500):
        peer = int(rng.integers(3))
        which = int(rng.integers(2))
        rig.ns = spaces[which]
        some = keys(*rng.choice(120, size=int(rng.integers(1, 8)), replace=False).tolist())
        put_id = bytes([int(rng.integers(3))]) * 16
        match int(rng.integers(11)):
            case 0 | 1 | 2:
                with contextlib.suppress(ResourceExhausted):
                    rig.reserve(
                        some,
                        put_id=put_id,
                        connection=peers[peer],
                        position=step % 3 - 1,
                        ttl_ms=int(rng.choice([0, 300])),
                    )
            case 3 | 4:
                rig.seal(some, cells[which], put_id=put_id, connection=peers[peer])
            case 5:
                lease = rig.do(c.Lease(namespace=rig.ns, hashes=some), peers[peer])
                assert isinstance(lease, c.Leased)
                if lease.lease:
                    leases.append((peers[peer], lease.lease))
            case 6 if leases:
                holder, number = leases.pop(int(rng.integers(len(leases))))
                rig.do(c.Release(lease=number), holder)
            case 7:
                gone = some if rng.random() < 0.9 else np.empty((0, 32), np.uint8)
                rig.do(c.Drop(namespace=rig.ns, hashes=gone), peers[peer])
                spaces = [rig.open(), rig.open("big", spaces_layout)] if not len(gone) else spaces
            case 8:
                rig.do(c.Abort(namespace=rig.ns, put_id=put_id, hashes=some), peers[peer])
            case 9:
                with contextlib.suppress(ResourceExhausted):
                    rig.hint(c.HintKind(int(rng.integers(1, 4))), int(rng.integers(900)), some)
            case 10:
                rig.pass_ms(int(rng.integers(200)))
                if peer and rng.random() < 0.2:
                    rig.store.disconnect(peers[peer])
                    rig.store.holder_died(peers[peer])
                    leases = [held for held in leases if held[0] != peers[peer]]
                    peers[peer] = rig.store.connect()
                    rig.store.check()


def test_who_cannot_write_the_pool_leaves_no_slot_behind_with_its_connection() -> None:
    rig = Rig()
    other = rig.store.connect()
    rig.reserve(keys(1, 2), connection=other)
    assert rig.store.disconnect(other, writes=False)
    rig.store.check()
    assert rig.store.stats().used_bytes == 0
