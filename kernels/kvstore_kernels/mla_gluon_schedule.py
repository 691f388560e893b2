"""Which tokens of which sequences each multiprocessor attends to, where arithmetic is the limit.

With 64 query rows or more a latent KV byte serves so many of them that the matrix units are the
limit, so what has to be even is arithmetic: pairs of 64-token blocks. It is given to teams. A team
is one block of threads for each tile of 64 query rows: its members read the same tokens at the same
time, so that all but one of them find these in the L2.

What a team does is bounded by a limit, the least that is found to suffice. A sequence that takes
longer gives as many teams as it can a whole share, which leaves less than one; that, and sequences
that are shorter, fill the other teams, the longest first, each where least room is left that
suffices (best fit decreasing: Johnson, "Near-optimal bin packing algorithms", 1973). Only what
fits nowhere is cut once more. Each cut costs: a partial result is written and read again, and an
item begins and ends. So this cuts less than an even cut of one long line does (stream-K, Osama and
others, "Stream-K: work-centric parallel decomposition for dense matrix-matrix multiplication on the
GPU", 2023), and what cuts cost is part of each team's load.

Everything here is numpy and lists on the host, once per step, for all layers: 0.1 to 1 ms.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.worklist import (
    COUNTER,
    END,
    FIRST,
    GROUP,
    NOBODY,
    PART,
    PARTIAL,
    PARTS,
    SEQUENCE,
    WHOLE,
)

IntArray = npt.NDArray[np.int32]

# Behind the columns of a work list: tokens of the sequence, and the row of the worker's next item.
LENGTH, NEXT = 8, 9
COLUMNS = 16  # 64 bytes, one access
NOTHING_MORE = -1  # in NEXT

PAIR_TOKENS = 128
ITEM_PAIRS = 1.0  # what an item costs beside its tokens, in the time that a pair takes
SPLIT_PAIRS = 2.0  # what leaving a partial result and merging such costs
_STEP, _GROWTH = 0.01, 1.2  # between limits that are tried, of the first; and from step to step


@dataclass(frozen=True, slots=True)
class TileSchedule:
    """What a launch has to do; made by `plan_tiles`.

    records: (n, 16) int32. Row w < workers is where worker w begins; SEQUENCE is -1 when it has
        nothing to do. NEXT leads to the row of its next item, and is -1 in its last. Columns 0 to 7
        are those of a work list, GROUP being the tile of query rows; then LENGTH and NEXT.
    lengths: (sequences,) int64, what it was made of.
    n_partials, n_counters: as in a work list.
    """

    records: IntArray
    lengths: npt.NDArray[np.int64]
    n_partials: int
    n_counters: int

    @property
    def pairs(self) -> IntArray:
        """Pairs of blocks of each record that is an item."""
        items = self.records[self.records[:, SEQUENCE] != NOBODY]
        pairs: IntArray = np.maximum(-(-(items[:, END] - items[:, FIRST]) // PAIR_TOKENS), 1)
        return pairs


def most_records(sequences: int, tiles: int, workers: int) -> int:
    """Rows that a schedule of any lengths has at most."""
    return workers + tiles * (sequences + teams_of(workers, tiles))


def most_partials(tiles: int, workers: int) -> int:
    """Partial results that a schedule of any lengths has at most; counters are fewer."""
    return 2 * tiles * teams_of(workers, tiles)


def teams_of(workers: int, tiles: int) -> int:
    """How many teams of one worker a tile there are."""
    return max(1, workers // tiles)


def plan_tiles(lengths: npt.ArrayLike, *, tiles: int, workers: int) -> TileSchedule:
    """Cuts sequences so that `workers` are evenly loaded.

    lengths: tokens of each sequence, (sequences,) integers >= 0; one without tokens has an item all
    the same, which writes its output. tiles: of 64 query rows that each sequence has. workers:
    blocks of threads that run at once, one a multiprocessor; at least as many as there are tiles.

    Raises KernelArgumentError for negative lengths and for fewer workers than tiles.
    """
    counts = np.asarray(lengths, dtype=np.int64)
    _require(counts.ndim == 1, "lengths", f"must have one dimension, not {counts.ndim}")
    _require(bool((counts >= 0).all()), "lengths", "must not be negative")
    _require(bool((counts < 2**31 - PAIR_TOKENS).all()), "lengths", "must fit in 32 bits")
    _require(1 <= tiles <= workers, "workers", f"must be at least the {tiles} tiles of a sequence")
    if not len(counts):
        return TileSchedule(_empty_records(workers), counts, 0, 0)
    pairs = np.maximum(-(-counts // PAIR_TOKENS), 1)
    return _schedule(_pack(pairs.tolist(), teams_of(workers, tiles)), counts, tiles, workers)


class _Piece(NamedTuple):
    """Some of a sequence's pairs, for one team."""

    sequence: int
    first: int
    pairs: int
    team: int


@dataclass(slots=True)
class _Rest:
    """What of a sequence is not with a team yet. cut: whether some of it is."""

    pairs: int
    first: int
    sequence: int
    cut: bool

    @property
    def cost(self) -> float:
        """As one piece."""
        return self.pairs + ITEM_PAIRS + SPLIT_PAIRS * self.cut


def _require(condition: bool, name: str, problem: str) -> None:
    # As checks.require, which would bring torch along.
    if not condition:
        raise KernelArgumentError(name, problem)


def _pack(pairs: list[int], teams: int) -> list[_Piece]:
    """Pieces for the teams, under the least limit that is tried and suffices. One under which
    nothing is cut always does."""
    limit = max((sum(pairs) + ITEM_PAIRS * len(pairs)) / teams, 1 + ITEM_PAIRS)
    step = max(limit * _STEP, 0.5)
    while True:
        pieces = _packed(pairs, teams, limit)
        if pieces is not None:
            return pieces
        limit += step
        step *= _GROWTH


def _packed(pairs: list[int], teams: int, limit: float) -> list[_Piece] | None:
    """Pieces under that limit, or None if they do not fit, or are too many for their memory."""
    pieces, rests = _shares(pairs, limit)
    if len(pieces) > teams:
        return None
    rooms = [(limit, team) for team in range(len(pieces), teams)]  # the least first
    too_long = []
    for rest in sorted(rests, key=lambda rest: -rest.pairs):
        at = bisect_left(rooms, (rest.cost, 0))
        if at == len(rooms):
            too_long.append(rest)
            continue
        room, team = rooms.pop(at)
        pieces.append(_Piece(rest.sequence, rest.first, rest.pairs, team))
        insort(rooms, (room - rest.cost, team))
    if not all(_cut_up(rest, rooms, pieces) for rest in too_long):
        return None
    parts = np.bincount([piece.sequence for piece in pieces])
    return pieces if parts[parts > 1].sum() <= 2 * teams else None


def _shares(pairs: list[int], limit: float) -> tuple[list[_Piece], list[_Rest]]:
    """A whole share for each of the first teams, and what is left of all sequences."""
    pieces: list[_Piece] = []
    rests = []
    share = max(int(limit - ITEM_PAIRS - SPLIT_PAIRS), 1)
    for sequence, count in enumerate(pairs):
        shares = 0 if count + ITEM_PAIRS <= limit else (count - 1) // share
        for first in range(0, shares * share, share):
            pieces.append(_Piece(sequence, first, share, len(pieces)))
        first = shares * share
        rests.append(_Rest(count - first, first, sequence, shares > 0))
    return pieces, rests


def _cut_up(rest: _Rest, rooms: list[tuple[float, int]], pieces: list[_Piece]) -> bool:
    """Gives it away in pieces, the largest rooms first; whether there was room enough."""
    while rest.pairs:
        if not rooms:
            return False
        room, team = rooms.pop()
        count = min(int(room - ITEM_PAIRS - SPLIT_PAIRS), rest.pairs)
        if count < 1:
            return False
        pieces.append(_Piece(rest.sequence, rest.first, count, team))
        rest.first += count
        rest.pairs -= count
    return True


def _empty_records(n: int) -> IntArray:
    records = np.zeros((n, COLUMNS), np.int32)
    records[:, [SEQUENCE, NEXT]] = NOBODY, NOTHING_MORE
    return records


def _schedule(
    pieces: list[_Piece], lengths: npt.NDArray[np.int64], tiles: int, workers: int
) -> TileSchedule:
    """The records: each team's first piece in its members' rows, the rest behind all workers'."""
    sequence, first, pairs, team = np.array(pieces, np.int64).T
    parts = np.bincount(sequence)
    split = parts > 1
    # A team's cut pieces come first: their partial results are written while others multiply.
    order = np.lexsort((~split[sequence], team))
    sequence, first, pairs, team = sequence[order], first[order], pairs[order], team[order]
    leads = np.diff(team, prepend=-1) > 0
    later = np.cumsum(~leads) - 1
    rows = np.where(leads, team * tiles, workers + later * tiles)
    follows = np.append(rows[1:], NOTHING_MORE)
    follows[:-1][leads[1:]] = NOTHING_MORE
    part = _places(sequence, first)
    # All tiles' partials of a sequence are neighbours.
    partials = np.cumsum(parts * split) - parts * split  # of the sequences before
    counters = np.cumsum(split, dtype=np.int64) - split

    records = _empty_records(workers + int((~leads).sum()) * tiles)
    tile = np.arange(tiles)
    whole = ~split[sequence][:, None]
    of = parts[sequence]
    partial = (partials[sequence] * tiles)[:, None] + tile * of[:, None] + part[:, None]
    counter = counters[sequence][:, None] * tiles + tile
    values = {
        SEQUENCE: sequence[:, None],
        GROUP: tile[None, :],
        FIRST: first[:, None] * PAIR_TOKENS,
        END: np.minimum((first + pairs) * PAIR_TOKENS, lengths[sequence])[:, None],
        PARTIAL: np.where(whole, WHOLE, partial),
        COUNTER: np.where(whole, WHOLE, counter),
        PARTS: of[:, None],
        PART: part[:, None],
        LENGTH: lengths[sequence][:, None],
        NEXT: np.where(follows[:, None] < 0, NOTHING_MORE, follows[:, None] + tile),
    }
    row = rows[:, None] + tile
    for column, value in values.items():
        records[row, column] = np.broadcast_to(value, (len(row), tiles))
    n_partials, n_counters = int((parts * split).sum()), int(split.sum())
    return TileSchedule(records, lengths, n_partials * tiles, n_counters * tiles)


def _places(sequence: npt.NDArray[np.int64], first: npt.NDArray[np.int64]) -> IntArray:
    """Which of its sequence's pieces each is, in the order of its tokens."""
    order = np.lexsort((first, sequence))
    ordered = sequence[order]
    places = np.empty(len(order), np.int32)
    places[order] = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return places
