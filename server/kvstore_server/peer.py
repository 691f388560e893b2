"""One client of the same-host channel: its socket, its process, and the bytes on their way."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvstore import limits
from kvstore.channel import wire
from kvstore.errors import ProtocolError
from kvstore_server.staging import StagingArea
from kvstore_server.tenants import Tenant

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_SO_PEERPIDFD = 77  # since Linux 6.5; Python has no name for it
_READ_BYTES = 64 << 10  # at a time; more would cost fresh pages for each small record
_MAX_FDS = 4
_FD = struct.Struct("i")
_FDS_ROOM = socket.CMSG_LEN(_MAX_FDS * _FD.size)
_MAX_UNSENT = 16  # answers; who waits for each before the next call leaves one at most


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
        self.queued = False  # whether its next record has a place in the loop's queue
        self.awaits_room = False  # whether the loop is asked to say when the socket takes bytes
        self._inbox = bytearray()
        self._record_bytes: int | None = None  # of the first record, once it is whole
        self._fds: deque[int] = deque()
        self._outbox: deque[tuple[bytes, list[int]]] = deque()
        self._outbox_bytes = 0

    def receive(self) -> None:
        """Takes what has arrived; ConnectionResetError at the end, BlockingIOError for nothing."""
        data, beside, _flags, _address = self.sock.recvmsg(_READ_BYTES, _FDS_ROOM)
        if beside:
            self._take_fds(beside)
        if not data:
            raise ConnectionResetError
        self._inbox += data
        self._measure()

    def _take_fds(self, beside: list[tuple[int, int, bytes]]) -> None:
        """Descriptors that came with bytes; `ProtocolError` for more than any record takes."""
        for level, kind, packed in beside:
            if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                continue
            for (fd,) in _FD.iter_unpack(packed[: len(packed) // _FD.size * _FD.size]):
                self._fds.append(fd)
                os.set_inheritable(fd, False)  # Python passes no flag of `recvmsg` on
        if len(self._fds) > _MAX_FDS:
            raise ProtocolError("more descriptors than any record takes")

    @property
    def unread_bytes(self) -> int:
        """Bytes that have arrived and were not served yet."""
        return len(self._inbox)

    @property
    def has_record(self) -> bool:
        """Whether a whole record has arrived."""
        return self._record_bytes is not None

    def next_record(self) -> Any | None:
        """Takes the first whole record that has arrived; `ProtocolError` on garbage."""
        end, size = self._record_bytes, wire.FRAME.size
        if end is None:
            return None
        record = wire.decode(self._inbox[:size], bytes(self._inbox[size:end]))
        del self._inbox[:end]
        self._record_bytes = None
        if self._inbox:
            self._measure()
        return record

    @property
    def gone(self) -> bool:
        """Whether the client has hung up, though records of it may still wait here."""
        poller = select.poll()
        poller.register(self.sock, select.POLLRDHUP)
        return bool(poller.poll(0))

    def take_fd(self) -> int:
        """The descriptor that came with a record; the caller's from now on."""
        if not self._fds:
            raise ProtocolError("the record came without its descriptor")
        return self._fds.popleft()

    def send(self, record: object, fds: Sequence[int] = ()) -> None:
        """Queues a record with copies of the descriptors, and sends what the socket takes."""
        frame = wire.encode(record)
        copies: list[int] = []
        self._outbox.append((frame, copies))
        self._outbox_bytes += len(frame)
        # Copies, because an index may move and be closed before a slow reader takes this. Into
        # the queue one by one, so that `close` finds those made before the one that fails.
        for fd in fds:
            copies.append(os.dup(fd))  # noqa: PERF401
        self.flush()

    def flush(self) -> None:
        """Sends what the socket takes; `ProtocolError` for a client that never reads."""
        with contextlib.suppress(BlockingIOError):
            while self._outbox:
                self._flush_one()
        if self._outbox_bytes > 2 * limits.MAX_FRAME_BYTES or len(self._outbox) > _MAX_UNSENT:
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
            self._outbox[0] = (frame[sent:], [])

    def _measure(self) -> None:
        """Notes where the first record ends; `ProtocolError` on garbage."""
        size = wire.FRAME.size
        if self._record_bytes is None and len(self._inbox) >= size:
            end = size + wire.body_length(self._inbox[:size])
            self._record_bytes = end if len(self._inbox) >= end else None
