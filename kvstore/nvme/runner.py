"""Carries out a store's operations on threads, and tells the store what came of them."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import numpy as np
import numpy.typing as npt

from kvstore.errors import KVStoreError
from kvstore.nvme.opening import Opened
from kvstore.nvme.ops import CheckBlocks, Op, Outcome, ReadBlocks
from kvstore.nvme.perform import perform
from kvstore.nvme.recovery import RecoveredSegment, recover, survey
from kvstore.nvme.volume import Health
from kvstore.store import Store

# More bring nothing to one disk with calls this large, but no header is to wait for a whole batch.
_READERS, _WRITERS = 4, 6
_FLUSH_S = 10.0  # for what waits at the end
_AHEAD = 4  # recovered segments that wait for the store
log = logging.getLogger(__name__)
Soon = Callable[[Callable[[], None]], None]


def go_first() -> None:
    """Gives this thread the usual policy, where who starts it has the batch one: when a disk is
    done with it, who computes meanwhile is to make way, so that the disk has more to do soon."""
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_BATCH:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


class Runner:
    """The threads of one store. All of its methods are called by the store's thread.

    soon: has something done by the store's thread; may be called from any. now_ms: the time as the
    store is told it. after: called there after each change, to deliver answers.
    """

    def __init__(
        self,
        store: Store,
        opened: Opened,
        pool: npt.NDArray[np.uint8],
        *,
        soon: Soon,
        now_ms: Callable[[], int],
        after: Callable[[], None],
    ) -> None:
        self._store, self._opened, self._pool = store, opened, pool
        self._soon, self._now_ms, self._after = soon, now_ms, after
        self._disks = [volume.disk for volume in opened.volumes]
        self._stop = threading.Event()
        self._running: set[Future[Outcome]] = set()
        self._room = threading.Semaphore(_AHEAD)
        self._health = [Health.OK for _ in opened.volumes]
        self._readers = ThreadPoolExecutor(_READERS, "kvstore-nvme-read", go_first)
        self._writers = ThreadPoolExecutor(_WRITERS, "kvstore-nvme-write", go_first)
        self._recoveries = ThreadPoolExecutor(max(1, len(opened.volumes)), "kvstore-recover")

    def start(self) -> None:
        """Begins to find what the volumes hold."""
        for number in range(len(self._opened.volumes)):
            self._recoveries.submit(self._recover, number)

    def pump(self) -> None:
        """Begins what the store wants done."""
        for op in self._store.nvme.take_ops():
            self._begin(op)

    def close(self) -> None:
        """Waits for what has begun, writes what waits to be written, and closes the disks."""
        self._stop.set()
        self._room.release(_AHEAD + 1)
        self._recoveries.shutdown(wait=True)
        self._flush(time.monotonic() + _FLUSH_S)
        self._readers.shutdown(wait=True)
        self._writers.shutdown(wait=True)
        self._opened.close()

    def _begin(self, op: Op) -> None:
        done: Future[Outcome] = Future()
        self._running.add(done)
        threads = self._readers if isinstance(op, ReadBlocks | CheckBlocks) else self._writers
        threads.submit(self._perform, op, done)

    def _flush(self, end_s: float) -> None:
        """What was worth writing is written, and so are the books of what is forgotten."""
        nvme = self._store.nvme
        nvme.flush()
        while True:
            self.pump()
            if not self._running or time.monotonic() > end_s:
                break
            done, _ = wait(self._running, timeout=1.0, return_when=FIRST_COMPLETED)
            for future in done:
                self._running.discard(future)
                self._store.hear(future.result(), self._now_ms())

    # -- on the threads ----------------------------------------------------------------

    def _perform(self, op: Op, done: Future[Outcome]) -> None:
        # Here, and not as a callback of the future: that may run at once in the store's thread,
        # which holds the lock that `soon` may want.
        try:
            done.set_result(perform(op, self._disks, self._pool))
        except BaseException as error:
            done.set_exception(error)
        self._soon(lambda: self._hear(done))

    def _recover(self, number: int) -> None:
        """Reads one volume; what it holds goes to the store piece by piece."""
        opened = self._opened.volumes[number]
        error = ""
        try:
            found = survey(opened.disk, opened.superblock, stop=self._stop.is_set)
            if found is None:
                return
            self._soon(lambda: self._store.nvme.found(number, found))
            for segment in recover(
                opened.disk, opened.superblock, stop=self._stop.is_set, found=found
            ):
                self._hand_over(number, segment)
            for problem in found.problems:
                log.warning("segment %d is lost: %s", problem.segment, problem.error)
        except (OSError, KVStoreError) as problem:
            error = f"its log cannot be read: {problem}"
        except Exception:
            log.exception("recovery failed")
            error = "recovery failed, see the log"
        if not self._stop.is_set():
            self._soon(lambda: self._recovered(number, error))

    def _hand_over(self, number: int, segment: RecoveredSegment) -> None:
        self._room.acquire()

        def adopt() -> None:
            self._room.release()
            if not self._stop.is_set():
                self._store.nvme.adopt(number, segment)

        if not self._stop.is_set():
            self._soon(adopt)

    # -- on the store's ----------------------------------------------------------------

    def _hear(self, done: Future[Outcome]) -> None:
        if self._stop.is_set():
            return
        self._running.discard(done)
        self._store.hear(done.result(), self._now_ms())
        self._note_health()
        self._after()

    def _recovered(self, number: int, error: str) -> None:
        if self._stop.is_set():
            return
        self._store.nvme.recovered(number, error)
        stats = self._store.stats()
        log.info("recovered %d blocks from NVMe", stats.nvme_blocks)
        self._note_health()
        self._after()

    def _note_health(self) -> None:
        for number, volume in enumerate(self._store.nvme.volumes):
            if volume.health is not self._health[number]:
                self._health[number] = volume.health
                what = "is written no more" if volume.health is Health.DEGRADED else "is given up"
                log.error("NVMe volume %d %s: %s", number, what, volume.why)
