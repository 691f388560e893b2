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
    MASK32,
    MASK56,
    ROW_WORDS,
    W_CHECK,
    W_PLACE,
    W_SPACE,
    W_STAMP,
    Buffer,
    IndexView,
    Words,
    check_namespace,
    checks_of,
    key_words,
    probe_bound,
)
from kvstore.index.probing import delete, fill, home_rows, insert, search

_ROW = struct.Struct("<32s4Q")


class IndexTable:
    """The one writer of a table; not thread-safe. Readers may look at any moment."""

    def __init__(self, view: IndexView, max_blocks: int) -> None:
        """Take over an empty table; use `create`."""
        self.view = view
        self._mask = view.capacity - 1
        self._bound = probe_bound(view.capacity)
        self._limit = view.capacity // 2
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
        ids = _column("block_ids", block_ids, n, len(self._position) - 1)
        columns = (
            _column("lengths", lengths, n, MASK32),
            _column("granules", granules, n, MASK32),
            ids,
            _column("generations", generations, n, MASK56) | np.uint64(tier << 56),
        )
        rows = np.empty((n, ROW_WORDS), np.uint64)
        if not fill(words, namespace, *columns, self._position, rows):
            raise InvalidArgument("block_ids", "a block id is in the table already, or comes twice")
        return self._insert(rows)

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
        space, place = namespace << 32 | length, granule << 32 | block_id
        packed = bytearray(_ROW.pack(key, space, place, tier << 56 | generation, 0))
        return bool(self._insert(np.frombuffer(packed, np.uint64).reshape(1, ROW_WORDS))[0])

    def delete(self, block_ids: NDArray[np.integer]) -> None:
        """Remove the rows of these block ids (n,); ids without a row are passed over.

        `InvalidArgument`, with nothing changed, for ids out of range.
        """
        array = np.asarray(block_ids)
        ids = _column("block_ids", array, array.size, len(self._position) - 1).astype(np.int64)
        view = self.view
        self._entries -= delete(view.rows, self._position, ids, self._bound)
        view.header[H_ENTRIES] = self._entries

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
        self.view.rows[slots] = rows

    def find(self, namespace: int, hashes: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Block ids int64 (n,) of keys (n, 32) uint8; -1 where missing. Changes nothing."""
        words = key_words(hashes)
        check_namespace(namespace)
        rows = np.empty((len(words), ROW_WORDS), np.uint64)
        search(self.view.rows, words, namespace, self._bound, False, rows)
        ids = (rows[:, W_PLACE] & np.uint64(MASK32)).astype(np.int64)
        return np.where(rows[:, W_CHECK] != 0, ids, -1)

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
        done = made._insert(rows)
        return made, (rows[~done, W_PLACE] & np.uint64(MASK32)).astype(np.uint32)

    def check(self) -> None:
        """Walk all rows; `Corrupted` at the first broken invariant. For tests and debugging."""
        rows = self.view.rows
        live = np.flatnonzero(rows[:, W_CHECK])
        _require(not rows[rows[:, W_CHECK] == 0].any(), "an empty row is not zero")
        _require(bool((checks_of(rows[live]) == rows[live, W_CHECK]).all()), "a check is wrong")
        counts = (len(live), int(self.view.header[H_ENTRIES]), int((self._position >= 0).sum()))
        _require(set(counts) == {self._entries}, f"entries {self._entries}, counted {counts}")
        homes = home_rows(rows[live], self._mask)
        seen: set[tuple[int, ...]] = set()
        for slot, home, row in zip(live.tolist(), homes.tolist(), rows[live].tolist(), strict=True):
            _require(int(self._position[row[W_PLACE] & MASK32]) == slot, "a position is wrong")
            seen.add((*row[:4], row[W_SPACE] >> 32))
            distance = (slot - home) & self._mask
            _require(distance < self._bound, f"row {slot} is past the probe bound")
            between = (home + np.arange(distance)) & self._mask
            _require(bool((rows[between, W_CHECK] != 0).all()), f"gap before {slot}")
        _require(len(seen) == len(live), "a key is in the table twice")

    def _insert(self, rows: Words) -> NDArray[np.bool_]:
        """Adds rows (n, 8), making their checks, as far as they fit; (n,) says which went in."""
        done, view = np.empty(len(rows), np.bool_), self.view
        room = self._limit - self._entries
        self._entries += insert(view.rows, self._position, rows, self._bound, room, done)
        view.header[H_ENTRIES] = self._entries
        return done


def _column(field: str, values: NDArray[np.integer], n: int, most: int) -> Words:
    """Integers (n,) in [0, most] as uint64; `InvalidArgument` otherwise."""
    array = np.asarray(values)
    if array.shape != (n,):
        raise InvalidArgument(field, f"shape {array.shape} is not ({n},)")
    if not n:
        return np.empty(0, np.uint64)
    if array.dtype.kind == "u" and (most + 1) >> (8 * array.itemsize):
        return np.ascontiguousarray(array, np.uint64)  # nothing of this type is out of range
    if array.dtype.kind not in "iu":
        raise InvalidArgument(field, f"dtype {array.dtype} is no integer type")
    if int(array.min()) < 0 or int(array.max()) > most:
        raise InvalidArgument(field, f"a value is outside 0..{most}")
    return np.ascontiguousarray(array, np.uint64)


def _require(truth: bool, message: str) -> None:
    if not truth:
        raise Corrupted(f"index: {message}")
