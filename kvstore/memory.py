"""Shared memory: memfds made by the daemon, mapped by its clients. Decides nothing."""

from __future__ import annotations

import contextlib
import ctypes
import enum
import fcntl
import mmap
import os
import platform
import threading
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.index.boards import BOARDS_BYTES, Boards
from kvstore.store.memory import StoreMemory

# Python 3.11 does not name this seal; the number is linux/fcntl.h's.
F_SEAL_FUTURE_WRITE = 0x0010
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_PREFAULT_BYTES = 64 << 20  # between two looks at whether to stop
_MPOL_BIND = 2
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23  # since Linux 5.14; Python has no names
_MADV_COLLAPSE = 25  # since Linux 6.1
_MAP_FIXED = 0x10
_MAP_FAILED = ctypes.c_void_p(-1).value
_HUGE_BYTES = 2 << 20  # of a transparent huge page on x86-64, and on others with pages of 4 KiB
_POPULATE_BYTES = 1 << 20  # at a time: meanwhile the process can map nothing else
_LOOK_S, _MOST_LOOKS = 0.01, 500  # at what another process has taken, while it takes no more
# mbind has no wrapper in the C library; these are its numbers in the kernel's tables.
_SYS_MBIND = {"x86_64": 237, "aarch64": 235}
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_long),
)


class HugePages(enum.StrEnum):
    """Whether a pool lies on huge pages."""

    AUTO = "auto"  # reserved ones if there are enough, transparent ones where the kernel has them
    OFF = "off"
    REQUIRE = "require"  # reserved ones, or refuse to start


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where a pool's memory comes from. numa_node: None for wherever it is first touched."""

    huge_pages: HugePages = HugePages.AUTO
    numa_node: int | None = None


class Arena:
    """One memfd and this process's mapping of it, as a uint8 array."""

    def __init__(self, fd: int, nbytes: int, *, writable: bool) -> None:
        """Takes the descriptor over, also when mapping it fails."""
        self.fd = fd
        self.nbytes = nbytes
        self._writable = writable
        self._huge = False  # whether transparent huge pages are wanted
        try:
            self._map, first = _mapped(fd, nbytes, writable=writable)
        except BaseException:
            os.close(fd)
            raise
        self._map.madvise(mmap.MADV_DONTFORK)
        self._forked = False
        _arenas.add(self)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8, nbytes, first)

    @classmethod
    def create(
        cls,
        name: str,
        nbytes: int,
        *,
        reserved_huge_pages: bool = False,
        transparent_huge_pages: bool = True,
    ) -> Arena:
        """A new zeroed memfd of `nbytes` that nobody can resize, mapped writable.

        OSError where reserved huge pages are asked for and there are not enough.
        """
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        flags |= os.MFD_HUGETLB if reserved_huge_pages else 0
        fd = os.memfd_create(f"kvstore-{name}", flags)
        try:
            os.ftruncate(fd, nbytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
        except BaseException:
            os.close(fd)
            raise
        arena = cls(fd, nbytes, writable=True)
        arena._huge = transparent_huge_pages and not reserved_huge_pages
        if arena._huge:
            with contextlib.suppress(OSError):  # not every kernel has transparent ones
                arena._map.madvise(mmap.MADV_HUGEPAGE)
        return arena

    def forbid_new_writers(self) -> None:
        """From now on only the mappings that exist can write (F_SEAL_FUTURE_WRITE)."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)

    def bind(self, numa_node: int) -> None:
        """Takes the pages that are not there yet from one NUMA node; OSError if it cannot."""
        number = _SYS_MBIND.get(platform.machine())
        if number is None:
            raise OSError(f"no NUMA placement on {platform.machine()}")
        mask = (ctypes.c_ulong * 16)()
        mask[numa_node // 64] = 1 << numa_node % 64
        address = ctypes.c_void_p(self.array.ctypes.data)
        size = ctypes.c_ulong(self.nbytes)
        if _libc.syscall(number, address, size, _MPOL_BIND, mask, ctypes.c_ulong(1024), 0):
            raise OSError(ctypes.get_errno(), f"NUMA node {numa_node} gives no memory")

    def prefault(self, stop: threading.Event) -> None:
        """Makes the kernel find all pages now, not at the first put; returns early on `stop`.

        Huge ones where transparent ones are wanted and to be had: a disk takes them in fewer
        pieces, and processes map them with less work. OSError where the memory is not there. Lets
        other threads run meanwhile.
        """
        for start in range(0, self.nbytes, _PREFAULT_BYTES):
            if stop.is_set():
                return
            size = min(_PREFAULT_BYTES, self.nbytes - start)
            if self._huge:
                self._gather(start, size)
            os.posix_fallocate(self.fd, start, size)

    def _gather(self, start: int, nbytes: int) -> None:
        """Huge pages, if they are to be had; `start` is a multiple of their size.

        By asking for them, as shared memory gets none by itself where `shmem_enabled` is `never`,
        which is what systems come with. Of each one page has to be there before.
        """
        nbytes -= nbytes % _HUGE_BYTES
        for at in range(start, start + nbytes, _HUGE_BYTES):
            os.posix_fallocate(self.fd, at, mmap.PAGESIZE)
        self._advise(start, nbytes, _MADV_COLLAPSE)

    def _advise(self, start: int, nbytes: int, advice: int) -> bool:
        """Whether the kernel could follow it. Lets other threads run, as Python's own does not."""
        held = self.array  # so that it stays mapped meanwhile
        if not held.size:
            return False
        address = ctypes.c_void_p(int(held.__array_interface__["data"][0]) + start)
        return not _libc.madvise(address, ctypes.c_size_t(nbytes), advice)

    def populate(self, stop: threading.Event, *, behind: bool = False) -> None:
        """Maps all pages now, not one by one as they are first touched; returns early on `stop`.

        Where the memory is not there yet it is taken; behind: by another process's `prefault`, for
        which this waits, so that the pages are those that it wants. A kernel that cannot do it is
        no error, nor is a process that stops to take more.
        """
        advice = _MADV_POPULATE_WRITE if self._writable else _MADV_POPULATE_READ
        for at in range(0, self.nbytes, _POPULATE_BYTES):
            size = min(_POPULATE_BYTES, self.nbytes - at)
            if behind and not self._await_taken(at + size, stop):
                return
            if stop.is_set() or not self._advise(at, size, advice):
                return

    def _await_taken(self, nbytes: int, stop: threading.Event) -> bool:
        """Whether so much of the memory is there in the end; waits as long as it becomes more."""
        before, looks = 0, 0
        while (there := os.fstat(self.fd).st_blocks * 512) < nbytes:
            looks = looks + 1 if there == before else 0
            if looks > _MOST_LOOKS or stop.wait(_LOOK_S):
                return False
            before = there
        return True

    def close(self) -> None:
        """Unmaps, unless a view of the memory is still held somewhere: then its end does."""
        self.array = np.empty(0, np.uint8)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self._forked:
            return
        try:
            self._map.close()
        except BufferError:
            # A view handed out earlier keeps the mapping until it is released; the memory is
            # unmapped when the last reference goes.
            return

    def after_fork(self) -> None:
        """In the child, which has not got the mapping: its addresses may be anything else's by the
        time that it would be unmapped, so it never is."""
        self._forked = True
        _never_unmap(self._map)


_arenas: weakref.WeakSet[Arena] = weakref.WeakSet()


def _in_child() -> None:
    for arena in list(_arenas):
        arena.after_fork()


os.register_at_fork(after_in_child=_in_child)


def _mapped(fd: int, nbytes: int, *, writable: bool) -> tuple[mmap.mmap, int]:
    """A mapping that holds a shared one of a memfd, and the offset at which that begins.

    Its address is a multiple of a huge page, without which no process maps one as a whole.
    """
    protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
    plain = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=protection)
    # Reserved ones have an alignment of their own, which the kernel has seen to.
    small = nbytes < _HUGE_BYTES or os.fstatvfs(fd).f_bsize > mmap.PAGESIZE
    if small or not _address_of(plain) % _HUGE_BYTES:
        return plain, 0
    try:
        mapped = _mapped_aligned(fd, nbytes, protection)
    except OSError:  # there is no room for it
        return plain, 0
    plain.close()
    return mapped


def _mapped_aligned(fd: int, nbytes: int, protection: int) -> tuple[mmap.mmap, int]:
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    room = mmap.mmap(-1, nbytes + _HUGE_BYTES, flags=private, prot=protection)
    first = _address_of(room)
    skip = -first % _HUGE_BYTES
    shared = mmap.MAP_SHARED | _MAP_FIXED
    if _libc.mmap(first + skip, nbytes, protection, shared, fd, 0) == _MAP_FAILED:
        number = ctypes.get_errno()
        # Some of the room may be unmapped, and by now be another thread's.
        _never_unmap(room)
        raise OSError(number, os.strerror(number))
    return room, skip


def _address_of(mapped: mmap.mmap) -> int:
    return int(np.frombuffer(mapped, np.uint8).__array_interface__["data"][0])


def _never_unmap(mapped: mmap.mmap) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(mapped))


def open_sealed(fd: int, nbytes: int) -> Arena:
    """Maps a client's memfd for reading; takes the descriptor over.

    `InvalidArgument` unless it is a memfd that cannot shrink, on ordinary pages: else the client
    could cut it off under our feet, or the reserved pages might run out, and the read would
    kill us.
    """
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        ordinary = os.fstatvfs(fd).f_bsize == mmap.PAGESIZE
        size = os.fstat(fd).st_size
    except OSError:
        sealed, ordinary, size = 0, False, 0
    if not sealed or not ordinary or not 0 < nbytes <= size:
        os.close(fd)
        raise InvalidArgument("staging", f"expected a memfd of {nbytes} bytes, sealed to its size")
    return Arena(fd, nbytes, writable=False)


class Arenas:
    """The areas of one trust domain: pool, generations (uint64 a granule), the index now, and
    boards where others may write the pool.

    The index may move: `new_index` makes the next one, and the memory of the last is given back
    as soon as nobody here looks at it.
    """

    def __init__(self, pool_bytes: int, placement: Placement, *, pool_writable: bool) -> None:
        """pool_writable: whether other processes may map the pool for writing.

        `InvalidArgument` for a size out of range or a placement that the machine cannot give.
        """
        if pool_bytes < limits.MIN_POOL_BYTES:
            raise InvalidArgument("dram", f"at least {limits.MIN_POOL_BYTES} bytes")
        self.pool = _make_pool(pool_bytes - pool_bytes % limits.GRANULE_BYTES, placement)
        self.index: Arena | None = None
        self._stop = threading.Event()
        self._prefault: threading.Thread | None = None
        self.prefaulted = False  # or about to be
        try:
            size = self.pool.nbytes // limits.GRANULE_BYTES * 8
            self.generations = Arena.create("generations", size)
        except BaseException:
            self.pool.close()
            raise
        self.generations.forbid_new_writers()
        self.boards: Arena | None = None
        self._boards: Boards | None = None
        if not pool_writable:
            self.pool.forbid_new_writers()
            return
        try:
            self.boards = Arena.create("boards", BOARDS_BYTES)
            self._boards = Boards.create(self.boards.array)
        except BaseException:
            self.close()
            raise

    def store_memory(self) -> StoreMemory:
        """What the store decides over."""
        return StoreMemory(
            pool=self.pool.array,
            generations=self.generations.array.view(np.uint64),
            new_index=self._new_index,
            boards=self._boards,
        )

    def prefault_in_background(self) -> None:
        """Starts a thread that touches the pool's pages; `close` ends it."""
        self.prefaulted = True
        self._prefault = threading.Thread(
            target=self.pool.prefault, args=(self._stop,), name="kvstore-prefault", daemon=True
        )
        self._prefault.start()

    def close(self) -> None:
        """Gives everything back."""
        self._stop.set()
        if self._prefault:
            self._prefault.join()
        for arena in (self.pool, self.generations, self.index, self.boards):
            if arena:
                arena.close()

    def _new_index(self, nbytes: int) -> npt.NDArray[np.uint8]:
        made = Arena.create("index", nbytes)
        made.forbid_new_writers()
        # Only now: where there is no memory for the new one, new clients still need the old.
        if self.index:
            self.index.close()
        self.index = made
        return made.array


def _make_pool(nbytes: int, placement: Placement) -> Arena:
    _check_node(placement.numa_node)
    pool = None
    if placement.huge_pages is not HugePages.OFF:
        pool = _on_reserved_pages(nbytes)
    if pool is None and placement.huge_pages is HugePages.REQUIRE:
        raise InvalidArgument(
            "huge_pages",
            f"fewer reserved huge pages are free than {nbytes} bytes take: raise vm.nr_hugepages",
        )
    if pool is None:
        wanted = placement.huge_pages is not HugePages.OFF
        pool = Arena.create("pool", nbytes, transparent_huge_pages=wanted)
    if placement.numa_node is not None:
        try:
            pool.bind(placement.numa_node)
        except OSError as error:
            pool.close()
            raise InvalidArgument("numa_node", str(error)) from error
    return pool


def _on_reserved_pages(nbytes: int) -> Arena | None:
    try:
        return Arena.create("pool", nbytes - nbytes % _huge_page_bytes(), reserved_huge_pages=True)
    except (OSError, ValueError):  # none are reserved, or too few
        return None


def _huge_page_bytes() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Hugepagesize:"):
            return int(line.split()[1]) << 10
    return 2 << 20


def _check_node(node: int | None) -> None:
    if node is not None and not Path(f"/sys/devices/system/node/node{node}").is_dir():
        raise InvalidArgument("numa_node", f"this machine has no NUMA node {node}")
