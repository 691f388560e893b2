"""The policies alone, block by block, and libCacheSim's over the same accesses.

A block here is on its own: each access is a look-up, and an admission where it missed. So there
is nothing of chains in it, and two implementations of one policy find the same blocks.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.replay_store import rows_for
from benchmarks.systems import environment_for
from kvstore.eviction import EvictionPolicy, make_policy
from kvstore.eviction.s3fifo import SMALL_SHARE

Accesses = npt.NDArray[np.int64]
SIMULATOR = ("libcachesim==0.3.5",)
_NOTHING = -1


@dataclass(frozen=True, slots=True)
class Hits:
    """Hits of a policy in pools of several sizes, that begin empty or `full` of strangers."""

    policy: str
    full: bool
    hits: list[int]


def alone(policy_name: str, blocks: int, accesses: Accesses, *, full: bool) -> int:
    """Hits of a policy in a pool of so many blocks, that begins empty or `full` of strangers."""
    policy = make_policy(policy_name, rows_for(blocks))
    n = int(accesses.max()) + 1
    fingerprints = np.random.default_rng(0).integers(1 << 64, size=n + blocks, dtype=np.uint64)
    slots = np.arange(blocks, dtype=np.uint32)
    block_in, slot_of = [_NOTHING] * blocks, [_NOTHING] * n
    free = slots.tolist()
    if full:
        _fill(policy, slots, fingerprints[n:])
        free.clear()
    hits = 0
    for block in accesses.tolist():
        slot = slot_of[block]
        if slot != _NOTHING:
            policy.touch(slots[slot : slot + 1])
            hits += 1
            continue
        if free:
            slot = free.pop()
        else:
            slot = int(policy.victims(1, _any)[0])
            if block_in[slot] != _NOTHING:
                slot_of[block_in[slot]] = _NOTHING
        block_in[slot], slot_of[block] = block, slot
        policy.admit(slots[slot : slot + 1], fingerprints[block : block + 1])
    return hits


def simulated(sizes: Sequence[int], accesses: Accesses) -> list[Hits]:
    """What libCacheSim finds in pools of these sizes; RuntimeError where it cannot be had."""
    strangers = np.arange(max(sizes)) + accesses.max() + 1
    asked = {
        "accesses": accesses.tolist(),
        "strangers": strangers.tolist(),
        "sizes": [(blocks, (_small(blocks) + 0.5) / blocks) for blocks in sizes],
    }
    done = subprocess.run(
        [environment_for(SIMULATOR) / "bin/python", "-c", _SIMULATE],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return [Hits(**found) for found in json.loads(done.stdout.splitlines()[-1])]


# Ghosts: as many as blocks, and two reads take a block to main, both as in our S3-FIFO.
_SIMULATE = """
import json, sys
import libcachesim as lcs
asked = json.load(sys.stdin)
done = []
for policy in ("lru", "s3fifo"):
    for full in (False, True):
        hits = []
        for size, small in asked["sizes"]:
            if policy == "lru":
                cache = lcs.LRU(size, hashpower=18)
            else:
                cache = lcs.S3FIFO(
                    size,
                    hashpower=18,
                    small_size_ratio=small,
                    ghost_size_ratio=1.0,
                    move_to_main_threshold=2,
                )
            request = lcs.Request()
            request.obj_size = 1
            for block in asked["strangers"][:size] if full else []:
                request.obj_id = block
                cache.get(request)
            found = 0
            for block in asked["accesses"]:
                request.obj_id = block
                found += cache.get(request)
            hits.append(found)
        done.append({"policy": policy, "full": full, "hits": hits})
print(json.dumps(done))
"""


def _fill(
    policy: EvictionPolicy, slots: npt.NDArray[np.uint32], fingerprints: npt.NDArray[np.uint64]
) -> None:
    """Strangers as the simulator's S3-FIFO lets them in: main has those that small has no room for.

    It is the one thing that ours does otherwise: where there is room, new blocks enter small.
    """
    small = _small(len(slots))
    policy.admit(slots[small:], fingerprints[small:])
    policy.victims(len(slots) - small, _any)
    policy.admit(slots[small:], fingerprints[small:])  # known by now, so they enter main
    policy.admit(slots[:small], fingerprints[:small])


def _small(blocks: int) -> int:
    """At how many blocks the small queue has its share: the least that are a tenth."""
    return -(-blocks // SMALL_SHARE)


def _any(ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
    return np.ones(ids.size, np.bool_)
