"""Tasks of one kind, off the caller's thread; each result is there once."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

R = TypeVar("R")
log = logging.getLogger(__name__)


class Tasks(Generic[R]):
    """Runs tasks in order, on one thread; thread-safe.

    notify: called when a result is there. most: how many may wait; the next fail at once.
    """

    def __init__(self, name: str, notify: Callable[[], None], *, most: int | None = None) -> None:
        self._notify, self._most = notify, most
        self._pool = ThreadPoolExecutor(1, name)
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._waiting = 0
        self._results: dict[int, R] = {}

    def begin(self, work: Callable[[], R], *, failed: R) -> int:
        """Starts a task; its result is `failed` where it raises, which is logged, or where too
        many wait. Returns its number."""
        with self._lock:
            number = next(self._numbers)
            full = self._most is not None and self._waiting >= self._most
            self._waiting += not full
        if full:
            self._end(number, failed)
        else:
            self._pool.submit(self._run, number, work, failed)
        return number

    def aside(self, work: Callable[[], None]) -> None:
        """A call in its turn, whose end nobody waits for."""
        self._pool.submit(self._run_aside, work)

    def take(self, number: int) -> R | None:
        """The task's result, if it is there and was not taken yet."""
        with self._lock:
            return self._results.pop(number, None)

    def take_all(self) -> dict[int, R]:
        """All results that are there and were not taken yet, by the tasks' numbers."""
        with self._lock:
            taken, self._results = self._results, {}
            return taken

    def close(self) -> None:
        """Ends the thread; waits for a task that has begun, the others never end."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    # -- inside ------------------------------------------------------------------------

    def _run(self, number: int, work: Callable[[], R], failed: R) -> None:
        with self._lock:
            self._waiting -= 1
        result = failed
        try:
            result = work()
        except Exception:
            log.exception("a task failed; its objects count as missing")
        finally:
            self._end(number, result)

    def _run_aside(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception:
            log.exception("a task failed")

    def _end(self, number: int, result: R) -> None:
        with self._lock:
            self._results[number] = result
        self._notify()
