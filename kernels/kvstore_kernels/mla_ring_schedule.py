"""Which tokens of which sequences a multiprocessor attends to, where reading is the limit.

Multiprocessors get unequal shares of the memory's speed: with even work some end a twentieth before
others, and at the end too few are left to keep the memory busy. So the list of items is longer than
there are workers. The first of them is a worker's own, and from then on whoever has read all of its
item claims the next one. Long sequences are cut into parts of a little less than a worker's mean
load, which come first, and what is left of them into ever smaller ones, which come last: guided
self-scheduling (Polychronopoulos and Kuck, 1987), the longest first (Graham, 1969).

Everything here is numpy and lists on the host, once per step, for all layers: 0.2 to 1 ms.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from heapq import heapreplace

import numpy as np
import numpy.typing as npt

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.worklist import (
    COUNTER,
    END,
    FIRST,
    GROUP,
    LENGTH,
    PART,
    PARTIAL,
    PARTS,
    SEQUENCE,
    WHOLE,
)

IntArray = npt.NDArray[np.int32]

# Behind the columns of a work list: how many parts of the (sequence, group) are kept until its
# parts are merged, whether and until when this one is, and in how many pieces of columns.
KEEPERS, KEEPS, PIECES = 9, 10, 11
AT_END, AT_ONCE = 1, 2  # by a worker until it has no more items; until it is stored
COLUMNS = 16  # 64 bytes, one access
TILE_TOKENS = 64
LEAST_TILES = 2  # of a part: its partial result is then a quarter of what it reads
SHARE = 0.9  # of the mean load that a long sequence's first parts have
LONG = 1.05  # mean loads from which on a sequence is cut
CHUNK = 1 / 8  # of the mean load, in the smallest parts
# What claimed items cost, in tiles, and unequal multiprocessors, in mean loads, under even parts.
CLAIMS_TILES, UNEQUAL = 3, 0.03
_PARTIALS = 4  # a worker, at most
# Pieces of columns by which parts are merged, and how many parts at a time: as much as the
# registers hold, and the memory brings in one go.
MERGES = ((2, 4), (4, 8), (32, 32), (128, 128))


@dataclass(frozen=True, slots=True)
class RingList:
    """What a launch has to do; made by `plan_ring`.

    items: (1 + n, 16) int32. The first row begins with n; the others have the columns of a work
        list, the longest first.
    lengths: (sequences,) int64, what it was made of.
    n_partials, n_counters: as in a work list.
    """

    items: IntArray
    lengths: npt.NDArray[np.int64]
    n_partials: int
    n_counters: int


def most_items(sequences: int, groups: int, workers: int) -> int:
    """Items that a list of any lengths has at most."""
    return sequences * groups + most_partials(workers)


def most_partials(workers: int) -> int:
    """Partial results that a list of any lengths has at most; counters are fewer."""
    return _PARTIALS * workers


def plan_ring(lengths: npt.ArrayLike, *, groups: int, workers: int) -> RingList:
    """Cuts sequences so that `workers` end together.

    lengths: tokens of each sequence, (sequences,) integers >= 0; one without tokens has an item all
    the same, which writes its output. groups: of query rows, each of which reads all tokens.
    workers: blocks of threads that run at once, one a multiprocessor.

    Raises KernelArgumentError for negative lengths, and for groups and workers under 1.
    """
    counts = checked_lengths(lengths, groups=groups, workers=workers)
    tiles = -(-counts // TILE_TOKENS)
    # Sequences without tokens change nothing for the others.
    cuts = iter(_cuts(tiles[tiles > 0].tolist(), groups, workers))
    every = [next(cuts) if count else [1] for count in tiles.tolist()]
    found = ring_list(every, counts, groups, TILE_TOKENS)
    _keep(found.items[1:], workers)
    return found


def checked_lengths(lengths: npt.ArrayLike, *, groups: int, workers: int) -> npt.NDArray[np.int64]:
    """The lengths as an array. Raises as `plan_ring` does."""
    counts = np.asarray(lengths, dtype=np.int64)
    _require(counts.ndim == 1, "lengths", f"must have one dimension, not {counts.ndim}")
    _require(bool((counts >= 0).all()), "lengths", "must not be negative")
    _require(bool((counts < 2**31 - TILE_TOKENS).all()), "lengths", "must fit in 32 bits")
    for name, number in (("groups", groups), ("workers", workers)):
        _require(number >= 1, name, f"must be at least 1, not {number}")
    return counts


def _require(condition: bool, name: str, problem: str) -> None:
    # As checks.require, which would bring torch along.
    if not condition:
        raise KernelArgumentError(name, problem)


def _cuts(tiles: list[int], groups: int, workers: int) -> list[list[int]]:
    """Tiles of the parts of each sequence, in the order of its tokens."""
    mean = groups * sum(tiles) / workers
    even = even_cuts(tiles, groups, workers)
    if _makespan(even, groups, workers) <= mean * (1 - UNEQUAL) + CLAIMS_TILES:
        return even
    guided = _guided(tiles, mean)
    parts = groups * sum(len(sizes) for sizes in guided if len(sizes) > 1)
    return guided if parts <= most_partials(workers) else even


def _makespan(cuts: list[list[int]], groups: int, workers: int) -> int:
    """When the last worker ends, in tiles, if each part goes to whoever has least, the longest
    first."""
    loads = [0] * workers
    for size in sorted((size for sizes in cuts for size in sizes), reverse=True):
        for _ in range(groups):
            heapreplace(loads, loads[0] + size)
    return max(loads)


def even_cuts(tiles: list[int], groups: int, workers: int) -> list[list[int]]:
    """Parts of one size, the least under which there is no more than one for each worker; or no
    parts, if there are more sequences than workers."""
    counts, longest = np.array(tiles, np.int64), max(tiles, default=0)

    def fits(size: int) -> bool:
        return groups * int((-(-counts // size)).sum()) <= workers

    sizes = range(LEAST_TILES, max(longest, LEAST_TILES) + 1)
    size = sizes[min(bisect_left(sizes, True, key=fits), len(sizes) - 1)]
    return [_shared_out(count, -(-count // size)) for count in tiles]


def _shared_out(count: int, parts: int) -> list[int]:
    return [(part + 1) * count // parts - part * count // parts for part in range(parts)]


def _guided(tiles: list[int], mean: float) -> list[list[int]]:
    """Of long sequences large parts, no more than there are workers, and of each one's rest ever
    smaller ones."""
    share, chunk = int(mean * SHARE), max(int(mean * CHUNK), LEAST_TILES)
    larges = [int(count / mean) if count > mean * LONG else 0 for count in tiles]
    # What those can take who have no large part, and no sequence that is not cut.
    free = float(
        sum(count - large * mean for count, large in zip(tiles, larges, strict=True) if large)
    )
    cuts = []
    for count, large in zip(tiles, larges, strict=True):
        if not large:
            cuts.append([count])
            continue
        rest = count - large * share
        halves = _halves(rest, min(free, mean / 2), chunk)
        free -= sum(halves)
        rest -= sum(halves)
        small = max(round(rest / chunk), 1) if rest else 0
        cuts.append([share] * large + halves + _shared_out(rest, small))
    return cuts


def _halves(count: int, most: float, chunk: int) -> list[int]:
    """Each half of what is left, and `most` in all, as long as they are more than a chunk."""
    parts: list[int] = []
    while min(count // 2, most) > chunk:
        parts.append(min(-(-count // 2), int(most)))
        count -= parts[-1]
        most -= parts[-1]
    return parts


def ring_list(
    cuts: list[list[int]], lengths: npt.NDArray[np.int64], groups: int, tile_tokens: int
) -> RingList:
    """The items of those parts, each of so many tiles. Among parts of one length those of
    neighbouring groups, which read the same tokens, are neighbours."""
    parts = np.array([len(sizes) for sizes in cuts], np.int64)
    sizes = np.array([size for found in cuts for size in found], np.int64)
    sequence = np.repeat(np.arange(len(parts)), parts)
    ends = np.cumsum(sizes)
    begin = np.cumsum(parts) - parts  # each sequence's first part
    before = (ends - sizes)[begin][sequence] if len(parts) else sizes
    end = (ends - before) * tile_tokens
    split = parts > 1
    partials = np.cumsum(parts * split) - parts * split  # of the sequences before
    counters = np.cumsum(split, dtype=np.int64) - split

    order = np.argsort(-sizes, kind="stable")
    sequence, end, first = sequence[order], end[order], (end - sizes * tile_tokens)[order]
    part = order - begin[sequence]
    group = np.arange(groups)
    whole, of = ~split[sequence][:, None], parts[sequence]
    partial = partials[sequence][:, None] * groups + group * of[:, None] + part[:, None]
    counter = counters[sequence][:, None] * groups + group
    values = {
        SEQUENCE: sequence[:, None],
        GROUP: group[None, :],
        FIRST: first[:, None],
        END: np.minimum(end, lengths[sequence])[:, None],
        PARTIAL: np.where(whole, WHOLE, partial),
        COUNTER: np.where(whole, WHOLE, counter),
        PARTS: of[:, None],
        PART: part[:, None],
        LENGTH: lengths[sequence][:, None],
    }
    items = np.zeros((1 + len(sizes) * groups, COLUMNS), np.int32)
    items[0, 0] = len(sizes) * groups
    for column, value in values.items():
        items[1:, column] = np.broadcast_to(value, (len(sizes), groups)).reshape(-1)
    n_partials, n_counters = int((parts * split).sum()), int(split.sum())
    return RingList(items, lengths, n_partials * groups, n_counters * groups)


def _keep(items: IntArray, workers: int) -> None:
    """Says who merges: workers whose first items are parts; where there is none of a (sequence,
    group), its last part to arrive. And in which pieces that takes them least."""
    cut = items[:, COUNTER] != WHOLE
    counter, parts = items[cut][:, COUNTER], items[cut][:, PARTS]
    first = np.flatnonzero(cut) < workers
    keepers = np.bincount(counter, weights=first).astype(np.int32)[counter]
    none = keepers == 0
    mergers = np.maximum(keepers, 1)
    pieces, depth = np.array(MERGES).T[..., None]
    turns = -(-pieces // mergers) * -(-parts // depth)
    items[cut, KEEPERS] = np.where(none, parts, keepers)
    items[cut, KEEPS] = np.where(none, AT_ONCE, np.where(first, AT_END, 0))
    items[cut, PIECES] = pieces[turns.argmin(axis=0), 0]
