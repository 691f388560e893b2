"""The client's side of the same-host channel: a blocking socket with a deadline on every call."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from kvstore import commands, limits
from kvstore.channel import wire
from kvstore.errors import DeadlineExceeded, PermissionDenied, ProtocolError, Unavailable

_WELCOME_FDS = 3  # and one more where there are boards
_READ_BYTES = 64 << 10
_REST_S = 1.0  # for the rest of an answer whose beginning has come
Then = Callable[[Any], None]


class ChannelPort:
    """One connection. After any failure it is closed: make a new one to go on."""

    def __init__(self, path: str, timeout_s: float) -> None:
        """`Unavailable` where nobody answers in time, and what the daemon says if it refuses."""
        self._lock = threading.Lock()
        self._waking = threading.RLock()  # around the pipe's numbers: closed ones are given anew
        self._over = False
        self.fds: list[int] = []
        self._owed: deque[Then | None] = deque()  # whom to tell of answers that nobody waits for
        self.interrupted = False  # whether it is over because a call was broken off here
        self._inbox = b""  # what has arrived of the record after the last
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._readable, self._takes_bytes = select.poll(), select.poll()
        self._readable.register(self._sock, select.POLLIN)
        self._takes_bytes.register(self._sock, select.POLLOUT)
        try:
            self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except BaseException:
            self._sock.close()
            raise
        try:
            self._sock.settimeout(timeout_s)
            self._sock.connect(path)
            self._sock.setblocking(False)
            welcome = self._exchange(None, timeout_s, fds_wanted=_WELCOME_FDS + 1)
            if not isinstance(welcome, wire.Welcome) or (
                len(self.fds) != _WELCOME_FDS + bool(welcome.boards_bytes)
            ):
                raise ProtocolError("the daemon did not introduce itself")
        except BaseException as error:
            self.close()
            if isinstance(error, PermissionError):
                raise PermissionDenied(f"user {os.getuid()} may not connect to {path}") from None
            if isinstance(error, OSError):
                raise Unavailable(f"no daemon answers at {path}: {error}") from None
            raise
        self.welcome = welcome

    @property
    def closed(self) -> bool:
        """Whether the connection is over."""
        return self._over

    def call(self, command: commands.Command, timeout_s: float) -> commands.Result:
        """One round trip; `DeadlineExceeded` or `Unavailable` also close the connection."""
        result: commands.Result = self._exchange(command, timeout_s)
        return result

    def cast(self, command: commands.Command, timeout_s: float, then: Then | None = None) -> None:
        """Sends a command whose answer nobody waits for; errors as those of `call`. then: called
        with it when it has been read, maybe in another thread, which may not make calls there."""
        self._turn(wire.encode(command), timeout_s, cast=True, then=then)

    @property
    def owes(self) -> bool:
        """Whether answers to what was cast have not been read."""
        return bool(self._owed)

    def take_answers(self, timeout_s: float) -> None:
        """Reads the answers to what was cast: all of them, or with no time those that have come;
        errors as those of `call`."""
        if not self._owed or not self._lock.acquire(timeout=timeout_s):
            return
        deadline = time.monotonic() + (timeout_s or _REST_S)
        try:
            with self._unbroken(timeout_s):
                while self._owed and (timeout_s or self._inbox or self._readable.poll(0)):
                    self._take_answer(deadline)
        finally:
            self._lock.release()
            if self._over:
                self._close_unless_called()

    def say_last(self, command: commands.Command) -> None:
        """Sends a command before the end, unless another thread is in a call or the socket is
        full."""
        if self._lock.acquire(blocking=False):
            try:
                with contextlib.suppress(OSError):
                    self._sock.send(wire.encode(command))
            finally:
                self._lock.release()

    def seal_staged(self, record: wire.SealStaged, timeout_s: float) -> commands.Sealed:
        """A seal of blocks in staging memory."""
        sealed: commands.Sealed = self._expect(commands.Sealed, self._exchange(record, timeout_s))
        return sealed

    def stage(self, fd: int, nbytes: int, timeout_s: float) -> None:
        """Hands the staging memory over; the descriptor stays the caller's."""
        self._expect(
            commands.Count, self._exchange(wire.Stage(nbytes=nbytes), timeout_s, send_fd=fd)
        )

    def map_index(self, timeout_s: float) -> tuple[int, int]:
        """Descriptor (the caller's from now on) and size of the index that is used now."""
        result = self._exchange(wire.MapIndex(), timeout_s, fds_wanted=1)
        mapped = self._expect(wire.IndexMapped, result)
        if not self.fds:
            raise ProtocolError("the daemon sent no index")
        return self.fds.pop(), mapped.index_bytes

    def wait(self, timeout_s: float | None) -> bool:
        """Waits for the end of the connection: True when it is over, False after `timeout_s`.

        `poke` ends the wait early.
        """
        poller = select.poll()
        try:
            # No POLLIN: answers are for `call`. POLLHUP comes unasked.
            poller.register(self._sock, select.POLLRDHUP)
        except ValueError:  # closed, maybe just now by a call in another thread
            return True
        poller.register(self._wake_read, select.POLLIN)
        events = poller.poll(None if timeout_s is None else timeout_s * 1e3)
        with contextlib.suppress(BlockingIOError, OSError):
            os.read(self._wake_read, 64)
        return self.closed or any(fd != self._wake_read for fd, _ in events)

    def poke(self) -> None:
        """Wakes `wait`."""
        with self._waking, contextlib.suppress(BlockingIOError, OSError):
            os.write(self._wake_write, b"x")

    def shut(self) -> None:
        """Ends the connection; a call or wait in another thread ends at once. `close` follows."""
        self._over = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._close_unless_called()
        self.poke()

    def _close_unless_called(self) -> None:
        """Closes the socket, but for a call under way, which does it in the end: a call that was
        just about to wait for it would wait for whatever gets the same number next."""
        if self._lock.acquire(blocking=False):
            try:
                self._sock.close()
            finally:
                self._lock.release()

    def abandon(self) -> None:
        """Closes this process's copy of the socket; the process that it was forked from goes on."""
        self._over = True
        self._sock.close()

    def close(self) -> None:
        """Ends the connection and gives all descriptors back; nobody may be in `wait`."""
        self.shut()
        with self._waking:
            pipe = (self._wake_read, self._wake_write)
            # First, because a thread that still reads here may wake us at any moment.
            self._wake_read = self._wake_write = -1
            for fd in (*pipe, *self.fds):
                if fd >= 0:
                    os.close(fd)
        self.fds.clear()

    # -- inside ------------------------------------------------------------------------

    def _expect(self, kind: type[Any], result: Any) -> Any:
        if not isinstance(result, kind):
            self.shut()  # whose answer it is nobody knows, nor whose the next one would be
            raise ProtocolError(f"the daemon answered {type(result).__name__}")
        return result

    def _exchange(
        self, record: object, timeout_s: float, *, fds_wanted: int = 0, send_fd: int | None = None
    ) -> Any:
        """Sends a record (None: nothing) and receives one."""
        frame = wire.encode(record) if record is not None else b""
        return wire.raise_if_failed(
            self._turn(frame, timeout_s, fds_wanted=fds_wanted, send_fd=send_fd)
        )

    def _turn(
        self,
        frame: bytes,
        timeout_s: float,
        *,
        cast: bool = False,
        then: Then | None = None,
        fds_wanted: int = 0,
        send_fd: int | None = None,
    ) -> Any:
        """Sends a frame and receives the answer, unless it is `cast`."""
        deadline = time.monotonic() + timeout_s
        if not self._lock.acquire(timeout=max(0.0, timeout_s)):
            raise DeadlineExceeded(f"another call held the connection for {timeout_s} s")
        try:
            if self.closed:
                raise Unavailable("the connection to the daemon is closed")
            if frame and time.monotonic() >= deadline:
                # Nothing was sent, so the connection is as good as before.
                raise DeadlineExceeded("no time was left for the call")
            with self._unbroken(timeout_s):
                self._send(frame, deadline, send_fd)
                if cast:
                    self._owed.append(then)
                while self._owed and not (cast and len(self._owed) <= limits.MAX_CASTS):
                    self._take_answer(deadline)
                return None if cast else self._receive(deadline, fds_wanted)
        finally:
            self._lock.release()
            if self._over:
                self._close_unless_called()

    @contextlib.contextmanager
    def _unbroken(self, timeout_s: float) -> Iterator[None]:
        """After a failure in the middle of a call the stream has no meaning: it is shut."""
        try:
            yield
        except TimeoutError:
            self.shut()
            raise DeadlineExceeded(f"no answer within {timeout_s} s") from None
        except OSError as error:
            self.shut()
            raise Unavailable(f"the daemon is gone: {error.strerror}") from None
        except (Unavailable, ProtocolError):
            self.shut()
            raise
        except BaseException:  # a KeyboardInterrupt: the next call would read this one's answer
            self.interrupted = True
            self.shut()
            raise

    def _send(self, frame: bytes, deadline: float, send_fd: int | None) -> None:
        fds = [] if send_fd is None else [send_fd]
        while frame:
            try:
                sent = socket.send_fds(self._sock, [frame], fds) if fds else self._sock.send(frame)
            except BlockingIOError:
                self._wait_for(select.POLLOUT, deadline)
                continue
            frame, fds = frame[sent:], []

    def _take_answer(self, deadline: float) -> None:
        """The answer to what was cast first."""
        answer = self._receive(deadline, 0)
        then = self._owed.popleft()
        if then:
            then(answer)

    def _receive(self, deadline: float, fds_wanted: int) -> Any:
        """One record; what has come of the next one waits in the inbox."""
        head = self._take(wire.FRAME.size, deadline, fds_wanted)
        return wire.decode(head, self._take(wire.body_length(head), deadline, fds_wanted))

    def _take(self, n: int, deadline: float, fds_wanted: int) -> bytes:
        """The next n bytes of the stream."""
        inbox = self._inbox
        if len(inbox) < n:
            whole = bytearray(inbox)
            while len(whole) < n:
                whole += self._read(deadline, fds_wanted)
            inbox = bytes(whole)
        self._inbox = inbox[n:]
        return inbox[:n]

    def _read(self, deadline: float, fds_wanted: int) -> bytes:
        """What has arrived. Where descriptors are wanted they are taken: any other read of bytes
        that they come with would lose them."""
        while True:
            self._wait_for(select.POLLIN, deadline)
            with contextlib.suppress(BlockingIOError):
                if fds_wanted:
                    data, fds, *_ = socket.recv_fds(self._sock, _READ_BYTES, fds_wanted)
                    self._keep(fds)
                else:
                    data = self._sock.recv(_READ_BYTES)
                break
        if not data:
            raise Unavailable("the daemon closed the connection")
        return data

    def _keep(self, fds: list[int]) -> None:
        self.fds.extend(fds)
        for fd in fds:
            # A program that this process starts must not hold a dead daemon's memory. Not by a
            # flag of the call, which Python 3.11 does not pass on.
            os.set_inheritable(fd, False)

    def _wait_for(self, events: int, deadline: float) -> None:
        """Sleeps until the socket is ready; TimeoutError at the deadline."""
        if self.closed:  # just now by another thread
            raise Unavailable("the connection to the daemon is closed")
        poller = self._readable if events == select.POLLIN else self._takes_bytes
        left = deadline - time.monotonic()
        if left > 0 and poller.poll(math.ceil(left * 1e3)):
            return
        if not poller.poll(0):  # else this process stood still, and what it waits for was there
            raise TimeoutError
