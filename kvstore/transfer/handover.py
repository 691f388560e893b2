"""Memories that one process hands to others of its host: a socket, a secret, and memfds.

The socket has an abstract name, so nothing of it is left on a disk, and nobody in another network
namespace reaches it. Both sides look at the user at the other end: processes of one user trust each
other, as they do on the daemon's own channel.
"""

from __future__ import annotations

import array
import contextlib
import hmac
import os
import secrets
import selectors
import socket
import struct
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore import limits
from kvstore.errors import ProtocolError
from kvstore.transfer.base import TransferFailed

TOKEN_BYTES, SECRET_BYTES = 16, 32
VERSION = 1
_MAGIC = b"KVSH"
_HELLO = struct.Struct(f"<4sHH{SECRET_BYTES}s")  # magic, version, 0, the secret
_HEAD = struct.Struct("<4sHH")  # magic, version, memories; then the memories, and their descriptors
_MEMORY = struct.Struct("<QQ")  # its address where it was shared, its bytes
_ANSWER_BYTES = _HEAD.size + limits.MAX_SHARED_MEMORIES * _MEMORY.size
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_INT = struct.Struct("i")
_BACKLOG = 64
_NAP_S = 0.05  # after a connection could not be taken: what it lacks may be there again


@dataclass(frozen=True, slots=True)
class Handed:
    """A memory of another process's. address, nbytes: as that one has it. fd: of its memfd, which
    says by its mode and its seals whether it can be written; the holder closes it."""

    address: int
    nbytes: int
    fd: int


def socket_name(token: bytes) -> bytes:
    """The abstract name of the socket that a token stands for."""
    return b"\0kvstore-shm-" + token.hex().encode()


class Door:
    """Hands memories to those who know the secret, on a thread of its own.

    A connection stays as long as both sides live, so its end tells of the other side's. token: by
    which the socket is found. secret: to be shown to those alone who may map the memories.
    """

    def __init__(self, memories: Sequence[Handed]) -> None:
        """Takes over the descriptors. `TransferFailed` where no socket can be had."""
        self.token, self.secret = (
            secrets.token_bytes(TOKEN_BYTES),
            secrets.token_bytes(SECRET_BYTES),
        )
        self._memories = list(memories)
        self._until: dict[socket.socket, float] = {}  # when a guest must have shown the secret
        self._closing = threading.Event()
        try:
            self._listener = _listener(self.token)
        except OSError as error:
            self._close_memories()
            raise TransferFailed(f"no socket to share memory by: {error}") from None
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wakeup, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._run, name="kvstore-shm-door", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends all connections; nobody maps the memories by it any more. To be called once."""
        self._closing.set()
        os.eventfd_write(self._wakeup, 1)
        self._thread.join()  # it never waits for anybody
        self._selector.close()
        for sock in (self._listener, *self._until):
            # Not only closed: a forked child may hold it as well.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._until.clear()
        os.close(self._wakeup)
        self._close_memories()

    def _close_memories(self) -> None:
        for memory in self._memories:
            os.close(memory.fd)
        self._memories.clear()

    def _run(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(self._patience_s()):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._hear(key.fileobj)
            now = time.monotonic()
            for guest in [guest for guest, until in self._until.items() if until < now]:
                self._drop(guest)

    def _patience_s(self) -> float | None:
        soonest = min(self._until.values(), default=float("inf"))
        return None if soonest == float("inf") else max(0.0, soonest - time.monotonic())

    def _accept(self) -> None:
        try:
            guest, _ = self._listener.accept()
        except OSError:  # too many open files, or they are gone again
            self._closing.wait(_NAP_S)
            return
        guest.setblocking(False)
        if len(self._until) >= limits.MAX_SHM_CONNECTIONS or not _is_own_user(guest):
            guest.close()
            return
        self._until[guest] = time.monotonic() + limits.SHM_HELLO_S
        self._selector.register(guest, selectors.EVENT_READ)

    def _hear(self, guest: socket.socket) -> None:
        """Answers a guest that shows the secret; all else ends the connection without a word."""
        greeted = self._until[guest] == float("inf")
        try:
            data = guest.recv(_HELLO.size + 1)
            if greeted or not self._knows(data):
                self._drop(guest)
                return
            self._until[guest] = float("inf")
            head = _HEAD.pack(_MAGIC, VERSION, len(self._memories))
            rows = [_MEMORY.pack(each.address, each.nbytes) for each in self._memories]
            socket.send_fds(guest, [head, *rows], [each.fd for each in self._memories])
        except OSError:
            self._drop(guest)

    def _knows(self, data: bytes) -> bool:
        if len(data) != _HELLO.size:
            return False
        magic, version, _, secret = _HELLO.unpack(data)
        known = hmac.compare_digest(secret, self.secret)
        return bool(magic == _MAGIC and version == VERSION and known)

    def _drop(self, guest: socket.socket) -> None:
        del self._until[guest]
        self._selector.unregister(guest)
        guest.close()


def ask(token: bytes, secret: bytes, timeout_s: float) -> tuple[socket.socket, list[Handed]]:
    """The memories behind another process's door, and the connection to it, which does not block.

    `TransferFailed` where nobody is there or lets this process in, or not in time; `ProtocolError`
    for an answer that is none.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.settimeout(max(timeout_s, 1e-3))
        sock.connect(socket_name(token))
        if not _is_own_user(sock):
            raise TransferFailed("the memory is another user's")
        sock.send(_HELLO.pack(_MAGIC, VERSION, 0, secret))
        memories = _received(sock)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise TransferFailed(f"no shared memory with the other process: {error}") from None
    except BaseException:
        sock.close()
        raise
    return sock, memories


def is_over(sock: socket.socket) -> bool:
    """Whether the process at the other end of an `ask` has ended it, or has died."""
    try:
        sock.recv(1, socket.MSG_PEEK)  # it says nothing more
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _listener(token: bytes) -> socket.socket:
    made = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        made.setblocking(False)
        made.bind(socket_name(token))
        made.listen(_BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def _is_own_user(sock: socket.socket) -> bool:
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _pid, uid, _gid = _CREDENTIALS.unpack(packed)
    return bool(uid == os.geteuid())


def _received(sock: socket.socket) -> list[Handed]:
    room = socket.CMSG_SPACE(limits.MAX_SHARED_MEMORIES * _INT.size)
    flags = socket.MSG_CMSG_CLOEXEC
    data, ancillary, said, _ = sock.recvmsg(_ANSWER_BYTES + 1, room, flags)
    fds = array.array("i")
    for level, kind, packed in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(packed[: len(packed) - len(packed) % fds.itemsize])
    try:
        if not data:
            raise TransferFailed("the other process does not hand its memory over")
        if said & (socket.MSG_CTRUNC | socket.MSG_TRUNC):
            raise ProtocolError("more memories were handed over than an agent shares")
        rows = _rows(data, len(fds))
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise
    return [Handed(address, nbytes, fd) for (address, nbytes), fd in zip(rows, fds, strict=True)]


def _rows(data: bytes, n_fds: int) -> list[tuple[int, int]]:
    if len(data) < _HEAD.size:
        raise ProtocolError("memory was handed over by something else than an agent")
    magic, version, n = _HEAD.unpack_from(data)
    if magic != _MAGIC or version != VERSION:
        raise ProtocolError(f"memory is handed over by version {version}, not {VERSION}")
    if len(data) != _HEAD.size + n * _MEMORY.size or n != n_fds:
        raise ProtocolError("not as many memories were handed over as were named")
    return [(address, nbytes) for address, nbytes in _MEMORY.iter_unpack(data[_HEAD.size :])]
