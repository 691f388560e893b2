"""Turns of a transfer in a CUDA graph: captured once, launched again for other blocks and rows.

Given one by one, a turn through a buffer costs the host 0.1 ms: a kernel, a copy, two events and
two waits. Here some turns are one launch, and all that is told anew is where on the host each copy
goes. So buffers can be small and still have the link busy; and small ones stay in the L2, from
which the copies then come: the memory, on which a decode depends, sees the pages' bytes alone.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import numpy as np
import torch

from kvstore_kernels.collate import Collator
from kvstore_kernels.cuda_runtime import CudaRuntime


@dataclass(frozen=True, slots=True)
class GraphForm:
    """turns: that one launch has. buffers, buffer_bytes: that they share; a buffer has room for at
    least one block."""

    turns: int = 16
    buffers: int = 2
    buffer_bytes: int = 4 << 20


class TurnsGraph:
    """A number of blocks between their pages and rows that lie densely on the host.

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
        out: bool,
    ) -> None:
        """runs: some of the dtype and shape that launches will have. kernels: the stream of
        launches. host: an address of pinned memory for as many rows as a launch has; it is not
        touched. out: to the host."""
        self._collator, self._runtime, self._form = collator, runtime, form
        self._kernels, self._out = kernels, out
        nbytes, device = collator.form.nbytes, collator.table.device
        self._per_turn = per_turn = max(1, form.buffer_bytes // nbytes)
        self._turn_bytes = per_turn * nbytes
        self.blocks = form.turns * per_turn
        self._copies: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(kernels):
            shape = (form.buffers, per_turn, nbytes)
            self._buffers = torch.empty(shape, dtype=torch.uint8, device=device)
            # Runs that do not exist: the kernel is compiled now, and no page is written.
            self._runs = torch.full((self.blocks, runs.shape[1]), -1, dtype=runs.dtype).to(device)
            self._collate(0)
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
        for turn, node in enumerate(self._nodes):
            there = host + turn * self._turn_bytes
            self._runtime.retarget_copy(
                self._executable, node, *self._ends(there, turn), self._turn_bytes
            )
        with torch.cuda.stream(self._kernels):
            self._runs.copy_(runs, non_blocking=True)
            self._runtime.launch_graph(self._executable, self._kernels.cuda_stream)
            done: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(self._kernels)
        return done

    def _captured(self, host: int) -> int:
        runtime, stream = self._runtime, self._kernels.cuda_stream
        runtime.begin_capture(stream)
        try:
            with torch.cuda.stream(self._kernels):
                self._give_turns(host)
        finally:  # or the stream would be of no use any more
            graph = runtime.end_capture(stream)
        return graph

    def _give_turns(self, host: int) -> None:
        self._copies.wait_event(self._kernels.record_event())
        lanes = (self._kernels, self._copies)
        filling, draining = lanes if self._out else lanes[::-1]
        emptied: list[torch.cuda.Event] = []
        for turn in range(self._form.turns):
            if turn >= self._form.buffers:
                filling.wait_event(emptied[turn - self._form.buffers])
            for lane in (filling, draining):
                if lane is draining:
                    draining.wait_event(filling.record_event())
                if lane is self._kernels:
                    self._collate(turn)
                else:
                    self._copy(host + turn * self._turn_bytes, turn)
            emptied.append(draining.record_event())
        self._kernels.wait_event(self._copies.record_event())

    def _collate(self, turn: int) -> None:
        first = turn * self._per_turn
        runs = self._runs[first : first + self._per_turn]
        rows = self._buffers[turn % self._form.buffers]
        self._collator.launch(runs, rows, out=self._out, keep=self._out)

    def _copy(self, there: int, turn: int) -> None:
        target, source = self._ends(there, turn)
        size = np.array([self._turn_bytes])
        stream = self._copies.cuda_stream
        self._runtime.copy_each(np.array([target]), np.array([source]), size, stream)

    def _ends(self, there: int, turn: int) -> tuple[int, int]:
        """(target, source) of a turn's copy."""
        here = self._buffers.data_ptr() + turn % self._form.buffers * self._turn_bytes
        return (there, here) if self._out else (here, there)

    def _nodes_in_order(self, graph: int, host: int) -> list[int]:
        """The copies' nodes, by the turns that they are of."""
        nodes = {}
        for node in self._runtime.copy_nodes(graph):
            target, source = self._runtime.copy_ends(node)
            there = target if self._out else source
            nodes[(there - host) // self._turn_bytes] = node
        return [nodes[turn] for turn in range(self._form.turns)]


def _destroy(runtime: CudaRuntime, graph: int, executable: int) -> None:
    """What was launched runs to its end all the same."""
    runtime.destroy_executable(executable)
    runtime.destroy_graph(graph)
