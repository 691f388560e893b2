"""What a volume's log says must not come back after a restart; reads, and never writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.errors import Corrupted, ProtocolError
from kvstore.nvme.format import (
    LOG_HALVES,
    LOG_RECORD,
    U8,
    WHOLE_USE,
    Disk,
    LogSector,
    Rows,
    SegmentHeader,
    Superblock,
    aligned,
    unpack_log_sector,
)

_UNIT = limits.GRANULE_BYTES


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Log:
    """What must not come back, and where the log goes on.

    half, epoch: of the active half; 0 and 0 where nothing was ever logged. next_number: of its
    next sector. next_epoch: higher than any that was ever begun. records: (n,) LOG_RECORD.
    """

    half: int
    epoch: int
    next_number: int
    next_epoch: int
    records: Rows


def read_log(disk: Disk, volume: Superblock) -> Log:
    """The log as the volume's last life left it.

    The first to be logged after a start begins the other half, with `next_epoch`. Sectors behind
    the last valid one may be left of a life that crashed, and would be valid again once there is
    one between. Raises OSError: it is then unknown what must not come back.
    """
    size = volume.geometry.log_granules * _UNIT
    raw = aligned(size)
    active, epoch, next_number = 0, 0, 0
    records: Rows = np.empty(0, LOG_RECORD)
    highest = 0
    for half in range(LOG_HALVES):
        disk.read(volume.geometry.log_offset(half, 0), [raw])
        sectors = _sectors(raw, volume.volume_id)
        highest = max([highest, *(found[0].epoch for found in sectors if found)])
        run = _valid_run(sectors)
        if run and run[0][0].epoch > epoch:
            active, epoch, next_number = half, run[0][0].epoch, len(run)
            records = np.concatenate([rows for _, rows in run])
    return Log(
        half=active,
        epoch=epoch,
        next_number=next_number,
        next_epoch=highest + 1,
        records=records,
    )


def _sectors(raw: U8, volume_id: bytes) -> list[tuple[LogSector, Rows] | None]:
    """Each sector of a half, None where there is no valid one of this volume; the records share
    memory with `raw`."""
    found: list[tuple[LogSector, Rows] | None] = []
    for number in range(len(raw) // _UNIT):
        try:
            sector, records = unpack_log_sector(raw[number * _UNIT : (number + 1) * _UNIT])
        except (Corrupted, ProtocolError):
            found.append(None)
            continue
        valid = sector.volume_id == volume_id and sector.number == number
        found.append((sector, records) if valid else None)
    return found


def _valid_run(
    sectors: Sequence[tuple[LogSector, Rows] | None],
) -> list[tuple[LogSector, Rows]]:
    """Sector 0 and those that follow without a gap; nothing where the half is void."""
    if not sectors or sectors[0] is None:
        return []
    first = sectors[0][0]
    run: list[tuple[LogSector, Rows]] = []
    for found in sectors:
        if found is None or found[0].epoch != first.epoch:
            break
        run.append(found)
    # Those that were to be durable before sector 0 was written: else the half was never begun.
    return run if len(run) > first.base else []


class Forgotten:
    """The log's records, by segment."""

    def __init__(self, records: Rows) -> None:
        self._records = records[np.argsort(records["segment"], kind="stable")]
        # As searchsorted wants them, or it would convert all of them each time.
        self._segments = self._records["segment"].astype(np.int64)

    def whole(self, header: SegmentHeader) -> bool:
        """Whether this use of the segment is over."""
        records = self._of(header.segment)
        over = records["sequence"][records["granule"] == WHOLE_USE]
        return bool((over >= np.uint64(header.sequence)).any())

    def granules(self, segment: int, sequence: int) -> npt.NDArray[np.uint32]:
        """Where blocks of this use lie that must not come back: (n,)."""
        records = self._of(segment)
        gone: npt.NDArray[np.uint32] = records["granule"][records["sequence"] == sequence]
        return gone

    def _of(self, segment: int) -> Rows:
        first, end = np.searchsorted(self._segments, [segment, segment + 1])
        return self._records[first:end]
