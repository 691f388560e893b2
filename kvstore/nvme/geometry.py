"""Where everything lies on a volume, and how many granules it takes."""

from __future__ import annotations

import bisect
import functools
import struct
from dataclasses import dataclass

import numpy as np

from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.nvme.packing import AROUND_BYTES, UNIT, check_uints

SUPERBLOCKS = 2  # copies, one a granule
HEADER_GRANULES = 2
FIRST_SEGMENT_MULTIPLE = 1024
LOG_HALVES = 2
LOG_GRANULES = 256

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
# What heads and footers have in front of their entries.
HEAD = struct.Struct("<IIIIQQ")
FOOTER = struct.Struct("<IIIIQQQ")


def head_granules(count: int) -> int:
    """Granules of the head of a batch of `count` blocks."""
    return _granules(HEAD, count)


def footer_granules(count: int) -> int:
    """Granules of a footer with `count` entries."""
    return _granules(FOOTER, count)


def _granules(fields: struct.Struct, count: int) -> int:
    return -(-(AROUND_BYTES + fields.size + count * ENTRY.itemsize) // UNIT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """Where everything lies on a volume. log_granules: of one half.

    Raises InvalidArgument for numbers with which no block could be stored.
    """

    segment_granules: int
    n_segments: int
    log_granules: int = LOG_GRANULES

    def __post_init__(self) -> None:
        check_uints(self, segment_granules=32, n_segments=32, log_granules=32)
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
        if segment_bytes <= 0 or segment_bytes % UNIT:
            raise InvalidArgument(
                "segment_bytes", f"must be a positive multiple of {UNIT}, not {segment_bytes}"
            )
        one = cls(segment_granules=segment_bytes // UNIT, n_segments=1, log_granules=log_granules)
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
        return (self.first_granule + self.n_segments * self.segment_granules) * UNIT

    def log_offset(self, half: int, number: int) -> int:
        """Where a sector of the log lies, in bytes."""
        if not 0 <= half < LOG_HALVES:
            raise InvalidArgument("half", f"must be 0..{LOG_HALVES - 1}, not {half}")
        if not 0 <= number < self.log_granules:
            raise InvalidArgument("number", f"must be 0..{self.log_granules - 1}, not {number}")
        return (SUPERBLOCKS + half * self.log_granules + number) * UNIT

    def offset(self, segment: int, granule: int = 0) -> int:
        """Where a granule of a segment lies, in bytes."""
        if not 0 <= segment < self.n_segments:
            raise InvalidArgument("segment", f"must be 0..{self.n_segments - 1}, not {segment}")
        if not 0 <= granule < self.segment_granules:
            raise InvalidArgument(
                "granule", f"must be 0..{self.segment_granules - 1}, not {granule}"
            )
        return (self.first_granule + segment * self.segment_granules + granule) * UNIT

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
