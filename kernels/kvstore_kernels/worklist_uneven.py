"""Parts of any length, built backwards: where equal parts would leave workers without work.

All workers are to end at one moment, and are filled from there: the longest (sequence, group)
first, each where least room is left that suffices (best fit decreasing: Johnson, "Near-optimal bin
packing algorithms", 1973). What fits nowhere fills the worker that has most room, and its rest is
placed likewise. So few are cut, and each worker has little left. The moment is the earliest of some
at which all of it fits. What an item costs beside its tokens, and a partial result with its share
of the merging, are part of what is filled in.

Groups of a sequence are alike. So no more is filled than a greatest common divisor's part of the
groups and workers, and all others are given the same.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

# Ends that are tried, in mean loads.
_ENDS = (1.02, 1.04, 1.06, 1.09, 1.12, 1.16, 1.20, 1.25, 1.32, 1.40)


@dataclass(frozen=True, slots=True)
class Pieces:
    """How (sequence, group) pairs are cut; all arrays (n,), the parts of one in their order.

    first, end: in blocks of the sequence's own.
    """

    sequence: Ints
    group: Ints
    first: Ints
    end: Ints
    part: Ints
    parts: Ints


def uneven_pieces(
    blocks: Ints,
    *,
    groups: int,
    workers: int,
    overhead: float,
    cut: float,
    least: int,
    before: float,
) -> Pieces | None:
    """Pieces with which all workers end before that moment; None where none were found.

    blocks: of each sequence. overhead, cut: what an item costs beside its blocks, and a part of
    several beside that, in blocks. least: blocks of such a part at least.
    """
    alike = math.gcd(groups, workers)
    own, room_for = groups // alike, workers // alike
    order = np.argsort(-blocks, kind="stable")
    wanted = np.repeat(blocks[order], own).tolist()
    mean = (sum(wanted) + overhead * len(wanted)) / room_for
    for factor in _ENDS:
        if factor * mean >= before:
            return None
        cuts = _filled(wanted, [factor * mean] * room_for, overhead, cut, least)
        if cuts is not None:
            return _pieces(cuts, order, own, alike)
    return None


def _filled(
    wanted: list[int], rooms: list[float], overhead: float, cut: float, least: int
) -> list[list[int]] | None:
    """The sizes of each one's parts; None where they do not fit. rooms: ascending; changed."""
    cuts = []
    for blocks in wanted:
        parts: list[int] = []
        rest = blocks
        while True:
            needed = rest + overhead + (cut if parts else 0.0)
            fits = bisect_left(rooms, needed)
            if fits < len(rooms):
                insort(rooms, rooms.pop(fits) - needed)
                parts.append(rest)
                break
            most = rooms.pop()
            size = min(int(most - overhead - cut), rest - least)
            if size < least:
                return None
            insort(rooms, most - size - overhead - cut)
            parts.append(size)
            rest -= size
        cuts.append(parts)
    return cuts


def _pieces(cuts: list[list[int]], order: Ints, own: int, alike: int) -> Pieces:
    """cuts: of `own` groups of each sequence in that order; as many others `alike` times."""
    parts = np.array([len(sizes) for sizes in cuts])
    sizes = np.array([size for unit in cuts for size in unit])
    ends = np.cumsum(sizes)
    begins = np.repeat((ends - sizes)[np.cumsum(parts) - parts], parts)
    part = np.arange(len(sizes)) - np.repeat(np.cumsum(parts) - parts, parts)
    sequence = np.repeat(np.repeat(order, own), parts)
    group = np.repeat(np.tile(np.arange(own), len(order)), parts)
    return Pieces(
        sequence=np.repeat(sequence, alike),
        group=(group[:, None] + own * np.arange(alike)).ravel(),
        first=np.repeat(ends - sizes - begins, alike),
        end=np.repeat(ends - begins, alike),
        part=np.repeat(part, alike),
        parts=np.repeat(np.repeat(parts, parts), alike),
    )
