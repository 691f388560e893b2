"""Records of the same-host channel: a codec derived from the commands' own fields.

A frame is `length u32 | type u16 | version u16` and then the fields in order: integers as i64,
bytes and strings as `length u32 | bytes`, arrays as `dtype u8 | ndim u8 | shape u32... | bytes`,
where each field has its number of dimensions.
Nothing is ever unpickled. Pure: no sockets here.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable
from typing import Any, get_args

import numpy as np

from kvstore import commands, errors, limits

WIRE_VERSION = 4
FRAME = struct.Struct("<IHH")
_I64 = struct.Struct("<q")
_U32 = struct.Struct("<I")
Put = Callable[[Any], bytes]
Take = Callable[[bytes, int], tuple[Any, int]]
_DTYPES: list[np.dtype[Any]] = [np.dtype(np.uint8), np.dtype("<u4"), np.dtype("<u8")]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The daemon's first record, sent with the descriptors of pool, generations and index.

    `writable` is 1 for a client that writes slots itself, 0 for one that stages (copy-in);
    `prefaulted` is 1 where the pool's memory is taken already or soon will be.
    """

    version: int
    instance: int
    writable: int
    prefaulted: int
    pool_bytes: int
    index_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MapIndex:
    """Asks for the index that took the place of a retired one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexMapped:
    """Sent with the descriptor of the index."""

    index_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Sent with the descriptor of the client's staging memfd; answered by an empty `Count`."""

    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SealStaged:
    """A `Seal` whose bytes lie in the client's staging memory, one block's cells at each offset.

    The daemon copies them to the slots and hashes what arrived; answered by `Sealed`.
    """

    namespace: int
    put_id: bytes
    hashes: commands.U8
    offsets: commands.U64


# The numbers are part of the format: append, never reorder.
_TYPES: dict[int, type] = {
    1: commands.OpenNamespace,
    2: commands.NamespaceOpened,
    3: commands.Reserve,
    4: commands.Reserved,
    5: commands.Seal,
    6: commands.Sealed,
    7: commands.Abort,
    8: commands.Lease,
    9: commands.Leased,
    10: commands.Release,
    11: commands.Touch,
    12: commands.Drop,
    13: commands.Explain,
    14: commands.Explained,
    15: commands.Stat,
    16: commands.Stats,
    17: commands.Count,
    18: commands.Failed,
    19: Welcome,
    20: commands.Hint,
    21: commands.Describe,
    22: commands.Description,
    23: MapIndex,
    24: IndexMapped,
    25: Stage,
    26: SealStaged,
    27: commands.Grant,
    28: commands.Granted,
    29: commands.Commit,
    30: commands.Committed,
    31: commands.GiveBack,
    32: commands.Fetch,
    33: commands.Persist,
    34: commands.Persisted,
}
_NUMBERS = {kind: number for number, kind in _TYPES.items()}
# All other arrays have one dimension.
_DIMENSIONS = {"hashes": 2, "checksums": 2}
COMMANDS = frozenset(get_args(commands.Command))


def encode(record: object) -> bytes:
    """One frame of a command, a result or the welcome.

    `InvalidArgument` names a field whose value has no place in a frame.
    """
    kind = type(record)
    parts = [b""]
    for name, put, _take in _FIELDS[kind]:
        try:
            parts.append(put(getattr(record, name)))
        except (struct.error, UnicodeEncodeError) as error:
            raise errors.InvalidArgument(name, f"cannot be sent: {error}") from None
    length = sum(map(len, parts))
    if length > limits.MAX_FRAME_BYTES:
        raise errors.InvalidArgument("batch", f"a call takes at most {limits.MAX_FRAME_BYTES} B")
    parts[0] = FRAME.pack(length, _NUMBERS[kind], WIRE_VERSION)
    return b"".join(parts)


def body_length(head: bytes | bytearray) -> int:
    """The length of the body that follows an 8-byte frame head; `ProtocolError` on garbage."""
    return _parse(head)[0]


def decode(head: bytes | bytearray, body: bytes) -> Any:
    """The record of one frame; `ProtocolError` where the bytes do not fit its fields."""
    kind = _TYPES[_parse(head)[1]]
    values: dict[str, Any] = {}
    offset = 0
    try:
        for name, _put, take in _FIELDS[kind]:
            values[name], offset = take(body, offset)
    except (struct.error, ValueError, IndexError) as error:
        raise errors.ProtocolError(f"malformed {kind.__name__}: {error}") from None
    if offset != len(body):
        raise errors.ProtocolError(f"malformed {kind.__name__}: {len(body) - offset} bytes over")
    return kind(**values)


def _parse(head: bytes | bytearray) -> tuple[int, int]:
    """Length of the body and number of the type."""
    length, number, version = FRAME.unpack(head)
    if version != WIRE_VERSION or number not in _TYPES or length > limits.MAX_FRAME_BYTES:
        raise errors.ProtocolError(
            f"not a channel record (type {number}, version {version}, {length} bytes)"
        )
    return length, number


def _put_bytes(value: bytes) -> bytes:
    return _U32.pack(len(value)) + value


def _put_str(value: str) -> bytes:
    return _put_bytes(value.encode())


def _take_int(body: bytes, offset: int) -> tuple[int, int]:
    return _I64.unpack_from(body, offset)[0], offset + 8


def _take_bytes(body: bytes, offset: int) -> tuple[bytes, int]:
    end = offset + 4 + _U32.unpack_from(body, offset)[0]
    if end > len(body):
        raise ValueError("truncated")
    return body[offset + 4 : end], end


def _take_str(body: bytes, offset: int) -> tuple[str, int]:
    value, end = _take_bytes(body, offset)
    return value.decode(), end


def _array_field(code: int, ndim: int) -> tuple[Put, Take]:
    """How arrays of the type numbered `code` are written and read."""
    dtype, head = _DTYPES[code], struct.Struct(f"<{ndim}I")

    def put(value: Any) -> bytes:
        array = np.ascontiguousarray(value, dtype)
        its_head = struct.pack(f"<BB{array.ndim}I", code, array.ndim, *array.shape)
        return its_head + array.tobytes()

    def take(body: bytes, offset: int) -> tuple[Any, int]:
        if body[offset] != code or body[offset + 1] != ndim:
            raise ValueError(f"expected an array of {dtype} with {ndim} dimensions")
        shape = head.unpack_from(body, offset + 2)
        start = offset + 2 + head.size
        count = math.prod(shape)
        end = start + count * dtype.itemsize
        if end > len(body):
            raise ValueError("truncated array")
        array = np.frombuffer(body, dtype, count, start)
        return (array.reshape(shape) if ndim > 1 else array), end

    return put, take


_CODES = {"U8": 0, "U32": 1, "U64": 2}
_PLAIN: dict[str, tuple[Put, Take]] = {
    "int": (_I64.pack, _take_int),
    "bytes": (_put_bytes, _take_bytes),
    "str": (_put_str, _take_str),
}


def _field(field: dataclasses.Field[Any]) -> tuple[str, Put, Take]:
    of = str(field.type).removeprefix("commands.")
    if of in _PLAIN:
        return field.name, *_PLAIN[of]
    return field.name, *_array_field(_CODES[of], _DIMENSIONS.get(field.name, 1))


# The codec of each record, made once from its own fields.
_FIELDS = {kind: [_field(f) for f in dataclasses.fields(kind)] for kind in _TYPES.values()}


def raise_if_failed(result: Any) -> Any:
    """Turns a `Failed` record back into the error it stands for."""
    if not isinstance(result, commands.Failed):
        return result
    for kind in (
        errors.StaleNamespace,
        errors.PermissionDenied,
        errors.DeadlineExceeded,
        errors.Unavailable,
        errors.ProtocolError,
        errors.Corrupted,
    ):
        if kind.code == result.code:
            raise kind(result.message)
    if result.code == errors.ResourceExhausted.code:
        raise errors.ResourceExhausted(result.message, retry_after_ms=result.retry_after_ms)
    if result.code == errors.LayoutMismatch.code:
        raise errors.LayoutMismatch(result.field, result.message)
    if result.code == errors.InvalidArgument.code:
        raise errors.InvalidArgument(result.field, result.message)
    raise errors.KVStoreError(result.message)
