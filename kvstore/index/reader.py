"""The readers' side of the shared index: lock-free, never blocks and never writes.

A row counts only if its version was even and the same before and after it was read, and if its
check fits: that guards against damage, and on processors that reorder loads also against a row in
mid-change. A row moved while a search passes it may be missed: a false miss is legal, a wrong row
is not.
"""

from __future__ import annotations

import platform
import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvstore.index.format import (
    FLAG_RETIRED,
    H_EPOCH,
    H_FLAGS,
    MASK56,
    ROW_BYTES,
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
from kvstore.limits import KEY_BYTES

MAX_RETRIES = 64
# x86 shows stores and takes loads in their order, so that versions alone tell of a torn row.
_LOADS_IN_ORDER = platform.machine() == "x86_64"
_NO_ROW = bytes(ROW_BYTES)
_SPACE = slice(8 * W_SPACE + 4, 8 * W_SPACE + 8)  # the namespace's number in a row
_NO_CHECK = bytes(8)  # at the end of a row
_U8 = np.dtype(np.uint8)
_FIRST = struct.Struct("<Q")
_ROW = struct.Struct(f"<{ROW_WORDS}Q")
_FEW = 4  # keys up to which one after the other is quicker than all at once
# How many rows are looked at together where a key is not at its home: 1, 2, 4 or 8.
_FIRST_RUN, _NEXT_RUN = 4, 8


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


_NO_MATCH = Match(np.empty((0, ROW_WORDS), np.uint64))


class IndexReader:
    """Searches a table that another process may be writing; changes nothing."""

    def __init__(self, view: IndexView) -> None:
        """Read through `view`, which may be read-only."""
        self.view = view
        self._mask = view.capacity - 1
        self._bound = probe_bound(view.capacity)
        # The rows' first and last words, both at a row's number times its words.
        flat = view.rows.reshape(-1)
        self._firsts, self._checks = flat, flat[W_CHECK:]
        self._bytes = view.scalar_rows().cast("B")
        self._versions = view.scalar_versions()
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
        rows = self._rows(namespace, hashes)
        if len(rows) > _FEW:  # few are checked where they are found
            wrong = checks_of(rows) != rows[:, W_CHECK]
            if wrong.any():  # those of missing keys, which are all zero, among them
                rows[wrong] = 0
        return Lookup(rows)

    def holds(self, namespace: int, hashes: NDArray[np.uint8]) -> list[bool]:
        """Which of the keys `lookup` would find."""
        if len(hashes) > _FEW:
            found: list[bool] = self.lookup(namespace, hashes).found.tolist()
            return found
        check_namespace(namespace)
        return [self._search_one(key, namespace) is not None for key in _keys(hashes)]

    def match(self, namespace: int, hashes: NDArray[np.uint8]) -> Match:
        """The longest leading run of the keys (n, 32) that is present; errors as `lookup`."""
        return _leading(self.lookup(namespace, hashes).rows)

    def glance(self, namespace: int, hashes: NDArray[np.uint8]) -> Match:
        """`match` for those who only count: where loads come in order, checks are not looked at.

        A damaged row may be taken for a block; who then asks for its bytes does not get any.
        """
        if not _LOADS_IN_ORDER:
            return self.match(namespace, hashes)
        check_namespace(namespace)
        if len(hashes) > _FEW:
            return _leading(self._search(key_words(hashes), namespace))
        found = b""
        for key in _keys(hashes):
            row = self._find_one(key, namespace)
            if row is None:
                break
            found += row
        return Match(_rows_of(found)) if found else _NO_MATCH

    def _rows(self, namespace: int, hashes: NDArray[np.uint8]) -> Words:
        check_namespace(namespace)
        if len(hashes) > _FEW:
            return self._search(key_words(hashes), namespace)
        rows = [self._search_one(key, namespace) or _NO_ROW for key in _keys(hashes)]
        return _rows_of(b"".join(rows))

    def _gather(self, slots: NDArray[np.int64]) -> tuple[Words, NDArray[np.bool_]]:
        """Copies of rows (n, 8) and, bool (n,), which of them were not being written."""
        before = np.take(self.view.versions, slots)
        rows = np.take(self.view.rows, slots, axis=0)
        after = np.take(self.view.versions, slots)
        return rows, (before == after) & ((before & np.uint32(1)) == 0)

    def _search(self, words: Words, namespace: int) -> Words:
        """Copies of the keys' rows (n, 8), all zero where missing: first those at their homes."""
        homes = homes_of(words, namespace, self._mask)
        rows, stable = self._gather(homes)
        hit = same_keys(rows, words, namespace) & stable
        if not hit.all():
            left = np.flatnonzero(~hit)
            free, torn = rows[left, W_CHECK] == 0, ~stable[left]
            rows[left] = 0
            alone = [left[torn], self._search_on(rows, words, namespace, left[~(free | torn)])]
            for i in np.concatenate(alone).tolist():
                row = self._search_one(words[i].tobytes(), namespace)
                if row is not None:
                    rows[i] = _ROW.unpack(row)
        return rows

    def _search_on(
        self, result: Words, words: Words, namespace: int, keys: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Looks for some `keys` (numbers of rows of `result`) in the runs behind their homes.

        Only a row's first and last word are looked at until its key is found. Returns those that
        have to be looked for one by one, because they are few or met a row in mid-change.
        """
        alone: list[NDArray[np.int64]] = []
        begin, width = 1, _FIRST_RUN
        homes = homes_of(words[keys], namespace, self._mask) * ROW_WORDS
        last = self._mask * ROW_WORDS
        while len(keys) > _FEW and begin < self._bound:
            at = (homes[:, None] + np.arange(begin, begin + width) * ROW_WORDS) & last
            same = np.take(self._firsts, at) == words[keys, 0][:, None]
            free = np.take(self._checks, at) == 0
            # The truths of a run are looked at as one word, much faster than by any(axis=1).
            found, over = (part.view(f"u{width}")[:, 0] != 0 for part in (same, free))
            seen = np.flatnonzero(found)
            mine = keys[seen]
            slots = at.ravel()[seen * width + same[seen].argmax(axis=1)] // ROW_WORDS
            rows, stable = self._gather(slots)
            hit = same_keys(rows, words[mine], namespace) & stable
            if not hit.all():
                alone.append(mine[~hit])
                mine, rows = mine[hit], rows[hit]
            result[mine] = rows
            on = ~(found | over)
            keys, homes = keys[on], homes[on]
            begin, width = begin + width, _NEXT_RUN
        return np.concatenate([keys, *alone])

    def _search_one(self, key: bytes, namespace: int) -> bytes | None:
        row = self._find_one(key, namespace)
        if row is None:
            return None
        words = _ROW.unpack(row)
        return row if check_of(words) == words[W_CHECK] else None

    def _find_one(self, key: bytes, namespace: int) -> bytes | None:
        """The row of a key, whose check was not looked at."""
        memory, versions, mask = self._bytes, self._versions, self._mask
        space = namespace.to_bytes(4, "little")
        slot = home_of(_FIRST.unpack_from(key)[0], namespace, mask)
        for _ in range(self._bound):
            before, start = versions[slot], slot * ROW_BYTES
            row: bytes | None = memory[start : start + ROW_BYTES].tobytes()
            if before & 1 or versions[slot] != before:
                row = self._stable_row(slot)
            if row is None:
                return None
            if row.endswith(_NO_CHECK):
                return None
            if row.startswith(key) and row[_SPACE] == space:
                return row
            slot = (slot + 1) & mask
        return None

    def _stable_row(self, slot: int) -> bytes | None:
        """A copy of one row, or None if the writer was at it in every try."""
        versions, start = self._versions, slot * ROW_BYTES
        for _ in range(MAX_RETRIES):
            before = versions[slot]
            row = self._bytes[start : start + ROW_BYTES].tobytes()
            if not before & 1 and versions[slot] == before:
                return row
        return None


def _keys(hashes: NDArray[np.uint8]) -> list[bytes]:
    """Key hashes (n, 32), one by one; errors as `key_words`."""
    if type(hashes) is not np.ndarray or hashes.dtype != _U8 or hashes.shape[1:] != (KEY_BYTES,):
        key_words(hashes)  # raises
    flat = hashes.tobytes()
    if len(flat) == KEY_BYTES:
        return [flat]
    return [flat[at : at + KEY_BYTES] for at in range(0, len(flat), KEY_BYTES)]


def _rows_of(flat: bytes) -> Words:
    """Rows (n, 8), read-only, from their bytes."""
    return np.frombuffer(flat, np.uint64).reshape(-1, ROW_WORDS)


def _leading(rows: Words) -> Match:
    """The run of rows before the first that is missing."""
    there = rows[:, W_CHECK] != 0
    # A copy of a part: who keeps the match would else keep the rows of all that was asked.
    return Match(rows if there.all() else rows[: int(there.argmin())].copy())
