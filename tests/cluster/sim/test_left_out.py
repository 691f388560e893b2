"""Who was left out of the list and does not know it yet is not believed by one that comes back."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from cluster.sim.client import SimClient
from cluster.sim.cluster import Setting, SimCluster
from cluster.sim.history import Truth

from kvstore.cluster.members import View, decode_view
from kvstore.cluster.membership import Membership
from kvstore.errors import DeadlineExceeded

_LOOK_MS, _SLOW_MS = 50.0, 3000.0


class _Scene:
    """Three hosts: n2 alone stays a member while the others are cut off, and is cut off when they
    come back; n1 does not hear in time that it was left out."""

    def __init__(self) -> None:
        self.cluster = SimCluster(Setting(nodes=3, replicas=3), random.Random(1))
        self.loop = self.cluster.loop
        self.truth = Truth(present_epoch=lambda: self.cluster.coordinator.epoch)
        self.client = SimClient(
            self.cluster.network,
            self.cluster.fabric,
            "c1",
            number=self.cluster.new_number(),
            rng=self.cluster.rng,
            seeds=[host.address for host in self.cluster.hosts.values()],
            truth=self.truth,
        )

    def run(self, work: Any, ms: float = 10_000.0) -> Any:
        return self.loop.run_until_done(self.client.world.spawn(work), ms)

    def members(self) -> set[str]:
        view = self.cluster.coordinator.view
        return {member.name for member in decode_view(view).members} if view else set()

    def until(self, names: set[str]) -> None:
        end = self.loop.now + 20_000.0
        while self.members() != names:
            assert self.loop.now < end, f"{self.members()}, expected {names}"
            self.loop.run_until(self.loop.now + _LOOK_MS)

    def play(self) -> list[int | None]:
        """What a client gets at the end of what was dropped in the middle."""
        network, hosts = self.cluster.network, self.cluster.hosts
        self.until({"n0", "n1", "n2"})
        self.loop.run_until(self.loop.now + 5000.0)
        assert self.run(self.client.put(1, 0, 0, 4, copies=3)) == 4
        network.block(["n0", "n1"], ["n2", "etcd", "c1"], both=True)
        self.until({"n2"})
        self.loop.run_until(self.loop.now + 1000.0)
        self.run(self.client.router.refresh())
        assert self.run(self.client.drop(1))
        # They come back together: n1 is registered before it sees the list, and n0 makes another.
        back, coordination = hosts["n0"].world.process, hosts["n1"].node.membership._coordination
        coordination.view = self._never  # type: ignore[method-assign]

        def registered(name: str) -> None:
            if name == "n1" and back.paused:
                back.resume()

        self.cluster.coordinator.granted = registered
        back.pause()
        network.heal()
        network.block(["n2"], ["n0", "n1", "etcd", "c1"], both=True)
        self.until({"n0", "n1", "n2"})
        self.loop.run_until(self.loop.now + _SLOW_MS)  # n0 has asked both what was forgotten
        self.run(self.client.router.refresh())
        return self.run(self.client.get(1, 0, 0, 4))

    async def _never(self) -> View | None:
        await self.loop.sleep(_SLOW_MS, self.cluster.hosts["n1"].world.process)
        raise DeadlineExceeded("the list does not come")

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


def test_one_that_does_not_know_that_it_was_left_out_is_not_believed(scene: _Scene) -> None:
    assert scene.play() == [None] * 4


def test_else_what_was_dropped_would_be_served(
    scene: _Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Membership.generations

    async def generations(self: Membership) -> Any:
        return replace(await real(self), through=1 << 60)

    monkeypatch.setattr(Membership, "generations", generations)
    with pytest.raises(AssertionError, match="is served"):
        scene.play()
