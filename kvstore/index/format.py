"""The index's layout in shared memory; all numbers are little-endian.

    page 0      header, u64 words: 0 = magic "KVIX" + version u32 << 32, 1 = instance id,
                2 = capacity, 3 = flags, 4 = namespace epoch, 5 = entries
    page 1..    rows u64[capacity, 8]

A row's words: 0-3 key hash; 4 = namespace u32 << 32 | length u32 (payload bytes);
5 = granule u32 << 32 | block id u32; 6 = tier u8 << 56 | generation u56; 7 = check.
A check of 0 marks an empty row. The check, over all other words, guards against damage and against
rows that were read while they were written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import InvalidArgument, ProtocolError
from kvstore.limits import KEY_BYTES, MAX_INDEX_PROBE

Buffer = memoryview | bytearray | NDArray[np.uint8]
Words = NDArray[np.uint64]

MAGIC = int.from_bytes(b"KVIX", "little")
VERSION = 4
PAGE_BYTES = 4096
ROW_WORDS = 8
ROW_BYTES = 8 * ROW_WORDS
MIN_CAPACITY = 8
MAX_CAPACITY = 1 << 32
FLAG_RETIRED = 1

H_MAGIC, H_INSTANCE, H_CAPACITY, H_FLAGS, H_EPOCH, H_ENTRIES = range(6)
W_SPACE, W_PLACE, W_STAMP, W_CHECK = 4, 5, 6, 7

DRAM_TIER, NVME_TIER = 1, 2
MASK32 = (1 << 32) - 1
MASK56 = (1 << 56) - 1

NAMESPACE_FACTOR = 0x9E3779B97F4A7C15
HOME_SHIFT = 20
CHECK_FACTOR = 0xD6E8FEB86659FD93
# Odd weights, of words 0 to 6: a change of any one word always changes the sum, and one of several
# does unless it was made for it.
CHECK_WEIGHTS = (
    0xA0761D6478BD642F,
    0xE7037ED1A0B428DB,
    0x8EBC6AF09C88C6E3,
    0x589965CC75374CC3,
    0xEB44ACCAB455D165,
    0xC2B2AE3D27D4EB4F,
    0x1D8E4E27C47D124F,
)


def _pages(size: int) -> int:
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def index_bytes(capacity: int) -> int:
    """Total bytes of a table of `capacity` rows; `InvalidArgument` if it is no legal capacity."""
    if not MIN_CAPACITY <= capacity <= MAX_CAPACITY or capacity & (capacity - 1):
        raise InvalidArgument("capacity", f"{capacity} is no power of two in range")
    return PAGE_BYTES + _pages(ROW_BYTES * capacity)


def capacity_for(max_blocks: int) -> int:
    """The least power of two that holds `max_blocks` rows at a load of at most one half."""
    if not 0 < max_blocks <= MAX_CAPACITY // 2:
        raise InvalidArgument("max_blocks", f"{max_blocks} is out of range")
    return max(MIN_CAPACITY, 1 << (2 * max_blocks - 1).bit_length())


def probe_bound(capacity: int) -> int:
    """How many rows, from its home on, a key may lie in."""
    return min(MAX_INDEX_PROBE, capacity)


def key_words(hashes: NDArray[np.uint8]) -> Words:
    """Key hashes (n, 32) uint8 as (n, 4) uint64; `InvalidArgument` for any other array."""
    if not isinstance(hashes, np.ndarray) or hashes.dtype != np.uint8:
        raise InvalidArgument("hashes", "must be a uint8 array")
    if hashes.ndim != 2 or hashes.shape[1] != KEY_BYTES:
        raise InvalidArgument("hashes", f"shape {hashes.shape} is not (n, {KEY_BYTES})")
    return np.ascontiguousarray(hashes).view(np.uint64)


def check_namespace(namespace: int) -> None:
    """`InvalidArgument` unless `namespace` fits 32 bits."""
    if not 0 <= namespace <= MASK32:
        raise InvalidArgument("namespace", f"{namespace} does not fit 32 bits")


def checks_of(rows: Words) -> Words:
    """The check words of rows (n, 8), from their other words; never 0."""
    total: Words = np.zeros(len(rows), np.uint64)
    for word, weight in enumerate(CHECK_WEIGHTS):
        total += rows[:, word] * np.uint64(weight)
    total = (total ^ (total >> np.uint64(32))) * np.uint64(CHECK_FACTOR)
    result: Words = (total ^ (total >> np.uint64(29))) | np.uint64(1)
    return result


@dataclass(frozen=True, slots=True, eq=False)
class IndexView:
    """A table's arrays over one buffer; read-only arrays where the buffer is read-only.

    `header` uint64 (512,), `rows` uint64 (capacity, 8).
    """

    header: NDArray[np.uint64]
    rows: NDArray[np.uint64]

    @classmethod
    def open(cls, buffer: Buffer) -> IndexView:
        """View an existing table; `ProtocolError` if magic, version or size do not fit."""
        raw = _raw(buffer)
        if raw.size < PAGE_BYTES:
            raise ProtocolError(f"an index of {raw.size} bytes has no header")
        header = raw[:PAGE_BYTES].view(np.uint64)
        word, capacity = int(header[H_MAGIC]), int(header[H_CAPACITY])
        if word & MASK32 != MAGIC:
            raise ProtocolError("the buffer holds no index (bad magic)")
        if word >> 32 != VERSION:
            raise ProtocolError(f"index version {word >> 32}, expected {VERSION}")
        try:
            need = index_bytes(capacity)
        except InvalidArgument as error:
            raise ProtocolError(f"index header: {error}") from error
        if raw.size < need:
            raise ProtocolError(f"index of {capacity} rows needs {need} bytes, not {raw.size}")
        return cls._over(raw, capacity)

    @classmethod
    def create(cls, buffer: Buffer, capacity: int, instance_id: bytes) -> IndexView:
        """Zero the buffer and write an empty table's header; `InvalidArgument` if it won't fit."""
        need = index_bytes(capacity)
        raw = _raw(buffer)
        if raw.size < need:
            raise InvalidArgument("buffer", f"{raw.size} bytes, the table needs {need}")
        if not raw.flags.writeable:
            raise InvalidArgument("buffer", "is read-only")
        if len(instance_id) != 8:
            raise InvalidArgument("instance_id", "must be 8 bytes")
        raw[:need] = 0
        view = cls._over(raw, capacity)
        view.header[H_INSTANCE] = int.from_bytes(instance_id, "little")
        view.header[H_CAPACITY] = capacity
        # Last, so that nobody takes a half-made table for a whole one.
        view.header[H_MAGIC] = MAGIC | VERSION << 32
        return view

    @classmethod
    def _over(cls, raw: NDArray[np.uint8], capacity: int) -> IndexView:
        rows = raw[PAGE_BYTES : PAGE_BYTES + ROW_BYTES * capacity].view(np.uint64)
        return cls(raw[:PAGE_BYTES].view(np.uint64), rows.reshape(capacity, ROW_WORDS))

    @property
    def capacity(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def instance_id(self) -> bytes:
        """The 8 bytes given at creation."""
        return int(self.header[H_INSTANCE]).to_bytes(8, "little")


def _raw(buffer: Buffer) -> NDArray[np.uint8]:
    try:
        return np.frombuffer(buffer, np.uint8)
    except (ValueError, BufferError, TypeError) as error:
        raise InvalidArgument("buffer", f"no contiguous bytes: {error}") from error
