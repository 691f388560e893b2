"""Boards: where clients that write slots show blocks themselves, before the index has them.

One memory beside the index holds a ring of rows for each writing client, laid out as the index's
(see `format`). A client *posts* a block once its header and bytes are in its slot: readers look at
the boards for what they miss in the index, so a put need not wait for the store. The store *adopts*
posted blocks, in order, before it looks at anything else: it puts their rows into the index, and
only then moves on in the ring. All numbers are little-endian.

    page 0   u64 words: 0 = magic "KVBD" + version u32 << 32, 1 = boards in use so far,
             2 = rows adopted, of all boards together
    page 1   u64 posted[BOARDS], u64 adopted[BOARDS]: rows so far, counted for ever
    page 2.. rows u64[BOARDS, BOARD_ROWS, 8]; a block id of NO_ID

A board that is nobody's has CLOSED in place of its adopted rows. Readers believe a row only where
its check fits; whatever a writer may do to a board shows at worst as a block that was never put,
whose header and checksums say so when the store, or a reader that verifies, looks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import types

from kvstore.compiled import compiled
from kvstore.errors import ProtocolError
from kvstore.index.format import (
    DRAM_TIER,
    MASK32,
    PAGE_BYTES,
    ROW_BYTES,
    ROW_WORDS,
    W_CHECK,
    W_PLACE,
    W_SPACE,
    W_STAMP,
    Words,
)
from kvstore.index.probing import check, in_order, take

BOARDS = 64  # clients at a time that may post; others put with a call
BOARD_ROWS = 256  # a power of two
BOARDS_BYTES = 2 * PAGE_BYTES + BOARDS * BOARD_ROWS * ROW_BYTES
NO_ID = MASK32
CLOSED = 1 << 63  # further from what was posted than any ring is long

_MAGIC = int.from_bytes(b"KVBD", "little")
_VERSION = 1
_H_MAGIC, _H_USED, H_TOTAL = range(3)
_POSTED = PAGE_BYTES // 8  # words
_ADOPTED = _POSTED + BOARDS

_U, _I = np.uint64, np.int64
_MOST = _I(BOARDS)
_NONE, _ONE, _HALF = _U(0), _U(1), _U(32)
_ROWS_MASK, _ROWS_MOST = _U(BOARD_ROWS - 1), _U(BOARD_ROWS)
_ANY_ID, _TIER = _U(NO_ID), _U(DRAM_TIER << 56)


def _pending(words: Words) -> bool:
    """Whether any board has rows that were not adopted yet."""
    for board in range(min(_I(words[_H_USED]), _MOST)):
        ahead = words[_POSTED + board] - words[_ADOPTED + board]
        if ahead != _NONE and ahead <= _ROWS_MOST:
            return True
    return False


def _find(words: Words, rows: Words, keys: Words, namespace: int, found: Words) -> None:
    """Copies the rows of those keys (n, 4) that are missing in `found` (n, 8)."""
    for board in range(min(_I(words[_H_USED]), _MOST)):
        first = words[_ADOPTED + board]
        ahead = words[_POSTED + board] - first
        if ahead > _ROWS_MOST:
            continue
        in_order()  # what was posted by now is there to be read
        for step in range(_I(ahead)):
            at = board * BOARD_ROWS + _I((first + _U(step)) & _ROWS_MASK)
            for i in range(len(keys)):
                if found[i, W_CHECK] != _NONE or rows[at, 0] != keys[i, 0]:
                    continue
                if not take(rows, at, keys, i, namespace, found):
                    for word in range(ROW_WORDS):
                        found[i, word] = _NONE


def _post(
    words: Words,
    rows: Words,
    board: int,
    keys: Words,
    namespace: int,
    length: int,
    granules: npt.NDArray[np.uint32],
    generations: Words,
) -> bool:
    """Appends rows of keys (n, 4) and columns (n,) to a board, then shows them; False where it has
    no room for all of them, or is closed."""
    end = words[_POSTED + board]
    ahead = end - words[_ADOPTED + board]
    if ahead > _ROWS_MOST or _U(len(keys)) > _ROWS_MOST - ahead:
        return False
    for i in range(len(keys)):
        at = board * BOARD_ROWS + _I((end + _U(i)) & _ROWS_MASK)
        rows[at, W_CHECK] = _NONE
        for word in range(4):
            rows[at, word] = keys[i, word]
        rows[at, W_SPACE] = (namespace << _HALF) | length
        rows[at, W_PLACE] = (_U(granules[i]) << _HALF) | _ANY_ID
        rows[at, W_STAMP] = _TIER | generations[_I(granules[i])]
        rows[at, W_CHECK] = check(rows, at)
    in_order()
    words[_POSTED + board] = end + _U(len(keys))
    return True


def _copy(rows: Words, board: int, first: int, copied: Words) -> None:
    """Copies a board's rows from the one numbered `first` on."""
    in_order()
    for step in range(len(copied)):
        at = board * BOARD_ROWS + _I((first + _U(step)) & _ROWS_MASK)
        for word in range(ROW_WORDS):
            copied[step, word] = rows[at, word]


def _adopted(words: Words, board: int, first: int, n: int) -> None:
    """The first n rows from the one numbered `first` on are in the index by now."""
    in_order()
    words[H_TOTAL] += n
    in_order()  # who sees no rows any more sees that some were adopted
    words[_ADOPTED + board] = first + n


def _array(dtype: types.Type, ndim: int, *, writable: bool = False) -> types.Array:
    return types.Array(dtype, ndim, "C", readonly=not writable)


_WORDS, _READ_WORDS = (_array(types.uint64, 1, writable=w) for w in (True, False))
_ROWS, _READ_ROWS = (_array(types.uint64, 2, writable=w) for w in (True, False))
pending: Callable[[Words], bool] = compiled(types.boolean(_READ_WORDS), _pending)
find: Callable[[Words, Words, Words, int, Words], None] = compiled(
    types.void(_READ_WORDS, _READ_ROWS, _READ_ROWS, types.uint64, _ROWS), _find
)
post_now: Callable[..., bool] = compiled(
    types.boolean(
        *(_WORDS, _ROWS, types.int64, _READ_ROWS, types.uint64, types.uint64),
        *(_array(types.uint32, 1), _READ_WORDS),
    ),
    _post,
)
_copy_now = compiled(types.void(_READ_ROWS, types.int64, types.uint64, _ROWS), _copy)
_adopted_now = compiled(types.void(_WORDS, types.int64, types.uint64, types.uint64), _adopted)


@dataclass(frozen=True, slots=True, eq=False)
class Boards:
    """All boards of one trust domain, over one memory: uint64 `words` (n,), `rows` (m, 8)."""

    words: Words
    rows: Words

    @classmethod
    def open(cls, memory: npt.NDArray[np.uint8]) -> Boards:
        """Boards that another process made; `ProtocolError` if magic, version or size do not
        fit."""
        boards = cls._over(memory)
        word = int(boards.words[_H_MAGIC])
        if word != _MAGIC | _VERSION << 32:
            raise ProtocolError(f"no boards of version {_VERSION}: {word:#x}")
        return boards

    @classmethod
    def create(cls, memory: npt.NDArray[np.uint8]) -> Boards:
        """Writes boards that are nobody's into zeroed memory of `BOARDS_BYTES`."""
        boards = cls._over(memory)
        boards.words[_ADOPTED : _ADOPTED + BOARDS] = CLOSED
        boards.words[_H_MAGIC] = _MAGIC | _VERSION << 32
        return boards

    @classmethod
    def _over(cls, memory: npt.NDArray[np.uint8]) -> Boards:
        if memory.nbytes < BOARDS_BYTES:
            raise ProtocolError(f"boards take {BOARDS_BYTES} bytes, not {memory.nbytes}")
        words = memory[:BOARDS_BYTES].view(np.uint64)
        return cls(words, words[2 * PAGE_BYTES // 8 :].reshape(-1, ROW_WORDS))

    # -- of readers --------------------------------------------------------------------

    @property
    def total(self) -> int:
        """How many rows were adopted so far."""
        return int(self.words[H_TOTAL])

    @property
    def pending(self) -> bool:
        """Whether there is a row that the index may not have."""
        return pending(self.words)

    # -- of the client that has a board, one thread at a time ----------------------------

    def post(
        self,
        board: int,
        namespace: int,
        keys: Words,
        *,
        length: int,
        granules: npt.NDArray[np.uint32],
        generations: Words,
    ) -> bool:
        """Shows blocks whose headers and bytes are in their slots: keys (n, 4), payload bytes of
        each, first granules (n,). generations: of all granules. False, with nothing shown, where
        the board has no room for all of them, or is closed."""
        return post_now(
            *(self.words, self.rows, board, keys, namespace, length, granules, generations)
        )


class BoardKeeper:
    """The store's side: which boards are in use, and what was posted there."""

    def __init__(self, boards: Boards) -> None:
        self._words, self._rows = boards.words, boards.rows
        self._first: dict[int, int] = {}  # by board: rows that were adopted
        self._free = list(range(BOARDS - 1, -1, -1))

    def open(self) -> int | None:
        """An empty board for a new client, None where all are in use."""
        if not self._free:
            return None
        board = self._free.pop()
        self._first[board] = 0
        self._words[_POSTED + board] = self._words[_ADOPTED + board] = 0
        self._words[_H_USED] = max(int(self._words[_H_USED]), board + 1)
        return board

    def close(self, board: int) -> None:
        """Readers look at it no more; safe to call twice."""
        self._first.pop(board, None)
        self._words[_ADOPTED + board] = CLOSED

    def free(self, board: int) -> None:
        """Who had it, and closed it, can write to it no more."""
        self._free.append(board)

    @property
    def pending(self) -> bool:
        """Whether anything was posted."""
        return pending(self._words)

    def posted(self, board: int) -> Words:
        """Copies of the rows (n, 8) to be adopted next. `ProtocolError` for a broken board."""
        first = self._first.get(board)
        if first is None:
            raise ProtocolError("the board is closed")
        n = int(self._words[_POSTED + board]) - first
        if not 0 <= n <= BOARD_ROWS:
            raise ProtocolError(f"{n} rows were posted at once, {BOARD_ROWS} have room")
        copied = np.empty((n, ROW_WORDS), np.uint64)
        _copy_now(self._rows, board, first, copied)
        return copied

    def move_on(self, board: int, n: int) -> None:
        """The first n of these are in the index, or refused."""
        _adopted_now(self._words, board, self._first[board], n)
        self._first[board] += n
