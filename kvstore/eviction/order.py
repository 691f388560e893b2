"""What the eviction policies are built on: a queue with lazy deletion, and ghost tables.

Batches are numpy arrays throughout: no Python loop runs per block.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from numba import types

from kvstore import limits
from kvstore.compiled import compiled

IdArray = npt.NDArray[np.uint32]
BoolArray = npt.NDArray[np.bool_]
U64Array = npt.NDArray[np.uint64]
Evictable = Callable[[IdArray], BoolArray]

MIN_CHUNK = 256
MIN_LOG = 1024
NO_IDS: IdArray = np.empty(0, np.uint32)
_MIX = np.uint64(0x9E3779B97F4A7C15)
_WAY_BITS = 2
_WAYS = 1 << _WAY_BITS
_EACH_WAY = np.arange(_WAYS, dtype=np.uint32)


def scan_budget(n: int) -> int:
    """Most entries a call for `n` victims may look at."""
    return 8 * n + limits.MIN_SCAN


def _push(ids: IdArray, log: IdArray, stamp: IdArray, tail: int) -> int:
    added = 0
    for i in range(len(ids)):
        added += stamp[ids[i]] == 0
        log[tail + i] = ids[i]
        stamp[ids[i]] = tail + i
    return added


_IDS = types.uint32[::1]
_append = compiled(
    types.int64(types.Array(types.uint32, 1, "A", readonly=True), _IDS, _IDS, types.int64), _push
)


class LazyOrder:
    """An exact queue of ids below `max_blocks`; an id is in it at most once.

    A log holds the ids as pushed; `stamp[id]` is the one log position that counts, so moving or
    removing an id only changes its stamp. Memory: 12 bytes per block, less what was never used.
    """

    def __init__(self, max_blocks: int) -> None:
        self._max = max_blocks
        self._stamp = np.zeros(max_blocks, np.uint32)  # id -> log position, 0: absent
        self._log = np.empty(max(2 * max_blocks, MIN_LOG) + 1, np.uint32)
        self._head = self._tail = 1
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def contains(self, ids: IdArray) -> BoolArray:
        """Which of `ids` (uint32, any shape) are in the queue: bool, as `ids`."""
        given: BoolArray = self._stamp[ids] > 0
        return given

    def ages(self, ids: IdArray) -> npt.NDArray[np.uint32]:
        """When `ids` (uint32, any shape) came: more is later, 0 is absent; uint32, as `ids`."""
        return self._stamp[ids]

    def push_back(self, ids: IdArray) -> None:
        """Put `ids` (uint32 [n]) last, moving those present; of duplicates the last counts."""
        if ids.size < 2:
            if ids.size:
                self._push_one(int(ids[0]))
            return
        if ids.size > self._max:
            ids = _keep_last(ids)
        if self._tail + ids.size > self._log.size:
            self._compact()
        self._count += _append(ids, self._log, self._stamp, self._tail)
        self._tail += ids.size

    def _push_one(self, block: int) -> None:
        """`push_back` of one id, which arrays of one would only slow down."""
        if self._tail == self._log.size:
            self._compact()
        self._count += int(self._stamp[block] == 0)
        self._log[self._tail] = block
        self._stamp[block] = self._tail
        self._tail += 1

    def remove(self, ids: IdArray) -> None:
        """Take `ids` (uint32 [n]) out; absent ids are ignored."""
        if not ids.size or not self._count:
            return
        present = ids[self._stamp[ids] > 0]
        if present.size > 1:
            present = np.unique(present)
        self._stamp[present] = 0
        self._count -= present.size

    def peek_front(self, k: int) -> IdArray:
        """The first `k` ids (uint32 [<=k]), oldest first; nothing leaves the queue."""
        parts: list[IdArray] = []
        found, at = 0, self._head
        k = min(k, self._count)
        while found < k:
            entries, positions = self._valid(at, at + max(2 * k, MIN_CHUNK))
            if not parts:  # what lies before the first valid entry is dead for good
                self._head = int(positions[0]) if positions.size else at + max(2 * k, MIN_CHUNK)
            if entries.size:
                parts.append(entries[: k - found])
                found += parts[-1].size
            at += max(2 * k, MIN_CHUNK)
        return np.concatenate(parts) if parts else NO_IDS

    def pop_front(self, k: int) -> IdArray:
        """Remove and return the first `k` ids (uint32 [<=k]), oldest first."""
        ids = self.peek_front(k)
        self.remove(ids)
        return ids

    def check(self) -> None:
        """AssertionError unless stamps, log and count agree."""
        entries, positions = self._valid(self._head, self._tail)
        if not (entries.size == self._count == int((self._stamp > 0).sum())):
            raise AssertionError("log, stamps and count of a queue differ")
        if not np.array_equal(self._stamp[entries], positions):
            raise AssertionError("a stamp does not name its log entry")

    def _valid(self, start: int, stop: int) -> tuple[IdArray, npt.NDArray[np.uint32]]:
        stop = min(stop, self._tail)
        start = min(start, stop)
        window = self._log[start:stop]
        positions = np.arange(start, stop, dtype=np.uint32)
        valid = self._stamp[window] == positions
        return window[valid], positions[valid]

    def _compact(self) -> None:
        """Move the live entries to the log's start: at most half of it, so this is rare."""
        entries, _ = self._valid(self._head, self._tail)
        self._log[1 : entries.size + 1] = entries
        self._stamp[entries] = np.arange(1, entries.size + 1, dtype=np.uint32)
        self._head, self._tail = 1, entries.size + 1


def _keep_last(ids: IdArray) -> IdArray:
    """`ids` with only the last of duplicates, in order."""
    _, first = np.unique(ids[::-1], return_index=True)
    return ids[::-1][np.sort(first)][::-1]


def take(order: LazyOrder, n: int, budget: int, evictable: Evictable) -> tuple[IdArray, int]:
    """Take up to `n` evictable ids off the front, looking at no more than `budget` entries.

    Returns (uint32 [<=n] ids removed, entries looked at). Those skipped go to the back: they are
    in use, hence warm, and the next call starts behind them.
    """
    budget = min(budget, len(order))  # no entry is looked at twice
    taken: list[IdArray] = []
    missing, looked = n, 0
    while missing > 0 and looked < budget:
        ids = order.peek_front(min(max(missing, MIN_CHUNK), budget - looked))
        chosen, skipped = split(ids, evictable(ids), missing)
        order.remove(chosen)
        order.push_back(skipped)
        taken.append(chosen)
        missing -= chosen.size
        looked += chosen.size + skipped.size
    return (np.concatenate(taken) if taken else NO_IDS), looked


def split(ids: IdArray, mask: BoolArray, n: int) -> tuple[IdArray, IdArray]:
    """The first `n` ids of the mask, and the others that stand before the last of them."""
    at = np.flatnonzero(mask)[:n]
    end = int(at[-1]) + 1 if at.size == n and n else ids.size
    return ids[at], ids[:end][~mask[:end]]


class GhostTable:
    """Fingerprints of evicted blocks, in the order in which they went.

    A fingerprint has the four slots of its bucket to lie in; a full bucket forgets its oldest, so
    the table may forget early where it holds about as many as it has slots. A false hit needs two
    equal 64-bit fingerprints. Memory: 20 bytes per slot, slots = next power of two >= max_blocks.
    """

    def __init__(self, max_blocks: int) -> None:
        bits = max(4, (max_blocks - 1).bit_length())
        self._shift = np.uint64(64 - bits + _WAY_BITS)
        self._fp = np.zeros(1 << bits, np.uint64)
        self._order = LazyOrder(1 << bits)  # of the slots

    def __len__(self) -> int:
        return len(self._order)

    def put(self, fingerprints: U64Array) -> None:
        """Remember `fingerprints` (uint64 [n]), oldest first."""
        if not fingerprints.size:
            return
        slots = self._slots(fingerprints)
        # Those that share a bucket take its slots in turn.
        by_bucket = np.argsort(slots[:, 0], kind="stable")
        buckets = slots[by_bucket, 0]
        turn = np.empty(buckets.size, np.int64)
        turn[by_bucket] = np.arange(buckets.size) - np.searchsorted(buckets, buckets)
        ways = np.argsort(self._order.ages(slots), axis=1, kind="stable")
        rows = np.arange(buckets.size)
        chosen = slots[rows, ways[rows, turn % _WAYS]]
        self._fp[chosen] = fingerprints
        self._order.push_back(chosen)

    def take(self, fingerprints: U64Array) -> BoolArray:
        """Which of `fingerprints` (uint64 [n]) are ghosts: bool [n]; hits leave the table."""
        slots = self._slots(fingerprints)
        same = (self._fp[slots] == fingerprints[:, None]) & self._order.contains(slots)
        self._order.remove(slots[same])
        hit: BoolArray = same.any(axis=1)
        return hit

    def trim(self, most: int) -> None:
        """Forget the oldest ones beyond `most`."""
        if len(self._order) > most:
            self._order.pop_front(len(self._order) - most)

    def _slots(self, fingerprints: U64Array) -> IdArray:
        """The slots (uint32 [n, 4]) of a fingerprint's bucket."""
        buckets = ((fingerprints * _MIX) >> self._shift).astype(np.uint32)
        return (buckets[:, None] << np.uint32(_WAY_BITS)) + _EACH_WAY
