"""A put of one block that waits for nobody, by one compiled call: is it there, and if not, its
bytes and header into a slot, and its row on the board.

Between two such calls lies Python, and where a caller has just used the caches for something else
that takes longer than the block. So what all puts of a namespace have in common is gathered once
(`Single`), and the call itself looks where a caller's key and bytes lie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numba import types

from kvstore.compiled import compiled, word_at
from kvstore.filling import fill_now, fixed_words, set_word
from kvstore.index.boards import Boards, post_now
from kvstore.index.format import H_EPOCH, Words
from kvstore.index.looking import look
from kvstore.index.probing import in_order
from kvstore.index.reader import IndexReader
from kvstore.session.addresses import ARRAY_TYPE, BYTE_DTYPE, BYTES_TYPE, chars_at, key_at, plain_at
from kvstore.session.base import NamespaceHandle
from kvstore.session.parts import Part

FOUND, POSTED, UNSEEN = range(3)  # it is there already, or now, or not

_U = np.uint64
_NONE, _LOW, _HALF, _WORD_BYTES = _U(0), _U(0xFFFFFFFF), _U(32), _U(8)
# Where a header has what differs between blocks, see `kvstore.block`.
_KEY_AT, _PUT_ID_AT, _PARENT_AT = _U(20), _U(52), _U(68)
_KEY_WORDS, _PUT_ID_WORDS, _POSITION_WORD = 4, 2, 12


def _put_one(
    header: Words,
    table: Words,
    bound: int,
    words: Words,
    rows: Words,
    board: int,
    generations: Words,
    namespace: int,
    epoch: int,
    template: Words,
    room: int,
    cells: Words,
    length: int,
    array_type: int,
    bytes_type: int,
    dtype: int,
    granule: int,
    slot: int,
    key: int,
    source: int,
    put_id: int,
    parent: int,
    position: int,
    found: Words,
) -> int:
    key_from = key_at(key, array_type, bytes_type, dtype)
    from_ = plain_at(source, length, False, array_type, dtype)
    if not (key_from and from_) or header[H_EPOCH] != epoch:
        return UNSEEN
    keys = np.empty((1, _KEY_WORDS), np.uint64)
    fixed = template.copy()
    at = _U(fixed.ctypes.data)
    for word in range(_KEY_WORDS):
        keys[0, word] = word_at(key_from + _U(word) * _WORD_BYTES)
        set_word(at + _KEY_AT + _U(word) * _WORD_BYTES, keys[0, word])
    if look(table, keys, namespace, bound, False, words, rows, found):
        return FOUND
    for word in range(_PUT_ID_WORDS):
        offset = _U(word) * _WORD_BYTES
        set_word(at + _PUT_ID_AT + offset, word_at(chars_at(put_id) + offset))
    if position >= 0:
        if parent != _NONE:
            for word in range(_KEY_WORDS):
                offset = _U(word) * _WORD_BYTES
                set_word(at + _PARENT_AT + offset, word_at(chars_at(parent) + offset))
        fixed[_POSITION_WORD] = (fixed[_POSITION_WORD] & _LOW) | (_U(position) << _HALF)
    granules, sums = np.empty(1, np.uint32), np.empty((1, len(cells)), np.uint64)
    granules[0] = granule
    fill_now(slot, from_, fixed, room, cells, sums)
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
        *(_READ, _array(2), _NUMBER),
        *(_array(1, writable=True), _array(2, writable=True), _NUMBER),
        *(_READ, _WORD, _WORD, _READ, _NUMBER, _array(2), _WORD),
        *(_WORD, _WORD, _WORD),
        *(_NUMBER, _WORD, _WORD, _WORD, _WORD, _WORD, _NUMBER, _array(2, writable=True)),
    ),
    _put_one,
    unlocked=True,
)


@dataclass(frozen=True, slots=True, eq=False)
class Single:
    """What puts of one block of a namespace have in common, as long as `epoch` is the index's.

    namespace: the caller's handle, kept so that no other object gets its id. size: granules of a
    slot. common: the leading arguments of `put_one`.
    """

    namespace: NamespaceHandle
    epoch: int
    size: int
    common: tuple[object, ...]

    @classmethod
    def of(
        cls,
        namespace: NamespaceHandle,
        number: int,
        part: Part,
        *,
        index: IndexReader,
        boards: Boards,
        board: int,
        generations: Words,
        epoch: int,
    ) -> Single:
        """Of whole blocks, as `part`, that the store knows the namespace of by `number`."""
        template = fixed_words(
            namespace=number,
            key=bytes(8 * _KEY_WORDS),
            put_id=bytes(8 * _PUT_ID_WORDS),
            length=part.nbytes,
            n_cells=len(part.cell_words),
            parent=b"",
            position=-1,
        )
        return cls(
            namespace=namespace,
            epoch=epoch,
            size=part.slot_granules,
            common=(
                *(index.view.header, index.view.rows, index.bound),
                *(boards.words, boards.rows, board),
                *(generations, number, epoch),
                *(template, part.payload_at // 8, part.cell_words, part.nbytes),
                *(ARRAY_TYPE, BYTES_TYPE, BYTE_DTYPE),
            ),
        )
