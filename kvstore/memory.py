"""Shared memory: memfds made by the daemon, mapped by its clients. Decides nothing."""

from __future__ import annotations

import fcntl
import mmap
import os

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.index.format import capacity_for, index_bytes
from kvstore.store import StoreMemory

# Python 3.11 does not name this seal; the number is linux/fcntl.h's.
F_SEAL_FUTURE_WRITE = 0x0010
_SIZE_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Arena:
    """One memfd and this process's mapping of it, as a uint8 array."""

    def __init__(self, fd: int, nbytes: int, *, writable: bool) -> None:
        self.fd = fd
        self.nbytes = nbytes
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        self._map = mmap.mmap(fd, nbytes, flags=mmap.MAP_SHARED, prot=protection)
        self._map.madvise(mmap.MADV_DONTFORK)
        self.array: npt.NDArray[np.uint8] = np.frombuffer(self._map, np.uint8)

    @classmethod
    def create(cls, name: str, nbytes: int) -> Arena:
        """A new memfd of `nbytes` that nobody can resize, mapped writable."""
        fd = os.memfd_create(f"kvstore-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, nbytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SIZE_SEALS)
        arena = cls(fd, nbytes, writable=True)
        arena._map.madvise(mmap.MADV_HUGEPAGE)
        return arena

    def forbid_new_writers(self) -> None:
        """From now on only the mappings that exist can write (F_SEAL_FUTURE_WRITE)."""
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, F_SEAL_FUTURE_WRITE)

    def close(self) -> None:
        """Unmaps, unless a view of the memory is still held somewhere: then its end does."""
        self.array = np.empty(0, np.uint8)
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        try:
            self._map.close()
        except BufferError:
            # A view handed out earlier keeps the mapping until it is released; the memory is
            # unmapped when the last reference goes.
            return


class Arenas:
    """The three areas of one trust domain: pool, generations (uint64 a granule), index."""

    def __init__(self, pool: Arena, generations: Arena, index: Arena) -> None:
        self.pool, self.generations, self.index = pool, generations, index

    @classmethod
    def create(cls, pool_bytes: int, max_blocks: int) -> Arenas:
        """Makes them; `InvalidArgument` for a pool that the machine's memory cannot hold."""
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        if pool_bytes > available:
            raise InvalidArgument(
                "dram", f"the pool wants {pool_bytes} bytes, the machine has {available}"
            )
        if pool_bytes < limits.MIN_POOL_BYTES:
            raise InvalidArgument("dram", f"at least {limits.MIN_POOL_BYTES} bytes")
        pool_bytes -= pool_bytes % limits.GRANULE_BYTES
        return cls(
            Arena.create("pool", pool_bytes),
            Arena.create("generations", pool_bytes // limits.GRANULE_BYTES * 8),
            Arena.create("index", index_bytes(capacity_for(max_blocks))),
        )

    def store_memory(self) -> StoreMemory:
        """The arrays that the store decides over."""
        return StoreMemory(
            pool=self.pool.array,
            generations=self.generations.array.view(np.uint64),
            index=self.index.array,
        )

    def close(self) -> None:
        """Closes all three."""
        for arena in (self.pool, self.generations, self.index):
            arena.close()
