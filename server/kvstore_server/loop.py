"""The core process's one event loop: descriptors, timers, and work that other threads hand back."""

from __future__ import annotations

import contextlib
import heapq
import itertools
import os
import selectors
import time
from collections import deque
from collections.abc import Callable

Callback = Callable[[], None]


class Loop:
    """Calls back from one thread. Only `call_soon` and `stop` may be used from others."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self._now_s = now_s
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._timers: list[tuple[float, int, Callback]] = []
        self._order = itertools.count()  # timers of one moment run in the order they were set
        self._soon: deque[Callback] = deque()
        self._stopping = False
        self.watch(self._wake_read, self._drain_wakeups)

    def now_s(self) -> float:
        """Seconds of the loop's clock."""
        return self._now_s()

    def watch(self, fd: int, callback: Callback) -> None:
        """Calls back whenever the descriptor is readable, or its other end is gone."""
        self._selector.register(fd, selectors.EVENT_READ, callback)

    def want_write(self, fd: int, wanted: bool) -> None:
        """Whether to call back also when a watched descriptor takes bytes."""
        key = self._selector.get_key(fd)
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
        if key.events != events:
            self._selector.modify(fd, events, key.data)

    def unwatch(self, fd: int) -> None:
        """Ends a `watch`; the descriptor is still open."""
        self._selector.unregister(fd)

    def call_later(self, delay_s: float, callback: Callback) -> None:
        """Calls back once; cannot be cancelled."""
        heapq.heappush(self._timers, (self._now_s() + delay_s, next(self._order), callback))

    def call_soon(self, callback: Callback) -> None:
        """Calls back from the loop's thread; may be called from any thread."""
        self._soon.append(callback)
        self._wake()

    def run(self) -> None:
        """Turns until `stop`."""
        while not self._stopping:
            self._turn()

    def stop(self) -> None:
        """Ends `run` after the present turn."""
        self._stopping = True
        self._wake()

    def close(self) -> None:
        """Gives the loop's own descriptors back; what it watched stays its owners'."""
        self._selector.close()
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _turn(self) -> None:
        for key, _events in self._selector.select(self._pause_s()):
            # A callback before this one may have ended the watch, and even closed the descriptor.
            if self._selector.get_map().get(key.fd) is key:
                key.data()
        now_s, due = self._now_s(), []
        while self._timers and self._timers[0][0] <= now_s:
            due.append(heapq.heappop(self._timers)[2])
        # Not what these set for at once: it would keep everything else from its turn.
        for callback in due:
            callback()
        # Not what these queue in their turn: descriptors and timers come in between.
        for _ in range(len(self._soon)):
            self._soon.popleft()()

    def _pause_s(self) -> float | None:
        if self._soon:
            return 0.0
        return max(0.0, self._timers[0][0] - self._now_s()) if self._timers else None

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def _drain_wakeups(self) -> None:
        os.read(self._wake_read, 4096)
