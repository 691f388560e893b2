"""Reads that made no call, kept until they are worth one: eviction and counters need them."""

from __future__ import annotations

import threading

import numpy as np

from kvstore import commands as c
from kvstore import limits


class TouchLog:
    """Touches of one session, reported in batches; past the limit they are dropped and counted.

    Thread-safe. The times are seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: list[tuple[c.U32, c.U64]] = []
        self._blocks = self._lookups = self._hits = 0
        self._since: float | None = None
        self.lost = 0

    def add(
        self, granules: c.U32, generations: c.U64, *, lookups: int, hits: int, now: float
    ) -> bool:
        """Notes a read of blocks in chain order; True where a batch begins with it.

        lookups, hits: how many keys were asked for and found; none by who did not ask for them.
        """
        with self._lock:
            self._lookups += lookups
            self._hits += hits
            began = self._since is None
            self._since = now if began else self._since
            if self._blocks + len(granules) > limits.MAX_TOUCHES_KEPT:
                self.lost += len(granules)
            elif len(granules):
                self._parts.append((granules, generations))
                self._blocks += len(granules)
            return began

    @property
    def pending(self) -> bool:
        """Whether there is anything to report."""
        return self._since is not None

    @property
    def full(self) -> bool:
        """Whether a batch is full."""
        return self._blocks >= limits.TOUCH_BATCH

    def due(self, now: float) -> bool:
        """Whether it is time to report."""
        since = self._since
        if since is None:
            return False
        return self.full or now - since >= limits.TOUCH_INTERVAL_MS * 1e-3

    def take(self) -> c.Touch | None:
        """Everything noted so far, as one command; None where there is nothing."""
        with self._lock:
            if self._since is None:
                return None
            parts, lookups, hits = self._parts, self._lookups, self._hits
            self._parts, self._blocks, self._lookups, self._hits = [], 0, 0, 0
            self._since = None
        empty = (np.empty(0, np.uint32), np.empty(0, np.uint64))
        granules, generations = zip(*parts or [empty], strict=True)
        return c.Touch(
            granules=np.concatenate(granules),
            generations=np.concatenate(generations),
            lookups=lookups,
            hits=hits,
        )
