"""Decode steps in CUDA graphs: one launch instead of some hundred from Python.

A step of so many sequences is captured when it first comes up, and replayed for other tokens, pages
and lengths, which are copied into tensors of fixed address before. What can be captured is a step
of one token a sequence, by kernels whose launches depend on no lengths. Many sequences share the
graph of some more: its last rows are then of no sequence, and are written nowhere.
"""

from __future__ import annotations

import logging
from collections import OrderedDict

import torch

from kvstore_engines.attention import AttentionBackend, Batch, Span
from kvstore_engines.kernel_attention import DecodeStep, KernelAttention, rows_for
from kvstore_engines.models import Model
from kvstore_engines.paged import PagePool
from kvstore_engines.parallel import Parallel
from kvstore_kernels.capturing import captured
from kvstore_kernels.decode import DecodeWorkspace

log = logging.getLogger(__name__)
MOST_GRAPHS = 32  # of one model; of more the one that was used longest ago goes
LEAST_PAGES = 64  # columns of a graph's page table, which grows in doublings
NOWHERE = -1  # page of a row that is of no sequence


def graphed(
    model: Model, attention: AttentionBackend, parallel: Parallel, device: torch.device
) -> Model:
    """The model with its decode steps in graphs, or as it is where they cannot be: without a GPU,
    with an attention that waits for it, and with several ranks, whose sums the host adds."""
    if device.type != "cuda" or parallel.size > 1 or not isinstance(attention, KernelAttention):
        return model
    return GraphedModel(model, attention)


class GraphedModel:
    """A `Model`; not thread-safe.

    Where a capture fails, the log says so, and from then on steps are launched one by one.
    """

    def __init__(self, model: Model, attention: KernelAttention) -> None:
        """attention: the model's."""
        self._model, self._attention = model, attention
        self._graphs: OrderedDict[tuple[int, int, int], _StepGraph] = OrderedDict()
        self._able = True

    def make_pool(self, num_pages: int, block_tokens: int, dtype: torch.dtype) -> PagePool:
        """See `Model.make_pool`."""
        return self._model.make_pool(num_pages, block_tokens, dtype)

    def forward(self, token_ids: torch.Tensor, batch: Batch, pool: PagePool) -> torch.Tensor:
        """See `Model.forward`; the logits are good until the next call."""
        decodes = all(span.tokens == 1 for span in batch.spans)
        if not decodes or not self._able:
            return self._model.forward(token_ids, batch, pool)
        pages = max(len(span.page_table) for span in batch.spans)
        columns = max(LEAST_PAGES, 1 << (pages - 1).bit_length())
        key = (id(pool), rows_for(len(batch.spans)), columns)
        graph = self._graphs.pop(key, None) or self._made(*key[1:], pool)
        logits = graph.run(token_ids, batch)
        self._able = graph.captured
        if graph.captured:
            self._graphs[key] = graph
        return logits

    def _made(self, rows: int, columns: int, pool: PagePool) -> _StepGraph:
        if len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        return _StepGraph(self._model, self._attention, rows, columns, pool)


class _StepGraph:
    """A step of at most `rows` sequences, of at most `columns` pages each."""

    def __init__(
        self, model: Model, attention: KernelAttention, rows: int, columns: int, pool: PagePool
    ) -> None:
        self._model, self._attention, self._pool = model, attention, pool
        self._rows, device = rows, pool.storage.device

        def numbers() -> torch.Tensor:
            return torch.zeros(rows, dtype=torch.int64, device=device)

        self._token_ids = numbers()
        table = torch.zeros((rows, columns), dtype=torch.int32, device=device)
        lengths = torch.zeros(rows, dtype=torch.int32, device=device)
        # Spans tell of how many tokens each is; where these are, the fixed tensors say.
        spans = tuple(Span(row, 1, table[row, :1].long(), 1) for row in range(rows))
        batch = Batch(numbers(), torch.full_like(self._token_ids, NOWHERE), numbers(), spans)
        self._step = DecodeStep.whole(batch, table, lengths)
        self._workspace = DecodeWorkspace(max_sequences=rows, device=device, graphs=True)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    @property
    def captured(self) -> bool:
        """Whether `run` replays a graph."""
        return self._graph is not None

    def run(self, token_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The logits of a step; at the first time the step is captured, if it can be."""
        self._take(token_ids, batch)
        if self._graph is None:
            self._first()
        if self._graph is None:
            return self._model.forward(token_ids, batch, self._pool)
        self._graph.replay()
        return self._logits[: len(batch.spans)]

    def _take(self, token_ids: torch.Tensor, batch: Batch) -> None:
        """Copies a step's numbers to where the graph reads them."""
        mine, given, sequences = self._step, DecodeStep.of(batch), len(batch.spans)
        for there, here in (
            (self._token_ids, token_ids),
            (mine.batch.positions, batch.positions),
            (mine.batch.pages, batch.pages),
            (mine.batch.offsets, batch.offsets),
            (mine.table[:, : given.table.shape[1]], given.table),
            (mine.lengths, given.lengths),
        ):
            there[:sequences].copy_(here)
        if sequences < self._rows:
            mine.batch.pages[sequences:].fill_(NOWHERE)
            mine.lengths[sequences:].zero_()
        nobody = [0] * (self._rows - sequences)
        self._workspace.step([span.context_len for span in batch.spans] + nobody)

    def _first(self) -> None:
        """One by one, which compiles and makes workspaces; then once more into a graph, unless no
        kernel takes the step."""
        with self._attention.fixed(self._step, self._workspace):
            self._forward()
            if self._attention.refuses:
                return
            try:
                self._capture()
            except RuntimeError as error:
                log.warning("a decode step was not captured, it is launched anew: %s", error)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        with captured(graph, self._token_ids.device):
            self._logits = self._forward()
        self._graph = graph

    def _forward(self) -> torch.Tensor:
        return self._model.forward(self._token_ids, self._step.batch, self._pool)
