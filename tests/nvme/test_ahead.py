"""Segments that are opened before anything waits for them, on volumes that have few."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nvme.rig import Plan, Rig, small_limits, tight


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_limits():
        yield


@pytest.mark.parametrize(("n_segments", "spaces"), [(1, 1), (2, 1), (2, 2), (3, 2), (4, 2)])
def test_nothing_that_somebody_waits_for_leaves_for_a_segment_ahead(
    n_segments: int, spaces: int
) -> None:
    rig = Rig(1, Plan(geometries=(tight(17, n_segments),), nesting=0.0, pauses=1))
    for space in range(spaces):
        rig.put(space, 0, 4)
    for space in range(spaces):
        rig.persist(space, 0, 4)
    for _ in range(100):  # `settle` would go on for ever
        rig.step()
    assert not rig.asked
    assert len(rig.judge.must) == 4 * spaces
    assert rig.store.stats().nvme_written_blocks == 4 * spaces
