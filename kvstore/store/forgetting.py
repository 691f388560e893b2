"""The log of a volume: what lies there and must not come back after a restart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import numpy as np

from kvstore.nvme.format import LOG_HALVES, LOG_RECORD, LOG_RECORDS, LogSector, pack_log_sector
from kvstore.nvme.ops import U8, Outcome, WriteRaw
from kvstore.nvme.volume import Health, Volume
from kvstore.store.desk import Desk

Record = tuple[int, int, int]  # segment, sequence, granule


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
        self.busy = False

    @property
    def settled(self) -> bool:
        """Whether all that was forgotten is durably so, or cannot be any more."""
        volume = self._volume
        return not (self.busy or volume.forgotten) or volume.health is not Health.OK

    @property
    def room(self) -> int:
        """How many records a half can begin with."""
        return (self._volume.geometry.log_granules - 1) * LOG_RECORDS // 2

    def pump(self) -> None:
        """Writes what is due."""
        volume = self._volume
        if self.busy or not volume.forgotten or volume.health is not Health.OK:
            return
        records = list(volume.due_records())
        if not records:
            return
        sectors = -(-len(records) // LOG_RECORDS)
        if self._number + sectors > volume.geometry.log_granules:
            self._begin_half()
        else:
            self._write(self._sectors(records, self._number), self._number, self._written)
            self._number += sectors

    def _begin_half(self) -> None:
        volume = self._volume
        kept = [r for r in volume.logged if volume.on_disk.get(r[0]) == r[1]]
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
        self.busy = True
        writes = tuple(
            (volume.geometry.log_offset(self._half, number + i), sector)
            for i, sector in enumerate(sectors)
        )
        self._desk.emit(
            lambda op: WriteRaw(number=op, volume=volume.number, writes=writes, syncs_after=True),
            then,
        )

    def _written(self, outcome: Outcome) -> None:
        self.busy = False
        if outcome.error:
            self._on_error(self._volume, f"a write failed: {outcome.error}")
