"""The power goes at every write and sync of a small life, and again while the next one begins:
what was acknowledged is there, what was dropped is not, and nothing wrong is served."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
from nvme.rig import Plan, Rig, small_limits, tight
from nvme.script import AGAIN, PLAN, play
from nvme.sim_disk import Crashed

TWO_VOLUMES = replace(PLAN, geometries=(tight(17, 4, 3), tight(13, 4, 3)))
CRASHING = replace(PLAN, check_each=10)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_limits():
        yield


def crash_points(seed: int, plan: Plan, at: Callable[[Rig, int], None]) -> int:
    """Plays the script, and at each write and sync calls `at` with the rig as it is then and the
    number of the moment; returns how many there were.

    A write that the power cuts short is one of which a crash right after it keeps a part."""
    moments = 0

    def look(rig: Rig, kind: str) -> None:
        nonlocal moments
        if kind != "read":
            moments += 1
            at(rig, moments)

    rig = Rig(seed, plan)
    rig.on_io = look
    rig = play(rig)
    look(rig, "end")
    return moments


def check_all(rig: Rig) -> None:
    """All promises of the life before are kept, and no byte is wrong."""
    rig.get_musts()
    rig.get_all()
    rig.settle()
    rig.check()


def test_the_power_may_go_at_any_write_or_sync() -> None:
    outcomes = 0

    def at(rig: Rig, moment: int) -> None:
        nonlocal outcomes
        for keeps in range(3):
            outcomes += 1
            after = rig.crash(1000 * moment + keeps)
            check_all(after)
            if keeps == moment % 3:
                after = play(after, AGAIN)
                after.get_musts()
                after.finish()

    assert crash_points(1, CRASHING, at) > 80
    assert outcomes > 240


def test_the_power_may_go_again_while_the_next_life_begins() -> None:
    again = 0

    def at(rig: Rig, moment: int) -> None:
        nonlocal again
        rng = np.random.default_rng(moment)
        after = rig.crash(moment, recovers=False)
        after.sims[0].crash_at(int(rng.integers(1, 40)))
        try:
            # Calls come while the volume is still being read.
            after = play(after, AGAIN)
        except Crashed:
            again += 1
        check_all(after.crash(moment))

    assert crash_points(2, CRASHING, at) > 70
    assert again > 40


def test_the_power_may_go_three_times() -> None:
    def at(rig: Rig, moment: int) -> None:
        if moment % 3:
            return
        rng = np.random.default_rng(moment)
        for _ in range(3):
            rig = rig.crash(int(rng.integers(1 << 30)))
            rig.get_musts()
            rig.sims[0].crash_at(int(rng.integers(10, 60)))
            try:
                rig = play(rig, AGAIN)
            except Crashed:
                continue
        check_all(rig.crash(moment))

    crash_points(3, CRASHING, at)


def test_the_power_may_go_after_a_kill() -> None:
    def at(rig: Rig, moment: int) -> None:
        after = rig.killed(moment)
        check_all(after.crash(moment))
        after = play(after, AGAIN)
        check_all(after.crash(moment))

    crash_points(4, CRASHING, at)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(10, 16))
@pytest.mark.parametrize("plan", [CRASHING, TWO_VOLUMES], ids=["one volume", "two volumes"])
def test_the_power_may_go_at_any_write_or_sync_of_other_lives(seed: int, plan: Plan) -> None:
    def at(rig: Rig, moment: int) -> None:
        for keeps in range(4):
            after = rig.crash(1000 * moment + keeps)
            check_all(after)
            after = play(after, AGAIN)
            check_all(after.crash(moment))

    crash_points(seed, plan, at)
