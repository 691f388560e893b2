"""Blocks between an engine's pages and host memory, at the rate of the link between them.

A page is too small for a copy of its own: each costs the driver microseconds, so that scattered
pages of 32 KiB move at a fifth of the link's rate. Instead a kernel collates some blocks into a
buffer on the GPU, and one large copy takes the buffer across; or the other way round. Three buffers
of 16 MiB take turns: one is filled while another is drained, and the link is never idle. Its own
engine does the copying, so that a decode that runs meanwhile loses only some memory traffic.

The floor is bytes / the rate of a pinned copy. A kernel is some fifty times faster than the link,
so what can be lost is the filling of the first buffer, and the time in which the engine begins a
copy. The host needs about a tenth of a millisecond for each turn, so that buffers of 4 MiB were
given too slowly for a link of 54 GB/s (34 GB/s); of 16 MiB they are ahead of it.

Pages that are rows as they are, as those of our own engines, need no collation: they are copied in
place, many by one call.

What happens when is decided by `Ring` and `pass_through`. They know of streams only what streams
promise (`Lane`, `Mark`), and are tested without a GPU. Where the GPU has host memory as its own
(Grace), or when asked to, one kernel moves everything, without buffers and copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from kvstore_kernels.checks import require
from kvstore_kernels.collate import Collator
from kvstore_kernels.collate_plan import rows_are_pages
from kvstore_kernels.cuda_runtime import Numbers, cuda_runtime, host_is_coherent

BUFFERS = 3
BUFFER_BYTES = 16 << 20
# A coherent link (NVLink-C2C) is about eight times as fast as PCIe, for which two programs do.
COHERENT_PROGRAMS = 16
_ALIGNED = 16  # bytes, of rows in a buffer


class Mark(Protocol):
    """A moment in a lane's work; a torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether the moment is past."""

    def synchronize(self) -> None:
        """Returns when it is."""


class Lane(Protocol):
    """Work that is done in the order in which it is given; a torch.cuda.Stream is one."""

    def wait_event(self, event: Any) -> None:
        """What is given from now on begins after that mark, of any lane."""

    def record_event(self) -> Any:
        """The mark behind all that was given so far."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One use of a buffer: blocks [first, end) of a transfer pass through it."""

    buffer: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Passed:
    """When all blocks before `end` have been read where they were, and are where they go."""

    end: int
    read: Mark
    arrived: Mark


class Ring:
    """Whose turn it is among some buffers, and from when on each may be filled again.

    Transfers follow each other through it; one begins while the last is still under way.
    """

    def __init__(self, buffers: int) -> None:
        """buffers: at least 1; with 1 nothing overlaps."""
        self._free: list[Mark | None] = [None] * buffers
        self._next = 0

    def turns(self, blocks: int, blocks_per_buffer: int) -> Iterable[Turn]:
        """The turns of the next transfer: at a time, as many blocks as fit."""
        for first in range(0, blocks, blocks_per_buffer):
            buffer, self._next = self._next, (self._next + 1) % len(self._free)
            yield Turn(buffer, first, min(first + blocks_per_buffer, blocks))

    def free(self, buffer: int) -> Mark | None:
        """The moment from which on it may be filled; None for now."""
        return self._free[buffer]

    def free_from(self, buffer: int, mark: Mark) -> None:
        """Says when what is now put into it will have been taken out."""
        self._free[buffer] = mark


def pass_through(
    ring: Ring,
    turns: Iterable[Turn],
    *,
    filling: Lane,
    draining: Lane,
    fill: Callable[[Turn], None],
    drain: Callable[[Turn], None],
) -> list[Passed]:
    """Gives two lanes the work of all turns, and waits for none of it.

    fill gives the filling lane what puts a turn's blocks into its buffer, drain gives the draining
    lane what takes them out. Raises what they raise; even then no later transfer fills a buffer
    before it is free.
    """
    passed = []
    for turn in turns:
        free = ring.free(turn.buffer)
        if free is not None:
            filling.wait_event(free)
        fill(turn)
        filled = filling.record_event()
        draining.wait_event(filled)
        try:
            drain(turn)
        finally:
            drained = draining.record_event()
            ring.free_from(turn.buffer, drained)
        passed.append(Passed(turn.end, filled, drained))
    return passed


def copies_of(there: Numbers, here: Numbers, nbytes: int) -> tuple[Numbers, Numbers, Numbers]:
    """The copies that move rows: their addresses on either side, and their sizes, (n,) each.

    there, here: (rows,) int64 addresses, at least one. Rows of `nbytes` that follow each other
    closely on both sides are one copy.
    """
    dense = (np.diff(there) == nbytes) & (np.diff(here) == nbytes)
    firsts = np.concatenate([[0], np.flatnonzero(~dense) + 1])
    counts = np.diff(np.append(firsts, len(there)))
    return there[firsts], here[firsts], counts * nbytes


class Transfer:
    """Blocks under way, in their order. It holds on to the memory that they need."""

    def __init__(self, passed: Sequence[Passed], keeps: object) -> None:
        self._passed, self._keeps = passed, keeps
        self._through = 0  # turns that are known to be

    @property
    def blocks(self) -> int:
        """How many they are."""
        return self._passed[-1].end if self._passed else 0

    def arrived(self) -> int:
        """How many leading blocks are safe to read where they go, without waiting."""
        while self._through < len(self._passed) and self._passed[self._through].arrived.query():
            self._through += 1
        return self._passed[self._through - 1].end if self._through else 0

    def wait(self, blocks: int | None = None) -> None:
        """Returns when so many leading blocks (None: all) are safe to read where they go."""
        wanted = self.blocks if blocks is None else blocks
        enough = (passed for passed in self._passed if passed.end >= wanted)
        passed = next(enough, None) if wanted else None
        if passed is not None:
            passed.arrived.synchronize()

    def wait_source(self) -> None:
        """Returns when all blocks have been read, so that their source may be written again."""
        if self._passed:
            self._passed[-1].read.synchronize()

    def follow(self, lane: Lane) -> None:
        """What the lane is given from now on begins when all blocks are where they go."""
        if self._passed:
            lane.wait_event(self._passed[-1].arrived)

    def follow_source(self, lane: Lane) -> None:
        """What the lane is given from now on begins when all blocks have been read."""
        if self._passed:
            lane.wait_event(self._passed[-1].read)


class Transfers:
    """Moves blocks between the pages of a collator and host memory, both ways at once.

    Host memory is pinned: torch's, or registered (`Registration`). Calls return when the work is
    given, and are made by one thread. A transfer begins after what the current stream has been
    given before; what the stream is given later does not wait for it (`Transfer.follow` does that).

    buffers, buffer_bytes: memory on the GPU for each direction; a buffer has room for at least one
    block. direct: whether a kernel goes across the link itself, without buffers; None for where
    that is best, which is on a coherent link. programs: how many of the kernel's work at a time
    then; None for as many as the link needs.

    Raises KernelArgumentError, and TransferError where there is no CUDA runtime.
    """

    def __init__(
        self,
        collator: Collator,
        *,
        buffers: int = BUFFERS,
        buffer_bytes: int = BUFFER_BYTES,
        direct: bool | None = None,
        programs: int | None = None,
    ) -> None:
        device = collator.table.device
        require(device.type == "cuda", "collator", "must have pages on a GPU")
        require(buffers >= 1, "buffers", "must be at least 1")
        coherent = host_is_coherent(device)
        self._collator, self._device = collator, device
        self._direct = coherent if direct is None else direct
        self._programs = programs or (COHERENT_PROGRAMS if coherent else None)
        self._runtime = cuda_runtime()
        nbytes = collator.form.nbytes
        self._rows_are_pages = rows_are_pages(collator.table, collator.pairing)
        self._out, self._in = (_Way(device, nbytes, buffers, buffer_bytes) for _ in range(2))
        self._under_way: list[Transfer] = []  # held, whether or not the caller holds them

    def to_host(
        self, runs: torch.Tensor, host: torch.Tensor, offsets: torch.Tensor | None = None
    ) -> Transfer:
        """Begins to copy blocks from their pages to rows.

        runs: as for `Collator.collate`. host: uint8, pinned. Without offsets (blocks, at least the
        row's bytes), rows at any distance; with offsets, (blocks,) int64 on the CPU, (n,): row i
        begins at byte offsets[i], a multiple of 16.

        Raises KernelArgumentError before anything is begun, and CudaCallFailedError.
        """
        return self._move(self._out, runs, host, offsets, out=True)

    def to_pages(
        self, runs: torch.Tensor, host: torch.Tensor, offsets: torch.Tensor | None = None
    ) -> Transfer:
        """Begins to copy blocks from rows to their pages; arguments and errors as for `to_host`."""
        return self._move(self._in, runs, host, offsets, out=False)

    def _move(
        self,
        way: _Way,
        runs: torch.Tensor,
        host: torch.Tensor,
        offsets: torch.Tensor | None,
        *,
        out: bool,
    ) -> Transfer:
        on_cpu = host.device.type == "cpu" and (offsets is None or offsets.device.type == "cpu")
        require(on_cpu, "host", "and its offsets must be on the CPU")
        self._collator.check(runs, host, offsets)
        if not len(runs):
            return Transfer([], None)
        with torch.cuda.device(self._device):
            begun = torch.cuda.current_stream().record_event()
            if self._rows_are_pages and runs.device.type == "cpu" and not self._direct:
                way.copies.wait_event(begun)
                passed = self._as_they_are(way, runs, _starts(len(runs), host, offsets), out=out)
                return self._keep(Transfer(passed, host))
            way.kernels.wait_event(begun)
            with torch.cuda.stream(way.kernels):
                runs = runs.pin_memory() if runs.device.type == "cpu" else runs
                runs = runs.to(self._device, non_blocking=True)
                runs.record_stream(way.kernels)
                if self._direct:
                    passed = self._across(way, runs, host, offsets, out=out)
                else:
                    passed = self._staged(way, runs, _starts(len(runs), host, offsets), out=out)
        return self._keep(Transfer(passed, (runs, host)))

    def _keep(self, transfer: Transfer) -> Transfer:
        self._under_way = [t for t in self._under_way if t.arrived() < t.blocks] + [transfer]
        return transfer

    def _as_they_are(
        self, way: _Way, runs: torch.Tensor, starts: Numbers, *, out: bool
    ) -> list[Passed]:
        """By copies alone, of pages that are rows."""
        pages = self._collator.table.form
        stride = pages.page_stride * pages.dtype.itemsize
        origin = self._collator.table.views[0][0].data_ptr()
        here = origin + runs[:, 0].numpy().astype(np.int64) * stride
        passed = []
        for first in range(0, len(runs), way.blocks_per_buffer):
            end = min(first + way.blocks_per_buffer, len(runs))
            self._copy(way, starts[first:end], here[first:end], out=out)
            done = way.copies.record_event()
            passed.append(Passed(end, done, done))
        return passed

    def _across(
        self,
        way: _Way,
        runs: torch.Tensor,
        host: torch.Tensor,
        offsets: torch.Tensor | None,
        *,
        out: bool,
    ) -> list[Passed]:
        """All blocks by one kernel."""
        self._collator.launch(runs, host, offsets, out=out, programs=self._programs)
        done = way.kernels.record_event()
        return [Passed(len(runs), done, done)]

    def _staged(self, way: _Way, runs: torch.Tensor, starts: Numbers, *, out: bool) -> list[Passed]:
        """By way of buffers; the current stream is the kernels'."""

        def collate(turn: Turn) -> None:
            self._collator.launch(runs[turn.first : turn.end], way.rows(turn), out=out)

        def copy(turn: Turn) -> None:
            here = way.rows(turn).data_ptr() + np.arange(turn.end - turn.first) * way.stride
            self._copy(way, starts[turn.first : turn.end], here, out=out)

        return pass_through(
            way.ring,
            way.ring.turns(len(runs), way.blocks_per_buffer),
            filling=way.kernels if out else way.copies,
            draining=way.copies if out else way.kernels,
            fill=collate if out else copy,
            drain=copy if out else collate,
        )

    def _copy(self, way: _Way, there: Numbers, here: Numbers, *, out: bool) -> None:
        """Copies rows between the host (there) and the GPU (here)."""
        there, here, sizes = copies_of(there, here, self._collator.form.nbytes)
        targets, sources = (there, here) if out else (here, there)
        self._runtime.copy(targets, sources, sizes, way.copies.cuda_stream)


class _Way:
    """Streams and buffers of one direction."""

    def __init__(self, device: torch.device, nbytes: int, buffers: int, buffer_bytes: int) -> None:
        self.stride = -(-nbytes // _ALIGNED) * _ALIGNED
        self.blocks_per_buffer = max(1, buffer_bytes // self.stride)
        self.ring = Ring(buffers)
        # Before others, since its kernels take microseconds and the link waits for them.
        self.kernels = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self.copies = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        shape = (buffers, self.blocks_per_buffer, self.stride)
        with torch.cuda.stream(self.kernels):
            self._memory = torch.empty(shape, dtype=torch.uint8, device=device)
        self._memory.record_stream(self.copies)

    def rows(self, turn: Turn) -> torch.Tensor:
        """The part of its buffer that a turn uses, (blocks, stride) uint8."""
        return self._memory[turn.buffer, : turn.end - turn.first]


def _starts(blocks: int, host: torch.Tensor, offsets: torch.Tensor | None) -> Numbers:
    """Where on the host each row begins, (blocks,) addresses."""
    if offsets is None:
        return host.data_ptr() + np.arange(blocks, dtype=np.int64) * host.stride(0)
    return host.data_ptr() + offsets.numpy()
