"""The transfer by frames over UCX endpoints, by way of the package ucxx.

UCX is used by one thread alone, which the agent owns: it posts sends and receives, and makes
progress. A frame goes over UCX's stream, behind its length. What comes is copied from frames by the
passive side itself, as over any stream, so UCX never has a block's memory in hand. Shared memory is
left out for the reasons that `nixl` gives.

No active messages: who waits for one at an endpoint that is closed is remembered by ucxx 0.52 under
the endpoint's handle, and takes away the first message of the next endpoint that has this handle.

ucxx 0.52 does not let go of a worker either, with some file descriptors, whose endpoint was closed
while it waited, so an agent is best kept for the life of its process.
"""

from __future__ import annotations

import collections
import contextlib
import importlib
import os
import queue
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np

from kvstore import limits
from kvstore.errors import DeadlineExceeded, ProtocolError, Unavailable
from kvstore.transfer.base import Memory, TransferFailed
from kvstore.transfer.frames import MAX_FRAME_BYTES
from kvstore.transfer.stream import TOKEN_BYTES, FramePipe, StreamAgent, StreamRemote

KIND = "ucxx"
_WHERE = struct.Struct("<H")  # the listener's port; then its host
# No rendezvous: UCX 1.21 crashes where the other process dies in one, and NIXL is loaded here too.
_CONFIG = {"TLS": "^cma,xpmem,knem,sysv,posix", "RNDV_THRESH": "inf"}
_NAP_MS = 50  # how long the thread sleeps at most where nothing wakes it
_CLOSE_NS = 100_000_000
_LENGTH = np.dtype("<u4")  # of a frame, in front of it
_FRAMES_KEPT = 4  # that came on one pipe and were not yet delivered


class _Request(Protocol):
    completed: bool

    def check_error(self) -> None: ...


class _Endpoint(Protocol):
    alive: bool

    def stream_send(self, array: object) -> _Request: ...
    def stream_recv(self, array: object) -> _Request: ...
    def set_close_callback(self, function: Callable[[], None]) -> None: ...
    def remove_close_callback(self) -> None: ...
    def close_blocking(self, period: int, max_attempts: int) -> None: ...


class _Listener(Protocol):
    port: int

    def create_endpoint_from_conn_request(
        self, request: int, endpoint_error_handling: bool
    ) -> _Endpoint: ...


class _Worker(Protocol):
    epoll_file_descriptor: int

    def init_blocking_progress_mode(self) -> None: ...
    def progress(self) -> None: ...
    def arm(self) -> bool: ...
    def create_endpoint_from_hostname(
        self, host: str, port: int, endpoint_error_handling: bool
    ) -> _Endpoint: ...


class _Library(Protocol):
    """What is used of ucxx."""

    UCXError: type[Exception]

    def array(self, memory: object) -> object: ...
    def worker(self) -> _Worker: ...
    def listener(self, worker: _Worker, accept: Callable[[int], None]) -> _Listener: ...


def load() -> _Library:
    """ucxx, of which no part but the endpoints is used; `Unavailable`."""
    try:
        native = importlib.import_module("ucxx._lib.libucxx")
        arrays = importlib.import_module("ucxx._lib.arr")
    except (ImportError, OSError) as error:
        raise Unavailable(f"no ucxx: pip install ucxx-cu13 ({error})") from None

    class Library:
        UCXError = native.UCXError
        array = staticmethod(arrays.Array)

        @staticmethod
        def worker() -> object:
            features = (native.Feature.STREAM, native.Feature.WAKEUP)
            return native.UCXWorker(native.UCXContext(_CONFIG, features))

        @staticmethod
        def listener(worker: object, accept: Callable[[int], None]) -> object:
            return native.UCXListener.create(worker, 0, accept)

    return cast(_Library, Library())


def address_towards(others: Sequence[str]) -> str:
    """This host's address on the way to the first of others (HOST:PORT each) that there is a way
    to; the host's name without one."""
    for other in others:
        host, _, port = other.rpartition(":")
        with (
            contextlib.suppress(OSError, ValueError),
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        ):
            sock.connect((host, int(port)))  # sends nothing
            return str(sock.getsockname()[0])
    return socket.gethostname()


class UcxxAgent:
    """An agent over UCX endpoints: see `kvstore.transfer.base.Agent`.

    name: for logs. host: this host's address, as others reach it.
    """

    kind = KIND

    def __init__(self, name: str, *, host: str = "") -> None:
        self._thread = _UcxThread(load())
        where = _WHERE.pack(self._thread.port) + (host or socket.gethostname()).encode()
        self._agent = StreamAgent(name, self._reach, kind=KIND, where=where)
        self._thread.start(self._agent.serve)

    def register(self, memory: Memory) -> None:
        """See `Agent`."""
        self._agent.register(memory)

    def describe(self) -> bytes:
        """See `Agent`."""
        return self._agent.describe()

    def connect(self, description: bytes, timeout_s: float) -> StreamRemote:
        """See `Agent`."""
        return self._agent.connect(description, timeout_s)

    def close(self) -> None:
        """See `Agent`."""
        self._agent.close()
        self._thread.close()

    def _reach(self, body: bytes, timeout_s: float) -> FramePipe:
        if len(body) <= _WHERE.size + TOKEN_BYTES:
            raise ProtocolError("a ucxx agent's description does not say where it is")
        (port,) = _WHERE.unpack_from(body)
        host = body[_WHERE.size : -TOKEN_BYTES].decode(errors="replace")
        try:
            address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_STREAM)[0][4][0]
        except OSError as error:
            raise TransferFailed(f"no address of {host!r}: {error}") from None
        return self._thread.connect(str(address), port, timeout_s)


class UcxPipe:
    """A `FramePipe` over one endpoint. Made by the agent's thread."""

    def __init__(self, thread: _UcxThread, endpoint: _Endpoint) -> None:
        self._thread = thread
        self._endpoint: _Endpoint | None = endpoint
        self._inbox: queue.Queue[bytes | None] = queue.Queue()
        self._lost = self._closed = False
        self._reader: threading.Thread | None = None
        self._receiving: _Request | None = None
        self._room = np.empty(0, np.uint8)  # what it receives into
        self._length_is_next = True
        self._sends: collections.deque[_Sending] = collections.deque()

    def start(self, deliver: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        """See `FramePipe`."""
        self._reader = threading.Thread(
            target=self._deliver, args=(deliver, lost), name="kvstore-ucxx-pipe", daemon=True
        )
        self._reader.start()

    def send(self, frame: bytes, timeout_s: float) -> None:
        """See `FramePipe`."""
        sending = _Sending(frame)
        self._thread.do(lambda: self._post(sending))
        if not sending.ended.wait(timeout_s):
            raise DeadlineExceeded("the other process takes no more")
        if sending.failure:
            raise TransferFailed(sending.failure)

    def close(self) -> None:
        """See `FramePipe`."""
        self._closed = True
        self._inbox.put(None)
        self._thread.do(self.drop)
        reader = self._reader
        if reader is not None and reader is not threading.current_thread():
            reader.join(limits.TRANSFER_CLOSE_S)

    def step(self) -> bool:
        """Looks at what is under way, on the agent's thread; whether anything was done."""
        if self._lost:
            return False
        try:
            return self._sent() | self._received()
        except self._thread.library.UCXError:
            self.lose()
            return True

    def lose(self) -> None:
        """Nothing goes over the endpoint any more. On the agent's thread."""
        self._lost = True
        for sending in self._sends:
            sending.end("the other process is gone")
        self._inbox.put(None)

    def drop(self) -> None:
        """Closes the endpoint. On the agent's thread."""
        self.lose()
        # Who holds an endpoint holds UCX's worker.
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            with contextlib.suppress(self._thread.library.UCXError):
                endpoint.close_blocking(_CLOSE_NS, 1)
            endpoint.remove_close_callback()
        self._thread.forget(self)
        if self.is_settled:
            self._sends.clear()
            self._receiving = None

    @property
    def is_settled(self) -> bool:
        """Whether UCX has no more use for the memory of sends and receives."""
        requests = [request for sending in self._sends for request in sending.requests]
        if self._receiving is not None:
            requests.append(self._receiving)
        return all(request.completed for request in requests)

    def _post(self, sending: _Sending) -> None:
        endpoint, array = self._endpoint, self._thread.library.array
        if self._lost or endpoint is None or not endpoint.alive:
            sending.end("the other process is gone")
            return
        self._sends.append(sending)
        for part in (sending.length, sending.frame):
            sending.requests.append(endpoint.stream_send(array(part)))

    def _sent(self) -> bool:
        any_ended = False
        while self._sends and all(request.completed for request in self._sends[0].requests):
            sending = self._sends[0]
            for request in sending.requests:
                request.check_error()
            self._sends.popleft().end()
            any_ended = True
        return any_ended

    def _received(self) -> bool:
        if self._receiving is None:
            if self._inbox.qsize() >= _FRAMES_KEPT:
                return False
            self._receive(_LENGTH.itemsize)
            return True
        if not self._receiving.completed:
            return False
        self._receiving.check_error()
        self._receiving = None
        if self._length_is_next:
            nbytes = int(self._room.view(_LENGTH)[0])
            if not 0 < nbytes <= MAX_FRAME_BYTES:
                self.lose()
                return True
            self._receive(nbytes)
        else:
            self._inbox.put(self._room.tobytes())
        self._length_is_next = not self._length_is_next
        return True

    def _receive(self, nbytes: int) -> None:
        if self._endpoint is not None:
            self._room = np.empty(nbytes, np.uint8)
            self._receiving = self._endpoint.stream_recv(self._thread.library.array(self._room))

    def _deliver(self, deliver: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        while (frame := self._inbox.get()) is not None:
            if self._closed:
                return
            deliver(frame)
            self._thread.wake()  # there is room for more
        if not self._closed:
            lost()


class _Sending:
    """A frame on its way."""

    def __init__(self, frame: bytes) -> None:
        self.length = np.array([len(frame)], _LENGTH).view(np.uint8)
        self.frame = np.frombuffer(frame, np.uint8)
        self.requests: list[_Request] = []  # of both
        self.failure = ""
        self.ended = threading.Event()

    def end(self, failure: str = "") -> None:
        """It was sent, or not."""
        self.failure = failure
        self.ended.set()


class _UcxThread:
    """The one thread that uses UCX."""

    def __init__(self, library: _Library) -> None:
        self.library = library
        self._wakeup = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._todo: collections.deque[Callable[[], None]] = collections.deque()
        self._pipes: list[UcxPipe] = []
        self._dropped: list[UcxPipe] = []  # until UCX lets go of their memory
        self._serve: Callable[[FramePipe], object] | None = None
        self._ending = False
        self._lock = threading.Lock()
        try:
            self._worker: _Worker | None = library.worker()
            self._worker.init_blocking_progress_mode()
            self._listener: _Listener | None = library.listener(self._worker, self._accept)
            self.port = self._listener.port
        except library.UCXError as error:
            os.close(self._wakeup)
            raise TransferFailed(f"UCX does not start: {error}") from None
        self._thread = threading.Thread(target=self._run, name="kvstore-ucxx", daemon=True)

    def start(self, serve: Callable[[FramePipe], object]) -> None:
        """serve: takes the pipes of those who connect."""
        self._serve = serve
        self._thread.start()

    def do(self, what: Callable[[], None]) -> None:
        """Has it done on the thread, soon; not at all once that has ended."""
        self._todo.append(what)
        self.wake()

    def wake(self) -> None:
        """Lets the thread look around."""
        with self._lock:
            if self._wakeup >= 0:
                os.eventfd_write(self._wakeup, 1)

    def connect(self, host: str, port: int, timeout_s: float) -> UcxPipe:
        """A pipe to a listener; whether anybody is there shows when something is sent."""
        made: queue.Queue[UcxPipe | Exception] = queue.Queue()

        def create() -> None:
            assert self._worker is not None
            try:
                endpoint = self._worker.create_endpoint_from_hostname(host, port, True)
                made.put(self._add(endpoint))
            except self.library.UCXError as error:
                made.put(error)

        self.do(create)
        try:
            found = made.get(timeout=timeout_s)
        except queue.Empty:
            raise DeadlineExceeded("UCX is busy") from None
        if isinstance(found, Exception):
            raise TransferFailed(f"the other process cannot be reached: {found}")
        return found

    def forget(self, pipe: UcxPipe) -> None:
        """A pipe is dropped. On the thread."""
        if pipe in self._pipes:
            self._pipes.remove(pipe)
            self._dropped.append(pipe)

    def close(self) -> None:
        """Ends the thread and UCX with it. Safe to call twice. `TransferFailed`."""
        self._ending = True
        self.wake()
        self._thread.join(limits.TRANSFER_CLOSE_S)
        if self._thread.is_alive():
            raise TransferFailed("UCX does not end: the agent's memory stays in use")
        with self._lock:
            if self._wakeup >= 0:
                os.close(self._wakeup)
                self._wakeup = -1

    def _accept(self, request: int) -> None:
        assert self._listener is not None
        endpoint = self._listener.create_endpoint_from_conn_request(request, True)
        pipe = self._add(endpoint)
        assert self._serve is not None
        try:
            self._serve(pipe)
        except TransferFailed:  # the agent is being closed
            self.do(pipe.drop)

    def _add(self, endpoint: _Endpoint) -> UcxPipe:
        pipe = UcxPipe(self, endpoint)
        # The callback comes from within UCX, where no endpoint may be closed.
        endpoint.set_close_callback(lambda: self.do(pipe.lose))
        self._pipes.append(pipe)
        return pipe

    def _run(self) -> None:
        worker = self._worker
        assert worker is not None
        poll = select.poll()
        for descriptor in (self._wakeup, worker.epoll_file_descriptor):
            poll.register(descriptor, select.POLLIN)
        while not self._ending:
            if not self._step(worker) and worker.arm():
                poll.poll(_NAP_MS)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wakeup)
        self._end()

    def _step(self, worker: _Worker) -> bool:
        busy = bool(self._todo)
        while self._todo:
            self._todo.popleft()()
        worker.progress()
        for pipe in list(self._pipes):
            busy |= pipe.step()
        if self._dropped:
            self._dropped = [pipe for pipe in self._dropped if not pipe.is_settled]
        return busy

    def _end(self) -> None:
        deadline = time.monotonic() + limits.TRANSFER_CLOSE_S
        for pipe in list(self._pipes):
            if time.monotonic() < deadline:
                pipe.drop()
        self._pipes.clear()
        self._todo.clear()
        self._listener = None
        self._worker = None
