"""The gRPC side of a node: who may ask, sessions on streams, and handlers that nobody can break."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import grpc
import structlog

from kvstore import limits
from kvstore.cluster.answers import failed
from kvstore.cluster.messages import CODEC, Hello, Welcomed
from kvstore.cluster.node import Node
from kvstore.errors import KVStoreError, ProtocolError, ResourceExhausted, Unavailable
from kvstore_proto.cluster.calls import numbered, opened
from kvstore_proto.cluster.pipes import StreamPipe, Streams
from kvstore_proto.cluster.rpc import ATTACH, AUTHORIZATION, CALLS, OPTIONS, SERVICE, Tls

log = structlog.get_logger()
_MOST_CALLS = 512  # that run at one time
_MOST_STREAMS = 2 * limits.MAX_CLUSTER_SESSIONS + 64  # sessions, and the calls of who has them
_GREETING_S = 5.0
_GOODBYE_S = 1.0
_GONE = (grpc.RpcError, grpc.aio.UsageError, grpc.aio.InternalError)  # nobody is there to be told
_NO_TOKEN = (
    grpc.StatusCode.UNAUTHENTICATED,
    "the cluster's token is missing or wrong: nodes need the same cluster secret, clients what"
    " `kvstore-server cluster-token` prints there",
)


class PeerService:
    """Serves a node at an address. tokens: of nodes and of clients."""

    def __init__(self, node: Node, *, node_token: str, client_token: str, streams: Streams) -> None:
        self._node, self._streams = node, streams
        self._tokens = {True: f"Bearer {node_token}", False: f"Bearer {client_token}"}
        self._server = grpc.aio.server(options=OPTIONS, maximum_concurrent_rpcs=_MOST_STREAMS)
        handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            CALLS: grpc.stream_stream_rpc_method_handler(self._take_calls),
            ATTACH: grpc.stream_stream_rpc_method_handler(self._attach),
        }
        generic = grpc.method_handlers_generic_handler(SERVICE, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        self._running: set[asyncio.Task[Any]] = set()
        self._pipes: set[StreamPipe] = set()
        self._callers: set[asyncio.Task[None]] = set()
        self._calls = 0  # under way
        self._stopping = False

    async def start(self, address: str, tls: Tls | None) -> int:
        """Binds and serves; the port. OSError-like `RuntimeError` where it cannot be had."""
        if tls:
            port = self._server.add_secure_port(address, tls.server())
        else:
            port = self._server.add_insecure_port(address)
        await self._server.start()
        return int(port)

    async def stop(self, grace_s: float) -> None:
        """Takes no more calls, and lets those that run end for so long; then streams end, which
        would not by themselves."""
        self._stopping = True
        await self._let_end(grace_s)
        for pipe in self._pipes:
            pipe.close()
        for caller in self._callers:
            caller.cancel()
        await self._server.stop(_GOODBYE_S)
        await self._let_end(grace_s)

    async def _let_end(self, grace_s: float) -> None:
        if self._running:
            await asyncio.wait(list(self._running), timeout=grace_s)

    async def _who(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> bool:
        """Whether a node asks; ends the call of whoever is neither node nor client."""
        shown = ""
        for key, value in context.invocation_metadata() or ():
            if key == AUTHORIZATION:
                shown = str(value)
        for is_node, token in self._tokens.items():
            if hmac.compare_digest(shown.encode(), token.encode()):
                return is_node
        await context.abort(*_NO_TOKEN)
        raise AssertionError("abort raises")

    async def _take_calls(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        is_node = await self._who(context)
        work = self._follow_calls(_quietly(requests), context, is_node)
        caller = asyncio.get_running_loop().create_task(work)
        self._callers.add(caller)
        try:
            await asyncio.wait([caller])
        finally:
            caller.cancel()
            self._callers.discard(caller)

    async def _follow_calls(
        self,
        messages: AsyncIterator[bytes],
        context: grpc.aio.ServicerContext[bytes, bytes],
        is_node: bool,
    ) -> None:
        turn = asyncio.Lock()  # a stream takes one message after another

        async def carry_out(number: int, frame: bytes) -> None:
            self._calls += 1
            try:
                answer = await self._answer_to(frame, is_node)
                async with turn:
                    with contextlib.suppress(*_GONE):
                        await context.write(numbered(number, answer))
            finally:
                self._calls -= 1

        async for message in messages:
            try:
                number, frame = opened(message)
            except ProtocolError:
                return  # nobody could tell what an answer is to
            # A caller that gives up must not end what holds leases and slots in the middle.
            self._keep(carry_out(number, frame))

    async def _answer_to(self, frame: bytes, is_node: bool) -> bytes:
        if self._stopping:
            return CODEC.encode(failed(Unavailable("this node ends")))
        if self._calls > _MOST_CALLS:
            full = f"{_MOST_CALLS} calls are under way here"
            retry_ms = limits.RETRY_AFTER_MS
            return CODEC.encode(failed(ResourceExhausted(full, retry_after_ms=retry_ms)))
        try:
            message = CODEC.decode_frame(frame)
        except KVStoreError as error:
            return CODEC.encode(failed(error))
        return await self._answer(message, is_node)

    async def _answer(self, message: Any, is_node: bool) -> bytes:
        try:
            return CODEC.encode(await self._node.handle(message, is_node=is_node))
        except KVStoreError as error:
            return CODEC.encode(failed(error))
        except Exception:
            log.exception("a handler failed", message=type(message).__name__)
            unknown = KVStoreError(f"{type(message).__name__} failed at the node: see its log")
            return CODEC.encode(failed(unknown))

    async def _attach(
        self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> None:
        is_node = await self._who(context)
        pipe = StreamPipe(context.write)
        pipe.follow(_quietly(requests))
        self._pipes.add(pipe)
        welcomed: Welcomed | None = None
        try:
            welcomed = await self._welcome(pipe, is_node)
            if welcomed:
                await pipe.over()
        finally:
            self._pipes.discard(pipe)
            pipe.end()
            if welcomed:
                self._keep(self._node.ended(welcomed.session))

    async def _welcome(self, pipe: StreamPipe, is_node: bool) -> Welcomed | None:
        """Begins the session that a stream asks for; None where it says why not."""
        try:
            async with asyncio.timeout(_GREETING_S):
                hello = CODEC.decode_frame(await pipe.greeting)
            if not isinstance(hello, Hello):
                raise ProtocolError("a session begins with Hello")
            if hello.agent:
                self._streams.book.add(hello.agent, pipe)
            else:
                self._streams.serve(pipe)
            welcomed = await self._node.hello(hello, is_node=is_node)
        except (TimeoutError, asyncio.CancelledError):
            return None  # nobody asked
        except KVStoreError as error:
            await pipe.greet(CODEC.encode(failed(error)))
            return None
        await pipe.greet(CODEC.encode(welcomed))
        return welcomed

    def _keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Runs to its end, whoever waits for it."""
        task = asyncio.get_running_loop().create_task(work)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return task


async def _quietly(frames: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A stream that the other side breaks off is over like any other."""
    with contextlib.suppress(grpc.RpcError, grpc.aio.UsageError):
        async for frame in frames:
            yield frame
