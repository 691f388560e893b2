"""Wall clocks that jump: a node goes by no such clock, whatever the core beside it began with."""

from __future__ import annotations

import random

import numpy as np
import pytest
from cluster.sim.client import SimClient
from cluster.sim.cluster import Setting, SimCluster
from cluster.sim.history import SPACES, Truth, keys

HOUR_MS, TTL_MS = 3_600_000.0, 60_000


@pytest.mark.parametrize("jump_ms", [-5 * HOUR_MS, 5 * HOUR_MS])
def test_a_node_that_begins_anew_after_a_jump_of_the_clock_keeps_times_to_live(
    jump_ms: float,
) -> None:
    cluster = SimCluster(Setting(nodes=2, replicas=2), random.Random(1))
    cluster.loop.run_until(5000.0)
    one, other = cluster.hosts.values()
    client = SimClient(
        cluster.network,
        cluster.fabric,
        "c1",
        number=cluster.new_number(),
        rng=cluster.rng,
        seeds=[host.address for host in cluster.hosts.values()],
        truth=Truth(),
    )
    other.kill()
    cluster.loop.run_until(15_000.0)
    put = client.put(1, 0, 0, 4, copies=1, ttl_ms=TTL_MS)
    cluster.loop.run_until_done(client.world.spawn(put), 5000.0)
    began = cluster.loop.now
    other._skew_ms += jump_ms  # all that starts from now on goes by the new time
    one._skew_ms += jump_ms
    one.kill_node()
    one.restart()
    other.restart()
    cluster.loop.run_until(began + 20_000.0)  # and repair has made the second copies
    spent_ms = cluster.loop.now - began
    for host in (one, other):
        left_ms = np.array(host.store.left_ms(*SPACES[1], keys(1, 0, 0, 4)))
        assert len(left_ms) == 4
        assert np.all(np.abs(left_ms - (TTL_MS - spent_ms)) < 2000.0), host.name
    for host in cluster.hosts.values():
        host.gone = True
        host.kill()
    client.process.kill()
    cluster.etcd.kill()
