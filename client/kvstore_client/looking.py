"""Look-ups over one stream that stays open, where a call of its own for each takes three times as
long.

The stream is never needed: whatever is wrong with it, a call says so or answers.
"""

from __future__ import annotations

import threading
import time

from google.protobuf.message import DecodeError

from kvstore_client.messages import MessageStream, dialable
from kvstore_client.rpc import Rpc
from kvstore_proto.v1 import kvstore_pb2 as pb

LIFE_S = 60.0  # of one stream; a server is not held for longer by a client that is gone
_RENEWED_S = 45.0  # of use, after which the next look-up opens another
_PAUSE_S = 1.0  # after a failure, in which look-ups are calls
_OVER = (OSError, DecodeError)  # what a call says better
_METHOD = f"/{pb.DESCRIPTOR.services_by_name['KVStore'].full_name}/Matches"


class LookingStream:
    """The look-ups of one session, one at a time, over a stream that is opened when it is needed.

    Thread-safe.
    """

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc
        self._busy = threading.Lock()
        self._stream: MessageStream | None = None
        self._until_s = 0.0  # when the stream is old
        self._not_before_s = 0.0
        self._dialable, self._asked = dialable(rpc.address), False
        self._closed = False

    def ask(self, request: pb.MatchRequest, left_s: float) -> pb.MatchResponse | None:
        """The answer; None where a call has to ask, at once or for what time is left.

        That is while another thread's look-up has the stream, and after a failure. The first
        look-up is a call too: who has only one needs no stream.
        """
        self._rpc.check()
        if not self._dialable:
            return None
        if not self._asked or not self._busy.acquire(blocking=False):
            self._asked = True
            return None
        end_s = time.monotonic() + left_s
        try:
            stream = self._open(end_s)
            if stream is None:
                return None
            answer = stream.exchange(request.SerializeToString(), end_s)
            return pb.MatchResponse.FromString(answer)
        except BaseException as error:
            self._end()  # also where Ctrl-C broke it off: its answer would be the next look-up's
            self._not_before_s = time.monotonic() + _PAUSE_S
            if not isinstance(error, _OVER):
                raise
            return None
        finally:
            self._busy.release()
            if self._closed:
                self.close()  # which found this under way

    def close(self) -> None:
        """Ends the stream, and a look-up under way with it; safe to call twice."""
        stream = self._stream
        if self._rpc.forked:
            if stream:
                stream.close()  # only here: the stream is the parent's
            return
        self._closed = True
        if self._busy.acquire(blocking=False):
            try:
                self._end()
            finally:
                self._busy.release()
        elif stream:
            stream.shut()

    # -- inside ------------------------------------------------------------------------

    def _open(self, end_s: float) -> MessageStream | None:
        now = time.monotonic()
        if self._stream and now > self._until_s:
            self._end()
        if not self._stream and now >= self._not_before_s and not self._closed:
            self._stream = MessageStream(
                self._rpc.address,
                _METHOD,
                metadata=self._rpc.metadata,
                life_s=LIFE_S,
                end_s=end_s,
            )
            self._until_s = now + _RENEWED_S
        return self._stream

    def _end(self) -> None:
        stream, self._stream = self._stream, None
        if stream:
            stream.shut()
            stream.close()
