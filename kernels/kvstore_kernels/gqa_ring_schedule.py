"""Which tokens of which sequences a multiprocessor attends to in `gqa_ring`.

As in `mla_ring_schedule`, workers claim items, the longest first, since multiprocessors read at
unequal speed. A tile is less and an item costs less than there, so that the rest may be smaller.

Workers are filled up to a share of the mean load, the longest sequence first, each to who has
least: with a whole sequence where it fits, else with as much of it as does. What is left of
sequences that were cut is halved, again and again: the last items are small.

Everything here is numpy and lists on the host, once per step, for all layers.
"""

from __future__ import annotations

from heapq import heapreplace

import numpy.typing as npt

from kvstore_kernels.mla_ring_schedule import (
    RingList,
    checked_lengths,
    even_cuts,
    most_partials,
    ring_list,
)

TILE_TOKENS = 16
SHARE = 0.95  # of the mean load, up to which workers are filled first
CHUNK = 16  # tiles of the smallest parts: 1 MiB, and a partial result has 32 KiB
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
        found = [
            parts + _halves(count - sum(parts), chunk)
            for count, parts in zip(tiles, firsts, strict=True)
        ]
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


def _halves(count: int, chunk: int) -> list[int]:
    """Each half of what is left, as long as that is no less than a chunk."""
    parts: list[int] = []
    while count:
        size = count if 2 * count <= 3 * chunk else max(-(-count // 2), chunk)
        parts.append(size)
        count -= size
    return parts
