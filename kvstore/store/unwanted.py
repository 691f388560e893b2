"""What was dropped before all was found that lies on NVMe."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.commands import U8
from kvstore.errors import ResourceExhausted

Lineage = tuple[str, bytes]  # name and layout


class Unwanted:
    """Keys, and whole lineages, of which no block is to be shown that is found later."""

    def __init__(self) -> None:
        self._keys: dict[Lineage, set[bytes]] = {}  # by lineage
        self._lineages: set[Lineage] = set()
        self._n = 0

    def add(self, lineage: Lineage, hashes: U8) -> None:
        """Keys (n, 32) of a lineage; `ResourceExhausted` past the limit."""
        if self._n + len(hashes) > limits.MAX_EARLY_DROPS:
            raise ResourceExhausted(
                f"{limits.MAX_EARLY_DROPS} keys were dropped while NVMe is being read",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        self._n += len(hashes)
        self._keys.setdefault(lineage, set()).update(row.tobytes() for row in hashes)

    def add_all(self, lineage: Lineage) -> None:
        """All of a lineage."""
        self._lineages.add(lineage)

    def has_all(self, lineage: Lineage) -> bool:
        """Whether all of a lineage was dropped."""
        return lineage in self._lineages

    def among(self, lineage: Lineage, hashes: U8) -> npt.NDArray[np.bool_]:
        """Which of some keys (n, 32) were dropped: bool (n,)."""
        dropped = self._keys.get(lineage)
        if not dropped:
            return np.zeros(len(hashes), np.bool_)
        return np.array([row.tobytes() in dropped for row in hashes], np.bool_)
