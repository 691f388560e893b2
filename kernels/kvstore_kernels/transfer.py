"""Blocks between an engine's pages and host memory, at the rate of the link between them.

A page is too small for a copy of its own: each costs the driver microseconds, so that scattered
pages of 32 KiB move at a fifth of the link's rate. Instead a kernel collates some blocks into a
buffer on the GPU, and one large copy takes the buffer across; or the other way round. Two buffers
take turns: one is filled while another is drained, and the link is never idle. Its own engine does
the copying, so that a decode that runs meanwhile loses only some memory traffic.

The floor is bytes / the rate of a pinned copy. A kernel is some fifty times faster than the link,
and between two copies 1.7 us are lost. What else is lost is the time until the first copy begins,
and that is the host's: what 256 MiB brought across the link have put out of its caches takes five
times as long as in a loop. So as little as can be comes before that copy (`transfer_launch`), and
checks before the first launch, since the driver puts what is left out of those caches. The first
turn to the host and the last one to the pages are small, since the link waits for the kernel of the
one, and the caller for that of the other.

To the host, buffers are small enough to stay in the L2, and their lines are the last to leave it:
the memory, on which a decode depends, sees the pages alone. From the host that is of no use, since
the copy engine's writes go to the memory wherever they go. Both ways a kernel has few programs at a
time, so that what it is in the way of it is evenly, and a little. Where another kernel leaves no
registers for these, they wait for its end, and what buffers hold is all that moves until then.

Pages that are rows as they are, as those of our own engines, need no collation: if they are large
enough they are copied in place, many by one call.

What happens when is decided in `transfer_ring`. Where the GPU has host memory as its own
(Grace), or when asked to, one kernel moves everything, without buffers and copies.
"""

from __future__ import annotations

import contextlib
import functools

import numpy as np
import torch
from triton.runtime import driver

from kvstore_kernels.checks import require
from kvstore_kernels.collate import Collator
from kvstore_kernels.collate_plan import rows_are_pages
from kvstore_kernels.cuda_runtime import Numbers, cuda_runtime, host_is_coherent
from kvstore_kernels.page_table import SCALE_BYTES
from kvstore_kernels.transfer_launch import ROW_ALIGNMENT, BufferKernel, NumbersKernel
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
# Of each buffer: of those to the host, which stay in the L2, and of the others.
KEPT_BYTES, BUFFER_BYTES = 8 << 20, 16 << 20
# Of the turn whose kernel is waited for; its copy takes longer than the host to give the next one.
SMALL_BYTES = 8 << 20
# Rows that cost less as copies of their own than by way of a buffer.
COPIED_IN_PLACE_FROM = 256 << 10
# Of a call at most, which takes the host less long than such copies take.
IN_PLACE_BYTES = 64 << 20
# From call to call, up to there: a copy of 256 KiB takes 5 us, and the host up to 2 to give it.
IN_PLACE_GROWTH = 2
# At a time, for each multiprocessor: all at once would be in a decode's way more than they gain.
PROGRAMS = 2
# A coherent link (NVLink-C2C) is about eight times as fast as PCIe, for which two programs do.
COHERENT_PROGRAMS = 16


class Transfers:
    """Moves blocks between the pages of a collator and host memory, both ways at once.

    Host memory is pinned: torch's, or registered (`Registration`). Calls return when the work is
    given, and are made by one thread. A transfer begins after what the current stream has been
    given before; what the stream is given later does not wait for it (`Transfer.follow` does that).

    buffers, buffer_bytes: memory on the GPU for each direction, from its first use on; a buffer has
    room for at least one block. None for KEPT_BYTES to the host and BUFFER_BYTES to the pages. Up
    to KEPT_BYTES, those to the host may take as much of the L2 (`CudaRuntime.let_persist`). direct:
    whether a kernel goes across the link itself, without buffers; None for where that is best,
    which is on a coherent link. programs: how many of a kernel's work at a time; None for as many
    as measured best.

    Raises KernelArgumentError, and TransferError where there is no CUDA runtime.
    """

    def __init__(
        self,
        collator: Collator,
        *,
        buffers: int = BUFFERS,
        buffer_bytes: int | None = None,
        direct: bool | None = None,
        programs: int | None = None,
    ) -> None:
        table, form = collator.table, collator.form
        require(table.device.type == "cuda", "collator", "must have pages on a GPU")
        require(buffers >= 1, "buffers", "must be at least 1")
        coherent = host_is_coherent(table.device)
        self._collator, self._device = collator, table.device
        self._direct = coherent if direct is None else direct
        if programs is None and self._direct:
            programs = COHERENT_PROGRAMS if coherent else None
        elif programs is None:
            properties = torch.cuda.get_device_properties(table.device)
            programs = PROGRAMS * properties.multi_processor_count
        self._programs = programs
        self._runtime = cuda_runtime()
        self._runs_per_block = table.form.runs_per_block(form.block_tokens)
        self._n_runs = table.form.pages * table.form.runs_per_page(form.block_tokens)
        rows_as_they_are = rows_are_pages(table, collator.pairing)
        self._in_place = rows_as_they_are and form.nbytes >= COPIED_IN_PLACE_FROM
        to_host, to_pages = buffer_bytes or KEPT_BYTES, buffer_bytes or BUFFER_BYTES
        keep = to_host <= KEPT_BYTES
        self._out = _Way(collator, buffers, to_host, out=True, keep=keep)
        self._in = _Way(collator, buffers, to_pages, out=False, keep=False)
        if keep and not self._direct:
            with torch.cuda.device(table.device):
                self._runtime.let_persist(self._out.nbytes)
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
        numbers = RunNumbers(runs, way.ahead)
        rows = HostRows(host, offsets, self._collator.form.nbytes)
        if plain and runs.is_cpu and numbers.largest() >= self._n_runs:
            self._collator.check(runs, host)  # says which
        if not self._others:
            return self._begin_to_move(way, numbers, rows)
        with torch.cuda.device(self._device):  # events and launches are the current device's
            return self._begin_to_move(way, numbers, rows)

    def _begin_to_move(self, way: _Way, numbers: RunNumbers, rows: HostRows) -> Transfer:
        if self._direct:
            passed = self._across(way, numbers, rows)
        elif self._in_place and numbers.given.is_cpu:
            passed = self._copy_in_place(way, numbers, rows)
        else:
            passed = self._by_turns(way, numbers, rows)
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
        self._begin(way.link)
        form = self._collator.table.form
        stride = form.page_stride * form.dtype.itemsize
        origin = self._collator.table.views[0][0].data_ptr()
        passed = []
        for turn in way.ring.turns(way.sizes_in_place(numbers.blocks)):
            pages = numbers.given[turn.first : turn.end, 0].numpy()
            here = origin + pages.astype(np.int64) * stride
            there = rows.starts[turn.first : turn.end]
            if turn.first == 0:
                self._copy_pieces(way, there, here, np.full(len(here), rows.nbytes))
            else:  # now that some are under way, there is time to see which of them are one
                self._copy_pieces(way, *copies_of(there, here, rows.nbytes))
            done = way.link.record_event()
            passed.append(Passed(turn.end, done, done))
        return passed

    def _across(self, way: _Way, numbers: RunNumbers, rows: HostRows) -> list[Passed]:
        """All blocks by one kernel."""
        self._begin(way.kernels)
        if not numbers.given.is_cpu:
            numbers.given.record_stream(way.kernels)
        with torch.cuda.stream(way.kernels):
            self._collator.launch(
                numbers.given, rows.host, rows.offsets, out=way.out, programs=self._programs
            )
        done = way.kernels.record_event()
        return [Passed(numbers.blocks, done, done)]

    def _by_turns(self, way: _Way, numbers: RunNumbers, rows: HostRows) -> list[Passed]:
        """By way of buffers."""
        kernel = way.kernel(self._collator, numbers.given.dtype)

        def collate(turn: Turn, *, programs: int | None) -> None:
            runs, blocks = numbers.address(turn.first), turn.end - turn.first
            kernel.launch(runs, way.address(turn), blocks, way.kernels_handle, programs)

        def gather(turn: Turn) -> None:
            waited_for = turn.first == 0  # by the link
            collate(turn, programs=None if waited_for else self._programs)

        def copy_out(turn: Turn) -> None:
            self._copy_turn(way, turn, rows)
            if turn.first == 0:
                way.bring(numbers)

        def copy_in(turn: Turn) -> None:
            self._copy_turn(way, turn, rows)

        def scatter(turn: Turn) -> None:
            if turn.first == 0:
                way.bring(numbers)
            waited_for = turn.end == numbers.blocks  # by the caller
            collate(turn, programs=None if waited_for else self._programs)

        if numbers.given.is_cpu:
            numbers.are_at(numbers.pinned.address)
        sizes = way.sizes(numbers.blocks)
        if not way.out:
            sizes.sort(reverse=True)  # the last kernel is the one that is waited for
        first, second = (way.kernels, way.link) if way.out else (way.link, way.kernels)
        self._begin(first)
        try:
            return pass_through(
                way.ring,
                way.ring.turns(sizes),
                filling=first,
                draining=second,
                fill=gather if way.out else copy_in,
                drain=copy_out if way.out else scatter,
            )
        except BaseException:
            way.settle()  # what was given reads what is let go of now
            raise

    def _copy_turn(self, way: _Way, turn: Turn, rows: HostRows) -> None:
        """Gives the link's lane the copies between a turn's buffer and its rows."""
        here, count = way.address(turn), turn.end - turn.first
        if count == 1 or (rows.dense and way.stride == rows.nbytes):
            self._copy(way, rows.start(turn.first), here, count * rows.nbytes)
        else:
            there = rows.starts[turn.first : turn.end]
            rows_here = here + np.arange(count) * way.stride
            self._copy_pieces(way, *copies_of(there, rows_here, rows.nbytes))

    def _copy(self, way: _Way, there: int, here: int, nbytes: int) -> None:
        """Copies bytes between the host (there) and the GPU (here)."""
        target, source = (there, here) if way.out else (here, there)
        self._runtime.copy_one(target, source, nbytes, way.link_handle)

    def _copy_pieces(self, way: _Way, there: Numbers, here: Numbers, sizes: Numbers) -> None:
        targets, sources = (there, here) if way.out else (here, there)
        self._runtime.copy(targets, sources, sizes, way.link_handle)


class _Way:
    """Streams and buffers of one direction."""

    def __init__(
        self, collator: Collator, buffers: int, buffer_bytes: int, *, out: bool, keep: bool
    ) -> None:
        """out: from the pages to the host. keep: what is in buffers is the last to leave the L2."""
        self.out, self._keep = out, keep
        # By the dtype of the run numbers.
        self._kernels: dict[torch.dtype, BufferKernel] = {}
        self._numbers: torch.Tensor | None = None  # of one transfer after the other
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

    @property
    def nbytes(self) -> int:
        """Of the buffers."""
        return self._buffers * self._room * self.stride

    def sizes(self, blocks: int) -> list[int]:
        """Of the turns of a transfer, the first small."""
        return turn_sizes(blocks, self._room, self._small)

    def sizes_in_place(self, blocks: int) -> list[int]:
        """The same of turns that need no buffer."""
        room = max(1, IN_PLACE_BYTES // self.stride)
        return turn_sizes(blocks, room, self._small, IN_PLACE_GROWTH)

    def settle(self) -> None:
        """Returns when all that was given has ended, or cannot go on."""
        with contextlib.suppress(RuntimeError):
            self.kernels.synchronize()
            self.link.synchronize()

    def kernel(self, collator: Collator, runs: torch.dtype) -> BufferKernel:
        """Between pages and buffers. runs: of their numbers."""
        if runs not in self._kernels:
            self._kernels[runs] = BufferKernel(
                collator, runs=runs, stride=self.stride, out=self.out, keep=self._keep
            )
        return self._kernels[runs]

    def bring(self, numbers: RunNumbers) -> None:
        """Has them on the GPU for the kernels that follow; the host's are read across the link."""
        if not numbers.given.is_cpu:
            numbers.given.record_stream(self.kernels)
            return
        if self._numbers is None or self._numbers.numel() < numbers.nbytes:
            with torch.cuda.stream(self.kernels):
                self._numbers = torch.empty(numbers.nbytes, dtype=torch.uint8, device=self._device)
        address = self._numbers.data_ptr()
        source = numbers.pinned.address
        self._numbers_kernel.launch(source, address, numbers.nbytes, self.kernels_handle)
        numbers.are_at(address)

    @functools.cached_property
    def _numbers_kernel(self) -> NumbersKernel:
        return NumbersKernel(self._device)

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
