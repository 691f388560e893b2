"""Real nodes and routers under seeded faults: nothing wrong is served, nothing promised is lost,
and all comes right again. `SIM_SEEDS=first:count` chooses the seeds, `SIM_PLAN` the plan."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from cluster.sim.plans import PLANS
from cluster.sim.simulation import Tally, run_seed

SHORT = {
    "ordinary": 33,
    "forgetful": 10,
    "parted": 14,
    "forsaken": 14,
    "mortal": 8,
    "halting": 14,
    "cramped": 10,
    "restless": 12,
    "piecemeal": 9,
}
LONG, LONGER = 500, 20_000
_HOURS_S = 24 * 3600


def _seeds(count: int) -> range:
    first, _, chosen = os.environ.get("SIM_SEEDS", f"0:{count}").partition(":")
    return range(int(first), int(first) + int(chosen or 1))


def _run(seeds: range, plan: str) -> Tally:
    """All of them; says at the end what that was."""
    total = Tally()
    for seed in seeds:
        total.add(run_seed(seed, plan))
    print(f"{len(seeds)} seeds, {plan}: {total}")
    return total


@pytest.mark.parametrize("plan", PLANS)
def test_clusters_under_faults(plan: str) -> None:
    if os.environ.get("SIM_PLAN", plan) != plan:
        pytest.skip("another plan was chosen")
    seeds = _seeds(SHORT[plan])
    total = _run(seeds, plan)
    if "SIM_SEEDS" not in os.environ:  # the faults and the promises were there to be broken
        assert total.hits > 50 * len(seeds)
        assert total.faults
        if plan == "ordinary":
            assert total.promised > 10 * len(seeds)
            assert len(total.faults) >= 10


@pytest.mark.long
@pytest.mark.timeout(_HOURS_S)
@pytest.mark.parametrize("first", range(0, LONG, 20))
@pytest.mark.parametrize("plan", PLANS)
def test_more_clusters_under_faults(plan: str, first: int) -> None:
    _run(range(first, first + 20), plan)


@pytest.mark.long
@pytest.mark.timeout(_HOURS_S)
@pytest.mark.skipif("SIM_NIGHT" not in os.environ, reason="hours; SIM_NIGHT=1 runs it")
def test_clusters_for_a_night() -> None:
    _run(_seeds(LONGER), os.environ.get("SIM_PLAN", "ordinary"))


def test_a_seed_is_a_run_in_any_process() -> None:
    """Whatever Python's own hashes are there."""
    code = "from cluster.sim.simulation import run_seed; print(run_seed(5).digest)"
    tests = str(Path(__file__).parents[2])
    digests = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(hashes), "PYTHONPATH": tests},
            capture_output=True,
            check=True,
            timeout=120,
            text=True,
        ).stdout
        for hashes in (1, 2)
    }
    assert len(digests) == 1
