"""Transfer between processes of one host and user: each maps the other's memory, and copies itself.

The passive side does nothing: it hands its memfds over once. So its death in the midst of a copy is
harmless (the memory stays as long as somebody maps it), and a call that was not over by then fails:
a read that returns was over while the other process, and what it leased for it, was still there.

What cannot be had is to stop a writer from outside. Once an agent is closed nobody maps its memory
any more, but who has mapped it may still write to it, so it must never hold anything else again.
`share` can hand a memory over for reading alone; that it is not opened for writing anyway rests on
the other process, which is the same user's.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from kvstore import limits
from kvstore.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ProtocolError,
    ResourceExhausted,
    Unavailable,
)
from kvstore.memory import F_SEAL_FUTURE_WRITE, Arena
from kvstore.session.copies import GROUP_BYTES, PIECE_BYTES, in_parallel, pieces_of
from kvstore.streaming import copy_rows
from kvstore.transfer import description as descriptions
from kvstore.transfer.base import U64, Arrived, Bytes1D, Memory, Pieces, TransferFailed
from kvstore.transfer.handover import SECRET_BYTES, TOKEN_BYTES, Door, Handed, ask, is_over
from kvstore.transfer.registered import Region, Regions, Registered, checked

KIND = "shm"
_BODY = struct.Struct(
    f"<16s{TOKEN_BYTES}s{SECRET_BYTES}s"
)  # the host's boot, the socket, the secret
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_NO_WRITES = fcntl.F_SEAL_WRITE | F_SEAL_FUTURE_WRITE


def boot_id() -> bytes:
    """What tells this host, since its last start, from all others (16 bytes); `Unavailable`."""
    try:
        return uuid.UUID(_BOOT_ID.read_text().strip()).bytes
    except (OSError, ValueError) as error:
        raise Unavailable(f"{_BOOT_ID} does not say which host this is: {error}") from None


class ShmAgent:
    """An agent over shared memory: see `kvstore.transfer.base.Agent`; `share` takes the place of
    `register`. `Unavailable` where this host cannot be told from others."""

    kind = KIND

    def __init__(self) -> None:
        self._boot = boot_id()
        self._registered = Registered()
        self._lock = threading.Lock()
        self._fixed = self._closed = False
        self._memories: list[Handed] = []  # until the door has them
        self._door: Door | None = None
        self._remotes: set[ShmRemote] = set()

    def share(self, fd: int, memory: Bytes1D, *, writable: bool = True) -> None:
        """Lets connected processes map a memfd, which is mapped here, from its first byte on, as
        `memory`. The descriptor and the mapping stay the caller's. writable: whether they may write
        to it; then it must not be used for anything once the agent is closed.

        `InvalidArgument` for a memfd that can shrink; else as `register`.
        """
        with self._lock:
            if self._fixed or self._closed:
                raise InvalidArgument("memory", "is shared before describe and connect only")
            if len(self._memories) == limits.MAX_SHARED_MEMORIES:
                message = f"an agent shares at most {limits.MAX_SHARED_MEMORIES} memories"
                raise ResourceExhausted(message, retry_after_ms=limits.RETRY_AFTER_MS)
            if not _lasts(fd, memory.nbytes):
                raise InvalidArgument("memory", "must be a memfd that is sealed against shrinking")
            self._registered.add(memory)
            address = int(memory.__array_interface__["data"][0])
            mode = os.O_RDWR if writable else os.O_RDONLY
            handed = os.open(f"/proc/self/fd/{fd}", mode | os.O_CLOEXEC)
            self._memories.append(Handed(address, memory.nbytes, handed))

    def register(self, memory: Memory) -> None:
        """Never: only memory that another process can map is of use here."""
        del memory
        raise TransferFailed("an agent over shared memory takes shared memory only")

    def describe(self) -> bytes:
        """See `Agent`. From now on a thread hands the memory to those who have the description."""
        with self._lock:
            self._usable()
            if self._door is None:
                memories, self._memories = self._memories, []
                self._door = Door(memories)
            body = _BODY.pack(self._boot, self._door.token, self._door.secret)
            return descriptions.pack(KIND, body)

    def connect(self, description: bytes, timeout_s: float) -> ShmRemote:
        """See `Agent`. `TransferFailed` for a process of another host, network namespace or user,
        and for memory that might be cut off while it is mapped."""
        body = descriptions.unpack(KIND, description)
        if len(body) != _BODY.size:
            raise ProtocolError("an agent's description is no place of shared memory")
        boot, token, secret = _BODY.unpack(body)
        with self._lock:
            self._usable()
        if boot != self._boot:
            raise TransferFailed("the other process is on another host")
        sock, memories = ask(token, secret, min(timeout_s, limits.SHM_HELLO_S))
        try:
            remote = ShmRemote(sock, _mapped(memories), self._registered.regions)
        except BaseException:
            sock.close()
            raise
        with self._lock:
            self._remotes = {each for each in self._remotes if not each.closed} | {remote}
            closed = self._closed
        if closed:
            remote.close()
            raise TransferFailed("this agent is closed")
        return remote

    def close(self) -> None:
        """See `Agent`: nobody maps the memory any more, and calls of those who have it mapped
        fail. A write that is under way may go on, to what nobody uses for anything else."""
        with self._lock:
            self._closed = True
            door, self._door = self._door, None
            memories, self._memories = self._memories, []
            remotes, self._remotes = self._remotes, set()
        if door:
            door.close()
        for memory in memories:
            os.close(memory.fd)
        for remote in remotes:
            remote.close()
        self._registered = Registered()  # nothing here uses the memory any more

    def _usable(self) -> None:
        if self._closed:
            raise TransferFailed("this agent is closed")
        self._fixed = True


class ShmRemote:
    """Another process's memory: see `kvstore.transfer.base.Remote`. Made by `ShmAgent`."""

    kind = KIND

    def __init__(
        self, sock: socket.socket, memories: Sequence[tuple[int, Arena]], local: Regions
    ) -> None:
        """Takes over the socket, and the memories: where each is at the other process, and here."""
        self._sock, self._local = sock, local
        ordered = sorted(memories, key=lambda each: each[0])
        self._arenas = [arena for _, arena in ordered]
        self._remote = Regions([Region(address, arena.nbytes) for address, arena in ordered])
        here = [int(arena.array.__array_interface__["data"][0]) for arena in self._arenas]
        there = [address for address, _ in ordered]
        self._ahead: U64 = np.array(here, np.uint64) - np.array(there, np.uint64)
        self._writable = np.array([bool(arena.array.flags.writeable) for arena in self._arenas])
        self._changed = threading.Condition()
        self._calls = 0
        self._ending = threading.Event()
        self.closed = False
        self._populating: threading.Thread | None = None
        if self._writable.any():
            self._populating = threading.Thread(
                target=self._populate, name="kvstore-shm-map", daemon=True
            )
            self._populating.start()

    def read(self, pieces: Pieces, timeout_s: float, arrived: Arrived | None = None) -> None:
        """See `Remote`. After an error nothing arrives any more."""
        del arrived  # both processors copy already
        wanted = self._checked(pieces)
        with self._call():
            self._copy(wanted.local, self._here(wanted), wanted.nbytes, timeout_s)

    def write(self, pieces: Pieces, timeout_s: float) -> None:
        """See `Remote`. `TransferFailed` for memory that is shared for reading. After an error
        nothing is written any more."""
        wanted = self._checked(pieces)
        if not self._writable[self._found(wanted)].all():
            raise TransferFailed("the other process lets nobody write to that memory")
        with self._call():
            self._copy(self._here(wanted), wanted.local, wanted.nbytes, timeout_s)

    def close(self) -> None:
        """See `Remote`."""
        self._ending.set()
        with self._changed:
            if not self._changed.wait_for(lambda: not self._calls, limits.TRANSFER_CLOSE_S):
                raise TransferFailed("a transfer does not end: its memory stays in use")
            if self.closed:
                return
            self.closed = True
        if self._populating:
            self._populating.join()
        for arena in self._arenas:
            arena.close()
        self._sock.close()

    def _populate(self) -> None:
        """Where much is written at once, pages that are mapped one by one halve the speed."""
        for arena in self._arenas:
            if arena.array.flags.writeable:
                arena.populate(self._ending)

    def _checked(self, pieces: Pieces) -> Pieces:
        wanted = checked(pieces)
        if self._local.find(wanted.local, wanted.nbytes) is None:
            raise InvalidArgument("pieces.local", "lies outside of the memory registered here")
        self._found(wanted)
        return wanted

    def _found(self, wanted: Pieces) -> U64:
        found = self._remote.find(wanted.remote, wanted.nbytes)
        if found is None:
            raise TransferFailed("the other process does not share all of that memory")
        return found

    def _here(self, wanted: Pieces) -> U64:
        """Where pieces at the other process are mapped here."""
        return wanted.remote + self._ahead[self._found(wanted)]

    @contextlib.contextmanager
    def _call(self) -> Iterator[None]:
        with self._changed:
            if self._ending.is_set():
                raise TransferFailed("the connection was closed")
            self._calls += 1
        try:
            yield
        finally:
            with self._changed:
                self._calls -= 1
                self._changed.notify_all()

    def _copy(self, targets: U64, sources: U64, nbytes: U64, timeout_s: float) -> None:
        end_s = time.monotonic() + timeout_s
        turns = list(_turns(targets, sources, nbytes))
        if not turns:
            return
        if in_parallel(self._turn, turns, int(nbytes.sum()), end_s) < len(turns):
            raise DeadlineExceeded(f"{int(nbytes.sum())} bytes took more than {timeout_s:g} s")
        self._check()  # what the other process held for this, it has held to the end

    def _turn(self, targets: U64, sources: U64, nbytes: int) -> None:
        self._check()
        copy_rows(targets, sources, nbytes)

    def _check(self) -> None:
        if self._ending.is_set():
            raise TransferFailed("the connection was closed")
        if is_over(self._sock):
            raise TransferFailed("the other process is gone, or shares its memory no more")


def _turns(targets: U64, sources: U64, nbytes: U64) -> Iterator[tuple[U64, U64, int]]:
    """What is copied in one go: rows of one size, or a part of a large one."""
    changes = np.flatnonzero(nbytes[1:] != nbytes[:-1]) + 1
    for rows in np.split(np.arange(len(nbytes)), changes):
        if not len(rows):
            continue
        size = int(nbytes[rows[0]])
        to, from_ = np.ascontiguousarray(targets[rows]), np.ascontiguousarray(sources[rows])
        if size > PIECE_BYTES:
            for row in range(len(rows)):
                one = slice(row, row + 1)
                for at, part in pieces_of(size):
                    yield to[one] + np.uint64(at), from_[one] + np.uint64(at), part
            continue
        step = GROUP_BYTES // size
        for at in range(0, len(rows), step):
            yield to[at : at + step], from_[at : at + step], size


def _lasts(fd: int, nbytes: int) -> bool:
    """Whether a descriptor is that of a memfd which has so many bytes, and will."""
    try:
        sealed = fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
        return bool(sealed) and 0 < nbytes <= os.fstat(fd).st_size
    except OSError:
        return False


def _mapped(memories: Sequence[Handed]) -> list[tuple[int, Arena]]:
    """Where each memory is at the other process, and its mapping here. `TransferFailed` unless all
    can be mapped safely, `ProtocolError` where they overlap; takes over the descriptors."""
    left = list(memories)
    made: list[tuple[int, Arena]] = []
    try:
        Regions([Region(memory.address, memory.nbytes) for memory in memories])
        while left:
            memory = left.pop()
            made.append((memory.address, _map(memory)))
    except BaseException as error:
        for memory in left:
            os.close(memory.fd)
        for _, arena in made:
            arena.close()
        if isinstance(error, InvalidArgument):
            raise ProtocolError("another agent's memories overlap") from None
        raise
    return made


def _map(memory: Handed) -> Arena:
    if not _lasts(memory.fd, memory.nbytes):  # else it could be cut off, which kills who reads it
        os.close(memory.fd)
        raise TransferFailed("the other process shares memory that may not last")
    seals = fcntl.fcntl(memory.fd, fcntl.F_GET_SEALS)
    mode = fcntl.fcntl(memory.fd, fcntl.F_GETFL) & os.O_ACCMODE
    writable = mode == os.O_RDWR and not seals & _NO_WRITES
    try:
        return Arena(memory.fd, memory.nbytes, writable=writable)
    except (OSError, ValueError) as error:
        raise TransferFailed(f"the other process's memory cannot be mapped: {error}") from None
