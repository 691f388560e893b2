"""Least recently used, exact; the tail of a chain before its head."""

from __future__ import annotations

import numpy as np

from kvstore.eviction.order import Evictable, IdArray, LazyOrder, U64Array, scan_budget, take


class Lru:
    """An `EvictionPolicy`: one queue by last use, and one of demoted blocks that goes first."""

    def __init__(self, max_blocks: int) -> None:
        self._warm = LazyOrder(max_blocks)
        self._cold = LazyOrder(max_blocks)

    def __len__(self) -> int:
        return len(self._warm) + len(self._cold)

    def admit(self, ids: IdArray, fingerprints: U64Array) -> None:  # noqa: ARG002
        """New blocks (uint32 [n], head first) are the warmest; fingerprints are not used."""
        self._cold.remove(ids)
        self._warm.push_back(ids[::-1])

    def touch(self, ids: IdArray) -> None:
        """Blocks read (uint32 [n], head first) become the warmest."""
        ids = ids[self._warm.contains(ids) | self._cold.contains(ids)]
        self._cold.remove(ids)
        self._warm.push_back(ids[::-1])

    def demote(self, ids: IdArray) -> None:
        """Blocks (uint32 [n], head first) go before all that are not demoted."""
        ids = ids[self._warm.contains(ids)]
        self._warm.remove(ids)
        self._cold.push_back(ids[::-1])

    def forget(self, ids: IdArray) -> None:
        """Blocks (uint32 [n]) leave the policy."""
        self._warm.remove(ids)
        self._cold.remove(ids)

    def victims(self, n: int, evictable: Evictable) -> IdArray:
        """Up to `n` coldest evictable ids (uint32 [<=n]), removed."""
        budget = scan_budget(n)
        # Half at most for the demoted: were all of them in use, the others must still be reached.
        cold, looked = take(self._cold, n, budget // 2, evictable)
        warm, _ = take(self._warm, n - cold.size, budget - looked, evictable)
        return np.concatenate((cold, warm))

    def spare(self, ids: IdArray) -> None:
        """Victims (uint32 [n], coldest first) stay after all, and go before all others."""
        self._cold.push_back(ids)

    def check(self) -> None:
        """AssertionError unless both queues are sound and share no id."""
        self._warm.check()
        self._cold.check()
        if self._warm.contains(self._cold.peek_front(len(self._cold))).any():
            raise AssertionError("a block is in both queues")
