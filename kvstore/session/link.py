"""What a session over mapped memory stands on: the memory, the calls, and how bytes get in."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.block import cell_checksums, header_bytes
from kvstore.errors import DeadlineExceeded, InvalidArgument, LayoutMismatch
from kvstore.index.reader import IndexReader
from kvstore.layout import Layout
from kvstore.session.base import Bytes1D


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """A store's memory as this process sees it.

    pool: uint8, writable for those who write slots. generations: uint64, one a granule.
    instance: the store's; another one's namespace ids mean nothing here.
    """

    pool: Bytes1D
    generations: npt.NDArray[np.uint64]
    index: IndexReader
    instance: int

    def payload(self, layout: Layout, granule: int) -> Bytes1D:
        """The bytes of the block in the slot at `granule`."""
        start = granule * limits.GRANULE_BYTES + header_bytes(layout.n_cells)
        return self.pool[start : start + layout.block_bytes]

    def header(self, layout: Layout, granule: int) -> Bytes1D:
        """The header in front of it."""
        start = granule * limits.GRANULE_BYTES
        return self.pool[start : start + header_bytes(layout.n_cells)]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The cells of a layout that one put or get moves, and where they lie.

    cells: uint32, ascending; empty for all. runs: neighbouring cells joined, (start, end) bytes.
    bounds: int64 (k + 1,), where each cell begins in the part's own bytes.
    """

    cells: c.U32
    runs: tuple[tuple[int, int], ...]
    bounds: npt.NDArray[np.int64]

    @property
    def nbytes(self) -> int:
        """Bytes of the part."""
        return int(self.bounds[-1])

    def copy_out(self, payload: Bytes1D, target: Bytes1D) -> None:
        """From a block to the part's bytes."""
        at = 0
        for start, end in self.runs:
            target[at : at + end - start] = payload[start:end]
            at += end - start

    def copy_in(self, source: Bytes1D, payload: Bytes1D) -> c.U64:
        """From the part's bytes to a block; returns the checksums of what arrived, (k,)."""
        sums: list[c.U64] = []
        at = 0
        for start, end in self.runs:
            payload[start:end] = source[at : at + end - start]
            at += end - start
            inside = self.bounds[(self.bounds >= at - (end - start)) & (self.bounds <= at)]
            sums.append(cell_checksums(payload[start:end], inside - inside[0]))
        return np.concatenate(sums)


def part_of(layout: Layout, cells: c.U32) -> Part:
    """The part of `layout` that `cells` (uint32, ascending, none for all) name."""
    bounds = layout.cell_bounds
    if not len(cells):
        return Part(cells, ((0, layout.block_bytes),), bounds)
    chosen = cells.tolist()
    runs: list[tuple[int, int]] = []
    for cell in chosen:
        start, end = int(bounds[cell]), int(bounds[cell + 1])
        if runs and runs[-1][1] == start:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((start, end))
    sizes = np.diff(bounds)[cells.astype(np.int64)]
    return Part(cells, tuple(runs), np.concatenate(([0], np.cumsum(sizes))).astype(np.int64))


def checked_part(
    name: str,
    layout: Layout,
    chain: c.U8,
    buffers: Sequence[Bytes1D],
    cells: Iterable[int],
    *,
    writable: bool = False,
) -> Part:
    """The part of `layout` that `cells` name, which fits `buffers`, one for each of the chain.

    name: the argument's, for the error: `InvalidArgument`, or `LayoutMismatch` where it is the
    layout that does not fit. writable: whether the buffers must take bytes.
    """
    if not len(chain):
        raise InvalidArgument("hashes", "at least one key, please")
    if len(buffers) != len(chain):
        raise InvalidArgument(name, f"{len(buffers)} buffers for {len(chain)} keys")
    wanted = sorted(cells)
    distinct = len(set(wanted)) == len(wanted)
    if wanted and not (distinct and wanted[0] >= 0 and wanted[-1] < layout.n_cells):
        raise LayoutMismatch("cells", f"expected distinct cells below {layout.n_cells}")
    part = part_of(layout, np.array(wanted, np.uint32))
    for i, buffer in enumerate(buffers):
        if buffer.dtype != np.uint8 or buffer.ndim != 1 or buffer.size != part.nbytes:
            raise LayoutMismatch(f"{name}[{i}]", f"expected {part.nbytes} uint8, 1-D")
        if not buffer.flags.c_contiguous or (writable and not buffer.flags.writeable):
            raise InvalidArgument(f"{name}[{i}]", "must be contiguous, and writable in a get")
    return part


@dataclass(frozen=True, slots=True, eq=False)
class Granted:
    """Blocks whose slots were granted to this connection, to be filled and sealed."""

    namespace: int
    layout: Layout
    put_id: bytes
    hashes: c.U8
    granules: c.U32
    part: Part


class Link(Protocol):
    """One connection to one store: calls, memory, and a way for bytes into granted slots."""

    def call(self, command: c.Command, timeout_s: float) -> c.Result:
        """One command; a `KVStoreError` (never a `Failed`) where the store refused."""

    def memory(self, timeout_s: float) -> Memory:
        """The memory now, with an index in use; `Unavailable` once the store is gone."""

    def fill(self, granted: Granted, sources: Sequence[Bytes1D], timeout_s: float) -> c.U8:
        """Moves the sources into the slots and seals them; `SealStatus` of each (uint8)."""

    def close(self) -> None:
        """Ends the connection and unmaps; safe to call twice."""


def fill_directly(
    link: Link, memory: Memory, granted: Granted, sources: Sequence[Bytes1D], timeout_s: float
) -> c.U8:
    """`Link.fill` for a writer that may write the pool itself."""
    end = time.monotonic() + timeout_s
    sums: list[c.U64] = []
    for source, granule in zip(sources, granted.granules.tolist(), strict=True):
        if time.monotonic() > end:
            raise DeadlineExceeded(f"{len(sums)} of {len(sources)} blocks were copied in time")
        sums.append(granted.part.copy_in(source, memory.payload(granted.layout, granule)))
    seal = c.Seal(
        namespace=granted.namespace,
        put_id=granted.put_id,
        hashes=granted.hashes,
        checksums=np.stack(sums),
    )
    sealed = link.call(seal, max(0.0, end - time.monotonic()))
    assert isinstance(sealed, c.Sealed)
    return sealed.status
