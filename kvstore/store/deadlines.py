"""What is due when: batches of blocks in one ordered queue."""

from __future__ import annotations

import enum
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from sortedcontainers import SortedDict

from kvstore import limits

IdArray = npt.NDArray[np.uint32]
Times = npt.NDArray[np.int64]
_RESERVE = 1024


class Due(enum.IntEnum):
    """What a deadline of a block is about."""

    EXPIRY = 0  # its time to live is over
    PIN = 1  # it may be evicted again
    TURN = 2  # the next turn of its session did not come
    PARTS = 3  # the ranks that still owe cells did not come


class Deadlines:
    """Times of blocks, one of each kind a block, rounded up to `limits.TICK_MS`.

    `times[kind]` (int64, by block id, 0: none) is what counts; the queue only says where to look.
    A time that was changed leaves its old entry in the queue, which is passed over when it comes
    up; when more are old than not, the queue is made anew, so its size is bounded.
    """

    def __init__(self, max_blocks: int) -> None:
        self.times: tuple[Times, ...] = tuple(np.zeros(max_blocks, np.int64) for _ in Due)
        self._queue: SortedDict = SortedDict()  # (at_ms, kind) -> list of id arrays
        self._queued = self._active = 0

    @property
    def next_ms(self) -> int | None:
        """When something may be due; None: never."""
        return int(self._queue.peekitem(0)[0][0]) if self._queue else None

    def set(self, kind: Due, ids: IdArray, at_ms: int) -> None:
        """Gives blocks, no id twice, a deadline in place of the one they had."""
        at_ms = -(-at_ms // limits.TICK_MS) * limits.TICK_MS
        changed = ids[self.times[kind][ids] != at_ms]
        if not len(changed):
            return
        self._active += int(np.count_nonzero(self.times[kind][changed] == 0))
        self.times[kind][changed] = at_ms
        self._queue.setdefault((at_ms, int(kind)), []).append(changed)
        self._queued += len(changed)
        if self._queued > 2 * self._active + _RESERVE:
            self._rebuild()

    def clear(self, kind: Due, ids: IdArray) -> None:
        """Takes the deadline of these blocks back, where they have one; an id may come twice."""
        times = self.times[kind]
        had = ids[times[ids] != 0]
        if len(had):  # memory that was never written costs nothing
            had = np.unique(had)
            times[had] = 0
            self._active -= len(had)

    def has(self, kind: Due, ids: IdArray) -> npt.NDArray[np.bool_]:
        """Which of the blocks have a deadline: bool (n,)."""
        given: npt.NDArray[np.bool_] = self.times[kind][ids] != 0
        return given

    def take(self, now_ms: int) -> Iterator[tuple[Due, IdArray]]:
        """The blocks whose time has come, in the order of time.

        They have that deadline no more when they are given out; one that was cleared meanwhile
        does not come.
        """
        while self._queue and self._queue.peekitem(0)[0][0] <= now_ms:
            (at_ms, kind), batches = self._queue.popitem(0)
            ids = np.unique(np.concatenate(batches))
            self._queued -= sum(len(batch) for batch in batches)
            ids = ids[self.times[kind][ids] == at_ms]
            if len(ids):
                self.times[kind][ids] = 0
                self._active -= len(ids)
                yield Due(kind), ids

    def check(self) -> None:
        """AssertionError unless each deadline is in the queue."""
        assert self._active == sum(int(np.count_nonzero(times)) for times in self.times)
        for kind in Due:
            for block in np.flatnonzero(self.times[kind]):
                batches = self._queue[int(self.times[kind][block]), int(kind)]
                assert any(block in batch for batch in batches), "a deadline is not queued"

    def _rebuild(self) -> None:
        """Leaves out what is old; looks at the queue alone, however many blocks there may be."""
        queue = SortedDict()
        for (at_ms, kind), batches in self._queue.items():
            ids = np.unique(np.concatenate(batches))
            ids = ids[self.times[kind][ids] == at_ms]
            if len(ids):
                queue[at_ms, kind] = [ids]
        self._queue, self._queued = queue, self._active
