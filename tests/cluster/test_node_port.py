"""A node's commands to its core: many at one time, in order, with an end that all hear of."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from cluster.nodes import Nodes, nodes

from kvstore import commands as c
from kvstore.errors import DeadlineExceeded, InvalidArgument, Unavailable
from kvstore_server.cluster.port import LoopPort

TIMEOUT_S = 10.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    folder = tmp_path_factory.mktemp("port")
    with nodes(folder, 1, "--transfer", "grpc", "--dram", "8MiB", replicas=1) as made:
        yield made


def connected(running: Nodes) -> LoopPort:
    return LoopPort(str(running.daemons["a"].socket), TIMEOUT_S)


def test_each_who_asks_has_its_own_answer(running: Nodes) -> None:
    async def work() -> None:
        port = connected(running)
        commands = [c.Stat(), c.Describe()] * 20
        answers = await asyncio.gather(*(port.ask(each, TIMEOUT_S) for each in commands))
        assert [type(answer) for answer in answers] == [c.Stats, c.Description] * 20
        port.close()

    asyncio.run(work())


def test_who_gives_up_or_errs_spoils_no_other_answer(running: Nodes) -> None:
    async def work() -> None:
        port = connected(running)
        given_up = asyncio.create_task(port.ask(c.Describe(), TIMEOUT_S))
        await asyncio.sleep(0)  # it is sent now
        given_up.cancel()
        with pytest.raises(InvalidArgument):
            await port.ask(c.Scan(first=0, most=0), TIMEOUT_S)
        assert isinstance(await port.ask(c.Stat(), TIMEOUT_S), c.Stats)
        port.close()
        with pytest.raises(Unavailable):
            await port.ask(c.Stat(), TIMEOUT_S)

    asyncio.run(work())


def test_a_core_that_stands_still_ends_the_connection_for_all(running: Nodes) -> None:
    async def work() -> None:
        port = connected(running)
        await port.ask(c.Stat(), TIMEOUT_S)
        running.pause("a", "core")
        try:
            late = asyncio.create_task(port.ask(c.Stat(), TIMEOUT_S))
            with pytest.raises(DeadlineExceeded):
                await port.ask(c.Stat(), 0.05)
            with pytest.raises(Unavailable):
                await late
        finally:
            running.resume("a")
        assert port.closed
        port.close()

    asyncio.run(work())
