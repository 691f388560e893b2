"""A trace of requests as chains of block ids, and what anybody could make of it."""

from __future__ import annotations

import heapq
import json
import lzma
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

BLOCK_TOKENS = 512
Chain = npt.NDArray[np.int64]


def read_trace(path: Path, most: int | None = None) -> list[Chain]:
    """The block ids of the first `most` requests, in order; a last block not full is left out.

    path: JSON lines with `hash_ids` and `input_length`, plain or packed with xz.
    """
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as lines:
        requests = [
            json.loads(line) for line, _ in zip(lines, range(most or 1 << 62), strict=False)
        ]
    chains = [
        np.array(r["hash_ids"][: r["input_length"] // BLOCK_TOKENS], np.int64) for r in requests
    ]
    return [chain for chain in chains if len(chain)]


def keys_of(requests: Sequence[Chain]) -> npt.NDArray[np.uint8]:
    """A key for each block id, uint8 (ids, 32): as good as random, as real ones are."""
    ids = 1 + max(int(chain.max()) for chain in requests)
    words = np.random.default_rng(0).integers(1 << 64, size=(ids, 4), dtype=np.uint64)
    return words.view(np.uint8)


def over(requests: Sequence[Chain]) -> npt.NDArray[np.bool_]:
    """Which requests nobody continues: their last block is not asked for again."""
    last_use: dict[int, int] = {}
    for i, chain in enumerate(requests):
        last_use.update(dict.fromkeys(chain.tolist(), i))
    return np.array([last_use[int(chain[-1])] == i for i, chain in enumerate(requests)])


def attainable(requests: Sequence[Chain]) -> int:
    """Blocks that a store without end would find."""
    seen: set[int] = set()
    hits = 0
    for chain in requests:
        ids = chain.tolist()
        hits += next((i for i, block in enumerate(ids) if block not in seen), len(ids))
        seen.update(ids)
    return hits


def foreseen(accesses: npt.NDArray[np.int64], blocks: int) -> int:
    """Hits of a pool that knows the future (Belady 1966), and stores only what is worth it.

    Whatever a store of so many blocks does, it does not find more.
    """
    order = np.argsort(accesses, kind="stable")
    again = accesses[order[:-1]] == accesses[order[1:]]
    next_use = np.full(len(accesses), len(accesses))
    next_use[order[:-1][again]] = order[1:][again]
    held: dict[int, int] = {}
    furthest: list[tuple[int, int]] = []
    hits = 0
    for block, use in zip(accesses.tolist(), next_use.tolist(), strict=True):
        hits += block in held
        held[block] = use
        heapq.heappush(furthest, (-use, block))
        while len(held) > blocks:
            when, gone = heapq.heappop(furthest)
            if held.get(gone) == -when:  # else the block was used since, and has a later entry
                del held[gone]
    return hits
