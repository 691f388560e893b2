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


def test_room_for_what_waits_is_made_where_that_fits_whatever_is_wanted_ahead() -> None:
    """The first volume, whose blocks are older, is too small for those of the second space."""
    geometries = (tight(6, 2, 3), tight(17, 2, 3))
    rig = Rig(1, Plan(geometries=geometries, nesting=0.0, pauses=1))
    for space in (0, 1):
        for first in range(0, 16, 4):
            rig.put(space, first, 4)
            rig.persist(space, first, 4)
            rig.settle()
            rig.finish_ops()
    nvme, small = rig.store.nvme, set(rig.volumes[0].usable())
    assert small
    for volume in rig.volumes:
        for use in volume.uses.values():
            use.born, use.batches = volume.number, 1  # none is a spare one
    nvme._writer.needed, nvme._writer.needed_ahead = {3}, {2}
    nvme._leaving.make_room()
    assert nvme._leaving._again
    assert not small & nvme._leaving._again.keys()
