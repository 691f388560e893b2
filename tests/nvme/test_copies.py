"""Several volumes, one of which is away for a life, and keys that lie in more than one place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from nvme.judge import SMALL, chain
from nvme.rig import PATIENT_MS, Plan, Rig, small_limits, tight, with_one_off, with_unread_header

from kvstore import commands as c
from kvstore import limits
from kvstore.block import header_bytes, unpack
from kvstore.errors import ResourceExhausted
from kvstore.nvme.ops import CheckBlocks, ReadBlocks
from kvstore.nvme.volume import Health, Use, UseState
from kvstore.store import NvmePolicy

PLAN = Plan(geometries=(tight(17, 6, 3), tight(17, 6, 3)), nesting=0.0, pauses=1)


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_limits():
        yield


def two_copies(ttl_ms: int = 0) -> tuple[Rig, Use, Use]:
    """Blocks were put anew, and persisted on the other volume, while theirs was off; now both are
    there. The use that has the first ones, and is full, and that of the later ones."""
    rig = Rig(1, PLAN)
    rig.put(0, 0, 3, ttl_ms=ttl_ms)
    rig.persist(0, 0, 3)
    rig.settle()
    (old,) = rig._uses_of((0, 0))
    number = 20
    while old.state is not UseState.WHOLE:
        rig.put(0, number, 3)
        rig.persist(0, number, 3)
        rig.settle()
        rig.finish_ops()
        number += 3
    rig.judge.must = {name: each for name, each in rig.judge.must.items() if name[1] < 3}
    rig = with_one_off(rig, old.volume)
    assert not rig.get(0, 0, 3)
    rig.put(0, 0, 3)
    rig.persist(0, 0, 3)
    rig.settle()
    assert len(rig.judge.must) == 3
    rig = rig.crash(1, recovers=False)
    one = rig._recoveries.pop(old.volume)  # all of it first
    while next(one, None):
        pass
    rig.recovering -= 1
    rig.recover()
    old, new = sorted(rig._uses_of((0, 0)), key=lambda use: use.volume != old.volume)
    return rig, old, new


def test_what_was_persisted_later_does_not_expire_with_an_older_copy() -> None:
    rig, *_ = two_copies(ttl_ms=700)
    rig.pass_ms(1000)
    assert rig.get(0, 0, 3) == 3


def test_what_was_persisted_later_does_not_leave_with_the_segment_of_an_older_copy() -> None:
    rig, old, new = two_copies()
    for number in range(0, 60, 3):
        if rig.volumes[old.volume].uses.get(old.segment) is not old:
            break
        rig.put(1, number, 3)  # until the oldest segment has to make room
        rig.persist(1, number, 3)
        rig.settle()
    assert rig.volumes[old.volume].uses.get(old.segment) is not old
    assert rig.volumes[new.volume].uses.get(new.segment) is new
    assert rig.get(0, 0, 3) == 3


def found_damaged() -> Rig:
    """The first copy of a block was read, and was not what was written."""
    rig, old, _ = two_copies()
    rig.plan = replace(rig.plan, excused=True)
    at = rig.volumes[old.volume].offset(old, 3) + 1000
    rig.sims[old.volume].flip_bit(np.random.default_rng(1), at, at + 1)
    rig.get(0, 0)
    return rig


def test_what_is_damaged_in_one_place_is_read_from_another() -> None:
    rig = found_damaged()
    assert rig.get(0, 0, 3) == 3


def test_what_goes_on_from_another_place_is_told_as_of_the_put_that_wrote_it() -> None:
    """Else a cluster would compare, and repair, by a put whose bytes are nowhere."""
    rig = found_damaged()
    assert rig.get(0, 0) == 1
    shelf, block = rig.store._shelf, rig._block((0, 0))
    slot = rig.pool[int(shelf.blocks.granule[block]) * limits.GRANULE_BYTES :]
    header = unpack(slot[: header_bytes(SMALL.n_cells)])
    assert shelf.blocks.put_id[block].tobytes() == header.put_id


def test_a_volume_that_is_given_up_takes_no_copies_on_others_along() -> None:
    rig, old, _ = two_copies()
    rig.plan = replace(rig.plan, excused=True)
    rig.volumes[old.volume].health = Health.OFF
    rig.pass_ms(10)
    rig.finish_ops()
    assert rig.volumes[old.volume].uses.get(old.segment) is not old
    assert rig.get(0, 0, 3) == 3


def test_what_was_persisted_later_does_not_expire_with_a_copy_that_was_read() -> None:
    rig = Rig(1, PLAN)
    rig.put(0, 0, 3, ttl_ms=700)
    rig.persist(0, 0, 3)
    rig.settle()
    was = rig._uses_of((0, 0))[0].volume
    rig = with_one_off(rig, was)
    rig.put(0, 0, 3)
    rig.persist(0, 0, 3)
    rig.settle()
    assert len(rig.judge.must) == 3
    rig = rig.crash(1, recovers=False)
    one = rig._recoveries.pop(was)
    while next(one, None):
        pass
    rig.recovering -= 1
    assert rig.get(0, 0, 3) == 3
    rig.recover()
    rig.pass_ms(1000)
    assert rig.get(0, 0, 3) == 3


def test_what_was_persisted_later_does_not_expire_with_one_of_a_newer_segment() -> None:
    """The header of the newest segment is unreadable, so that an older one goes on."""
    rig = Rig(1, replace(PLAN, geometries=(tight(),)))
    rig.put(0, 0, 3)
    rig.persist(0, 0, 3)
    rig.settle()
    (use,) = rig.volumes[0].uses.values()
    # rotten memory: the batch is not written, and the segment is left as it is
    rig.plan = replace(rig.plan, excused=True)
    rig.put(0, 9)
    block = rig._block((0, 9))
    at = int(rig.store._shelf.blocks.granule[block]) * limits.GRANULE_BYTES + 1000
    rig.pool[at] ^= 1
    rig.persist(0, 9)
    rig.settle()
    rig.put(0, 4, 3, ttl_ms=5000)
    rig.persist(0, 4, 3)
    rig.settle()
    second = rig._uses_of((0, 4))[0]
    assert second is not use
    rig = with_unread_header(rig, second.segment)
    assert not rig.get(0, 4)
    rig.put(0, 4, 2)
    rig.persist(0, 4, 2)
    rig.settle()
    rig = rig.crash(1)
    assert (0, 4) in rig.judge.must
    rig.pass_ms(6000)
    assert rig.get(0, 4, 2) == 2


def test_room_is_made_on_all_volumes_also_after_a_header_was_unreadable() -> None:
    rig = Rig(1, PLAN)
    rig.put(0, 0, 3)
    rig.persist(0, 0, 3)
    rig.settle()
    (use,) = rig._uses_of((0, 0))
    rig = with_unread_header(rig, use.segment, use.volume)
    seen: set[Use] = set()
    for number in range(0, 300, 3):
        rig.put(1, number, 3)
        rig.persist(1, number, 3)
        rig.settle()
        seen |= {use for volume in rig.volumes for use in volume.uses.values()}
    begun = [sum(use.volume == volume.number for use in seen) for volume in rig.volumes]
    assert min(begun) * 2 > max(begun), begun


def made_room_for_a_read() -> Rig:
    """A block with a time to live, whose key lies on disk without one, has just made room for what
    a call that waits goes on to read."""
    geometries = (tight(40, 6, 3),)
    rig = Rig(1, replace(PLAN, geometries=geometries, pool_bytes=128 << 10))
    for first in range(0, 16, 4):
        rig.put(1, first, 4)
        rig.persist(1, first, 4)
        rig.settle()
        rig.demote_all()
    rig.put(0, 0)
    rig.persist(0, 0)
    rig.settle()
    rig.finish_ops()
    rig = rig.crash(1, recovers=False)
    rig.put(0, 0, ttl_ms=50_000)
    rig.recover()
    block, shelf = rig._block((0, 0)), rig.store._shelf
    birth = shelf.blocks.birth[block]
    assert shelf.places.copies_of(block)
    assert not shelf.places.there(np.array([block])).any()
    command = c.Fetch(namespace=rig.ids[1], hashes=chain(1, 0, 16), wait_ms=PATIENT_MS)
    for _ in range(10):
        if shelf.blocks.birth[block] != birth:
            return rig
        if not rig.asked:
            rig.ask(command, PATIENT_MS, lambda _: None)
        if any(isinstance(op, ReadBlocks) for op in rig.out):
            rig.carry_out(ReadBlocks)
    raise AssertionError("it did not make room")


def test_what_makes_room_for_a_read_goes_on_from_its_copy_at_once() -> None:
    rig = made_room_for_a_read()
    assert rig._block((0, 0)) >= 0


def test_a_dropped_key_does_not_come_back_by_a_copy_whose_namespace_was_closed() -> None:
    rig = made_room_for_a_read()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "MAX_NAMESPACES", 2)
        command = c.OpenNamespace(name="x", layout=SMALL.encode())
        with contextlib.suppress(ResourceExhausted):
            rig.store.handle(rig.me, command, rig.now_ms)
    rig.ids[0] = rig._opened(0)
    rig.put(0, 0)
    rig.drop(0, 0)
    rig.settle()
    for seed in range(4):
        assert not rig.crash(seed).get(0, 0)


def test_segments_of_all_volumes_are_scrubbed() -> None:
    """Though their sequences are the same."""
    rig = Rig(1, replace(PLAN, nvme=NvmePolicy(every=True, scrub_bytes_per_s=1 << 30)))
    for number in range(0, 48, 3):
        rig.put(0, number, 3)
        rig.persist(0, number, 3)
        rig.settle()
        rig.finish_ops()
    uses = [use for volume in rig.volumes for use in volume.uses.values()]
    whole = {use for use in uses if use.state is UseState.WHOLE}
    assert {use.volume for use in whole} == {0, 1}
    seen = set[Use]()
    rig.pass_ms(60_000)  # it found nothing to scrub at first, and looks again then
    for _ in range(60):
        for op in (op for op in rig.out if isinstance(op, CheckBlocks)):
            ids = rig.store._shelf.catalog.find(rig.ids[0], op.keys)
            seen.update(use for use, _ in rig.store._shelf.places.by_use(ids))
        rig.finish_ops()
        rig.pass_ms(limits.NVME_SCRUB_MS)
    assert seen >= whole
