"""Calls on one stream: each has its own answer, and an end that all who wait hear of."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from kvstore import commands as c
from kvstore.cluster import messages as m
from kvstore.errors import (
    DeadlineExceeded,
    InvalidArgument,
    PermissionDenied,
    ProtocolError,
    ResourceExhausted,
    Unavailable,
)
from kvstore_proto.cluster.calls import numbered, opened
from kvstore_proto.cluster.pipes import Streams
from kvstore_proto.cluster.world import AsyncWorld
from kvstore_server.cluster import service
from kvstore_server.cluster.service import PeerService

TIMEOUT_MS = 10_000.0
Handle = Callable[[m.Ping], Awaitable[Any]]


class Answering:
    """What a service needs of a node: one that answers pings as a test says."""

    def __init__(self, handle: Handle) -> None:
        self._handle = handle

    async def handle(self, message: Any, *, is_node: bool) -> Any:
        del is_node
        return await self._handle(message)


@asynccontextmanager
async def serving(handle: Handle) -> AsyncIterator[tuple[PeerService, AsyncWorld, str]]:
    node: Any = Answering(handle)
    serves = PeerService(node, node_token="n", client_token="c", streams=Streams())
    port = await serves.start("127.0.0.1:0", None)
    world = AsyncWorld(token="c", streams=Streams())
    try:
        yield serves, world, f"127.0.0.1:{port}"
    finally:
        await world.close()
        await serves.stop(5.0)


async def count(message: m.Ping) -> c.Count:
    """The ping's epoch."""
    return c.Count(blocks=message.epoch)


def test_answers_find_who_asked_in_whatever_order_they_come() -> None:
    gates = [asyncio.Event() for _ in range(8)]

    async def wait(message: m.Ping) -> c.Count:
        await gates[message.epoch].wait()
        return await count(message)

    async def work() -> None:
        async with serving(wait) as (_, world, at):
            calls = [
                asyncio.create_task(world.call(at, m.Ping(epoch=i), TIMEOUT_MS)) for i in range(8)
            ]
            for number in reversed(range(8)):
                gates[number].set()
                assert (await calls[number]).blocks == number

    asyncio.run(work())


def test_who_gives_up_or_is_refused_spoils_no_other_call() -> None:
    begun, gate = asyncio.Event(), asyncio.Event()

    async def some(message: m.Ping) -> c.Count:
        if message.epoch == 1:
            begun.set()
            await gate.wait()
        if message.epoch == 2:
            raise InvalidArgument("epoch", "not this one")
        return await count(message)

    async def work() -> None:
        async with serving(some) as (_, world, at):
            late = asyncio.create_task(world.call(at, m.Ping(epoch=1), TIMEOUT_MS))
            await begun.wait()
            with pytest.raises(InvalidArgument, match="not this one"):
                await world.call(at, m.Ping(epoch=2), TIMEOUT_MS)
            given_up = asyncio.create_task(world.call(at, m.Ping(epoch=1), TIMEOUT_MS))
            await asyncio.sleep(0)
            given_up.cancel()
            with pytest.raises(DeadlineExceeded):
                await world.call(at, m.Ping(epoch=1), 1.0)
            assert (await world.call(at, m.Ping(epoch=3), TIMEOUT_MS)).blocks == 3
            gate.set()
            assert (await late).blocks == 1

    asyncio.run(work())


def test_the_end_of_a_node_is_told_to_all_who_wait_and_another_one_is_found() -> None:
    begun = asyncio.Event()

    async def never(_message: m.Ping) -> c.Count:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def work() -> None:
        async with serving(never) as (serves, world, at):
            waiting = asyncio.create_task(world.call(at, m.Ping(epoch=0), TIMEOUT_MS))
            await begun.wait()
            await serves.stop(0.01)
            with pytest.raises(Unavailable):
                await waiting
            with pytest.raises(Unavailable):
                await world.call(at, m.Ping(epoch=0), TIMEOUT_MS)
            node: Any = Answering(count)
            again = PeerService(node, node_token="n", client_token="c", streams=Streams())
            await again.start(at, None)
            try:
                assert await found_again(world, at) == 5
            finally:
                await again.stop(5.0)

    asyncio.run(work())


async def found_again(world: AsyncWorld, at: str) -> int:
    """What a call says once the connection was made anew, which gRPC tries now and then."""
    async with asyncio.timeout(TIMEOUT_MS / 1e3):
        while True:
            try:
                return int((await world.call(at, m.Ping(epoch=5), TIMEOUT_MS)).blocks)
            except Unavailable:
                await asyncio.sleep(0)


def test_more_calls_than_a_node_takes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "_MOST_CALLS", 2)
    begun, gate = asyncio.Semaphore(0), asyncio.Event()

    async def wait(message: m.Ping) -> c.Count:
        begun.release()
        await gate.wait()
        return await count(message)

    async def work() -> None:
        async with serving(wait) as (_, world, at):
            calls = [
                asyncio.create_task(world.call(at, m.Ping(epoch=i), TIMEOUT_MS)) for i in range(2)
            ]
            for _ in calls:
                await begun.acquire()
            with pytest.raises(ResourceExhausted, match="2 calls"):
                await world.call(at, m.Ping(epoch=9), TIMEOUT_MS)
            gate.set()
            assert [answer.blocks for answer in await asyncio.gather(*calls)] == [0, 1]

    asyncio.run(work())


def test_only_who_has_the_token_is_answered() -> None:
    async def work() -> None:
        async with serving(count) as (_, _, at):
            stranger = AsyncWorld(token="x", streams=Streams())
            with pytest.raises(PermissionDenied, match="token"):
                await stranger.call(at, m.Ping(epoch=0), TIMEOUT_MS)
            await stranger.close()

    asyncio.run(work())


def test_a_message_without_a_number_is_none() -> None:
    assert opened(numbered(7, b"frame")) == (7, b"frame")
    with pytest.raises(ProtocolError):
        opened(b"1234567")
