"""Segments that are opened before anything waits for them, on volumes that have few."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from nvme.rig import Plan, Rig, small_limits, tight

from kvstore.nvme.volume import UseState


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


def test_nothing_leaves_for_a_segment_ahead_when_the_store_ends() -> None:
    rig = Rig(1, Plan(geometries=(tight(),), nesting=0.0, pauses=1))
    number = 0
    volume = rig.volumes[0]
    while volume.free or all(use.state is not UseState.OPEN for use in volume.uses.values()):
        rig.put(0, number)
        rig.persist(0, number)
        rig.settle()
        rig.finish_ops()
        number += 1
    uses = set(volume.uses.values())
    rig.put(0, number, 4)
    rig.store.nvme.flush()
    rig._changed()
    rig.finish_ops()
    assert set(volume.uses.values()) == uses


def test_a_segment_that_nothing_was_written_to_makes_room_first() -> None:
    rig = Rig(1, Plan(geometries=(tight(17, 3),), nesting=0.0, pauses=1))
    volume, number = rig.volumes[0], 0
    while volume.free:
        rig.put(0, number, 4)
        rig.persist(0, number, 4)
        rig.settle()
        rig.finish_ops()
        number += 4
    (spare,) = [use for use in volume.uses.values() if not use.batches]
    before = len(rig.judge.must)
    rig.put(1, 0)
    rig.persist(1, 0)
    rig.settle()
    assert volume.uses[spare.segment] is not spare
    assert len(rig.judge.must) == before + 1
