"""Transfer by frames over any stream: what works everywhere, at the cost of copies.

The passive side holds the memory, looks at every range that is asked for, and copies itself; so
an agent that is closed, or a range that is not registered, is refused whatever the other side
does. The active side asks in chunks, of which few are under way at any time.
"""

from __future__ import annotations

import hmac
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kvstore import limits
from kvstore.errors import DeadlineExceeded, InvalidArgument, KVStoreError, ProtocolError
from kvstore.transfer import description as descriptions
from kvstore.transfer import frames
from kvstore.transfer.base import U64, Arrived, Memory, Pieces, TransferFailed
from kvstore.transfer.frames import Kind
from kvstore.transfer.registered import Registered, checked

KIND = "grpc"
TOKEN_BYTES = 16
_CHUNK = np.uint64(limits.STREAM_CHUNK_BYTES)


class FramePipe(Protocol):
    """One connection that carries frames both ways, whole and in order.

    A frame has at most `frames.MAX_FRAME_BYTES` bytes.
    """

    def start(self, deliver: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        """Gives each frame that comes to `deliver`, one at a time, and calls `lost` once when no
        more will come; not after `close`. What came before waits for this call."""

    def send(self, frame: bytes, timeout_s: float) -> None:
        """Sends a frame, and waits while the other side does not take more. From any thread.
        `TransferFailed` where the pipe is lost or closed, also while it waits;
        `DeadlineExceeded`, after which the frame may have been sent."""

    def close(self) -> None:
        """Ends the pipe without waiting for the other side. Safe to call twice."""


Pipes = Callable[[bytes, float], FramePipe]


def no_pipes(_body: bytes, _timeout_s: float) -> FramePipe:
    """Reaches nobody: for agents that are passive only."""
    raise TransferFailed("this agent has no way to others")


class StreamAgent:
    """An agent over frames: see `kvstore.transfer.base.Agent`.

    name: for logs. pipes: reaches another agent by what its description says, `where` and then its
    token (`TOKEN_BYTES`), within so many seconds; `TransferFailed`, `DeadlineExceeded`. Whoever
    owns the other ends gives them to `serve`. kind: what the agent is called, in its description
    too. where: helps `pipes` to find the way.
    """

    def __init__(
        self, name: str, pipes: Pipes = no_pipes, *, kind: str = KIND, where: bytes = b""
    ) -> None:
        self._name, self._pipes, self._kind = name, pipes, kind
        self.token = secrets.token_bytes(TOKEN_BYTES)
        self._where = where
        self._registered = Registered()
        self._gate = threading.Lock()  # held while a byte of registered memory is copied
        self._fixed = self._closed = False
        self._ends: set[PassiveEnd] = set()
        self._remotes: set[StreamRemote] = set()

    @property
    def kind(self) -> str:
        """See `Agent`."""
        return self._kind

    def register(self, memory: Memory) -> None:
        """See `Agent`."""
        with self._gate:
            if self._fixed or self._closed:
                raise InvalidArgument("memory", "is registered before describe and connect only")
            self._registered.add(memory)

    def describe(self) -> bytes:
        """See `Agent`."""
        with self._gate:
            self._usable()
            return descriptions.pack(self._kind, self._where + self.token)

    def serve(self, pipe: FramePipe) -> PassiveEnd:
        """Answers to the other end of a pipe until either side closes it."""
        end = PassiveEnd(self, pipe)
        with self._gate:
            self._usable()
            self._ends.add(end)
        end.open()
        return end

    def connect(self, description: bytes, timeout_s: float) -> StreamRemote:
        """See `Agent`."""
        deadline = time.monotonic() + timeout_s
        body = descriptions.unpack(self._kind, description)
        if len(body) < TOKEN_BYTES:
            raise ProtocolError("an agent's token is too short")
        with self._gate:
            self._usable()
        pipe = self._pipes(body, timeout_s)
        remote = StreamRemote(self._registered, pipe, kind=self._kind)
        with self._gate:
            self._remotes = {each for each in self._remotes if not each.closed} | {remote}
            closed = self._closed
        try:
            if closed:
                raise TransferFailed("this agent is closed")
            remote.open(body[-TOKEN_BYTES:], max(0.0, deadline - time.monotonic()))
        except BaseException:
            remote.close()
            raise
        return remote

    def close(self) -> None:
        """See `Agent`."""
        with self._gate:
            self._closed = True
            ends, self._ends = self._ends, set()
            remotes, self._remotes = self._remotes, set()
        for remote in remotes:
            remote.close()
        for end in ends:
            end.close()

    def serve_read(self, frame: frames.Frame) -> bytes:
        """The answer to a READ, for `PassiveEnd`."""
        with self._gate:
            views = self._served(frame)
            if views is None:
                return _refusal(frame)
            return frames.encode(Kind.DATA, frame.number, views)

    def serve_write(self, frame: frames.Frame) -> bytes:
        """Does a WRITE, and returns its answer, for `PassiveEnd`."""
        with self._gate:
            views = self._served(frame)
            if views is None:
                return _refusal(frame)
            _scatter(frame.payload, views)
            return frames.encode(Kind.WRITTEN, frame.number)

    def forget(self, end: PassiveEnd) -> None:
        """A pipe has ended, for `PassiveEnd`."""
        with self._gate:
            self._ends.discard(end)

    def _usable(self) -> None:
        if self._closed:
            raise TransferFailed("this agent is closed")
        self._fixed = True

    def _served(self, frame: frames.Frame) -> list[memoryview] | None:
        if self._closed:
            return None
        return self._registered.views(frame.addresses, frame.nbytes)


def _refusal(frame: frames.Frame) -> bytes:
    return frames.encode(Kind.REFUSED, frame.number, [b"this memory is not registered (any more)"])


def _scatter(source: memoryview, targets: list[memoryview]) -> None:
    at = 0
    for target in targets:
        target[:] = source[at : at + len(target)]
        at += len(target)


class PassiveEnd:
    """Answers to one active process. Made by `StreamAgent.serve`."""

    def __init__(self, agent: StreamAgent, pipe: FramePipe) -> None:
        self._agent, self._pipe = agent, pipe
        self._greeted = False

    def open(self) -> None:
        """Begins to answer."""
        self._pipe.start(self._deliver, self.close)

    def close(self) -> None:
        """Ends the pipe. The agent's memory is guarded by its own `close`. Safe to call twice."""
        self._pipe.close()
        self._agent.forget(self)

    def _deliver(self, data: bytes) -> None:
        try:
            answer = self._answer(frames.decode(data))
            # The other side takes what it asked for, or is too slow to be waited for.
            self._pipe.send(answer, limits.TRANSFER_CLOSE_S)
        except KVStoreError:
            self.close()

    def _answer(self, frame: frames.Frame) -> bytes:
        if frame.kind is Kind.HELLO and not self._greeted:
            known = hmac.compare_digest(bytes(frame.payload), self._agent.token)
            if not known or frame.number != frames.VERSION:
                return frames.encode(Kind.REFUSED, frame.number, [b"unknown token or version"])
            self._greeted = True
            return frames.encode(Kind.WELCOME, frames.VERSION)
        if self._greeted and frame.kind is Kind.READ:
            return self._agent.serve_read(frame)
        if self._greeted and frame.kind is Kind.WRITE:
            return self._agent.serve_write(frame)
        raise ProtocolError(f"a frame {frame.kind.name} that no active side sends now")


@dataclass(slots=True, eq=False)
class _Call:
    """A read or write under way."""

    read: bool
    left: int  # chunks
    failure: str = ""


class StreamRemote:
    """Another process's memory: see `kvstore.transfer.base.Remote`. Made by `StreamAgent`."""

    def __init__(self, registered: Registered, pipe: FramePipe, *, kind: str = KIND) -> None:
        self._registered, self._pipe, self.kind = registered, pipe, kind
        # Held while bytes come into local memory: so nothing comes after `close`.
        self._changed = threading.Condition()
        # By number, in the order of sending. A chunk whose call has given up has no targets.
        self._chunks: dict[int, tuple[_Call, list[memoryview]]] = {}
        self._next = frames.VERSION + 1
        self._welcome = False
        self._broken = ""
        self.closed = False

    def open(self, token: bytes, timeout_s: float) -> None:
        """Makes itself known: `TransferFailed`, `DeadlineExceeded`."""
        deadline = time.monotonic() + timeout_s
        self._pipe.start(self._deliver, self._lost)
        self._pipe.send(frames.encode(Kind.HELLO, frames.VERSION, [token]), timeout_s)
        with self._changed:
            self._wait(lambda: self._welcome, deadline)

    def read(self, pieces: Pieces, timeout_s: float, arrived: Arrived | None = None) -> None:
        """See `Remote`. After `DeadlineExceeded` nothing arrives any more."""
        del arrived  # chunks are in flight side by side, and who takes them in is another thread
        self._run(pieces, timeout_s, read=True)

    def write(self, pieces: Pieces, timeout_s: float) -> None:
        """See `Remote`. After `DeadlineExceeded` local memory is not read any more."""
        self._run(pieces, timeout_s, read=False)

    def close(self) -> None:
        """See `Remote`."""
        with self._changed:
            self.closed = True
            self._broken = self._broken or "the connection was closed"
            self._chunks.clear()
            self._changed.notify_all()
        self._pipe.close()

    def _run(self, pieces: Pieces, timeout_s: float, *, read: bool) -> None:
        deadline = time.monotonic() + timeout_s
        wanted = checked(pieces)
        if self._registered.regions.find(wanted.local, wanted.nbytes) is None:
            raise InvalidArgument("pieces.local", "lies outside of the memory registered here")
        chunks = list(_chunks(wanted))
        call = _Call(read=read, left=len(chunks))
        try:
            for chunk in chunks:
                self._ask(call, chunk, deadline)
            with self._changed:
                self._wait(lambda: not call.left or bool(call.failure), deadline)
                if call.failure:
                    raise TransferFailed(call.failure)
        finally:
            self._give_up(call)

    def _ask(self, call: _Call, chunk: Pieces, deadline: float) -> None:
        views = self._registered.views(chunk.local, chunk.nbytes)
        # They were found whole, and memory is not given back while the agent lives.
        assert views is not None
        with self._changed:
            self._wait(
                lambda: len(self._chunks) < limits.STREAM_CHUNKS_AHEAD or bool(call.failure),
                deadline,
            )
            if call.failure:
                raise TransferFailed(call.failure)
            number, self._next = self._next, self._next + 1
            self._chunks[number] = (call, views if call.read else [])
        kind = Kind.READ if call.read else Kind.WRITE
        payload: list[memoryview] = [] if call.read else views
        frame = frames.encode(kind, number, payload, chunk.remote, chunk.nbytes)
        self._pipe.send(frame, max(0.0, deadline - time.monotonic()))

    def _give_up(self, call: _Call) -> None:
        """Answers that still come for it are taken, and their bytes dropped."""
        if not call.left:
            return
        with self._changed:
            for number, (owner, _) in self._chunks.items():
                if owner is call:
                    self._chunks[number] = (call, [])
            call.failure = call.failure or "given up"

    def _wait(self, done: Callable[[], bool], deadline: float) -> None:
        """With the condition held: until it is so. `TransferFailed`, `DeadlineExceeded`."""
        left_s = max(0.0, deadline - time.monotonic())
        in_time = self._changed.wait_for(lambda: bool(self._broken) or done(), left_s)
        if self._broken:
            raise TransferFailed(self._broken)
        if not in_time:
            raise DeadlineExceeded("the other process did not answer in time")

    def _lost(self) -> None:
        with self._changed:
            self._broken = self._broken or "the other process is gone"
            self._changed.notify_all()

    def _deliver(self, data: bytes) -> None:
        with self._changed:
            if self._broken:
                return
            try:
                self._take(frames.decode(data))
            except ProtocolError as error:
                self._broken = str(error)
            self._changed.notify_all()

    def _take(self, frame: frames.Frame) -> None:
        if not self._welcome:
            if frame.kind is not Kind.WELCOME or frame.number != frames.VERSION:
                self._broken = f"refused: {bytes(frame.payload).decode(errors='replace')}"
            self._welcome = not self._broken
            return
        call, targets = self._chunks.pop(frame.number, (None, []))
        if call is None:
            raise ProtocolError(f"an answer to chunk {frame.number}, which nobody asked for")
        if frame.kind is Kind.REFUSED:
            call.failure = call.failure or bytes(frame.payload).decode(errors="replace")
        elif frame.kind is not (Kind.DATA if call.read else Kind.WRITTEN):
            raise ProtocolError(f"{frame.kind.name} answers something else")
        elif call.read and not call.failure:
            if len(frame.payload) != sum(map(len, targets)):
                raise ProtocolError("the other process sent more or fewer bytes than asked for")
            _scatter(frame.payload, targets)
        call.left -= 1


def _chunks(pieces: Pieces) -> Iterator[Pieces]:
    """The pieces, in as many frames' worth as they take."""
    cut = _cut(pieces)
    ends = np.cumsum(cut.nbytes)
    first, sent = 0, np.uint64(0)
    while first < len(ends):
        last = int(np.searchsorted(ends, sent + _CHUNK, "right"))
        last = min(last, first + limits.STREAM_CHUNK_PIECES)
        yield Pieces(cut.local[first:last], cut.remote[first:last], cut.nbytes[first:last])
        first, sent = last, ends[last - 1]


def _cut(pieces: Pieces) -> Pieces:
    """Pieces of a chunk at most."""
    times = ((pieces.nbytes + _CHUNK - np.uint64(1)) // _CHUNK).astype(np.int64)
    if (times == 1).all():
        return pieces
    which = np.repeat(np.arange(len(times)), times)
    firsts = np.cumsum(times) - times
    offsets: U64 = (np.arange(len(which)) - firsts[which]).astype(np.uint64) * _CHUNK
    return Pieces(
        pieces.local[which] + offsets,
        pieces.remote[which] + offsets,
        np.minimum(pieces.nbytes[which] - offsets, _CHUNK),
    )
