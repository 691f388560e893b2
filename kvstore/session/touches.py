"""Reads that made no call, kept until they are worth one: eviction and counters need them."""

from __future__ import annotations

import threading

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.index.format import ROW_WORDS, Words
from kvstore.index.reader import Lookup

_NOTHING = Lookup(np.empty((0, ROW_WORDS), np.uint64))


class TouchLog:
    """Touches of one session, reported in batches; past the limit they are dropped and counted.

    Thread-safe. The times are seconds of a monotonic clock.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._parts: list[Words] = []
        self._blocks = self._lookups = self._hits = self._cold_hits = 0
        self._since: float | None = None
        self.lost = 0

    def add(self, rows: Words, *, lookups: int, hits: int, now: float, cold_hits: int = 0) -> bool:
        """Notes a read of blocks, by their index rows (n, 8), in chain order; True where a batch
        begins with it.

        lookups, hits: how many keys were asked for and found, cold_hits of them on NVMe; none by
        who did not ask for them.
        """
        n = len(rows)
        with self._lock:
            self._lookups += lookups
            self._hits += hits
            self._cold_hits += cold_hits
            began = self._since is None
            self._since = now if began else self._since
            if self._blocks + n > limits.MAX_TOUCHES_KEPT:
                self.lost += n
            elif n:
                self._parts.append(rows)
                self._blocks += n
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
            cold_hits, self._cold_hits = self._cold_hits, 0
            self._parts, self._blocks, self._lookups, self._hits = [], 0, 0, 0
            self._since = None
        rows = Lookup(np.concatenate(parts)) if parts else _NOTHING
        return c.Touch(
            granules=rows.granules.astype(np.uint32),
            generations=rows.generations,
            lookups=lookups,
            hits=hits,
            cold_hits=cold_hits,
        )
