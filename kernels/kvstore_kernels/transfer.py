"""Blocks between an engine's pages and host memory, at the rate of the link between them.

A page is too small for a copy of its own: each costs the driver microseconds, so that scattered
pages of 32 KiB move at a fifth of the link's rate. Instead a kernel collates some blocks into a
buffer on the GPU, and one large copy takes the buffer across; or the other way round. Three buffers
of 16 MiB take turns: one is filled while another is drained, and the link is never idle. Its own
engine does the copying, so that a decode that runs meanwhile loses only some memory traffic.

The floor is bytes / the rate of a pinned copy. A kernel is some fifty times faster than the link,
so what can be lost is the time until the first copy begins. The host needs about a tenth of a
millisecond for each turn, so that buffers of 4 MiB were given too slowly for a link of 54 GB/s (34
GB/s); of 16 MiB they are ahead of it. To rows that follow each other closely on the host, turns are
given many at a time, in a CUDA graph (`transfer_graph`), with two buffers of 4 MiB: these stay in
the L2, so that a decode that runs meanwhile is slowed by 2 % rather than 4.5. To pages, kernels may
pull rows through such buffers instead of copies, which is slower and spares a decode.

Pages that are rows as they are, as those of our own engines, need no collation: they are copied in
place, many by one call.

What happens when is decided by `Ring` and `pass_through`. They know of streams only what streams
promise (`Lane`, `Mark`), and are tested without a GPU. Where the GPU has host memory as its own
(Grace), or when asked to, one kernel moves everything, without buffers and copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from kvstore_kernels.checks import require
from kvstore_kernels.collate import Collator
from kvstore_kernels.collate_plan import rows_are_pages
from kvstore_kernels.cuda_runtime import Numbers, cuda_runtime, host_is_coherent
from kvstore_kernels.transfer_graph import GraphForm, PullForm, ToHostGraph, ToPagesGraph

BUFFERS = 3
BUFFER_BYTES = 16 << 20
COPY_LANES = 2  # streams that copy in rotation: while one's next copy is begun, the other's runs
GRAPHS, PULLS = GraphForm(), PullForm()
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


AnyLane = TypeVar("AnyLane", bound=Lane)


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

    def turns(self, blocks: int, blocks_per_buffer: int) -> Iterable[Turn]:
        """The turns of the next transfer: at a time, as many blocks as fit."""
        for first in range(0, blocks, blocks_per_buffer):
            number, self._turns = self._turns, self._turns + 1
            end = min(first + blocks_per_buffer, blocks)
            yield Turn(number, number % len(self._free), first, end)

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
    filling: Sequence[Lane],
    draining: Sequence[Lane],
    fill: Callable[[Turn], None],
    drain: Callable[[Turn], None],
) -> list[Passed]:
    """Gives lanes the work of all turns, and waits for none of it.

    filling, draining: one lane or more, which have turns in rotation (`lane_of`). fill gives a
    turn's filling lane what puts its blocks into its buffer, drain gives the draining lane what
    takes them out. Raises what they raise; even then no later transfer fills a buffer before it is
    free.
    """
    passed = []
    for turn in turns:
        source, target = lane_of(filling, turn), lane_of(draining, turn)
        free = ring.free(turn.buffer)
        if free is not None:
            source.wait_event(free)
        fill(turn)
        filled = source.record_event()
        target.wait_event(filled)
        try:
            drain(turn)
        finally:
            drained = target.record_event()
            ring.free_from(turn.buffer, drained)
        passed.append(Passed(turn.end, filled, drained))
    return passed


def lane_of(lanes: Sequence[AnyLane], turn: Turn) -> AnyLane:
    """The lane that has that turn."""
    return lanes[turn.number % len(lanes)]


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

    def __init__(self, passed: Sequence[Passed], keeps: object, *, abreast: int = 1) -> None:
        """abreast: so many turns that follow each other may end in any order."""
        self._passed, self._keeps, self._abreast = passed, keeps, abreast
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
        for passed in self._last(turns):
            passed.arrived.synchronize()

    def wait_source(self) -> None:
        """Returns when all blocks have been read, so that their source may be written again."""
        for passed in self._last():
            passed.read.synchronize()

    def follow(self, lane: Lane) -> None:
        """What the lane is given from now on begins when all blocks are where they go."""
        for passed in self._last():
            lane.wait_event(passed.arrived)

    def follow_source(self, lane: Lane) -> None:
        """What the lane is given from now on begins when all blocks have been read."""
        for passed in self._last():
            lane.wait_event(passed.read)

    def _last(self, turns: int | None = None) -> Sequence[Passed]:
        """Those of the first `turns` (None: all) whose ends are the end of all of them."""
        return self._passed[:turns][-self._abreast :]


class Transfers:
    """Moves blocks between the pages of a collator and host memory, both ways at once.

    Host memory is pinned: torch's, or registered (`Registration`). Calls return when the work is
    given, and are made by one thread. A transfer begins after what the current stream has been
    given before; what the stream is given later does not wait for it (`Transfer.follow` does that).

    buffers, buffer_bytes: memory on the GPU for each direction; a buffer has room for at least one
    block. graphs: of turns to the host that are given in one launch, with buffers of their own,
    once a transfer is as long and its rows lie densely there; None for never. pulls: to spare a
    decode that runs meanwhile (`transfer_graph`), of turns to the pages, once a transfer is as long
    and its rows begin at multiples of 16; None for copies, which are faster. direct: whether a
    kernel goes across the link itself, without buffers; None for where that is best, which is on a
    coherent link. programs: how many of the kernel's work at a time then; None for as many as the
    link needs.

    Raises KernelArgumentError, and TransferError where there is no CUDA runtime.
    """

    def __init__(
        self,
        collator: Collator,
        *,
        buffers: int = BUFFERS,
        buffer_bytes: int = BUFFER_BYTES,
        graphs: GraphForm | None = GRAPHS,
        pulls: PullForm | None = None,
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
        self._graphs, self._pulls = graphs, pulls
        self._runtime = cuda_runtime()
        nbytes = collator.form.nbytes
        self._rows_are_pages = rows_are_pages(collator.table, collator.pairing)
        self._out, self._in = (
            _Way(device, nbytes, buffers, buffer_bytes, COPY_LANES) for _ in range(2)
        )
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
        rows = _HostRows(_starts(len(runs), host, offsets), self._collator.form.nbytes)
        with torch.cuda.device(self._device):
            begun = torch.cuda.current_stream().record_event()
            for lane in (way.kernels, *way.copies):
                lane.wait_event(begun)
            copied = self._rows_are_pages and runs.device.type == "cpu" and not self._direct
            if copied and (out or self._pulls is None):
                return self._keep(self._as_they_are(way, runs, rows, out=out), way, host)
            with torch.cuda.stream(way.kernels):
                runs = runs.pin_memory() if runs.device.type == "cpu" else runs
                runs = runs.to(self._device, non_blocking=True)
                runs.record_stream(way.kernels)
                if self._direct:
                    passed = self._across(way, runs, host, offsets, out=out)
                else:
                    passed = self._staged(way, runs, rows, out=out)
        return self._keep(passed, way, (runs, host))

    def _keep(self, passed: list[Passed], way: _Way, keeps: object) -> Transfer:
        transfer = Transfer(passed, keeps, abreast=len(way.copies))
        self._under_way = [t for t in self._under_way if t.arrived() < t.blocks] + [transfer]
        return transfer

    def _as_they_are(
        self, way: _Way, runs: torch.Tensor, rows: _HostRows, *, out: bool
    ) -> list[Passed]:
        """By copies alone, of pages that are rows."""
        pages = self._collator.table.form
        stride = pages.page_stride * pages.dtype.itemsize
        origin = self._collator.table.views[0][0].data_ptr()
        here = origin + runs[:, 0].numpy().astype(np.int64) * stride
        passed = []
        for turn in way.turns(len(runs)):
            lane = lane_of(way.copies, turn)
            there = rows.starts[turn.first : turn.end]
            copies = copies_of(there, here[turn.first : turn.end], rows.nbytes)
            self._copy(lane, *copies, out=out)
            done = lane.record_event()
            passed.append(Passed(turn.end, done, done))
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

    def _staged(self, way: _Way, runs: torch.Tensor, rows: _HostRows, *, out: bool) -> list[Passed]:
        """By way of buffers; the current stream is the kernels'."""
        passed = (self._by_graphs if out else self._by_pulls)(way, runs, rows)
        done = passed[-1].end if passed else 0
        rest = self._by_turns(way, runs[done:], rows.behind(done), out=out)
        return passed + [replace(p, end=done + p.end) for p in rest]

    def _by_graphs(self, way: _Way, runs: torch.Tensor, rows: _HostRows) -> list[Passed]:
        """As many leading blocks, to the host, as fill whole launches of a graph."""
        if self._graphs is None or not rows.dense or rows.nbytes != way.stride:
            return []
        blocks = self._graphs.turns * self._graphs.blocks_per_turn(rows.nbytes)
        if len(runs) < blocks:
            return []
        if runs.dtype not in way.to_host:
            way.to_host[runs.dtype] = ToHostGraph(
                self._collator,
                self._runtime,
                self._graphs,
                runs=runs,
                kernels=way.kernels,
                host=int(rows.starts[0]),
            )
        passed = []
        for first in range(0, len(runs) - blocks + 1, blocks):
            end = first + blocks
            done = way.to_host[runs.dtype].launch(runs[first:end], int(rows.starts[first]))
            passed.append(Passed(end, done, done))
        return passed

    def _by_pulls(self, way: _Way, runs: torch.Tensor, rows: _HostRows) -> list[Passed]:
        """As many leading blocks, to the pages, as fill whole launches of a graph."""
        if self._pulls is None or rows.nbytes != way.stride or (rows.starts % _ALIGNED).any():
            return []
        blocks = self._pulls.turns * self._pulls.blocks_per_turn(rows.nbytes)
        if len(runs) < blocks:
            return []
        if runs.dtype not in way.to_pages:
            way.to_pages[runs.dtype] = ToPagesGraph(
                self._collator, self._runtime, self._pulls, runs=runs, kernels=way.kernels
            )
        starts = torch.from_numpy(rows.starts).pin_memory().to(self._device, non_blocking=True)
        passed = []
        for first in range(0, len(runs) - blocks + 1, blocks):
            end = first + blocks
            done = way.to_pages[runs.dtype].launch(runs[first:end], starts[first:end])
            passed.append(Passed(end, done, done))
        return passed

    def _by_turns(
        self, way: _Way, runs: torch.Tensor, rows: _HostRows, *, out: bool
    ) -> list[Passed]:
        def collate(turn: Turn) -> None:
            part = runs[turn.first : turn.end]
            self._collator.launch(part, way.rows(turn), out=out)

        def copy(turn: Turn) -> None:
            copies = rows.copies(turn, way.address(turn), way.stride)
            self._copy(lane_of(way.copies, turn), *copies, out=out)

        return pass_through(
            way.ring,
            way.turns(len(runs)),
            filling=[way.kernels] if out else way.copies,
            draining=way.copies if out else [way.kernels],
            fill=collate if out else copy,
            drain=copy if out else collate,
        )

    def _copy(
        self, lane: torch.cuda.Stream, there: Numbers, here: Numbers, sizes: Numbers, *, out: bool
    ) -> None:
        """Copies bytes between the host (there) and the GPU (here)."""
        targets, sources = (there, here) if out else (here, there)
        self._runtime.copy(targets, sources, sizes, lane.cuda_stream)


class _HostRows:
    """Where rows are on the host."""

    def __init__(self, starts: Numbers, nbytes: int) -> None:
        """starts: (rows,) addresses. nbytes: of each row."""
        self.starts, self.nbytes = starts, nbytes
        self.dense = bool((np.diff(starts) == nbytes).all())

    def behind(self, done: int) -> _HostRows:
        """Without the first ones."""
        return _HostRows(self.starts[done:], self.nbytes) if done else self

    def copies(self, turn: Turn, address: int, stride: int) -> tuple[Numbers, Numbers, Numbers]:
        """Those of a turn; its buffer begins at the address and has a row in each stride."""
        there, count = self.starts[turn.first : turn.end], turn.end - turn.first
        if self.dense and stride == self.nbytes:
            return there[:1], np.array([address]), np.array([count * stride])
        return copies_of(there, address + np.arange(count) * stride, self.nbytes)


class _Way:
    """Streams and buffers of one direction."""

    def __init__(
        self, device: torch.device, nbytes: int, buffers: int, buffer_bytes: int, lanes: int
    ) -> None:
        # By the dtype of the run numbers.
        self.to_host: dict[torch.dtype, ToHostGraph] = {}
        self.to_pages: dict[torch.dtype, ToPagesGraph] = {}
        self.stride = -(-nbytes // _ALIGNED) * _ALIGNED
        self.blocks_per_buffer = max(1, buffer_bytes // self.stride)
        self.ring = Ring(buffers)
        # Before others, since its kernels take microseconds and the link waits for them.
        self.kernels = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self.copies: list[torch.cuda.Stream] = [
            torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            for _ in range(lanes)
        ]
        shape = (buffers, self.blocks_per_buffer, self.stride)
        with torch.cuda.stream(self.kernels):
            self._memory = torch.empty(shape, dtype=torch.uint8, device=device)
        for lane in self.copies:
            self._memory.record_stream(lane)

    def turns(self, blocks: int) -> Iterable[Turn]:
        """Those of the next transfer."""
        return self.ring.turns(blocks, self.blocks_per_buffer)

    def address(self, turn: Turn) -> int:
        """Where its buffer begins."""
        return self._memory.data_ptr() + turn.buffer * self.blocks_per_buffer * self.stride

    def rows(self, turn: Turn) -> torch.Tensor:
        """The part of its buffer that a turn uses, (blocks, stride) uint8."""
        return self._memory[turn.buffer, : turn.end - turn.first]


def _starts(blocks: int, host: torch.Tensor, offsets: torch.Tensor | None) -> Numbers:
    """Where on the host each row begins, (blocks,) addresses."""
    if offsets is None:
        return host.data_ptr() + np.arange(blocks, dtype=np.int64) * host.stride(0)
    return host.data_ptr() + offsets.numpy()
