"""S3-FIFO (Yang et al., SOSP 2023): a small, a main and a ghost queue.

Differences from the paper: the ghost queue is a table of fingerprints with small buckets; the small
queue's 10 % and the length of the ghost queue are of the blocks held, since the pool is counted in
bytes; once hot blocks have left small so that it is below its share, main is looked at next; when
second chances have used half of a call's scan, the rest of it takes evictable blocks whatever their
count, so that a pool of only hot blocks still yields victims in bounded time.
"""

from __future__ import annotations

import numpy as np

from kvstore.eviction.order import (
    MIN_CHUNK,
    NO_IDS,
    Evictable,
    GhostTable,
    IdArray,
    LazyOrder,
    U64Array,
    scan_budget,
    split,
    take,
)

MAX_FREQ = 3
SMALL_SHARE = 10  # the small queue's part of the blocks, as a divisor


class S3Fifo:
    """An `EvictionPolicy`: blocks never read twice leave early, the others circle in main."""

    def __init__(self, max_blocks: int) -> None:
        self._small = LazyOrder(max_blocks)
        self._main = LazyOrder(max_blocks)
        self._cold = LazyOrder(max_blocks)
        self._freq = np.zeros(max_blocks, np.uint8)
        self._fp = np.zeros(max_blocks, np.uint64)
        self._ghost = GhostTable(max_blocks)

    def __len__(self) -> int:
        return len(self._small) + len(self._main) + len(self._cold)

    def admit(self, ids: IdArray, fingerprints: U64Array) -> None:
        """New blocks (uint32 [n], head first) enter small, or main if evicted of late."""
        self.forget(ids)
        seen = self._ghost.take(fingerprints)
        self._freq[ids] = 0
        self._fp[ids] = fingerprints
        self._main.push_back(ids[seen][::-1])
        self._small.push_back(ids[~seen][::-1])
        self._ghost.trim(len(self))

    def touch(self, ids: IdArray) -> None:
        """Blocks read (uint32 [n]): their count grows, once per call, up to 3."""
        ids = ids[self._contains(ids)]
        self._freq[ids] = np.minimum(self._freq[ids] + 1, MAX_FREQ)
        back = ids[self._cold.contains(ids)]
        self._cold.remove(back)
        self._main.push_back(back[::-1])

    def demote(self, ids: IdArray) -> None:
        """Blocks (uint32 [n], head first) go before all others."""
        ids = ids[self._small.contains(ids) | self._main.contains(ids)]
        self._small.remove(ids)
        self._main.remove(ids)
        self._freq[ids] = 0
        self._cold.push_back(ids[::-1])

    def forget(self, ids: IdArray) -> None:
        """Blocks (uint32 [n]) leave the policy, without a ghost."""
        for queue in (self._small, self._main, self._cold):
            queue.remove(ids)

    def victims(self, n: int, evictable: Evictable) -> IdArray:
        """Up to `n` coldest evictable ids (uint32 [<=n]), removed; those of small leave ghosts."""
        budget = scan_budget(n)
        out, looked = take(self._cold, n, budget // 4, evictable)
        chanced, used = self._with_chances(n - out.size, budget // 2, evictable)
        out, looked = np.concatenate((out, chanced)), looked + used
        for queue, share in ((self._small, 2), (self._main, 1)):
            if out.size == n:
                break
            more, used = take(queue, n - out.size, (budget - looked) // share, evictable)
            if queue is self._small:
                self._ghost.put(self._fp[more])
            out, looked = np.concatenate((out, more)), looked + used
        return out

    def spare(self, ids: IdArray) -> None:
        """Victims (uint32 [n], coldest first) stay after all, and go before all others."""
        self._cold.push_back(ids)

    def check(self) -> None:
        """AssertionError unless the queues are sound and share no id."""
        queues = (self._small, self._main, self._cold)
        for queue in queues:
            queue.check()
        ids = np.concatenate([queue.peek_front(len(queue)) for queue in queues])
        if np.unique(ids).size != ids.size:
            raise AssertionError("a block is in two queues")

    def _contains(self, ids: IdArray) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        held = self._small.contains(ids) | self._main.contains(ids) | self._cold.contains(ids)
        return np.asarray(held, np.bool_)

    def _with_chances(self, n: int, budget: int, evictable: Evictable) -> tuple[IdArray, int]:
        """The paper's eviction, in batches: (victims, entries looked at)."""
        out, looked, idle = NO_IDS, 0, 0
        # A full round without a victim or a changed count means that all are in use.
        while out.size < n and looked < budget and idle < len(self._small) + len(self._main):
            from_small = self._small_is_over()
            queue = self._small if from_small else self._main
            ids = queue.peek_front(min(self._batch(from_small, n - out.size), budget - looked))
            hot = self._freq[ids] > (1 if from_small else 0)
            goes = ~hot
            goes[goes] = evictable(ids[goes])
            chosen, rest = split(ids, goes, n - out.size)
            queue.remove(chosen)
            if from_small:
                self._ghost.put(self._fp[chosen])
            moved = rest.size > 0 and self._give_chances(queue, rest, from_small)
            idle = 0 if moved or chosen.size else idle + rest.size
            looked += chosen.size + rest.size
            out = np.concatenate((out, chosen))
        return out, looked

    def _small_is_over(self) -> bool:
        total = len(self._small) + len(self._main)
        return len(self._small) > 0 and (
            len(self._main) == 0 or len(self._small) * SMALL_SHARE >= total
        )

    def _batch(self, from_small: bool, missing: int) -> int:
        """Entries to look at: of small no more than it has above its share."""
        batch = max(missing, MIN_CHUNK)
        if not from_small or len(self._main) == 0:
            return batch
        share = (len(self._small) + len(self._main)) // SMALL_SHARE
        return max(1, min(batch, len(self._small) - share))

    def _give_chances(self, queue: LazyOrder, ids: IdArray, from_small: bool) -> bool:
        """Hot ids go to main, ids in use to the back of their queue; True if any was hot."""
        hot = self._freq[ids] > (1 if from_small else 0)
        warm = ids[hot]
        queue.push_back(ids[~hot])
        if from_small:
            self._small.remove(warm)
            self._freq[warm] = 0
        else:
            self._freq[warm] -= 1
        self._main.push_back(warm)
        return warm.size > 0
