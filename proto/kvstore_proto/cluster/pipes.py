"""What one stream of a session carries: greetings, and frames of the transfers that always work."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from kvstore.errors import DeadlineExceeded, ProtocolError
from kvstore.transfer.base import Agent, TransferFailed
from kvstore.transfer.description import unpack
from kvstore.transfer.either import EitherAgent, parts_of
from kvstore.transfer.stream import KIND, FramePipe, StreamAgent

_GREETING, _TRANSFER = b"\0", b"\1"  # a message's first byte
_GRACE_S = 5.0
Write = Callable[[bytes], Awaitable[Any]]


class StreamPipe:
    """One end of a stream, from a thread's side a `FramePipe`. cancel: breaks the stream off, where
    the end of `follow` alone does not."""

    def __init__(self, write: Write, cancel: Callable[[], Any] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        self._write, self._cancel = write, cancel
        self._lock = asyncio.Lock()  # a stream takes one message after another
        self._changed = threading.Condition()
        self._over = False
        self._deliver: Callable[[bytes], None] | None = None
        self._lost: Callable[[], None] | None = None
        self._thread = ThreadPoolExecutor(1, "kvstore-pipe")
        self._task: asyncio.Task[None] | None = None
        self.greeting: asyncio.Future[bytes] = self._loop.create_future()

    # -- from threads ------------------------------------------------------------------

    def start(self, deliver: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        """See `FramePipe.start`."""
        with self._changed:
            over = self._over
            self._deliver, self._lost = deliver, lost
            self._changed.notify_all()
        if over:
            lost()

    def send(self, frame: bytes, timeout_s: float) -> None:
        """See `FramePipe.send`; not from the loop's own thread."""
        if self._over:
            raise TransferFailed("the other side is gone")
        sending = asyncio.run_coroutine_threadsafe(self._send(_TRANSFER + frame), self._loop)
        try:
            sending.result(max(timeout_s, 1e-3))
        except TimeoutError:
            sending.cancel()
            raise DeadlineExceeded("the other side takes no more bytes") from None
        except Exception as error:
            raise TransferFailed(f"the other side is gone: {error}") from None

    def close(self) -> None:
        """See `FramePipe.close`."""
        with contextlib.suppress(RuntimeError):  # the loop may have ended, and the stream with it
            self._loop.call_soon_threadsafe(self._break_off)

    def _break_off(self) -> None:
        if self._cancel:
            self._cancel()
        if self._task:
            self._task.cancel()

    # -- on the loop -------------------------------------------------------------------

    @property
    def is_lost(self) -> bool:
        """Whether the stream is over."""
        return self._over

    async def greet(self, frame: bytes) -> None:
        """Sends a greeting, which the other end finds in `greeting`."""
        await self._send(_GREETING + frame)

    async def _send(self, message: bytes) -> None:
        async with self._lock:
            await self._write(message)

    def follow(self, messages: AsyncIterator[bytes]) -> None:
        """Takes what arrives, until the stream ends."""
        self._task = self._loop.create_task(self._follow(messages))

    async def _follow(self, messages: AsyncIterator[bytes]) -> None:
        try:
            async for message in messages:
                if self._over:
                    return
                if message[:1] == _GREETING:
                    if not self.greeting.done():
                        self.greeting.set_result(message[1:])
                else:  # one at a time: what is not taken yet holds the sender up
                    await self._loop.run_in_executor(self._thread, self._take, message[1:])
        finally:
            self.end()

    def _take(self, frame: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._deliver or self._over, _GRACE_S)
            deliver = self._deliver
        if deliver:
            deliver(frame)

    def end(self) -> None:
        """The stream is over."""
        with self._changed:
            if self._over:
                return
            self._over = True
            lost = self._lost
            self._changed.notify_all()
        if not self.greeting.done():
            self.greeting.cancel()
        if lost:
            self._thread.submit(lost)
        self._thread.shutdown(wait=False)

    async def over(self, timeout_s: float | None = None) -> None:
        """Waits for the stream's end."""
        if self._task:
            await asyncio.wait([self._task], timeout=timeout_s)


class PipeBook:
    """Which pipe leads to which agent, by the tokens in their descriptions."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pipes: dict[bytes, StreamPipe] = {}

    def add(self, description: bytes, pipe: StreamPipe) -> None:
        """A pipe at whose other end that agent serves. Descriptions of other kinds are ignored."""
        with contextlib.suppress(ProtocolError), self._lock:
            self._pipes = {token: p for token, p in self._pipes.items() if not p.is_lost}
            self._pipes[_token(description)] = pipe

    def find(self, token: bytes, timeout_s: float) -> FramePipe:
        """The pipe to the agent; `TransferFailed` where there is none (any more)."""
        del timeout_s
        with self._lock:
            pipe = self._pipes.get(token)
        if pipe is None:
            raise TransferFailed("no stream leads to that agent")
        return pipe


def _token(description: bytes) -> bytes:
    """Of the agent over streams; `ProtocolError` where there is none."""
    try:
        parts = parts_of(description)
    except ProtocolError:
        return unpack(KIND, description)
    return unpack(KIND, parts.get(KIND, b""))


class Streams:
    """What this process's agent does with the streams of sessions, where it transfers by them."""

    def __init__(self) -> None:
        self.book = PipeBook()
        self._agent: StreamAgent | None = None

    def set_agent(self, agent: Agent) -> None:
        """The agent that serves from now on; one of another kind has no use for streams."""
        agents = agent.agents if isinstance(agent, EitherAgent) else [agent]
        serving = (a for a in agents if isinstance(a, StreamAgent) and a.kind == KIND)
        self._agent = next(serving, None)

    def serve(self, pipe: StreamPipe) -> None:
        """The other end wants this process's memory."""
        if self._agent:
            self._agent.serve(pipe)
