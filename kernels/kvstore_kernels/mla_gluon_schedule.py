"""Which tokens of which sequences each multiprocessor attends to, where arithmetic is the limit.

With 64 query rows or more a latent KV byte serves so many of them that the matrix units are the
limit, so what has to be even is arithmetic: pairs of 64-token blocks. All sequences are laid on one
line, and the line is cut into as many equal stretches as there are teams (stream-K, Osama et al.,
"Stream-K: work-centric parallel decomposition for dense matrix-matrix multiplication", 2023). A
team is one block of threads for each tile of 64 query rows: its members read the same tokens at the
same time, so that all but one of them find these in the L2.

A team's stretch begins or ends inside at most two sequences. So partial results are few, at most
two a worker whatever the batch, and memory for them is fixed. Where the sequences themselves fill
the teams nearly evenly, none is cut.

Everything here is numpy on the host, once per step, for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    cut = min((_cut(pairs, teams) for teams in _team_counts(len(pairs), tiles, workers)), key=_cost)
    return _schedule(cut, counts, tiles, workers)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Pieces of sequences in the order of the line: sequence, first pair, pairs, number within the
    sequence, how many its sequence has, and the team."""

    sequence: IntArray
    first: IntArray
    pairs: IntArray
    part: IntArray
    parts: IntArray
    team: IntArray


def _require(condition: bool, name: str, problem: str) -> None:
    # As checks.require, which would bring torch along.
    if not condition:
        raise KernelArgumentError(name, problem)


def _team_counts(sequences: int, tiles: int, workers: int) -> list[int]:
    """All teams; or as few as leave equally long sequences whole and have as many of them each."""
    teams = teams_of(workers, tiles)
    each = -(-sequences // teams)
    return [teams, -(-sequences // each)]


def _cut(pairs: npt.NDArray[np.int64], teams: int) -> _Cut:
    """The line, on which a sequence takes its pairs and ITEM_PAIRS before them, cut evenly."""
    ends = np.cumsum(pairs + ITEM_PAIRS)
    starts = ends - pairs - ITEM_PAIRS
    edges = ends[-1] * np.arange(teams) / teams
    within = np.searchsorted(starts, edges, side="right") - 1
    at = np.clip(np.rint(edges - starts[within] - ITEM_PAIRS), 0, pairs[within]).astype(np.int64)
    # As places among all pairs; an edge at a sequence's end is one at the next one's start.
    offsets = np.cumsum(pairs) - pairs
    edges_in_pairs = offsets[within] + at
    places = np.union1d(offsets, edges_in_pairs)
    places = places[places < pairs.sum()]
    sequence = np.searchsorted(offsets, places, side="right") - 1
    parts = np.bincount(sequence, minlength=len(pairs))
    return _Cut(
        sequence=sequence.astype(np.int32),
        first=(places - offsets[sequence]).astype(np.int32),
        pairs=np.diff(places, append=pairs.sum()).astype(np.int32),
        part=(np.arange(len(places)) - (np.cumsum(parts) - parts)[sequence]).astype(np.int32),
        parts=parts[sequence].astype(np.int32),
        team=(np.searchsorted(edges_in_pairs, places, side="right") - 1).astype(np.int32),
    )


def _cost(cut: _Cut) -> float:
    """When the last team ends, in pairs."""
    costs = cut.pairs + ITEM_PAIRS + SPLIT_PAIRS * (cut.parts > 1)
    return float(np.bincount(cut.team, weights=costs).max())


def _empty_records(n: int) -> IntArray:
    records = np.zeros((n, COLUMNS), np.int32)
    records[:, [SEQUENCE, NEXT]] = NOBODY, NOTHING_MORE
    return records


def _schedule(cut: _Cut, lengths: npt.NDArray[np.int64], tiles: int, workers: int) -> TileSchedule:
    """The records: each team's first piece in its members' rows, the rest behind all workers'."""
    n = len(cut.sequence)
    leads = np.diff(cut.team, prepend=-1) > 0
    later = np.cumsum(~leads) - 1
    rows = np.where(leads, cut.team * tiles, workers + later * tiles)
    follows = np.append(rows[1:], NOTHING_MORE)
    follows[:-1][leads[1:]] = NOTHING_MORE
    split = cut.parts > 1
    # Pieces of cut sequences in their order; all tiles' partials of a sequence are neighbours.
    before = np.cumsum(split) - split - cut.part * split
    first_of = split & (cut.part == 0)
    counters = np.cumsum(first_of) - 1

    records = _empty_records(workers + int((~leads).sum()) * tiles)
    tile = np.arange(tiles)
    row = rows[:, None] + tile
    partial = before[:, None] * tiles + tile * cut.parts[:, None] + cut.part[:, None]
    whole = ~split[:, None]
    values = {
        SEQUENCE: cut.sequence[:, None],
        GROUP: tile[None, :],
        FIRST: cut.first[:, None] * PAIR_TOKENS,
        END: np.minimum((cut.first + cut.pairs) * PAIR_TOKENS, lengths[cut.sequence])[:, None],
        PARTIAL: np.where(whole, WHOLE, partial),
        COUNTER: np.where(whole, WHOLE, counters[:, None] * tiles + tile),
        PARTS: cut.parts[:, None],
        PART: cut.part[:, None],
        LENGTH: lengths[cut.sequence][:, None],
        NEXT: np.where(follows[:, None] < 0, NOTHING_MORE, follows[:, None] + tile),
    }
    for column, value in values.items():
        records[row, column] = np.broadcast_to(value, (n, tiles))
    return TileSchedule(records, lengths, int(split.sum()) * tiles, int(first_of.sum()) * tiles)
