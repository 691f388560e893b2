"""The part of a block that one put or get moves."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.block import header_bytes
from kvstore.errors import LayoutMismatch
from kvstore.layout import Layout
from kvstore.session.base import Bytes1D
from kvstore.session.copies import pieces_of
from kvstore.streaming import copy_and_hash_rows, hash_rows

ALL_CELLS: c.U32 = np.empty(0, np.uint32)
# Where a run lies in a block's payload, where in the part's own bytes, and its length.
Run = tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Some cells of a layout, and where they lie.

    cells: uint32, ascending; empty for all. runs: the part in as few pieces as it lies in, none
    longer than `PIECE_BYTES`. cell_runs: one for each of its cells; cell_words: the same, uint64
    (k, 3). bounds: int64 (k + 1,), where each cell begins in the part's own bytes. payload_at:
    bytes from a slot's start to the payload. slot_granules: the size of a slot of such blocks.
    """

    cells: c.U32
    runs: tuple[Run, ...]
    cell_runs: tuple[Run, ...]
    cell_words: c.U64
    bounds: np.ndarray[tuple[int], np.dtype[np.int64]]
    nbytes: int
    payload_at: int
    slot_granules: int

    def copy_in(self, sources: c.U64, targets: c.U64) -> c.U64:
        """From the part's bytes at addresses (n,) to blocks' payloads at others.

        Returns the checksums of the cells as they were stored, (n, cells).
        """
        return _columns(
            copy_and_hash_rows(targets + np.uint64(at), sources + np.uint64(own), nbytes)
            for at, own, nbytes in self.cell_runs
        )

    def sums(self, payloads: c.U64) -> c.U64:
        """The checksums of its cells in the blocks' payloads at addresses (n,): (n, cells)."""
        return _columns(
            hash_rows(payloads + np.uint64(at), nbytes) for at, _own, nbytes in self.cell_runs
        )

    def own_sums(self, sources: c.U64) -> c.U64:
        """The same of the part's own bytes."""
        return _columns(
            hash_rows(sources + np.uint64(own), nbytes) for _at, own, nbytes in self.cell_runs
        )

    def take_out(self, sources: c.U64, targets: c.U64) -> c.U64:
        """Copies the part's own bytes from addresses (n,) to others.

        Returns the checksums of the cells as they were stored, (n, cells).
        """
        return _columns(
            copy_and_hash_rows(targets + np.uint64(own), sources + np.uint64(own), nbytes)
            for _at, own, nbytes in self.cell_runs
        )


def _columns(sums: Iterable[c.U64]) -> c.U64:
    return np.stack(list(sums), axis=1)


def part_of(layout: Layout, cells: c.U32 = ALL_CELLS) -> Part:
    """The part of `layout` that `cells` (uint32, ascending, none for all) name."""
    return _part_of(layout, cells.tobytes() if cells is not ALL_CELLS else b"")


@functools.lru_cache(maxsize=1024)
def _part_of(layout: Layout, packed: bytes) -> Part:
    cells = np.frombuffer(packed, np.uint32)
    chosen = cells.astype(np.int64) if len(cells) else np.arange(layout.n_cells)
    starts, ends = layout.cell_bounds[chosen], layout.cell_bounds[chosen + 1]
    bounds = np.concatenate(([0], np.cumsum(ends - starts))).astype(np.int64)
    cell_runs = tuple(
        zip(starts.tolist(), bounds[:-1].tolist(), (ends - starts).tolist(), strict=True)
    )
    return Part(
        cells=cells,
        runs=tuple(_pieces(_joined(cell_runs))),
        cell_runs=cell_runs,
        cell_words=np.array(cell_runs, np.uint64),
        bounds=bounds,
        nbytes=int(bounds[-1]),
        payload_at=payload_offset(layout),
        slot_granules=-(-(payload_offset(layout) + layout.block_bytes) // limits.GRANULE_BYTES),
    )


def _joined(runs: Iterable[Run]) -> list[Run]:
    """Neighbours as one."""
    joined: list[Run] = []
    for at, own, nbytes in runs:
        if joined and joined[-1][0] + joined[-1][2] == at:
            joined[-1] = (joined[-1][0], joined[-1][1], joined[-1][2] + nbytes)
        else:
            joined.append((at, own, nbytes))
    return joined


def _pieces(runs: Iterable[Run]) -> list[Run]:
    return [
        (at + first, own + first, size)
        for at, own, nbytes in runs
        for first, size in pieces_of(nbytes)
    ]


def checked_cells(layout: Layout, cells: Iterable[int]) -> c.U32:
    """The cells, ascending; `LayoutMismatch` for one twice or out of range."""
    wanted = sorted(cells)
    if not wanted:
        return ALL_CELLS
    if len(set(wanted)) != len(wanted) or wanted[0] < 0 or wanted[-1] >= layout.n_cells:
        raise LayoutMismatch("cells", f"expected distinct cells below {layout.n_cells}")
    return np.array(wanted, np.uint32)


@functools.lru_cache(maxsize=1024)
def payload_offset(layout: Layout) -> int:
    """Bytes from a slot's start to the payload."""
    return header_bytes(layout.n_cells)


def bytes_of(array: Bytes1D) -> memoryview:
    """A view of an array's bytes."""
    return memoryview(array)  # type: ignore[arg-type] # which it is, though numpy does not say so
