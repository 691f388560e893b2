"""What lies on a volume, bit for bit; reads and writes nothing itself.

Where it lies is in `geometry.py`, what all structures have in common in `packing.py`; what others
need of both they find here.

A volume is one file or block device, divided in granules of 4096 bytes. All numbers are
little-endian.

    granule 0, 1     superblock, twice
    then             two halves of the log of what must not come back
    then             segments, from the next multiple of 1024 granules on

A segment holds blocks of one namespace: a header, then batches, each a head followed by its slots,
and a footer at a fixed place at its end, written once all before it is durable. A slot is what it
is in memory: the block header, the payload, zeros up to a granule.

Each structure takes whole granules. It begins with a magic (4 bytes), a version (u16) and flags
(u16, 0), and its last 8 bytes are the xxh3_64 of all its bytes before them. In between, from byte 8
on, and then zeros:

    superblock "KVSV"   volume id 16, segment_granules u32, n_segments u32, log_granules u32 (of a
                        half)
    header "KVSG"       volume id 16, segment u32, slot_granules u32, sequence u64, run u64,
                        length of the name u32, of the layout u32, name, layout
    head "KVSB"         count u32, segment u32, batch u32, granule u32, sequence u64, previous u64,
                        entries
    footer "KVSF"       count u32, segment u32, batches u32, 0 u32, sequence u64, header u64,
                        last u64, entries
    log sector "KVSL"   volume id 16, number u32, base u32, count u32, 0 u32, epoch u64, records

A sequence is unique on the volume and higher for each later use of any segment. `previous` is the
checksum of the head before, or of the segment's header for batch 0: so a head that an earlier life
left behind does not pass for the next one. `header` ties a footer to its segment's header in the
same way; `last` is the checksum of the last head. `run` makes headers differ even where a crash or
damage hid a sequence, which then was given again.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvstore import limits
from kvstore.errors import Corrupted, InvalidArgument, ProtocolError
from kvstore.nvme.geometry import (
    ENTRY,
    FOOTER,
    HEAD,
    HEADER_GRANULES,
    LOG_HALVES,
    SUPERBLOCKS,
    Geometry,
    footer_granules,
    head_granules,
)
from kvstore.nvme.packing import (
    AROUND_BYTES,
    START,
    U8,
    UNIT,
    VOLUME_ID_BYTES,
    Buffer,
    Rows,
    aligned,
    begun,
    check_uints,
    check_volume_id,
    checked,
    checksum_of,
    fields_of,
    meaningful,
    put_rows,
    rows_of,
    started,
    summed,
)

__all__ = [
    "ENTRY",
    "FLOOR",
    "HEADER_GRANULES",
    "LOG_HALVES",
    "LOG_RECORD",
    "LOG_RECORDS",
    "SUPERBLOCKS",
    "U8",
    "VOLUME_ID_BYTES",
    "WHOLE_USE",
    "BatchHead",
    "Disk",
    "Footer",
    "Geometry",
    "LogSector",
    "Rows",
    "SegmentHeader",
    "Superblock",
    "aligned",
    "checksum_of",
    "footer_granules",
    "head_count",
    "head_granules",
    "pack_footer",
    "pack_head",
    "pack_log_sector",
    "pack_segment_header",
    "pack_superblock",
    "unpack_footer",
    "unpack_head",
    "unpack_log_sector",
    "unpack_segment_header",
    "unpack_superblock",
]

WHOLE_USE = 0xFFFFFFFF  # as the granule of a log record
FLOOR = 0  # likewise, of segment 0
# What must not come back: the block at a granule of one use of a segment, or with WHOLE_USE all of
# this use and of those before it. FLOOR, where a header could not be read: the uses that follow are
# above this sequence, which is none of a use.
LOG_RECORD = np.dtype([("sequence", "<u8"), ("segment", "<u4"), ("granule", "<u4")])

_SUPERBLOCK_MAGIC = b"KVSV"
_HEADER_MAGIC = b"KVSG"
_HEAD_MAGIC = b"KVSB"
_FOOTER_MAGIC = b"KVSF"
_LOG_MAGIC = b"KVSL"
# What comes next, from byte 8 on.
_SUPERBLOCK = struct.Struct("<16sIII")
_HEADER = struct.Struct("<16sIIQQII")
_LOG = struct.Struct("<16sIIIIQ")
_COUNT = struct.Struct("<I")  # the first field of heads and footers
LOG_RECORDS = (UNIT - AROUND_BYTES - _LOG.size) // LOG_RECORD.itemsize  # of one sector


class Disk(Protocol):
    """A volume's bytes. Offsets, sizes and addresses of buffers are multiples of a granule."""

    @property
    def nbytes(self) -> int:
        """Size of the volume."""
        ...

    def read(self, offset: int, buffers: Sequence[U8]) -> None:
        """Fills the buffers, one after another, from `offset` on. Raises OSError."""
        ...

    def write(self, offset: int, buffers: Sequence[U8]) -> None:
        """Writes the buffers one after another, from `offset` on. Raises OSError."""
        ...

    def sync(self) -> None:
        """Makes durable what was written before. Raises OSError."""
        ...


# -- superblock ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What a volume is. volume_id: 16 random bytes, new for each formatting."""

    volume_id: bytes
    geometry: Geometry

    def __post_init__(self) -> None:
        check_volume_id(self.volume_id)


def pack_superblock(superblock: Superblock) -> U8:
    """One copy, (4096,) uint8."""
    geometry = superblock.geometry
    sizes = geometry.segment_granules, geometry.n_segments, geometry.log_granules
    raw = begun(_SUPERBLOCK_MAGIC, 1)
    _SUPERBLOCK.pack_into(raw.data, START.size, superblock.volume_id, *sizes)
    return summed(raw)


def unpack_superblock(buffer: Buffer) -> Superblock:
    """Inverse of `pack_superblock`. Raises ProtocolError or Corrupted."""
    raw = checked(buffer, _SUPERBLOCK_MAGIC, "superblock", 1)
    volume_id, segment_granules, n_segments, log_granules = fields_of(raw, _SUPERBLOCK)
    with meaningful("superblock"):
        geometry = Geometry(
            segment_granules=segment_granules, n_segments=n_segments, log_granules=log_granules
        )
        return Superblock(volume_id=volume_id, geometry=geometry)


# -- segment header --------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentHeader:
    """One use of a segment. Raises InvalidArgument naming the wrong field.

    run: uint64, another for each run of the store. name and layout: the namespace's; layout as
    `Layout.encode` gives it, which is not looked at here.
    """

    volume_id: bytes
    segment: int
    sequence: int
    run: int
    slot_granules: int
    name: str
    layout: bytes

    def __post_init__(self) -> None:
        check_volume_id(self.volume_id)
        check_uints(self, segment=32, sequence=64, run=64, slot_granules=32)
        if self.slot_granules < 1:
            raise InvalidArgument("slot_granules", "must be positive")
        if not 1 <= len(self.name.encode()) <= limits.MAX_NAMESPACE_NAME_BYTES:
            raise InvalidArgument("name", f"must have 1..{limits.MAX_NAMESPACE_NAME_BYTES} bytes")
        if not 1 <= len(self.layout) <= limits.MAX_LAYOUT_BYTES:
            raise InvalidArgument("layout", f"must have 1..{limits.MAX_LAYOUT_BYTES} bytes")


def pack_segment_header(header: SegmentHeader) -> U8:
    """Its two granules. Their `checksum_of` is the `previous` of batch 0."""
    name, layout = header.name.encode(), header.layout
    use = header.segment, header.slot_granules, header.sequence, header.run
    raw = begun(_HEADER_MAGIC, HEADER_GRANULES)
    _HEADER.pack_into(raw.data, START.size, header.volume_id, *use, len(name), len(layout))
    at = START.size + _HEADER.size
    raw[at : at + len(name) + len(layout)] = np.frombuffer(name + layout, np.uint8)
    return summed(raw)


def unpack_segment_header(buffer: Buffer) -> SegmentHeader:
    """Inverse of `pack_segment_header`. Raises ProtocolError or Corrupted."""
    raw = checked(buffer, _HEADER_MAGIC, "segment header", HEADER_GRANULES)
    volume_id, segment, slot_granules, sequence, run, *sizes = fields_of(raw, _HEADER)
    name_bytes, layout_bytes = sizes
    texts = raw[START.size + _HEADER.size :]
    with meaningful("segment header"):
        return SegmentHeader(
            volume_id=volume_id,
            segment=segment,
            sequence=sequence,
            run=run,
            slot_granules=slot_granules,
            name=texts[:name_bytes].tobytes().decode(),
            layout=texts[name_bytes : name_bytes + layout_bytes].tobytes(),
        )


# -- batches ---------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchHead:
    """A batch of a segment's use. Raises InvalidArgument naming the wrong field.

    batch: 0, 1, 2.. without gaps. granule: where the head itself lies, within the segment.
    previous: checksum of the head before, or of the segment's header for batch 0.
    """

    segment: int
    sequence: int
    batch: int
    granule: int
    previous: int

    def __post_init__(self) -> None:
        check_uints(self, segment=32, sequence=64, batch=32, granule=32, previous=64)


def pack_head(head: BatchHead, entries: Rows) -> U8:
    """Its granules, head_granules(n) of them. Their `checksum_of` is the `previous` of the next
    batch, and of the last one the footer's `last`. entries: (n,) ENTRY, not empty."""
    if not len(entries):
        raise InvalidArgument("entries", "a batch has one at least")
    place = head.segment, head.batch, head.granule, head.sequence, head.previous
    raw = begun(_HEAD_MAGIC, head_granules(len(entries)))
    HEAD.pack_into(raw.data, START.size, len(entries), *place)
    put_rows(raw, HEAD, "entries", entries, ENTRY)
    return summed(raw)


def head_count(buffer: Buffer) -> int:
    """How many blocks the head says it has, from its first granule; its checksum is not looked at.

    Raises ProtocolError or Corrupted where this cannot be a head.
    """
    raw = started(buffer, _HEAD_MAGIC, "batch head", 1)
    count = int(_COUNT.unpack_from(raw.data, START.size)[0])
    if not count:
        raise Corrupted("batch head says that it has no block")
    return count


def unpack_head(buffer: Buffer) -> tuple[BatchHead, Rows]:
    """Inverse of `pack_head`. The entries share memory with `buffer`.

    Raises ProtocolError or Corrupted.
    """
    raw = checked(buffer, _HEAD_MAGIC, "batch head", head_granules(head_count(buffer)))
    count, segment, batch, granule, sequence, previous = fields_of(raw, HEAD)
    head = BatchHead(
        segment=segment, sequence=sequence, batch=batch, granule=granule, previous=previous
    )
    return head, rows_of(raw, HEAD, ENTRY, count)


# -- footer ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Footer:
    """Ends a segment's use. Raises InvalidArgument naming the wrong field.

    batches: how many there are. header: checksum of the segment's header. last: that of the last
    head, or the header's if there is no batch.
    """

    segment: int
    sequence: int
    batches: int
    header: int
    last: int

    def __post_init__(self) -> None:
        check_uints(self, segment=32, sequence=64, batches=32, header=64, last=64)


def pack_footer(footer: Footer, entries: Rows) -> U8:
    """Its granules, footer_granules(n) of them. entries: (n,) ENTRY, of all batches, in the order
    of their slots."""
    use = footer.segment, footer.batches, 0, footer.sequence, footer.header, footer.last
    raw = begun(_FOOTER_MAGIC, footer_granules(len(entries)))
    FOOTER.pack_into(raw.data, START.size, len(entries), *use)
    put_rows(raw, FOOTER, "entries", entries, ENTRY)
    return summed(raw)


def unpack_footer(buffer: Buffer) -> tuple[Footer, Rows]:
    """Inverse of `pack_footer`. More may follow in `buffer`, whose memory the entries share.

    Raises ProtocolError or Corrupted.
    """
    first = started(buffer, _FOOTER_MAGIC, "footer", 1)
    count = int(_COUNT.unpack_from(first.data, START.size)[0])
    raw = checked(buffer, _FOOTER_MAGIC, "footer", footer_granules(count))
    count, segment, batches, _zero, sequence, header, last = fields_of(raw, FOOTER)
    footer = Footer(segment=segment, sequence=sequence, batches=batches, header=header, last=last)
    return footer, rows_of(raw, FOOTER, ENTRY, count)


# -- log -------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class LogSector:
    """A sector of the log. Raises InvalidArgument naming the wrong field.

    epoch: from 1 on, higher each time that a half is begun. number: 0, 1, 2.. within the half.
    base: in sector 0, how many of those behind it were durable before it was written; else 0.
    """

    volume_id: bytes
    epoch: int
    number: int
    base: int = 0

    def __post_init__(self) -> None:
        check_volume_id(self.volume_id)
        check_uints(self, epoch=64, number=32, base=32)
        if not self.epoch:
            raise InvalidArgument("epoch", "0 stands for a log that was never begun")
        if self.number and self.base:
            raise InvalidArgument("base", "is for sector 0 only")


def pack_log_sector(sector: LogSector, records: Rows) -> U8:
    """(4096,) uint8. records: (n,) LOG_RECORD, at most LOG_RECORDS of them."""
    if len(records) > LOG_RECORDS:
        raise InvalidArgument("records", f"{len(records)} are over {LOG_RECORDS}")
    numbers = sector.number, sector.base, len(records), 0, sector.epoch
    raw = begun(_LOG_MAGIC, 1)
    _LOG.pack_into(raw.data, START.size, sector.volume_id, *numbers)
    put_rows(raw, _LOG, "records", records, LOG_RECORD)
    return summed(raw)


def unpack_log_sector(buffer: Buffer) -> tuple[LogSector, Rows]:
    """Inverse of `pack_log_sector`. The records share memory with `buffer`.

    Raises ProtocolError or Corrupted.
    """
    raw = checked(buffer, _LOG_MAGIC, "log sector", 1)
    volume_id, number, base, count, _zero, epoch = fields_of(raw, _LOG)
    if count > LOG_RECORDS:
        raise ProtocolError(f"log sector says that it has {count} records")
    with meaningful("log sector"):
        sector = LogSector(volume_id=volume_id, epoch=epoch, number=number, base=base)
    return sector, rows_of(raw, _LOG, LOG_RECORD, count)
