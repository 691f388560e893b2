"""Nodes and clients of one host, told nothing of transfers: bytes move through shared memory."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Iterator

import numpy as np
import pytest
from cluster.load import Load
from cluster.nodes import LAYOUT, Nodes, blocks, chain, eventually, free_ports
from cluster.test_nodes import FAILOVER_S, REPAIR_S, assert_quiet, assert_whole

from daemon import Daemon
from kvstore.transfer.choose import AUTO
from kvstore_client.cluster.session import ClusterSession

N = 24
SIZES = {"arena_bytes": 8 << 20, "ring_bytes": 16 << 20}
_MOVED = re.compile(r"^kvstore_node_moved_(\w+)_bytes (\S+)$", re.MULTILINE)


class Measured(Nodes):
    """Nodes with metrics."""

    metrics: dict[str, int]

    def begin(self, name: str, *flags: str) -> Daemon:
        """See `Nodes.begin`."""
        return super().begin(name, *flags, "--node-metrics-port", str(self.metrics[name]))

    def moved(self) -> dict[str, int]:
        """What all of them have moved, in bytes, by kind."""
        total: dict[str, int] = {}
        for port in self.metrics.values():
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as said:
                for kind, value in _MOVED.findall(said.read().decode()):
                    total[kind] = total.get(kind, 0) + int(float(value))
        return total


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Measured]:
    running = Measured(tmp_path_factory.mktemp("shm"), 3)
    running.metrics = dict(zip(running.names, free_ports(3), strict=True))
    try:
        running.start()
        running.wait_until_well()
        yield running
    finally:
        running.end()


@pytest.fixture
def session(three: Measured) -> Iterator[ClusterSession]:
    with three.client(**SIZES) as made:
        yield made
    assert_quiet(three)


def test_puts_gets_views_and_copies_move_through_shared_memory(
    three: Measured, session: ClusterSession
) -> None:
    before = three.moved()
    space, keys, data = session.open_namespace("shm", LAYOUT), chain(N, 1), blocks(N, 1)
    done = session.put(space, keys, list(data), position=0)
    assert (done.stored, done.replicated) == (N, N)
    assert_whole(session, space, keys, data)
    with session.view(space, keys) as view:
        np.testing.assert_array_equal(view.blocks, data)
    with session.buffers(N, LAYOUT.block_bytes) as room:
        for row, each in zip(room.blocks, blocks(N, 2), strict=True):
            row[:] = each
        placed = session.put(space, chain(N, 2), room.blocks, position=0)
    assert placed.replicated == N
    assert_whole(session, space, chain(N, 2), blocks(N, 2))
    moved = {kind: value - before[kind] for kind, value in three.moved().items()}
    # Two puts with a copy each, two gets and a view.
    assert moved.pop("shm") >= 7 * data.nbytes
    assert set(moved) >= set(AUTO) - {"shm"}
    assert not any(moved.values()), moved


def test_the_pool_of_a_node_is_mapped_by_others_for_reading_alone(three: Measured) -> None:
    with three.client(**SIZES) as session:
        space = session.open_namespace("mapped", LAYOUT)
        for seed in range(3, 7):
            session.put(space, chain(N, seed), list(blocks(N, seed)), position=0)
        seen = 0
        for name in three.names:
            with open(f"/proc/{three.node_pid(name)}/maps") as maps:
                pools = [line.split() for line in maps if "memfd:kvstore-pool" in line]
            own = [line for line in pools if "w" in line[1]]
            assert len({line[4] for line in own}) == 1  # its core's
            seen += len({line[4] for line in pools} - {line[4] for line in own})
        assert seen  # those that copies were read from


def test_no_get_fails_when_nodes_are_killed_in_mid_transfer(three: Measured) -> None:
    with Load(three, "killed", seed=2, most=16, transfer="auto") as load:
        for name in "ab":
            load.wait_for(puts=4, gets=20)
            three.kill(name)
            load.wait_for(puts=2, gets=20)
            three.start([name])
            eventually(lambda: three.fewest_copies("killed", load.keys()) >= 2, REPAIR_S, "repair")
        three.kill_node_process("c")
        load.wait_for(puts=2, gets=20)
    three.wait_until_well()
    assert_quiet(three)


def test_a_client_that_ends_leaves_no_mapping_at_any_node(three: Measured) -> None:
    def landings() -> int:
        found = 0
        for name in three.names:
            with open(f"/proc/{three.node_pid(name)}/maps") as maps:
                found += sum("memfd:kvstore-landing" in line for line in maps)
        return found

    before = landings()
    with three.client(**SIZES) as session:
        space = session.open_namespace("ends", LAYOUT)
        session.put(space, chain(N, 8), list(blocks(N, 8)), position=0)
        assert landings() > before
    eventually(lambda: landings() == before, FAILOVER_S, landings)
