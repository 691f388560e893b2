"""Decode steps in CUDA graphs: one launch instead of some hundred from Python.

A step of n sequences is captured when it first comes up, and replayed for other tokens, pages and
lengths, which are copied into tensors of fixed address before. What can be captured is a step of
one token a sequence, by kernels whose launches depend on no lengths.
"""

from __future__ import annotations

from collections import OrderedDict

import torch

from kvstore_engines.attention import Batch
from kvstore_engines.config import ModelConfig
from kvstore_engines.kernel_attention import DecodeStep, KernelAttention
from kvstore_engines.models import Model
from kvstore_engines.paged import PagePool
from kvstore_engines.parallel import Parallel
from kvstore_kernels.capturing import uncollected
from kvstore_kernels.decode import DecodeWorkspace

MOST_GRAPHS = 32  # of one model; of more the one that was used longest ago goes
LEAST_PAGES = 64  # columns of a graph's page table, which grows in doublings


def graphed(
    model: Model, attention: object, config: ModelConfig, parallel: Parallel, device: torch.device
) -> Model:
    """The model with its decode steps in graphs, or as it is where they cannot be: without a GPU,
    with routed experts, whose choice the host reads, and with several ranks, whose sums it adds."""
    able = device.type == "cuda" and config.moe is None and parallel.size == 1
    if not able or not isinstance(attention, KernelAttention):
        return model
    return GraphedModel(model, attention)


class GraphedModel:
    """A `Model`; not thread-safe."""

    def __init__(self, model: Model, attention: KernelAttention) -> None:
        """attention: the model's."""
        self._model, self._attention = model, attention
        self._graphs: OrderedDict[tuple[int, int, int], _StepGraph] = OrderedDict()

    def make_pool(self, num_pages: int, block_tokens: int, dtype: torch.dtype) -> PagePool:
        """See `Model.make_pool`."""
        return self._model.make_pool(num_pages, block_tokens, dtype)

    def forward(self, token_ids: torch.Tensor, batch: Batch, pool: PagePool) -> torch.Tensor:
        """See `Model.forward`; the logits are good until the next call."""
        decodes = all(span.tokens == 1 for span in batch.spans)
        if not decodes or self._attention.refuses:
            return self._model.forward(token_ids, batch, pool)
        pages = max(len(span.page_table) for span in batch.spans)
        columns = max(LEAST_PAGES, 1 << (pages - 1).bit_length())
        key = (id(pool), len(batch.spans), columns)
        graph = self._graphs.pop(key, None)
        if graph is None:
            graph = _StepGraph(self._model, self._attention, len(batch.spans), columns, pool)
            if len(self._graphs) >= MOST_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs[key] = graph
        return graph.run(token_ids, batch)


class _StepGraph:
    """A step of so many sequences, of at most so many pages each."""

    def __init__(
        self,
        model: Model,
        attention: KernelAttention,
        sequences: int,
        columns: int,
        pool: PagePool,
    ) -> None:
        self._model, self._attention, self._pool = model, attention, pool
        device = pool.storage.device

        def numbers() -> torch.Tensor:
            return torch.zeros(sequences, dtype=torch.int64, device=device)

        self._token_ids = numbers()
        batch = Batch(numbers(), numbers(), numbers(), ())
        table = torch.zeros((sequences, columns), dtype=torch.int32, device=device)
        lengths = torch.zeros(sequences, dtype=torch.int32, device=device)
        self._step = DecodeStep.whole(batch, table, lengths)
        self._workspace = DecodeWorkspace(max_sequences=sequences, device=device, graphs=True)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits = torch.empty(0)

    def run(self, token_ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        """The logits of a step."""
        self._take(token_ids, batch)
        if self._graph is None:
            return self._first(batch)
        self._graph.replay()
        return self._logits

    def _take(self, token_ids: torch.Tensor, batch: Batch) -> None:
        """Copies a step's numbers to where the graph reads them."""
        mine, given = self._step, DecodeStep.of(batch)
        for there, here in (
            (self._token_ids, token_ids),
            (mine.batch.positions, batch.positions),
            (mine.batch.pages, batch.pages),
            (mine.batch.offsets, batch.offsets),
            (mine.table[:, : given.table.shape[1]], given.table),
            (mine.lengths, given.lengths),
        ):
            there.copy_(here)
        self._workspace.step([span.context_len for span in batch.spans])

    def _first(self, batch: Batch) -> torch.Tensor:
        """One by one, which compiles and makes workspaces; then once more into a graph, unless no
        kernel takes the step."""
        with self._attention.fixed(self._step, self._workspace):
            logits = self._forward(batch)
            if self._attention.refuses:
                return logits
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with the GPU, this one alone is watched.
            with uncollected(), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._logits = self._forward(batch)
        self._graph = graph
        return logits

    def _forward(self, batch: Batch) -> torch.Tensor:
        fixed = self._step.batch
        # Spans tell of how many tokens each is; where these are, the fixed tensors say.
        fixed = Batch(fixed.positions, fixed.pages, fixed.offsets, batch.spans)
        return self._model.forward(self._token_ids, fixed, self._pool)
