"""The node's end of the same-host channel on its own loop: no thread is woken for a command."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections import deque
from typing import Any

from kvstore import commands as c
from kvstore.channel import wire
from kvstore.channel.port import ChannelPort
from kvstore.errors import DeadlineExceeded, KVStoreError, ProtocolError, Unavailable

_AHEAD = 8  # commands that are sent and not answered: the daemon takes one after the other
_READ_BYTES = 64 << 10


class LoopPort(ChannelPort):
    """A connection whose commands are awaited, many at one time. Once lost it stays lost.

    Connecting blocks; all else runs on the loop that first asks. After `close` nobody may ask.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        """Raises as `ChannelPort`. The daemon's memory is mapped by another connection."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._turns = asyncio.Semaphore(_AHEAD)
        self._asked: deque[asyncio.Future[Any]] = deque()  # answers come in this order
        self._arrived, self._unsent = bytearray(), bytearray()
        super().__init__(path, timeout_s)  # which closes it where nobody answers
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    async def ask(self, command: c.Command, timeout_s: float) -> Any:
        """One command; `DeadlineExceeded` and `Unavailable` also end the connection. An answer that
        has arrived by the time that anybody looks counts, however long this process stood still."""
        frame = wire.encode(command)
        async with self._turns:  # for no longer than those before have time
            answer = self._begin(frame)
            timer = answer.get_loop().call_later(timeout_s, self._judge, answer, timeout_s)
            try:
                result = await answer
            finally:
                timer.cancel()
        return wire.raise_if_failed(result)

    def close(self) -> None:
        """Ends the connection; who waits for an answer has `Unavailable`."""
        self._end(Unavailable("the connection to the daemon is closed"))
        super().close()

    def _begin(self, frame: bytes) -> asyncio.Future[Any]:
        """Sends a command; what its answer will be."""
        if self.closed:
            raise Unavailable("the daemon is gone")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._loop.add_reader(self._sock, self._take_in)
        answer: asyncio.Future[Any] = self._loop.create_future()
        self._asked.append(answer)
        was_idle = not self._unsent
        self._unsent += frame
        if was_idle:
            self._flush()
        return answer

    def _judge(self, answer: asyncio.Future[Any], timeout_s: float) -> None:
        """At the deadline of an answer."""
        # A process that was stopped, and its time with it, may hear of its timers first.
        while not answer.done() and self._take_in():
            pass
        if not answer.done():
            answer.set_exception(DeadlineExceeded(f"no answer within {timeout_s:g} s"))
            self._end(Unavailable("the daemon did not answer in time"))

    def _flush(self) -> None:
        """Sends what the socket takes, and the rest as soon as it takes more."""
        assert self._loop
        try:
            sent = self._sock.send(self._unsent)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self._end(Unavailable(f"the daemon is gone: {error.strerror}"))
            return
        del self._unsent[:sent]
        if self._unsent:
            self._loop.add_writer(self._sock, self._flush)
        else:
            self._loop.remove_writer(self._sock)

    def _take_in(self) -> bool:
        """Hands out the answers that have arrived; False where nothing has, or it is over."""
        try:
            data = self._sock.recv(_READ_BYTES)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(Unavailable(f"the daemon is gone: {error.strerror}"))
            return False
        if not data:
            self._end(Unavailable("the daemon closed the connection"))
            return False
        self._arrived += data
        try:
            while len(self._arrived) >= wire.FRAME.size and self._hand_out():
                pass
        except ProtocolError as error:
            self._end(error)
        return not self.closed

    def _hand_out(self) -> bool:
        """Gives the first answer to who waits for it; False where it has not come whole."""
        arrived, size = self._arrived, wire.FRAME.size
        end = size + wire.body_length(arrived[:size])
        if len(arrived) < end:
            return False
        result = wire.decode(arrived[:size], bytes(arrived[size:end]))
        del arrived[:end]
        if not self._asked:
            raise ProtocolError("an answer that nobody waits for")
        answer = self._asked.popleft()
        if not answer.done():  # else whoever asked has given up
            answer.set_result(result)
        return True

    def _end(self, why: KVStoreError) -> None:
        """After a failure in the middle of the stream it has no meaning."""
        if self._loop:
            with contextlib.suppress(ValueError, OSError):
                self._loop.remove_reader(self._sock)
                self._loop.remove_writer(self._sock)
            self._loop = None
        self.shut()
        while self._asked:
            answer = self._asked.popleft()
            if not answer.done():
                answer.set_exception(why)
