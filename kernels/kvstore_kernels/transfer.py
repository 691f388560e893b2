"""Blocks between an engine's pages and host memory, at the rate of the link between them.

A page is too small for a copy of its own: each costs the driver microseconds, so that scattered
pages of 32 KiB move at a fifth of the link's rate. Instead a kernel collates some blocks into a
buffer on the GPU, and one large copy takes the buffer across; or the other way round. Two buffers
take turns: one is filled while another is drained, and the link is never idle. Its own engine does
the copying, so that a decode that runs meanwhile loses only some memory traffic.

The floor is bytes / the rate of a pinned copy. A kernel is some fifty times faster than the link,
and between two copies 1.7 us are lost, 0.1 % of a copy of 64 MiB. What else is lost is the time
until the first copy begins, and that is the host's: what 256 MiB brought across the link have put
out of its caches takes five times as long as in a loop. So as little as can be comes before that
copy (`transfer_launch`), and the rest after it: numbers of runs are read across the link by the
first kernel and brought to the GPU for the others; that the runs exist is checked while the first
buffer is filled. The first turn to the host and the last one to the pages are small, since the link
waits for the kernel of the one, and the caller for that of the other.

Where a decode is to be spared, turns to rows that follow each other closely on the host are given
many at a time, in a CUDA graph (`transfer_graph`), with two buffers of 4 MiB: these stay in the L2,
so that a decode that runs meanwhile is slowed by 2 % rather than 4. To pages, kernels may pull rows
through such buffers instead of copies. Both are slower.

Pages that are rows as they are, as those of our own engines, need no collation: if they are large
enough they are copied in place, many by one call.

What happens when is decided in `transfer_ring`. Where the GPU has host memory as its own
(Grace), or when asked to, one kernel moves everything, without buffers and copies.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import torch
from triton.runtime import driver

from kvstore_kernels.checks import require
from kvstore_kernels.collate import Collator
from kvstore_kernels.collate_plan import rows_are_pages
from kvstore_kernels.cuda_runtime import Numbers, cuda_runtime, host_is_coherent
from kvstore_kernels.page_table import SCALE_BYTES
from kvstore_kernels.transfer_graph import GraphForm, PullForm, ToHostGraph, ToPagesGraph
from kvstore_kernels.transfer_launch import ROW_ALIGNMENT, BufferKernel
from kvstore_kernels.transfer_ring import (
    Passed,
    Ring,
    Transfer,
    Turn,
    copies_of,
    pass_through,
    turn_sizes,
)
from kvstore_kernels.transfer_rows import UNSIGNED, HostRows, PinnedAhead, RunNumbers

BUFFERS = 2
BUFFER_BYTES = 64 << 20
# Of the turn whose kernel is waited for; its copy takes longer than the host to give the next one.
SMALL_BYTES = 16 << 20
# Rows that cost less as copies of their own than by way of a buffer.
COPIED_IN_PLACE_FROM = 1 << 20
GRAPHS, PULLS = GraphForm(), PullForm()
# A coherent link (NVLink-C2C) is about eight times as fast as PCIe, for which two programs do.
COHERENT_PROGRAMS = 16


class Transfers:
    """Moves blocks between the pages of a collator and host memory, both ways at once.

    Host memory is pinned: torch's, or registered (`Registration`). Calls return when the work is
    given, and are made by one thread. A transfer begins after what the current stream has been
    given before; what the stream is given later does not wait for it (`Transfer.follow` does that).

    buffers, buffer_bytes: memory on the GPU for each direction, from its first use on; a buffer has
    room for at least one block. To spare a decode that runs meanwhile (`transfer_graph`), at a
    lower rate: graphs, of turns to the host that are given in one launch, with buffers of their
    own, once a transfer is as long and its rows lie densely there; pulls, of turns to the pages,
    once a transfer is as long and its rows begin at multiples of 16. None for neither. direct:
    whether a kernel goes across the link itself, without buffers; None for where that is best,
    which is on a coherent link. programs: how many of the kernel's work at a time then; None for as
    many as the link needs.

    Raises KernelArgumentError, and TransferError where there is no CUDA runtime.
    """

    def __init__(
        self,
        collator: Collator,
        *,
        buffers: int = BUFFERS,
        buffer_bytes: int = BUFFER_BYTES,
        graphs: GraphForm | None = None,
        pulls: PullForm | None = None,
        direct: bool | None = None,
        programs: int | None = None,
    ) -> None:
        table, form = collator.table, collator.form
        require(table.device.type == "cuda", "collator", "must have pages on a GPU")
        require(buffers >= 1, "buffers", "must be at least 1")
        coherent = host_is_coherent(table.device)
        self._collator, self._device = collator, table.device
        self._direct = coherent if direct is None else direct
        self._programs = programs or (COHERENT_PROGRAMS if coherent else None)
        self._graphs, self._pulls = graphs, pulls
        self._runtime = cuda_runtime()
        self._runs_per_block = table.form.runs_per_block(form.block_tokens)
        self._n_runs = table.form.pages * table.form.runs_per_page(form.block_tokens)
        rows_as_they_are = rows_are_pages(table, collator.pairing)
        self._in_place = rows_as_they_are and form.nbytes >= COPIED_IN_PLACE_FROM
        self._out, self._in = (
            _Way(collator, buffers, buffer_bytes, out=out) for out in (True, False)
        )
        self._begun: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._others = torch.cuda.device_count() > 1
        self._streams: dict[int, torch.cuda.Stream] = {}  # that callers had, by their handles
        self._under_way: list[Transfer] = []  # held, whether or not the caller holds them

    def to_host(
        self, runs: torch.Tensor, host: torch.Tensor, offsets: torch.Tensor | None = None
    ) -> Transfer:
        """Begins to copy blocks from their pages to rows.

        runs: as for `Collator.collate`. host: uint8, pinned. Without offsets (blocks, at least the
        row's bytes), rows at any distance; with offsets, (blocks,) int64 on the CPU, (n,): row i
        begins at byte offsets[i], a multiple of 16.

        Raises KernelArgumentError before anything is written, and CudaCallFailedError.
        """
        return self._move(self._out, runs, host, offsets)

    def to_pages(
        self, runs: torch.Tensor, host: torch.Tensor, offsets: torch.Tensor | None = None
    ) -> Transfer:
        """Begins to copy blocks from rows to their pages; arguments and errors as for `to_host`."""
        return self._move(self._in, runs, host, offsets)

    def _move(
        self, way: _Way, runs: torch.Tensor, host: torch.Tensor, offsets: torch.Tensor | None
    ) -> Transfer:
        plain = offsets is None and self._is_plain(runs, host)
        if not plain:
            on_cpu = host.is_cpu and (offsets is None or offsets.is_cpu)
            require(on_cpu, "host", "and its offsets must be on the CPU")
            self._collator.check(runs, host, offsets)
        if not runs.shape[0]:
            return Transfer([], None)
        numbers = RunNumbers(runs, way.ahead, known=not plain or not runs.is_cpu)
        rows = HostRows(host, offsets, self._collator.form.nbytes)
        if not self._others:
            return self._begin_to_move(way, numbers, rows)
        with torch.cuda.device(self._device):  # events and launches are the current device's
            return self._begin_to_move(way, numbers, rows)

    def _begin_to_move(self, way: _Way, numbers: RunNumbers, rows: HostRows) -> Transfer:
        in_place = self._in_place and numbers.runs.is_cpu and not self._direct
        if in_place and (way.out or self._pulls is None):
            passed = self._copy_in_place(way, numbers, rows)
        elif self._direct:
            passed = self._across(way, numbers, rows)
        else:
            passed = self._staged(way, numbers, rows)
        way.ahead.refill()
        transfer = Transfer(passed, (numbers, rows))
        self._under_way = [t for t in self._under_way if t.arrived() < t.blocks] + [transfer]
        return transfer

    def _is_plain(self, runs: torch.Tensor, host: torch.Tensor) -> bool:
        """Whether all but the runs' numbers is as `Collator.check` wants it, for sure.

        It says what is wrong, and does more than the usual case has the time for.
        """
        shape, form = host.shape, self._collator.form
        if len(shape) != 2 or getattr(runs, "shape", None) != (shape[0], self._runs_per_block):
            return False
        if not host.is_cpu or host.dtype is not torch.uint8 or runs.dtype not in UNSIGNED:
            return False
        distance, neighbours = host.stride()
        if shape[1] < form.nbytes or distance < form.nbytes or neighbours != 1:
            return False
        aligned = not form.scaled or (host.data_ptr() | distance) % SCALE_BYTES == 0
        known = runs.is_cpu or runs.device == self._device
        return aligned and known and runs.is_contiguous() and host.is_pinned()

    def _check_numbers(self, numbers: RunNumbers, rows: HostRows) -> None:
        """Raises KernelArgumentError where there is a run that does not exist."""
        if not numbers.known and numbers.largest() >= self._n_runs:
            self._collator.check(numbers.given, rows.host)
        numbers.known = True

    def _begin(self, lane: torch.cuda.Stream) -> None:
        """What the lane is given from now on begins after what the current stream has by now."""
        handle = driver.active.get_current_stream(self._device.index)
        stream = self._streams.get(handle)
        if stream is None:
            stream = self._streams[handle] = torch.cuda.current_stream()
        self._begun.record(stream)
        lane.wait_event(self._begun)

    def _copy_in_place(self, way: _Way, numbers: RunNumbers, rows: HostRows) -> list[Passed]:
        """By copies alone, of pages that are rows."""
        self._check_numbers(numbers, rows)
        self._begin(way.link)
        pages = self._collator.table.form
        stride = pages.page_stride * pages.dtype.itemsize
        origin = self._collator.table.views[0][0].data_ptr()
        passed = []
        for turn in way.ring.turns(way.sizes(numbers.blocks)):
            of_turn = numbers.runs[turn.first : turn.end, 0]
            if turn.first == 0:  # few, and none of them waits for the addresses of all
                for block, page in enumerate(of_turn.tolist()):
                    self._copy(way, rows.start(block), origin + page * stride, rows.nbytes)
            else:
                here = origin + of_turn.numpy().astype(np.int64) * stride
                there = rows.starts[turn.first : turn.end]
                self._copy_pieces(way, *copies_of(there, here, rows.nbytes))
            done = way.link.record_event()
            passed.append(Passed(turn.end, done, done))
        return passed

    def _across(self, way: _Way, numbers: RunNumbers, rows: HostRows) -> list[Passed]:
        """All blocks by one kernel."""
        self._check_numbers(numbers, rows)
        self._begin(way.kernels)
        numbers.bring(way.kernels, reading=way.kernels)
        with torch.cuda.stream(way.kernels):
            self._collator.launch(
                numbers.runs, rows.host, rows.offsets, out=way.out, programs=self._programs
            )
        done = way.kernels.record_event()
        return [Passed(numbers.blocks, done, done)]

    def _staged(self, way: _Way, numbers: RunNumbers, rows: HostRows) -> list[Passed]:
        """By way of buffers: as much as fills whole launches of a graph, and the rest by turns."""
        form = self._graph_form(way, rows)
        if form is None or numbers.blocks < form.blocks(rows.nbytes):
            return self._by_turns(way, numbers, rows)
        self._check_numbers(numbers, rows)
        self._begin(way.kernels)
        numbers.bring(way.kernels, reading=way.kernels)
        by_graphs = self._by_graphs if way.out else self._by_pulls
        passed = by_graphs(way, numbers.runs, rows)
        done = passed[-1].end
        if done == numbers.blocks:
            return passed
        rest = self._by_turns(way, numbers.behind(done), rows.behind(done))
        return passed + [replace(p, end=done + p.end) for p in rest]

    def _graph_form(self, way: _Way, rows: HostRows) -> GraphForm | None:
        """Of the graphs that there are for such rows."""
        form = self._graphs if way.out else self._pulls
        if form is None or rows.nbytes != way.stride:
            return None
        fits = rows.dense if way.out else not (rows.starts % ROW_ALIGNMENT).any()
        return form if fits else None

    def _by_graphs(self, way: _Way, runs: torch.Tensor, rows: HostRows) -> list[Passed]:
        """As many leading blocks, to the host, as fill whole launches of a graph."""
        assert self._graphs is not None
        blocks = self._graphs.blocks(rows.nbytes)
        if runs.dtype not in way.to_host:
            way.to_host[runs.dtype] = ToHostGraph(
                self._collator,
                self._runtime,
                self._graphs,
                runs=runs,
                kernels=way.kernels,
                host=rows.start(0),
            )
        passed = []
        for first in range(0, len(runs) - blocks + 1, blocks):
            end = first + blocks
            done = way.to_host[runs.dtype].launch(runs[first:end], rows.start(first))
            passed.append(Passed(end, done, done))
        return passed

    def _by_pulls(self, way: _Way, runs: torch.Tensor, rows: HostRows) -> list[Passed]:
        """As many leading blocks, to the pages, as fill whole launches of a graph."""
        assert self._pulls is not None
        blocks = self._pulls.blocks(rows.nbytes)
        if runs.dtype not in way.to_pages:
            way.to_pages[runs.dtype] = ToPagesGraph(
                self._collator, self._runtime, self._pulls, runs=runs, kernels=way.kernels
            )
        with torch.cuda.stream(way.kernels):
            starts = torch.from_numpy(rows.starts).pin_memory().to(self._device, non_blocking=True)
        passed = []
        for first in range(0, len(runs) - blocks + 1, blocks):
            end = first + blocks
            done = way.to_pages[runs.dtype].launch(runs[first:end], starts[first:end])
            passed.append(Passed(end, done, done))
        return passed

    def _by_turns(self, way: _Way, numbers: RunNumbers, rows: HostRows) -> list[Passed]:
        kernel = way.kernel(self._collator, numbers.runs.dtype)

        def collate(turn: Turn) -> None:
            blocks = turn.end - turn.first
            kernel.launch(
                numbers.address(turn.first), way.address(turn), blocks, way.kernels_handle
            )

        def copy(turn: Turn) -> None:
            here, count = way.address(turn), turn.end - turn.first
            if count == 1 or (rows.dense and way.stride == rows.nbytes):
                self._copy(way, rows.start(turn.first), here, count * rows.nbytes)
            else:
                there = rows.starts[turn.first : turn.end]
                rows_here = here + np.arange(count) * way.stride
                self._copy_pieces(way, *copies_of(there, rows_here, rows.nbytes))

        def copy_out(turn: Turn) -> None:
            if turn.first == 0:
                self._check_numbers(numbers, rows)  # the kernel under way does no harm
            copy(turn)
            if turn.first == 0:
                numbers.bring(way.kernels, reading=way.kernels)

        def copy_in(turn: Turn) -> None:
            copy(turn)
            if turn.first == 0:
                # On that lane, or they might come after all of the copies that follow.
                numbers.bring(way.link, reading=way.kernels)

        def scatter(turn: Turn) -> None:
            if turn.first == 0:
                self._check_numbers(numbers, rows)
            collate(turn)

        if way.out and numbers.runs.is_cpu:
            numbers.pinned()
        sizes = way.sizes(numbers.blocks)
        if not way.out:
            sizes.sort(reverse=True)  # the last kernel is the one that is waited for
        first, second = (way.kernels, way.link) if way.out else (way.link, way.kernels)
        self._begin(first)
        return pass_through(
            way.ring,
            way.ring.turns(sizes),
            filling=first,
            draining=second,
            fill=collate if way.out else copy_in,
            drain=copy_out if way.out else scatter,
        )

    def _copy(self, way: _Way, there: int, here: int, nbytes: int) -> None:
        """Copies bytes between the host (there) and the GPU (here)."""
        target, source = (there, here) if way.out else (here, there)
        self._runtime.copy_one(target, source, nbytes, way.link_handle)

    def _copy_pieces(self, way: _Way, there: Numbers, here: Numbers, sizes: Numbers) -> None:
        targets, sources = (there, here) if way.out else (here, there)
        self._runtime.copy(targets, sources, sizes, way.link_handle)


class _Way:
    """Streams and buffers of one direction."""

    def __init__(self, collator: Collator, buffers: int, buffer_bytes: int, *, out: bool) -> None:
        """out: from the pages to the host."""
        self.out = out
        # By the dtype of the run numbers.
        self.to_host: dict[torch.dtype, ToHostGraph] = {}
        self.to_pages: dict[torch.dtype, ToPagesGraph] = {}
        self._kernels: dict[torch.dtype, BufferKernel] = {}
        self.stride = -(-collator.form.nbytes // ROW_ALIGNMENT) * ROW_ALIGNMENT
        self._device, self._buffers = collator.table.device, buffers
        self._room = max(1, buffer_bytes // self.stride)
        self._small = max(1, SMALL_BYTES // self.stride)
        self.ring, self.ahead = Ring(buffers), PinnedAhead()
        # Before others, since its kernels take microseconds and the link waits for them.
        self.kernels = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
        # One: what a second would gain between two copies, it loses by the waits.
        self.link = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self.kernels_handle, self.link_handle = self.kernels.cuda_stream, self.link.cuda_stream

    def sizes(self, blocks: int) -> list[int]:
        """Of the turns of a transfer, the first small."""
        return turn_sizes(blocks, self._room, self._small)

    def kernel(self, collator: Collator, runs: torch.dtype) -> BufferKernel:
        """Between pages and buffers. runs: of their numbers."""
        if runs not in self._kernels:
            self._kernels[runs] = BufferKernel(
                collator, runs=runs, stride=self.stride, out=self.out
            )
        return self._kernels[runs]

    def address(self, turn: Turn) -> int:
        """Where its buffer begins."""
        return self._address + turn.buffer * self._room * self.stride

    @functools.cached_property
    def _address(self) -> int:
        return self._memory.data_ptr()

    @functools.cached_property
    def _memory(self) -> torch.Tensor:
        with torch.cuda.stream(self.kernels):
            shape = (self._buffers, self._room, self.stride)
            memory = torch.empty(shape, dtype=torch.uint8, device=self._device)
        memory.record_stream(self.link)
        # Whoever had that memory before may still read it, on the stream that it is of.
        self.link.wait_stream(self.kernels)
        return memory


def _checked() -> None:
    """What is called where there is nothing left to check."""
