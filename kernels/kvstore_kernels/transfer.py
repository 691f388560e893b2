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

What happens when is decided by `Ring` and `pass_through`. They know of streams only what streams
promise (`Lane`, `Mark`), and are tested without a GPU. Where the GPU has host memory as its own
(Grace), or when asked to, one kernel moves everything, without buffers and copies.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

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

BUFFERS = 2
BUFFER_BYTES = 64 << 20
# Of the turn whose kernel is waited for; its copy takes longer than the host to give the next one.
SMALL_BYTES = 16 << 20
# Rows that cost less as copies of their own than by way of a buffer.
COPIED_IN_PLACE_FROM = 1 << 20
GRAPHS, PULLS = GraphForm(), PullForm()
# A coherent link (NVLink-C2C) is about eight times as fast as PCIe, for which two programs do.
COHERENT_PROGRAMS = 16
_UNSIGNED = {torch.int32: np.uint32, torch.int64: np.uint64}
_largest = np.maximum.reduce  # `max` is a third slower


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
    """One use of a buffer: blocks [first, end) of a transfer pass through it.

    number: of the turn among all of its ring.
    """

    number: int
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
        self._turns = 0

    def turns(self, sizes: Iterable[int]) -> Iterable[Turn]:
        """The turns of the next transfer, of so many blocks each."""
        first = 0
        for size in sizes:
            number, self._turns = self._turns, self._turns + 1
            yield Turn(number, number % len(self._free), first, first + size)
            first += size

    def free(self, buffer: int) -> Mark | None:
        """The moment from which on it may be filled; None for now."""
        return self._free[buffer]

    def free_from(self, buffer: int, mark: Mark) -> None:
        """Says when what is now put into it will have been taken out."""
        self._free[buffer] = mark


def turn_sizes(blocks: int, room: int, small: int) -> list[int]:
    """Of turns, of which the first has at most `small` blocks, and the others as many as there is
    room for; the last has what is left."""
    first = min(small, room, blocks)
    whole, left = divmod(blocks - first, room)
    return [size for size in (first, *[room] * whole, left) if size]


def pass_through(
    ring: Ring,
    turns: Iterable[Turn],
    *,
    filling: Lane,
    draining: Lane,
    fill: Callable[[Turn], None],
    drain: Callable[[Turn], None],
) -> list[Passed]:
    """Gives lanes the work of all turns, and waits for none of it.

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
        turns = sum(passed.end < wanted for passed in self._passed) + 1 if wanted else 0
        for passed in self._passed[:turns][-1:]:
            passed.arrived.synchronize()

    def wait_source(self) -> None:
        """Returns when all blocks have been read, so that their source may be written again."""
        for passed in self._passed[-1:]:
            passed.read.synchronize()

    def follow(self, lane: Lane) -> None:
        """What the lane is given from now on begins when all blocks are where they go."""
        for passed in self._passed[-1:]:
            lane.wait_event(passed.arrived)

    def follow_source(self, lane: Lane) -> None:
        """What the lane is given from now on begins when all blocks have been read."""
        for passed in self._passed[-1:]:
            lane.wait_event(passed.read)


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
        numbers = _RunNumbers(runs, way.ahead, known=not plain or not runs.is_cpu)
        rows = HostRows(host, offsets, self._collator.form.nbytes)
        if not self._others:
            return self._begin_to_move(way, numbers, rows)
        with torch.cuda.device(self._device):  # events and launches are the current device's
            return self._begin_to_move(way, numbers, rows)

    def _begin_to_move(self, way: _Way, numbers: _RunNumbers, rows: HostRows) -> Transfer:
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
        if not host.is_cpu or host.dtype is not torch.uint8 or runs.dtype not in _UNSIGNED:
            return False
        distance, neighbours = host.stride()
        if shape[1] < form.nbytes or distance < form.nbytes or neighbours != 1:
            return False
        aligned = not form.scaled or (host.data_ptr() | distance) % SCALE_BYTES == 0
        known = runs.is_cpu or runs.device == self._device
        return aligned and known and runs.is_contiguous() and host.is_pinned()

    def _check_numbers(self, numbers: _RunNumbers, rows: HostRows) -> None:
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

    def _copy_in_place(self, way: _Way, numbers: _RunNumbers, rows: HostRows) -> list[Passed]:
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

    def _across(self, way: _Way, numbers: _RunNumbers, rows: HostRows) -> list[Passed]:
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

    def _staged(self, way: _Way, numbers: _RunNumbers, rows: HostRows) -> list[Passed]:
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

    def _by_turns(self, way: _Way, numbers: _RunNumbers, rows: HostRows) -> list[Passed]:
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


class _Pinned:
    """Pinned memory, its address, and as an array; a copy from it is torch's to look after."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.nbytes, self.address, self.array = nbytes, self.memory.data_ptr(), self.memory.numpy()


class _PinnedAhead:
    """Pinned memory that is there before it is needed: to get it takes longer than to fill it."""

    def __init__(self) -> None:
        self._next: _Pinned | None = None
        self._nbytes = 4096

    def take(self, nbytes: int) -> _Pinned:
        """At least as many."""
        taken, self._next = self._next, None
        if taken is None or taken.nbytes < nbytes:
            self._nbytes = max(nbytes, self._nbytes)
            taken = _Pinned(self._nbytes)
        return taken

    def refill(self) -> None:
        """For the next time."""
        if self._next is None:
            self._next = _Pinned(self._nbytes)


class _RunNumbers:
    """The numbers of a transfer's runs, and where kernels read them."""

    def __init__(self, runs: torch.Tensor, ahead: _PinnedAhead, *, known: bool) -> None:
        """runs: (blocks, runs per block), contiguous, on the CPU or the GPU. known: that they
        exist, or that nobody asks."""
        self.given = self.runs = runs
        self.blocks, per_block = runs.shape
        self.known = known
        self._row_bytes = per_block * runs.element_size()
        self._ahead = ahead
        self._pinned: _Pinned | None = None
        self._address = runs.data_ptr()

    def behind(self, done: int) -> _RunNumbers:
        """Without the first ones."""
        return _RunNumbers(self.runs[done:], self._ahead, known=self.known)

    def pinned(self) -> _Pinned:
        """Of numbers on the CPU, the copy that kernels can read across the link."""
        if self._pinned is None:
            nbytes = self.blocks * self._row_bytes
            self._pinned = self._ahead.take(nbytes)
            ctypes.memmove(self._pinned.address, self._address, nbytes)
            self._address = self._pinned.address
        return self._pinned

    def largest(self) -> int:
        """Of numbers on the CPU; those below 0 count as larger than all others."""
        numbers = self.pinned().array[: self.blocks * self._row_bytes]
        return int(_largest(numbers.view(_UNSIGNED[self.given.dtype])))

    def bring(self, lane: torch.cuda.Stream, *, reading: torch.cuda.Stream) -> None:
        """Copies them to the GPU, on that lane. reading: of the kernels that read them."""
        if self.runs.is_cpu:
            numbers = self.pinned().memory[: self.blocks * self._row_bytes].view(self.runs.dtype)
            with torch.cuda.stream(lane):
                self.runs = numbers.view(self.runs.shape).to(lane.device, non_blocking=True)
            self._address = self.runs.data_ptr()
        self.runs.record_stream(reading)

    def address(self, block: int) -> int:
        """Of a block's numbers."""
        return self._address + block * self._row_bytes


class HostRows:
    """Where rows are on the host."""

    def __init__(self, host: torch.Tensor, offsets: torch.Tensor | None, nbytes: int) -> None:
        """nbytes: of each row. The others as for `Transfers.to_host`.

        dense: whether each row begins where the one before it ends.
        """
        self.host, self.offsets, self.nbytes = host, offsets, nbytes
        self._origin, self._distance = host.data_ptr(), host.stride(0)
        if offsets is None:
            self.dense = self._distance == nbytes or len(host) == 1
        else:
            self.dense = bool((np.diff(offsets.numpy()) == nbytes).all())

    def behind(self, done: int) -> HostRows:
        """Without the first ones."""
        if self.offsets is None:
            return HostRows(self.host[done:], None, self.nbytes)
        return HostRows(self.host, self.offsets[done:], self.nbytes)

    def start(self, row: int) -> int:
        """Where one begins."""
        offset = row * self._distance if self.offsets is None else int(self.offsets[row])
        return self._origin + offset

    @functools.cached_property
    def starts(self) -> Numbers:
        """Where each begins, (rows,)."""
        if self.offsets is None:
            return self._origin + np.arange(len(self.host), dtype=np.int64) * self._distance
        return self._origin + self.offsets.numpy()


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
        self.ring, self.ahead = Ring(buffers), _PinnedAhead()
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
