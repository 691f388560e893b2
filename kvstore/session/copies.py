"""Work on two threads, in pieces for which the interpreter's lock is released.

One thread cannot use the memory's bandwidth alone, and more than two bring nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore.streaming import copy_rows

PIECE_BYTES = 1 << 20
GROUP_BYTES = 2 << 20  # of small blocks that are moved in one go
ALONE_BYTES = 768 << 10  # up to here waking the other thread takes longer than it saves

U64 = npt.NDArray[np.uint64]
Piece = tuple[Any, ...]


def groups_of(n: int, nbytes: int) -> list[tuple[int, int]]:
    """The first and the end of each group of rows that are moved in one go, of n of `nbytes`."""
    step = max(1, GROUP_BYTES // nbytes)
    if 2 * step > n and n * nbytes > ALONE_BYTES:
        step = -(-n // 2)  # something for either thread
    return [(at, min(at + step, n)) for at in range(0, n, step)]


def pieces_of(nbytes: int) -> list[tuple[int, int]]:
    """Offsets and sizes of the pieces that so many bytes are moved in."""
    return [(at, min(PIECE_BYTES, nbytes - at)) for at in range(0, nbytes, PIECE_BYTES)]


def copy_in_parallel(
    targets: U64, sources: U64, runs: Sequence[tuple[int, int, int]], end_s: float
) -> int:
    """Copies the runs of rows, in order; returns how many leading rows were whole by `end_s`.

    targets, sources: addresses (n,). runs: offsets at the target and at the source, and lengths.
    """
    groups = groups_of(len(targets), sum(nbytes for _, _, nbytes in runs))
    moves = [
        (targets + np.uint64(to), sources + np.uint64(from_), nbytes) for to, from_, nbytes in runs
    ]
    pieces = [
        (theirs[first:end], ours[first:end], nbytes)
        for first, end in groups
        for theirs, ours, nbytes in moves
    ]
    total = len(targets) * sum(nbytes for _, _, nbytes in runs)
    done = in_parallel(copy_rows, pieces, total, end_s) // len(runs)
    return groups[done - 1][1] if done else 0


class _Helper:
    """The other thread, made when it is first needed; a forked child makes its own."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        os.register_at_fork(after_in_child=self._forget)

    def submit(self, work: Callable[[], None]) -> Future[None]:
        """Starts something there."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "kvstore-copy")
        return self._pool.submit(work)

    def _forget(self) -> None:
        self._pool = None


_helper = _Helper()


def in_parallel(
    work: Callable[..., object],
    pieces: Sequence[Piece],
    nbytes: int,
    end_s: float,
    *,
    alone: bool = False,
) -> int:
    """Calls `work(*piece)` for the pieces in order, on two threads where `nbytes` are worth it.
    alone: on this one, whatever they are.

    The first is always done; none is begun after `end_s` (of `time.monotonic`). Returns how many
    leading ones are done. All work is over when this returns or raises.
    """
    left = iter(pieces)
    if alone or nbytes <= ALONE_BYTES or len(pieces) == 1:
        _drain(work, left, end_s)
    else:
        _drain_by_two(work, left, end_s)
    return len(pieces) - sum(1 for _ in left)


def _drain(work: Callable[..., object], left: Iterator[Piece], end_s: float) -> None:
    # Both threads take from the same iterator, which hands each piece out once.
    for piece in left:
        work(*piece)
        if time.monotonic() > end_s:
            return


def _drain_by_two(work: Callable[..., object], left: Iterator[Piece], end_s: float) -> None:
    other = _helper.submit(lambda: _drain(work, left, end_s))
    try:
        _drain(work, left, end_s)
    except BaseException:
        for _ in left:  # the other thread is to end soon, whatever has happened here
            pass
        raise
    finally:
        _join(other)


def _join(other: Future[None]) -> None:
    """Waits, also through Ctrl-C: nothing may touch a caller's buffers once it has its error."""
    interrupted: KeyboardInterrupt | None = None
    while not other.done():
        try:
            other.exception()
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted:
        raise interrupted
    other.result()
