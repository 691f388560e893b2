"""Which blocks on NVMe are looked at, and when, so that damage is found before they are wanted."""

from __future__ import annotations

import numpy as np

from kvstore import limits
from kvstore.nvme.volume import Health, Use, UseState
from kvstore.store.blocks import IdArray
from kvstore.store.fetching import Fetcher
from kvstore.store.shelf import Shelf


class Scrubber:
    """Goes through segment after segment, in the order of their use, round and round.

    bytes_per_s: its share of the disks; 0: none.
    """

    def __init__(self, shelf: Shelf, fetcher: Fetcher, *, bytes_per_s: int) -> None:
        self._shelf, self._fetcher, self._bytes_per_s = shelf, fetcher, bytes_per_s
        self._use: Use | None = None
        self._left: IdArray = np.empty(0, np.uint32)
        self._at_ms = shelf.now_ms

    @property
    def due_ms(self) -> int | None:
        """When there is something to look at, if nothing else happens."""
        if not self._bytes_per_s:
            return None
        if self._fetcher.scrubs or self._fetcher.bytes_coming:
            return None  # one at a time, and reads that somebody waits for come first
        return self._at_ms if any(v.uses for v in self._shelf.places.volumes) else None

    def look(self) -> None:
        """Looks at some blocks, segment after segment, as its share of the disks allows."""
        shelf = self._shelf
        due_ms = self.due_ms
        if due_ms is None or shelf.now_ms < due_ms:
            return
        if not len(self._left):
            self._use = self._next()
            if self._use is None:
                self._at_ms = shelf.now_ms + 60_000
                return
            self._left = shelf.places.in_use(self._use)
        use = self._use
        assert use is not None
        mine = np.isin(self._left, shelf.places.in_use(use))
        left = self._left[mine]
        size = use.slot_granules * limits.GRANULE_BYTES
        n = max(1, limits.NVME_READ_BYTES // size)
        some, self._left = left[:n], left[n:]
        self._at_ms = shelf.now_ms + max(
            limits.NVME_SCRUB_MS, len(some) * size * 1000 // self._bytes_per_s
        )
        if len(some) and use.state is UseState.WHOLE:
            namespace = shelf.namespaces.get(int(shelf.blocks.namespace[some[0]]))
            self._fetcher.scrub(namespace, shelf.places.volumes[use.volume], some)

    def _next(self) -> Use | None:
        """The whole segment behind the last one, in the order of their use; then the first."""
        uses = [
            use
            for volume in self._shelf.places.volumes
            if volume.health is not Health.OFF
            for use in volume.uses.values()
            if use.state is UseState.WHOLE
        ]
        last = self._use
        behind = [use for use in uses if last is None or _order(use) > _order(last)]
        return min(behind or uses, key=_order, default=None)


def _order(use: Use) -> tuple[int, int]:
    """Of all volumes' uses, no two of which have the same."""
    return use.born, use.volume
