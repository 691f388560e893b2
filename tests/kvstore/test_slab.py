"""The slab allocator: invariants under churn, and how much of the pool it can use."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.tiers.slab import SlabAllocator

KIB, MIB = 1 << 10, 1 << 20


def test_slots_do_not_overlap_and_memory_moves_between_classes() -> None:
    slabs = SlabAllocator(16 * MIB)
    small = slabs.alloc(5000, 10**6)
    assert np.diff(np.sort(small)).min() >= slabs.slot_granules(5000) == 2
    assert slabs.used_bytes == small.size * 8192 > 0.95 * slabs.total_bytes
    assert slabs.alloc(MIB, 1).size == 0 == slabs.n_free(MIB) == slabs.n_free(5000)
    slabs.check()
    slabs.free(small)
    slabs.check()
    assert slabs.used_bytes == 0
    assert slabs.alloc(MIB, 100).size == 16
    slabs.check()


def test_free_is_checked_before_anything_changes() -> None:
    slabs = SlabAllocator(16 * MIB)
    got = slabs.alloc(300 * KIB, 3)
    for bad in ([got[0], got[0]], [got[0], got[0] + 1], [got[0], 1 << 31]):
        with pytest.raises(AssertionError):
            slabs.free(np.array(bad, np.uint32))
    assert slabs.used_bytes == 3 * 300 * KIB
    slabs.free(got[:1])
    with pytest.raises(AssertionError, match="double free"):
        slabs.free(got[:1])
    assert slabs.slab_slots(int(got[1])).tolist() == got[1:].tolist()
    assert slabs.class_of(int(got[1])) == 300 * KIB
    slabs.check()


def test_bad_sizes() -> None:
    slabs = SlabAllocator(4096 * MIB)
    for size in (0, -1, limits.MAX_BLOCK_BYTES + 64 * KIB + 1):
        with pytest.raises(InvalidArgument):
            slabs.alloc(size, 1)
    with pytest.raises(InvalidArgument):
        SlabAllocator(MIB).alloc(2 * MIB, 1)
    with pytest.raises(InvalidArgument):
        SlabAllocator(1000)


def test_as_many_sizes_as_there_are_units_and_those_given_up_are_forgotten() -> None:
    slabs = SlabAllocator(4096 * MIB)
    held = [slabs.alloc(i * 4096, 1) for i in range(1, 200)]
    assert [got.size for got in held] == [1] * 128 + [0] * 71  # 128 units, a slab each
    slabs.check()
    slabs.free(np.concatenate(held))
    for i in range(200, 1000):
        slabs.free(slabs.alloc(i * 4096, 1))
    slabs.check()


@pytest.mark.parametrize("pool", [MIB, 5 * MIB + 12345, 256 * MIB, 1 << 40])
def test_n_free_is_what_alloc_gives(pool: int) -> None:
    slabs = SlabAllocator(pool)
    size = min(pool // 8, 64 * MIB)
    slabs.alloc(size // 3, 5)
    free = slabs.n_free(size)
    assert slabs.alloc(size, 10**6).size == free > 0
    slabs.check()


def test_random_batches_keep_the_invariants() -> None:
    rng = np.random.default_rng(7)
    slabs, live = SlabAllocator(32 * MIB), np.empty(0, np.uint32)
    for step in range(600):
        if rng.random() < 0.55:
            size = int(rng.choice([4096, 10_000, 70_000, 300_000, 3_000_000]))
            live = np.concatenate((live, slabs.alloc(size, int(rng.integers(1, 40)))))
        else:
            rng.shuffle(live)
            gone, live = np.split(live, [int(rng.integers(0, live.size + 1))])
            slabs.free(gone)
        if step % 20 == 0:
            slabs.check()
    slabs.free(live)
    slabs.check()
    assert slabs.used_bytes == 0


def _make_room(slabs: SlabAllocator, live: OrderedDict[int, int], size: int) -> None:
    oldest = next(iter(live))
    gone = np.array([oldest], np.uint32)
    if slabs.class_of(oldest) != size:
        gone = slabs.slab_slots(oldest)
    slabs.free(gone)
    for granule in gone.tolist():
        del live[granule]


@pytest.mark.parametrize(("swing", "least"), [(0.0, 0.9), (0.4, 0.9)])
def test_churn_of_two_sizes_uses_most_of_the_pool(swing: float, least: float) -> None:
    rng = np.random.default_rng(1)
    slabs = SlabAllocator(256 * MIB)
    live: OrderedDict[int, int] = OrderedDict()
    used: list[float] = []
    for step in range(20_000):
        share = 0.5 + swing * np.sin(step / 3000)  # the mix drifts, so memory must move
        size = 300 * KIB if rng.random() < share else 720 * KIB
        while (got := slabs.alloc(size, 1)).size == 0:
            _make_room(slabs, live, size)
        live[int(got[0])] = size
        if step > 2000:
            used.append(slabs.used_bytes / slabs.total_bytes)
    slabs.check()
    print(f"swing {swing}: live bytes: mean {np.mean(used):.3f}, least {min(used):.3f} of the pool")
    assert np.mean(used) >= least
