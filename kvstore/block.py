"""The header in front of each stored block, and the checksums of the block's cells.

    offset  size  field (little-endian)
         0     4  magic "KVB1"
         4     2  version, 1
         6     2  flags, 0
         8     4  number of cells n, 1..limits.MAX_CELLS
        12     4  payload length in bytes
        16     4  namespace
        20    32  key
        52    16  put id
        68    32  parent key, zeros if unknown
       100     4  position of the block in its chain, signed, -1 if unknown
       104    8n  xxh3_64 of each cell
    104+8n     8  xxh3_64 of all the above
               .  zeros up to a multiple of 256

Checksums find damage by accident, not by intent.
"""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import numpy.typing as npt
import xxhash
from numba import types

from kvstore import limits
from kvstore.compiled import compiled
from kvstore.errors import Corrupted, InvalidArgument, LayoutMismatch, ProtocolError
from kvstore.streaming import copy_rows, hash_rows

MAGIC = b"KVB1"
VERSION = 1
HEADER_ALIGN = 256
PUT_ID_BYTES = 16
_FIXED = struct.Struct("<4sHHIII32s16s32si")
# The same, for many headers at once.
_FIXED_FIELDS = np.dtype(
    [
        ("magic", "S4"),
        ("version", "<u2"),
        ("flags", "<u2"),
        ("n_cells", "<u4"),
        ("length", "<u4"),
        ("namespace", "<u4"),
        ("key", "u1", 32),
        ("put_id", "u1", 16),
        ("parent", "u1", 32),
        ("position", "<i4"),
    ]
)
# Where they begin, in steps of 32 bits.
_KEY_AT, _PUT_AT, _PARENT_AT, _POSITION_AT = (
    _FIXED_FIELDS.fields[name][1] // 4  # type: ignore[index]
    for name in ("key", "put_id", "parent", "position")
)
_SUMS_AT = _FIXED.size // 4
NO_PARENT = bytes(limits.KEY_BYTES)
_NO_POSITION = -1
_SUM_BYTES = 8

Buffer = bytes | bytearray | memoryview | npt.NDArray[np.uint8]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockHeader:
    """What is stored with a block. Raises InvalidArgument naming the wrong field.

    namespace: uint32. key: 32 bytes. put_id: 16 bytes, new for each put. length: payload bytes,
    at most limits.MAX_BLOCK_BYTES. checksums: (n_cells,) uint64. parent: 32 bytes, not all zero,
    or None if unknown. position: 0 <= position < 2**31, or None if unknown.
    """

    namespace: int
    key: bytes
    put_id: bytes
    length: int
    checksums: npt.NDArray[np.uint64]
    parent: bytes | None
    position: int | None

    def __post_init__(self) -> None:
        _check_uint("namespace", self.namespace, (1 << 32) - 1)
        _check_bytes("key", self.key, limits.KEY_BYTES)
        _check_bytes("put_id", self.put_id, PUT_ID_BYTES)
        _check_uint("length", self.length, limits.MAX_BLOCK_BYTES)
        _check_checksums(self.checksums)
        if self.parent is not None:
            _check_bytes("parent", self.parent, limits.KEY_BYTES)
            if self.parent == NO_PARENT:
                raise InvalidArgument("parent", "all zeros stand for an unknown parent")
        if self.position is not None:
            _check_uint("position", self.position, (1 << 31) - 1)

    # The generated comparison would ask an array for its truth, so it is written out; a header
    # holds an array and so has no hash.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockHeader):
            return NotImplemented
        return _scalars(self) == _scalars(other) and np.array_equal(self.checksums, other.checksums)

    __hash__ = None  # type: ignore[assignment]


def header_bytes(n_cells: int) -> int:
    """Bytes of a header with its padding, a multiple of 256. Raises InvalidArgument."""
    if type(n_cells) is not int or not 1 <= n_cells <= limits.MAX_CELLS:
        raise InvalidArgument("n_cells", f"must be 1..{limits.MAX_CELLS}, not {n_cells!r}")
    used = _FIXED.size + (n_cells + 1) * _SUM_BYTES
    return -(-used // HEADER_ALIGN) * HEADER_ALIGN


def pack(header: BlockHeader) -> bytes:
    """The header's bytes, header_bytes(n_cells) of them."""
    return pack_parts(
        namespace=header.namespace,
        key=header.key,
        put_id=header.put_id,
        length=header.length,
        checksums=header.checksums,
        parent=header.parent or NO_PARENT,
        position=_NO_POSITION if header.position is None else header.position,
    )


def pack_parts(
    *,
    namespace: int,
    key: bytes,
    put_id: bytes,
    length: int,
    checksums: npt.NDArray[np.uint64],
    parent: bytes,
    position: int,
) -> bytes:
    """`pack` of a header that is not made first; checks nothing. parent: zeros where unknown."""
    n_cells = len(checksums)
    fixed = fixed_part(
        namespace=namespace,
        key=key,
        put_id=put_id,
        length=length,
        n_cells=n_cells,
        parent=parent,
        position=position,
    )
    summed = fixed + checksums.astype("<u8", copy=False).tobytes()
    own = xxhash.xxh3_64_intdigest(summed).to_bytes(_SUM_BYTES, "little")
    return (summed + own).ljust(header_bytes(n_cells), b"\0")


def fixed_part(
    *,
    namespace: int,
    key: bytes,
    put_id: bytes,
    length: int,
    n_cells: int,
    parent: bytes,
    position: int,
) -> bytes:
    """The 104 bytes in front of a header's checksums; arguments as of `pack_parts`."""
    return _FIXED.pack(MAGIC, VERSION, 0, n_cells, length, namespace, key, put_id, parent, position)


def pack_many(
    *,
    namespace: int,
    keys: npt.NDArray[np.uint8],
    put_ids: bytes,
    length: int,
    checksums: npt.NDArray[np.uint64],
    parents: npt.NDArray[np.uint8],
    positions: npt.NDArray[np.int32],
) -> npt.NDArray[np.uint8]:
    """The bytes of n headers at once, (n, header_bytes(n_cells)) uint8, each as `pack` makes it.

    keys and parents: (n, 32) uint8, a parent of zeros where it is unknown. put_ids: 16 bytes each,
    joined. checksums: (n, n_cells). positions: (n,), -1 where unknown. Checks nothing: all of it is
    the store's own.
    """
    n, n_cells = checksums.shape
    fixed = fixed_part(
        namespace=namespace,
        key=bytes(limits.KEY_BYTES),
        put_id=bytes(PUT_ID_BYTES),
        length=length,
        n_cells=n_cells,
        parent=NO_PARENT,
        position=0,
    )
    packed = np.zeros((n, header_bytes(n_cells)), np.uint8)
    _fill_headers(
        packed.view(np.uint32),
        np.frombuffer(fixed, np.uint32),
        _halves(keys),
        np.frombuffer(put_ids, np.uint32).reshape(n, -1),
        _halves(parents),
        np.ascontiguousarray(positions, np.int32).view(np.uint32),
        _halves(checksums),
    )
    end = _FIXED.size + n_cells * _SUM_BYTES
    own = hash_rows(_rows_of(packed), end)
    packed[:, end : end + _SUM_BYTES] = own.view(np.uint8).reshape(n, _SUM_BYTES)
    return packed


def write_headers(
    pool: npt.NDArray[np.uint8], granules: npt.NDArray[np.uint32], headers: npt.NDArray[np.uint8]
) -> None:
    """Writes headers (n, any) to the beginnings of the slots at these granules (n,) of a pool."""
    whole = pool.size // limits.GRANULE_BYTES * limits.GRANULE_BYTES
    pool[:whole].reshape(-1, limits.GRANULE_BYTES)[granules, : headers.shape[1]] = headers


def _halves(words: npt.NDArray[np.uint8] | npt.NDArray[np.uint64]) -> npt.NDArray[np.uint32]:
    """Rows of bytes or words (n, any) as rows of 32 bits each."""
    return np.ascontiguousarray(words).view(np.uint32)


def _fill(
    headers: npt.NDArray[np.uint32],
    fixed: npt.NDArray[np.uint32],
    keys: npt.NDArray[np.uint32],
    put_ids: npt.NDArray[np.uint32],
    parents: npt.NDArray[np.uint32],
    positions: npt.NDArray[np.uint32],
    checksums: npt.NDArray[np.uint32],
) -> None:
    for i in range(len(headers)):
        for at in range(_KEY_AT):
            headers[i, at] = fixed[at]
        for at in range(_PUT_AT - _KEY_AT):
            headers[i, _KEY_AT + at] = keys[i, at]
        for at in range(_PARENT_AT - _PUT_AT):
            headers[i, _PUT_AT + at] = put_ids[i, at]
        for at in range(_POSITION_AT - _PARENT_AT):
            headers[i, _PARENT_AT + at] = parents[i, at]
        headers[i, _POSITION_AT] = positions[i]
        for at in range(checksums.shape[1]):
            headers[i, _SUMS_AT + at] = checksums[i, at]


def _array(ndim: int, *, writable: bool = False) -> types.Array:
    return types.Array(types.uint32, ndim, "C", readonly=not writable)


_fill_headers = compiled(
    types.void(
        *(_array(2, writable=True), _array(1), _array(2), _array(2)),
        *(_array(2), _array(1), _array(2)),
    ),
    _fill,
)


def fixed_fields(headers: npt.NDArray[np.uint8]) -> npt.NDArray[np.void]:
    """What is the same in all headers, of n packed ones (n, at least 104): a structured array (n,),
    a copy, with the fields `key`, `put_id`, `parent`, `position`, `length`, `namespace`."""
    fixed = np.ascontiguousarray(headers[:, : _FIXED.size])
    return fixed.view(_FIXED_FIELDS)[:, 0]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Headers:
    """What n packed headers of blocks with as many cells say, all of it copied.

    sound: bool (n,), which are headers as `pack` makes them; the others' fields mean nothing.
    fields: as of `fixed_fields`. checksums: uint64 (n, n_cells). own: uint64 (n,), of themselves.
    """

    sound: npt.NDArray[np.bool_]
    fields: npt.NDArray[np.void]
    checksums: npt.NDArray[np.uint64]
    own: npt.NDArray[np.uint64]

    def only(self, rows: npt.NDArray[np.bool_]) -> Headers:
        """Some of them; rows: bool (n,)."""
        return Headers(self.sound[rows], self.fields[rows], self.checksums[rows], self.own[rows])


def copied_headers(addresses: npt.NDArray[np.uint64], n_cells: int) -> npt.NDArray[np.uint8]:
    """The bytes of headers at addresses (n,) of mapped memory: (n, header_bytes(n_cells))."""
    packed = np.empty((len(addresses), header_bytes(n_cells)), np.uint8)
    copy_rows(_rows_of(packed), addresses, packed.shape[1])
    return packed


def read_headers(packed: npt.NDArray[np.uint8], n_cells: int) -> Headers:
    """`unpack` of n headers at once. packed: (n, header_bytes(n_cells)), C-contiguous, and nobody
    else's to write."""
    end = _FIXED.size + n_cells * _SUM_BYTES
    fields = fixed_fields(packed)
    own = np.ascontiguousarray(packed[:, end : end + _SUM_BYTES]).view("<u8")[:, 0]
    sound = own == hash_rows(_rows_of(packed), end)
    for name, value in (("magic", MAGIC), ("version", VERSION), ("flags", 0), ("n_cells", n_cells)):
        sound &= fields[name] == value
    checksums = np.ascontiguousarray(packed[:, _FIXED.size : end]).view("<u8")
    return Headers(sound, fields, checksums, own)


def _rows_of(packed: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """Where the rows lie."""
    first = np.uint64(packed.__array_interface__["data"][0])
    return first + np.arange(len(packed), dtype=np.uint64) * np.uint64(packed.shape[1])


def unpack(buffer: Buffer) -> BlockHeader:
    """Read the header at the start of `buffer` (contiguous bytes; more may follow).

    The result shares no memory with `buffer`. Raises ProtocolError for an unknown magic, version
    or meaning, Corrupted for a header that is cut short or fails its own checksum.
    """
    view = _as_view("buffer", buffer)
    n_cells = _check_start(view)
    # Copied before it is checked: in shared memory another process could change it in between.
    end = _FIXED.size + n_cells * _SUM_BYTES
    whole = bytes(view[: end + _SUM_BYTES])
    own = int.from_bytes(whole[end:], "little")
    if xxhash.xxh3_64_intdigest(whole[:end]) != own:
        raise Corrupted("block header fails its checksum")
    return _from_checked(whole, n_cells)


def cell_checksums(payload: Buffer, bounds: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """The xxh3_64 of each cell.

    payload: 1-D contiguous uint8. bounds: (n_cells + 1,) int64, from 0 to len(payload), never
    descending. Returns (n_cells,) uint64. Raises InvalidArgument for malformed arguments,
    LayoutMismatch for a payload of another length than the bounds'.
    """
    view = _as_view("payload", payload)
    edges = _edges(bounds)
    if edges[-1] != len(view):
        raise LayoutMismatch("payload", f"has {len(view)} bytes, the layout {edges[-1]}")
    digest = xxhash.xxh3_64_intdigest
    sums = [digest(view[edges[i] : edges[i + 1]]) for i in range(len(edges) - 1)]
    return np.array(sums, dtype=np.uint64)


def verify(header: BlockHeader, payload: Buffer, bounds: npt.NDArray[np.int64]) -> None:
    """Raise Corrupted, naming the first bad cell, unless `payload` is what `header` says.

    Arguments as for `cell_checksums`; raises LayoutMismatch where header and bounds disagree.
    """
    edges = _edges(bounds)
    if len(edges) - 1 != len(header.checksums):
        raise LayoutMismatch(
            "bounds", f"have {len(edges) - 1} cells, the header {len(header.checksums)}"
        )
    if edges[-1] != header.length:
        raise LayoutMismatch("bounds", f"end at {edges[-1]}, the header at {header.length}")
    size = len(_as_view("payload", payload))
    if size != header.length:
        raise Corrupted(f"block has {size} bytes, its header says {header.length}")
    bad = np.flatnonzero(cell_checksums(payload, bounds) != header.checksums)
    if bad.size:
        raise Corrupted(f"cell {int(bad[0])} of {len(header.checksums)} fails its checksum")


def _check_start(view: memoryview) -> int:
    """Check what tells the header's form; returns the number of cells."""
    if len(view) < _FIXED.size:
        raise Corrupted(f"block header is cut short at {len(view)} bytes")
    magic, version, _flags, n_cells = struct.unpack_from("<4sHHI", view)
    if magic != MAGIC:
        raise ProtocolError(f"block header has an unknown magic {magic!r}")
    if version != VERSION:
        raise ProtocolError(f"block header has an unknown version {version}")
    if not 1 <= n_cells <= limits.MAX_CELLS:
        raise Corrupted(f"block header says {n_cells} cells")
    if len(view) < header_bytes(n_cells):
        raise Corrupted(f"block header is cut short at {len(view)} bytes")
    return int(n_cells)


def _from_checked(whole: bytes, n_cells: int) -> BlockHeader:
    _magic, _version, flags, inner, length, namespace, key, put_id, parent, position = (
        _FIXED.unpack_from(whole)
    )
    if flags:
        raise ProtocolError(f"block header has unknown flags {flags:#x}")
    if inner != n_cells:  # changed by another process between the first look and the copy
        raise Corrupted("block header changed while it was read")
    sums = np.frombuffer(whole, dtype="<u8", count=n_cells, offset=_FIXED.size)
    try:
        return BlockHeader(
            namespace=namespace,
            key=key,
            put_id=put_id,
            length=length,
            checksums=sums.astype(np.uint64),
            parent=None if parent == NO_PARENT else parent,
            position=None if position == _NO_POSITION else position,
        )
    except InvalidArgument as error:  # sound bytes, but not such as `pack` writes
        raise ProtocolError(f"block header has a wrong {error}") from error


def _scalars(header: BlockHeader) -> tuple[object, ...]:
    return (
        header.namespace,
        header.key,
        header.put_id,
        header.length,
        header.parent,
        header.position,
    )


def _as_view(field: str, buffer: Buffer) -> memoryview:
    try:
        # Arrays have the buffer protocol, but their type says so only from Python 3.12 on.
        view = memoryview(buffer)  # type: ignore[arg-type]
    except (TypeError, ValueError, BufferError) as error:
        raise InvalidArgument(field, f"is no buffer: {error}") from error
    if view.ndim != 1 or view.itemsize != 1 or not view.c_contiguous:
        raise InvalidArgument(field, "must be 1-D contiguous bytes")
    return view


def _edges(bounds: npt.NDArray[np.int64]) -> list[int]:
    if not isinstance(bounds, np.ndarray) or bounds.dtype != np.int64 or bounds.ndim != 1:
        raise InvalidArgument("bounds", "must be a 1-D int64 array")
    if not 2 <= len(bounds) <= limits.MAX_CELLS + 1:
        raise InvalidArgument("bounds", f"must have 2..{limits.MAX_CELLS + 1} members")
    # A Python list: for so few numbers it is faster than array operations.
    edges: list[int] = bounds.tolist()
    if edges[0] != 0 or sorted(edges) != edges:
        raise InvalidArgument("bounds", "must start at 0 and never descend")
    return edges


def _check_uint(field: str, value: int, most: int) -> None:
    if type(value) is not int or not 0 <= value <= most:
        raise InvalidArgument(field, f"must be an integer in 0..{most}, not {value!r}")


def _check_bytes(field: str, value: bytes, size: int) -> None:
    if not isinstance(value, bytes) or len(value) != size:
        raise InvalidArgument(field, f"must be {size} bytes")


def _check_checksums(value: npt.NDArray[np.uint64]) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != np.uint64 or value.ndim != 1:
        raise InvalidArgument("checksums", "must be a 1-D uint64 array")
    if not 1 <= len(value) <= limits.MAX_CELLS:
        raise InvalidArgument("checksums", f"must have 1..{limits.MAX_CELLS} members")
