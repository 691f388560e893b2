"""The readers' side of the shared index: lock-free, never blocks and never writes.

A row counts only if its version was even and the same before and after it was read, and if its
check fits. A row moved while a search passes it may be missed: a false miss is legal, a wrong
row is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.index.format import (
    FLAG_RETIRED,
    H_EPOCH,
    H_FLAGS,
    MASK32,
    MASK56,
    ROW_WORDS,
    W_CHECK,
    W_PLACE,
    W_SPACE,
    W_STAMP,
    IndexView,
    Words,
    check_namespace,
    check_of,
    checks_of,
    home_of,
    homes_of,
    key_words,
    probe_bound,
    same_keys,
)

MAX_RETRIES = 64


@dataclass(frozen=True, slots=True, eq=False)
class Lookup:
    """Rows of n keys, in the keys' order; where `found` is False, block id is -1, the rest 0.

    `found` bool, `granules`, `lengths` (payload bytes) and `block_ids` int64 (so that a granule
    times its size cannot overflow), `generations` uint64, `tiers` uint8; all (n,).
    """

    found: NDArray[np.bool_]
    granules: NDArray[np.int64]
    lengths: NDArray[np.int64]
    block_ids: NDArray[np.int64]
    generations: NDArray[np.uint64]
    tiers: NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Match:
    """The longest leading run of present keys: its `count`, and arrays (count,) as in `Lookup`."""

    count: int
    granules: NDArray[np.int64]
    lengths: NDArray[np.int64]
    block_ids: NDArray[np.int64]
    generations: NDArray[np.uint64]
    tiers: NDArray[np.uint8]


class IndexReader:
    """Searches a table that another process may be writing; changes nothing."""

    def __init__(self, view: IndexView) -> None:
        """Read through `view`, which may be read-only."""
        self.view = view
        self._mask = view.capacity - 1
        self._bound = probe_bound(view.capacity)
        self._words = view.scalar_rows()
        self._versions = view.scalar_versions()

    @property
    def retired(self) -> bool:
        """Whether the writer gave this table up."""
        return bool(int(self.view.header[H_FLAGS]) & FLAG_RETIRED)

    @property
    def namespace_epoch(self) -> int:
        """Grows whenever namespace ids may have become stale."""
        return int(self.view.header[H_EPOCH])

    def lookup(self, namespace: int, hashes: NDArray[np.uint8]) -> Lookup:
        """The rows of keys (n, 32) uint8; `InvalidArgument` for another array or namespace."""
        words = key_words(hashes)
        check_namespace(namespace)
        if len(words) == 1:
            return _lookup_one(self._search_one(words[0].tolist(), namespace))
        return _lookup_many(self._search(words, namespace))

    def match(self, namespace: int, hashes: NDArray[np.uint8]) -> Match:
        """The longest leading run of the keys (n, 32) that is present; errors as `lookup`."""
        got = self.lookup(namespace, hashes)
        n = len(got.found)
        count = n if got.found.all() else int(got.found.argmin())
        return Match(
            count,
            got.granules[:count],
            got.lengths[:count],
            got.block_ids[:count],
            got.generations[:count],
            got.tiers[:count],
        )

    def _gather(self, slots: NDArray[np.int64]) -> tuple[Words, NDArray[np.bool_]]:
        """Copies of rows (n, 8) and, bool (n,), which of them were not being written."""
        before = np.take(self.view.versions, slots)
        rows = np.take(self.view.rows, slots, axis=0)
        after = np.take(self.view.versions, slots)
        return rows, (before == after) & ((before & np.uint32(1)) == 0)

    def _search(self, words: Words, namespace: int) -> Words:
        """Copies of the keys' rows (n, 8), all zero where missing."""
        result = np.zeros((len(words), ROW_WORDS), np.uint64)
        pending = np.arange(len(words))
        slots = homes_of(words, namespace, self._mask)
        retries, steps = MAX_RETRIES, 0
        while len(pending) and steps < self._bound:
            rows, stable = self._gather(slots)
            hit = same_keys(rows, words, namespace) & stable
            result[pending[hit]] = rows[hit]
            # An unstable row is read again in place; a stable other key's row is passed.
            on = ~(hit | (stable & (rows[:, W_CHECK] == 0)))
            if stable.all():
                steps += 1
            else:
                retries -= 1
                if not retries:
                    on &= stable
                    retries = MAX_RETRIES
                    steps += 1
            slots = (slots[on] + stable[on]) & self._mask
            pending, words = pending[on], words[on]
        result[checks_of(result) != result[:, W_CHECK]] = 0
        return result

    def _search_one(self, key: list[int], namespace: int) -> list[int] | None:
        slot = home_of(key[0], namespace, self._mask)
        for _ in range(self._bound):
            row = self._stable_row(slot)
            if row is None or row[W_CHECK] == 0:
                return None
            if row[:4] == key and row[W_SPACE] >> 32 == namespace:
                return row if check_of(row) == row[W_CHECK] else None
            slot = (slot + 1) & self._mask
        return None

    def _stable_row(self, slot: int) -> list[int] | None:
        """A copy of one row, or None if the writer was at it in every try."""
        versions, start = self._versions, slot * ROW_WORDS
        for _ in range(MAX_RETRIES):
            before = versions[slot]
            row: list[int] = self._words[start : start + ROW_WORDS].tolist()
            if not before & 1 and versions[slot] == before:
                return row
        return None


def _lookup_one(row: list[int] | None) -> Lookup:
    found = row is not None
    space, place, stamp = row[W_SPACE:W_CHECK] if row is not None else (0, MASK32, 0)
    return Lookup(
        np.array([found], np.bool_),
        np.array([place >> 32], np.int64),
        np.array([space & MASK32], np.int64),
        np.array([place & MASK32 if found else -1], np.int64),
        np.array([stamp & MASK56], np.uint64),
        np.array([stamp >> 56], np.uint8),
    )


def _lookup_many(rows: Words) -> Lookup:
    found = rows[:, W_CHECK] != 0
    halves = rows.view(np.uint32)  # (n, 16): a word's low half comes first
    block_ids = halves[:, 2 * W_PLACE].astype(np.int64)
    block_ids[~found] = -1
    stamps = rows[:, W_STAMP]
    return Lookup(
        found,
        halves[:, 2 * W_PLACE + 1].astype(np.int64),
        halves[:, 2 * W_SPACE].astype(np.int64),
        block_ids,
        stamps & np.uint64(MASK56),
        (stamps >> np.uint64(56)).astype(np.uint8),
    )
