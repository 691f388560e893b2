"""What all structures on a volume have in common: magic and version in front, rows of a table, a
checksum at the end, in whole granules."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from typing import Any

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
UNIT = limits.GRANULE_BYTES
START = struct.Struct("<4sHH")
SUM_BYTES = 8
AROUND_BYTES = START.size + SUM_BYTES


def aligned(nbytes: int) -> U8:
    """New zeros (nbytes,) uint8 at an address that is a multiple of a granule, as disks want it."""
    if type(nbytes) is not int or nbytes < 0:
        raise InvalidArgument("nbytes", f"must be an integer >= 0, not {nbytes!r}")
    raw = np.zeros(nbytes + UNIT, np.uint8)
    skip = -int(raw.__array_interface__["data"][0]) % UNIT
    return raw[skip : skip + nbytes]


def checksum_of(packed: U8) -> int:
    """The checksum at the end of a structure; it is not verified."""
    return int.from_bytes(packed[-SUM_BYTES:].tobytes(), "little")


def begun(magic: bytes, granules: int) -> U8:
    """A structure of so many granules, of which only the start is written."""
    raw = aligned(granules * UNIT)
    START.pack_into(raw.data, 0, magic, VERSION, 0)
    return raw


def put_rows(
    raw: U8, fields: struct.Struct, field: str, rows: Rows, dtype: np.dtype[np.void]
) -> None:
    """Writes rows behind the fields. field: their name in an InvalidArgument."""
    if rows.dtype != dtype or rows.ndim != 1:
        raise InvalidArgument(field, f"must be (n,) {dtype}, not {rows.shape} {rows.dtype}")
    at, nbytes = START.size + fields.size, rows.size * dtype.itemsize
    raw[at : at + nbytes] = np.ascontiguousarray(rows).view(np.uint8)


def summed(raw: U8) -> U8:
    """The same memory, its checksum written."""
    own = xxhash.xxh3_64_intdigest(raw[:-SUM_BYTES].data)
    raw[-SUM_BYTES:] = np.frombuffer(own.to_bytes(SUM_BYTES, "little"), np.uint8)
    return raw


def started(buffer: Buffer, magic: bytes, what: str, granules: int) -> U8:
    """The structure's bytes, of which only magic and version are known to be right.

    Raises ProtocolError or Corrupted, and InvalidArgument where `buffer` is none.
    """
    try:
        raw = np.frombuffer(buffer, np.uint8)
    except (ValueError, BufferError, TypeError) as error:
        raise InvalidArgument("buffer", f"no contiguous bytes: {error}") from error
    if len(raw) < granules * UNIT:
        raise Corrupted(f"{what} is cut short at {len(raw)} of {granules * UNIT} bytes")
    found, version, _flags = START.unpack_from(raw.data)
    if found != magic:
        raise ProtocolError(f"{what} has an unknown magic {found!r}")
    if version != VERSION:
        raise ProtocolError(f"{what} has an unknown version {version}")
    return raw[: granules * UNIT]


def checked(buffer: Buffer, magic: bytes, what: str, granules: int) -> U8:
    """The structure's bytes, all of them sound. Raises ProtocolError or Corrupted."""
    raw = started(buffer, magic, what, granules)
    if xxhash.xxh3_64_intdigest(raw[:-SUM_BYTES].data) != checksum_of(raw):
        raise Corrupted(f"{what} fails its checksum")
    *_, flags = START.unpack_from(raw.data)
    if flags:
        raise ProtocolError(f"{what} has unknown flags {flags:#x}")
    return raw


def fields_of(raw: U8, fields: struct.Struct) -> tuple[Any, ...]:
    """What stands behind the start."""
    return fields.unpack_from(raw.data, START.size)


def rows_of(raw: U8, fields: struct.Struct, dtype: np.dtype[np.void], count: int) -> Rows:
    """The rows behind the fields; they share memory with `raw`."""
    at = START.size + fields.size
    return raw[at : at + count * dtype.itemsize].view(dtype)


@contextlib.contextmanager
def meaningful(what: str) -> Iterator[None]:
    """Sound bytes may still say what no packer writes: ProtocolError."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ProtocolError(f"{what} has a name that is no text") from error
    except InvalidArgument as error:
        raise ProtocolError(f"{what} has a wrong {error}") from error


def check_volume_id(value: bytes) -> None:
    """Raises InvalidArgument unless it is one."""
    if not isinstance(value, bytes) or len(value) != VOLUME_ID_BYTES:
        raise InvalidArgument("volume_id", f"must be {VOLUME_ID_BYTES} bytes")


def check_uints(value: object, **bits: int) -> None:
    """Raises InvalidArgument for fields of `value` that are no integers of so many bits."""
    for name, width in bits.items():
        number = getattr(value, name)
        if type(number) is not int or not 0 <= number < 1 << width:
            raise InvalidArgument(name, f"must be an integer of {width} bits, not {number!r}")
