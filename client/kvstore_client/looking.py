"""Look-ups over one stream that stays open, where a call of its own for each takes twice as long.

The stream is never needed: whatever is wrong with it, a call says so or answers.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Iterator

import grpc

from kvstore.errors import KVStoreError
from kvstore_client.rpc import Rpc
from kvstore_proto.v1 import kvstore_pb2 as pb

LIFE_S = 60.0  # of one stream; a server is not held for longer by a client that is gone
_RENEWED_S = 45.0  # of use, after which the next look-up opens another
_PAUSE_S = 1.0  # after a failure, in which look-ups are calls
_OVER = (grpc.RpcError, StopIteration, KVStoreError, ValueError)  # what a call says better


class _Stream:
    """One stream: a look-up is a message there and one back."""

    def __init__(self, rpc: Rpc) -> None:
        self.until_s = time.monotonic() + _RENEWED_S
        self._requests: queue.SimpleQueue[pb.MatchRequest | None] = queue.SimpleQueue()
        requests: Iterator[pb.MatchRequest] = iter(self._requests.get, None)
        self._call = rpc.stub.Matches(requests, timeout=LIFE_S, metadata=rpc.metadata)

    def ask(self, request: pb.MatchRequest) -> pb.MatchResponse:
        """Raises `grpc.RpcError`, or StopIteration where the server ended it, after `end` too."""
        self._requests.put(request)
        return next(self._call)

    def end(self) -> None:
        """Also ends `ask` in another thread."""
        self._requests.put(None)  # or gRPC's thread, which waits for requests, would stay
        self._call.cancel()


class LookingStream:
    """The look-ups of one session, one at a time, over a stream that is opened when it is needed.

    Thread-safe.
    """

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._busy = threading.Lock()
        self._stream: _Stream | None = None
        self._not_before_s = 0.0
        self._asked = False
        self._changed = threading.Condition()
        self._due_s: float | None = None  # when a look-up that is under way has to be over
        self._sleeps_until_s = -math.inf  # the watching thread, while it does
        self._watching: threading.Thread | None = None
        self._closed = False

    def ask(self, request: pb.MatchRequest, left_s: float) -> pb.MatchResponse | None:
        """The answer; None where a call has to ask, at once or for what time is left.

        That is while another thread's look-up has the stream, and after a failure. The first
        look-up is a call too: who has only one needs no stream.
        """
        self._rpc.check()
        if not self._asked or not self._busy.acquire(blocking=False):
            self._asked = True
            return None
        try:
            stream = self._open()
            return self._asked_by(stream, request, left_s) if stream else None
        except BaseException as error:
            self._end()  # also where Ctrl-C broke it off: its answer would be the next look-up's
            self._not_before_s = time.monotonic() + _PAUSE_S
            if not isinstance(error, _OVER):
                raise
            return None
        finally:
            self._busy.release()

    def close(self) -> None:
        """Ends the stream, and a look-up under way with it; safe to call twice."""
        if self._rpc.forked:
            return  # the stream and the thread are the parent's
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._end()
        if self._watching:
            self._watching.join()

    # -- inside ------------------------------------------------------------------------

    def _open(self) -> _Stream | None:
        now = time.monotonic()
        if self._stream and now > self._stream.until_s:
            self._end()
        if not self._stream and now >= self._not_before_s and not self._closed:
            self._stream = _Stream(self._rpc)
            if not self._watching:
                self._watching = threading.Thread(
                    target=self._watch, name="kvstore-looking", daemon=True
                )
                self._watching.start()
        return self._stream

    def _asked_by(
        self, stream: _Stream, request: pb.MatchRequest, left_s: float
    ) -> pb.MatchResponse:
        self._due_s = due_s = time.monotonic() + left_s
        if due_s < self._sleeps_until_s:
            with self._changed:
                self._changed.notify()
        try:
            return stream.ask(request)
        finally:
            self._due_s = None

    def _end(self) -> None:
        stream, self._stream = self._stream, None
        if stream:
            stream.end()

    def _watch(self) -> None:
        """The thread: ends the stream under a look-up whose time is over, because gRPC has no time
        for one message of a stream. It is not woken for each, but looks when one may be due."""
        with self._changed:
            while not self._closed:
                self._sleeps_until_s = math.inf  # first: what is due from now on wakes us
                due_s, now = self._due_s, time.monotonic()
                if due_s is not None and now >= due_s:
                    self._due_s = None
                    self._end()
                    continue
                if due_s is not None:
                    self._sleeps_until_s = due_s
                self._changed.wait(None if due_s is None else due_s - now)
                self._sleeps_until_s = -math.inf
