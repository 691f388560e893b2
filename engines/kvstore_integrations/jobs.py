"""Copies to and from the store, off the engine's scheduling thread."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from kvstore.errors import KVStoreError

R = TypeVar("R")
log = logging.getLogger(__name__)


class Jobs(Generic[R]):
    """Loads on one thread, stores on another, each in order; results wait until they are fetched.

    One thread of each keeps a burst of stores from delaying a load; a single copy uses two
    processors already. most_stores: how many may wait; a store beyond that is dropped, which costs
    a miss some day, where a queue without end would cost memory now.
    """

    def __init__(self, name: str, *, most_stores: int) -> None:
        self._loads = ThreadPoolExecutor(1, f"{name}-load")
        self._stores = ThreadPoolExecutor(1, f"{name}-store")
        self._room = threading.Semaphore(most_stores)  # for stores that wait
        self._under_way: set[Future[None]] = set()
        self._finished: queue.SimpleQueue[tuple[int, R]] = queue.SimpleQueue()

    @property
    def pending(self) -> bool:
        """Whether a job is under way."""
        self._forget_done()
        return bool(self._under_way)

    def load(self, number: int, work: Callable[[], R], *, failed: R) -> None:
        """Starts a load; its result is `failed` where it raises, which is logged."""
        self._start(self._loads, number, work, failed)

    def store(self, number: int, work: Callable[[], R], *, failed: R) -> None:
        """Starts a store, or drops it at once with the result `failed`."""
        if not self._room.acquire(blocking=False):
            self.finish(number, failed)
            return

        def begun() -> R:
            self._room.release()
            return work()

        self._start(self._stores, number, begun, failed)

    def finish(self, number: int, result: R) -> None:
        """A job that needs no work: its result is there at once."""
        self._finished.put((number, result))

    def aside(self, work: Callable[[], object]) -> None:
        """A call that nobody waits for; dropped where many stores wait. A failure is logged."""
        if self._room.acquire(blocking=False):
            self._under_way.add(self._stores.submit(self._aside, work))

    def finished(self, wait_s: float = 0.0) -> list[tuple[int, R]]:
        """The results since the last call, by the jobs' numbers; waits so long for the first."""
        results = []
        with contextlib.suppress(queue.Empty):
            results.append(self._finished.get(wait_s > 0.0, wait_s))
            while True:
                results.append(self._finished.get_nowait())
        return results

    def drain(self, timeout_s: float | None = None) -> None:
        """Waits until all jobs are over, or for so long; their results can be fetched then."""
        wait(self._under_way, timeout_s)
        self._forget_done()

    def close(self) -> None:
        """Ends the threads; jobs that have not begun are dropped, those that have are waited for.

        Whoever waits for one must have fetched it before.
        """
        for pool in (self._loads, self._stores):
            pool.shutdown(wait=True, cancel_futures=True)
        self._under_way.clear()

    # -- inside ------------------------------------------------------------------------

    def _start(
        self, pool: ThreadPoolExecutor, number: int, work: Callable[[], R], failed: R
    ) -> None:
        def run() -> None:
            result = failed
            try:
                result = work()
            except Exception:
                log.exception("a copy to or from the store failed; its blocks count as missing")
            finally:
                self.finish(number, result)

        self._forget_done()
        self._under_way.add(pool.submit(run))

    def _aside(self, work: Callable[[], object]) -> None:
        self._room.release()
        try:
            work()
        except KVStoreError as error:
            log.warning("the store was not told: %s", error)

    def _forget_done(self) -> None:
        self._under_way = {future for future in self._under_way if not future.done()}
