"""A member that a drop of a namespace did not reach learns of it as soon as others refuse its
blocks, though nobody tells it: else it would never be done with them."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from cluster.sim.client import SimClient
from cluster.sim.cluster import Setting, SimCluster
from cluster.sim.history import SPACES, Truth

from kvstore.cluster.forgetting import forget_all
from kvstore.cluster.members import Member, MemberState
from kvstore.cluster.repair import Repair
from kvstore.cluster.site import mark_of

_SPACE, _GENERATION = 1, 1 << 32
_NAME, _LAYOUT = SPACES[_SPACE][0], SPACES[_SPACE][1].encode()
_SOON_MS = 10_000.0  # before all compare again by themselves


class _Scene:
    """Two hosts that have the same blocks, which were dropped at n0 alone."""

    def __init__(self) -> None:
        self.cluster = SimCluster(Setting(nodes=2, replicas=2), random.Random(1))
        self.loop, hosts = self.cluster.loop, self.cluster.hosts
        self.ahead, self.behind = hosts["n0"], hosts["n1"]
        self.client = SimClient(
            self.cluster.network,
            self.cluster.fabric,
            "c1",
            number=self.cluster.new_number(),
            rng=self.cluster.rng,
            seeds=[host.address for host in hosts.values()],
            truth=Truth(present_epoch=lambda: self.cluster.coordinator.epoch),
        )
        self.loop.run_until(self.loop.now + 5000.0)
        put = self.client.world.spawn(self.client.put(_SPACE, 0, 0, 4, copies=2))
        assert self.loop.run_until_done(put, 10_000.0) == 4
        drop = forget_all(self.ahead.node.site, _NAME, _LAYOUT, _GENERATION)
        assert self.loop.run_until_done(self.ahead.world.spawn(drop), 10_000.0) == 4

    def generation(self) -> int:
        """Of the namespace, as the one that is behind knows it."""
        return self.behind.node.site.generation(mark_of(_NAME, _LAYOUT))

    def soon(self) -> None:
        self.loop.run_until(self.loop.now + _SOON_MS)

    def drain(self) -> MemberState | None:
        """What the one that is behind comes to."""
        self.ahead.change(self.behind.name, joins=False)
        self.soon()
        return self.behind.node.site.role

    def lose(self) -> bool:
        """Whether the one that is behind settles once the other one has lost all blocks."""
        before = self.cluster.coordinator.epoch
        self.ahead.kill()
        self.ahead.restart()
        self.soon()
        assert self.cluster.coordinator.epoch > before
        return self.behind.node.site.settled == self.cluster.coordinator.epoch

    def close(self) -> None:
        for host in self.cluster.hosts.values():
            host.gone = True
            host.kill()
        self.client.process.kill()
        self.cluster.etcd.kill()


@pytest.fixture
def scene() -> Iterator[_Scene]:
    made = _Scene()
    yield made
    made.close()


@pytest.fixture
def nobody_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    async def catch_up(_self: Repair, _member: Member) -> None: ...

    monkeypatch.setattr(Repair, "_catch_up", catch_up)


def test_a_drain_ends_where_a_drop_did_not_come_to_who_drains(scene: _Scene) -> None:
    assert scene.drain() == MemberState.OUT
    assert scene.generation() == _GENERATION


@pytest.mark.usefixtures("nobody_asks")
def test_else_it_would_drain_for_ever(scene: _Scene) -> None:
    assert scene.drain() == MemberState.DRAINING
    assert not scene.generation()


def test_all_settle_where_who_knows_of_a_drop_has_no_such_namespace(scene: _Scene) -> None:
    assert scene.lose()
    assert scene.generation() == _GENERATION


@pytest.mark.usefixtures("nobody_asks")
def test_else_nobody_could_join_any_more(scene: _Scene) -> None:
    assert not scene.lose()
    assert not scene.generation()
