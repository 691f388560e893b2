"""A file's bytes by NIXL's POSIX plugin, over the system's asynchronous I/O (Linux AIO).

What NIXL 1.5.1 was seen to do decides how it is used here:

- A transfer says that it failed only when none of its parts moves any more; one that is released
  before goes on, and its bytes land. So each is waited for as long as the disk takes, as with
  preadv: whoever waits for the store has a deadline there.
- Over io_uring that is not so: where the kernel takes no more parts, a transfer fails at once while
  those before still land, and destroying the agent does not wait for them. So it is not offered.
- An agent has one queue, and posts under its lock. So it carries out one call at a time, and there
  are several.
- Parts that a queue has no room for stay in it, and are carried out with a later transfer. So no
  transfer has more than fit.
- A part is one range of memory, not several as in preadv: neighbours are merged.
- It does not say what went wrong: every failure is EIO, also of a disk that is full.
"""

from __future__ import annotations

import errno
import os
import queue
import secrets
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np

from kvstore.errors import Unavailable
from kvstore.nixl_binding import Bindings, Native
from kvstore.nvme.disk import Buffer
from kvstore.nvme.format import aligned
from kvstore.transfer.base import U64, Pieces
from kvstore.transfer.nixl import load
from kvstore.transfer.registered import checked, merged

_AGENTS = 4  # of one disk: as many calls at once; more bring nothing to calls this large
_PARTS = 1024  # of one transfer
_PART_BYTES = 1 << 30  # the system moves a little less than 2 GiB at once
_IN_FLIGHT = 64  # NIXL hands no more to the system at one time
# Between two looks: a part of the time that it takes already, from the least to the most.
_NAP_S, _NAP_SHARE, _MOST_NAP_S = 20e-6, 1 / 8, 1e-3
_ALL_MEMORY = 1 << 56  # bytes of addresses that a process may have
_ANY_SIZE = 1 << 62  # of a file
_TRIED_BYTES = 1 << 16


class NixlEngine:
    """Reads and writes one file: see `kvstore.nvme.disk.Engine`."""

    def __init__(self, fd: int) -> None:
        """`Unavailable` where NIXL or its plugin is not here, or the system has no queue left."""
        bindings = load()
        self._free: queue.SimpleQueue[_Agent] = queue.SimpleQueue()
        try:
            for _ in range(_AGENTS):
                self._free.put(_Agent(bindings, fd))
        except Exception as error:  # of NIXL's own kinds, which only its bindings name
            raise Unavailable(
                f"NIXL's POSIX plugin does not start ({error}): use the engine pread, or raise"
                " fs.aio-max-nr"
            ) from error

    def read(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `Engine`."""
        self._move(offset, buffers, reads=True)

    def write(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """See `Engine`."""
        self._move(offset, buffers, reads=False)

    def close(self) -> None:
        """See `Engine`."""
        for _ in range(_AGENTS):
            self._free.get().destroy()

    def _move(self, offset: int, buffers: Sequence[Buffer], *, reads: bool) -> None:
        agent = self._free.get()
        try:
            for pieces in _transfers(offset, buffers):
                agent.move(pieces, reads=reads)
        finally:
            self._free.put(agent)


def why_not() -> str:
    """What keeps this engine from being used on this host, as a file in the folder for temporary
    files tells; empty where nothing does."""
    written, found = aligned(_TRIED_BYTES), aligned(_TRIED_BYTES)
    written[:] = np.arange(_TRIED_BYTES, dtype=np.uint64).astype(np.uint8)
    try:
        with tempfile.TemporaryFile() as file:
            engine = NixlEngine(file.fileno())
            try:
                engine.write(0, [written])
                engine.read(0, [found])
            finally:
                engine.close()
    except (Unavailable, OSError) as error:
        return str(error)
    return "" if np.array_equal(written, found) else "it reads other bytes than it wrote"


class _Agent:
    """One agent of NIXL, with a queue of its own. For one thread at a time."""

    def __init__(self, bindings: Bindings, fd: int) -> None:
        self._bindings, self._fd = bindings, fd
        self._name = f"kvstore-nvme-{secrets.token_hex(8)}"
        self._backends: list[int] = []
        self._agent: Native | None = self._made()

    def move(self, pieces: Pieces, *, reads: bool) -> None:
        """Moves the pieces between memory and the file, where `remote` are offsets. OSError."""
        operation = self._bindings.NIXL_READ if reads else self._bindings.NIXL_WRITE
        memory = self._list(self._bindings.DRAM_SEG, pieces.local, pieces.nbytes, 0)
        file = self._list(self._bindings.FILE_SEG, pieces.remote, pieces.nbytes, self._fd)
        try:
            handle = self._own().createXferReq(
                operation, memory, file, self._name, b"", self._backends
            )
            self._wait(handle)
            self._own().releaseXferReq(handle)
        except Exception as error:  # of NIXL's own kinds, which only its bindings name
            self.destroy()
            raise OSError(errno.EIO, f"{os.strerror(errno.EIO)} ({error})") from error
        except BaseException:  # a signal's, in the main thread: the transfer still goes on
            self.destroy()
            raise

    def destroy(self) -> None:
        """Ends it. When this returns nothing moves any more, so it may last as long as the disk
        takes. A later `move` begins with a new one, which has no part of an older one left."""
        self._agent = None  # the last reference, on which NIXL waits

    def _wait(self, handle: int) -> None:
        status, begin = self._own().postXferReq(handle, b""), time.monotonic()
        while status == self._bindings.NIXL_IN_PROG:
            nap_s = _NAP_SHARE * (time.monotonic() - begin)
            time.sleep(min(max(nap_s, _NAP_S), _MOST_NAP_S))
            status = self._own().getXferStatus(handle)
        if status != self._bindings.NIXL_SUCCESS:
            raise OSError(errno.EIO, f"NIXL's transfer ended as {status}")

    def _own(self) -> Native:
        if self._agent is None:
            self._agent = self._made()
        return self._agent

    def _made(self) -> Native:
        config = self._bindings.nixlAgentConfig()
        config.useProgThread = config.useListenThread = False
        agent = self._bindings.nixlAgent(self._name, config)
        sizes = {"ios_pool_size": str(_PARTS), "kernel_queue_size": str(_IN_FLIGHT)}
        self._backends = [agent.createBackend("POSIX", {"use_aio": "true", **sizes})]
        # It pins nothing and maps nothing, so that all memory may be registered, once.
        for kind, row in (
            (self._bindings.DRAM_SEG, (0, _ALL_MEMORY, 0, "")),
            (self._bindings.FILE_SEG, (0, _ANY_SIZE, self._fd, "")),
        ):
            agent.registerMem(self._bindings.nixlRegDList(kind, [row]), self._backends)
        return agent

    def _list(self, kind: object, starts: U64, nbytes: U64, device: int) -> object:
        rows = np.full((len(starts), 3), device, np.uint64)
        rows[:, 0], rows[:, 1] = starts, nbytes
        return self._bindings.nixlXferDList(kind, rows)


def _transfers(offset: int, buffers: Sequence[Buffer]) -> Iterator[Pieces]:
    """What goes where, in the fewest pieces, as many at a time as a transfer takes."""
    nbytes = np.array([buffer.nbytes for buffer in buffers], np.uint64)
    memory = [buffer.__array_interface__["data"][0] for buffer in buffers]
    ends = np.uint64(offset) + np.cumsum(nbytes, dtype=np.uint64)
    whole = merged(checked(Pieces(np.array(memory, np.uint64), ends - nbytes, nbytes)))
    pieces = _cut(whole)
    for first in range(0, len(pieces.nbytes), _PARTS):
        some = slice(first, first + _PARTS)
        yield Pieces(pieces.local[some], pieces.remote[some], pieces.nbytes[some])


def _cut(pieces: Pieces) -> Pieces:
    """The same bytes in pieces of at most `_PART_BYTES`."""
    counts = -(-pieces.nbytes.astype(np.int64) // _PART_BYTES)
    if (counts <= 1).all():
        return pieces
    which = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)
    skips = (number * _PART_BYTES).astype(np.uint64)
    rest = np.minimum(pieces.nbytes[which] - skips, np.uint64(_PART_BYTES))
    return Pieces(pieces.local[which] + skips, pieces.remote[which] + skips, rest)
