"""FlashInfer's latent attention over the same pages, where it is installed.

Its kernels are compiled at their first use, which takes a minute each and needs nvcc.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch

from kvstore_kernels.mla_reference import RANK, WIDTH

SPACE_BYTES = 256 << 20
BACKENDS = ("fa2", "fa3")
Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Latents:
    """What one call attends with and to. q: (sequences, q_tokens, heads, 576). pages: (pages,
    page_tokens, 576). table: (sequences, most pages) int32, for sequences of these lengths. out:
    (sequences, q_tokens, heads, 512), which is written."""

    q: torch.Tensor
    pages: torch.Tensor
    table: torch.Tensor
    lengths: Sequence[int]
    scale: float
    out: torch.Tensor


def backends() -> dict[str, Callable[[Latents], Run]]:
    """By name, what plans and gives a call that can be captured in a graph. Raises ImportError
    without FlashInfer."""
    library = import_module("flashinfer.mla")
    space = torch.empty(SPACE_BYTES, dtype=torch.uint8, device="cuda")  # calls follow each other
    return {name: partial(_planned, library, space, name) for name in BACKENDS}


def _planned(library: Any, space: torch.Tensor, backend: str, given: Latents) -> Run:
    sequences, q_tokens, heads, _ = given.q.shape
    page_tokens = given.pages.shape[1]
    needed = [-(-length // page_tokens) for length in given.lengths]
    numbers = torch.cat([row[:n] for row, n in zip(given.table, needed, strict=True)])
    wrapper = library.BatchMLAPagedAttentionWrapper(space, backend=backend)
    wrapper.plan(
        qo_indptr=torch.arange(sequences + 1, dtype=torch.int32) * q_tokens,
        kv_indptr=torch.tensor([0, *needed]).cumsum(0).int(),
        kv_indices=numbers,
        kv_len_arr=torch.tensor(given.lengths, dtype=torch.int32),
        num_heads=heads,
        head_dim_ckv=RANK,
        head_dim_kpe=WIDTH - RANK,
        page_size=page_tokens,
        causal=q_tokens > 1,
        sm_scale=given.scale,
        q_data_type=given.q.dtype,
        kv_data_type=given.pages.dtype,
    )
    q = given.q.flatten(0, 1)
    return partial(
        wrapper.run,
        q_nope=q[..., :RANK],
        q_pe=q[..., RANK:],
        ckv_cache=given.pages[..., :RANK],
        kpe_cache=given.pages[..., RANK:],
        out=given.out.flatten(0, 1),
    )
