"""What touches the index's rows one by one, compiled by Numba: searches, insertions, deletions.

A reader copies a row of its key out of the shared table and takes the copy if its check fits all of
its other words: what was written meanwhile does not, in whatever order a processor showed it. A
search touches one line of memory for most keys, which is what it takes time for in a large table.

All arrays are contiguous: `rows` uint64 (capacity, 8), `position` int64 (blocks,), the row of each
block id or -1, keys uint64 (n, 4). Nothing here looks at shapes, ranges or dtypes.
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
# Keys whose rows are called from memory together, two such groups ahead of the key looked at: fewer
# together wait for each other's page walks, more at a time than the processor keeps are lost.
_GROUP = 8

_U = np.uint64  # Numba makes floats of unsigned and plain numbers together
_I = np.int64
_SALT, _SHIFT, _HALF, _LOW = _U(NAMESPACE_FACTOR), _U(HOME_SHIFT), _U(32), _U(MASK32)
_FACTOR, _MORE, _ONE, _NONE = _U(CHECK_FACTOR), _U(29), _U(1), _U(0)
_AWAY, _MARKED = _I(-1), _I(-2)  # of a block without a row, and while one is made
_WEIGHT0, _WEIGHT1, _WEIGHT2, _WEIGHT3, _WEIGHT4, _WEIGHT5, _WEIGHT6 = map(_U, CHECK_WEIGHTS)


@intrinsic
def in_order(_typing: Any) -> Any:
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
def check(row, at):  # type: ignore[no-untyped-def] # uint64 (n, 8), which of them, to uint64
    total = row[at, 0] * _WEIGHT0 + row[at, 1] * _WEIGHT1 + row[at, 2] * _WEIGHT2
    total += row[at, 3] * _WEIGHT3 + row[at, 4] * _WEIGHT4 + row[at, 5] * _WEIGHT5
    total += row[at, 6] * _WEIGHT6
    total = (total ^ (total >> _HALF)) * _FACTOR
    return (total ^ (total >> _MORE)) | _ONE


@numba.njit(inline="always")
def _copy(to, at, rows, slot):  # type: ignore[no-untyped-def] # to[at] = rows[slot]
    for word in range(ROW_WORDS):
        to[at, word] = rows[slot, word]


@numba.njit(inline="always")
def _same_key(keys, i, rows, slot):  # type: ignore[no-untyped-def] # of one row, to bool
    same = rows[slot, 0] == keys[i, 0] and rows[slot, 1] == keys[i, 1]
    return same and rows[slot, 2] == keys[i, 2] and rows[slot, 3] == keys[i, 3]


@numba.njit(inline="always")
def take(rows, slot, keys, i, namespace, found):  # type: ignore[no-untyped-def] # to bool
    """Copies a row to `found[i]`; whether it is the i-th key's, and whole."""
    for _ in range(MAX_RETRIES):
        _copy(found, i, rows, slot)
        in_order()  # what is looked at is the copy
        if not _same_key(keys, i, found, i) or found[i, W_SPACE] >> _HALF != namespace:
            return False
        if check(found, i) == found[i, W_CHECK]:
            return True
    return False


def _search(
    rows: Words, keys: Words, namespace: int, bound: int, leading: bool, found: Words
) -> int:
    """Copies the keys' rows to `found` (n, 8), zeros where missing; returns how many lead.

    leading: whether to stop at the first that is missing; what is behind it means nothing then.
    """
    mask, n, led = _I(len(rows) - 1), len(keys), -1
    for i in range(n):
        if i % _GROUP == 0:
            for ahead in range(i + _GROUP if i else 0, min(i + 2 * _GROUP, n)):
                home = _home(keys[ahead, 0], namespace, mask)
                _call_ahead(rows, home)
                _call_ahead(rows, home + 1)  # where a third to a half of all searches go on
        slot, there = _home(keys[i, 0], namespace, mask), False
        for _ in range(bound):
            if rows[slot, W_CHECK] == _NONE:
                break
            if rows[slot, 0] == keys[i, 0] and take(rows, slot, keys, i, namespace, found):
                there = True
                break
            slot = (slot + 1) & mask
        if not there:
            if led < 0:
                led = i
            if leading:
                break
            found[i] = _NONE
    return n if led < 0 else led


def _fill(
    words: Words,
    namespace: int,
    lengths: Words,
    granules: Words,
    ids: Words,
    stamps: Words,
    position: npt.NDArray[np.int64],
    rows: Words,
) -> bool:
    """Makes rows (n, 8) without their checks of words (n, 4) and columns (n,).

    False where a block id is in the table already or comes twice.
    """
    fresh = 0
    for i in range(len(words)):
        block = _I(ids[i])
        if position[block] != _AWAY:
            break
        position[block] = _MARKED
        fresh += 1
        for word in range(4):
            rows[i, word] = words[i, word]
        rows[i, W_SPACE] = namespace << _HALF | lengths[i]
        rows[i, W_PLACE] = granules[i] << _HALF | ids[i]
        rows[i, W_STAMP] = stamps[i]
    for i in range(fresh):
        position[_I(ids[i])] = _AWAY
    return fresh == len(words)


def _insert(
    rows: Words,
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
    mask, added = _I(len(rows) - 1), 0
    for i in range(len(new)):
        if i % _GROUP == 0:
            for ahead in range(i, min(i + _GROUP, len(new))):
                _call_ahead(rows, _home(new[ahead, 0], new[ahead, W_SPACE] >> _HALF, mask))
        done[i] = False
        if added >= room:
            continue
        new[i, W_CHECK] = check(new, i)
        space = new[i, W_SPACE] >> _HALF
        slot = _home(new[i, 0], space, mask)
        for _ in range(bound):
            if rows[slot, W_CHECK] == _NONE:
                _copy(rows, slot, new, i)
                position[_I(new[i, W_PLACE] & _LOW)] = slot
                added += 1
                done[i] = True
                break
            if _same_key(new, i, rows, slot) and rows[slot, W_SPACE] >> _HALF == space:
                break
            slot = (slot + 1) & mask
    return added


def _delete(
    rows: Words,
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
    mask, removed = _I(len(rows) - 1), 0
    empty = np.zeros((1, ROW_WORDS), np.uint64)
    for block in ids:
        hole = position[block]
        if hole < 0:
            continue
        position[block] = _AWAY
        removed += 1
        slot = (hole + 1) & mask
        while rows[slot, W_CHECK] != _NONE:
            gap = (slot - hole) & mask
            if gap >= bound:
                break
            home = _home(rows[slot, 0], rows[slot, W_SPACE] >> _HALF, mask)
            if (slot - home) & mask >= gap:
                _copy(rows, hole, rows, slot)
                position[_I(rows[slot, W_PLACE] & _LOW)] = hole
                hole = slot
            slot = (slot + 1) & mask
        _copy(rows, hole, empty, 0)
    return removed


def _array(dtype: Any, ndim: int, *, writable: bool = True) -> Any:
    return types.Array(dtype, ndim, "C", readonly=not writable)


_ROWS, _POSITION = _array(types.uint64, 2), _array(types.int64, 1)
_READ_ROWS = _array(types.uint64, 2, writable=False)

search: Callable[[Words, Words, int, int, bool, Words], int] = compiled(
    types.int64(_READ_ROWS, _READ_ROWS, types.uint64, types.int64, types.boolean, _ROWS), _search
)
_COLUMN = _array(types.uint64, 1, writable=False)
fill: Callable[..., bool] = compiled(
    types.boolean(
        *(_READ_ROWS, types.uint64, _COLUMN, _COLUMN, _COLUMN, _COLUMN, _POSITION, _ROWS)
    ),
    _fill,
)
insert: Callable[..., int] = compiled(
    types.int64(_ROWS, _POSITION, _ROWS, types.int64, types.int64, _array(types.boolean, 1)),
    _insert,
)
delete: Callable[..., int] = compiled(
    types.int64(_ROWS, _POSITION, _array(types.int64, 1), types.int64), _delete
)


def home_rows(rows: Words, mask: int) -> npt.NDArray[np.int64]:
    """The rows at which the searches for the keys of rows (n, 8) begin: int64 (n,)."""
    mixed = rows[:, 0] ^ ((rows[:, W_SPACE] >> _HALF) * _SALT)
    return ((mixed >> _SHIFT) & _U(mask)).astype(np.int64)
