"""Which part of which sequence each block of threads attends to, in one list for the whole batch.

A decode kernel launches one block of threads per item and the GPU starts them in the list's order.
An item is a run of tokens of one sequence, for one group of query heads. Long sequences are cut
into parts so that all workers (block slots of the GPU) end together; the parts of one (sequence,
group) leave partial results and the last of them to arrive merges these.

The longest items come first, which makes the GPU's own dispatch the longest-processing-time rule
(Graham, "Bounds on multiprocessing timing anomalies", 1969): its makespan is at most the mean load
plus the size of the item that ends last, and that one is short. How finely to cut is chosen by
trying a few sizes of part against that rule. Where equal parts leave workers without work, parts of
any length may do better (`worklist_uneven`). Everything here is numpy on the host; a batch of 256
sequences and 8 heads takes a fraction of a millisecond, once per step, for all layers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.worklist_uneven import Pieces, uneven_pieces

Ints = npt.NDArray[np.int64]

# The columns of WorkList.items.
SEQUENCE, GROUP, FIRST, END, PARTIAL, COUNTER, PARTS, PART, LENGTH = range(9)
COLUMNS = 9
NOBODY = -1  # in SEQUENCE: padding, which a kernel skips
WHOLE = -1  # in PARTIAL and COUNTER: the item is all of its (sequence, group)

PARTIAL_SHARE = 4  # partial results are at most this fraction, 1/4, of the KV bytes
_EXTRA_WAVES = (0, 1, 2, 3, 5, 7)  # beyond those that whole sequences take
_GOOD_ENOUGH = 1.02  # times the mean load; finer parts would only cost more
_WORTH_IT = 1.03  # how much longer equal parts must take for uneven ones to be used


@dataclass(frozen=True, slots=True)
class WorkList:
    """What a launch has to do; made by `plan`.

    items: (n_items, 9) int32, the longest first:
        0 SEQUENCE   row of the page table
        1 GROUP      KV head, or tile of query heads
        2 FIRST      first token
        3 END        the token after the last; equal to FIRST for a sequence without tokens, whose
                     item exists so that its output is written: with zeros
        4 PARTIAL    where the item leaves its partial result; -1: it is the whole of its (sequence,
                     group) and writes the output itself
        5 COUNTER    the counter on which the parts of one (sequence, group) meet; -1 for a whole
        6 PARTS      how many parts the (sequence, group) has
        7 PART       which of them this is, ordered by tokens; PARTIAL - PART is the first's index
        8 LENGTH     tokens of the sequence
    n_partials: partial results in all; their indices are 0 to n_partials - 1, each used once.
    n_counters: counters in all, likewise.
    """

    items: npt.NDArray[np.int32]
    n_partials: int
    n_counters: int

    def __len__(self) -> int:
        return len(self.items)

    def lengths(self) -> npt.NDArray[np.int32]:
        """Tokens of each sequence, as planned."""
        sequence = self.items[:, SEQUENCE]
        ends = np.zeros(int(sequence.max(initial=-1)) + 1, np.int32)
        ends[sequence] = self.items[:, LENGTH]
        return ends

    def padded(self, n_items: int) -> npt.NDArray[np.int32]:
        """The items, then rows of -1 which kernels skip: what a captured graph, whose grid is
        fixed, launches. Raises KernelArgumentError when there are more items than that."""
        _require(n_items >= len(self), "n_items", f"must be at least the {len(self)} items")
        rows = np.full((n_items, COLUMNS), NOBODY, np.int32)
        rows[: len(self)] = self.items
        return rows


def most_items(sequences: int, groups: int, workers: int, extra_waves: int = 7) -> int:
    """Items, and so partials, that `plan` makes at most, whatever the lengths; sizes fixed buffers
    and fixed grids."""
    return sequences * groups + (1 + extra_waves) * workers


def plan(
    lengths: npt.ArrayLike,
    *,
    groups: int,
    workers: int,
    partial_bytes: int,
    token_bytes: int,
    block_tokens: int = 16,
    min_tokens: int = 64,
    item_tokens: int = 64,
    cut_tokens: int | None = None,
    extra_waves: int = 7,
    starts: npt.ArrayLike | None = None,
) -> WorkList:
    """Cuts sequences into items so that `workers` are evenly loaded.

    lengths: tokens of each sequence, (sequences,) integers >= 0.
    groups: groups of query heads which attend to a sequence apart from each other.
    workers: items that run at once: the GPU's multiprocessors times the blocks each can hold.
    partial_bytes: of one partial result. token_bytes: KV bytes of a token that one item reads.
        Partial results stay under a quarter of the bytes read.
    block_tokens: parts begin at multiples of it.
    min_tokens: no part but a sequence's only or last one has fewer (rounded up to blocks).
    item_tokens: what an item costs beside its tokens, in tokens; more makes fewer parts.
    cut_tokens: what a part of several costs beside that: its partial result and the merging. Given,
        parts of a sequence may have different lengths. Default: all have the same.
    extra_waves: how many times the workers there may be items beyond those that whole sequences
        need; fewer where a grid must be small that is fixed for all lengths.
    starts: the first token to attend to of each sequence, for sliding windows; rounded down to
        blocks. Default 0.

    Raises KernelArgumentError for negative lengths, starts outside of [0, length], and
    sizes under 1.
    """
    _check_sizes(
        groups=groups,
        workers=workers,
        partial_bytes=partial_bytes,
        token_bytes=token_bytes,
        block_tokens=block_tokens,
        min_tokens=min_tokens,
    )
    firsts, ends = _ranges(lengths, starts, block_tokens)
    if not len(ends):
        return WorkList(np.empty((0, COLUMNS), np.int32), 0, 0)
    # What a part must have at least so that its partial result is a small expense.
    worthwhile = -(-PARTIAL_SHARE * partial_bytes // token_bytes)
    batch = _Batch(
        firsts=firsts,
        ends=ends,
        blocks=-(-(ends - firsts) // block_tokens),
        least=-(-max(min_tokens, worthwhile) // block_tokens),
        groups=groups,
        workers=workers,
        extra_waves=extra_waves,
        block_tokens=block_tokens,
        overhead=item_tokens / block_tokens,
    )
    parts, makespan = _choose_parts(batch)
    uneven = None
    if cut_tokens is not None:
        uneven = _uneven(batch, parts, makespan, cut_tokens / block_tokens)
    return _build(batch, uneven or _equal_pieces(batch, parts))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """What is to be cut. firsts, ends: in tokens; blocks, least, overhead: in blocks, of each
    sequence, of a part at least, and of what an item costs beside its tokens."""

    firsts: Ints
    ends: Ints
    blocks: Ints
    least: int
    groups: int
    workers: int
    extra_waves: int
    block_tokens: int
    overhead: float

    @property
    def mean_load(self) -> float:
        """Blocks of each worker."""
        return self.groups * int(self.blocks.sum()) / self.workers


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        _require(size >= 1, name, f"must be at least 1, not {size}")


def _require(condition: bool, name: str, problem: str) -> None:
    # As checks.require, which would bring torch along.
    if not condition:
        raise KernelArgumentError(name, problem)


def _ranges(
    lengths: npt.ArrayLike, starts: npt.ArrayLike | None, block_tokens: int
) -> tuple[Ints, Ints]:
    """(firsts, ends), checked; firsts are multiples of block_tokens where there are tokens."""
    ends = np.asarray(lengths, dtype=np.int64)
    _require(ends.ndim == 1, "lengths", f"must have one dimension, not {ends.ndim}")
    firsts = np.zeros_like(ends) if starts is None else np.asarray(starts, dtype=np.int64)
    _require(firsts.shape == ends.shape, "starts", f"must have shape {ends.shape}")
    _require(bool((ends >= 0).all()), "lengths", "must not be negative")
    _require(bool((ends < 2**31 - block_tokens).all()), "lengths", "must fit in 32 bits")
    _require(bool(((firsts >= 0) & (firsts <= ends)).all()), "starts", "must be in [0, length]")
    firsts = np.where(firsts == ends, ends, firsts // block_tokens * block_tokens)
    return firsts, ends


def _choose_parts(batch: _Batch) -> tuple[Ints, float]:
    """Parts of each sequence, and when the workers end: the candidate under which they end first;
    of equals, the one with the fewest parts."""
    best, shortest = np.ones_like(batch.blocks), np.inf
    for parts in _candidates(batch):
        makespan = _makespan(batch, parts)
        if makespan < shortest:
            best, shortest = parts, makespan
        if shortest <= _GOOD_ENOUGH * (batch.mean_load + batch.overhead):
            break
    return best, shortest


def _uneven(batch: _Batch, parts: Ints, makespan: float, cut: float) -> Pieces | None:
    """Pieces of any length with which the workers end earlier than with equal parts, if these leave
    workers without work and it is worth it. cut: what a part costs more than a whole, in blocks."""
    if makespan <= _GOOD_ENOUGH * (batch.mean_load + batch.overhead):
        return None
    return uneven_pieces(
        batch.blocks,
        groups=batch.groups,
        workers=batch.workers,
        overhead=batch.overhead,
        cut=cut,
        least=batch.least,
        before=_makespan(batch, parts, cut) / _WORTH_IT,
    )


def _candidates(batch: _Batch) -> Iterator[Ints]:
    """For some numbers of waves of workers, the smallest parts whose items fill no more waves."""
    most = np.maximum(batch.blocks // batch.least, 1)
    sizes = _part_sizes(int(batch.blocks.max()), int(most.max()))
    parts = np.clip(-(-batch.blocks // sizes[:, None]), 1, most)
    items = batch.groups * parts.sum(axis=1)  # ascending, since the sizes descend
    waves = -(-batch.groups * len(most) // batch.workers)
    tried = -1
    for extra in (0, *(waves for waves in _EXTRA_WAVES[1:] if waves <= batch.extra_waves)):
        fits = np.searchsorted(items, (waves + extra) * batch.workers, side="right")
        if fits - 1 > tried:
            tried = int(fits) - 1
            candidate: Ints = parts[tried]
            yield candidate
    # Short sequences may be best cut into as many parts as long ones.
    even = np.minimum(most, -(-batch.workers // (batch.groups * len(most))))
    if batch.groups * even.sum() <= (waves + batch.extra_waves) * batch.workers:
        yield even


def _part_sizes(longest: int, most: int) -> Ints:
    """Blocks per part that are tried: those which cut the longest sequence evenly into 1, 2, 3
    ... parts; beyond 64 parts in steps of a twentieth."""
    steps = max(0, math.ceil(math.log(most / 64, 1.05)))
    coarse = (64 * 1.05 ** np.arange(1, steps + 1)).astype(np.int64)
    counts = np.concatenate([np.arange(1, min(most, 64) + 1), np.minimum(coarse, most)])
    sizes: Ints = np.maximum(-(-longest // counts), 1)
    return sizes


def _makespan(batch: _Batch, parts: Ints, cut: float = 0.0) -> float:
    """When the last worker ends, in blocks, if each wave's longest item goes to the worker that is
    least loaded: the longest-processing-time rule, a wave at a time. cut: what a part costs more
    than a whole."""
    each = -(-batch.blocks // parts) + batch.overhead + cut * (parts > 1)
    largest = np.repeat(each, parts)
    sizes = np.repeat(np.sort(largest)[::-1], batch.groups)
    loads = np.zeros(batch.workers)
    for at in range(0, len(sizes), batch.workers):
        wave = sizes[at : at + batch.workers]
        loads.sort()
        loads[: len(wave)] += wave
    return float(loads.max())


def _equal_pieces(batch: _Batch, parts: Ints) -> Pieces:
    """Each sequence in as many parts, the same for all groups."""
    sequence = np.repeat(np.arange(len(parts)), parts)
    part = np.arange(len(sequence)) - (np.cumsum(parts) - parts)[sequence]
    of, blocks = parts[sequence], batch.blocks[sequence]
    every = batch.groups
    return Pieces(
        sequence=np.repeat(sequence, every),
        group=np.tile(np.arange(every), len(sequence)),
        first=np.repeat(part * blocks // of, every),
        end=np.repeat((part + 1) * blocks // of, every),
        part=np.repeat(part, every),
        parts=np.repeat(of, every),
    )


def _build(batch: _Batch, pieces: Pieces) -> WorkList:
    """The list of those. Among parts of one length those of neighbouring groups are neighbours,
    which read neighbouring memory."""
    origin, ends = batch.firsts[pieces.sequence], batch.ends[pieces.sequence]
    first = origin + pieces.first * batch.block_tokens
    end = np.minimum(origin + pieces.end * batch.block_tokens, ends)
    unit = pieces.sequence * batch.groups + pieces.group
    parts = np.ones(len(batch.blocks) * batch.groups, np.int64)
    parts[unit] = pieces.parts
    split = parts > 1
    partials: Ints = np.cumsum(parts * split) - parts * split  # of the units before
    counters: Ints = np.cumsum(split) - split
    cut = split[unit]

    items = np.empty((len(unit), COLUMNS), np.int32)
    items[:, SEQUENCE] = pieces.sequence
    items[:, GROUP] = pieces.group
    items[:, FIRST] = first
    items[:, END] = end
    items[:, PARTIAL] = np.where(cut, partials[unit] + pieces.part, WHOLE)
    items[:, COUNTER] = np.where(cut, counters[unit], WHOLE)
    items[:, PARTS] = pieces.parts
    items[:, PART] = pieces.part
    items[:, LENGTH] = ends
    order = np.argsort(first - end, kind="stable")
    return WorkList(items[order], int((parts * split).sum()), int(split.sum()))
