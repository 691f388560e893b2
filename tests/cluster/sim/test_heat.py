"""Copies of blocks that are read much live no longer than the blocks."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from cluster.sim.client import SimClient
from cluster.sim.cluster import Setting, SimCluster
from cluster.sim.history import SPACES, Truth, keys

from kvstore.cluster.site import NodePolicy

_SPACE, _N, _TTL_MS = 1, 4, 20_000
_POLICY = NodePolicy(hot_reads=2, hot_ms=2000.0)


@pytest.fixture
def cluster() -> Iterator[SimCluster]:
    made = SimCluster(Setting(nodes=3, replicas=1, policy=_POLICY), random.Random(1))
    yield made
    for host in made.hosts.values():
        host.gone = True
        host.kill()
    made.etcd.kill()


def _left_ms(cluster: SimCluster) -> list[list[int]]:
    """At each host that has blocks."""
    asked = keys(_SPACE, 0, 0, _N)
    found = [host.store.left_ms(*SPACES[_SPACE], asked) for host in cluster.hosts.values()]
    return [left_ms for left_ms in found if left_ms]


def test_copies_of_hot_blocks_live_no_longer_than_they(cluster: SimCluster) -> None:
    loop = cluster.loop
    client = SimClient(
        cluster.network,
        cluster.fabric,
        "c1",
        number=cluster.new_number(),
        rng=cluster.rng,
        seeds=[host.address for host in cluster.hosts.values()],
        truth=Truth(present_epoch=lambda: cluster.coordinator.epoch),
    )
    loop.run_until(5000.0)
    put = client.put(_SPACE, 0, 0, _N, copies=1, ttl_ms=_TTL_MS)
    assert loop.run_until_done(client.world.spawn(put), 5000.0) == _N
    stored = loop.now
    assert len(_left_ms(cluster)) == 1
    for _ in range(_POLICY.hot_reads):
        get = client.get(_SPACE, 0, 0, _N)
        assert None not in loop.run_until_done(client.world.spawn(get), 5000.0)
    loop.run_until(loop.now + _POLICY.hot_ms)
    held = _left_ms(cluster)
    assert len(held) == 1 + _POLICY.hot_copies
    for left_ms in held:
        assert len(left_ms) == _N
        assert all(0 < left <= _TTL_MS - (loop.now - stored) + 2000.0 for left in left_ms)
    loop.run_until(stored + 2 * _TTL_MS)
    assert not _left_ms(cluster)
    client.process.kill()
