"""The readers' side of the shared index: lock-free, never blocks and never writes.

A row counts only if the check in the copy of it fits: else it was being written, or is damaged. A
row moved while a search passes it may be missed: a false miss is legal, a wrong row is not.

What clients have posted and the index does not have yet is looked for on their boards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.index.boards import Boards
from kvstore.index.format import (
    FLAG_RETIRED,
    H_EPOCH,
    H_FLAGS,
    MASK56,
    ROW_WORDS,
    W_CHECK,
    W_PLACE,
    W_SPACE,
    W_STAMP,
    IndexView,
    Words,
    check_namespace,
    key_words,
    probe_bound,
)
from kvstore.index.looking import look
from kvstore.index.probing import search


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Copies of the rows of n keys, uint64 (n, 8), in the keys' order; all zero where missing.

    The columns are made when they are asked for, all (n,). Where `found` (bool) is False, block id
    is -1 and the rest 0. `granules`, `lengths` (payload bytes) and `block_ids` are int64, so that a
    granule times its size cannot overflow; `generations` uint64, `tiers` uint8.
    """

    rows: Words

    @property
    def found(self) -> NDArray[np.bool_]:
        """Which keys are there."""
        found: NDArray[np.bool_] = self.rows[:, W_CHECK] != 0
        return found

    @property
    def granules(self) -> NDArray[np.int64]:
        """The first granule of each slot."""
        return self._half(2 * W_PLACE + 1)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Payload bytes."""
        return self._half(2 * W_SPACE)

    @property
    def block_ids(self) -> NDArray[np.int64]:
        """The writer's block ids."""
        return np.where(self.found, self._half(2 * W_PLACE), -1)

    @property
    def generations(self) -> NDArray[np.uint64]:
        """What the slots' generations were when the blocks were stored."""
        return self.rows[:, W_STAMP] & np.uint64(MASK56)

    @property
    def tiers(self) -> NDArray[np.uint8]:
        """The blocks' tiers."""
        return self.rows.view(np.uint8)[:, 8 * W_STAMP + 7]  # a word's highest byte is its last

    def only_found(self) -> Lookup:
        """Those that are there."""
        return Lookup(self.rows[self.found])

    def _half(self, at: int) -> NDArray[np.int64]:
        # (n, 16): a word's low half comes first
        return self.rows.view(np.uint32)[:, at].astype(np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Match(Lookup):
    """The longest leading run of present keys: the rows of that run only."""

    @property
    def count(self) -> int:
        """Its length."""
        return len(self.rows)


class IndexReader:
    """Searches a table that another process may be writing; changes nothing."""

    def __init__(self, view: IndexView, boards: Boards | None = None) -> None:
        """Read through `view`, which may be read-only. boards: beside it, where clients post."""
        self.view, self.boards = view, boards
        self.bound = probe_bound(view.capacity)
        self._header = view.header.data

    @property
    def retired(self) -> bool:
        """Whether the writer gave this table up."""
        return bool(self._header[H_FLAGS] & FLAG_RETIRED)

    @property
    def namespace_epoch(self) -> int:
        """Grows whenever namespace ids may have become stale."""
        return self._header[H_EPOCH]

    def lookup(self, namespace: int, hashes: NDArray[np.uint8]) -> Lookup:
        """The rows of keys (n, 32) uint8; `InvalidArgument` for another array or namespace."""
        rows, _ = self._search(namespace, hashes, leading=False)
        return Lookup(rows)

    def match(self, namespace: int, hashes: NDArray[np.uint8]) -> Match:
        """The longest leading run of the keys (n, 32) that is present; errors as `lookup`."""
        rows, count = self._search(namespace, hashes, leading=True)
        # A copy of a part: who keeps the match would else keep the rows of all that was asked.
        return Match(rows if count == len(rows) else rows[:count].copy())

    def _search(
        self, namespace: int, hashes: NDArray[np.uint8], *, leading: bool
    ) -> tuple[Words, int]:
        check_namespace(namespace)
        words, view, boards = key_words(hashes), self.view, self.boards
        rows = np.empty((len(words), ROW_WORDS), np.uint64)
        if boards:
            beside = boards.words, boards.rows
            return rows, look(view.rows, words, namespace, self.bound, leading, *beside, rows)
        return rows, search(view.rows, words, namespace, self.bound, leading, rows)
