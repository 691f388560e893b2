"""The daemon's side of the same-host channel: one thread, one loop, one store.

Owns the listening socket, the connections and the pidfds. Decides nothing about blocks: every
record becomes a command for the store, every answer goes back on the connection it came from.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from kvstore import limits
from kvstore.channel import wire
from kvstore.errors import KVStoreError, ProtocolError, Unavailable
from kvstore.memory import Arenas
from kvstore.store import Store, failed

_PEER = struct.Struct("3i")  # struct ucred: pid, uid, gid
_READ_BYTES = 1 << 20

log = structlog.get_logger()


class _Peer:
    """One client: its socket, its process, and the bytes that are on their way."""

    def __init__(self, sock: socket.socket, connection: int, pidfd: int) -> None:
        self.sock, self.connection, self.pidfd = sock, connection, pidfd
        self.inbox = bytearray()
        self.outbox = bytearray()


def bind(path: Path) -> socket.socket:
    """A listening unix socket at `path`; clears a dead daemon's, refuses beside a live one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    if path.exists():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()  # its daemon is dead
            else:
                listener.close()
                raise Unavailable(
                    f"a daemon already serves {path}: stop it or name another --socket"
                )
    # Owner only: until each user has a pool of its own, nobody else may reach this one.
    previous = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(previous)
    listener.listen(64)
    return listener


class ChannelServer:
    """Serves one store to the clients of one unix socket until `stop` is called."""

    def __init__(
        self, store: Store, arenas: Arenas, listener: socket.socket, *, instance: int
    ) -> None:
        self._store, self._arenas, self._listener = store, arenas, listener
        self._instance = instance
        self._selector = selectors.DefaultSelector()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._stopping = False
        self._peers: set[_Peer] = set()
        self._quarantine: dict[int, int] = {}  # pidfd -> connection
        self._watch(listener, self._accept)
        self._watch(self._wake_read, self._drain_wakeup)

    def run(self) -> None:
        """The loop; returns after `stop`."""
        while not self._stopping:
            for key, events in self._selector.select():
                key.data(events)
        self._close()

    def stop(self) -> None:
        """Ends the loop; safe in a signal handler."""
        self._stopping = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")

    def _drain_wakeup(self, _: int) -> None:
        os.read(self._wake_read, 64)

    def _watch(self, source: Any, action: Callable[[int], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, action)

    def _accept(self, _: int) -> None:
        sock, _address = self._listener.accept()
        sock.setblocking(False)
        pid, uid, _gid = _PEER.unpack(
            sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        )
        try:
            if uid != os.getuid():
                raise KVStoreError(f"user {uid} has no pool here")
            pidfd = os.pidfd_open(pid)
            connection = self._store.connect()
        except (KVStoreError, OSError) as error:
            log.warning("client refused", pid=pid, uid=uid, reason=str(error))
            sock.close()
            return
        peer = _Peer(sock, connection, pidfd)
        self._peers.add(peer)
        self._watch(sock, lambda events: self._ready(peer, events))
        self._welcome(peer)

    def _welcome(self, peer: _Peer) -> None:
        arenas = self._arenas
        record = wire.encode(
            wire.Welcome(
                version=wire.WIRE_VERSION,
                instance=self._instance,
                writable=1,
                pool_bytes=arenas.pool.nbytes,
            )
        )
        fds = [arenas.pool.fd, arenas.generations.fd, arenas.index.fd]
        try:
            socket.send_fds(peer.sock, [record], fds)
        except OSError:
            self._lost(peer)

    def _ready(self, peer: _Peer, events: int) -> None:
        try:
            if events & selectors.EVENT_WRITE:
                self._flush(peer)
            if events & selectors.EVENT_READ:
                data = peer.sock.recv(_READ_BYTES)
                if not data:
                    raise ConnectionResetError
                peer.inbox += data
                self._serve(peer)
        except BlockingIOError:
            return
        except ProtocolError as error:
            log.warning("garbage on the socket", connection=peer.connection, reason=str(error))
            self._lost(peer)
        except OSError:
            self._lost(peer)

    def _serve(self, peer: _Peer) -> None:
        size = wire.FRAME.size
        while len(peer.inbox) >= size:
            head = bytes(peer.inbox[:size])
            end = size + wire.body_length(head)
            if len(peer.inbox) < end:
                return
            command = wire.decode(head, bytes(peer.inbox[size:end]))
            del peer.inbox[:end]
            peer.outbox += wire.encode(self._answer(peer.connection, command))
            self._flush(peer)

    def _answer(self, connection: int, command: Any) -> object:
        if not isinstance(command, wire.COMMANDS):
            raise ProtocolError(f"{type(command).__name__} is no command")
        try:
            return self._store.handle(connection, command)
        except KVStoreError as error:
            return failed(error)

    def _flush(self, peer: _Peer) -> None:
        """Sends what the socket takes; a client that never reads is cut off at the limit."""
        while peer.outbox:
            try:
                sent = peer.sock.send(peer.outbox)
            except BlockingIOError:
                break
            del peer.outbox[:sent]
        if len(peer.outbox) > 2 * limits.MAX_FRAME_BYTES:
            raise ProtocolError("the client does not read its answers")
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if peer.outbox else 0)
        self._selector.modify(peer.sock, events, lambda events: self._ready(peer, events))

    def _lost(self, peer: _Peer) -> None:
        """The connection is over: its memory waits for its process to end (promise 7)."""
        self._selector.unregister(peer.sock)
        peer.sock.close()
        self._peers.discard(peer)
        if self._store.disconnect(peer.connection):
            os.close(peer.pidfd)
            return
        self._quarantine[peer.pidfd] = peer.connection
        self._watch(peer.pidfd, lambda _: self._died(peer.pidfd))

    def _died(self, pidfd: int) -> None:
        self._selector.unregister(pidfd)
        self._store.holder_died(self._quarantine.pop(pidfd))
        os.close(pidfd)

    def _close(self) -> None:
        for peer in list(self._peers):
            peer.sock.close()
            os.close(peer.pidfd)
        for pidfd in self._quarantine:
            os.close(pidfd)
        self._selector.close()
        self._listener.close()
        os.close(self._wake_read)
        os.close(self._wake_write)
