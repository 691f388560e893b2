"""Attention with masks over pages, compiled for a GPU: every case a hundred times, beside float64.

Each case compiles for some seconds, a minute and a half in all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.flex import flex_attention_paged
from kvstore_kernels.flex_masks import (
    alibi,
    alibi_slopes,
    causal,
    chained,
    documents,
    every,
    sliding_window,
    soft_cap,
)
from kvstore_kernels.flex_plan import plan_pages, unit_of
from kvstore_kernels.flex_reference import flex_reference

TIMES = 100
MAX_ERROR = 5e-3  # of float16 and bfloat16, relative
STALE = 1e4  # what pages hold behind a sequence's end: any finite number
Mods = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A batch, and what is done to its scores."""

    name: str
    lengths: tuple[int, ...]
    mods: Callable[[], Mods] = dict
    queries: int = 1
    heads: int = 8
    kv_heads: int = 2
    dim: int = 128
    page_tokens: int = 16
    layers: int = 1
    tokens_first: bool = False
    dtype: torch.dtype = torch.bfloat16

    @property
    def width(self) -> int:
        """Pages of the table."""
        return -(-max(self.lengths) // self.page_tokens) + 1


def in_documents() -> Mods:
    ids = (torch.arange(4096, device="cuda") // 150).expand(8, -1).contiguous()
    return {"mask_mod": every(causal, documents(ids))}


def windowed(tokens: int) -> Callable[[], Mods]:
    return lambda: {"mask_mod": sliding_window(tokens)}


def sloped(heads: int) -> Callable[[], Mods]:
    return lambda: {"mask_mod": causal, "score_mod": alibi(alibi_slopes(heads, "cuda"))}


def capped_and_sloped() -> Mods:
    return {"score_mod": chained(soft_cap(5.0), alibi(alibi_slopes(8, "cuda")))}


RAGGED = (700, 0, 16, 1, 2049)
CASES = [
    Case("nothing", RAGGED, layers=3),
    Case("window", RAGGED, windowed(300), layers=3),
    Case("documents", RAGGED, in_documents, tokens_first=True),
    Case("soft cap and alibi", RAGGED, capped_and_sloped),
    Case("pages of 64", RAGGED, sloped(16), heads=16, page_tokens=64),
    Case("pages of 32, groups of 3", RAGGED, sloped(9), heads=9, kv_heads=3, dim=64,
         page_tokens=32, dtype=torch.float16),
    Case("4 new tokens", (700, 3, 16, 1, 2049), windowed(300), queries=4),
    Case("16 new tokens", (700, 3, 16, 1, 2049), sloped(16), queries=16, heads=16),
    Case("prefill", (300, 0, 150, 900), lambda: {"mask_mod": causal}, queries=300, layers=3),
    Case("prefill, window", (300, 7, 900), windowed(170), queries=200, page_tokens=64),
    Case("prefill, documents", (300, 7, 900), in_documents, queries=200),
    Case("pages of 5", (300, 7, 90), sloped(8), page_tokens=5),
]  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """Inputs of one call."""

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> Batch:
        torch.manual_seed(seed)
        pages = len(case.lengths) * case.width + 3
        order = torch.randperm(pages, device="cuda")[: len(case.lengths) * case.width]
        k, v = pools(case, pages)
        lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda")
        table = order.view(len(case.lengths), case.width).int()
        spoil_ends(case, (k, v), table)
        size = (len(case.lengths), case.queries, case.heads, case.dim)
        return cls(case, torch.randn(size, device="cuda").to(case.dtype), k, v, table, lengths)

    def ours(self, **options: Any) -> torch.Tensor:
        return flex_attention_paged(self.q, self.k, self.v, self.table, self.lengths, **options)

    def error(self, out: torch.Tensor, **options: Any) -> float:
        """Relative; NaN where anything is."""
        want = flex_reference(self.q, self.k, self.v, self.table, self.lengths, **options)
        return float((out.double() - want).norm() / want.norm())


def pools(case: Case, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    if case.tokens_first:
        shape = (2, pages, case.page_tokens, case.kv_heads, case.dim)
        k, v = torch.randn(shape, device="cuda").to(case.dtype).transpose(2, 3)
        return k, v
    shape = (pages, case.kv_heads, case.layers, 2, case.page_tokens, case.dim)
    k, v = torch.randn(shape, device="cuda").to(case.dtype).select(2, case.layers - 1).unbind(2)
    return k, v


def spoil_ends(case: Case, both: tuple[torch.Tensor, ...], table: torch.Tensor) -> None:
    for sequence, length in enumerate(case.lengths):
        for pool in both:
            last, rest = divmod(length, case.page_tokens)
            pool[table[sequence, last], :, rest:] = STALE


def spoil_free_memory() -> None:
    """What torch hands out next for outputs and partial results is NaN."""
    for size in (1 << 12, 1 << 16, 1 << 20, 1 << 24):
        torch.full((size,), torch.nan, device="cuda")


def graphs() -> int:
    """How many torch has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_right_and_the_same_a_hundred_times(case: Case, gpu: torch.device) -> None:
    batch, mods = Batch.of(case), case.mods()
    spoil_free_memory()
    out = batch.ours(**mods)
    assert batch.error(out, **mods) <= MAX_ERROR
    assert not out[batch.lengths == 0].any()
    known = graphs()
    for _ in range(TIMES):
        spoil_free_memory()
        assert torch.equal(batch.ours(**mods), out)
    other = Batch.of(replace(case, lengths=case.lengths[::-1]), seed=1)
    assert other.error(other.ours(**case.mods()), **mods) <= MAX_ERROR
    assert graphs() == known, "lengths, tables or masks made anew have compiled something"


def test_a_graph_is_replayed_with_other_pages_and_lengths(gpu: torch.device) -> None:
    case = CASES[1]
    batch, mods = Batch.of(case), case.mods()
    batch.ours(**mods)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = batch.ours(**mods)
    for seed in range(5):
        lengths = torch.tensor(case.lengths, dtype=torch.int32, device="cuda").roll(seed)
        other = Batch.of(replace(case, lengths=tuple(lengths.tolist())), seed)
        for mine, its in zip(vars(batch).values(), vars(other).values(), strict=True):
            if isinstance(mine, torch.Tensor):
                mine.copy_(its)
        out.fill_(torch.nan)
        graph.replay()
        assert batch.error(out, **mods) <= MAX_ERROR


def test_ragged_prefill(gpu: torch.device) -> None:
    case = CASES[8]
    batch = Batch.of(case)
    mods: Mods = {**case.mods(), "query_lengths": torch.tensor([300, 0, 1, 129], device="cuda")}
    out = batch.ours(longest=900, **mods)
    assert batch.error(out, **mods) <= MAX_ERROR
    for sequence, rows in enumerate([300, 0, 1, 129]):
        assert not out[sequence, rows:].any()


def test_pages_beyond_32_bits(gpu: torch.device) -> None:
    """A pool of 4.6 GB, of whose elements there are more than 2^31, and sequences at its end."""
    case = Case("large", (700, 0, 2049, 33), sloped(32), heads=32, kv_heads=8)
    pages, used = 70_000, len((700, 0, 2049, 33)) * case.width
    pool = torch.empty((pages, 8, 2, 16, 128), dtype=torch.bfloat16, device="cuda")
    assert pool.numel() > 2**31
    small = Batch.of(case)
    pool[pages - used - 3 :, :, 0].copy_(small.k)
    pool[pages - used - 3 :, :, 1].copy_(small.v)
    k, v = pool.unbind(2)
    assert unit_of(k, case.width) == 16
    batch = replace(small, k=k, v=v, table=small.table + (pages - used - 3))
    mods = case.mods()
    out = batch.ours(**mods)
    assert batch.error(out, **mods) <= MAX_ERROR


def test_page_numbers_outside_of_the_pool_never_lead_outside(gpu: torch.device) -> None:
    batch = Batch.of(CASES[0])
    wild = batch.table.clone()
    wild[0, 3], wild[4, 5] = 2**31 - 1, -(2**31)
    with pytest.raises(KernelArgumentError, match="page_table"):
        flex_attention_paged(batch.q, batch.k, batch.v, wild, batch.lengths, check=True)
    out = flex_attention_paged(batch.q, batch.k, batch.v, wild, batch.lengths)
    torch.cuda.synchronize()
    untouched = [1, 2, 3]
    assert torch.equal(out[untouched], batch.ours()[untouched])


def test_one_plan_serves_all_layers(gpu: torch.device) -> None:
    case = CASES[0]
    batch = Batch.of(case)
    plan = plan_pages(batch.k, batch.table, batch.lengths)
    again = replace(batch, k=batch.v, v=batch.k)
    for each in (batch, again):
        assert each.error(each.ours(plan=plan)) <= MAX_ERROR
