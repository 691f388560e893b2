"""A node's commands to its core: many at one time, in order, with an end that all hear of."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Iterator
from pathlib import Path

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


class _StoppedSelector(selectors.DefaultSelector):
    """Its process is stopped once, while it waits."""

    def __init__(self, *, hears_of_sockets: bool) -> None:
        """hears_of_sockets: whether it tells of what came meanwhile. Once the time that it was to
        wait is over, Python's own does not, where a signal has ended the wait."""
        super().__init__()
        self.hears_of_sockets = hears_of_sockets
        self.away_s = 0.0
        self._stop: tuple[LoopPort, float] | None = None

    def stop(self, port: LoopPort, away_s: float) -> None:
        """At the next wait, for so long, and until the port has an answer to read."""
        self._stop = port, away_s

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """See `selectors.BaseSelector.select`."""
        if self._stop is not None:
            (port, away_s), self._stop = self._stop, None
            with selectors.DefaultSelector() as answered:
                answered.register(port._sock, selectors.EVENT_READ)
                assert answered.select(TIMEOUT_S)
            self.away_s += away_s
            if not self.hears_of_sockets:
                return []
        return super().select(timeout)


class _StoppedLoop(asyncio.SelectorEventLoop):
    """Time goes on while its process is stopped."""

    def __init__(self, selector: _StoppedSelector) -> None:
        super().__init__(selector)
        self.stopped = selector

    def time(self) -> float:
        """See `asyncio.AbstractEventLoop.time`."""
        return super().time() + self.stopped.away_s


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


def test_where_no_core_is_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        LoopPort(str(tmp_path / "nobody"), TIMEOUT_S)


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


@pytest.mark.parametrize("hears_of_sockets", [True, False])
def test_an_answer_that_came_while_the_node_stood_still_counts(
    running: Nodes, hears_of_sockets: bool
) -> None:
    selector = _StoppedSelector(hears_of_sockets=hears_of_sockets)

    async def work() -> None:
        port = connected(running)
        asked = asyncio.create_task(port.ask(c.Stat(), TIMEOUT_S))
        await asyncio.sleep(0)  # it is sent now
        selector.stop(port, 2 * TIMEOUT_S)
        assert isinstance(await asked, c.Stats)
        assert selector.away_s
        assert isinstance(await port.ask(c.Stat(), TIMEOUT_S), c.Stats)
        port.close()

    with asyncio.Runner(loop_factory=lambda: _StoppedLoop(selector)) as runner:
        runner.run(work())
