"""FlashInfer's decode attention over the same pages, where it is installed.

Its kernels are compiled at their first use, which takes a minute and needs nvcc. Its fa3 is left
out: it takes 2.5 to 10 times as long as these, and five minutes to compile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

from kvstore_kernels.gqa_form import GqaForm

SPACE_BYTES = 256 << 20
BACKENDS = ("fa2", "persistent")
Run = Callable[[], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Pages:
    """What one call attends to. k, v: (pages, kv_heads, page_tokens, dim). table: (sequences, most
    pages) int32, for sequences of these lengths."""

    form: GqaForm
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    lengths: Sequence[int]

    def indices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each sequence's pages begin, (sequences + 1,) int32 on the host, and all pages, one
        sequence after the other, int32."""
        needed = [-(-length // self.form.page_tokens) for length in self.lengths]
        ends = torch.tensor([0, *needed]).cumsum(0).int()
        return ends, torch.cat([row[:n] for row, n in zip(self.table, needed, strict=True)])


def backends() -> dict[str, Callable[[torch.Tensor, Pages], Run]]:
    """By name, what plans for queries (sequences, heads, dim) and gives a call that can be captured
    in a graph. Raises ImportError without FlashInfer."""
    library = import_module("flashinfer")
    return dict(
        zip(BACKENDS, (partial(_tensor_cores, library), partial(_persistent, library)), strict=True)
    )


def _tensor_cores(library: Any, q: torch.Tensor, pages: Pages) -> Run:
    form = pages.form
    wrapper = library.BatchDecodeWithPagedKVCacheWrapper(
        _space(), "HND", use_tensor_cores=True, backend="fa2"
    )
    last = [(length - 1) % form.page_tokens + 1 for length in pages.lengths]
    wrapper.plan(
        *pages.indices(),
        torch.tensor(last, dtype=torch.int32),
        form.heads,
        form.kv_heads,
        form.head_dim,
        form.page_tokens,
        q_data_type=form.dtype,
        kv_data_type=form.kv_dtype,
    )
    run: Run = partial(wrapper.run, q, (pages.k, pages.v))
    return run


@cache
def _space() -> torch.Tensor:
    """For partial results; calls follow each other."""
    return torch.empty(SPACE_BYTES, dtype=torch.uint8, device="cuda")


def _persistent(library: Any, q: torch.Tensor, pages: Pages) -> Run:
    form = pages.form
    wrapper = library.BatchAttention(kv_layout="HND")
    ends, indices = pages.indices()
    wrapper.plan(
        torch.arange(len(pages.lengths) + 1, dtype=torch.int32, device="cuda"),
        ends.cuda(),
        indices,
        torch.tensor(pages.lengths, dtype=torch.int32, device="cuda"),
        form.heads,
        form.kv_heads,
        form.head_dim,
        form.head_dim,
        form.page_tokens,
        causal=True,
        q_data_type=form.dtype,
        kv_data_type=form.kv_dtype,
    )
    return lambda: wrapper.run(q, (pages.k, pages.v))[0]
