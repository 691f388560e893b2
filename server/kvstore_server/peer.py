"""One client of the same-host channel: its socket, its process, and the bytes on their way."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore import limits
from kvstore.channel import wire
from kvstore.errors import ProtocolError
from kvstore_server.staging import StagingArea
from kvstore_server.tenants import Tenant

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_SO_PEERPIDFD = 77  # since Linux 6.5; Python has no name for it
_READ_BYTES = 1 << 20
_MAX_FDS = 4


@dataclass(frozen=True, slots=True)
class Process:
    """The process at the other end of a socket. `pidfd` tells of its death; close it."""

    pid: int
    uid: int
    pidfd: int


def process_of(sock: socket.socket) -> Process:
    """Who connected; OSError where it is gone already."""
    packed = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, _gid = _CREDENTIALS.unpack(packed)
    try:
        # The kernel's own handle cannot be another process's that was given the same number.
        pidfd = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:
        pidfd = os.pidfd_open(pid)
    return Process(pid, uid, pidfd)


class Peer:
    """A connected client. `busy`: a copy for it is under way, and no further record is served."""

    def __init__(
        self, sock: socket.socket, process: Process, tenant: Tenant, connection: int
    ) -> None:
        self.sock, self.process, self.tenant = sock, process, tenant
        self.connection = connection
        self.staging: StagingArea | None = None
        self.busy = False
        self._inbox = bytearray()
        self._fds: deque[int] = deque()
        self._outbox: deque[tuple[bytes, tuple[int, ...]]] = deque()
        self._outbox_bytes = 0

    def receive(self) -> None:
        """Takes what has arrived; ConnectionResetError at the end, BlockingIOError for nothing."""
        data, fds, _flags, _address = socket.recv_fds(
            self.sock, _READ_BYTES, _MAX_FDS, socket.MSG_CMSG_CLOEXEC
        )
        self._fds.extend(fds)
        if not data:
            raise ConnectionResetError
        if len(self._fds) > _MAX_FDS:
            raise ProtocolError("more descriptors than any record takes")
        self._inbox += data

    def records(self) -> Iterator[Any]:
        """The whole records that have arrived, while nothing keeps the peer busy."""
        size = wire.FRAME.size
        while not self.busy and len(self._inbox) >= size:
            head = bytes(self._inbox[:size])
            end = size + wire.body_length(head)
            if len(self._inbox) < end:
                return
            record = wire.decode(head, bytes(self._inbox[size:end]))
            del self._inbox[:end]
            yield record

    def take_fd(self) -> int:
        """The descriptor that came with a record; the caller's from now on."""
        if not self._fds:
            raise ProtocolError("the record came without its descriptor")
        return self._fds.popleft()

    def send(self, record: object, fds: Sequence[int] = ()) -> None:
        """Queues a record with copies of the descriptors, and sends what the socket takes."""
        frame = wire.encode(record)
        # Copies, because an index may move and be closed before a slow reader takes this.
        self._outbox.append((frame, tuple(os.dup(fd) for fd in fds)))
        self._outbox_bytes += len(frame)
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes; `ProtocolError` for a client that never reads."""
        with contextlib.suppress(BlockingIOError):
            while self._outbox:
                self._flush_one()
        if self._outbox_bytes > 2 * limits.MAX_FRAME_BYTES:
            raise ProtocolError("the client does not read its answers")

    @property
    def has_unsent(self) -> bool:
        """Whether bytes wait for the socket."""
        return bool(self._outbox)

    def close(self) -> None:
        """Closes the socket and everything that came or was to go through it."""
        self.sock.close()
        for fd in (*self._fds, *(fd for _, fds in self._outbox for fd in fds)):
            os.close(fd)
        self._fds.clear()
        self._outbox.clear()
        if self.staging:
            self.staging.close()
            self.staging = None

    def _flush_one(self) -> None:
        frame, fds = self._outbox[0]
        sent = socket.send_fds(self.sock, [frame], fds) if fds else self.sock.send(frame)
        self._outbox_bytes -= sent
        for fd in fds:
            os.close(fd)
        if sent == len(frame):
            self._outbox.popleft()
        else:
            self._outbox[0] = (frame[sent:], ())
