"""What is worth being written, how much of it at a time, and how often the same again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from nvme.judge import SLOT_GRANULES, chain
from nvme.rig import EVERY, PATIENT_MS, UNIT, Plan, Rig, small_limits, tight

from kvstore import commands as c
from kvstore import limits
from kvstore.nvme.ops import WriteBlocks, WriteRaw
from kvstore.nvme.perform import perform
from kvstore.store import NvmePolicy
from kvstore.store.blocks import IdArray
from kvstore.store.writing import _IN_FLIGHT

QUIET = Plan(nesting=0.0, pauses=1)
READ_AGAIN = replace(QUIET, nvme=NvmePolicy())


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_limits():
        yield


def pass_and_write(rig: Rig, ms: int = limits.NVME_GATHER_MS) -> int:
    """How many blocks were written in that time."""
    before = rig.store.stats().nvme_written_blocks
    rig.pass_ms(ms)
    rig.finish_ops()
    return rig.store.stats().nvme_written_blocks - before


def test_a_block_that_nobody_reads_is_not_written() -> None:
    rig = Rig(1, READ_AGAIN)
    rig.put(0, 0, 6)
    assert pass_and_write(rig, 60_000) == 0
    assert rig.get(0, 0, 2) == 2
    assert pass_and_write(rig) == 2


def test_every_block_is_written_where_that_is_wished() -> None:
    rig = Rig(1, QUIET)
    rig.put(0, 0, 6)
    assert pass_and_write(rig) + pass_and_write(rig) == 6


def test_a_put_that_asks_for_it_is_written_whether_it_was_read_or_not() -> None:
    rig = Rig(1, READ_AGAIN)
    rig.put(0, 0, 4)
    rig.persist(0, 0, 4)
    rig.settle()
    assert len(rig.judge.must) == 4
    assert rig.store.stats().nvme_written_blocks == 4


def test_few_blocks_wait_for_others_to_be_written_with() -> None:
    rig = Rig(1, QUIET)
    rig.put(0, 0, 1)
    assert pass_and_write(rig, limits.NVME_GATHER_MS - 1) == 0
    assert pass_and_write(rig, 1) == 1


@pytest.mark.parametrize("rate", [2 * UNIT, 20 * UNIT])
def test_what_nobody_waits_for_keeps_to_its_budget(rate: int) -> None:
    """A second's worth may go at once, and a batch that was begun is written whole."""
    rig = Rig(1, replace(QUIET, nvme=replace(EVERY, bytes_per_s=rate)))
    for tenth in range(1, 301):
        rig.put(0, 4 * tenth, 4)
        pass_and_write(rig, 100)
        written = rig.store.stats().nvme_written_bytes
        # Headers and footers go with what they are of, and are not counted.
        beside = 3 * UNIT * rig.volumes[0].next_sequence
        assert written <= rate * (1 + tenth / 10) + limits.NVME_WRITE_BYTES + beside
    assert written >= rate * 25


def test_who_waits_is_not_held_up_by_the_budget() -> None:
    rig = Rig(1, replace(QUIET, nvme=replace(EVERY, bytes_per_s=1)))
    for first in range(0, 16, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        rig.settle()
    assert len(rig.judge.must) == 16


def test_no_more_waits_to_be_written_than_a_share_of_memory() -> None:
    rig = Rig(1, replace(QUIET, nvme=replace(EVERY, bytes_per_s=1)))
    most = rig.plan.pool_bytes // limits.NVME_QUEUE_SHARE
    for first in range(0, 40, 4):
        rig.put(0, first, 4)
        rig.pass_ms(1)
        assert rig.store.stats().nvme_queued_bytes <= most
    assert rig.store.stats().nvme_refused_blocks


def test_of_a_segment_that_makes_room_no_more_than_a_share_is_written_again() -> None:
    """All of it was read, so all of it would be worth it."""
    rig = Rig(1, replace(QUIET, geometries=(tight(17, 4),)))
    number = 0
    while not rig.store.stats().nvme_again_blocks:
        rig.put(0, number, 4)
        rig.persist(0, number, 4)
        rig.settle()
        rig.demote_all()
        rig.get(0, number, 4)
        number += 4
        assert number < 200
    assert rig.store.stats().nvme_again_blocks <= most_again(rig)
    for _ in range(20):
        rig.put(0, number, 4)
        rig.persist(0, number, 4)
        rig.settle()
        rig.get(0, number, 4)
        number += 4
    assert rig.store.stats().nvme_again_blocks <= most_again(rig)


def test_neighbours_in_a_chain_lie_side_by_side_on_disk() -> None:
    """Whatever their ids are: those that were given back come again in another order."""
    rig = Rig(1, QUIET)
    rig.put(0, 0, 4)
    rig.drop(0, 0, 4)
    rig.settle()
    rig.put(0, 10, 4)
    ids = np.array([rig._block((0, number)) for number in range(10, 14)])
    assert (np.diff(ids) < 0).all()
    rig.persist(0, 10, 4)
    rig.settle()
    _, granules, _ = rig.store._shelf.places.of(ids)
    assert (np.diff(granules) == SLOT_GRANULES[0]).all()


def test_what_lies_side_by_side_is_read_at_once_in_whatever_order_it_is_wanted() -> None:
    rig = Rig(1, QUIET)
    rig.put(0, 0, 4)
    backwards = c.Persist(
        namespace=rig.ids[0], hashes=chain(0, 0, 4)[::-1].copy(), wait_ms=PATIENT_MS
    )
    rig.wait(backwards, PATIENT_MS)
    rig.demote_all()
    ios: list[str] = []
    rig.on_io = lambda _rig, kind: ios.append(kind)
    assert rig.get(0, 0, 4) == 4
    assert ios == ["read", "read"]  # the first one by itself


def test_the_next_segment_is_opened_while_the_one_before_is_filled() -> None:
    """Its header is synced meanwhile, so that no batch waits for that."""
    rig = Rig(1, replace(QUIET, geometries=(tight(17, 12),)))
    rig.put(0, 0, 16)
    rig.persist(0, 0, 16)
    rig.carry_out(WriteRaw)
    kinds = [type(op) for op in rig.out]
    assert WriteBlocks in kinds
    assert WriteRaw in kinds
    rig.settle()
    assert len(rig.judge.must) == 16


def test_the_next_segment_is_opened_when_nothing_waits_for_it_yet() -> None:
    """Who has filled a batch goes on, and its next one is not to wait for a header."""
    rig = Rig(1, replace(QUIET, geometries=(tight(17, 12),)))
    rig.put(0, 0, 8)
    rig.persist(0, 0, 8)
    rig.settle()
    assert len(rig.volumes[0].uses) == 2
    rig.put(0, 8, 8)
    rig.persist(0, 8, 8)
    rig.carry_out(WriteBlocks)
    assert not rig.store.nvme._writer.needed
    rig.settle()
    assert len(rig.judge.must) == 16


def in_flight(n: int, *, excused: bool = False) -> tuple[Rig, list[WriteBlocks], IdArray]:
    """Batches of n blocks that are being written to one segment, and the blocks. excused: whether
    some may be lost."""
    plan = replace(QUIET, geometries=(tight(100, 8),), pool_bytes=1 << 20, excused=excused)
    rig = Rig(1, plan)
    rig.put(0, 0, n)
    rig.persist(0, 0, n)
    rig.carry_out(WriteRaw)
    ids = np.array([rig._block((0, number)) for number in range(n)], np.uint32)
    return rig, [op for op in rig.out if isinstance(op, WriteBlocks)], ids


def hear_of(rig: Rig, op: WriteBlocks) -> None:
    rig.out.remove(op)
    rig.store.hear(perform(op, rig.disks, rig.pool), rig.now_ms)
    rig._changed()


def test_a_segment_has_a_few_batches_in_flight_which_count_in_their_order() -> None:
    """After a crash none is found behind one that is missing."""
    rig, batches, ids = in_flight(40)
    assert len(batches) == _IN_FLIGHT
    there = rig.store._shelf.places.there
    for op in batches[:0:-1]:
        hear_of(rig, op)
        assert not there(ids).any()
    hear_of(rig, batches[0])
    assert there(ids).sum() == sum(len(op.granules) for op in batches)
    rig.settle()
    after = rig.crash()
    assert len(after.judge.must) == 40
    after.get_musts()


def test_a_batch_that_is_written_makes_way_for_another_before_those_in_front_of_it_are() -> None:
    rig, batches, ids = in_flight(60)
    hear_of(rig, batches[2])
    under_way = [op for op in rig.out if isinstance(op, WriteBlocks)]
    assert len(under_way) == _IN_FLIGHT
    assert under_way[-1] not in batches
    for op in reversed(under_way):
        hear_of(rig, op)
    rig.settle()
    assert rig.store._shelf.places.durable(ids).all()
    after = rig.crash()
    assert len(after.judge.must) == 60
    after.get_musts()


def test_what_was_written_behind_a_batch_that_was_not_is_written_again() -> None:
    rig, batches, ids = in_flight(12, excused=True)
    granule = int(rig.store._shelf.blocks.granule[ids[0]])
    rig.pool[granule * UNIT + 1000] ^= 1  # of the payload
    assert len(batches) > 1
    for op in reversed(batches):
        hear_of(rig, op)
    places = rig.store._shelf.places
    assert not places.there(ids).any()
    rig.settle()
    assert rig.store.stats().corrupted == 1
    assert places.durable(ids[1:]).all()
    after = rig.crash()
    assert len(after.judge.must) == 11
    after.get_musts()


def test_a_segment_that_is_used_again_says_so_by_its_header_alone() -> None:
    rig = Rig(1, replace(QUIET, geometries=(tight(17, 4),)))
    for first in range(0, 64, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        rig.settle()
    assert rig.volumes[0].next_sequence > 8
    assert not rig.volumes[0].logged
    assert rig.volumes[0].n_said == rig.volumes[0].n_forgotten > 0


def test_a_drop_waits_for_no_header_that_would_make_its_record_needless() -> None:
    rig = Rig(1, replace(QUIET, geometries=(tight(17, 4),)))
    volume, first = rig.volumes[0], 0
    while not volume.forgotten:  # until a segment is being used again
        if not rig.out:
            rig.settle()
            rig.put(0, first, 4)
            rig.persist(0, first, 4)
            first += 4
        else:
            rig.step()
    assert not volume.logged
    rig.drop(0, first - 5)  # of the put before, which is on disk
    assert volume.logged
    rig.settle()


def most_again(rig: Rig) -> int:
    """By the segments that have made room so far."""
    volume = rig.volumes[0]
    slots = volume.geometry.slots(next(iter(volume.uses.values())).slot_granules)
    over = volume.next_sequence - 1 - len(volume.uses)
    return over * -(-slots // limits.NVME_AGAIN_SHARE)
