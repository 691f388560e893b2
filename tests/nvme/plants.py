"""Bugs that are planted, to see that they are caught: each is one mistake that a store like this
one may have, with the name of what has to notice it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from kvstore.nvme import perform, recovery
from kvstore.nvme.disk import WaryDisk
from kvstore.nvme.ops import Outcome
from kvstore.nvme.volume import Volume
from kvstore.store import nvme_adopting
from kvstore.store.blocks import Blocks, BlockState
from kvstore.store.fetching import Fetcher
from kvstore.store.nvme import NvmeTier
from kvstore.store.nvme_leaving import Leaving
from kvstore.store.places import Places
from kvstore.store.shelf import Shelf
from kvstore.store.tickets import Tickets
from kvstore.store.unwanted import Unwanted
from kvstore.store.writing import Writer

Patch = pytest.MonkeyPatch


@dataclass(frozen=True, slots=True)
class Plant:
    """A bug. caught_by: the hunt of `test_plants`, or the test of `test_promises`
    or `test_copies`."""

    name: str
    caught_by: str
    apply: Callable[[Patch], None]


PLANTS: list[Plant] = []


def plant(caught_by: str) -> Callable[[Callable[[Patch], None]], Callable[[Patch], None]]:
    def add(apply: Callable[[Patch], None]) -> Callable[[Patch], None]:
        PLANTS.append(Plant(apply.__name__.replace("_", " "), caught_by, apply))
        return apply

    return add


# -- bytes that nobody looks at ------------------------------------------------------------


def _nothing_bad(op: Any, *_: object) -> Any:
    return np.zeros(len(op.keys), np.bool_)


def _read(op: Any, disk: Any, pool: Any) -> Any:
    slots, first = perform._slots(pool, op.granules, op.slot_granules), 0
    for run in op.runs:
        disk.read(run.offset, slots[first : first + run.count])
        first += run.count
    return slots


@plant("damage while it runs")
def what_is_read_is_not_verified(patch: Patch) -> None:
    def read(op: Any, disk: Any, pool: Any) -> Any:
        _read(op, disk, pool)
        return _nothing_bad(op)

    patch.setattr(perform, "_read_blocks", read)


@plant("test_what_is_written_again_is_looked_at_first")
def what_is_written_again_is_not_verified(patch: Patch) -> None:
    leave, verify = Leaving._leave_with_care, perform._read_blocks
    segments = set[tuple[int, int]]()  # volume, offset of those that make room

    def leave_and_note(self: Leaving, use: Any) -> None:
        segments.add((use.volume, self._shelf.places.volumes[use.volume].offset(use, 0)))
        leave(self, use)

    def read(op: Any, disk: Any, pool: Any) -> Any:
        starts = [at for volume, at in segments if volume == op.volume]
        if not any(at <= op.runs[0].offset < at + (17 << 12) for at in starts):
            return verify(op, disk, pool)
        _read(op, disk, pool)
        return _nothing_bad(op)

    patch.setattr(Leaving, "_leave_with_care", leave_and_note)
    patch.setattr(perform, "_read_blocks", read)


@plant("test_what_rotted_in_memory_is_not_written")
def what_is_written_is_not_verified(patch: Patch) -> None:
    def write(op: Any, disk: Any, pool: Any) -> Any:
        disk.write(op.offset, [op.head, *perform._slots(pool, op.granules, op.slot_granules)])
        return _nothing_bad(op)

    patch.setattr(perform, "_write_blocks", write)


@plant("scrubbed damage")
def the_scrubber_looks_away(patch: Patch) -> None:
    patch.setattr(perform, "_check_blocks", _nothing_bad)


@plant("failed reads")
def a_read_that_failed_is_taken_for_a_whole_one(patch: Patch) -> None:
    real = perform._read_blocks

    def read(op: Any, disk: Any, pool: Any) -> Any:
        try:
            return real(op, disk, pool)
        except OSError:
            return _nothing_bad(op)

    patch.setattr(perform, "_read_blocks", read)


@plant("crashes")
def a_torn_tail_is_kept(patch: Patch) -> None:
    def sound(_reader: Any, _header: Any, _layout: Any, entries: Any) -> Any:
        return np.ones(len(entries), np.bool_)

    patch.setattr(recovery, "_sound", sound)


# -- syncs that are left out ---------------------------------------------------------------


def _without_sync(patch: Patch, magic: bytes) -> None:
    real = perform._write_raw

    def write(op: Any, disk: Any) -> None:
        if op.writes[0][1][:4].tobytes() != magic:
            real(op, disk)
            return
        for offset, content in op.writes:
            disk.write(offset, [content])

    patch.setattr(perform, "_write_raw", write)


@plant("histories")
def persisted_before_it_is_synced(patch: Patch) -> None:
    patch.setattr(Places, "durable", Places.there)


@plant("test_a_footer_says_only_what_is_durable")
def a_footer_before_its_sync(patch: Patch) -> None:
    _without_sync(patch, b"KVSF")


@plant("test_a_segment_that_is_used_again_is_not_taken_for_what_it_was")
def the_header_of_a_segment_used_again_is_not_synced(patch: Patch) -> None:
    _without_sync(patch, b"KVSG")


@plant("crashes")
def a_record_of_the_log_is_not_synced(patch: Patch) -> None:
    _without_sync(patch, b"KVSL")


@plant("test_a_sync_that_failed_for_one_has_failed_for_all")
def a_sync_after_a_failed_one_is_trusted(patch: Patch) -> None:
    patch.setattr(WaryDisk, "sync", lambda self: self._disk.sync())


@plant("failed syncs")
def a_sync_that_failed_is_taken_for_one_that_did_not(patch: Patch) -> None:
    real = Writer._synced

    def synced(self: Writer, volume: Volume, upto: Any, outcome: Outcome) -> None:
        real(self, volume, upto, replace(outcome, error=""))

    patch.setattr(Writer, "_synced", synced)


# -- what must not come back ---------------------------------------------------------------


@plant("histories")
def a_drop_leaves_no_record(patch: Patch) -> None:
    real = Places.leave
    patch.setattr(Places, "leave", lambda self, ids, forgotten: real(self, ids, forgotten=False))


@plant("test_a_drop_waits_for_the_write_that_has_its_block")
def a_drop_forgets_the_batches_under_way(patch: Patch) -> None:
    real = NvmeTier.forgotten

    def forgotten(self: NvmeTier, connection: int, count: Any) -> Any:
        leased, self._writer.leased = self._writer.leased, {}
        try:
            return real(self, connection, count)
        finally:
            self._writer.leased = leased

    patch.setattr(NvmeTier, "forgotten", forgotten)


@plant("test_what_was_dropped_while_its_volume_was_read_does_not_come_back")
def a_drop_is_not_remembered_until_all_is_found(patch: Patch) -> None:
    patch.setattr(Unwanted, "add", lambda _self, _lineage, _hashes: None)


@plant("test_a_dropped_key_does_not_come_back_by_a_copy_that_a_restart_found")
def second_copies_are_not_forgotten(patch: Patch) -> None:
    patch.setattr(Places, "vanish", lambda _self, _ids, **_: None)


@plant("test_what_was_dropped_does_not_come_back_when_it_can_be_read_again")
def a_segment_that_could_not_be_read_is_not_forgotten(patch: Patch) -> None:
    patch.setattr(Volume, "forget_unread", lambda _self: None)


@plant("test_the_log_keeps_what_it_says_of_a_segment_whose_header_could_not_be_read")
def the_log_is_done_with_segments_that_could_not_be_read(patch: Patch) -> None:
    real = Volume.found

    def found(self: Volume, headers: Any, _unknown: Any, records: Any) -> None:
        real(self, headers, (), records)

    patch.setattr(Volume, "found", found)


@plant("test_no_segment_is_used_before_the_log_says_where_its_sequence_is")
def sequences_after_an_unread_header_are_not_said(patch: Patch) -> None:
    patch.setattr(Leaving, "floors_said", True)


@plant("test_the_log_keeps_what_it_says_of_a_segment_whose_next_header_is_being_written")
def what_a_header_will_say_is_taken_for_said(patch: Patch) -> None:
    real = Volume.forget

    def forget(self: Volume, records: Any) -> None:
        real(self, records)
        self._note_over(records)

    patch.setattr(Volume, "forget", forget)


@plant("test_early_drops_are_of_a_namespace_that_was_closed_meanwhile")
def early_drops_are_of_numbers(patch: Patch) -> None:
    patch.setattr(nvme_adopting, "_whose", lambda namespace: (namespace.lineage, b""))


@plant("test_what_was_persisted_later_does_not_leave_with_the_segment_of_an_older_copy")
def second_copies_go_with_a_segment(patch: Patch) -> None:
    real = Shelf.fall_back

    def fall_back(self: Shelf, ids: Any) -> None:
        if inspect.stack()[1].function != "_end":
            real(self, ids)

    patch.setattr(Shelf, "fall_back", fall_back)
    _no_heirs(patch)


@plant("test_what_was_persisted_later_does_not_expire_with_a_copy_that_was_read")
def second_copies_expire_with_the_first(patch: Patch) -> None:
    _no_heirs(patch)


def _no_heirs(patch: Patch) -> None:
    real = Places.vanish
    patch.setattr(Places, "vanish", lambda self, ids, **_: real(self, ids, heirs_at_ms=None))


@plant("test_a_key_that_was_put_anew_before_it_was_found_keeps_its_own_time")
def of_two_blocks_in_a_segment_the_first_is_found(patch: Patch) -> None:
    patch.setattr(nvme_adopting, "_last_of_each", lambda keys: np.ones(len(keys), np.bool_))


@plant("histories")
def what_expired_comes_back(patch: Patch) -> None:
    real = NvmeTier.adopt

    def adopt(self: NvmeTier, number: int, segment: Any) -> int:
        segment.entries["expires_ms"] = 0
        return real(self, number, segment)

    patch.setattr(NvmeTier, "adopt", adopt)


# -- slots and segments with two owners ----------------------------------------------------


@plant("test_a_reader_sees_that_its_slot_was_filled_from_disk")
def a_slot_keeps_its_generation_when_it_is_filled_from_disk(patch: Patch) -> None:
    fetch, show = Fetcher.fetch, Fetcher._show

    def free_slots(self: Shelf, granules: Any) -> None:
        generations = self.memory.generations
        generations[granules] += generations[granules] % np.uint64(2)
        self.room.slabs.free(granules)

    def fetch_quietly(self: Fetcher, namespace: Any, ids: Any, **options: Any) -> int:
        generations = self._shelf.memory.generations
        before = generations.copy()
        n = fetch(self, namespace, ids, **options)
        generations[:] = before
        return n

    def show_quietly(self: Fetcher, ids: Any) -> None:
        self._shelf.memory.generations[self._shelf.blocks.granule[ids]] -= np.uint64(1)
        show(self, ids)

    patch.setattr(Shelf, "free_slots", free_slots)
    patch.setattr(Fetcher, "fetch", fetch_quietly)
    patch.setattr(Fetcher, "_show", show_quietly)


@plant("test_the_slot_of_a_block_that_comes_is_its_own_until_the_read_has_ended")
def the_slot_of_a_block_that_comes_is_free_once_it_is_dropped(patch: Patch) -> None:
    real = Blocks.vanish

    def vanish(self: Blocks, ids: Any) -> Any:
        self.leases[ids[self.state[ids] == BlockState.COMING]] = 0
        return real(self, ids)

    patch.setattr(Blocks, "vanish", vanish)


@plant("failed writes")
def a_block_is_on_disk_before_its_write_has_ended(patch: Patch) -> None:
    write, settle = Writer._write_batch, Places.settle

    def write_early(self: Writer, namespace: Any, use: Any, volume: Any, ids: Any) -> None:
        write(self, namespace, use, volume, ids)
        slots = np.arange(len(ids), 0, -1, dtype=np.uint32)
        places = np.uint32(use.next_granule) - slots * np.uint32(use.slot_granules)
        settle(self._shelf.places, ids, use, places, np.zeros(len(ids), np.uint64))

    def settle_late(self: Places, ids: Any, use: Any, places: Any, stamps: Any) -> None:
        new = ~self.there(ids)
        self._stamp[ids[~new]] = stamps[~new]
        settle(self, ids[new], use, places[new], stamps[new])

    patch.setattr(Writer, "_write_batch", write_early)
    patch.setattr(Places, "settle", settle_late)


@plant("test_a_segment_is_not_used_again_while_it_is_read")
def a_segment_is_used_again_while_it_is_read(patch: Patch) -> None:
    hold = Fetcher._hold

    def hold_nothing(self: Fetcher, volume: Any, ids: Any) -> Any:
        reading = hold(self, volume, ids)
        for use in reading.uses:
            use.reads -= 1
        reading.uses.clear()
        return reading

    patch.setattr(Fetcher, "_hold", hold_nothing)


@plant("test_a_segment_is_not_used_again_while_its_footer_is_written")
def a_segment_is_used_again_while_its_footer_is_written(patch: Patch) -> None:
    real = Writer._close

    def close(self: Writer, use: Any, volume: Any) -> None:
        real(self, use, volume)
        use.writing = False

    patch.setattr(Writer, "_close", close)


@plant("histories")
def the_index_keeps_what_was_in_a_segment_that_made_room(patch: Patch) -> None:
    def lose_cold(self: Shelf, ids: Any, *, forgotten: bool) -> None:
        self.places.leave(ids, forgotten=forgotten)

    patch.setattr(Shelf, "lose_cold", lose_cold)


# -- who is not woken ----------------------------------------------------------------------


@plant("histories")
def nobody_looks_who_waits_when_an_operation_ends(patch: Patch) -> None:
    def hear(self: NvmeTier, outcome: Outcome) -> None:
        self._desk.hear(outcome)
        self._writer.pump()
        if self._leaving.settle():
            self._writer.pump()
        self._leaving.write_logs()

    patch.setattr(NvmeTier, "hear", hear)


@plant("histories")
def a_sync_that_is_wanted_while_one_is_under_way_is_forgotten(patch: Patch) -> None:
    begin, sync, look = Writer.__init__, Writer.sync, Tickets.look
    writers: list[Writer] = []

    def begin_and_note(self: Writer, *args: Any, **options: Any) -> None:
        begin(self, *args, **options)
        writers.append(self)

    def sync_once(self: Writer) -> None:
        sync(self)
        self.sync_wanted = False

    def look_once(self: Tickets, now_ms: int) -> None:
        look(self, now_ms)
        for writer in writers:
            writer.sync_wanted = False

    patch.setattr(Writer, "__init__", begin_and_note)
    patch.setattr(Writer, "sync", sync_once)
    patch.setattr(Tickets, "look", look_once)
