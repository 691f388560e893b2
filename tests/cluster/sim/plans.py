"""What runs do, and what goes wrong in them: as a seed says. A plan by name makes one kind of
trouble likely, so that mistakes which need that kind are found soon."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from cluster.sim.cluster import Setting
from cluster.sim.nemesis import Trouble, some_trouble
from cluster.sim.network import Weather
from cluster.sim.transfers import Carriage

from kvstore.cluster.contacts import RouterPolicy
from kvstore.cluster.site import NodePolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What one run does. tight: whether pools are too small for all blocks, so that nothing is
    promised. rounds: of trouble and peace. round_ms: of trouble. clients: at work at one time.
    drops, key_drops: how much of what they do is to forget a namespace, or single keys. parts: to
    put blocks in parts. curious: whether they read everything
    whenever there is another view. changes: whether hosts come and go for good."""

    setting: Setting
    tight: bool
    rounds: int
    round_ms: float
    clients: int
    drops: float
    key_drops: float
    parts: float
    curious: bool
    changes: bool
    router: RouterPolicy
    ring_slots: int


def some_plan(rng: random.Random) -> Plan:
    """Any one."""
    nodes = rng.choice((1, 2, 3, 3, 4, 5))
    tight = rng.random() < 0.15
    policy = NodePolicy(
        compare_ms=rng.choice((5000.0, 20_000.0)),
        call_ms=rng.choice((300.0, 2000.0)),
        transfer_ms=rng.choice((500.0, 5000.0)),
        learn_ms=rng.choice((10_000.0, 20_000.0)),
        hot_reads=rng.choice((8, 200)),
        hot_ms=rng.choice((2000.0, 10_000.0)),
        repair_bytes_per_ms=rng.choice((50.0, 256 * 1024.0)),
        repair_batch_bytes=rng.choice((8 << 10, 1 << 20)),
    )
    router = RouterPolicy(
        hedge_ms=rng.choice((5.0, 40.0)),
        call_ms=rng.choice((200.0, 1000.0)),
        grace_ms=rng.choice((500.0, 5000.0)),
        piece_bytes=rng.choice((4 << 10, 1 << 20)),
    )
    return Plan(
        setting=Setting(
            nodes=nodes,
            replicas=rng.choice((1, 2, 2, 2, 3)),
            slots=48 if tight else 256,
            nvme=rng.random() < 0.2,
            policy=policy,
        ),
        tight=tight,
        rounds=rng.choice((1, 2, 3)),
        round_ms=rng.choice((2000.0, 6000.0, 15_000.0)),
        clients=rng.choice((1, 2, 3)),
        drops=rng.choice((0.0, 0.0, 0.02, 0.1)),
        key_drops=rng.choice((0.0, 0.02, 0.05)),
        parts=rng.choice((0.0, 0.05, 0.15)),
        curious=False,
        changes=rng.random() < 0.4,
        router=router,
        ring_slots=rng.choice((4, 16)),
    )


def ordinary(rng: random.Random) -> tuple[Plan, Trouble]:
    """Anything."""
    plan = some_plan(rng)
    return plan, some_trouble(rng, replicas=plan.setting.replicas, changes=plan.changes)


def forgetful(rng: random.Random) -> tuple[Plan, Trouble]:
    """Namespaces are dropped all the time, on a fair day but for hosts that cannot see each other,
    or a client, often for so long that they are left out."""
    plan = some_plan(rng)
    setting = replace(plan.setting, nodes=3, replicas=2, slots=256, nvme=False)
    plan = replace(
        plan,
        setting=setting,
        tight=False,
        rounds=1,
        round_ms=30_000.0,
        clients=2,
        drops=0.1,
        key_drops=0.0,
        parts=0.0,
        curious=True,
        changes=False,
        router=replace(plan.router, piece_bytes=1 << 20),
        ring_slots=16,
    )
    kinds = {"exile": 1.0, "faint": 0.8, "one link": 0.3}
    return plan, Trouble(mean_ms=rng.choice((1500.0, 3000.0)), kinds=kinds)


def parted(rng: random.Random) -> tuple[Plan, Trouble]:
    """As `forgetful`, and each client sees other hosts than the next one."""
    plan, _ = forgetful(rng)
    plan = replace(plan, round_ms=15_000.0, clients=3, curious=False)
    return plan, Trouble(mean_ms=700.0, kinds={"one link": 1.0})


def forsaken(rng: random.Random) -> tuple[Plan, Trouble]:
    """As `forgetful`, and who knows what was dropped is out of reach when others come back."""
    plan, _ = forgetful(rng)
    policy = replace(plan.setting.policy, learn_ms=3000.0)
    plan = replace(plan, setting=replace(plan.setting, replicas=3, policy=policy))
    return plan, Trouble(mean_ms=3000.0, kinds={"handover": 1.0, "faint": 0.7, "exile": 0.3})


def mortal(rng: random.Random) -> tuple[Plan, Trouble]:
    """Copies fail for all reasons that there are, and soon after a host dies."""
    plan = some_plan(rng)
    policy = replace(plan.setting.policy, compare_ms=20_000.0)
    setting = replace(plan.setting, nodes=2, replicas=2, slots=256, nvme=False, policy=policy)
    plan = replace(
        plan, setting=setting, tight=False, drops=0.0, clients=3, round_ms=4000.0, rounds=4
    )
    kinds = {"no room": 0.7, "cut": 1.0, "exile": 1.0, "death": 0.5}
    carriage = Carriage(flips=rng.choice((0.0, 0.05)))
    return plan, Trouble(mean_ms=300.0, kinds=kinds, carriage=carriage)


def halting(rng: random.Random) -> tuple[Plan, Trouble]:
    """Transfers stop in the middle, and one client has to live with that."""
    plan = some_plan(rng)
    setting = replace(plan.setting, nodes=2, replicas=rng.choice((1, 2)), slots=256, nvme=False)
    plan = replace(
        plan,
        setting=setting,
        tight=False,
        rounds=2,
        round_ms=10_000.0,
        clients=1,
        drops=0.0,
        changes=False,
        router=replace(plan.router, grace_ms=500.0),
        ring_slots=4,
    )
    carriage = Carriage(
        hardware=rng.random() < 0.5, fails_to_close=rng.choice((0.0, 0.2)), patience_ms=500.0
    )
    kinds = {"cut": 1.0, "stall": 0.7, "pause": 0.3}
    return plan, Trouble(mean_ms=500.0, kinds=kinds, carriage=carriage)


def cramped(rng: random.Random) -> tuple[Plan, Trouble]:
    """Pools have no room for all blocks, and transfers take long."""
    plan = some_plan(rng)
    setting = replace(plan.setting, nodes=2, replicas=2, slots=24)
    plan = replace(
        plan, setting=setting, tight=True, rounds=2, round_ms=6000.0, clients=3, drops=0.08
    )
    carriage = Carriage(chunk_ms=15.0, hardware=rng.random() < 0.5)
    return plan, Trouble(mean_ms=1500.0, kinds={"stall": 1.0, "pause": 0.5}, carriage=carriage)


def restless(rng: random.Random) -> tuple[Plan, Trouble]:
    """The members' list changes all the time, and who keeps it cannot be seen by the others."""
    plan = some_plan(rng)
    setting = replace(plan.setting, nodes=rng.choice((3, 4)), slots=256, nvme=False)
    plan = replace(
        plan, setting=setting, tight=False, clients=1, changes=True, round_ms=15_000.0, rounds=2
    )
    kinds = {"exile": 1.0, "death of a node": 1.0, "drain": 0.7, "another host": 0.3, "pause": 0.3}
    weather = Weather(delay_ms=rng.choice((1.0, 10.0, 40.0)))
    return plan, Trouble(mean_ms=rng.choice((300.0, 800.0)), kinds=kinds, weather=weather)


def piecemeal(rng: random.Random) -> tuple[Plan, Trouble]:
    """Blocks are put in parts and dropped one by one, while transfers fail and nodes and clients
    die."""
    plan = some_plan(rng)
    setting = replace(plan.setting, nodes=3, replicas=2, slots=256)
    plan = replace(
        plan,
        setting=setting,
        tight=False,
        rounds=1,
        round_ms=8000.0,
        clients=2,
        drops=rng.choice((0.0, 0.02)),
        key_drops=0.12,
        parts=0.2,
        changes=False,
    )
    kinds = {"cut": 1.0, "pause": 0.7, "death of a client": 0.5, "one link": 0.3}
    kinds |= {"death of a node": 0.2, "death": 0.2}
    carriage = Carriage(chunk_ms=rng.choice((0.2, 5.0)), hardware=rng.random() < 0.5)
    return plan, Trouble(mean_ms=rng.choice((400.0, 1200.0)), kinds=kinds, carriage=carriage)


PLANS: dict[str, Callable[[random.Random], tuple[Plan, Trouble]]] = {
    "ordinary": ordinary,
    "forgetful": forgetful,
    "parted": parted,
    "forsaken": forsaken,
    "mortal": mortal,
    "halting": halting,
    "cramped": cramped,
    "restless": restless,
    "piecemeal": piecemeal,
}
