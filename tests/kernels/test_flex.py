"""Attention with masks over pages, by the graphs that a GPU compiles, beside float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch._dynamo.utils import counters

from kvstore_kernels import flex, flex_graphs, flex_plan
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.flex import Options, flex_attention_paged, options_for
from kvstore_kernels.flex_masks import (
    Band,
    alibi,
    alibi_slopes,
    band_of,
    banded,
    causal,
    chained,
    documents,
    every,
    needed_for_last,
    sliding_window,
    soft_cap,
)
from kvstore_kernels.flex_plan import as_sequence, band_blocks, plan_pages, unit_of
from kvstore_kernels.flex_reference import flex_reference

DIM = 16
WIDTH = 6  # pages of a table
Pools = tuple[torch.Tensor, torch.Tensor]


def tokens_first(pages: int, heads: int, tokens: int) -> Pools:
    """Two pools [pages, tokens, heads, dim]."""
    k, v = torch.randn(2, pages, tokens, heads, DIM)
    return k.transpose(1, 2), v.transpose(1, 2)


def heads_first(pages: int, heads: int, tokens: int) -> Pools:
    """Two pools [pages, heads, tokens, dim]."""
    k, v = torch.randn(2, pages, heads, tokens, DIM)
    return k, v


def one_layer(pages: int, heads: int, tokens: int) -> Pools:
    """The middle one of [pages, heads, layers, 2, tokens, dim], as the thin engines have it."""
    k, v = torch.randn(pages, heads, 3, 2, tokens, DIM).select(2, 1).unbind(2)
    return k, v


def odd_rows(pages: int, heads: int, tokens: int) -> Pools:
    """Rows that no wide load is aligned to, and so no blocks of a sequence."""
    k, v = torch.randn(2, pages, heads, tokens, DIM + 3)[..., 1 : 1 + DIM]
    return k, v


def pages_last(pages: int, heads: int, tokens: int) -> Pools:
    """[heads, tokens, pages, dim], whose pages are in no piece."""
    k, v = torch.randn(2, heads, tokens, pages, DIM).permute(0, 3, 1, 2, 4)
    return k, v


@dataclass(frozen=True)
class Batch:
    """Inputs of one call."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    table: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def of(
        cls,
        lengths: list[int],
        pool: Callable[[int, int, int], Pools] = heads_first,
        *,
        heads: int = 4,
        kv_heads: int = 2,
        queries: int = 1,
        page_tokens: int = 16,
        seed: int = 0,
    ) -> Batch:
        torch.manual_seed(seed)
        batch = len(lengths)
        pages = batch * WIDTH + 3
        k, v = pool(pages, kv_heads, page_tokens)
        return cls(
            torch.randn(batch, queries, heads, DIM),
            k,
            v,
            torch.randperm(pages)[: batch * WIDTH].view(batch, WIDTH).int(),
            torch.tensor(lengths, dtype=torch.int32),
        )

    def ours(self, **options: Any) -> torch.Tensor:
        return flex_attention_paged(self.q, self.k, self.v, self.table, self.lengths, **options)

    def reference(self, **options: Any) -> torch.Tensor:
        return flex_reference(self.q, self.k, self.v, self.table, self.lengths, **options)

    def check(self, **options: Any) -> torch.Tensor:
        out = self.ours(**options)
        assert out.shape == self.q.shape
        torch.testing.assert_close(out.double(), self.reference(**options), atol=2e-6, rtol=1e-5)
        return out


def some_documents(sequences: int) -> torch.Tensor:
    """Of 7 tokens each, for as many tokens as a table has room for."""
    return (torch.arange(WIDTH * 16) // 7).expand(sequences, -1).contiguous()


MODS: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing": dict,
    "causal": lambda: {"mask_mod": causal},
    "window": lambda: {"mask_mod": sliding_window(20)},
    "documents": lambda: {"mask_mod": every(causal, documents(some_documents(4)))},
    "alibi": lambda: {"mask_mod": causal, "score_mod": alibi(alibi_slopes(4))},
    "chained": lambda: {"score_mod": chained(soft_cap(2.0), alibi(alibi_slopes(4)))},
}


@pytest.mark.parametrize("mods", MODS)
def test_one_query_over_pages_in_place(mods: str) -> None:
    Batch.of([33, 0, 16, 81], one_layer).check(**MODS[mods]())


@pytest.mark.parametrize("mods", ["nothing", "window", "documents", "chained"])
def test_several_queries_over_pages_in_place(mods: str) -> None:
    # The third sequence is shorter than it has queries.
    Batch.of([33, 70, 2, 81], tokens_first, queries=4).check(**MODS[mods]())


@pytest.mark.parametrize("mods", ["nothing", "causal", "documents", "alibi"])
def test_many_queries_over_gathered_pages(mods: str) -> None:
    Batch.of([60, 45, 3, 96], queries=45).check(**MODS[mods]())


@pytest.mark.parametrize(
    ("pool", "page_tokens"), [(odd_rows, 16), (pages_last, 16), (heads_first, 5)]
)
def test_pages_that_are_no_blocks_are_gathered(
    pool: Callable[[int, int, int], Pools], page_tokens: int
) -> None:
    batch = Batch.of([30, 0, 7], pool, page_tokens=page_tokens)
    assert unit_of(batch.k, WIDTH) == 0
    batch.check(mask_mod=causal)


def test_groups_that_are_no_power_of_two() -> None:
    batch = Batch.of([33, 90], heads=6, page_tokens=48)
    batch.check(score_mod=alibi(alibi_slopes(6)))


def test_a_query_a_sequence_may_come_without_its_dimension() -> None:
    batch = Batch.of([33, 90])
    out = flex_attention_paged(batch.q[:, 0], batch.k, batch.v, batch.table, batch.lengths)
    assert torch.equal(out, batch.ours()[:, 0])


@pytest.mark.parametrize("queries", [1, 3, 40])
def test_rows_that_are_no_queries_give_zeros(queries: int) -> None:
    batch = Batch.of([40, 50], queries=queries)
    counts = torch.tensor([queries - 1, queries], dtype=torch.int64)
    out = batch.check(query_lengths=counts, mask_mod=causal)
    assert not out[0, queries - 1 :].any()


def test_mods_of_a_caller_see_positions() -> None:
    bias = torch.randn(4, WIDTH * 16)
    starts = torch.tensor([3, 0])

    def score_mod(score: Any, batch: Any, head: Any, query: Any, key: Any) -> Any:
        return score + bias[head, query - key]

    def mask_mod(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return (key >= starts[batch]) & ((key + head) % 3 != 0)

    Batch.of([33, 90], tokens_first).check(score_mod=score_mod, mask_mod=every(causal, mask_mod))


def test_a_query_that_sees_no_key_gives_zeros() -> None:
    out = Batch.of([33, 90]).check(mask_mod=lambda b, h, q, k: (h > 0) & (k >= 0))
    assert not out[:, :, 0].any()
    assert out[:, :, 1:].all()


def test_scale() -> None:
    Batch.of([33, 90]).check(scale=0.5)


def test_bfloat16() -> None:
    batch = Batch.of([33, 90])
    rounded = replace(batch, q=batch.q.bfloat16(), k=batch.k.bfloat16(), v=batch.v.bfloat16())
    out, want = rounded.ours(mask_mod=causal), rounded.reference(mask_mod=causal)
    assert out.dtype is torch.bfloat16
    assert float((out.double() - want).norm() / want.norm()) < 1e-2


def test_sequences_may_share_pages_and_have_them_elsewhere() -> None:
    batch = Batch.of([64, 64])
    batch.table[1, :4] = batch.table[0, [2, 0, 3, 1]]
    batch.check(score_mod=alibi(alibi_slopes(4)))


def test_stale_numbers_behind_the_end_do_not_matter() -> None:
    batch = Batch.of([33, 1])
    want = batch.reference()
    for pool in (batch.k, batch.v):
        for sequence, length in enumerate([33, 1]):
            page = batch.table[sequence, length // 16].long()
            pool[page, :, length % 16 :] = 1e30
    torch.testing.assert_close(batch.ours().double(), want, atol=2e-6, rtol=1e-5)


def test_stale_nans_do_not_matter_where_pages_are_gathered() -> None:
    batch = Batch.of([33, 1], queries=33)
    want = batch.reference(mask_mod=causal)
    for pool in (batch.k, batch.v):
        pool[batch.table[0, 2].long(), :, 1:] = torch.nan
    torch.testing.assert_close(batch.ours(mask_mod=causal).double(), want, atol=2e-6, rtol=1e-5)


def test_longest_keeps_the_width_that_is_gathered() -> None:
    batch = Batch.of([60, 45], queries=45)
    out = batch.ours(mask_mod=causal, longest=60)
    want = batch.reference(mask_mod=causal)
    torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)


def graphs() -> int:
    """How many torch has compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.parametrize("queries", [1, 40])
def test_neither_lengths_nor_tables_nor_masks_made_anew_compile_anything(queries: int) -> None:
    def step(lengths: list[int], seed: int) -> None:
        ids = some_documents(2) + seed
        mods = {"mask_mod": every(sliding_window(30), documents(ids)), "score_mod": soft_cap(3.0)}
        Batch.of(lengths, queries=queries, seed=seed).check(**mods)

    step([60, 45], 0)
    known = graphs()
    for seed, lengths in enumerate([[61, 45], [96, 41], [40, 41]], start=1):
        step(lengths, seed)
    assert graphs() == known


def test_more_masks_than_torch_compiles_of_one_function() -> None:
    limit = torch._dynamo.config.recompile_limit
    known = graphs()
    for window in range(1, limit + 3):
        Batch.of([33, 0]).check(mask_mod=sliding_window(window))
    assert graphs() == known + limit + 2


def test_few_lengths_of_prefill_compile() -> None:
    sizes = {flex._gathered_pages(tokens, 16) for tokens in range(1, 8193)}
    rows = {flex_plan.padded_rows(queries) for queries in range(1, 8193)}
    assert sorted(sizes) == [8 << i for i in range(7)]
    assert sorted(rows) == [128 << i for i in range(7)]
    assert all(flex._gathered_pages(100, tokens) * tokens % 128 == 0 for tokens in (1, 5, 16, 48))


def test_one_plan_serves_all_layers() -> None:
    layers = torch.randn(15, 2, 3, 2, 16, DIM)
    batch = Batch.of([33, 90])
    plan = plan_pages(layers[:, :, 0, 0], batch.table, batch.lengths)
    for layer in range(3):
        k, v = layers[:, :, layer].unbind(2)
        there = replace(batch, k=k, v=v)
        torch.testing.assert_close(
            there.ours(plan=plan).double(), there.reference(), atol=2e-6, rtol=1e-5
        )


# ---------------------------------------------------------------------------- plans


def listed(plan: flex_plan.PagePlan, sequence: int) -> list[int]:
    return plan.blocks[sequence, 0, 0, : int(plan.counts[sequence])].tolist()


@pytest.mark.parametrize(
    ("pool", "unit"), [(tokens_first, 1), (heads_first, 2), (one_layer, 2 * 3 * 2)]
)
def test_a_page_is_one_block_of_the_pool_as_a_sequence(
    pool: Callable[[int, int, int], Pools], unit: int
) -> None:
    k, v = pool(9, 2, 32)
    assert unit_of(k, WIDTH) == unit
    for pages in (k, v):
        sequence = as_sequence(pages, unit)
        for page in (0, 5, 8):
            block = sequence[0, :, page * unit * 32 :][:, :32]
            assert torch.equal(block, pages[page])


def test_lists_have_the_pages_of_a_sequence_and_no_others() -> None:
    batch = Batch.of([33, 0, 16, 96])
    plan = plan_pages(batch.k, batch.table, batch.lengths)
    for sequence, pages in enumerate([3, 0, 1, 6]):
        assert listed(plan, sequence) == (2 * batch.table[sequence, :pages]).tolist()
    assert plan.tail.tolist() == [1, 0, 16, 16]


@pytest.mark.parametrize("queries", [1, 4])
def test_pages_before_a_window_are_not_listed(queries: int) -> None:
    batch = Batch.of([33, 5, 16, 96], queries=queries)
    window = sliding_window(17)
    plan = plan_pages(batch.k, batch.table, batch.lengths, queries=queries, mask_mod=window)
    for sequence, length in enumerate([33, 5, 16, 96]):
        begin = max(0, length - queries - 16) // 16
        pages = batch.table[sequence, begin : -(-length // 16)]
        assert listed(plan, sequence) == (2 * pages).tolist()
    assert plan.blocks.shape[-1] == 3


def test_numbers_outside_are_brought_inside_where_they_are_not_checked() -> None:
    batch = Batch.of([200, -3])
    table = torch.tensor([[-5, 1000, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6]])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(flex_plan, "_check_values", lambda *_: None)  # as on a GPU
        plan = plan_pages(batch.k, table, batch.lengths)
    assert listed(plan, 0) == [0, 2 * 14, 4, 6, 8, 10]
    assert plan.lengths.tolist() == [96, 0]


def test_lists_of_many_queries_are_contiguous_in_every_dimension() -> None:
    lists = band_blocks(*ints([0, 7], [300, 200]), 300, 512, Band(ahead=0, exact=True))
    for counts in (lists.partial_counts, lists.whole_counts):
        assert (counts.shape, counts.stride()) == ((2, 1, 4), (4, 4, 1))
    for blocks in (lists.partial, lists.whole):
        assert (blocks.shape, blocks.stride()) == ((2, 1, 4, 4), (16, 16, 4, 1))


def ints(*rows: list[int]) -> list[torch.Tensor]:
    return [torch.tensor(row, dtype=torch.int32) for row in rows]


BANDS = [
    Band(exact=True),
    Band(ahead=0, exact=True),
    Band(back=149, ahead=0, exact=True),
    Band(back=10, exact=True),
    Band(back=300, ahead=5, exact=True),
    Band(back=128, ahead=0),
]


@pytest.mark.parametrize("band", BANDS, ids=str)
@pytest.mark.parametrize("first", [-3, 0, 5, 127, 128, 200])
def test_blocks_of_a_band(band: Band, first: int) -> None:
    """Against the mask, element by element: no block that is seen is missing, none is listed in
    vain, and whole ones are seen by all queries."""
    rows, room = 256, 512
    for queries in (4, 100, 128, 200, 256):
        length = first + queries
        lists = band_blocks(*ints([first], [length]), rows, room, band)
        query = torch.arange(rows)[:, None] + first
        key = torch.arange(room)
        shown = (key < length) & (query < length)
        if band.back is not None:
            shown &= key >= query - band.back
        if band.ahead is not None:
            shown &= key <= query + band.ahead
        for block in range(2):
            part = slice(128 * block, 128 * block + 128)
            tiles = shown[part].view(128, 4, 128)
            real = (query < length)[part, 0]
            seen = {i for i in range(4) if tiles[:, i].any()}
            whole = {i for i in seen if tiles[real][:, i].all() and band.exact}
            counts = (lists.partial_counts[0, 0, block], lists.whole_counts[0, 0, block])
            found = [
                blocks[0, 0, block, : int(count)].tolist()
                for count, blocks in zip(counts, (lists.partial, lists.whole), strict=True)
            ]
            assert [sorted(found[0]), sorted(found[1])] == [sorted(seen - whole), sorted(whole)]


def test_a_pool_beyond_32_bits_is_declared_smaller_and_reached_all_the_same() -> None:
    pages = torch.empty(40_000, 8, 32, 2, 16, 128, dtype=torch.bfloat16, device="meta")[:, :, 5, 0]
    unit = unit_of(pages, 8192)
    sequence = as_sequence(pages, unit)
    span = sum((n - 1) * s for n, s in zip(sequence.shape, sequence.stride(), strict=True))
    assert unit == 8 * 32 * 2
    assert span < 2**31
    assert sequence.shape[2] >= 8192 * 16
    last = 39_999 * unit * 16  # the kernel's number of the last page's first token
    assert last * sequence.stride(2) == 39_999 * pages.stride(0) > 2**31


def test_pools_of_which_too_little_could_be_declared_are_gathered() -> None:
    by_heads = torch.empty(8, 160_000, 16, 128, device="meta").transpose(0, 1)
    assert unit_of(by_heads[:1000, :2], 1000) == 1
    assert unit_of(by_heads, 8) == 0


# ---------------------------------------------------------------------------- options, masks


def options(batch: int, longest: int, **others: int) -> Options:
    shape = {"kv_heads": 8, "rows": 4, "row_bytes": 256, **others}
    return options_for(batch=batch, longest=longest, **shape)


def test_options_of_shapes_that_were_measured() -> None:
    assert [options(*shape).splits for shape in ((64, 8192), (16, 4096), (1, 4096))] == [2, 6, 64]
    assert options(64, 8192) == Options(splits=2, tile=16, tile_rows=16, warps=1, stages=3)


def test_options_ask_for_no_more_blocks_than_run_at_once_and_split_no_finer() -> None:
    for batch in range(1, 133):
        found = options(batch, 1 << 20)
        assert batch * 8 * found.splits <= 8 * 132
        assert found.splits == flex.MAX_SPLITS or batch * 8 * found.splits >= 4 * 132
    assert options(512, 8192).splits == 1
    assert options(1, 256).splits == 256 // flex.MIN_SPLIT_TOKENS
    assert options(1, 16).splits == 1


def test_options_of_more_rows_and_larger_rows() -> None:
    assert [options(16, 8192, rows=n).tile_rows for n in (1, 16, 17, 64, 128)] == [
        *(16, 16, 32, 64, 64)
    ]
    assert options(16, 8192, rows=64).warps == 4
    assert options(16, 8192, rows=64).splits < options(16, 8192).splits
    assert options(16, 8192, rows=128).splits <= options(16, 8192, rows=64).splits
    assert options(16, 8192, row_bytes=1024).splits < options(16, 8192, row_bytes=512).splits


def test_options_as_torch_has_them() -> None:
    assert Options(splits=3, tile=16, tile_rows=32, warps=2, stages=4).for_torch() == {
        "BACKEND": "TRITON_DECODE",
        "SPLIT_KV": 3,
        "BLOCK_M": 32,
        "BLOCK_N": 16,
        "num_warps": 2,
        "num_stages": 4,
        "IS_DIVISIBLE": True,
    }


def test_slopes_are_the_paper_s() -> None:
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    twelve = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i / 2) for i in (1, 3, 5, 7)]
    assert alibi_slopes(12).tolist() == pytest.approx(twelve)


def test_a_soft_cap_is_a_tanh() -> None:
    scores = torch.linspace(-1000, 1000, 4001, dtype=torch.float64)
    nothing = torch.tensor(0)
    capped = soft_cap(30.0)(scores, nothing, nothing, nothing, nothing)
    torch.testing.assert_close(capped, 30 * torch.tanh(scores / 30))


def test_bands_of_masks() -> None:
    ids = torch.zeros(1, 8, dtype=torch.int32)
    both = every(sliding_window(7), causal, sliding_window(9))
    assert band_of(None) == Band(exact=True)
    assert band_of(both) == Band(back=6, ahead=0, exact=True)
    assert band_of(every(causal, documents(ids))) == Band(ahead=0)
    assert needed_for_last(causal) is None
    assert needed_for_last(both) is both
    mine = banded(Band(back=3))(lambda batch, head, query, key: query - key < 3)
    assert band_of(mine) == Band(back=3)


# ---------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("change", "argument"),
    [
        ({"q": torch.randn(2, 1, 3, DIM)}, "q"),
        ({"q": torch.randn(2, 4 * DIM)}, "q"),
        ({"q": torch.randn(2, 1, 4, DIM).half()}, "k_pages"),
        ({"q": torch.randn(2, 1, 4, DIM).double()}, "q"),
        ({"q": torch.randn(3, 1, 4, DIM)}, "page_table"),
        ({"q": torch.randn(2, 1, 4, DIM, device="meta")}, "k_pages"),
        ({"v": torch.randn(14, 2, 16, DIM)}, "v_pages"),
        ({"v": torch.randn(15, 16, 2, DIM).transpose(1, 2)}, "v_pages"),
        ({"k": torch.randn(15, 2, DIM, 16).transpose(2, 3)}, "k_pages"),
        ({"table": torch.zeros(2, WIDTH)}, "page_table"),
        ({"table": torch.full((2, WIDTH), 15)}, "page_table"),
        ({"table": torch.full((2, WIDTH), -1)}, "page_table"),
        ({"table": torch.zeros(2, 0, dtype=torch.int32)}, "page_table"),
        ({"lengths": torch.tensor([97, 1])}, "lengths"),
        ({"lengths": torch.tensor([-1, 1])}, "lengths"),
        ({"lengths": torch.tensor([1])}, "lengths"),
    ],
)
def test_arguments_that_do_not_fit(change: dict[str, torch.Tensor], argument: str) -> None:
    batch = replace(Batch.of([33, 90]), **change)
    with pytest.raises(KernelArgumentError, match=f"^{argument} "):
        batch.ours()


def test_numbers_behind_the_end_are_not_checked() -> None:
    batch = Batch.of([33, 16])
    batch.table[:, 3:] = 999
    batch.table[1, 1:] = -1
    batch.check()


def test_masks_that_cannot_be() -> None:
    for make in (
        lambda: sliding_window(0),
        lambda: soft_cap(0.0),
        every,
        chained,
        lambda: alibi_slopes(0),
        lambda: alibi(torch.zeros(2, 2)),
        lambda: documents(torch.zeros(2, 2)),
    ):
        with pytest.raises(KernelArgumentError):
            make()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_compiled_the_lists_of_blocks_decide_what_is_read() -> None:
    """Two minutes. A CPU's kernel has no room for what comes after attention, so that is not fused,
    and it wants lists as long as the pool. No mask keeps other sequences' pages out here."""
    with torch._inductor.config.patch(epilogue_fusion=False), torch.no_grad():
        batch = Batch.of([33, 90, 16])
        mods = flex_graphs.Mods(None, sliding_window(40))
        plan = plan_pages(batch.k, batch.table, batch.lengths, mask_mod=mods.mask)
        missing = 2 * len(batch.k) - plan.blocks.shape[-1]
        plan = replace(plan, blocks=F.pad(plan.blocks, (0, missing)))
        form = replace(flex._form_of(batch.q, batch.k, plan, band_of(mods.mask), None), dense=False)
        sequences = (as_sequence(batch.k, 2), as_sequence(batch.v, 2))
        out = flex_graphs.decode_graph(form, (), "few")(batch.q, *sequences, plan, mods)
        want = batch.reference(mask_mod=mods.mask)
        torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)

        batch = Batch.of([333, 90, 160], queries=128, page_tokens=64)
        mods = flex_graphs.Mods(None, causal)
        plan = plan_pages(batch.k, batch.table, batch.lengths, queries=128, mask_mod=causal)
        form = replace(flex._form_of(batch.q, batch.k, plan, band_of(causal), None), dense=False)
        graph = flex_graphs.prefill_graph(form, "many")
        out = graph((batch.q, batch.k, batch.v), plan.table, plan.lists, plan, mods)
        want = batch.reference(mask_mod=causal)
        torch.testing.assert_close(out.double(), want, atol=2e-6, rtol=1e-5)
        assert math.isfinite(float(out.sum()))
