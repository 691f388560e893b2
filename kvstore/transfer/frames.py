"""Frames of the transfer by stream: a head, a table of pieces in the asked process, and bytes."""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvstore import limits
from kvstore.errors import ProtocolError
from kvstore.transfer.base import U64

_HEAD = struct.Struct("<BxHIQ")  # kind, pieces, bytes behind the table, the chunk's number
VERSION = 1
MAX_FRAME_BYTES = _HEAD.size + 16 * limits.STREAM_CHUNK_PIECES + limits.STREAM_CHUNK_BYTES


class Kind(enum.IntEnum):
    """What a frame says. Numbers are appended, never used again."""

    HELLO = 1  # active: the version as the number, the passive agent's token as bytes
    WELCOME = 2  # passive: the version
    READ = 3  # active: the pieces' bytes are wanted
    DATA = 4  # passive: they are these
    WRITE = 5  # active: the pieces are to be these bytes
    WRITTEN = 6  # passive: they are
    REFUSED = 7  # passive: no, and why as bytes


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """addresses, nbytes: uint64 (n,), of pieces in the passive process. payload: bytes."""

    kind: Kind
    number: int
    addresses: U64
    nbytes: U64
    payload: memoryview


_NO_PIECES: U64 = np.empty(0, np.uint64)


def encode(
    kind: Kind,
    number: int,
    payload: Iterable[bytes | memoryview] = (),
    addresses: U64 = _NO_PIECES,
    nbytes: U64 = _NO_PIECES,
) -> bytes:
    """A frame; the payload is copied once."""
    parts = list(payload)
    total = sum(len(part) for part in parts)
    table = np.stack((addresses, nbytes), axis=1).astype("<u8", copy=False).tobytes()
    return b"".join((_HEAD.pack(kind, len(addresses), total, number), table, *parts))


def decode(data: bytes) -> Frame:
    """A frame, over the bytes that came; `ProtocolError`."""
    if not _HEAD.size <= len(data) <= MAX_FRAME_BYTES:
        raise ProtocolError(f"a frame of {len(data)} bytes")
    kind, n, payload_bytes, number = _HEAD.unpack_from(data)
    begin = _HEAD.size + 16 * n
    if begin + payload_bytes != len(data) or n > limits.STREAM_CHUNK_PIECES:
        raise ProtocolError("a frame is not as long as it says")
    try:
        known = Kind(kind)
    except ValueError:
        raise ProtocolError(f"a frame of kind {kind}") from None
    table = np.frombuffer(data, "<u8", 2 * n, _HEAD.size).reshape(-1, 2)
    if (table[:, 1] > limits.STREAM_CHUNK_BYTES).any():
        raise ProtocolError("a frame names more bytes than a chunk has")
    total = int(table[:, 1].sum())
    if total > limits.STREAM_CHUNK_BYTES or (known is Kind.WRITE and total != payload_bytes):
        raise ProtocolError("a frame names more or fewer bytes than it may")
    return Frame(known, number, table[:, 0], table[:, 1], memoryview(data)[begin:])
