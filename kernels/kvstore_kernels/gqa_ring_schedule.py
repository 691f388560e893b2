"""Which tokens of which sequences a multiprocessor attends to in `gqa_ring`.

As in `mla_ring_schedule`, workers claim items, the longest first, since multiprocessors read at
unequal speed: where memory is the limit, 24 of an H200's 132 take 1.4 us for a tile, and all others
2.05. A tile is less and an item costs less than there, so that the rest may be smaller.

Workers are filled up to a share of the mean load, the longest sequence first, each to who has
least: with a whole sequence where it fits, else with as much of it as does. What the slow ones have
then lasts until shortly before the end. What is left of the sequences is claimed by the fast ones,
at first in large parts and at last in small ones (guided self-scheduling).

Everything here is numpy and lists on the host, once per step, for all layers.
"""

from __future__ import annotations

from heapq import heapreplace
from itertools import pairwise

import numpy.typing as npt

from kvstore_kernels.mla_ring_schedule import (
    RingList,
    checked_lengths,
    even_cuts,
    most_partials,
    ring_list,
)

TILE_TOKENS = 16
SHARE = 0.9  # of the mean load, up to which workers are filled first
CLAIMS = 64  # of all that is left to be claimed, the next part is one 64th,
CHUNK = 8  # but no less than so many tiles: 512 KiB, and a partial result has 32 KiB
LEAST_LOAD = 64  # tiles a worker, under which all get one part and nothing is left to be claimed


def plan_gqa_ring(lengths: npt.ArrayLike, *, groups: int, workers: int) -> RingList:
    """Cuts sequences so that `workers` end together.

    lengths: tokens of each sequence, (sequences,) integers >= 0; one without tokens has an item all
    the same, which writes its output. groups: of KV heads, which are read apart from each other.
    workers: blocks of threads that run at once, one a multiprocessor.

    Raises KernelArgumentError for negative lengths, and for groups and workers under 1.
    """
    counts = checked_lengths(lengths, groups=groups, workers=workers)
    tiles = -(-counts // TILE_TOKENS)
    cuts = iter(_cuts(tiles[tiles > 0].tolist(), groups, workers))
    every = [next(cuts) if count else [1] for count in tiles.tolist()]
    return ring_list(every, counts, groups, TILE_TOKENS)


def _cuts(tiles: list[int], groups: int, workers: int) -> list[list[int]]:
    """Tiles of the parts of each sequence, in the order of its tokens."""
    mean = groups * sum(tiles) / workers
    if mean < LEAST_LOAD:
        return even_cuts(tiles, groups, workers)
    firsts = _filled(tiles, groups, workers, mean * SHARE)
    chunk = CHUNK
    while True:
        found = _with_rests(tiles, firsts, groups, chunk)
        parts = groups * sum(len(sizes) for sizes in found if len(sizes) > 1)
        if parts <= most_partials(workers):
            return found
        if chunk > max(tiles):
            return even_cuts(tiles, groups, workers)
        chunk *= 2


def _filled(tiles: list[int], groups: int, workers: int, most: float) -> list[list[int]]:
    """Of each sequence the parts with which workers are filled, which may be all of it."""
    loads = [0.0] * workers
    found: list[list[int]] = [[] for _ in tiles]
    for sequence in sorted(range(len(tiles)), key=lambda index: -tiles[index]):
        rest = tiles[sequence]
        while rest:
            room = int(most - loads[0])
            if rest <= room and found[sequence]:
                break  # better claimed later than as a worker's first part
            size = min(rest, room)
            if size < min(rest, CHUNK):
                break
            found[sequence].append(size)
            rest -= size
            for _ in range(groups):
                heapreplace(loads, loads[0] + size)
    return found


def _with_rests(
    tiles: list[int], firsts: list[list[int]], groups: int, chunk: int
) -> list[list[int]]:
    """Those parts, and behind them equal ones of what is left of each sequence, the most first:
    each a share of all that is left then, but no less than a chunk."""
    found = [list(parts) for parts in firsts]
    rests = [count - sum(parts) for count, parts in zip(tiles, firsts, strict=True)]
    left = sum(rests)
    for sequence in sorted(range(len(tiles)), key=lambda index: -rests[index]):
        rest = rests[sequence]
        if rest:
            size = max(groups * left / CLAIMS, chunk)
            parts = max(round(rest / size), 1)
            edges = [part * rest // parts for part in range(parts + 1)]
            found[sequence] += [end - first for first, end in pairwise(edges)]
            left -= rest
    return found
