"""A volume's bytes: one file or block device, read and written in whole granules.

Knows nothing of what lies on it, keeps no copy of it and retries nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument, Unavailable
from kvstore.nvme.format import Disk

# Of offsets, sizes and addresses: no disk that we know asks O_DIRECT for more.
ALIGN_BYTES = 4096
_MAX_BUFFERS = 1024  # of one preadv or pwritev: UIO_MAXIOV of linux/uio.h
_NOT_OFFERED = (errno.EINVAL, errno.EOPNOTSUPP)  # of a file system that lacks what is asked

Buffer = npt.NDArray[np.uint8]


class Engine(Protocol):
    """How the bytes of one open file are moved. Any number of threads may call at once, with ranges
    and buffers that were checked; `close` is for when all are done."""

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fills all buffers. When it returns, or raises OSError, nothing moves any more."""
        ...

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Writes all buffers, and is as done with them as `read` is."""
        ...

    def close(self) -> None:
        """Ends it, and leaves the file open."""
        ...


class Pread:
    """The system's preadv and pwritev, each call on the thread that makes it."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `Engine`."""
        _move(os.preadv, self._fd, offset, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `Engine`."""
        _move(os.pwritev, self._fd, offset, buffers)

    def close(self) -> None:
        """See `Engine`."""


MakeEngine = Callable[[int], Engine]  # of a descriptor that outlives it


class FileDisk:
    """A file or block device under an exclusive lock. Any number of threads read and write at
    once, and others run meanwhile; `close` is for when all of them are done."""

    def __init__(
        self,
        fd: int,
        path: Path,
        *,
        nbytes: int,
        file_bytes: int,
        direct: bool,
        engine: MakeEngine = Pread,
    ) -> None:
        """Takes the descriptor over; `open` makes it."""
        self._engine = engine(fd)
        self._fd = fd
        self._nbytes = nbytes
        self.path = path  # of the file or device itself
        self.file_bytes = file_bytes  # as it was found; 0: it was made just now
        self.direct = direct  # past the page cache, or else through it

    @classmethod
    def open(
        cls,
        path: Path,
        nbytes: int,
        *,
        name: str,
        direct: bool = True,
        engine: MakeEngine = Pread,
    ) -> FileDisk:
        """Opens the file `name` in the directory `path`, or the block device `path`, and locks it.

        A new file gets `nbytes`, all zeros, and takes room on the disk as it is written. A file
        that was there keeps its size, whatever `nbytes` is: see `file_bytes` and `resize`. A
        device is used up to `nbytes`. direct: whether to try O_DIRECT. engine: moves the bytes.

        `InvalidArgument` that says what to change, also where there is not enough room;
        `Unavailable` while another one uses the volume, or where the engine cannot be had.
        """
        if nbytes <= 0 or nbytes % ALIGN_BYTES:
            raise InvalidArgument(
                "nvme", f"the size must be a multiple of {ALIGN_BYTES} above 0, got {nbytes}"
            )
        try:
            if stat.S_ISBLK(path.stat().st_mode):
                return cls._open_device(path, nbytes, direct, engine)
            return cls._open_file(path, name, nbytes, direct, engine)
        except OSError as error:
            raise InvalidArgument("nvme", _advice(error, path)) from error

    @classmethod
    def _open_device(cls, path: Path, nbytes: int, direct: bool, engine: MakeEngine) -> FileDisk:
        # O_EXCL, so that a mounted device is refused, and one that is open by another name.
        with _locked(path, os.O_RDWR | os.O_EXCL) as fd:
            found = os.lseek(fd, 0, os.SEEK_END)
            if found < nbytes:
                raise InvalidArgument(
                    "nvme", f"{path} has {found} bytes, not {nbytes}: ask for no more"
                )
            _show_what_is_durable(fd)
            took = direct and _go_direct(fd)
            return cls(fd, path, nbytes=nbytes, file_bytes=found, direct=took, engine=engine)

    @classmethod
    def _open_file(
        cls, folder: Path, name: str, nbytes: int, direct: bool, engine: MakeEngine
    ) -> FileDisk:
        if not folder.is_dir():
            raise InvalidArgument(
                "nvme", f"{folder} is neither a directory nor a block device: name one"
            )
        if Path(name).name != name:
            raise InvalidArgument("nvme", f"the file's name must be without a path, got {name!r}")
        path = folder / name
        if not path.exists() or not path.stat().st_size:
            _check_room(folder, nbytes)
        with _locked(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW) as fd:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise InvalidArgument("nvme", f"{path} is no regular file: move it away")
            if not found.st_size:  # new, or its maker died before this
                _grow(fd, nbytes)
                _sync_folder(folder)
            _show_what_is_durable(fd)
            size = (found.st_size or nbytes) // ALIGN_BYTES * ALIGN_BYTES
            took = direct and _go_direct(fd)
            return cls(fd, path, nbytes=size, file_bytes=found.st_size, direct=took, engine=engine)

    @property
    def nbytes(self) -> int:
        """Bytes that can be read and written; a multiple of `ALIGN_BYTES`."""
        return self._nbytes

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Fills all `buffers` from the bytes at `offset`. On OSError they hold anything."""
        check_io(self._nbytes, offset, buffers, fills=True)
        self._open_fd()
        self._engine.read(offset, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Writes all `buffers` to `offset`, durable after the next `sync`. On OSError the range
        holds anything."""
        check_io(self._nbytes, offset, buffers)
        self._open_fd()
        self._engine.write(offset, buffers)

    def sync(self) -> None:
        """Makes durable what was written before. After OSError some of it may be lost for good,
        though a later call succeeds."""
        os.fdatasync(self._open_fd())

    def reserve(self, offset: int, nbytes: int) -> None:
        """Takes the range's room on the disk now: OSError (ENOSPC) where it is full.

        A file system that cannot is no error: there the writes find out. A device has it all.
        """
        check_range(self._nbytes, offset, nbytes)
        try:
            os.posix_fallocate(self._open_fd(), offset, nbytes)
        except OSError as error:
            if error.errno not in (*_NOT_OFFERED, errno.ENODEV):
                raise

    def resize(self, nbytes: int) -> None:
        """Grows the volume; the new bytes are zeros.

        `InvalidArgument` for fewer bytes than it has, or more than there is room for.
        """
        if nbytes < self._nbytes or nbytes % ALIGN_BYTES:
            raise InvalidArgument(
                "nvme",
                f"{self.path} has {self._nbytes} bytes and can only grow, by whole {ALIGN_BYTES},"
                f" not to {nbytes}: remove it to start a smaller one",
            )
        try:
            self._resize(nbytes)
        except OSError as error:
            raise InvalidArgument("nvme", _advice(error, self.path)) from error
        self._nbytes = nbytes

    def _resize(self, nbytes: int) -> None:
        found = os.fstat(self._open_fd())
        if not stat.S_ISBLK(found.st_mode):
            _check_room(self.path.parent, nbytes - found.st_blocks * 512)  # it may have holes
            _grow(self._fd, nbytes)
        elif nbytes > self.file_bytes:
            raise InvalidArgument(
                "nvme", f"{self.path} has {self.file_bytes} bytes, not {nbytes}: ask for no more"
            )

    def close(self) -> None:
        """Gives the lock back; what was not synced may be lost. A second call does nothing."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._engine.close()
            os.close(fd)

    def _open_fd(self) -> int:
        if self._fd < 0:
            raise OSError(errno.EBADF, f"{self.path} is closed")
        return self._fd


class WaryDisk:
    """A disk on which nothing counts as synced any more, once a sync has failed.

    The system tells of what was lost only one of those who sync at the time, and nobody who does
    later; here they all hear of it, whatever order they are told in.
    """

    def __init__(self, disk: Disk) -> None:
        self._disk = disk
        self._syncs = threading.Lock()
        self._failed: OSError | None = None

    @property
    def nbytes(self) -> int:
        """See `Disk.nbytes`."""
        return self._disk.nbytes

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `Disk.read`."""
        self._disk.read(offset, buffers)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `Disk.write`."""
        self._disk.write(offset, buffers)

    def sync(self) -> None:
        """See `Disk.sync`; after the first OSError there is nothing else."""
        with self._syncs:
            if self._failed is not None:
                raise OSError(self._failed.errno, f"a sync has failed: {self._failed.strerror}")
            try:
                self._disk.sync()
            except OSError as error:
                self._failed = error
                raise


def check_range(disk_bytes: int, offset: int, nbytes: int) -> None:
    """`InvalidArgument` unless both are aligned; OSError (EIO) unless the range is on the disk."""
    if offset < 0 or nbytes < 0 or offset % ALIGN_BYTES or nbytes % ALIGN_BYTES:
        raise InvalidArgument(
            "nvme", f"{nbytes} bytes at {offset} are not in whole {ALIGN_BYTES} bytes"
        )
    if offset + nbytes > disk_bytes:
        raise OSError(errno.EIO, f"{nbytes} bytes at {offset} are past the end, {disk_bytes}")


def check_io(
    disk_bytes: int, offset: int, buffers: Sequence[Buffer], *, fills: bool = False
) -> None:
    """What every disk checks before it reads (`fills`) or writes; errors as `check_range`."""
    nbytes = 0
    for buffer in buffers:
        flags = buffer.flags
        address: int = buffer.__array_interface__["data"][0]
        if buffer.dtype != np.uint8 or not flags.c_contiguous or (fills and not flags.writeable):
            raise InvalidArgument("nvme", "a buffer is not plain bytes, or not to be written to")
        if buffer.nbytes % ALIGN_BYTES or (address % ALIGN_BYTES and buffer.nbytes):
            raise InvalidArgument(
                "nvme",
                f"a buffer of {buffer.nbytes} bytes at {address:#x} is not in whole"
                f" {ALIGN_BYTES} bytes",
            )
        nbytes += buffer.nbytes
    check_range(disk_bytes, offset, nbytes)


def _move(
    call: Callable[[int, Sequence[memoryview], int], int],
    fd: int,
    offset: int,
    buffers: Sequence[Buffer],
) -> None:
    """Calls preadv or pwritev until all is through. Python itself calls again after a signal."""
    left = [buffer.data.cast("B") for buffer in buffers if buffer.nbytes]
    at = 0  # of the first that is not through
    while at < len(left):
        moved = call(fd, left[at : at + _MAX_BUFFERS], offset)
        if moved <= 0:
            raise OSError(errno.EIO, f"the file ends at {offset}")
        offset += moved
        while at < len(left) and moved >= left[at].nbytes:
            moved -= left[at].nbytes
            at += 1
        if moved:
            left[at] = left[at][moved:]


@contextlib.contextmanager
def _locked(path: Path, flags: int) -> Iterator[int]:
    """Opens `path` and locks it; the descriptor is closed if the body raises."""
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Unavailable(f"{path} is mounted or in use: unmount it or name another") from error
        raise
    try:
        _lock(fd, path)
        yield fd
    except BaseException:
        os.close(fd)
        raise


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Unavailable(
            f"{path} is in use by another daemon: stop that one, or name another directory"
        ) from error


def _go_direct(fd: int) -> bool:
    """Sets O_DIRECT if the file system has it, and reads that way too."""
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        # Some take the flag and then no read, or only larger ones.
        with mmap.mmap(-1, ALIGN_BYTES) as page:
            os.preadv(fd, [page], 0)
    except OSError as error:
        if error.errno not in _NOT_OFFERED:
            raise
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return False
    return True


def _check_room(folder: Path, nbytes: int) -> None:
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    if free < nbytes:
        raise InvalidArgument(
            "nvme", f"{folder} has room for {free} bytes, not {nbytes}: free some, or ask for less"
        )


def _grow(fd: int, nbytes: int) -> None:
    if os.fstat(fd).st_size < nbytes:  # else it would cut off a last part of a granule
        os.ftruncate(fd, nbytes)
    os.fsync(fd)


def _show_what_is_durable(fd: int) -> None:
    """From here on reads give nothing that a power cut would take. After a sync that failed, in an
    earlier life, the system may still have pages that it takes for written and that are nowhere."""
    os.fdatasync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def _sync_folder(folder: Path) -> None:
    """So that a new file is still there after a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _advice(error: OSError, path: Path) -> str:
    advice = _ADVICE.get(error.errno or 0, "cannot be used: name another directory")
    return f"{error.filename or path} {advice} ({error.strerror})"


_ADVICE = {
    errno.ENOENT: "is not there: make the directory, or name another",
    errno.ENOTDIR: "has a file where a directory should be: name another",
    errno.EISDIR: "is a directory where the volume's file should be: move it away",
    errno.ELOOP: "is a symbolic link where the volume's file should be: name its directory",
    errno.EACCES: "is closed to this user: give it the right to read and write there",
    errno.EPERM: "is closed to this user: give it the right to read and write there",
    errno.EROFS: "is on a read-only file system: mount it for writing, or name another directory",
    errno.ENOSPC: "is on a full file system: free some room, or name another directory",
    errno.EDQUOT: "is over this user's quota: raise it, or ask for less",
    errno.EFBIG: "cannot be so large on its file system: ask for less",
}
