"""The time that shells tell the store: Unix milliseconds that never jump back."""

from __future__ import annotations

import time


class Clock:
    """Wall time at the start, and from there on a monotonic clock.

    So that a clock set by hand or by NTP cannot expire blocks early, nor keep them for ever.
    """

    def __init__(self) -> None:
        self._base_s = time.time() - time.monotonic()

    def now_ms(self) -> int:
        """Unix time in milliseconds."""
        return int((self._base_s + time.monotonic()) * 1e3)
