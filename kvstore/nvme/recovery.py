"""What a volume still holds after a restart or a crash; reads, and never writes.

A valid footer says that its segment was durable, so its entries are taken at their word (a read
checks the block anyway). Without one the heads are followed, and every block behind them is
verified: of these, a power cut may have kept any part. Then the log takes away what was forgotten.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.errors import Corrupted, InvalidArgument, KVStoreError, ProtocolError
from kvstore.layout import Layout
from kvstore.nvme.forget_log import Forgotten, Log, read_log
from kvstore.nvme.format import (
    ENTRY,
    HEADER_GRANULES,
    U8,
    BatchHead,
    Disk,
    Geometry,
    Rows,
    SegmentHeader,
    Superblock,
    aligned,
    checksum_of,
    head_count,
    head_granules,
    unpack_footer,
    unpack_head,
    unpack_segment_header,
)
from kvstore.nvme.slots import check_slot

__all__ = [
    "Log",
    "Problem",
    "RecoveredSegment",
    "Survey",
    "Use",
    "highest_sequence",
    "recover",
    "survey",
]

_UNIT = limits.GRANULE_BYTES
_READ_BYTES = 8 << 20  # of slots at a time, and of one slot at least
_UNKNOWN_USES = 1 << 32  # more than there can have been since the last one that is known
_NOT_READABLE = (Corrupted, ProtocolError)

Stop = Callable[[], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """A segment's header, and its checksum."""

    header: SegmentHeader
    checksum: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """A segment of which nothing is recovered. sequence: None where its header is unreadable."""

    segment: int
    sequence: int | None
    error: OSError | KVStoreError


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Survey:
    """All that is known of a volume before its segments are read. uses: the newest first, also
    those that the log says are over. problems: `recover` adds to them."""

    uses: tuple[Use, ...]
    log: Log
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RecoveredSegment:
    """What one segment holds.

    entries: (n,) ENTRY, the live ones, in the order of their slots; memory of their own. whole: its
    footer says so, and no block was read. next_granule, batches, last: where and how a next batch
    goes on; next_granule is the footer's if none may. header: checksum of the segment's header.
    damaged: blocks dropped because they fail.
    """

    segment: int
    sequence: int
    name: str
    layout: bytes
    slot_granules: int
    entries: Rows
    whole: bool
    next_granule: int
    batches: int
    header: int
    last: int
    damaged: int


def survey(disk: Disk, volume: Superblock, *, stop: Stop) -> Survey | None:
    """Reads the log and all segment headers; None if `stop` said so. Raises OSError for the log."""
    log = read_log(disk, volume)  # first: without it nothing else is of use
    reader = _Reader(disk, volume.geometry, stop)
    uses: list[Use] = []
    problems: list[Problem] = []
    try:
        for segment in range(volume.geometry.n_segments):
            try:
                use = _use_of(reader, volume, segment)
            except (OSError, KVStoreError) as error:
                problems.append(Problem(segment=segment, sequence=None, error=error))
                continue
            if use:
                uses.append(use)
    except _StoppedError:
        return None
    uses.sort(key=lambda use: use.header.sequence, reverse=True)
    return Survey(uses=tuple(uses), log=log, problems=problems)


def highest_sequence(found: Survey) -> int:
    """What the sequence of the next use must be above; 0 for a volume that was never used.

    It is the highest that is known, also of uses that are over. Of an unreadable header nobody
    knows the sequence, so no later one may be near it; and the log has to say where those begin,
    before there is one (`FLOOR`): the next start may be unable to read theirs.
    """
    known = [use.header.sequence for use in found.uses[:1]]
    if len(found.log.records):
        known.append(int(found.log.records["sequence"].max()))
    unknown = any(problem.sequence is None for problem in found.problems)
    return max(known, default=0) + (_UNKNOWN_USES if unknown else 0)


def recover(
    disk: Disk, volume: Superblock, *, stop: Stop, found: Survey | None = None
) -> Iterator[RecoveredSegment]:
    """Yields each segment in use, the newest first; ends early once `stop` says so.

    A use that the log says is over is not yielded, one without a live block is. found: what
    `survey` found, if it was called before; its `problems` then gets those of single segments,
    which are skipped. A key that lies in several segments is yielded for each. Raises OSError for
    the log only.
    """
    found = found or survey(disk, volume, stop=stop)
    if found is None:
        return
    reader = _Reader(disk, volume.geometry, stop)
    forgotten = Forgotten(found.log.records)
    for use in found.uses:
        if forgotten.whole(use.header):
            continue
        try:
            segment = _from_footer(reader, use) or _from_heads(reader, use)
        except _StoppedError:
            return
        except (OSError, KVStoreError) as error:
            problem = Problem(segment=use.header.segment, sequence=use.header.sequence, error=error)
            found.problems.append(problem)
            continue
        gone = forgotten.granules(segment.segment, segment.sequence)
        yield _without(segment, gone, volume.geometry.footer_granule(segment.slot_granules))


class _StoppedError(Exception):
    """`stop` said so."""


class _Reader:
    """Reads of one volume into one buffer."""

    def __init__(self, disk: Disk, geometry: Geometry, stop: Stop) -> None:
        self.geometry = geometry
        self._disk, self._stop = disk, stop
        self._room = aligned(0)

    def read(self, segment: int, granule: int, granules: int) -> U8:
        """Some granules of a segment; good until the next read. Raises OSError."""
        if self._stop():
            raise _StoppedError
        nbytes = granules * _UNIT
        if len(self._room) < nbytes:
            self._room = aligned(nbytes)
        room = self._room[:nbytes]
        self._disk.read(self.geometry.offset(segment, granule), [room])
        return room


def _without(segment: RecoveredSegment, gone: npt.NDArray[np.uint32], end: int) -> RecoveredSegment:
    """The segment without the blocks that must not come back. end: where its footer begins."""
    if not len(gone):
        return segment
    kept = ~np.isin(segment.entries["granule"], gone)
    # The log outlived a block that a crash took: one written in its place would be hidden.
    full = bool((gone >= segment.next_granule).any())
    return dataclasses.replace(
        segment,
        entries=segment.entries[kept],
        next_granule=end if full else segment.next_granule,
    )


def _use_of(reader: _Reader, volume: Superblock, segment: int) -> Use | None:
    """The use of a segment; None if there is none in this life of the volume."""
    raw = reader.read(segment, 0, HEADER_GRANULES)
    if not raw.any():
        return None
    header = unpack_segment_header(raw)
    if header.volume_id != volume.volume_id:
        return None
    if header.segment != segment:
        raise Corrupted(f"segment {segment} has the header of segment {header.segment}")
    if not volume.geometry.slots(header.slot_granules):
        raise ProtocolError(f"segment {segment} says that it has slots larger than itself")
    return Use(header=header, checksum=checksum_of(raw))


def _from_footer(reader: _Reader, use: Use) -> RecoveredSegment | None:
    """The segment by its footer, or None where there is no valid one of this use."""
    header = use.header
    geometry, slot = reader.geometry, header.slot_granules
    end = geometry.footer_granule(slot)
    raw = reader.read(header.segment, end, geometry.footer_granules(slot))
    try:
        footer, entries = unpack_footer(raw)
    except _NOT_READABLE:
        return None
    mine = (header.segment, header.sequence, use.checksum)
    if (footer.segment, footer.sequence, footer.header) != mine:
        return None
    if not _places_fit(entries, slot, end):
        return None
    return _segment(
        use,
        entries.copy(),
        whole=True,
        next_granule=end,
        batches=footer.batches,
        last=footer.last,
        damaged=0,
    )


def _places_fit(entries: Rows, slot_granules: int, end: int) -> bool:
    """Whether slots follow each other in the segment, and none overlaps another or its ends."""
    if not len(entries):
        return True
    at = entries["granule"].astype(np.int64)
    inside = at[0] > HEADER_GRANULES and at[-1] + slot_granules <= end
    return bool(inside and (np.diff(at) >= slot_granules).all())


def _from_heads(reader: _Reader, use: Use) -> RecoveredSegment:
    """The segment by the heads of its batches, every block of them verified."""
    try:
        layout = Layout.decode(use.header.layout)
    except InvalidArgument as error:
        raise ProtocolError(f"the segment's layout has a wrong {error}") from error
    at, batches, last, damaged = HEADER_GRANULES, 0, use.checksum, 0
    parts: list[Rows] = []
    while (found := _batch_at(reader, use, at, batches, last)) is not None:
        last, entries = found
        sound = _sound(reader, use.header, layout, entries)
        parts.append(entries[sound])
        damaged += len(entries) - int(sound.sum())
        at += head_granules(len(entries)) + len(entries) * use.header.slot_granules
        batches += 1
    return _segment(
        use,
        np.concatenate(parts) if parts else np.empty(0, ENTRY),
        whole=False,
        next_granule=at,
        batches=batches,
        last=last,
        damaged=damaged,
    )


def _batch_at(
    reader: _Reader, use: Use, at: int, batch: int, previous: int
) -> tuple[int, Rows] | None:
    """The checksum and the entries of the head there, or None if it is not the next of this use."""
    segment, slot = use.header.segment, use.header.slot_granules
    try:
        raw = reader.read(segment, at, 1)  # behind a full segment's last batch: of the footer
        count = head_count(raw)
        first = at + head_granules(count)
        if first + count * slot > reader.geometry.footer_granule(slot):
            return None
        if first > at + 1:
            raw = reader.read(segment, at, first - at)
        head, entries = unpack_head(raw)
    except _NOT_READABLE:
        return None
    expected = BatchHead(
        segment=segment,
        sequence=use.header.sequence,
        batch=batch,
        granule=at,
        previous=previous,
    )
    if head != expected or (entries["granule"] != first + np.arange(count) * slot).any():
        return None
    return checksum_of(raw), entries.copy()


def _sound(
    reader: _Reader, header: SegmentHeader, layout: Layout, entries: Rows
) -> npt.NDArray[np.bool_]:
    """Which of a batch's blocks are all there: bool (n,)."""
    slot = header.slot_granules
    sound = np.zeros(len(entries), np.bool_)
    keys, stamps = entries["key"], entries["stamp"].tolist()
    first, per_read = int(entries["granule"][0]), max(1, _READ_BYTES // (slot * _UNIT))
    for start in range(0, len(entries), per_read):
        n = min(per_read, len(entries) - start)
        raw = reader.read(header.segment, first + start * slot, n * slot)
        for i, row in enumerate(raw.reshape(n, slot * _UNIT), start):
            try:
                check_slot(row, keys[i].tobytes(), stamps[i], layout)
            except Corrupted:
                continue
            sound[i] = True
    return sound


def _segment(
    use: Use,
    entries: Rows,
    *,
    whole: bool,
    next_granule: int,
    batches: int,
    last: int,
    damaged: int,
) -> RecoveredSegment:
    header = use.header
    return RecoveredSegment(
        segment=header.segment,
        sequence=header.sequence,
        name=header.name,
        layout=header.layout,
        slot_granules=header.slot_granules,
        entries=entries,
        whole=whole,
        next_granule=next_granule,
        batches=batches,
        header=use.checksum,
        last=last,
        damaged=damaged,
    )
