"""Planted bugs are caught; `cluster.sim.seeds` finds the seeds that do."""

from __future__ import annotations

import pytest
from cluster.sim.plants import PLANTS, Plant, catching_seed

CATCHING = 500  # seeds within which each planted bug must be caught
NEAR = 30  # seeds from the recorded one on that the normal suite tries
_HOURS_S = 12 * 3600


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_bugs_are_caught(plant: Plant) -> None:
    """By the seed that caught it once, or one of the next: what happens in a seed's run changes
    with every change of the code."""
    seed = catching_seed(plant, range(plant.seed, plant.seed + NEAR))
    print(f"seed {seed}")
    assert seed is not None


@pytest.mark.long
@pytest.mark.timeout(_HOURS_S)
@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_planted_bugs_are_caught_within_500_seeds(plant: Plant) -> None:
    seed = catching_seed(plant, range(CATCHING))
    print(f"seed {seed}")
    assert seed is not None
