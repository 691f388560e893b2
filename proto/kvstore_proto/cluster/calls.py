"""Calls to one node on one stream, answered in any order.

A call of gRPC for each of them would take twice as long as a message on a stream that is there
already, and longer than most nodes need for their answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from typing import Any

import grpc

from kvstore.errors import ProtocolError

_NUMBER = struct.Struct("<Q")  # in front of a frame: of the call, and of its answer


def numbered(number: int, frame: bytes) -> bytes:
    """A message of the stream: a frame of the call of that number."""
    return _NUMBER.pack(number) + frame


def opened(message: bytes) -> tuple[int, bytes]:
    """The number and the frame; `ProtocolError`."""
    if len(message) < _NUMBER.size:
        raise ProtocolError("a call has no number")
    (number,) = _NUMBER.unpack_from(message)
    return int(number), message[_NUMBER.size :]


class StreamEnded(Exception):  # noqa: N818
    """Raised to who waits for an answer when the stream is over; code and details as gRPC has
    them."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(details)
        self.code, self.details = code, details


class CallStream:
    """One stream, on the loop that it was made on. call: of `grpc.aio`, just begun."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._loop = asyncio.get_running_loop()
        self._turn = asyncio.Lock()  # a stream takes one message after another
        self._answers: dict[int, asyncio.Future[bytes]] = {}
        self._next = 0
        self._ended: StreamEnded | None = None
        self._writing: set[asyncio.Task[None]] = set()
        self._reading = self._loop.create_task(self._read())

    @property
    def over(self) -> bool:
        """Whether it takes no more calls."""
        return self._reading.done() or self._ended is not None

    async def ask(self, frame: bytes) -> bytes:
        """The answer to a frame. `StreamEnded`."""
        if self._ended:
            raise self._ended
        number, self._next = self._next, self._next + 1
        answer: asyncio.Future[bytes] = self._loop.create_future()
        self._answers[number] = answer
        # A write that is cancelled ends the stream for all: who gives up leaves it to its task.
        writing = self._loop.create_task(self._write(number, frame))
        self._writing.add(writing)
        writing.add_done_callback(self._writing.discard)
        try:
            return await answer
        finally:
            del self._answers[number]

    async def close(self) -> None:
        """Ends it, and all that wait."""
        self._call.cancel()
        await asyncio.wait([self._reading])

    async def _write(self, number: int, frame: bytes) -> None:
        async with self._turn:
            if number not in self._answers:
                return  # nobody waits any more
            # Where it fails the stream is over, which whoever reads finds out.
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self._call.write(numbered(number, frame))

    async def _read(self) -> None:
        try:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                while (message := await self._call.read()) is not grpc.aio.EOF:
                    number, frame = opened(message)
                    answer = self._answers.get(number)
                    if answer and not answer.done():
                        answer.set_result(frame)
            self._ended = StreamEnded(await self._call.code(), await self._call.details() or "")
        except (ProtocolError, asyncio.CancelledError) as error:
            self._call.cancel()
            self._ended = StreamEnded(grpc.StatusCode.UNAVAILABLE, str(error))
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(self._ended)
