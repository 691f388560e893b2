"""Turns of a transfer to the host in a CUDA graph: captured once, launched again for other blocks.

Given one by one, a turn through a buffer costs the host 0.1 ms: a kernel, a copy, two events and
two waits. Here many turns are one launch, and all that is told anew is where on the host each copy
goes. So two buffers of 4 MiB have the link busy; and these stay in the L2, from which the copies
then come. The memory, on which a decode depends, sees the reading of the pages alone: a decode is
slowed half as much. The other way nothing is gained, since copies from the host slow it whatever
they are read by.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch

from kvstore_kernels.capturing import own_stream, undisturbed
from kvstore_kernels.collate import Collator
from kvstore_kernels.cuda_runtime import CudaRuntime


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


class TurnsGraph:
    """A number of blocks from their pages to rows that lie densely on the host.

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
        host: int,
    ) -> None:
        """runs: some of the dtype and shape that launches will have. kernels: the stream of
        launches. host: an address of pinned memory for as many rows as a launch has; it is not
        touched."""
        self._collator, self._runtime, self._form = collator, runtime, form
        self._kernels = kernels
        nbytes, device = collator.form.nbytes, collator.table.device
        self._per_turn = form.blocks_per_turn(nbytes)
        self._turn_bytes = self._per_turn * nbytes
        self.blocks = form.turns * self._per_turn
        with torch.cuda.stream(kernels):
            shape = (form.buffers, self._per_turn, nbytes)
            self._buffers = torch.empty(shape, dtype=torch.uint8, device=device)
            # Runs that do not exist: the kernel is compiled now, and no page is read.
            self._runs = torch.full((self.blocks, runs.shape[1]), -1, dtype=runs.dtype).to(device)
            self._collate(0)
        origin = self._buffers.data_ptr()
        self._sources = [
            origin + turn % form.buffers * self._turn_bytes for turn in range(form.turns)
        ]
        graph = self._captured(host)
        try:
            self._nodes = self._nodes_in_order(graph, host)
            self._executable = runtime.instantiate(graph)
        except BaseException:
            runtime.destroy_graph(graph)
            raise
        self._end = weakref.finalize(self, _destroy, runtime, graph, self._executable)
        self._end.atexit = False

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
            self._runtime.launch_graph(self._executable, self._kernels.cuda_stream)
            done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._kernels)
        return done

    def _captured(self, host: int) -> int:
        # On streams of the captures' own: what anybody else gives these would be captured too.
        device = self._collator.table.device
        kernels, copies = own_stream(device), own_stream(device, 1)
        with undisturbed():
            self._runtime.begin_capture(kernels.cuda_stream)
            try:
                with torch.cuda.stream(kernels):
                    self._give_turns(kernels, copies, host)
            finally:  # or the stream would be of no use any more
                graph = self._runtime.end_capture(kernels.cuda_stream)
        return graph

    def _give_turns(self, kernels: torch.cuda.Stream, copies: torch.cuda.Stream, host: int) -> None:
        emptied: list[torch.cuda.Event] = []
        for turn, target in enumerate(self._targets(host)):
            if turn >= self._form.buffers:
                kernels.wait_event(emptied[turn - self._form.buffers])
            self._collate(turn)
            copies.wait_event(kernels.record_event())
            self._runtime.copy_each(
                np.array([target]),
                np.array([self._sources[turn]]),
                np.array([self._turn_bytes]),
                copies.cuda_stream,
            )
            emptied.append(copies.record_event())
        kernels.wait_event(emptied[-1])

    def _collate(self, turn: int) -> None:
        first = turn * self._per_turn
        runs = self._runs[first : first + self._per_turn]
        self._collator.launch(runs, self._buffers[turn % self._form.buffers], out=True, keep=True)

    def _targets(self, host: int) -> list[int]:
        """Where each turn's copy goes."""
        return [host + turn * self._turn_bytes for turn in range(self._form.turns)]

    def _nodes_in_order(self, graph: int, host: int) -> list[int]:
        """The copies' nodes, by the turns that they are of."""
        nodes = {self._runtime.copy_target(node): node for node in self._runtime.copy_nodes(graph)}
        return [nodes[target] for target in self._targets(host)]


def _destroy(runtime: CudaRuntime, graph: int, executable: int) -> None:
    """What was launched runs to its end all the same."""
    runtime.destroy_executable(executable)
    runtime.destroy_graph(graph)
