"""What touches the index's rows one by one, compiled by Numba: searches, insertions, deletions.

Rows are written between two steps of their version, and read between two looks at it; fences keep
the processor and the compiler to that order. On x86 they cost nothing.

All arrays are contiguous: `rows` uint64 (capacity, 8), `versions` uint32 (capacity,), `position`
int64 (blocks,), the row of each block id or -1, keys uint64 (n, 4). Nothing here looks at shapes,
ranges or dtypes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvstore.compiled import compiled
from kvstore.index.format import (
    CHECK_FACTOR,
    CHECK_WEIGHTS,
    HOME_SHIFT,
    MASK32,
    NAMESPACE_FACTOR,
    ROW_WORDS,
    W_CHECK,
    W_PLACE,
    W_SPACE,
    W_STAMP,
)

Words = npt.NDArray[np.uint64]
MAX_RETRIES = 64  # reads of a row that is being written each time
_AHEAD = 16  # keys whose rows are called from memory before the first of them is looked at

_U = np.uint64  # Numba makes floats of unsigned and plain numbers together
_I = np.int64
_SALT, _SHIFT, _HALF, _LOW = _U(NAMESPACE_FACTOR), _U(HOME_SHIFT), _U(32), _U(MASK32)
_FACTOR, _MORE, _ONE, _NONE = _U(CHECK_FACTOR), _U(29), _U(1), _U(0)
_KEY_WEIGHT, _SPACE_WEIGHT = _U(CHECK_WEIGHTS[0]), _U(CHECK_WEIGHTS[W_SPACE])
_PLACE_WEIGHT, _STAMP_WEIGHT = _U(CHECK_WEIGHTS[W_PLACE]), _U(CHECK_WEIGHTS[W_STAMP])
_ODD, _STEP = np.uint32(1), np.uint32(1)


@intrinsic
def _in_order(_typing: Any) -> Any:
    """What was read and written before this happens before what follows."""

    def generate(context: Any, builder: Any, _signature: Any, _arguments: Any) -> Any:
        builder.fence("acq_rel")
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def _call_ahead(_typing: Any, _array: Any, _index: Any) -> Any:
    """Calls a row of an array, of any item size and contiguous, from memory."""
    array, index = _array, _index

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        view = context.make_array(array)(context, builder, arguments[0])
        step = builder.extract_value(view.strides, 0)
        data = builder.ptrtoint(view.data, step.type)
        at = builder.add(data, builder.mul(step, arguments[1]))
        byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
        prefetch = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte], ir.FunctionType(ir.VoidType(), [byte, number, number, number])
        )
        builder.call(prefetch, [builder.inttoptr(at, byte), number(0), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(array, index), generate


@numba.njit(inline="always")
def _home(word, namespace, mask):  # type: ignore[no-untyped-def] # uint64, uint64, int64 to int64
    return _I((word ^ (namespace * _SALT)) >> _SHIFT) & mask


@numba.njit(inline="always")
def _check(key, space, place, stamp):  # type: ignore[no-untyped-def] # four uint64 to uint64
    total = key * _KEY_WEIGHT + space * _SPACE_WEIGHT
    total += place * _PLACE_WEIGHT + stamp * _STAMP_WEIGHT
    total = (total ^ (total >> _HALF)) * _FACTOR
    return (total ^ (total >> _MORE)) | _ONE


def _search(
    rows: Words,
    versions: npt.NDArray[np.uint32],
    keys: Words,
    namespace: int,
    bound: int,
    leading: bool,
    found: Words,
) -> int:
    """Copies the keys' rows to `found` (n, 8), zeros where missing; returns how many lead.

    leading: whether to stop at the first that is missing; what is behind it is not written then.
    """
    mask, n, led = _I(len(versions) - 1), len(keys), -1
    for i in range(n):
        if i % _AHEAD == 0:
            for ahead in range(i, min(i + _AHEAD, n)):
                home = _home(keys[ahead, 0], namespace, mask)
                _call_ahead(rows, home)
                _call_ahead(versions, home)
        slot, there = _home(keys[i, 0], namespace, mask), False
        for _ in range(bound):
            stable = False
            for _ in range(MAX_RETRIES):
                before = versions[slot]
                _in_order()
                word0, word1 = rows[slot, 0], rows[slot, 1]
                word2, word3 = rows[slot, 2], rows[slot, 3]
                space, place, stamp = rows[slot, W_SPACE], rows[slot, W_PLACE], rows[slot, W_STAMP]
                check = rows[slot, W_CHECK]
                _in_order()
                stable = before & _ODD == 0 and versions[slot] == before
                if stable:
                    break
            if not stable or check == _NONE:
                break
            same = word0 == keys[i, 0] and word1 == keys[i, 1] and word2 == keys[i, 2]
            if same and word3 == keys[i, 3] and space >> _HALF == namespace:
                there = _check(word0, space, place, stamp) == check
                break
            slot = (slot + 1) & mask
        if there:
            found[i, 0], found[i, 1], found[i, 2], found[i, 3] = word0, word1, word2, word3
            found[i, W_SPACE], found[i, W_PLACE], found[i, W_STAMP] = space, place, stamp
            found[i, W_CHECK] = check
        else:
            if led < 0:
                led = i
            if leading:
                break
            found[i] = _NONE
    return n if led < 0 else led


@numba.njit(inline="always")
def _write(rows, versions, slot, row, at):  # type: ignore[no-untyped-def] # rows[slot] = row[at]
    versions[slot] += _STEP
    _in_order()
    for word in range(ROW_WORDS):
        rows[slot, word] = row[at, word]
    _in_order()
    versions[slot] += _STEP


def _insert(
    rows: Words,
    versions: npt.NDArray[np.uint32],
    position: npt.NDArray[np.int64],
    new: Words,
    bound: int,
    room: int,
    done: npt.NDArray[np.bool_],
) -> int:
    """Adds rows (n, 8), at most `room`; `done` (n,) says which went in, and how many is returned.

    Not those whose key is there, nor those that find no empty row within the bound. Their check
    words are made here.
    """
    mask, added = _I(len(versions) - 1), 0
    for i in range(len(new)):
        if i % _AHEAD == 0:
            for ahead in range(i, min(i + _AHEAD, len(new))):
                _call_ahead(rows, _home(new[ahead, 0], new[ahead, W_SPACE] >> _HALF, mask))
        done[i] = False
        if added >= room:
            continue
        new[i, W_CHECK] = _check(new[i, 0], new[i, W_SPACE], new[i, W_PLACE], new[i, W_STAMP])
        space = new[i, W_SPACE] >> _HALF
        slot = _home(new[i, 0], space, mask)
        for _ in range(bound):
            if rows[slot, W_CHECK] == _NONE:
                _write(rows, versions, slot, new, i)
                position[_I(new[i, W_PLACE] & _LOW)] = slot
                added += 1
                done[i] = True
                break
            same = rows[slot, 0] == new[i, 0] and rows[slot, 1] == new[i, 1]
            same = same and rows[slot, 2] == new[i, 2] and rows[slot, 3] == new[i, 3]
            if same and rows[slot, W_SPACE] >> _HALF == space:
                break
            slot = (slot + 1) & mask
    return added


def _delete(
    rows: Words,
    versions: npt.NDArray[np.uint32],
    position: npt.NDArray[np.int64],
    ids: npt.NDArray[np.int64],
    bound: int,
) -> int:
    """Removes the rows of these block ids (n,), passing over ids without one; returns how many.

    Later rows of a run move back so that no search meets a gap. A row is written at its new place
    before its old place is overwritten, so a reader sees it twice rather than never at all. What is
    further from the hole than the probe bound has its home behind the hole, so a run, however long,
    is not walked to its end.
    """
    mask, removed = _I(len(versions) - 1), 0
    empty = np.zeros((1, ROW_WORDS), np.uint64)
    for block in ids:
        hole = position[block]
        if hole < 0:
            continue
        position[block] = -1
        removed += 1
        slot = (hole + 1) & mask
        while rows[slot, W_CHECK] != _NONE:
            gap = (slot - hole) & mask
            if gap >= bound:
                break
            home = _home(rows[slot, 0], rows[slot, W_SPACE] >> _HALF, mask)
            if (slot - home) & mask >= gap:
                _write(rows, versions, hole, rows, slot)
                position[_I(rows[slot, W_PLACE] & _LOW)] = hole
                hole = slot
            slot = (slot + 1) & mask
        _write(rows, versions, hole, empty, 0)
    return removed


def _array(dtype: Any, ndim: int, *, writable: bool = True) -> Any:
    return types.Array(dtype, ndim, "C", readonly=not writable)


_ROWS, _VERSIONS = _array(types.uint64, 2), _array(types.uint32, 1)
_POSITION = _array(types.int64, 1)
_READ_ROWS = _array(types.uint64, 2, writable=False)
_READ_VERSIONS = _array(types.uint32, 1, writable=False)

search: Callable[[Words, npt.NDArray[np.uint32], Words, int, int, bool, Words], int] = compiled(
    types.int64(
        *(_READ_ROWS, _READ_VERSIONS, _READ_ROWS),
        *(types.uint64, types.int64, types.boolean, _ROWS),
    ),
    _search,
)
insert: Callable[..., int] = compiled(
    types.int64(
        *(_ROWS, _VERSIONS, _POSITION, _ROWS),
        *(types.int64, types.int64, _array(types.boolean, 1)),
    ),
    _insert,
)
delete: Callable[..., int] = compiled(
    types.int64(_ROWS, _VERSIONS, _POSITION, _array(types.int64, 1), types.int64), _delete
)


def home_rows(rows: Words, mask: int) -> npt.NDArray[np.int64]:
    """The rows at which the searches for the keys of rows (n, 8) begin: int64 (n,)."""
    mixed = rows[:, 0] ^ ((rows[:, W_SPACE] >> _HALF) * _SALT)
    return ((mixed >> _SHIFT) & _U(mask)).astype(np.int64)
