"""A disk in memory that crashes, fails, lies and rots as its seed says.

What is written lies in a volatile cache until a sync. A crash decides for each sector of each
unsynced write, whatever its place in time, whether it is kept, dropped or torn.
"""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument
from kvstore.nvme.disk import check_io, check_range

SECTOR_BYTES = 4096  # the unit that a crash keeps or drops
PIECE_BYTES = 512  # of a sector: what a disk writes at once, so tears lie between them
PIECES = SECTOR_BYTES // PIECE_BYTES
MAX_BYTES = 64 << 20

Bytes = npt.NDArray[np.uint8]
Kind = Literal["read", "write", "sync"]


def aligned(nbytes: int, seed: int | None = None) -> Bytes:
    """A buffer that a disk takes: zeros, or random bytes."""
    made = np.frombuffer(mmap.mmap(-1, max(nbytes, 1)), np.uint8)[:nbytes]
    if seed is not None:
        made[:] = np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)
    return made


class Crashed(BaseException):
    """The power went. No `Exception`, so that nobody handles it; go on with `SimDisk.crash`."""


class Io(NamedTuple):
    """One entry of a trace."""

    kind: Kind
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Fault:
    first: int
    after: int | None  # the last is before this one; None: there is no end to them
    error: int | Literal["short"]
    of: Kind | None

    def hits(self, n: int, kind: Kind) -> bool:
        return (
            n >= self.first and (self.after is None or n < self.after) and self.of in (None, kind)
        )


class SimDisk:
    """`nbytes` zeros. Any number of threads may use it; I/Os are numbered from 1 as they come."""

    def __init__(
        self, nbytes: int, seed: int, *, trace: bool = False, failed_sync_loses: bool = True
    ) -> None:
        """failed_sync_loses: whether what a sync failed to make durable is lost at the next crash,
        though a later sync succeeds, as on Linux; or is tried again by the next sync."""
        assert nbytes % SECTOR_BYTES == 0
        assert 0 < nbytes <= MAX_BYTES
        self.ios = 0
        self.trace: list[Io] | None = [] if trace else None
        self.crashed = False
        self.failed_sync_loses = failed_sync_loses
        self.direct = True
        self.file_bytes = 0
        self._rng = np.random.default_rng(seed)
        self._lock = threading.Lock()
        self._closed = False
        self._content = np.zeros(nbytes, np.uint8)  # what is read
        self._durable = np.zeros(nbytes, np.uint8)  # what is there after a crash
        self._before = np.zeros(nbytes, np.uint8)  # of each sector, until its last write
        self._unsynced: list[tuple[int, Bytes]] = []
        self._faults: list[_Fault] = []
        self._lies: set[int] = set()
        self._crash_at: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that can be read and written."""
        return self._content.size

    # What a disk does.

    def read(self, offset: int, buffers: Sequence[Bytes]) -> None:
        """Fills all `buffers`, or OSError."""
        check_io(self.nbytes, offset, buffers, fills=True)
        nbytes = sum(buffer.nbytes for buffer in buffers)
        with self._lock:
            fault = self._next(Io("read", offset, nbytes))
            if fault != "short" and fault is not None:
                raise _error(fault)
            found = self._content[offset : offset + (self._part(nbytes) if fault else nbytes)]
            at = 0
            for buffer in buffers:
                piece = found[at : at + buffer.nbytes]
                buffer.reshape(-1)[: piece.size] = piece
                at += buffer.nbytes
            if fault:
                raise _error(fault)

    def write(self, offset: int, buffers: Sequence[Bytes]) -> None:
        """Writes all `buffers` to the cache, or OSError."""
        check_io(self.nbytes, offset, buffers)
        data = np.concatenate([np.empty(0, np.uint8), *(b.reshape(-1) for b in buffers)])
        with self._lock:
            try:
                fault = self._next(Io("write", offset, data.size))
            except Crashed:
                if self.ios == self._crash_at:  # the one that the power went in
                    self._write(offset, data, self._part(data.size + PIECE_BYTES))
                raise
            if fault is None and self.ios not in self._lies:
                self._write(offset, data, data.size)
            if fault == "short":
                self._write(offset, data, self._part(data.size))
            if fault is not None:
                raise _error(fault)

    def sync(self) -> None:
        """Makes durable what was written, or OSError: then none of it."""
        with self._lock:
            fault = self._next(Io("sync", 0, 0))
            if fault is None:
                for offset, data in self._unsynced:
                    self._durable[offset : offset + data.size] = data
            if fault is None or self.failed_sync_loses:
                self._unsynced = []
            if fault is not None:
                raise _error(fault)

    def reserve(self, offset: int, nbytes: int) -> None:
        """There is room for all."""
        check_range(self.nbytes, offset, nbytes)

    def resize(self, nbytes: int) -> None:
        """Grows; `InvalidArgument` for fewer bytes."""
        if nbytes < self.nbytes or nbytes % SECTOR_BYTES or nbytes > MAX_BYTES:
            raise InvalidArgument("nvme", f"{self.nbytes} bytes can only grow, not to {nbytes}")
        with self._lock:
            self._resize(nbytes)

    def close(self) -> None:
        """From now on every I/O is OSError."""
        self._closed = True

    # What may go wrong.

    def fail_at(
        self,
        n: int,
        error: int | Literal["short"],
        *,
        times: int | None = 1,
        of: Kind | None = None,
    ) -> None:
        """The I/Os from number `n` on fail, `times` of them or (None) for good.

        error: an errno, with nothing done; "short": EIO with a part done. of: only I/Os of that
        kind fail, the others among those numbers do not.
        """
        after = None if times is None else n + times
        self._faults.append(_Fault(n, after, error, of))

    def heal(self) -> None:
        """No I/O fails or lies any more."""
        self._faults = []
        self._lies = set()

    def lie_at(self, n: int) -> None:
        """If I/O number `n` is a write it succeeds and does nothing: a lost write."""
        self._lies.add(n)

    def crash_at(self, n: int) -> None:
        """I/O number `n` raises `Crashed`, and so do all after it; of a write none, a part or all
        is in the cache by then."""
        self._crash_at = n

    def crash(self, rng: np.random.Generator) -> SimDisk:
        """What is there when the power comes back; healthy, with no I/O counted. Another call
        gives another outcome of the same crash."""
        with self._lock:
            self.crashed = True
            new = SimDisk(self.nbytes, int(rng.integers(1 << 62)), trace=self.trace is not None)
            new.failed_sync_loses = self.failed_sync_loses
            new.file_bytes = self.nbytes
            after = self._durable.copy()
            for offset, data in self._unsynced:
                _survive(after[offset : offset + data.size], data, rng)
            new._content, new._durable, new._before = after, after.copy(), after.copy()
            return new

    def flip_bit(self, rng: np.random.Generator, start: int = 0, stop: int | None = None) -> int:
        """Turns one bit over of the bytes [start, stop); returns the byte's place."""
        at = int(rng.integers(start, self.nbytes if stop is None else stop))
        self._spoil(at, self._content[at : at + 1] ^ np.uint8(1 << int(rng.integers(8))))
        return at

    def zero_sector(self, rng: np.random.Generator, start: int = 0, stop: int | None = None) -> int:
        """Zeros one sector of those in [start, stop); returns its offset."""
        at = self._a_sector(rng, start, stop)
        self._spoil(at, np.zeros(SECTOR_BYTES, np.uint8))
        return at

    def swap_sectors(
        self, rng: np.random.Generator, start: int = 0, stop: int | None = None
    ) -> tuple[int, int]:
        """Each of two sectors in [start, stop) gets the other's bytes, as after misdirected
        writes; returns their offsets."""
        one = other = self._a_sector(rng, start, stop)
        while one == other:
            other = self._a_sector(rng, start, stop)
        held = self._content[one : one + SECTOR_BYTES].copy()
        self._spoil(one, self._content[other : other + SECTOR_BYTES].copy())
        self._spoil(other, held)
        return one, other

    def undo_write(self, offset: int, nbytes: int) -> None:
        """Each sector of the range is as before its last write: that one was lost."""
        check_range(self.nbytes, offset, nbytes)
        self._spoil(offset, self._before[offset : offset + nbytes].copy())

    def truncate(self, nbytes: int) -> None:
        """Cuts the disk off at `nbytes`."""
        assert 0 < nbytes <= self.nbytes
        assert nbytes % SECTOR_BYTES == 0
        with self._lock:
            cut = [(offset, data[: max(0, nbytes - offset)]) for offset, data in self._unsynced]
            self._unsynced = [(offset, data) for offset, data in cut if data.size]
            self._resize(nbytes)

    # How.

    def _next(self, io: Io) -> int | Literal["short"] | None:
        """Counts an I/O; returns how it fails."""
        if self._closed:
            raise _error(errno.EBADF)
        self.ios += 1
        if self.trace is not None:
            self.trace.append(io)
        self.crashed |= self.ios == self._crash_at
        if self.crashed:
            raise Crashed
        return next((f.error for f in self._faults if f.hits(self.ios, io.kind)), None)

    def _write(self, offset: int, data: Bytes, done: int) -> None:
        """The first `done` bytes of a write; a sector of which only a part is done is torn."""
        if not done:
            return
        sectors = -(-done // SECTOR_BYTES) * SECTOR_BYTES
        target = slice(offset, offset + sectors)
        new = data[:sectors].copy()
        new[done:] = self._content[target][done:]
        self._before[target] = self._content[target]
        self._content[target] = new
        self._unsynced.append((offset, new))

    def _part(self, nbytes: int) -> int:
        """Some of `nbytes`, in whole pieces, but not all."""
        return int(self._rng.integers(nbytes // PIECE_BYTES)) * PIECE_BYTES if nbytes else 0

    def _spoil(self, offset: int, data: Bytes) -> None:
        """Puts bytes where they are read, now and after any crash."""
        with self._lock:
            end = offset + data.size
            self._content[offset:end] = data
            self._durable[offset:end] = data
            for start, written in self._unsynced:
                low, high = max(offset, start), min(end, start + written.size)
                if low < high:
                    written[low - start : high - start] = data[low - offset : high - offset]

    def _a_sector(self, rng: np.random.Generator, start: int, stop: int | None) -> int:
        last = (self.nbytes if stop is None else stop) // SECTOR_BYTES
        return int(rng.integers(-(-start // SECTOR_BYTES), last)) * SECTOR_BYTES

    def _resize(self, nbytes: int) -> None:
        for name in ("_content", "_durable", "_before"):
            sized = np.zeros(nbytes, np.uint8)
            old = getattr(self, name)[:nbytes]
            sized[: old.size] = old
            setattr(self, name, sized)


def _survive(target: Bytes, data: Bytes, rng: np.random.Generator) -> None:
    """Modifies `target`, which has the sectors' old bytes, to what a crash leaves of `data`."""
    n = data.size // SECTOR_BYTES
    old = target.reshape(n, PIECES, PIECE_BYTES)
    is_new = np.arange(PIECES) < _new_pieces(n, rng)[:, None]
    old[is_new] = data.reshape(n, PIECES, PIECE_BYTES)[is_new]


def _new_pieces(n: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """How many pieces of each of a write's `n` sectors are new; the first ones of a sector are.

    Were each sector decided by itself only, hardly a large write would be kept or dropped whole.
    """
    match int(rng.integers(4)):
        case 0:
            return np.full(n, PIECES)
        case 1:
            return np.zeros(n, np.int64)
        case 2:  # the write had come so far
            return np.clip(int(rng.integers(n * PIECES + 1)) - np.arange(n) * PIECES, 0, PIECES)
        case _:
            return np.choose(rng.integers(0, 3, n), [0, PIECES, rng.integers(1, PIECES, n)])


def _error(number: int | Literal["short"]) -> OSError:
    number = errno.EIO if number == "short" else number
    return OSError(number, os.strerror(number))
