"""A node's puts that wait for no command: what they show is what a command would have shown."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
from cluster.nodes import LAYOUT, Nodes, blocks, chain, nodes

from kvstore import Hit
from kvstore import commands as c
from kvstore.errors import StaleNamespace
from kvstore.session.parts import part_of
from kvstore_server.cluster.store import ChannelNodeStore

TIMEOUT_MS = 10_000.0
N = 4


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("ahead")
    with nodes(folder, 1, "--transfer", "grpc", replicas=1) as made:
        yield made


class Putting:
    """A node's store, and puts through it as a node makes them."""

    def __init__(self, running: Nodes) -> None:
        self.store = ChannelNodeStore(str(running.daemons["a"].socket), timeout_s=10.0)
        self.asked: list[c.Command] = []  # of the core
        port: Any = self.store._port
        ask = port.ask

        async def noted(command: c.Command, timeout_s: float) -> Any:
            self.asked.append(command)
            return await ask(command, timeout_s)

        port.ask = noted

    async def command(self, command: c.Command) -> Any:
        return await self.store.command(command, TIMEOUT_MS)

    async def open(self, name: str) -> int:
        opened = await self.command(c.OpenNamespace(name=name, layout=LAYOUT.encode()))
        return int(opened.namespace)

    async def put(self, space: int, seed: int, *, ttl_ms: int = 0, first: int = 0) -> c.Committed:
        """A chain's blocks from the one numbered `first` on."""
        keys, data = chain(N, seed), blocks(N, seed)
        n = N - first
        granted = await self.command(c.Grant(namespace=space, blocks=n))
        assert len(granted.granules) == n
        starts = self.store.addresses(LAYOUT, granted.granules)
        pool = self.store.pool
        at = (starts - np.uint64(pool.__array_interface__["data"][0])).astype(int).tolist()
        for start, row in zip(at, data[first:], strict=True):
            pool[start : start + row.size] = row
        committed: c.Committed = await self.command(
            c.Commit(
                namespace=space,
                put_id=secrets.token_bytes(16),
                hashes=np.ascontiguousarray(keys[first:]),
                granules=granted.granules,
                checksums=part_of(LAYOUT).sums(starts),
                parent=keys[first - 1].tobytes() if first else b"",
                position=first,
                ttl_ms=ttl_ms,
            )
        )
        return committed

    def kinds(self) -> list[type]:
        """Of the commands since the last look."""
        found = [type(command) for command in self.asked]
        self.asked.clear()
        return found


def through(running: Nodes, work: Any) -> None:
    async def go() -> None:
        putting = Putting(running)
        try:
            await work(putting)
        finally:
            putting.store.close()

    running_work: Coroutine[Any, Any, None] = go()
    asyncio.run(running_work)


def assert_read(running: Nodes, name: str, seed: int) -> None:
    session = running.local("a")
    space = session.open_namespace(name, LAYOUT)
    data = blocks(N, seed)
    found = np.zeros_like(data)
    assert all(
        isinstance(each, Hit) for each in session.get_into(space, chain(N, seed), list(found))
    )
    np.testing.assert_array_equal(found, data)


async def filled(putting: Putting, space: int) -> None:
    """Until there are slots for the next put."""
    ahead: Any = putting.store._ahead
    while ahead._filling or not len(ahead._stock):
        await asyncio.sleep(0)


def test_the_second_put_makes_no_call_and_is_read_at_once(running: Nodes) -> None:
    async def work(putting: Putting) -> None:
        space = await putting.open("second")
        assert (await putting.put(space, 1)).status.tolist() == [c.CommitStatus.STORED] * N
        await filled(putting, space)
        assert putting.kinds() == [c.OpenNamespace, c.Grant, c.Commit, c.Grant]
        assert (await putting.put(space, 2, first=1)).status.tolist() == [c.CommitStatus.STORED] * 3
        assert putting.kinds() == []
        assert (putting.store.look(space, chain(N, 2))[1:] > 0).all()
        assert (await putting.put(space, 2)).status[0] == c.CommitStatus.STORED
        assert_read(running, "second", 1)
        assert_read(running, "second", 2)

    through(running, work)


def test_a_time_to_live_is_told_to_the_core(running: Nodes) -> None:
    async def work(putting: Putting) -> None:
        space = await putting.open("ttl")
        await putting.put(space, 3)
        await filled(putting, space)
        putting.kinds()
        await putting.put(space, 4, ttl_ms=60_000)
        assert c.Commit in putting.kinds()

    through(running, work)


def test_a_namespace_that_was_dropped_is_refused(running: Nodes) -> None:
    async def work(putting: Putting) -> None:
        space = await putting.open("dropped")
        await putting.put(space, 5)
        await filled(putting, space)
        session = running.local("a")
        session.drop_namespace(session.open_namespace("dropped", LAYOUT))
        with pytest.raises(StaleNamespace):
            await putting.put(space, 6)
        other = await putting.open("dropped")
        assert other != space
        assert (await putting.put(other, 6)).status.tolist() == [c.CommitStatus.STORED] * N
        assert_read(running, "dropped", 6)

    through(running, work)


def test_slots_go_back_when_nobody_puts(running: Nodes) -> None:
    async def work(putting: Putting) -> None:
        space = await putting.open("idle")
        await putting.put(space, 7)
        await filled(putting, space)
        while c.GiveBack not in putting.kinds():
            await asyncio.sleep(0)
        assert_read(running, "idle", 7)
        await putting.put(space, 8)
        assert_read(running, "idle", 8)

    through(running, work)
