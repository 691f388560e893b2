"""Where callers' buffers lie, of which one call may name thousands.

What is asked of a numpy array takes 1 to 2 us of Python each. A compiled loop reads the same from
the fields that numpy's C interface promises to all extensions (`PyArrayObject_fields`, NumPy C API,
"Python types and C-structures"), as far as the buffers are plain arrays of bytes; the others, and
all where those fields are not as promised, are asked one by one. The same goes for the fields of
`bytes` ("Include/cpython/bytesobject.h"), which keys may be.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np
from numba import types

from kvstore.commands import U64
from kvstore.compiled import compiled, word_at
from kvstore.errors import InvalidArgument, LayoutMismatch
from kvstore.limits import KEY_BYTES
from kvstore.session.base import Bytes1D

_U = np.uint64
_KEY_BYTES, _TWO = _U(KEY_BYTES), _U(2)
# Bytes from the beginning of an array object to its type, its data, and so on; two are ints, not
# pointers.
_TYPE, _DATA, _NDIM, _SHAPE, _STRIDES, _DTYPE, _FLAGS = map(_U, (8, 16, 24, 32, 40, 56, 64))
# Of a bytes object, how many there are, and themselves.
_SIZE, _CHARS = _U(16), _U(bytes.__basicsize__ - 1)
_INT, _WRITEABLE, _ONE, _NONE = _U(0xFFFFFFFF), _U(0x0400), _U(1), _U(0)


@numba.njit(inline="always")
def _is_plain(at, nbytes, writable, kind, dtype):  # type: ignore[no-untyped-def] # to bool
    if word_at(at + _TYPE) != kind or word_at(at + _DTYPE) != dtype:
        return False
    if word_at(at + _NDIM) & _INT != _ONE or word_at(word_at(at + _SHAPE)) != nbytes:
        return False
    if word_at(word_at(at + _STRIDES)) != _ONE:
        return False
    return not writable or word_at(at + _FLAGS) & _WRITEABLE != _NONE


def _look(objects: U64, nbytes: int, writable: bool, kind: int, dtype: int, found: U64) -> int:
    for i in range(len(objects)):
        if not _is_plain(objects[i], nbytes, writable, kind, dtype):
            return i
        found[i] = word_at(objects[i] + _DATA)
    return len(objects)


@numba.njit(inline="always")
def plain_at(at, nbytes, writable, kind, dtype):  # type: ignore[no-untyped-def] # to uint64
    """For compiled callers: where the bytes of the plain array at an address lie; 0 for no such.

    kind, dtype: `ARRAY_TYPE` and `BYTE_DTYPE`.
    """
    return word_at(at + _DATA) if _is_plain(at, nbytes, writable, kind, dtype) else _NONE


@numba.njit(inline="always")
def chars_at(at):  # type: ignore[no-untyped-def] # to uint64
    """For compiled callers: where the bytes of the bytes object at an address lie."""
    return at + _CHARS


@numba.njit(inline="always")
def key_at(at, array, kind, dtype):  # type: ignore[no-untyped-def] # to uint64
    """For compiled callers: where one key lies, of the bytes object or the plain (1, 32) array at
    an address; 0 for anything else.

    array, kind, dtype: `ARRAY_TYPE`, `BYTES_TYPE` and `BYTE_DTYPE`.
    """
    found = word_at(at + _TYPE)
    if found == kind:
        return at + _CHARS if word_at(at + _SIZE) == _KEY_BYTES else _NONE
    if found != array or word_at(at + _DTYPE) != dtype or word_at(at + _NDIM) & _INT != _TWO:
        return _NONE
    shape = word_at(at + _SHAPE)
    if word_at(shape) != _ONE or word_at(shape + _U(8)) != _KEY_BYTES:
        return _NONE
    return word_at(at + _DATA) if word_at(word_at(at + _STRIDES) + _U(8)) == _ONE else _NONE


def _look_at_one(at: int, nbytes: int, writable: bool, kind: int, dtype: int) -> Any:
    return plain_at(at, nbytes, writable, kind, dtype)


def _look_at_key(at: int, array: int, kind: int, dtype: int) -> Any:
    return key_at(at, array, kind, dtype)


_WORD, _WORDS = types.uint64, types.uint64[::1]
_address_at: Callable[[int, int, bool, int, int], int] = compiled(
    types.uint64(_WORD, _WORD, types.boolean, _WORD, _WORD), _look_at_one
)
_look_at: Callable[[U64, int, bool, int, int, U64], int] = compiled(
    types.int64(_WORDS, _WORD, types.boolean, _WORD, _WORD, _WORDS), _look
)
_key_at: Callable[[int, int, int, int], int] = compiled(
    types.uint64(_WORD, _WORD, _WORD, _WORD), _look_at_key
)
ARRAY_TYPE, BYTES_TYPE, BYTE_DTYPE = id(np.ndarray), id(bytes), id(np.dtype(np.uint8))


def _plain(buffers: Sequence[Bytes1D], nbytes: int, writable: bool, found: U64) -> int:
    """Fills in the addresses of the leading plain arrays, and returns how many these are."""
    objects = np.fromiter(map(id, buffers), np.uint64, len(buffers))
    return _look_at(objects, nbytes, writable, ARRAY_TYPE, BYTE_DTYPE, found)


def _as_promised() -> bool:
    """Whether arrays are laid out here as `_is_plain` reads them."""
    whole = np.zeros(96, np.uint8)
    locked = whole[5:50]
    locked.flags.writeable = False
    found = np.zeros(2, np.uint64)
    both = _plain([whole[5:50], locked], 45, False, found) == 2
    same = found.tolist() == [whole.ctypes.data + 5] * 2
    others: list[Any] = [
        locked,
        whole[::2],
        whole[:44],
        whole[:45].view(np.int8),
        whole[:90].reshape(2, 45),
    ]
    if not (both and same) or any(_plain([other], 45, True, found) for other in others):
        return False
    key = bytes(range(KEY_BYTES))
    rows = np.frombuffer(key + key, np.uint8).reshape(2, KEY_BYTES)
    keys: list[Any] = [key, rows[1:], key[:-1], rows, rows[0], rows[:1].view(np.int8)]
    wide = np.zeros((1, 2 * KEY_BYTES), np.uint8)[:, ::2]
    places = [_key_at(id(k), ARRAY_TYPE, BYTES_TYPE, BYTE_DTYPE) for k in (*keys, wide)]
    at = [places[0], places[1] - rows.ctypes.data]
    return ctypes.string_at(at[0], KEY_BYTES) == key and at[1] == KEY_BYTES and not any(places[2:])


PROMISED = _as_promised()


def addresses_of(
    name: str, buffers: Sequence[Bytes1D], n: int, nbytes: int, *, writable: bool
) -> U64:
    """Where the buffers lie, uint64 (n,): n arrays, or one (n, nbytes) array, of contiguous uint8.

    name: the argument's, for the error: `InvalidArgument`, or `LayoutMismatch` where it is the
    layout that does not fit. writable: whether they must take bytes.
    """
    if len(buffers) != n:
        raise InvalidArgument(name, f"{len(buffers)} buffers for {n} keys")
    found = np.empty(n, np.uint64)
    kept = buffers if isinstance(buffers, list | tuple) else list(buffers)
    if n == 1 and PROMISED:
        found[0] = _address_at(id(kept[0]), nbytes, writable, ARRAY_TYPE, BYTE_DTYPE)
        if found[0]:
            return found
    known = _plain(kept, nbytes, writable, found) if PROMISED and n > 1 else 0
    for i in range(known, n):
        found[i] = _address_of(f"{name}[{i}]", kept[i], nbytes, writable)
    return found


def _address_of(name: str, buffer: Bytes1D, nbytes: int, writable: bool) -> int:
    try:
        # One look at an array for all that is asked of it, of which there may be thousands.
        face = buffer.__array_interface__
    except AttributeError:
        raise InvalidArgument(name, "must be a numpy array of uint8") from None
    if face["shape"] != (nbytes,) or face["typestr"] != "|u1":
        raise LayoutMismatch(name, f"expected {nbytes} uint8, 1-D")
    address, read_only = face["data"]
    if face["strides"] is not None or (writable and read_only):
        raise InvalidArgument(name, "must be contiguous, and writable in a get")
    return int(address)
