"""ARC (Megiddo and Modha, FAST 2003): recency and frequency, balanced by ghosts.

Differences from the paper: the ghost lists are tables of fingerprints with small buckets, that of a
list T as long as c - |T| at most; c is the number of blocks held when space was last asked for,
since the pool is counted in bytes; and space is made before the target moves, not after it.
"""

from __future__ import annotations

import numpy as np

from kvstore.eviction.order import (
    NO_IDS,
    Evictable,
    GhostTable,
    IdArray,
    LazyOrder,
    U64Array,
    scan_budget,
    take,
)


class Arc:
    """An `EvictionPolicy`: T1 holds blocks seen once, T2 those seen again; p is T1's target."""

    def __init__(self, max_blocks: int) -> None:
        self._t1 = LazyOrder(max_blocks)
        self._t2 = LazyOrder(max_blocks)
        self._cold = LazyOrder(max_blocks)
        self._b1 = GhostTable(max_blocks)
        self._b2 = GhostTable(max_blocks)
        self._fp = np.zeros(max_blocks, np.uint64)
        self._capacity = 1
        self._target = 0.0

    def __len__(self) -> int:
        return len(self._t1) + len(self._t2) + len(self._cold)

    @property
    def target(self) -> float:
        """The target size of T1 in blocks (`p` in the paper)."""
        return self._target

    def admit(self, ids: IdArray, fingerprints: U64Array) -> None:
        """New blocks (uint32 [n], head first) enter T1, or T2 if a ghost knows them."""
        self.forget(ids)
        self._fp[ids] = fingerprints
        seen = self._adapt(fingerprints)
        self._t2.push_back(ids[seen][::-1])
        self._t1.push_back(ids[~seen][::-1])
        self._b1.trim(max(0, self._capacity - len(self._t1)))
        self._b2.trim(max(0, self._capacity - len(self._t2)))

    def touch(self, ids: IdArray) -> None:
        """Blocks read (uint32 [n], head first) become the warmest of T2."""
        held = self._t1.contains(ids) | self._t2.contains(ids) | self._cold.contains(ids)
        ids = ids[held]
        self._t1.remove(ids)
        self._cold.remove(ids)
        self._t2.push_back(ids[::-1])

    def demote(self, ids: IdArray) -> None:
        """Blocks (uint32 [n], head first) go before all others."""
        ids = ids[self._t1.contains(ids) | self._t2.contains(ids)]
        self._t1.remove(ids)
        self._t2.remove(ids)
        self._cold.push_back(ids[::-1])

    def forget(self, ids: IdArray) -> None:
        """Blocks (uint32 [n]) leave the policy, without a ghost."""
        for queue in (self._t1, self._t2, self._cold):
            queue.remove(ids)

    def victims(self, n: int, evictable: Evictable) -> IdArray:
        """Up to `n` coldest evictable ids (uint32 [<=n]), removed; they leave ghosts.

        Demoted ones leave none: their going says nothing about the balance of T1 and T2.
        """
        self._capacity = max(1, len(self))
        self._target = min(self._target, float(self._capacity))
        budget = scan_budget(n)
        out, looked = take(self._cold, n, budget // 4, evictable)
        above = max(0, len(self._t1) - int(self._target))
        # T1 down to its target, then T2, then T1 again when T2 had not enough.
        for queue, ghosts, most in (
            (self._t1, self._b1, above),
            (self._t2, self._b2, n),
            (self._t1, self._b1, n),
        ):
            wanted = min(n - out.size, most)
            share = (budget - looked) if most == n and queue is self._t1 else (budget - looked) // 2
            ids, used = take(queue, wanted, share, evictable) if wanted > 0 else (NO_IDS, 0)
            ghosts.put(self._fp[ids])
            out, looked = np.concatenate((out, ids)), looked + used
        return out

    def spare(self, ids: IdArray) -> None:
        """Victims (uint32 [n], coldest first) stay after all, and go before all others."""
        self._cold.push_back(ids)

    def check(self) -> None:
        """AssertionError unless the queues are sound and share no id, and the target fits."""
        queues = (self._t1, self._t2, self._cold)
        for queue in queues:
            queue.check()
        ids = np.concatenate([queue.peek_front(len(queue)) for queue in queues])
        if np.unique(ids).size != ids.size:
            raise AssertionError("a block is in two queues")
        if not 0 <= self._target <= self._capacity:
            raise AssertionError("the target is outside 0..capacity")

    def _adapt(self, fingerprints: U64Array) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Move the target by the ghosts hit; bool [n]: which blocks a ghost knew."""
        size1, size2 = max(1, len(self._b1)), max(1, len(self._b2))
        hit1, hit2 = self._b1.take(fingerprints), self._b2.take(fingerprints)
        up = int(hit1.sum()) * max(1.0, size2 / size1)
        down = int((hit2 & ~hit1).sum()) * max(1.0, size1 / size2)
        self._target = min(max(self._target + up - down, 0.0), float(self._capacity))
        return np.asarray(hit1 | hit2, np.bool_)
