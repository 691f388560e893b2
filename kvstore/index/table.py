"""The writer's side of the shared index: open addressing, linear probing, backward shift."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from kvstore.errors import Corrupted, InvalidArgument
from kvstore.index.format import (
    FLAG_RETIRED,
    H_ENTRIES,
    H_EPOCH,
    H_FLAGS,
    HOME_SHIFT,
    MASK32,
    MASK56,
    NAMESPACE_FACTOR,
    ROW_WORDS,
    W_CHECK,
    W_PLACE,
    W_SPACE,
    W_STAMP,
    Buffer,
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

_EMPTY = [0] * ROW_WORDS
_KEY = struct.Struct("<4Q")
_STEPS = 8  # that rows take together
_FEW = 4  # keys up to which one after the other is quicker than all at once


class IndexTable:
    """The one writer of a table; not thread-safe. Readers may look at any moment."""

    def __init__(self, view: IndexView, max_blocks: int) -> None:
        """Take over an empty table; use `create`."""
        self.view = view
        self._mask = view.capacity - 1
        self._bound = probe_bound(view.capacity)
        self._limit = view.capacity // 2
        self._words = view.scalar_rows()
        self._versions = view.scalar_versions()
        self._position = np.full(max_blocks, -1, np.int64)
        self._entries = 0

    @classmethod
    def create(
        cls, buffer: Buffer, capacity: int, instance_id: bytes, *, max_blocks: int | None = None
    ) -> IndexTable:
        """Write an empty table into `buffer` (at least `index_bytes(capacity)` bytes, zeroed here).

        Block ids are in [0, max_blocks); by default half the capacity.
        `InvalidArgument` for a bad buffer, capacity, instance id or bound.
        """
        blocks = capacity // 2 if max_blocks is None else max_blocks
        if not 0 < blocks <= MASK32:
            raise InvalidArgument("max_blocks", f"{blocks} is out of range")
        return cls(IndexView.create(buffer, capacity, instance_id), blocks)

    @property
    def entries(self) -> int:
        """Number of live rows."""
        return self._entries

    @property
    def retired(self) -> bool:
        """Whether `retire` was called."""
        return bool(int(self.view.header[H_FLAGS]) & FLAG_RETIRED)

    def retire(self) -> None:
        """Set the RETIRED flag: readers must stop using this table."""
        self.view.header[H_FLAGS] |= np.uint64(FLAG_RETIRED)

    def bump_namespace_epoch(self) -> None:
        """Add one to the namespace epoch, telling readers that their namespace ids may be stale."""
        self.view.header[H_EPOCH] += np.uint64(1)

    def insert(
        self,
        hashes: NDArray[np.uint8],
        *,
        namespace: int,
        lengths: NDArray[np.integer],
        granules: NDArray[np.integer],
        block_ids: NDArray[np.integer],
        generations: NDArray[np.integer],
        tier: int,
    ) -> NDArray[np.bool_]:
        """Add n rows; bool (n,) says which went in.

        `hashes` is (n, 32) uint8, the rest (n,) integers: payload bytes, first granule, block id,
        generation (56 bits). False where the key is in the namespace already (of equal keys in
        one call the first goes in), or where the load or probe bound was reached.
        `InvalidArgument`, with nothing changed, for bad shapes or ranges, or a block id
        that is in the table or comes twice.
        """
        words = key_words(hashes)
        check_namespace(namespace)
        if not 0 <= tier <= 255:
            raise InvalidArgument("tier", f"{tier} does not fit 8 bits")
        n = len(words)
        rows = np.empty((n, ROW_WORDS), np.uint64)
        rows[:, :4] = words
        rows[:, W_SPACE] = np.uint64(namespace << 32) | _column("lengths", lengths, n, MASK32)
        ids = _column("block_ids", block_ids, n, len(self._position) - 1)
        rows[:, W_PLACE] = (_column("granules", granules, n, MASK32) << np.uint64(32)) | ids
        rows[:, W_STAMP] = np.uint64(tier << 56) | _column("generations", generations, n, MASK56)
        self._check_new(ids)
        rows[:, W_CHECK] = checks_of(rows)
        done = np.zeros(n, np.bool_)
        if n:
            self._insert_many(rows, words, namespace, done)
        self.view.header[H_ENTRIES] = self._entries
        return done

    def insert_one(
        self,
        key: bytes,
        *,
        namespace: int,
        length: int,
        granule: int,
        block_id: int,
        generation: int,
        tier: int,
    ) -> bool:
        """`insert` of one row, much quicker than arrays of one. Checks nothing: all numbers must
        be in range, the key 32 bytes long and the block id not in the table."""
        row = [
            *_KEY.unpack(key),
            namespace << 32 | length,
            granule << 32 | block_id,
            tier << 56 | generation,
        ]
        row.append(check_of(row))
        done = self._insert_one(row)
        self.view.header[H_ENTRIES] = self._entries
        return done

    def delete(self, block_ids: NDArray[np.integer]) -> None:
        """Remove the rows of these block ids (n,); ids without a row are passed over.

        `InvalidArgument`, with nothing changed, for ids out of range.
        """
        array = np.asarray(block_ids)
        ids = _column("block_ids", array, array.size, len(self._position) - 1)
        for block_id in ids.tolist():
            slot = int(self._position[block_id])
            if slot >= 0:
                self._position[block_id] = -1
                self._close(slot)
                self._entries -= 1
        self.view.header[H_ENTRIES] = self._entries

    def move(
        self,
        block_ids: NDArray[np.integer],
        *,
        granules: NDArray[np.integer],
        generations: NDArray[np.integer],
        tier: int,
    ) -> None:
        """Changes where the blocks of these ids (n,), all in the table, lie.

        `InvalidArgument`, with nothing changed, for bad shapes or ranges, or an id without a row.
        """
        n = np.asarray(block_ids).size
        ids = _column("block_ids", block_ids, n, len(self._position) - 1)
        slots = self._position[ids.astype(np.int64)]
        if (slots < 0).any():
            raise InvalidArgument("block_ids", "a block id is not in the table")
        rows = np.take(self.view.rows, slots, axis=0)
        rows[:, W_PLACE] = (_column("granules", granules, n, MASK32) << np.uint64(32)) | ids
        rows[:, W_STAMP] = np.uint64(tier << 56) | _column("generations", generations, n, MASK56)
        rows[:, W_CHECK] = checks_of(rows)
        versions = self.view.versions
        versions[slots] += np.uint32(1)
        self.view.rows[slots] = rows
        versions[slots] += np.uint32(1)

    def find(self, namespace: int, hashes: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Block ids int64 (n,) of keys (n, 32) uint8; -1 where missing. Changes nothing."""
        words = key_words(hashes)
        check_namespace(namespace)
        if len(words) > _FEW:
            return self._find(words, namespace, homes_of(words, namespace, self._mask))
        return np.array([self._find_one(key, namespace) for key in words.tolist()], np.int64)

    def words_of(self, block_ids: NDArray[np.integer]) -> Words:
        """The keys of these live block ids as (n, 4) uint64."""
        slots = self._position[np.asarray(block_ids, np.int64)]
        return np.take(self.view.rows, slots, axis=0)[:, :W_SPACE]

    def rebuilt(
        self, buffer: Buffer, capacity: int, *, without: NDArray[np.integer]
    ) -> tuple[IndexTable, NDArray[np.uint32]]:
        """The table of this one's rows, less those of the ids `without`, written into `buffer`.

        Also returns the block ids (uint32) that found no place within the probe bound. This
        table stays as it is: retire it when readers can have the new one. `InvalidArgument` as
        for `create`, or for a capacity that is too small.
        """
        made = IndexTable.create(
            buffer, capacity, self.view.instance_id, max_blocks=len(self._position)
        )
        made.view.header[H_EPOCH] = self.view.header[H_EPOCH]
        slots = self._position[self._position >= 0]
        gone = self._position[np.asarray(without, np.int64)]
        rows = self.view.rows[np.setdiff1d(slots, gone[gone >= 0], assume_unique=True)]
        if len(rows) > made._limit:
            raise InvalidArgument("capacity", f"{len(rows)} rows do not fit {capacity}")
        return made, made._fill(rows)

    def check(self) -> None:
        """Walk all rows; `Corrupted` at the first broken invariant. For tests and debugging."""
        rows = self.view.rows
        live = np.flatnonzero(rows[:, W_CHECK])
        _require(not (self.view.versions & np.uint32(1)).any(), "a version is odd")
        _require(not rows[rows[:, W_CHECK] == 0].any(), "an empty row is not zero")
        _require(bool((checks_of(rows[live]) == rows[live, W_CHECK]).all()), "a check is wrong")
        counts = (len(live), int(self.view.header[H_ENTRIES]), int((self._position >= 0).sum()))
        _require(set(counts) == {self._entries}, f"entries {self._entries}, counted {counts}")
        seen: set[tuple[int, ...]] = set()
        for slot in live.tolist():
            row = self._row(slot)
            _require(int(self._position[row[W_PLACE] & MASK32]) == slot, "a position is wrong")
            seen.add((*row[:4], row[W_SPACE] >> 32))
            distance = (slot - self._home(row)) & self._mask
            _require(distance < self._bound, f"row {slot} is past the probe bound")
            for back in range(1, distance + 1):
                _require(self._check_at((slot - back) & self._mask) != 0, f"gap before {slot}")
        _require(len(seen) == len(live), "a key is in the table twice")

    def _check_new(self, ids: Words) -> None:
        if (self._position[ids.astype(np.int64)] >= 0).any():
            raise InvalidArgument("block_ids", "a block id is in the table already")
        if len(ids) > 1 and not np.diff(np.sort(ids)).all():
            raise InvalidArgument("block_ids", "a block id comes twice")

    def _insert_many(
        self, rows: Words, words: Words, namespace: int, done: NDArray[np.bool_]
    ) -> None:
        """Place rows, setting `done`: all at once, each a step further where its slot is taken.

        Those that want the same free slot wait for one of them, so that a repeated key meets its
        first. What is left after some steps goes in singly.
        """
        pending = np.arange(len(rows))
        slots = homes_of(words, namespace, self._mask)
        steps = _STEPS if len(rows) <= self._limit - self._entries else 0
        for _ in range(steps):
            if len(pending) <= _FEW:
                break
            there = np.take(self.view.rows, slots, axis=0)
            free = there[:, W_CHECK] == 0
            on = free | ~same_keys(there, words[pending], namespace)
            at_free = np.flatnonzero(free)
            _, first = np.unique(slots[at_free], return_index=True)
            chosen = at_free[first]
            self._write_many(slots[chosen], rows[pending[chosen]])
            done[pending[chosen]] = True
            on[chosen] = False
            slots = (slots + ~free)[on] & self._mask
            pending = pending[on]
        for i in pending.tolist():
            done[i] = self._insert_one(rows[i].tolist())

    def _write_many(self, slots: NDArray[np.int64], rows: Words) -> None:
        versions = self.view.versions
        versions[slots] += np.uint32(1)
        self.view.rows[slots] = rows
        versions[slots] += np.uint32(1)
        self._position[(rows[:, W_PLACE] & np.uint64(MASK32)).astype(np.int64)] = slots
        self._entries += len(slots)

    def _fill(self, rows: Words) -> NDArray[np.uint32]:
        """Puts rows into this empty table, which nobody reads yet; returns ids without a place.

        Linear probing in one pass: rows sorted by home lie each at its home, or right behind the
        row before it.
        """
        salts = (rows[:, W_SPACE] >> np.uint64(32)) * np.uint64(NAMESPACE_FACTOR)
        homes = (((rows[:, 0] ^ salts) >> np.uint64(HOME_SHIFT)) & np.uint64(self._mask)).astype(
            np.int64
        )
        order = np.argsort(homes, kind="stable")
        rows, homes = rows[order], homes[order]
        rest = np.empty((0, ROW_WORDS), np.uint64)
        while True:
            steps = np.arange(len(rows))
            places = np.maximum.accumulate(homes - steps) + steps
            fits = (places - homes < self._bound) & (places <= self._mask)
            if fits.all():
                break
            rest = np.concatenate((rest, rows[~fits]))
            rows, homes = rows[fits], homes[fits]
        self.view.rows[places] = rows
        self._position[(rows[:, W_PLACE] & np.uint64(MASK32)).astype(np.int64)] = places
        self._entries = len(rows)
        # Runs that go around the table's end, and rows past the probe bound: few, one by one.
        lost = [row[W_PLACE] & MASK32 for row in rest.tolist() if not self._insert_one(row)]
        self.view.header[H_ENTRIES] = self._entries
        return np.array(lost, np.uint32)

    def _insert_one(self, row: list[int]) -> bool:
        if self._entries >= self._limit:
            return False
        slot, space = self._home(row), row[W_SPACE] >> 32
        for _ in range(self._bound):
            there = self._row(slot)
            if there[W_CHECK] == 0:
                self._write(slot, row)
                self._entries += 1
                return True
            if there[:4] == row[:4] and there[W_SPACE] >> 32 == space:
                return False
            slot = (slot + 1) & self._mask
        return False

    def _find_one(self, key: list[int], namespace: int) -> int:
        slot = home_of(key[0], namespace, self._mask)
        for _ in range(self._bound):
            row = self._row(slot)
            if row[W_CHECK] == 0:
                break
            if row[:4] == key and row[W_SPACE] >> 32 == namespace:
                return row[W_PLACE] & MASK32
            slot = (slot + 1) & self._mask
        return -1

    def _find(self, words: Words, namespace: int, homes: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.full(len(words), -1, np.int64)
        pending = np.arange(len(words))
        slots = homes
        for _ in range(self._bound):
            rows = np.take(self.view.rows, slots, axis=0)
            used = rows[:, W_CHECK] != 0
            hit = same_keys(rows, words[pending], namespace) & used
            place = rows[hit, W_PLACE] & np.uint64(MASK32)
            found[pending[hit]] = place.astype(np.int64)
            on = ~hit & used
            pending, slots = pending[on], (slots[on] + 1) & self._mask
            if not len(pending):
                break
        return found

    def _close(self, hole: int) -> None:
        """Empty a row, moving later rows of its run back so that no search meets a gap.

        A row is written at its new place before its old place is overwritten, so a reader
        sees it twice rather than never at all. What is further from the hole than the probe
        bound has its home behind the hole, so a run, however long, is not walked to its end.
        """
        slot = (hole + 1) & self._mask
        row = self._row(slot)
        while row[W_CHECK] and (gap := (slot - hole) & self._mask) < self._bound:
            if (slot - self._home(row)) & self._mask >= gap:
                self._write(hole, row)
                hole = slot
            slot = (slot + 1) & self._mask
            row = self._row(slot)
        self._put(hole, _EMPTY)

    def _write(self, slot: int, row: list[int]) -> None:
        self._put(slot, row)
        self._position[row[W_PLACE] & MASK32] = slot

    def _put(self, slot: int, row: list[int]) -> None:
        """Write one row between two steps of its version."""
        version = self._versions[slot]
        self._versions[slot] = (version + 1) & MASK32
        words, start = self._words, slot * ROW_WORDS
        for i, word in enumerate(row):
            words[start + i] = word
        self._versions[slot] = (version + 2) & MASK32

    def _row(self, slot: int) -> list[int]:
        start = slot * ROW_WORDS
        row: list[int] = self._words[start : start + ROW_WORDS].tolist()
        return row

    def _check_at(self, slot: int) -> int:
        return int(self._words[slot * ROW_WORDS + W_CHECK])

    def _home(self, row: list[int]) -> int:
        return home_of(row[0], row[W_SPACE] >> 32, self._mask)


def _column(field: str, values: NDArray[np.integer], n: int, most: int) -> Words:
    """Integers (n,) in [0, most] as uint64; `InvalidArgument` otherwise."""
    array = np.asarray(values)
    if array.shape != (n,):
        raise InvalidArgument(field, f"shape {array.shape} is not ({n},)")
    if not n:
        return np.empty(0, np.uint64)
    if array.dtype.kind == "u" and (most + 1) >> (8 * array.itemsize):
        return array.astype(np.uint64, copy=False)  # nothing of this type is out of range
    if array.dtype.kind not in "iu":
        raise InvalidArgument(field, f"dtype {array.dtype} is no integer type")
    if int(array.min()) < 0 or int(array.max()) > most:
        raise InvalidArgument(field, f"a value is outside 0..{most}")
    return array.astype(np.uint64)


def _require(truth: bool, message: str) -> None:
    if not truth:
        raise Corrupted(f"index: {message}")
