"""Copies and hashes on two threads, in pieces for which the interpreter's lock is released.

One thread cannot use the memory's bandwidth alone, and more than two bring nothing. What is hashed
is hashed piece by piece while it is still in the cache.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

PIECE_BYTES = 1 << 20
GROUP_BYTES = 2 << 20  # of small blocks that are copied in one go
HASHED_PIECE_BYTES = 256 << 10  # small enough for a core's own cache
ALONE_BYTES = 768 << 10  # up to here waking the other thread takes longer than it saves

Piece = tuple[Any, ...]
Rows = tuple[int, int, int]  # how many, and the bytes from one to the next at target and source


def move(target: int, source: int, nbytes: int) -> None:
    """Copies between two addresses, which must hold that many bytes."""
    ctypes.memmove(target, source, nbytes)


def move_rows(target: int, source: int, nbytes: int, rows: Rows) -> None:
    """Copies rows of `nbytes` in one go: each by itself would ask for the interpreter's lock, which
    the other thread may hold."""
    count, target_step, source_step = rows
    if count == 1:
        ctypes.memmove(target, source, nbytes)
    else:
        np.copyto(
            _rows_at(target, (count, nbytes), target_step),
            _rows_at(source, (count, nbytes), source_step),
        )


def row_groups(
    targets: Sequence[int], sources: Sequence[int], nbytes: int
) -> list[tuple[int, int, int, Rows]]:
    """Arguments of `move_rows` that together copy `nbytes` from each source to its target, in
    order; as many rows at once as lie evenly and make no more than a group."""
    groups, most = [], max(1, GROUP_BYTES // nbytes)
    n, first = len(sources), 0
    while first < n:
        end, target, source = first + 1, targets[first], sources[first]
        step = (targets[end] - target, sources[end] - source) if end < n else (0, 0)
        while end < min(n, first + most) and step == (
            targets[end] - targets[end - 1],
            sources[end] - sources[end - 1],
        ):
            end += 1
        groups.append((target, source, nbytes, (end - first, *step)))
        first = end
    return groups


class _Bytes:
    """What tells numpy of bytes at an address."""

    __slots__ = ("__array_interface__",)

    def __init__(self, interface: dict[str, object]) -> None:
        self.__array_interface__ = interface


def _rows_at(address: int, shape: tuple[int, int], step: int) -> npt.NDArray[np.uint8]:
    """Rows of bytes at an address, which must stay mapped."""
    face = {"version": 3, "data": (address, False), "typestr": "|u1"}
    rows: npt.NDArray[np.uint8] = np.asarray(_Bytes({**face, "shape": shape, "strides": (step, 1)}))
    return rows


def move_and_hash(target: int, source: int, nbytes: int, arrived: memoryview) -> int:
    """Copies, and returns the xxh3_64 of what arrived; `arrived` shows the target's bytes."""
    if nbytes <= 2 * HASHED_PIECE_BYTES:
        ctypes.memmove(target, source, nbytes)
        return xxhash.xxh3_64_intdigest(arrived)
    digest = xxhash.xxh3_64()
    for at in range(0, nbytes, HASHED_PIECE_BYTES):
        end = min(at + HASHED_PIECE_BYTES, nbytes)
        ctypes.memmove(target + at, source + at, end - at)
        digest.update(arrived[at:end])
    return digest.intdigest()


def pieces_of(nbytes: int) -> list[tuple[int, int]]:
    """Offsets and sizes of the pieces that so many bytes are moved in."""
    return [(at, min(PIECE_BYTES, nbytes - at)) for at in range(0, nbytes, PIECE_BYTES)]


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
    work: Callable[..., object], pieces: Sequence[Piece], nbytes: int, end_s: float
) -> int:
    """Calls `work(*piece)` for the pieces in order, on two threads where `nbytes` are worth it.

    The first is always done; none is begun after `end_s` (of `time.monotonic`). Returns how many
    leading ones are done. All work is over when this returns or raises.
    """
    left = iter(pieces)
    if nbytes <= ALONE_BYTES or len(pieces) == 1:
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
