"""What lies on a volume, bit for bit; reads and writes nothing itself.

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

import bisect
import contextlib
import functools
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import xxhash

from kvstore import limits
from kvstore.errors import Corrupted, InvalidArgument, ProtocolError

U8 = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.void]
Buffer = bytes | bytearray | memoryview | U8

VERSION = 1
VOLUME_ID_BYTES = 16
SUPERBLOCKS = 2  # copies, one a granule
HEADER_GRANULES = 2
FIRST_SEGMENT_MULTIPLE = 1024
LOG_HALVES = 2
LOG_GRANULES = 256
WHOLE_USE = 0xFFFFFFFF  # as the granule of a log record

# One block of a segment. parent: zeros if unknown. stamp: the block header's own checksum, so it
# stands for the header and the checksums of all cells. expires_ms: 0 for never. position: -1 if
# unknown. granule: of its slot, within the segment.
ENTRY = np.dtype(
    [
        ("key", "u1", (limits.KEY_BYTES,)),
        ("parent", "u1", (limits.KEY_BYTES,)),
        ("put_id", "u1", (16,)),
        ("stamp", "<u8"),
        ("expires_ms", "<u8"),
        ("position", "<i4"),
        ("granule", "<u4"),
    ]
)
# What must not come back: the block at a granule of one use of a segment, or with WHOLE_USE all of
# that use and of those before it.
LOG_RECORD = np.dtype([("sequence", "<u8"), ("segment", "<u4"), ("granule", "<u4")])

_SUPERBLOCK_MAGIC = b"KVSV"
_HEADER_MAGIC = b"KVSG"
_HEAD_MAGIC = b"KVSB"
_FOOTER_MAGIC = b"KVSF"
_LOG_MAGIC = b"KVSL"
_START = struct.Struct("<4sHH")
# What comes next, from byte 8 on.
_SUPERBLOCK = struct.Struct("<16sIII")
_HEADER = struct.Struct("<16sIIQQII")
_HEAD = struct.Struct("<IIIIQQ")
_FOOTER = struct.Struct("<IIIIQQQ")
_LOG = struct.Struct("<16sIIIIQ")
_COUNT = struct.Struct("<I")  # the first field of heads and footers
_SUM_BYTES = 8
_AROUND_BYTES = _START.size + _SUM_BYTES
_UNIT = limits.GRANULE_BYTES
LOG_RECORDS = (_UNIT - _AROUND_BYTES - _LOG.size) // LOG_RECORD.itemsize  # of one sector


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


def aligned(nbytes: int) -> U8:
    """New zeros (nbytes,) uint8 at an address that is a multiple of a granule, as disks want it."""
    if type(nbytes) is not int or nbytes < 0:
        raise InvalidArgument("nbytes", f"must be an integer >= 0, not {nbytes!r}")
    raw = np.zeros(nbytes + _UNIT, np.uint8)
    skip = -int(raw.__array_interface__["data"][0]) % _UNIT
    return raw[skip : skip + nbytes]


def checksum_of(packed: U8) -> int:
    """The checksum at the end of a structure; it is not verified."""
    return int.from_bytes(packed[-_SUM_BYTES:].tobytes(), "little")


def head_granules(count: int) -> int:
    """Granules of the head of a batch of `count` blocks."""
    return _granules(_HEAD, count)


def footer_granules(count: int) -> int:
    """Granules of a footer with `count` entries."""
    return _granules(_FOOTER, count)


# -- where things lie ------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Where everything lies on a volume. log_granules: of one half.

    Raises InvalidArgument for numbers with which no block could be stored.
    """

    segment_granules: int
    n_segments: int
    log_granules: int = LOG_GRANULES

    def __post_init__(self) -> None:
        _check_uints(self, segment_granules=32, n_segments=32, log_granules=32)
        if _most_slots(self.segment_granules, 1) < 1:
            raise InvalidArgument("segment_granules", f"{self.segment_granules} hold no block")
        if self.n_segments < 1:
            raise InvalidArgument("n_segments", "there must be one at least")
        if self.log_granules < 1:
            raise InvalidArgument("log_granules", "there must be one at least")

    @classmethod
    def for_volume(
        cls, *, nbytes: int, segment_bytes: int, log_granules: int = LOG_GRANULES
    ) -> Geometry:
        """As many segments of `segment_bytes` as a volume of `nbytes` holds.

        Raises InvalidArgument where it holds none.
        """
        if segment_bytes <= 0 or segment_bytes % _UNIT:
            raise InvalidArgument(
                "segment_bytes", f"must be a positive multiple of {_UNIT}, not {segment_bytes}"
            )
        one = cls(segment_granules=segment_bytes // _UNIT, n_segments=1, log_granules=log_granules)
        n_segments = 1 + (nbytes - one.nbytes) // segment_bytes
        if n_segments < 1:
            raise InvalidArgument(
                "nbytes", f"a volume needs at least {one.nbytes} bytes here, not {nbytes}"
            )
        return cls(
            segment_granules=one.segment_granules,
            n_segments=n_segments,
            log_granules=log_granules,
        )

    @property
    def first_granule(self) -> int:
        """Where the segments begin."""
        used = SUPERBLOCKS + LOG_HALVES * self.log_granules
        return -(-used // FIRST_SEGMENT_MULTIPLE) * FIRST_SEGMENT_MULTIPLE

    @property
    def nbytes(self) -> int:
        """Bytes of the volume that are used."""
        return (self.first_granule + self.n_segments * self.segment_granules) * _UNIT

    def log_offset(self, half: int, number: int) -> int:
        """Where a sector of the log lies, in bytes."""
        if not 0 <= half < LOG_HALVES:
            raise InvalidArgument("half", f"must be 0..{LOG_HALVES - 1}, not {half}")
        if not 0 <= number < self.log_granules:
            raise InvalidArgument("number", f"must be 0..{self.log_granules - 1}, not {number}")
        return (SUPERBLOCKS + half * self.log_granules + number) * _UNIT

    def offset(self, segment: int, granule: int = 0) -> int:
        """Where a granule of a segment lies, in bytes."""
        if not 0 <= segment < self.n_segments:
            raise InvalidArgument("segment", f"must be 0..{self.n_segments - 1}, not {segment}")
        if not 0 <= granule < self.segment_granules:
            raise InvalidArgument(
                "granule", f"must be 0..{self.segment_granules - 1}, not {granule}"
            )
        return (self.first_granule + segment * self.segment_granules + granule) * _UNIT

    def slots(self, slot_granules: int) -> int:
        """The most slots that a segment can hold, all of them in one batch; 0 if none fits."""
        if type(slot_granules) is not int or slot_granules < 1:
            raise InvalidArgument("slot_granules", f"must be positive, not {slot_granules!r}")
        return _most_slots(self.segment_granules, slot_granules)

    def footer_granules(self, slot_granules: int) -> int:
        """Granules that are kept for the footer. Raises InvalidArgument if no slot fits."""
        most = self.slots(slot_granules)
        if not most:
            raise InvalidArgument(
                "slot_granules",
                f"a slot of {slot_granules} fits no segment of {self.segment_granules} granules",
            )
        return footer_granules(most)

    def footer_granule(self, slot_granules: int) -> int:
        """Where the footer begins within the segment, and the batches end at the latest."""
        return self.segment_granules - self.footer_granules(slot_granules)


@functools.lru_cache(maxsize=limits.MAX_NAMESPACES)
def _most_slots(segment_granules: int, slot_granules: int) -> int:
    def needed(n: int) -> int:
        return HEADER_GRANULES + head_granules(n) + n * slot_granules + footer_granules(n)

    counts = range(segment_granules // slot_granules + 1)
    return max(bisect.bisect_right(counts, segment_granules, key=needed) - 1, 0)


# -- superblock ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """What a volume is. volume_id: 16 random bytes, new for each formatting."""

    volume_id: bytes
    geometry: Geometry

    def __post_init__(self) -> None:
        _check_volume_id(self.volume_id)


def pack_superblock(superblock: Superblock) -> U8:
    """One copy, (4096,) uint8."""
    geometry = superblock.geometry
    sizes = geometry.segment_granules, geometry.n_segments, geometry.log_granules
    raw = _begun(_SUPERBLOCK_MAGIC, 1)
    _SUPERBLOCK.pack_into(raw.data, _START.size, superblock.volume_id, *sizes)
    return _summed(raw)


def unpack_superblock(buffer: Buffer) -> Superblock:
    """Inverse of `pack_superblock`. Raises ProtocolError or Corrupted."""
    raw = _checked(buffer, _SUPERBLOCK_MAGIC, "superblock", 1)
    volume_id, segment_granules, n_segments, log_granules = _fields(raw, _SUPERBLOCK)
    with _meaningful("superblock"):
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
        _check_volume_id(self.volume_id)
        _check_uints(self, segment=32, sequence=64, run=64, slot_granules=32)
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
    raw = _begun(_HEADER_MAGIC, HEADER_GRANULES)
    _HEADER.pack_into(raw.data, _START.size, header.volume_id, *use, len(name), len(layout))
    at = _START.size + _HEADER.size
    raw[at : at + len(name) + len(layout)] = np.frombuffer(name + layout, np.uint8)
    return _summed(raw)


def unpack_segment_header(buffer: Buffer) -> SegmentHeader:
    """Inverse of `pack_segment_header`. Raises ProtocolError or Corrupted."""
    raw = _checked(buffer, _HEADER_MAGIC, "segment header", HEADER_GRANULES)
    volume_id, segment, slot_granules, sequence, run, *sizes = _fields(raw, _HEADER)
    name_bytes, layout_bytes = sizes
    texts = raw[_START.size + _HEADER.size :]
    with _meaningful("segment header"):
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
        _check_uints(self, segment=32, sequence=64, batch=32, granule=32, previous=64)


def pack_head(head: BatchHead, entries: Rows) -> U8:
    """Its granules, head_granules(n) of them. Their `checksum_of` is the `previous` of the next
    batch, and of the last one the footer's `last`. entries: (n,) ENTRY, not empty."""
    if not len(entries):
        raise InvalidArgument("entries", "a batch has one at least")
    place = head.segment, head.batch, head.granule, head.sequence, head.previous
    raw = _begun(_HEAD_MAGIC, head_granules(len(entries)))
    _HEAD.pack_into(raw.data, _START.size, len(entries), *place)
    _put_rows(raw, _HEAD, "entries", entries, ENTRY)
    return _summed(raw)


def head_count(buffer: Buffer) -> int:
    """How many blocks the head says it has, from its first granule; its checksum is not looked at.

    Raises ProtocolError or Corrupted where this cannot be a head.
    """
    raw = _started(buffer, _HEAD_MAGIC, "batch head", 1)
    count = int(_COUNT.unpack_from(raw.data, _START.size)[0])
    if not count:
        raise Corrupted("batch head says that it has no block")
    return count


def unpack_head(buffer: Buffer) -> tuple[BatchHead, Rows]:
    """Inverse of `pack_head`. The entries share memory with `buffer`.

    Raises ProtocolError or Corrupted.
    """
    raw = _checked(buffer, _HEAD_MAGIC, "batch head", head_granules(head_count(buffer)))
    count, segment, batch, granule, sequence, previous = _fields(raw, _HEAD)
    head = BatchHead(
        segment=segment, sequence=sequence, batch=batch, granule=granule, previous=previous
    )
    return head, _rows(raw, _HEAD, ENTRY, count)


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
        _check_uints(self, segment=32, sequence=64, batches=32, header=64, last=64)


def pack_footer(footer: Footer, entries: Rows) -> U8:
    """Its granules, footer_granules(n) of them. entries: (n,) ENTRY, of all batches, in the order
    of their slots."""
    use = footer.segment, footer.batches, 0, footer.sequence, footer.header, footer.last
    raw = _begun(_FOOTER_MAGIC, footer_granules(len(entries)))
    _FOOTER.pack_into(raw.data, _START.size, len(entries), *use)
    _put_rows(raw, _FOOTER, "entries", entries, ENTRY)
    return _summed(raw)


def unpack_footer(buffer: Buffer) -> tuple[Footer, Rows]:
    """Inverse of `pack_footer`. More may follow in `buffer`, whose memory the entries share.

    Raises ProtocolError or Corrupted.
    """
    first = _started(buffer, _FOOTER_MAGIC, "footer", 1)
    count = int(_COUNT.unpack_from(first.data, _START.size)[0])
    raw = _checked(buffer, _FOOTER_MAGIC, "footer", footer_granules(count))
    count, segment, batches, _zero, sequence, header, last = _fields(raw, _FOOTER)
    footer = Footer(segment=segment, sequence=sequence, batches=batches, header=header, last=last)
    return footer, _rows(raw, _FOOTER, ENTRY, count)


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
        _check_volume_id(self.volume_id)
        _check_uints(self, epoch=64, number=32, base=32)
        if not self.epoch:
            raise InvalidArgument("epoch", "0 stands for a log that was never begun")
        if self.number and self.base:
            raise InvalidArgument("base", "is for sector 0 only")


def pack_log_sector(sector: LogSector, records: Rows) -> U8:
    """(4096,) uint8. records: (n,) LOG_RECORD, at most LOG_RECORDS of them."""
    if len(records) > LOG_RECORDS:
        raise InvalidArgument("records", f"{len(records)} are over {LOG_RECORDS}")
    numbers = sector.number, sector.base, len(records), 0, sector.epoch
    raw = _begun(_LOG_MAGIC, 1)
    _LOG.pack_into(raw.data, _START.size, sector.volume_id, *numbers)
    _put_rows(raw, _LOG, "records", records, LOG_RECORD)
    return _summed(raw)


def unpack_log_sector(buffer: Buffer) -> tuple[LogSector, Rows]:
    """Inverse of `pack_log_sector`. The records share memory with `buffer`.

    Raises ProtocolError or Corrupted.
    """
    raw = _checked(buffer, _LOG_MAGIC, "log sector", 1)
    volume_id, number, base, count, _zero, epoch = _fields(raw, _LOG)
    if count > LOG_RECORDS:
        raise ProtocolError(f"log sector says that it has {count} records")
    with _meaningful("log sector"):
        sector = LogSector(volume_id=volume_id, epoch=epoch, number=number, base=base)
    return sector, _rows(raw, _LOG, LOG_RECORD, count)


# -- what all structures have in common ------------------------------------------------


def _granules(fields: struct.Struct, count: int) -> int:
    return -(-(_AROUND_BYTES + fields.size + count * ENTRY.itemsize) // _UNIT)


def _begun(magic: bytes, granules: int) -> U8:
    raw = aligned(granules * _UNIT)
    _START.pack_into(raw.data, 0, magic, VERSION, 0)
    return raw


def _put_rows(
    raw: U8, fields: struct.Struct, field: str, rows: Rows, dtype: np.dtype[np.void]
) -> None:
    if rows.dtype != dtype or rows.ndim != 1:
        raise InvalidArgument(field, f"must be (n,) {dtype}, not {rows.shape} {rows.dtype}")
    at, nbytes = _START.size + fields.size, rows.size * dtype.itemsize
    raw[at : at + nbytes] = np.ascontiguousarray(rows).view(np.uint8)


def _summed(raw: U8) -> U8:
    own = xxhash.xxh3_64_intdigest(raw[:-_SUM_BYTES].data)
    raw[-_SUM_BYTES:] = np.frombuffer(own.to_bytes(_SUM_BYTES, "little"), np.uint8)
    return raw


def _started(buffer: Buffer, magic: bytes, what: str, granules: int) -> U8:
    """The structure's bytes, of which only magic and version are known to be right."""
    try:
        raw = np.frombuffer(buffer, np.uint8)
    except (ValueError, BufferError, TypeError) as error:
        raise InvalidArgument("buffer", f"no contiguous bytes: {error}") from error
    if len(raw) < granules * _UNIT:
        raise Corrupted(f"{what} is cut short at {len(raw)} of {granules * _UNIT} bytes")
    found, version, _flags = _START.unpack_from(raw.data)
    if found != magic:
        raise ProtocolError(f"{what} has an unknown magic {found!r}")
    if version != VERSION:
        raise ProtocolError(f"{what} has an unknown version {version}")
    return raw[: granules * _UNIT]


def _checked(buffer: Buffer, magic: bytes, what: str, granules: int) -> U8:
    raw = _started(buffer, magic, what, granules)
    if xxhash.xxh3_64_intdigest(raw[:-_SUM_BYTES].data) != checksum_of(raw):
        raise Corrupted(f"{what} fails its checksum")
    *_, flags = _START.unpack_from(raw.data)
    if flags:
        raise ProtocolError(f"{what} has unknown flags {flags:#x}")
    return raw


def _fields(raw: U8, fields: struct.Struct) -> tuple[Any, ...]:
    return fields.unpack_from(raw.data, _START.size)


def _rows(raw: U8, fields: struct.Struct, dtype: np.dtype[np.void], count: int) -> Rows:
    at = _START.size + fields.size
    return raw[at : at + count * dtype.itemsize].view(dtype)


@contextlib.contextmanager
def _meaningful(what: str) -> Iterator[None]:
    """Sound bytes may still say what no packer writes."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{what} has a name that is no text") from error
    except InvalidArgument as error:
        raise ProtocolError(f"{what} has a wrong {error}") from error


def _check_volume_id(value: bytes) -> None:
    if not isinstance(value, bytes) or len(value) != VOLUME_ID_BYTES:
        raise InvalidArgument("volume_id", f"must be {VOLUME_ID_BYTES} bytes")


def _check_uints(value: object, **bits: int) -> None:
    for name, width in bits.items():
        number = getattr(value, name)
        if type(number) is not int or not 0 <= number < 1 << width:
            raise InvalidArgument(name, f"must be an integer of {width} bits, not {number!r}")
