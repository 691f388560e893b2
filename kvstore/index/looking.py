"""Looking keys up in the index, and on the boards beside it what the index does not have: compiled.

One call of a compiled loop takes a microsecond of Python, however little it finds: so a look-up is
one, from the index to the boards and back.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import types

from kvstore.compiled import compiled
from kvstore.index.boards import H_TOTAL, find, pending
from kvstore.index.format import ROW_WORDS, W_CHECK, Words
from kvstore.index.probing import in_order, search

_MOST_BESIDE = 64  # keys of a match that are looked for on boards at a time
_NONE = np.uint64(0)


def _beside(
    table: Words, keys: Words, namespace: int, bound: int, words: Words, rows: Words, found: Words
) -> int:
    """Fills in rows that are zeros; returns how many lead. The boards first: what was adopted
    meanwhile is in the index by now."""
    find(words, rows, keys, namespace, found)
    in_order()
    missing = 0
    for i in range(len(keys)):
        if found[i, W_CHECK] == _NONE:
            missing += 1
    if not missing:
        return len(keys)
    asked = np.empty((missing, 4), np.uint64)
    again = np.empty((missing, ROW_WORDS), np.uint64)
    at = 0
    for i in range(len(keys)):
        if found[i, W_CHECK] == _NONE:
            asked[at] = keys[i]
            at += 1
    search(table, asked, namespace, bound, False, again)
    at, led = 0, -1
    for i in range(len(keys)):
        if found[i, W_CHECK] == _NONE:
            found[i] = again[at]
            at += 1
            if led < 0 and found[i, W_CHECK] == _NONE:
                led = i
    return len(keys) if led < 0 else led


def _array(ndim: int, *, writable: bool = False) -> types.Array:
    return types.Array(types.uint64, ndim, "C", readonly=not writable)


_ROWS, _READ_ROWS, _READ_WORDS = _array(2, writable=True), _array(2), _array(1)
_look_beside: Callable[[Words, Words, int, int, Words, Words, Words], int] = compiled(
    types.int64(
        *(_READ_ROWS, _READ_ROWS, types.uint64, types.int64),
        *(_READ_WORDS, _READ_ROWS, _ROWS),
    ),
    _beside,
)


def _look(
    table: Words,
    keys: Words,
    namespace: int,
    bound: int,
    leading: bool,
    words: Words,
    rows: Words,
    found: Words,
) -> int:
    """Copies the keys' rows (n, 8) to `found`, of which n is returned as far as they lead.

    As `probing.search`, but for blocks that the boards' `words` and `rows` may show beside `table`.
    """
    n, before = len(keys), words[H_TOTAL]
    in_order()
    count = search(table, keys, namespace, bound, leading, found)
    in_order()
    if count == n:
        return count
    beside = pending(words)
    in_order()  # what was adopted before that look is in the total
    if not beside and words[H_TOTAL] == before:
        return count
    if not leading:
        return _look_beside(table, keys, namespace, bound, words, rows, found)
    # On from the first key that the index does not have: most chains end there, so few keys are
    # looked for beside it at first.
    few = 1
    while count < n:
        end = min(count + few, n)
        found[count:end] = _NONE
        count += _look_beside(
            table, keys[count:end], namespace, bound, words, rows, found[count:end]
        )
        if count < end:
            break
        count += search(table, keys[end:], namespace, bound, True, found[end:])
        few = min(2 * few, _MOST_BESIDE)
    return count


look: Callable[[Words, Words, int, int, bool, Words, Words, Words], int] = compiled(
    types.int64(
        *(_READ_ROWS, _READ_ROWS, types.uint64, types.int64, types.boolean),
        *(_READ_WORDS, _READ_ROWS, _ROWS),
    ),
    _look,
)
