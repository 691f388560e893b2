"""A namespace that is opened while it is forgotten: the number of its former life is not kept."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from cluster.sim.cluster import Setting, SimCluster

from kvstore import commands as c
from kvstore import limits
from kvstore.cluster.forgetting import forget_all
from kvstore.cluster.site import Site
from kvstore.errors import StaleNamespace
from kvstore.layout import Layout

NAME = "both at once"
LAYOUT = Layout.opaque(model="m", block_bytes=512, block_tokens=16).encode()


async def _open_while_it_is_forgotten(site: Site, monkeypatch: pytest.MonkeyPatch) -> int:
    """Asks the store for what was opened last: how many blocks were dropped there."""
    real, asked = site.store.command, 0

    async def command(given: c.Command, timeout_ms: float) -> Any:
        nonlocal asked
        result = await real(given, timeout_ms)
        asked += isinstance(given, c.OpenNamespace)
        if asked == 1:  # and while the answer is on its way
            await forget_all(site, NAME, LAYOUT, 1)
        return result

    monkeypatch.setattr(site.store, "command", command)
    space = await site.open(NAME, LAYOUT)
    one = np.zeros((1, limits.KEY_BYTES), np.uint8)
    dropped: c.Count = await real(c.Drop(namespace=space.number, hashes=one), 1000.0)
    return dropped.blocks


def _play(monkeypatch: pytest.MonkeyPatch) -> int:
    cluster = SimCluster(Setting(nodes=1, replicas=1), random.Random(1))
    try:
        host = cluster.hosts["n0"]
        cluster.loop.run_until(cluster.loop.now + 2000.0)
        work = _open_while_it_is_forgotten(host.node.site, monkeypatch)
        blocks: int = cluster.loop.run_until_done(host.world.spawn(work), 10_000.0)
        return blocks
    finally:
        for each in cluster.hosts.values():
            each.gone = True
            each.kill()
        cluster.etcd.kill()


def test_a_namespace_opened_while_it_is_forgotten_is_opened_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert _play(monkeypatch) == 0


def test_else_its_number_would_mean_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Site.forget_space

    def forget_space(self: Site, space: Any) -> None:
        real(self, space)
        self._forgets -= 1

    monkeypatch.setattr(Site, "forget_space", forget_space)
    with pytest.raises(StaleNamespace):
        _play(monkeypatch)
