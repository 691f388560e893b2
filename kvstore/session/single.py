"""A put of one block that waits for nobody, by one compiled call: is it there, and if not, its
bytes and header into a slot, and its row on the board.

Between two such calls lies Python, and where a caller has just used the caches for something else
that takes longer than the block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import types

from kvstore.compiled import compiled
from kvstore.filling import fill_now
from kvstore.index.boards import post_now
from kvstore.index.format import H_EPOCH, Words
from kvstore.index.looking import look
from kvstore.index.probing import in_order

FOUND, POSTED, UNSEEN = range(3)  # it is there already, or now, or not


def _put_one(
    header: Words,
    table: Words,
    keys: Words,
    namespace: int,
    epoch: int,
    bound: int,
    board: int,
    words: Words,
    rows: Words,
    granule: int,
    generations: Words,
    slot: int,
    source: int,
    fixed: Words,
    room: int,
    cells: Words,
    length: int,
    found: Words,
) -> int:
    if look(table, keys, namespace, bound, False, words, rows, found):
        return FOUND
    granules, sums = np.empty(1, np.uint32), np.empty((1, len(cells)), np.uint64)
    granules[0] = granule
    fill_now(slot, source, fixed, room, cells, sums)
    in_order()
    if header[H_EPOCH] != epoch:  # whose id it was may be gone
        return UNSEEN
    if post_now(words, rows, board, keys, namespace, length, granules, generations):
        return POSTED
    return UNSEEN


def _array(ndim: int, *, writable: bool = False) -> types.Array:
    return types.Array(types.uint64, ndim, "C", readonly=not writable)


_WORD, _NUMBER, _READ = types.uint64, types.int64, _array(1)
put_one: Callable[..., int] = compiled(
    types.int64(
        *(_READ, _array(2), _array(2), _WORD, _WORD, _NUMBER),
        *(_NUMBER, _array(1, writable=True), _array(2, writable=True)),
        *(_NUMBER, _READ, _WORD, _WORD, _READ, _NUMBER, _array(2), _WORD),
        _array(2, writable=True),
    ),
    _put_one,
    unlocked=True,
)
