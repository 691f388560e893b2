"""The client's side of the same-host channel: a blocking socket with a deadline on every call."""

from __future__ import annotations

import os
import socket
import threading
import time
from typing import Any

from kvstore import commands
from kvstore.channel import wire
from kvstore.errors import DeadlineExceeded, ProtocolError, Unavailable


class ChannelPort:
    """One connection. After any failure it is closed: make a new one to go on."""

    def __init__(self, path: str, timeout_s: float) -> None:
        self._lock = threading.Lock()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(timeout_s)
        try:
            self._sock.connect(path)
            self.welcome, self.fds = self._receive_welcome()
        except (OSError, Unavailable) as error:
            self._sock.close()
            raise Unavailable(f"no daemon answers at {path}: {error}") from None

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self._sock.fileno() < 0

    def call(self, command: commands.Command, timeout_s: float) -> commands.Result:
        """One round trip; `DeadlineExceeded` or `Unavailable` also close the connection."""
        frame = wire.encode(command)
        deadline = time.monotonic() + timeout_s
        with self._lock:
            if self.closed:
                raise Unavailable("the connection to the daemon is closed")
            try:
                self._wait(deadline)
                self._sock.sendall(frame)
                result = self._receive(deadline)
            except TimeoutError:
                self._sock.close()
                raise DeadlineExceeded(f"no answer within {timeout_s} s") from None
            except OSError as error:
                self._sock.close()
                raise Unavailable(f"the daemon is gone: {error}") from None
            except (Unavailable, ProtocolError):
                self._sock.close()
                raise
        checked: commands.Result = wire.raise_if_failed(result)
        return checked

    def close(self) -> None:
        """Closes the connection."""
        self._sock.close()

    def _wait(self, deadline: float) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)

    def _receive(self, deadline: float) -> Any:
        head = self._read(wire.FRAME.size, deadline)
        return wire.decode(head, self._read(wire.body_length(head), deadline))

    def _read(self, count: int, deadline: float) -> bytes:
        data = bytearray(count)
        view, done = memoryview(data), 0
        while done < count:
            self._wait(deadline)
            got = self._sock.recv_into(view[done:])
            if not got:
                raise Unavailable("the daemon closed the connection")
            done += got
        return bytes(data)

    def _receive_welcome(self) -> tuple[wire.Welcome, list[int]]:
        size = wire.FRAME.size
        data, fds, _flags, _address = socket.recv_fds(self._sock, 4096, 3)
        try:
            if len(data) < size or len(fds) != 3:
                raise Unavailable("the daemon refused this client; its log says why")
            welcome = wire.decode(data[:size], data[size:])
            if not isinstance(welcome, wire.Welcome):
                raise ProtocolError("the daemon did not introduce itself")
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return welcome, fds
