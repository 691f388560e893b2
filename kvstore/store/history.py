"""Why blocks are gone: a bounded memory of evictions, drops and expiries, for `explain`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.commands import U8, U64, ExplainStatus

_MIX = 0xC2B2AE3D27D4EB4F
_MASK64 = (1 << 64) - 1


class History:
    """A direct-mapped table of fingerprints: a new entry takes the place of an older one.

    Keys are given as (n, 4) uint64 words, with the number of the name that they lie under.
    Memory: 17 bytes an entry, `limits.HISTORY_ENTRIES` of them.
    """

    def __init__(self) -> None:
        self._mask = np.uint64(limits.HISTORY_ENTRIES - 1)
        self._fingerprints = np.zeros(limits.HISTORY_ENTRIES, np.uint64)
        self._status = np.zeros(limits.HISTORY_ENTRIES, np.uint8)
        self._when_ms = np.zeros(limits.HISTORY_ENTRIES, np.uint64)

    def note(self, words: U64, name: int, status: ExplainStatus, now_ms: int) -> None:
        """These keys are gone since now, and why."""
        prints, at = self._find(words, name)
        self._fingerprints[at] = prints
        self._status[at] = status
        self._when_ms[at] = now_ms

    def recall(self, words: U64, name: int) -> tuple[U8, U64]:
        """Status (uint8, 0 for nothing known) and Unix time in ms of each key's last going."""
        prints, at = self._find(words, name)
        known = self._fingerprints[at] == prints
        return (
            np.where(known, self._status[at], np.uint8(0)),
            np.where(known, self._when_ms[at], np.uint64(0)),
        )

    def _find(self, words: U64, name: int) -> tuple[U64, npt.NDArray[np.int64]]:
        # Words 2 and 3, so that the place here does not go with the place in the index.
        prints = (words[:, 2] ^ np.uint64(name * _MIX & _MASK64)) | np.uint64(1)
        return prints, (words[:, 3] & self._mask).astype(np.int64)
