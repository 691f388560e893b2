"""Pipes for tests: frames over a socket, and between two objects of one process."""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable

from kvstore.errors import DeadlineExceeded
from kvstore.transfer.base import TransferFailed

LENGTH = struct.Struct("<I")


class SocketPipe:
    """A `FramePipe` over a connected socket."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket, self._sending = connected, threading.Lock()
        self._closed = False
        self._reader: threading.Thread | None = None

    def start(self, deliver: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        self._reader = threading.Thread(
            target=self._read, args=(deliver, lost), name="kvstore-pipe", daemon=True
        )
        self._reader.start()

    def send(self, frame: bytes, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        if not self._sending.acquire(timeout=timeout_s):
            raise DeadlineExceeded("others are sending")
        try:
            self._send(memoryview(LENGTH.pack(len(frame)) + frame), deadline)
        except OSError as error:
            self.close()  # a part of a frame may have been sent
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("the other side takes no more") from None
            raise TransferFailed(f"the pipe is lost: {error}") from None
        finally:
            self._sending.release()

    def close(self) -> None:
        self._closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        reader = self._reader
        if reader is None:
            self._socket.close()
        elif reader is not threading.current_thread():
            reader.join()

    def _send(self, left: memoryview, deadline: float) -> None:
        while left:
            # The socket's own timeout is the reader's too, so a copy of it has the deadline.
            self._socket.settimeout(None)
            self._wait_writable(deadline)
            left = left[self._socket.send(left, socket.MSG_DONTWAIT) :]

    def _wait_writable(self, deadline: float) -> None:
        import select

        poll = select.poll()
        poll.register(self._socket, select.POLLOUT)
        if not poll.poll(max(0, int(1000 * (deadline - time.monotonic())))):
            raise TimeoutError

    def _read(self, deliver: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        with contextlib.suppress(OSError, EOFError):
            while not self._closed:
                (nbytes,) = LENGTH.unpack(self._exactly(LENGTH.size))
                deliver(self._exactly(nbytes))
        if not self._closed:
            lost()
        self._socket.close()

    def _exactly(self, nbytes: int) -> bytes:
        data = bytearray(nbytes)
        view = memoryview(data)
        while view:
            got = self._socket.recv_into(view)
            if not got:
                raise EOFError
            view = view[got:]
        return bytes(data)


class MemoryPipe:
    """One of two ends that hand frames to each other, a few ahead."""

    def __init__(self) -> None:
        self._incoming: queue.Queue[bytes | None] = queue.Queue(4)
        self.other: MemoryPipe = self
        self.closed = False
        self._reader: threading.Thread | None = None

    def start(self, deliver: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        self._reader = threading.Thread(
            target=self._read, args=(deliver, lost), name="kvstore-pipe", daemon=True
        )
        self._reader.start()

    def send(self, frame: bytes, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not (self.closed or self.other.closed):
            # Both ends look now and then whether the other one has been closed.
            with contextlib.suppress(queue.Full):
                self.other._incoming.put(frame, timeout=0.01)
                return
            if time.monotonic() > deadline:
                raise DeadlineExceeded("the other side takes no more")
        raise TransferFailed("the pipe is closed")

    def close(self) -> None:
        self.closed = True
        reader = self._reader
        if reader is not None and reader is not threading.current_thread():
            reader.join()

    def _read(self, deliver: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        while not self.closed:
            try:
                frame = self._incoming.get(timeout=0.01)
            except queue.Empty:
                if self.other.closed:
                    break
                continue
            assert frame is not None
            deliver(frame)
        if not self.closed:
            lost()


def memory_pipes() -> tuple[MemoryPipe, MemoryPipe]:
    """Two connected ends."""
    near, far = MemoryPipe(), MemoryPipe()
    near.other, far.other = far, near
    return near, far
