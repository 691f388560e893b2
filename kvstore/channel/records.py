"""A codec for frozen values, derived from their own fields.

A frame is `length u32 | type u16 | version u16` and then the fields in order: integers as i64,
bytes and strings as `length u32 | bytes`, arrays as `dtype u8 | ndim u8 | shape u32... | bytes`,
where each field has its number of dimensions.
Nothing is ever unpickled. Pure: no sockets here.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from kvstore import errors, limits

FRAME = struct.Struct("<IHH")
_I64 = struct.Struct("<q")
_U32 = struct.Struct("<I")
Put = Callable[[Any], bytes]
Take = Callable[[bytes, int], tuple[Any, int]]
_DTYPES: list[np.dtype[Any]] = [np.dtype(np.uint8), np.dtype("<u4"), np.dtype("<u8")]


class Codec:
    """Frames of the values of some types.

    types: by their numbers on the wire. dimensions: of arrays in fields of these names; of all
    others, one. what: what a frame is called in errors.
    """

    def __init__(
        self, types: Mapping[int, type], *, version: int, dimensions: Mapping[str, int], what: str
    ) -> None:
        self._types, self._version, self._what = dict(types), version, what
        self._numbers = {kind: number for number, kind in types.items()}
        self._fields = {
            kind: [_field(f, dimensions) for f in dataclasses.fields(kind)]
            for kind in types.values()
        }

    def encode(self, record: object) -> bytes:
        """One frame of a value of a known type.

        `InvalidArgument` names a field whose value has no place in a frame.
        """
        kind = type(record)
        parts = [b""]
        for name, put, _take in self._fields[kind]:
            try:
                parts.append(put(getattr(record, name)))
            except (struct.error, UnicodeEncodeError) as error:
                raise errors.InvalidArgument(name, f"cannot be sent: {error}") from None
        length = sum(map(len, parts))
        if length > limits.MAX_FRAME_BYTES:
            most = limits.MAX_FRAME_BYTES
            raise errors.InvalidArgument("batch", f"a call takes at most {most} B")
        parts[0] = FRAME.pack(length, self._numbers[kind], self._version)
        return b"".join(parts)

    def body_length(self, head: bytes | bytearray) -> int:
        """The length of the body that follows an 8-byte frame head; `ProtocolError` on garbage."""
        return self._parse(head)[0]

    def decode(self, head: bytes | bytearray, body: bytes) -> Any:
        """The value of one frame; `ProtocolError` where the bytes do not fit its fields."""
        kind = self._types[self._parse(head)[1]]
        values: dict[str, Any] = {}
        offset = 0
        try:
            for name, _put, take in self._fields[kind]:
                values[name], offset = take(body, offset)
        except (struct.error, ValueError, IndexError) as error:
            raise errors.ProtocolError(f"malformed {kind.__name__}: {error}") from None
        if offset != len(body):
            over = len(body) - offset
            raise errors.ProtocolError(f"malformed {kind.__name__}: {over} bytes over")
        return kind(**values)

    def decode_frame(self, frame: bytes) -> Any:
        """The value of a frame that comes in one piece; `ProtocolError` on garbage."""
        head, body = frame[: FRAME.size], frame[FRAME.size :]
        if len(head) < FRAME.size or self.body_length(head) != len(body):
            raise errors.ProtocolError(f"not a {self._what}: {len(frame)} bytes")
        return self.decode(head, body)

    def _parse(self, head: bytes | bytearray) -> tuple[int, int]:
        """Length of the body and number of the type."""
        length, number, version = FRAME.unpack(head)
        known = version == self._version and number in self._types
        if not known or length > limits.MAX_FRAME_BYTES:
            raise errors.ProtocolError(
                f"not a {self._what} (type {number}, version {version}, {length} bytes)"
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


def _field(field: dataclasses.Field[Any], dimensions: Mapping[str, int]) -> tuple[str, Put, Take]:
    of = str(field.type).rsplit(".", 1)[-1]
    if of in _PLAIN:
        return field.name, *_PLAIN[of]
    return field.name, *_array_field(_CODES[of], dimensions.get(field.name, 1))
