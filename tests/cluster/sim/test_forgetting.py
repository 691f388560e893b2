"""A drop of keys while some of them are on their way between nodes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
from cluster.sim.cluster import Host, Setting, SimCluster

from kvstore import limits
from kvstore.cluster.forgetting import forget_keys
from kvstore.cluster.site import Site, Space
from kvstore.layout import Layout

LAYOUT = Layout.opaque(model="m", block_bytes=512, block_tokens=16).encode()
KEYS = np.arange(3 * limits.KEY_BYTES, dtype=np.uint8).reshape(3, limits.KEY_BYTES)


@pytest.fixture
def host() -> Iterator[Host]:
    cluster = SimCluster(Setting(nodes=1, replicas=1), random.Random(1))
    cluster.loop.run_until(cluster.loop.now + 2000.0)
    try:
        yield cluster.hosts["n0"]
    finally:
        for each in cluster.hosts.values():
            each.gone = True
            each.kill()
        cluster.etcd.kill()


def _drop(host: Host, *, first: int, move_ms: float | None) -> int:
    """How many blocks a drop of one key says that it dropped, while another is on its way for so
    long; None: nothing is."""
    site: Site = host.node.site

    async def move(space: Space) -> None:
        with site.moves.of(space.mark, KEYS[:2]):
            await site.world.sleep(move_ms or 0.0)

    async def drop() -> int:
        space = await site.open("ns", LAYOUT)
        if move_ms is not None:
            site.world.spawn(move(space))
            await site.world.sleep(0.1)
        return await forget_keys(site, space, KEYS[first : first + 1])

    loop = host.cluster.loop
    blocks: int = loop.run_until_done(host.world.spawn(drop()), 60_000.0)
    return blocks


@pytest.mark.parametrize("move_ms", [10.0, 20_000.0], ids=["it ends", "it goes on"])
def test_a_drop_that_met_something_on_its_way_is_not_the_last(host: Host, move_ms: float) -> None:
    """It may have come to a node that has said already that it has none."""
    assert _drop(host, first=1, move_ms=move_ms) == 1


@pytest.mark.parametrize(
    ("first", "move_ms"), [(1, None), (2, 10.0)], ids=["nothing", "another key"]
)
def test_a_drop_that_met_nothing_may_be_the_last(
    host: Host, first: int, move_ms: float | None
) -> None:
    assert _drop(host, first=first, move_ms=move_ms) == 0
