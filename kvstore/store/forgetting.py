"""The log of a volume: what lies there and must not come back after a restart."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from kvstore.nvme.format import (
    FLOOR,
    LOG_HALVES,
    LOG_RECORD,
    LOG_RECORDS,
    LogSector,
    pack_log_sector,
)
from kvstore.nvme.ops import U8, Outcome, WriteRaw
from kvstore.nvme.volume import Health, Record, Volume
from kvstore.store.desk import Desk

Ending = tuple[int, int]  # segment, sequence


class ForgetLog:
    """Writes one volume's records, a few sectors at a time, each synced.

    The first time, and whenever a half is full, it begins the other half with the records that are
    still of use: those of uses whose headers are on disk.
    """

    def __init__(
        self,
        volume: Volume,
        desk: Desk,
        *,
        half: int,
        next_epoch: int,
        on_error: Callable[[Volume, str], None],
    ) -> None:
        """half: the one that was active. on_error: hears of a write that failed."""
        self._volume, self._desk, self._on_error = volume, desk, on_error
        self._half, self._epoch = half, next_epoch - 1
        self._number = volume.geometry.log_granules  # full, so that the other half is begun
        self._due: list[Record] = []  # that no sector has yet
        self._saying = 0  # of all that was forgotten, up to where these go
        self._wanted = 0  # likewise, up to where somebody waits
        self._busy = False

    def want(self, upto: int) -> None:
        """Somebody waits for the first so many records: none of them waits for a segment's next
        header, which would make it needless."""
        self._wanted = max(self._wanted, upto)

    def settled(self, upto: int) -> bool:
        """Whether the first so many records are durable, or cannot be any more."""
        volume = self._volume
        return volume.n_said >= upto or volume.health is not Health.OK

    def pump(self) -> set[Ending]:
        """Writes what is due. Returns the uses that have to end first, because a half has no room
        for all that is to be said of them."""
        volume = self._volume
        if self._busy or volume.health is not Health.OK:
            return set()
        if volume.forgotten:
            self._due += volume.due_records(hold=volume.n_said >= self._wanted)
            if not volume.forgotten:
                self._saying = volume.n_forgotten
        if not self._due:
            volume.n_said = self._saying
            return set()
        sectors = -(-len(self._due) // LOG_RECORDS)
        if self._number + sectors > volume.geometry.log_granules:
            return self._begin_half()
        self._write(self._sectors(self._due, self._number), self._number, self._written)
        self._number += sectors
        return set()

    def _begin_half(self) -> set[Ending]:
        volume = self._volume
        kept = volume.useful_records()
        most = (volume.geometry.log_granules - 1) * LOG_RECORDS
        if len(kept) > most:
            ends = _most_said_of(kept, most // 2)
            if not ends:
                self._on_error(volume, "its log is too small for so many segments")
            return ends
        volume.logged = dict.fromkeys(kept)
        self._half, self._epoch = (self._half + 1) % LOG_HALVES, self._epoch + 1
        behind = self._sectors(kept, 1)
        first = pack_log_sector(self._sector(0, base=len(behind)), np.empty(0, LOG_RECORD))
        self._number = 1 + len(behind)
        then = functools.partial(self._rest_written, first)
        if behind:
            self._write(behind, 1, then)
        else:
            self._write([first], 0, self._written)
        return set()

    def _rest_written(self, first: U8, outcome: Outcome) -> None:
        """Sector 0 last: only when it is there is the half one."""
        if outcome.error:
            self._written(outcome)
        else:
            self._write([first], 0, self._written)

    def _sectors(self, records: Sequence[Record], number: int) -> list[U8]:
        rows = np.zeros(len(records), LOG_RECORD)
        if len(records):
            columns = np.array(records, np.uint64).T
            rows["segment"], rows["sequence"], rows["granule"] = columns
        return [
            pack_log_sector(self._sector(number + i), rows[at : at + LOG_RECORDS])
            for i, at in enumerate(range(0, len(rows), LOG_RECORDS))
        ]

    def _sector(self, number: int, base: int = 0) -> LogSector:
        return LogSector(volume_id=self._volume.id, epoch=self._epoch, number=number, base=base)

    def _write(self, sectors: Sequence[U8], number: int, then: Callable[[Outcome], None]) -> None:
        volume = self._volume
        self._busy, self._due = True, []
        writes = tuple(
            (volume.geometry.log_offset(self._half, number + i), sector)
            for i, sector in enumerate(sectors)
        )
        self._desk.emit(
            lambda op: WriteRaw(number=op, volume=volume.number, writes=writes, syncs_after=True),
            then,
        )

    def _written(self, outcome: Outcome) -> None:
        self._busy = False
        if outcome.error:
            self._on_error(self._volume, f"a write failed: {outcome.error}")
        else:
            self._volume.n_said = self._saying


def _most_said_of(records: Sequence[Record], most: int) -> set[Ending]:
    """The uses that have to end so that not many more than `most` records are left: of each that
    ends there is one."""
    left, ends = len(records), set[Ending]()
    uses = Counter(record[:2] for record in records if record[2] != FLOOR)
    for use, count in uses.most_common():
        if left <= most or count == 1:
            break
        ends.add(use)
        left -= count - 1
    return ends
