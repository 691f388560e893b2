"""Memory of real nodes and clients that evict, stop and die in the middle of transfers: no wrong
byte is read, and nothing stays held."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from cluster.guest import CHAINS, LAYOUT, SPACE, Guest, N, data_of
from cluster.nodes import Nodes, chain, eventually, nodes
from cluster.test_nodes import assert_quiet, assert_whole

from kvstore.transfer.choose import available
from kvstore_client.cluster.session import ClusterSession

BUSY_S = 20.0
TURNS = 3 * CHAINS


@pytest.fixture(
    scope="module",
    params=[
        "shm",
        "nixl",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("ucxx", "grpc")),
    ],
)
def transfer(request: pytest.FixtureRequest) -> str:
    kind = str(request.param)
    if kind not in {each.kind for each in available() if each.usable}:
        pytest.skip(f"{kind} cannot be used here")
    return kind


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, transfer: str) -> Iterator[Nodes]:
    """Two nodes whose memory holds half of the chains, two copies."""
    folder = tmp_path_factory.mktemp("pair")
    flags = ("--dram", f"{N * CHAINS // 2}MiB", "--transfer", transfer)
    with nodes(folder, 2, *flags) as running:
        yield running


@pytest.fixture
def small(pair: Nodes) -> Iterator[Nodes]:
    """The two, alive, and without anything left of a test before or after it."""
    dead = [name for name, daemon in pair.daemons.items() if daemon.process.poll() is not None]
    pair.start(dead) if dead else None
    pair.wait_until_well()
    yield pair
    pair.resume_all()
    assert_quiet(pair)


@pytest.fixture
def session(small: Nodes, transfer: str) -> Iterator[ClusterSession]:
    options = {"arena_bytes": 2 * N << 20, "ring_bytes": 2 * N << 20}
    with small.client(transfer=transfer, **options) as found:
        yield found


def assert_serves(session: ClusterSession) -> None:
    """What is put is read back, byte by byte, over all of the pool."""
    space = session.open_namespace(SPACE, LAYOUT)
    for seed in range(CHAINS):
        keys, data = chain(N, seed), data_of(seed)

        def put(keys: np.ndarray = keys, data: np.ndarray = data) -> bool:
            return session.put(space, keys, list(data), position=0).replicated == N

        eventually(put, BUSY_S, f"chain {seed} is put")
        assert_whole(session, space, keys, data)


def put_all(session: ClusterSession) -> None:
    """So that there is something to get, and something to evict."""
    space = session.open_namespace(SPACE, LAYOUT)
    for seed in range(CHAINS):
        session.put(space, chain(N, seed), list(data_of(seed)), position=0)


def held(running: Nodes, what: str) -> int:
    """What nodes hold for transfers to or from a client: leased blocks of gets, and bytes of slots
    that puts fill."""
    stats = [running.local(name).stats() for name in running.names]
    return sum(each.leased_blocks if what == "get" else each.ahead_bytes for each in stats)


def test_bytes_are_right_while_slots_are_evicted_and_readers_stall(
    small: Nodes, session: ClusterSession, transfer: str
) -> None:
    put_all(session)
    space = session.open_namespace(SPACE, LAYOUT)
    before = sum(small.local(name).stats().evicted for name in small.names)
    with (
        Guest(small, "get", transfer) as first,
        Guest(small, "get", transfer) as second,
    ):
        readers = [first, second]
        for reader in readers:
            reader.wait_for(1)
        for turn in range(TURNS):
            # Each in its turn stands still in the middle of a get, while its blocks are evicted.
            if turn % CHAINS == 2:
                readers[turn // CHAINS % 2].stop()
            if turn % CHAINS == CHAINS // 2:
                readers[turn // CHAINS % 2].go_on()
            seed = turn % CHAINS
            session.put(space, chain(N, seed), list(data_of(seed)), position=0)
        after = sum(small.local(name).stats().evicted for name in small.names)
        for reader in readers:
            reader.wait_for(1)
            assert reader.end() > N
    assert after - before > TURNS * N


@pytest.mark.parametrize("what", ["get", "put"])
def test_a_client_that_dies_in_mid_transfer_holds_nothing(
    small: Nodes, session: ClusterSession, transfer: str, what: str
) -> None:
    put_all(session)
    with Guest(small, what, transfer) as guest:
        guest.wait_for(3)
        eventually(lambda: held(small, what), BUSY_S)
        guest.kill()
        assert_quiet(small)
        assert_serves(session)


@pytest.mark.parametrize("what", ["get", "put"])
def test_a_client_that_stops_in_mid_transfer_holds_nothing_and_goes_on(
    small: Nodes, session: ClusterSession, transfer: str, what: str
) -> None:
    put_all(session)
    with Guest(small, what, transfer) as guest:
        guest.wait_for(3)
        eventually(lambda: held(small, what), BUSY_S)
        guest.stop()
        assert_quiet(small)  # although it is still there
        assert_serves(session)
        guest.go_on()
        guest.wait_for(3)
        guest.end()


@pytest.mark.parametrize("stopped", [False, True])
def test_a_node_that_dies_or_stops_in_mid_transfer_leaves_no_wrong_byte(
    small: Nodes, session: ClusterSession, transfer: str, stopped: bool
) -> None:
    put_all(session)
    with (
        Guest(small, "get", transfer) as reader,
        Guest(small, "put", transfer) as writer,
    ):
        for guest in (reader, writer):
            guest.wait_for(3)
        eventually(lambda: held(small, "get"), BUSY_S)
        small.pause("b") if stopped else small.kill("b")
        for guest in (reader, writer):
            guest.wait_for(3)
        small.resume("b") if stopped else small.start(["b"])
        for guest in (reader, writer):
            guest.wait_for(3)
            guest.end()
    assert_quiet(small)
    assert_serves(session)
