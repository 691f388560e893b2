"""Turns of a transfer in a CUDA graph: captured once, launched again for other blocks.

Given one by one, a turn through a buffer costs the host 0.03 to 0.1 ms: a kernel, a copy, two
events and two waits. Here many turns are one launch, so that buffers of 4 MiB have the link busy
whatever else the host does. Two of these stay in the L2, and the memory, on which a decode depends,
sees the pages alone.

To the host, copies take the buffers across, and are told anew where they go at each launch. A
decode is slowed half as much as turn by turn. From the host a copy would not do: what it writes
goes to the memory, wherever it writes, a little at a time, and each change from reading to writing
costs time. So a kernel pulls the rows across, into buffers that stay in the L2, and a buffer that
is full is scattered in one go. That slows a decode by two fifths of what copies do, at four fifths
of their rate.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from kvstore_kernels.capturing import own_stream, undisturbed
from kvstore_kernels.collate import Collator
from kvstore_kernels.collate_kernels import pull_kernel
from kvstore_kernels.cuda_runtime import CudaRuntime

PULL_WARPS = 4


@dataclass(frozen=True, slots=True)
class GraphForm:
    """turns: that one launch has. buffers, buffer_bytes: that they share; a buffer has room for at
    least one block."""

    turns: int = 16
    buffers: int = 2
    buffer_bytes: int = 4 << 20

    def blocks_per_turn(self, nbytes: int) -> int:
        """Of blocks of so many bytes."""
        return max(1, self.buffer_bytes // nbytes)

    def blocks(self, nbytes: int) -> int:
        """Of a launch, of so many bytes each."""
        return self.turns * self.blocks_per_turn(nbytes)


@dataclass(frozen=True, slots=True)
class PullForm(GraphForm):
    """programs, tile_bytes: of the kernel that pulls; their product is under way across the link.
    scattering: programs at most that empty a buffer; all at once would keep a decode waiting."""

    programs: int = 28
    tile_bytes: int = 4 << 10
    scattering: int = 132


class TurnsGraph(ABC):
    """A number of blocks between their pages and rows on the host.

    Launches follow each other on one stream. Raises CudaCallFailedError.
    """

    def __init__(
        self,
        collator: Collator,
        runtime: CudaRuntime,
        form: GraphForm,
        *,
        runs: torch.Tensor,
        kernels: torch.cuda.Stream,
    ) -> None:
        """runs: some of the dtype and shape that launches will have. kernels: the stream of
        launches."""
        self._collator, self._runtime, self._form = collator, runtime, form
        self._kernels, self._device = kernels, collator.table.device
        nbytes = collator.form.nbytes
        self._per_turn = form.blocks_per_turn(nbytes)
        self._turn_bytes = self._per_turn * nbytes
        self.blocks = form.blocks(nbytes)
        with torch.cuda.stream(kernels):
            shape = (form.buffers, self._per_turn, nbytes)
            self._buffers = torch.empty(shape, dtype=torch.uint8, device=self._device)
            # Runs that do not exist: kernels are compiled with them, and no page is touched.
            none = torch.full((self.blocks, runs.shape[1]), -1, dtype=runs.dtype)
            self._runs = none.to(self._device)
            self._collate(0)

    def _capture(self) -> int:
        """The graph of `_give_turns`."""
        # On streams of the captures' own: what anybody else gives these would be captured too.
        kernels, link = own_stream(self._device), own_stream(self._device, 1)
        with undisturbed():
            self._runtime.begin_capture(kernels.cuda_stream)
            try:
                with torch.cuda.stream(kernels):
                    link.wait_event(kernels.record_event())
                    self._give_turns(kernels, link)
            finally:  # or the stream would be of no use any more
                graph = self._runtime.end_capture(kernels.cuda_stream)
        return graph

    @abstractmethod
    def _give_turns(self, kernels: torch.cuda.Stream, link: torch.cuda.Stream) -> None:
        """What a launch is to do, on streams that are captured: at the pages, and across the link.
        kernels: the current one, which is left waiting for all of it."""

    @abstractmethod
    def _collate(self, turn: int) -> None:
        """Between a turn's pages and its buffer."""

    def _instantiate(self, graph: int) -> None:
        try:
            self._executable = self._runtime.instantiate(graph)
        except BaseException:
            self._runtime.destroy_graph(graph)
            raise
        self._end = weakref.finalize(self, _destroy, self._runtime, graph, self._executable)
        self._end.atexit = False

    def _run(self) -> torch.cuda.Event:
        """The moment when what is launched now has ended; the kernels' stream is the current."""
        self._runtime.launch_graph(self._executable, self._kernels.cuda_stream)
        done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record(self._kernels)
        return done

    def _rows(self, turn: int) -> slice:
        """A turn's blocks among those of a launch."""
        return slice(turn * self._per_turn, (turn + 1) * self._per_turn)

    def _buffer(self, turn: int) -> torch.Tensor:
        return self._buffers[turn % self._form.buffers]


class ToHostGraph(TurnsGraph):
    """To rows that lie densely on the host."""

    def __init__(
        self,
        collator: Collator,
        runtime: CudaRuntime,
        form: GraphForm,
        *,
        runs: torch.Tensor,
        kernels: torch.cuda.Stream,
        host: int,
    ) -> None:
        """host: an address of pinned memory for as many rows as a launch has; it is not touched."""
        super().__init__(collator, runtime, form, runs=runs, kernels=kernels)
        self._host = host
        self._sources = [self._buffer(turn).data_ptr() for turn in range(form.turns)]
        graph = self._capture()
        try:
            self._nodes = self._nodes_in_order(graph)
        except BaseException:
            runtime.destroy_graph(graph)
            raise
        self._instantiate(graph)

    def launch(self, runs: torch.Tensor, host: int) -> torch.cuda.Event:
        """Begins to move the blocks of these runs; gives the moment when they are there.

        runs: (blocks, runs per block) on the GPU. host: where the first row is.
        """
        targets = self._targets(host)
        self._runtime.retarget_copies(
            self._executable, self._nodes, targets, self._sources, self._turn_bytes
        )
        with torch.cuda.stream(self._kernels):
            self._runs.copy_(runs, non_blocking=True)
            return self._run()

    def _give_turns(self, kernels: torch.cuda.Stream, link: torch.cuda.Stream) -> None:
        emptied: list[torch.cuda.Event] = []
        for turn, target in enumerate(self._targets(self._host)):
            if turn >= self._form.buffers:
                kernels.wait_event(emptied[turn - self._form.buffers])
            self._collate(turn)
            link.wait_event(kernels.record_event())
            source, nbytes = self._sources[turn], self._turn_bytes
            self._runtime.copy_one(target, source, nbytes, link.cuda_stream)
            emptied.append(link.record_event())
        kernels.wait_event(emptied[-1])

    def _collate(self, turn: int) -> None:
        runs = self._runs[self._rows(turn)]
        self._collator.launch(runs, self._buffer(turn), out=True, keep=True)

    def _targets(self, host: int) -> list[int]:
        """Where each turn's copy goes."""
        return [host + turn * self._turn_bytes for turn in range(self._form.turns)]

    def _nodes_in_order(self, graph: int) -> list[int]:
        """The copies' nodes, by the turns that they are of."""
        nodes = {self._runtime.copy_target(node): node for node in self._runtime.copy_nodes(graph)}
        return [nodes[target] for target in self._targets(self._host)]


class ToPagesGraph(TurnsGraph):
    """From rows anywhere in pinned host memory, each at a multiple of 16."""

    _form: PullForm

    def __init__(
        self,
        collator: Collator,
        runtime: CudaRuntime,
        form: PullForm,
        *,
        runs: torch.Tensor,
        kernels: torch.cuda.Stream,
    ) -> None:
        super().__init__(collator, runtime, form, runs=runs, kernels=kernels)
        with torch.cuda.stream(kernels):
            self._starts = torch.zeros(self.blocks, dtype=torch.int64, device=self._device)
            self._pull(0, rows=0)
        self._instantiate(self._capture())

    def launch(self, runs: torch.Tensor, starts: torch.Tensor) -> torch.cuda.Event:
        """Begins to move the blocks of these runs; gives the moment when they are there.

        runs: (blocks, runs per block), starts: (blocks,) int64, where each row begins on the host;
        both on the GPU.
        """
        with torch.cuda.stream(self._kernels):
            self._runs.copy_(runs, non_blocking=True)
            self._starts.copy_(starts, non_blocking=True)
            return self._run()

    def _give_turns(self, kernels: torch.cuda.Stream, link: torch.cuda.Stream) -> None:
        emptied: list[torch.cuda.Event] = []
        for turn in range(self._form.turns):
            if turn >= self._form.buffers:
                link.wait_event(emptied[turn - self._form.buffers])
            with torch.cuda.stream(link):
                self._pull(turn, rows=self._per_turn)
            kernels.wait_event(link.record_event())
            self._collate(turn)
            emptied.append(kernels.record_event())

    def _pull(self, turn: int, *, rows: int) -> None:
        row_words = self._collator.form.nbytes // 4
        pull_kernel[(self._form.programs,)](
            self._starts[self._rows(turn)],
            self._buffer(turn).view(torch.int32),
            rows,
            row_words,
            self._form.tile_bytes // 4,
            num_warps=PULL_WARPS,
            num_stages=1,
        )

    def _collate(self, turn: int) -> None:
        runs, programs = self._runs[self._rows(turn)], self._form.scattering
        self._collator.launch(runs, self._buffer(turn), out=False, programs=programs)


def _destroy(runtime: CudaRuntime, graph: int, executable: int) -> None:
    """What was launched runs to its end all the same."""
    runtime.destroy_executable(executable)
    runtime.destroy_graph(graph)
