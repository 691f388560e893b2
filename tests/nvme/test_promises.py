"""What went wrong once, step by step."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nvme.judge import SMALL, chain
from nvme.rig import EVERY, PATIENT_MS, Plan, Rig, small_limits, tight, with_unread_header
from nvme.sim_disk import SimDisk, aligned

from kvstore import commands as c
from kvstore import limits
from kvstore.nvme.disk import FileDisk, WaryDisk
from kvstore.nvme.ops import ReadBlocks, Sync, WriteBlocks, WriteRaw
from kvstore.nvme.runner import Runner
from kvstore.nvme.volume import Health, UseState
from kvstore.store import NvmePolicy
from kvstore.store.blocks import BlockState

STEP_BY_STEP = Plan(nesting=0.0, pauses=1)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_limits():
        yield


def rig_with(*, put: int = 4, **changes: object) -> Rig:
    """A store that has written and synced some blocks of the first space."""
    rig = Rig(1, replace(STEP_BY_STEP, **changes))
    if put:
        rig.put(0, 0, put)
        rig.persist(0, 0, put)
        rig.settle()
        assert len(rig.judge.must) == put
    return rig


def crashes(rig: Rig, n: int = 8) -> Iterator[Rig]:
    """What may be there after a power cut."""
    return (rig.crash(seed) for seed in range(n))


# -- bytes ---------------------------------------------------------------------------------


def test_what_rotted_in_memory_is_not_written() -> None:
    rig = rig_with(excused=True)
    rig.put(0, 4)
    block = rig._block((0, 4))
    at = int(rig.store._shelf.blocks.granule[block]) * limits.GRANULE_BYTES + 1000
    rig.pool[at] ^= 1
    answers: list[c.Persisted] = []
    rig.ask(
        c.Persist(namespace=rig.ids[0], hashes=chain(0, 4, 1), wait_ms=PATIENT_MS),
        PATIENT_MS,
        answers.append,
    )
    rig.settle()
    assert not answers[0].durable.any()
    assert rig.store.stats().corrupted == 1
    assert not rig.get(0, 4)  # nor may anybody have it from memory


def is_in_memory(rig: Rig, number: int) -> bool:
    block = rig._block((0, number))
    return block >= 0 and rig.store._shelf.blocks.state[block] == BlockState.LIVE


def test_what_is_written_again_is_looked_at_first() -> None:
    rig = rig_with(put=0, excused=True)
    for first in range(0, 16, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        rig.settle()
    rig.demote_all()
    assert rig.get(0, 0, 4) == 4  # read from disk, so that it is worth being written again
    rig.demote_all()
    use = rig._uses_of((0, 0))[0]
    at = rig.volumes[0].offset(use, int(use.members()[1][0])) + 1000
    rig.sims[0].flip_bit(np.random.default_rng(1), at, at + 1)
    for first in range(40, 80, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        while rig.step():  # also before it is written, which would notice as well
            assert not is_in_memory(rig, 0)
        rig.settle()
        if use.segment not in rig.volumes[0].uses or rig.volumes[0].uses[use.segment] is not use:
            break
        rig.demote_all()
    assert not rig.get(0, 0)
    assert rig.get(0, 1)
    assert rig.store.stats().nvme_again_blocks


# -- drops ---------------------------------------------------------------------------------


def test_a_drop_waits_for_the_write_that_has_its_block() -> None:
    rig = rig_with()
    rig.put(0, 4)
    rig.pass_ms(limits.NVME_GATHER_MS)
    rig.perform_one(WriteBlocks)
    ticket = rig.drop(0, 4)
    assert ticket in rig.asked  # else the block, which is on disk by now, could come back
    rig.hear_one()
    assert ticket in rig.asked  # until the log has it
    rig.settle()
    assert all(not after.get(0, 4) for after in crashes(rig))


def test_a_drop_does_not_wait_for_later_ones() -> None:
    """Of which there is always one more when the log has said all before."""
    rig = rig_with()
    first = rig.drop(0, 0)
    for number in range(1, 4):
        rig.perform_one(WriteRaw)
        rig.drop(0, number)
        rig.hear_one()
    assert first not in rig.asked


def test_what_was_dropped_while_its_volume_was_read_does_not_come_back() -> None:
    rig = rig_with()
    rig.put(1, 0, 3)
    rig.persist(1, 0, 3)
    rig.settle()
    after = rig.crash(1, recovers=False)
    dropped, all_dropped = after.drop(0, 1, 2), after.drop_namespace(1)
    assert dropped in after.asked
    assert all_dropped in after.asked
    after.recover()
    assert [after.get(0, number) for number in range(4)] == [1, 0, 0, 1]
    assert not after.get(1, 0)
    after.settle()
    for life in crashes(after):
        assert [life.get(0, number) for number in range(4)] == [1, 0, 0, 1]
        assert not life.get(1, 0)


def test_early_drops_are_of_a_namespace_that_was_closed_meanwhile() -> None:
    """Since it has no blocks yet, others take its place, and then it takes theirs."""
    for by_key in (True, False):
        rig = rig_with().crash(1, recovers=False)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(limits, "MAX_NAMESPACES", 2)
            if by_key:
                rig.drop(0, 0, 4)
            else:
                rig.drop_namespace(0)
            for name in ("x", "y"):
                command = c.OpenNamespace(name=name, layout=SMALL.encode())
                rig.store.handle(rig.me, command, rig.now_ms)
            rig.ids[0] = rig._opened(0)
        rig.recover()
        rig.settle()
        assert not rig.get(0, 0)
        for after in crashes(rig):
            assert not after.get_all()


def test_a_dropped_key_does_not_come_back_by_a_copy_that_was_lost_for_want_of_ids() -> None:
    rig = rig_with(max_blocks=24, put=0)
    for first in range(0, 20, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        rig.settle()
    rig.demote_all()
    rig.view(0, 0, 1)  # so that not all of its segment is lost, and with it the segment
    rig.get(0, 0)
    rig.put(1, 0, 4)
    rig.put(1, 4, 4)
    lost = [number for number in range(20) if rig._block((0, number)) < 0]
    assert lost
    rig.put(0, lost[0])
    rig.drop(0, lost[0])
    rig.settle()
    for after in crashes(rig):
        assert not after.get(0, lost[0])


def go_on_without_log(rig: Rig) -> None:
    """Carries out all but the writing of the log."""
    first = rig.volumes[0].geometry.offset(0)
    while True:
        logs = [
            op for op in rig.out if isinstance(op, WriteRaw) and 8192 <= op.writes[0][0] < first
        ]
        if len(logs) == len(rig.out):
            return
        rig.out = [op for op in rig.out if op not in logs]
        rig.carry_out(type(rig.out[0]))
        rig.out += logs


def test_a_dropped_key_does_not_come_back_by_a_copy_that_a_restart_found() -> None:
    """The copy lies in a segment that made room, which the log does not say yet."""
    rig = rig_with(put=0, geometries=(tight(40, 4, 2),), pool_bytes=384 << 10)
    for first in range(0, 32, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        rig.settle()
        rig.view(0, first, 4)  # so that they are written again when their segment ends
        rig.let_go()
    number = 0
    while not rig.store.stats().nvme_again_blocks:
        rig.drop(0, number)
        go_on_without_log(rig)
        number += 2
    rig.pass_ms(limits.NVME_GATHER_MS)
    go_on_without_log(rig)
    copies = 0
    for seed in range(8):
        after = rig.crash(seed)
        blocks = list(after.store._shelf.places._copies)
        copies += len(blocks)
        for name in [name for name in after.judge.known if after._block(name) in blocks]:
            after.drop(*name)
            after.settle()
            assert all(not life.get(*name) for life in crashes(after, 2))
    assert copies


# -- what could not be read ----------------------------------------------------------------


@pytest.mark.parametrize("reads", range(12))
def test_what_was_dropped_does_not_come_back_when_it_can_be_read_again(reads: int) -> None:
    rig = rig_with(put=0)
    for first in range(0, 16, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        rig.settle()
    first = rig.crash(1, recovers=False)
    first.plan = replace(first.plan, excused=True)
    # Behind the sync and the two halves of the log.
    first.sims[0].fail_at(4 + reads, errno.EIO)
    first.recover()
    first.drop(0, 0, 16)
    first.settle()
    for second in crashes(first):
        assert not second.get_all()


def test_a_key_that_was_put_anew_before_it_was_found_keeps_its_own_time() -> None:
    """Both of its blocks are in one segment, and the first has a time to live."""
    rig = rig_with(put=0)
    rig.put(0, 0, 3, ttl_ms=700)
    rig.persist(0, 0, 3)
    rig.settle()
    rig = rig.restart(clean=False, recovers=False)
    rig.put(0, 0, 3)
    rig.recover()
    rig.persist(0, 0, 3)
    rig.settle()
    (use,) = rig.volumes[0].uses.values()
    assert sum(map(len, use.entries)) == 6
    rig = rig.crash(1)
    rig.pass_ms(1000)
    assert rig.get(0, 0, 3) == 3


def test_what_was_not_dropped_comes_back_when_it_can_be_read_again() -> None:
    rig = rig_with()
    first = rig.crash(1, recovers=False)
    first.plan = replace(first.plan, excused=True)
    first.sims[0].fail_at(4, errno.EIO)
    first.recover()
    assert not first.get_all()
    assert first.restart().get_all() == 4


def test_the_log_keeps_what_it_says_of_a_segment_whose_header_could_not_be_read() -> None:
    for left in (2, 0):  # keys were dropped, or the namespace
        rig = rig_with()
        if left:
            rig.drop(0, 1, 2)
        else:
            rig.drop_namespace(0)
        rig.settle()
        epoch = rig.store.nvme._leaving.logs[0]._epoch
        first = rig.crash(1, recovers=False)
        first.plan = replace(first.plan, excused=True)
        first.sims[0].fail_at(4, errno.EIO)  # behind the sync and the two halves of the log
        first.recover()
        assert not first.get(0, 0, 4)
        first.finish_ops()
        assert first.store.nvme._leaving.logs[0]._epoch > epoch, "the other half was not begun"
        for second in crashes(first):
            assert second.get_all() == left


def test_what_was_dropped_while_its_header_was_unreadable_is_gone_whatever_was_before() -> None:
    """The header is of a life that could not read another one, so that it has a high sequence, of
    which the next life knows nothing."""
    rig = rig_with()
    rig.put(1, 0, 3)
    rig.persist(1, 0, 3)
    rig.settle()
    rig = with_unread_header(rig, rig._uses_of((0, 0))[0].segment)
    rig.put(0, 4, 4)
    rig.persist(0, 4, 4)
    rig.settle()
    use = rig._uses_of((0, 4))[0]
    rig = with_unread_header(rig, use.segment)
    assert rig.get(0, 0, 4) == 4
    assert rig.volumes[0].next_sequence > use.sequence, "a sequence is given twice"
    rig.drop(0, 4, 4)
    rig.settle()
    for after in crashes(rig):
        assert not after.get(0, 4)


def test_no_segment_is_used_before_the_log_says_where_its_sequence_is() -> None:
    rig = rig_with()
    rig = with_unread_header(rig, rig._uses_of((0, 0))[0].segment)
    volume = rig.volumes[0]
    (said,) = rig.out
    assert isinstance(said, WriteRaw)
    rig.put(1, 0, 2)
    rig.persist(1, 0, 2)
    assert rig.out == [said]
    assert volume.next_sequence == volume._floor + 1 > 1 << 32
    rig.settle()
    assert rig._uses_of((1, 0))[0].sequence == volume._floor + 1
    assert len(rig.judge.must) == 2


# -- the log -------------------------------------------------------------------------------


def test_the_log_keeps_what_it_says_of_a_segment_whose_next_header_is_being_written() -> None:
    rig = rig_with()
    for number in range(0, 9, 3):
        rig.put(1, number, 3, ttl_ms=5000)
        rig.persist(1, number, 3)
        rig.settle()
    for number in range(4, 12, 4):  # the first segment gets its footer
        rig.put(0, number, 4)
        rig.persist(0, number, 4)
        rig.settle()
    rig.finish_ops()
    rig.drop(0, 1, 2)
    rig.settle()
    rig = rig.crash(1)
    volume, old = rig.volumes[0], rig._uses_of((0, 0))[0]
    number = 12
    while volume.uses.get(old.segment) is old:  # other blocks, until it makes room
        rig.put(0, number, 4)
        rig.pass_ms(limits.NVME_GATHER_MS)
        number += 4
        while rig.out and volume.uses.get(old.segment) is old:
            rig.carry_out(type(rig.out[0]))
    assert volume.uses[old.segment].state is UseState.OPENING
    log = rig.store.nvme._leaving.logs[0]
    epoch = log._epoch
    rig.pass_ms(5000)  # a segment of which all has expired is over, which the log says
    first = volume.geometry.offset(0)
    while logs := [
        op for op in rig.out if isinstance(op, WriteRaw) and 8192 <= op.writes[0][0] < first
    ]:
        others = [op for op in rig.out if op not in logs]
        rig.out = logs
        rig.carry_out(WriteRaw)
        rig.out += others
    assert log._epoch > epoch, "the other half was not begun"
    for after in crashes(rig):
        assert not after.get(0, 1)
        assert not after.get(0, 2)


def test_a_log_with_no_room_for_all_ends_segments_instead() -> None:
    rig = rig_with(put=0, geometries=(tight(40, 4, 2),), pool_bytes=384 << 10)
    for first in range(0, 32, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        rig.settle()
    before = set(rig.volumes[0].uses)
    # More records than one sector behind the first holds, of uses that all go on.
    for number in range(0, 30, 2):
        rig.drop(0, number)
    rig.settle()
    assert rig.volumes[0].health is Health.OK
    assert set(rig.volumes[0].uses) != before
    for after in crashes(rig):
        assert not any(after.get(0, number) for number in range(0, 30, 2))


def test_a_log_that_is_too_small_for_its_segments_stops_the_writing_only() -> None:
    rig = rig_with(put=0, geometries=(tight(11, 12, 2),))
    for first in range(0, 32, 2):
        rig.put(0, first, 2)
        rig.persist(0, first, 2)
        rig.settle()
    for number in range(0, 32, 2):
        rig.drop(0, number)
        rig.settle()
    rig.put(0, 40, 2)
    assert rig.get(0, 40, 2) == 2


# -- segments ------------------------------------------------------------------------------


def test_a_segment_is_not_used_again_while_its_header_is_written() -> None:
    rig = rig_with(put=0)
    rig.put(0, 0, 4)
    rig.pass_ms(limits.NVME_GATHER_MS)
    (header,) = rig.out
    rig.drop_namespace(0)
    assert isinstance(header, WriteRaw)
    assert 0 in rig.volumes[0].uses  # it ends when the write does
    rig.carry_out(WriteRaw)
    rig.settle()
    assert 0 in rig.volumes[0].free


def test_a_segment_is_not_used_again_while_its_footer_is_written() -> None:
    rig = rig_with(put=0)
    use = None
    for first in range(0, 40, 2):
        rig.put(0, first, 2)
        rig.persist(0, first, 2)
        while rig.out:
            if use := next(
                (u for u in rig.volumes[0].uses.values() if u.state is UseState.CLOSING), None
            ):
                break
            rig.carry_out(type(rig.out[0]))
        if use:
            break
    assert use
    rig.drop_namespace(0)
    assert rig.volumes[0].uses.get(use.segment) is use
    rig.settle()
    rig.finish_ops()
    assert use.segment in rig.volumes[0].free


def test_a_segment_that_is_used_again_is_not_taken_for_what_it_was() -> None:
    """The log does not say yet that it was over, so that all depends on its new header."""
    rig = rig_with(put=0)
    for first in range(0, 48, 4):
        rig.put(0, first, 4)
        rig.pass_ms(limits.NVME_GATHER_MS)
        go_on_without_log(rig)
        for after in crashes(rig, 3):
            after.get_all()  # which is seen to find nothing that is damaged
    assert rig.volumes[0].next_sequence > rig.volumes[0].geometry.n_segments + 2


def test_a_segment_is_not_used_again_while_it_is_read() -> None:
    rig = rig_with()
    use = rig._uses_of((0, 0))[0]
    rig.demote_all()
    command = c.Fetch(namespace=rig.ids[0], hashes=chain(0, 0, 4), wait_ms=PATIENT_MS)
    rig.ask(command, PATIENT_MS, lambda _: None)
    reads = [op for op in rig.out if isinstance(op, ReadBlocks)]
    rig.out = []
    for first in range(10, 58, 4):
        rig.put(0, first, 4)
        rig.pass_ms(limits.NVME_GATHER_MS)
        rig.finish_ops()
    assert rig.volumes[0].uses.get(use.segment) is use
    rig.out += reads
    rig.finish_ops()
    rig.check()  # that what was read is whole
    assert rig.volumes[0].uses.get(use.segment) is not use
    rig.finish()


def test_a_footer_says_only_what_is_durable() -> None:
    rig = rig_with(put=0)
    footers = 0
    for first in range(0, 32, 4):
        rig.put(0, first, 4)
        rig.pass_ms(limits.NVME_GATHER_MS)
        while rig.out:
            footer = isinstance(rig.out[0], WriteRaw) and rig.out[0].syncs_before
            rig.perform_one(type(rig.out[0]))
            footers += footer
            for after in crashes(rig, 6 if footer else 0):
                after.get_all()  # which is seen to find nothing that is damaged
            rig.hear_one()
    assert footers > 2


def test_the_slot_of_a_block_that_comes_is_its_own_until_the_read_has_ended() -> None:
    rig = rig_with()
    rig.demote_all()
    command = c.Fetch(namespace=rig.ids[0], hashes=chain(0, 0, 4), wait_ms=PATIENT_MS)
    rig.ask(command, PATIENT_MS, lambda _: None)
    rig.drop(0, 0, 4)
    for first in range(10, 34, 4):  # as many as there is room for in memory
        rig.put(0, first, 4)
    there = [number for number in range(10, 34) if rig.get(0, number)]
    assert len(there) > 16
    rig.finish_ops()
    assert all(rig.get(0, number) for number in there[-8:])
    rig.finish()


def test_a_reader_sees_that_its_slot_was_filled_from_disk() -> None:
    rig = rig_with()
    seen: set[tuple[int, int]] = set()
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (1, 0, 3, 2)):
        rig.demote_all()
        for number in order:
            assert rig.get(0, number)
        rows = rig.reader().match(rig.ids[0], chain(0, 0, 4))
        places = set(zip(rows.granules.tolist(), rows.generations.tolist(), strict=True))
        assert len(places) == 4
        assert not places & seen
        seen |= places
    assert len({granule for granule, _ in seen}) < len(seen)


def test_room_is_made_only_where_the_block_fits() -> None:
    """The first volume is too small for blocks of the second space, the other is full of them."""
    rig = rig_with(geometries=(tight(6, 6, 3), tight(17, 3, 3)))
    there = [name for name, promise in rig.judge.must.items() if promise.use.volume == 0]
    assert there
    for first in range(0, 24, 4):
        rig.put(1, first, 4)
        rig.persist(1, first, 4)
        rig.settle()
    assert all(name in rig.judge.must for name in there)


# -- volumes that stop ---------------------------------------------------------------------


def test_nothing_waits_for_a_volume_that_is_written_no_more() -> None:
    rig = rig_with()
    rig.put(0, 4, 4)
    rig.put(1, 0, 3)
    rig.sims[0].fail_at(rig.sims[0].ios + 1, errno.EIO, of="write")
    ticket = rig.persist(0, 4, 4)
    assert ticket in rig.asked
    while rig.volumes[0].health is Health.OK:
        assert rig.step()
    assert ticket not in rig.asked
    rig.pass_ms(limits.NVME_GATHER_MS)  # which is seen to have nothing that is always due
    rig.finish_ops()
    assert not rig.store.stats().nvme_queued_bytes
    assert rig.store.next_due_ms is None


def test_a_fetch_is_answered_when_its_volume_is_given_up() -> None:
    rig = rig_with(put=0, excused=True, geometries=(tight(17, 3, 3), tight(17, 3, 3)))
    for first in range(0, 16, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        rig.settle()
    rig.demote_all()
    for sim in rig.sims:
        sim.fail_at(sim.ios + 1, errno.EIO, times=None, of="read")
    for number in range(16):
        assert not rig.get(0, number)
    assert Health.OFF in rig.health
    rig.finish()


def test_a_fetch_is_answered_when_its_volume_is_given_up_before_all_is_found() -> None:
    rig = rig_with(put=0, geometries=(tight(17, 6, 3), tight(17, 6, 3)))
    for first in range(0, 16, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        rig.settle()
    after = rig.crash(1, recovers=False)
    after.plan = replace(after.plan, excused=True)
    one = after._recoveries[0]
    while next(one, None):
        pass
    after._recoveries.remove(one)
    after.recovering -= 1
    after.sims[0].fail_at(after.sims[0].ios + 1, errno.EIO, times=None, of="read")
    answers: list[int] = []
    for first in range(16):
        command = c.Fetch(namespace=after.ids[0], hashes=chain(0, first, 1), wait_ms=PATIENT_MS)
        after.ask(command, PATIENT_MS, lambda answer: answers.append(answer.blocks))
        while after.out or after.done:
            (after._perform if after.out else after._hear)()
        assert len(answers) == first + 1


def test_a_sync_that_failed_for_one_has_failed_for_all() -> None:
    rig = rig_with()
    rig.put(0, 4)
    rig.put(1, 0)
    rig.pass_ms(limits.NVME_GATHER_MS)
    rig.finish_ops()
    rig.persist(0, 4)
    rig.put(1, 1)  # its segment's header is synced as well
    syncs = [op for op in rig.out if isinstance(op, Sync)]
    assert len(syncs) == 1
    rig.drop(0, 0)  # whose record is written and synced at the same time
    rig.sims[0].fail_at(rig.sims[0].ios + 2, errno.EIO, of="sync")
    rig.perform_one(WriteRaw)  # its sync fails, and takes along what the other is about
    rig.perform_one(Sync)
    # The outcome of the later one comes first.
    rig.done.reverse()
    rig.hear_one()
    assert (0, 4) not in rig.judge.must
    rig.settle()
    assert rig.volumes[0].health is Health.DEGRADED


def test_a_disk_where_a_sync_failed_syncs_no_more() -> None:
    sim = SimDisk(1 << 16, seed=1)
    disk = WaryDisk(sim)
    disk.write(0, [aligned(4096, seed=1)])
    sim.fail_at(2, errno.EIO)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output"):
            disk.sync()
    assert sim.ios == 2
    assert disk.nbytes == sim.nbytes


def test_a_disk_that_is_opened_again_shows_what_is_durable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a sync that failed, pages of the system's cache may be there and nowhere else."""
    calls: list[str] = []
    FileDisk.open(tmp_path, 1 << 20, name="v").close()
    sync, advise = os.fdatasync, os.posix_fadvise

    def note_sync(fd: int) -> None:
        calls.append("sync")
        sync(fd)

    def note_advice(fd: int, offset: int, nbytes: int, advice: int) -> None:
        calls.append({os.POSIX_FADV_DONTNEED: "forget the cache"}.get(advice, "?"))
        assert (offset, nbytes) == (0, 0)
        advise(fd, offset, nbytes, advice)

    monkeypatch.setattr(os, "fdatasync", note_sync)
    monkeypatch.setattr(os, "posix_fadvise", note_advice)
    FileDisk.open(tmp_path, 1 << 20, name="v").close()
    assert calls == ["sync", "forget the cache"]


# -- who is woken --------------------------------------------------------------------------


def test_an_answer_that_nobody_took_makes_somebody_look() -> None:
    """A command may answer calls of other connections, of which its own caller knows nothing."""
    rig = rig_with()
    rig.put(0, 4)
    ticket = rig.persist(0, 4)
    assert ticket in rig.asked
    # The block goes before it is written, so that there is nothing to wait for.
    rig.store.handle(rig.me, c.Drop(namespace=rig.ids[0], hashes=chain(0, 4, 1)), rig.now_ms)
    assert rig.store.next_due_ms == 0
    assert [number for number, _ in rig.store.nvme.tickets.take()] == [ticket]
    assert rig.store.next_due_ms != 0


class AtOnce:
    """Threads that are done with their work before the caller goes on."""

    def __init__(self, *_: object) -> None:
        pass

    def submit(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args)  # type: ignore[arg-type]
        thread.start()
        thread.join(0.2)

    def shutdown(self, *, wait: bool) -> None:
        pass


def test_an_operation_may_end_before_its_beginning_has_returned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its end is told by its own thread: the one that began it may hold the store's lock."""
    monkeypatch.setattr("kvstore.nvme.runner.ThreadPoolExecutor", AtOnce)
    rig = rig_with()
    lock, told = threading.Lock(), list[str]()
    by: list[threading.Thread] = []

    def soon(work: object) -> None:
        by.append(threading.current_thread())
        with lock:
            told.append("outcome")

    opened = _Opened(rig.disks)
    runner = Runner(
        rig.store,
        opened,  # type: ignore[arg-type]
        rig.pool,
        soon=soon,
        now_ms=lambda: rig.now_ms,
        after=lambda: None,
    )
    rig.put(0, 4)
    rig.store.nvme.flush()
    with lock:
        runner.pump()
    for thread in by:
        thread.join(5)
        assert thread is not threading.current_thread()
    assert told


class _Opened:
    def __init__(self, disks: Sequence[object]) -> None:
        self.volumes = [_OpenVolume(disk) for disk in disks]


class _OpenVolume:
    def __init__(self, disk: object) -> None:
        self.disk = disk


def test_the_scrubber_asks_for_no_time_while_others_read() -> None:
    rig = rig_with(nvme=replace(EVERY, scrub_bytes_per_s=1 << 20))
    rig.demote_all()
    command = c.Fetch(namespace=rig.ids[0], hashes=chain(0, 0, 4), wait_ms=PATIENT_MS)
    rig.ask(command, PATIENT_MS, lambda _: None)
    assert any(isinstance(op, ReadBlocks) for op in rig.out)
    rig.pass_ms(1000)  # which is seen to have nothing that is always due
    rig.settle()


def test_the_scrubber_looks_at_one_piece_at_a_time() -> None:
    rig = rig_with(nvme=NvmePolicy(every=True, scrub_bytes_per_s=1 << 30), put=0)
    for first in range(0, 16, 4):
        rig.put(0, first, 4)
        rig.persist(0, first, 4)
        rig.settle()
    rig.pass_ms(60_000)
    for _ in range(10):
        rig.pass_ms(1000)
    assert len(rig.out) == 1
