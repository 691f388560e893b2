"""Random lives of a store with disks: every call, in any order, with restarts, kills, power cuts
and failing disks; each seed is one of them."""

from __future__ import annotations

import errno
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from nvme.rig import EVERY, Plan, Rig, small_limits, tight

from kvstore import commands as c
from kvstore.nvme.format import Geometry
from kvstore.store import NvmePolicy

SEEDS, MORE, STEPS = 100, 200, 150
GEOMETRIES = (
    (tight(),),
    (tight(),),
    (tight(11, 9, 4),),
    (tight(40, 3, 2),),
    (tight(17, 4, 2), tight(30, 3, 3)),
    (tight(8, 5, 3), tight(17, 5, 4)),
    (tight(6, 6, 3), tight(17, 5, 4)),  # the first too small for blocks of the second space
)
POLICIES = (
    EVERY,
    EVERY,
    NvmePolicy(),
    NvmePolicy(every=True, scrub_bytes_per_s=1 << 20),
    NvmePolicy(every=True, bytes_per_s=200_000),
)
HINTS = tuple(c.HintKind)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_limits():
        yield


def plan_of(rng: random.Random, **changes: Any) -> Plan:
    plan = Plan(
        geometries=rng.choice(GEOMETRIES),
        policy=rng.choice(("lru", "arc", "s3fifo")),
        max_blocks=rng.choice((256, 256, 256, 40, 28)),
        nvme=rng.choice(POLICIES),
        check_each=4,
    )
    return replace(plan, **changes)


def live(seed: int, steps: int = STEPS, *, faults: bool = False, **changes: Any) -> Rig:
    """One history; returns its last life, in which nothing is left. changes: of the plan."""
    rng = random.Random(seed)
    plan = plan_of(rng, **changes)
    rig = Rig(seed, replace(plan, excused=faults or plan.blind > 0))
    for _ in range(steps):
        if faults and rng.random() < 0.01:
            break_a_disk(rig, rng)
        rig = act(rig, rng)
        for _ in range(rng.randrange(4)):
            rig.step()
    rig.settle()
    if faults:
        for sim in rig.sims:
            sim.heal()
    after = rig.crash(seed)
    after.get_musts()
    after.get_all()
    rig.finish()
    return rig


def break_a_disk(rig: Rig, rng: random.Random) -> None:
    sim = rng.choice(rig.sims)
    error = rng.choice((errno.EIO, errno.ENOSPC, "short"))
    kind = rng.choice(("read", "write", "sync", None))
    sim.fail_at(sim.ios + rng.randrange(1, 30), error, times=rng.choice((1, 1, 3, None)), of=kind)


def act(rig: Rig, rng: random.Random) -> Rig:
    """One call, or what the world does; returns the life that goes on."""
    space = rng.randrange(2)
    first, n = rng.randrange((14, 8)[space]), rng.randrange(1, 5)
    share = rng.random()
    match next(what for what, upto in _SHARES if share < upto):
        case "put":
            ttl_ms = rng.choice((0, 0, 0, 0, 700))
            rig.put(space, first, n, ttl_ms=ttl_ms, by_parts=rng.random() < 0.3)
        case "get":
            rig.get(space, first, n)
        case "prefetch":
            rig.get(space, first, n, wait_ms=0)
        case "persist":
            rig.persist(space, first, n)
        case "drop" | "drop all" if rig.blind and rig.plan.keeps_unread:
            pass
        case "drop":
            rig.drop(space, first, n)
        case "drop all":
            rig.drop_namespace(space)
        case "time":
            rig.pass_ms(rng.choice((10, 100, 300)))
        case "view":
            rig.view(space, first, n)
        case "let go":
            rig.let_go()
        case "hint":
            rig.hint(rng.choice(HINTS), space, first, n, 500)
        case "demote":
            rig.demote_all()
        case "settle":
            rig.settle()
        case "finish":
            rig.finish_ops()
        case "end":
            return rig.restart(recovers=rng.random() < 0.5)
        case "kill":
            return rig.restart(clean=False, recovers=rng.random() < 0.5)
        case "crash":
            return rig.crash(recovers=rng.random() < 0.5)
    return rig


_SHARES = (
    ("put", 0.30),
    ("get", 0.48),
    ("prefetch", 0.50),
    ("persist", 0.62),
    ("drop", 0.70),
    ("drop all", 0.71),
    ("time", 0.78),
    ("view", 0.80),
    ("let go", 0.83),
    ("hint", 0.86),
    ("demote", 0.90),
    ("settle", 0.93),
    ("finish", 0.95),
    ("end", 0.96),
    ("kill", 0.97),
    ("crash", 1.0),
)


@pytest.mark.parametrize("twenties", range(SEEDS // 20))
def test_any_history_keeps_its_promises(twenties: int) -> None:
    live_all(twenties)


@pytest.mark.long
@pytest.mark.parametrize("twenties", range(SEEDS // 20, MORE // 20))
def test_any_other_history_keeps_its_promises(twenties: int) -> None:
    live_all(twenties)


def live_all(twenties: int) -> None:
    """Twenty seeds, in which something was promised that could have been broken."""
    did: Counter[str] = Counter()
    for seed in range(20 * twenties, 20 * twenties + 20):
        judge = live(seed, faults=seed % 4 == 3).judge
        did += Counter(
            served=judge.served, acknowledged=judge.acknowledged, forgotten=judge.forgotten
        )
    assert all(count > 20 for count in (did["served"], did["acknowledged"], did["forgotten"]))


@pytest.mark.long
@pytest.mark.parametrize("hundreds", range(20))
def test_many_histories_keep_their_promises(hundreds: int) -> None:
    for seed in range(1000 + 100 * hundreds, 1100 + 100 * hundreds):
        live(seed, 250, faults=seed % 2 == 1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(5000, 5010))
def test_histories_checked_after_each_change(seed: int) -> None:
    live(seed, 600, check_each=1)


def test_what_a_start_cannot_read_comes_back_as_it_was_or_never() -> None:
    for seed in range(8000, 8030):
        live(seed, blind=0.5, keeps_unread=seed % 3 > 0)


@pytest.mark.long
@pytest.mark.parametrize("hundreds", range(10))
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "dropped"])
def test_what_many_starts_cannot_read_comes_back_as_it_was_or_never(
    hundreds: int, keeps: bool
) -> None:
    for seed in range(9000 + 100 * hundreds, 9100 + 100 * hundreds):
        live(seed, 250, blind=0.5, keeps_unread=keeps)


def two_volumes(seed: int) -> tuple[Geometry, ...]:
    several = [geometries for geometries in GEOMETRIES if len(geometries) > 1]
    return several[seed % len(several)]


def test_what_lies_on_two_volumes_outlives_what_one_of_them_loses() -> None:
    for seed in range(7000, 7020):
        live(seed, away=0.4, geometries=two_volumes(seed))


@pytest.mark.long
@pytest.mark.parametrize("hundreds", range(5))
def test_what_often_lies_on_two_volumes_outlives_what_one_of_them_loses(hundreds: int) -> None:
    for seed in range(20_000 + 100 * hundreds, 20_100 + 100 * hundreds):
        live(seed, 250, away=0.4, geometries=two_volumes(seed))
