"""`kvstore.cluster.world.World` over asyncio and gRPC: the same for nodes and clients."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

import grpc

from kvstore.cluster.answers import raise_if_failed
from kvstore.cluster.messages import CODEC, Hello, Welcomed
from kvstore.cluster.world import Task
from kvstore.errors import (
    DeadlineExceeded,
    KVStoreError,
    PermissionDenied,
    ProtocolError,
    Unavailable,
)
from kvstore_proto.cluster.calls import CallStream, StreamEnded
from kvstore_proto.cluster.pipes import StreamPipe, Streams
from kvstore_proto.cluster.rpc import ATTACH, AUTHORIZATION, CALLS, OPTIONS, SERVICE, Tls

T = TypeVar("T")
_DENIED = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
_CLOSE_S = 5.0


class AsyncTask:
    """`Task` of an `asyncio.Task`."""

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self.task = task

    @property
    def done(self) -> bool:
        """See `Task.done`."""
        return self.task.done()

    def result(self) -> Any:
        """See `Task.result`."""
        try:
            return self.task.result()
        except asyncio.CancelledError:
            raise Unavailable("the work was cancelled") from None

    def cancel(self) -> None:
        """See `Task.cancel`."""
        self.task.cancel()


class Attached:
    """`Attachment` over a stream that this side began."""

    def __init__(self, call: Any, welcomed: Welcomed, pipe: StreamPipe) -> None:
        self.welcomed, self._call, self._pipe = welcomed, call, pipe

    @property
    def lost(self) -> bool:
        """See `Attachment.lost`."""
        return self._pipe.is_lost

    async def close(self) -> None:
        """See `Attachment.close`."""
        self._call.cancel()
        await self._pipe.over(_CLOSE_S)


class AsyncWorld:
    """The running loop's world. token: shown with every call. tls: none for plain text. streams:
    what the process's transfer agent does with the streams of sessions."""

    def __init__(self, *, token: str, streams: Streams, tls: Tls | None = None) -> None:
        self.random = random.Random()
        self.streams = streams
        self._metadata = ((AUTHORIZATION, f"Bearer {token}"),)
        self._credentials = tls.channel() if tls else None
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._calls: dict[str, CallStream] = {}  # by address; one that is over gives way to another
        self._tasks: set[asyncio.Task[Any]] = set()

    def now_ms(self) -> float:
        """See `World.now_ms`."""
        return time.monotonic() * 1e3

    async def sleep(self, ms: float) -> None:
        """See `World.sleep`."""
        await asyncio.sleep(ms / 1e3)

    def spawn(self, work: Coroutine[Any, Any, T]) -> Task[T]:
        """See `World.spawn`."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._over)
        return AsyncTask(task)

    def _over(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever wants it has the task; nobody else is to be told

    async def wait(self, tasks: Sequence[Task[Any]], timeout_ms: float) -> None:
        """See `World.wait`."""
        left = [task.task for task in tasks if isinstance(task, AsyncTask) and not task.done]
        if left:
            await asyncio.wait(
                left, timeout=max(timeout_ms, 0.0) / 1e3, return_when=asyncio.FIRST_COMPLETED
            )

    async def wait_all(self, tasks: Sequence[Task[Any]], timeout_ms: float) -> None:
        """See `World.wait_all`."""
        left = [task.task for task in tasks if isinstance(task, AsyncTask) and not task.done]
        if left:
            _done, late = await asyncio.wait(left, timeout=max(timeout_ms, 0.0) / 1e3)
            for task in late:
                task.cancel()

    async def call(self, address: str, message: Any, timeout_ms: float) -> Any:
        """See `World.call`."""
        frame = CODEC.encode(message)
        stream = self._calls.get(address)
        if stream is None or stream.over:
            stream = self._calls[address] = CallStream(self._stream(address, CALLS))
        try:
            async with asyncio.timeout(timeout_ms / 1e3):
                answer = await stream.ask(frame)
        except TimeoutError:
            raise DeadlineExceeded(f"{address} gave no answer in time") from None
        except StreamEnded as ended:
            raise _error_of(ended.code, ended.details, address) from None
        return raise_if_failed(CODEC.decode_frame(answer))

    async def attach(self, address: str, hello: Hello, timeout_ms: float) -> Attached:
        """See `World.attach`."""
        call = self._stream(address, ATTACH)
        pipe = StreamPipe(call.write, call.cancel)
        pipe.follow(_frames(call))
        if hello.agent:
            self.streams.serve(pipe)
        try:
            async with asyncio.timeout(timeout_ms / 1e3):
                await pipe.greet(CODEC.encode(hello))
                greeting = await pipe.greeting
            welcomed = raise_if_failed(CODEC.decode_frame(greeting))
            if not isinstance(welcomed, Welcomed):
                raise ProtocolError(f"{address} answered {type(welcomed).__name__}")
        except grpc.aio.AioRpcError as error:
            raise _error_of(error.code(), error.details(), address) from None
        except TimeoutError:
            call.cancel()
            raise DeadlineExceeded(f"{address} began no session in time") from None
        except asyncio.CancelledError:
            call.cancel()
            if not pipe.is_lost:
                raise
            raise await _why(call, address) from None
        except asyncio.InvalidStateError:
            raise await _why(call, address) from None
        except KVStoreError:
            call.cancel()
            raise
        if not hello.agent:
            self.streams.book.add(welcomed.agent, pipe)
        return Attached(call, welcomed, pipe)

    async def close(self) -> None:
        """Ends what was spawned, and all connections."""
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=5.0)
        for stream in self._calls.values():
            await stream.close()
        self._calls.clear()
        for channel in self._channels.values():
            await channel.close(None)
        self._channels.clear()

    def _stream(self, address: str, method: str) -> Any:
        """Begins a stream; whether anybody is there shows when it is used."""
        begin: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel(
            address
        ).stream_stream(f"/{SERVICE}/{method}")
        return begin(metadata=self._metadata)

    def _channel(self, address: str) -> grpc.aio.Channel:
        channel = self._channels.get(address)
        if channel is None:
            if self._credentials:
                channel = grpc.aio.secure_channel(address, self._credentials, options=OPTIONS)
            else:
                channel = grpc.aio.insecure_channel(address, options=OPTIONS)
            self._channels[address] = channel
        return channel


async def _frames(call: Any) -> AsyncIterator[bytes]:
    """What arrives on a stream until it ends."""
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        while True:
            frame = await call.read()
            if frame is grpc.aio.EOF:
                return
            yield frame


async def _why(call: Any, address: str) -> KVStoreError:
    """Why a stream ended before its session began."""
    return _error_of(await call.code(), await call.details(), address)


def _error_of(code: grpc.StatusCode, details: str | None, address: str) -> KVStoreError:
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(f"{address} gave no answer in time")
    if code in _DENIED:
        return PermissionDenied(f"{address}: {details}")
    if code == grpc.StatusCode.UNIMPLEMENTED:
        return ProtocolError(f"{address} speaks another protocol: run the same release on both")
    return Unavailable(f"{address} does not answer: {details}")
