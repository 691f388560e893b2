"""LRU and S3-FIFO, one block at a time, find what plain simulators of the same rules find."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

import numpy as np
import pytest

from kvstore.eviction import make_policy
from kvstore.eviction.order import BoolArray, IdArray

BLOCKS = 400
PATTERNS = ("skewed", "drifting", "in rounds")
# Small enough for S3-FIFO to end its second chances before a call's scan is used up.
SIZES = (10, 37, 100, 150)


def accesses(pattern: str, seed: int) -> list[int]:
    rng = np.random.default_rng(seed)
    n = 6000
    skewed = np.minimum(rng.zipf(1.2, n) - 1, BLOCKS - 1)
    if pattern == "skewed":
        return rng.permutation(BLOCKS)[skewed].tolist()
    if pattern == "drifting":
        return ((skewed + np.arange(n) // 20) % BLOCKS).tolist()
    rounds = np.arange(n) % (BLOCKS // 2)
    return np.where(rng.random(n) < 0.5, rounds, rng.integers(0, BLOCKS, n)).tolist()


def ours(policy_name: str, size: int, blocks: Iterable[int]) -> Iterator[bool]:
    """Whether each access hits; a miss is admitted, for which one victim goes where all is full."""
    policy = make_policy(policy_name, 1 << 14)  # so many that no two ghosts get in each other's way
    slot_of: dict[int, int] = {}
    block_in: dict[int, int] = {}
    for block in blocks:
        slot = slot_of.get(block)
        yield slot is not None
        if slot is not None:
            policy.touch(np.array([slot], np.uint32))
            continue
        slot = len(slot_of)
        if slot == size:
            slot = int(policy.victims(1, every)[0])
            del slot_of[block_in[slot]]
        slot_of[block], block_in[slot] = slot, block
        policy.admit(np.array([slot], np.uint32), np.array([block + 1], np.uint64))
    policy.check()


def every(ids: IdArray) -> BoolArray:
    return np.ones(ids.size, np.bool_)


def lru(size: int, blocks: Iterable[int]) -> Iterator[bool]:
    held: OrderedDict[int, None] = OrderedDict()
    for block in blocks:
        yield block in held
        if block not in held and len(held) == size:
            held.popitem(last=False)
        held[block] = None
        held.move_to_end(block)


def s3fifo(size: int, blocks: Iterable[int]) -> Iterator[bool]:
    small: OrderedDict[int, int] = OrderedDict()  # block -> reads, oldest first
    main: OrderedDict[int, int] = OrderedDict()
    ghosts: OrderedDict[int, None] = OrderedDict()

    def evict() -> None:
        while True:
            if small and (not main or len(small) >= (len(small) + len(main)) / 10):
                block, reads = small.popitem(last=False)
                if reads < 2:
                    ghosts[block] = None
                    return
                main[block] = 0
            else:
                block, reads = main.popitem(last=False)
                if reads == 0:
                    return
                main[block] = reads - 1

    for block in blocks:
        queue = small if block in small else main
        yield block in queue
        if block in queue:
            queue[block] = min(3, queue[block] + 1)
            continue
        if len(small) + len(main) == size:
            evict()
        known = block in ghosts
        ghosts.pop(block, None)
        (main if known else small)[block] = 0
        while len(ghosts) > len(small) + len(main):
            ghosts.popitem(last=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_lru_finds_what_a_simulator_finds(pattern: str, size: int) -> None:
    blocks = accesses(pattern, seed=size)
    assert list(ours("lru", size, blocks)) == list(lru(size, blocks))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_s3fifo_finds_what_a_simulator_finds(pattern: str, size: int) -> None:
    blocks = accesses(pattern, seed=size)
    assert list(ours("s3fifo", size, blocks)) == list(s3fifo(size, blocks))
