"""Paged decode attention in Triton's interpreter, beside float64."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvstore_kernels import gqa_decode as module
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.gqa_decode import gqa_decode
from kvstore_kernels.gqa_form import GqaConfig, GqaForm, GqaWorkspace, plan_gqa
from kvstore_kernels.gqa_reference import gqa_reference
from kvstore_kernels.worklist import END, FIRST, SEQUENCE

FP8 = torch.float8_e4m3fn
HALF = {"dtype": torch.float16, "kv_dtype": torch.float16}
LENGTHS = (37, 0, 200, 1, 97)
SMALL = GqaConfig(tile_tokens=32, min_tokens=16, item_tokens=1, merge_elements=1024)
PLAIN = GqaForm(heads=8, kv_heads=2, head_dim=64, page_tokens=16, **HALF)


def pool_of_planes(form: GqaForm, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[pages, kv_heads, 2, tokens, dim], as the thin engines have it."""
    pool = numbers((pages, form.kv_heads, 2, form.page_tokens, form.head_dim), form.kv_dtype)
    return pool.unbind(2)


def pool_of_layers(form: GqaForm, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer of [pages, kv_heads, layers, 2, tokens, dim]."""
    shape = (pages, form.kv_heads, 3, 2, form.page_tokens, form.head_dim)
    return numbers(shape, form.kv_dtype).select(2, 1).unbind(2)


def tokens_first(form: GqaForm, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two pools [pages, tokens, kv_heads, dim]."""
    shape = (pages, form.page_tokens, form.kv_heads, form.head_dim)
    return numbers(shape, form.kv_dtype).transpose(1, 2), numbers(shape, form.kv_dtype).transpose(
        1, 2
    )


def unlike(form: GqaForm, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys with tokens first, values with heads first."""
    return tokens_first(form, pages)[0], pool_of_planes(form, pages)[1]


def odd(form: GqaForm, pages: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that no wide load is aligned to."""
    shape = (pages, form.kv_heads, form.page_tokens, form.head_dim + 3)
    wide = [numbers(shape, form.kv_dtype)[..., 1 : 1 + form.head_dim] for _ in range(2)]
    return wide[0], wide[1]


def numbers(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape).to(dtype)


class Case:
    """Random queries, pages and a page table, whose unused places are poisoned."""

    def __init__(self, form: GqaForm, lengths: tuple[int, ...] = LENGTHS, pools=pool_of_planes):
        torch.manual_seed(len(lengths) * form.heads + form.head_dim)
        self.form = form
        self.counts = np.array(lengths, np.int64)
        needed = -(-self.counts // form.page_tokens)
        self.n_pages = int(needed.sum()) + 2
        self.q = numbers((len(lengths), form.q_tokens, form.heads, form.head_dim), form.dtype)
        self.k, self.v = pools(form, self.n_pages)
        order = torch.randperm(self.n_pages, dtype=torch.int32)
        self.table = torch.full(
            (len(lengths), int(needed.max(initial=0)) + 1), -7, dtype=torch.int32
        )
        at = 0
        for sequence, (pages, length) in enumerate(zip(needed.tolist(), lengths, strict=True)):
            self.table[sequence, :pages] = order[at : at + pages]
            at += pages
            if length % form.page_tokens:
                for pool in (self.k, self.v):
                    as_bytes(pool)[order[at - 1], :, length % form.page_tokens :] = 0x7F  # NaN
        for pool in (self.k, self.v):
            as_bytes(pool)[order[at:]] = 0x7F
        self.lengths = torch.tensor(lengths, dtype=torch.int32)

    def workspace(self, workers: int = 9, config: GqaConfig = SMALL) -> GqaWorkspace:
        workspace = GqaWorkspace(
            self.form,
            max_sequences=len(self.counts),
            device="cpu",
            config=config,
            workers=workers,
        )
        workspace.partials.fill_(torch.nan)
        workspace.load(workspace.plan(self.counts))
        return workspace

    def run(self, workspace: GqaWorkspace, **scales: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(self.q, torch.nan)
        gqa_decode(self.q, self.k, self.v, self.table, self.lengths, workspace, out=out, **scales)
        assert not workspace.counters.any(), "a counter is not reset"
        return out

    def error(self, out: torch.Tensor, **scales: torch.Tensor) -> float:
        want = gqa_reference(self.q, self.k, self.v, self.table, self.counts, self.form, **scales)
        return float((out.double() - want).norm() / want.norm())


def as_bytes(pool: torch.Tensor) -> torch.Tensor:
    """(pages, heads, tokens, bytes of a row), also where the view is not dense."""
    return pool.view(torch.uint8)


@pytest.mark.parametrize(
    ("form", "pools"),
    [
        pytest.param(PLAIN, pool_of_planes, id="planes"),
        pytest.param(PLAIN, pool_of_layers, id="layers"),
        pytest.param(PLAIN, tokens_first, id="tokens-first"),
        pytest.param(PLAIN, unlike, id="unlike"),
        pytest.param(PLAIN, odd, id="odd"),
        pytest.param(replace(PLAIN, heads=2), pool_of_planes, id="group-1"),
        pytest.param(replace(PLAIN, heads=14), pool_of_planes, id="group-7"),
        pytest.param(replace(PLAIN, heads=16, kv_heads=1, q_tokens=3), odd, id="48-rows"),
        pytest.param(replace(PLAIN, head_dim=128, page_tokens=64), tokens_first, id="dim-128"),
        pytest.param(replace(PLAIN, head_dim=256, kv_heads=1), pool_of_planes, id="dim-256"),
        pytest.param(replace(PLAIN, page_tokens=48), pool_of_planes, id="pages-of-48"),
        pytest.param(replace(PLAIN, page_tokens=128, q_tokens=2), unlike, id="pages-of-128"),
        pytest.param(replace(PLAIN, q_tokens=4), pool_of_planes, id="4-new-tokens"),
        pytest.param(replace(PLAIN, window=50), pool_of_planes, id="window"),
        pytest.param(replace(PLAIN, window=3, q_tokens=4), pool_of_planes, id="narrow-window"),
        pytest.param(replace(PLAIN, softcap=0.7, scale=0.3), pool_of_planes, id="cap-and-scale"),
    ],
)
def test_agrees_with_float64_and_touches_nothing_stale(form, pools):
    case = Case(form, pools=pools)
    assert case.error(case.run(case.workspace(24))) < 1e-3


def test_parts_of_many_rows():
    case = Case(replace(PLAIN, heads=16, kv_heads=1, q_tokens=3), (450,))
    workspace = case.workspace(24)
    assert workspace.plan(case.counts).n_partials == 2
    assert case.error(case.run(workspace)) < 1e-3


def test_whole_sequences():
    case = Case(PLAIN)
    workspace = case.workspace(1)
    assert not workspace.plan(case.counts).n_partials
    assert case.error(case.run(workspace)) < 1e-3


def test_bfloat16():
    case = Case(replace(PLAIN, dtype=torch.bfloat16, kv_dtype=torch.bfloat16))
    assert case.error(case.run(case.workspace())) < 1e-2


@pytest.mark.parametrize("pools", [pool_of_planes, odd])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float8_with_a_scale_for_each_head(dtype, pools):
    case = Case(replace(PLAIN, dtype=dtype, kv_dtype=FP8), pools=pools)
    scales = {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([3.0, 0.1])}
    assert case.error(case.run(case.workspace(), **scales), **scales) < 1e-2


def test_one_scale_alone_leaves_the_other_at_one():
    case = Case(PLAIN)
    scales = {"v_scale": torch.tensor([3.0, 0.1])}
    assert case.error(case.run(case.workspace(), **scales), **scales) < 1e-3


def test_queries_beyond_float16_saturate_with_float8_pages():
    case = Case(replace(PLAIN, dtype=torch.bfloat16, kv_dtype=FP8))
    case.q *= 1e20
    assert case.run(case.workspace()).isfinite().all()


def test_parts_are_merged_in_an_order_of_their_own():
    case = Case(PLAIN, (600, 3, 300))
    outs = []
    workspace = case.workspace(24)
    backwards = torch.arange(workspace.grid).flip(0)
    for order in (backwards, backwards):
        workspace.items[: workspace.grid] = workspace.items[: workspace.grid][order]
        outs.append(case.run(workspace))
    assert workspace.plan(case.counts).n_partials > 20
    assert torch.equal(*outs)


def test_parts_of_different_lengths():
    case = Case(PLAIN, (700, 90, 300))
    config = replace(SMALL, item_tokens=8, cut_tokens=8)
    workspace = case.workspace(10, config)
    items = workspace.plan(case.counts).items
    longest = items[items[:, SEQUENCE] == 0]
    assert np.ptp(longest[:, END] - longest[:, FIRST]) > PLAIN.page_tokens
    assert case.error(case.run(workspace)) < 1e-3


def test_a_sequence_without_tokens_gives_zeros():
    case = Case(PLAIN)
    assert not case.run(case.workspace())[LENGTHS.index(0)].any()
    case = Case(PLAIN, (0, 0))
    assert not case.run(case.workspace()).any()


def test_no_sequences():
    case = Case(PLAIN, ())
    workspace = GqaWorkspace(PLAIN, max_sequences=1, device="cpu")
    workspace.load(workspace.plan([]))
    assert case.run(workspace).shape == (0, 1, 8, 64)


def test_new_tokens_that_do_not_exist_give_zeros():
    case = Case(replace(PLAIN, q_tokens=4))
    out = case.run(case.workspace())[LENGTHS.index(1)]
    assert not out[:3].any()
    assert out[3].any()


def test_one_workspace_replays_other_batches_in_a_fixed_grid():
    workspace = Case(PLAIN, (300, 20, 10)).workspace(12)
    for lengths in ((300, 20, 10), (1, 0, 2), (16, 500, 64)):
        case = Case(PLAIN, lengths)
        workspace.load(workspace.plan(lengths), grid=workspace.max_items)
        assert workspace.grid == workspace.max_items
        assert case.error(case.run(workspace)) < 1e-3


def test_a_page_number_outside_of_the_pool_reads_its_last_page(monkeypatch):
    monkeypatch.setattr(module, "_check_values", lambda *_: None)
    case = Case(PLAIN, (40, 100))
    case.k.copy_(numbers(case.k.shape, case.k.dtype))
    case.v.copy_(numbers(case.v.shape, case.v.dtype))
    outs = []
    for wrong in (-1, case.n_pages, 2**31 - 1, case.n_pages - 1):
        case.table[1, 2] = wrong
        outs.append(case.run(case.workspace()))
        assert torch.equal(outs[0], outs[-1])


def test_a_plan_longer_than_the_page_table_stays_within_it(monkeypatch):
    monkeypatch.setattr(module, "_check_values", lambda *_: None)
    case = Case(PLAIN, (40, 100))
    full = case.run(case.workspace())
    workspace = case.workspace()
    workspace.load(workspace.plan((40, 5000)))
    case.table = case.table[:, :7].contiguous()
    case.k.nan_to_num_(), case.v.nan_to_num_()
    out = case.run(workspace)
    assert out.isfinite().all()
    assert torch.equal(out[0], full[0])


def test_pools_past_two_to_the_31_elements():
    form = replace(PLAIN, kv_dtype=FP8, heads=2, kv_heads=1)
    dense = Case(form, (48,))
    memory = torch.empty(2_500_000_000, dtype=torch.uint8).view(FP8)  # only touched where used
    stride = 600_000_016
    shape, strides = (dense.n_pages - 1, 1, 16, 64), (stride, 1024, 64, 1)
    far = Case(form, (48,))
    far.table[0, :3] = torch.tensor([3, 0, 2])
    far.k = memory.as_strided(shape, strides)
    far.v = memory.as_strided(shape, strides, 1024)
    for to, at in ((far.k, dense.k), (far.v, dense.v)):
        for new, old in zip(far.table[0, :3].tolist(), dense.table[0, :3].tolist(), strict=True):
            to.view(torch.uint8)[new] = at.view(torch.uint8)[old]
    assert torch.equal(far.run(far.workspace()), dense.run(dense.workspace()))


def test_a_window_is_planned_from_the_first_token_that_any_query_sees():
    form = replace(PLAIN, window=50, q_tokens=2)
    worklist = plan_gqa(form, SMALL, [300], workers=1)
    assert worklist.items[:, FIRST].tolist() == [240, 240]  # 300 - 2 - 50 + 1, down to a block
    assert worklist.items[:, END].tolist() == [300, 300]


def test_partial_results_are_under_a_quarter_of_the_keys_and_values():
    form = replace(PLAIN, heads=32, q_tokens=4)
    lengths = [70_000, 3000]
    worklist = plan_gqa(form, SMALL, lengths, workers=264)
    kv_bytes = sum(lengths) * form.kv_heads * form.token_bytes
    assert 0 < 4 * worklist.n_partials * form.partial_bytes <= kv_bytes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"kv_heads": 0}, "kv_heads must be at least 1"),
        ({"heads": 7}, "heads must be a multiple of the 2 KV heads"),
        ({"heads": 0}, "heads must be a multiple"),
        ({"heads": 34}, "heads must be at most 16 for each KV head"),
        ({"head_dim": 80}, "head_dim must be one of"),
        ({"page_tokens": 8}, "page_tokens must be 16 to 128"),
        ({"q_tokens": 5}, "q_tokens must be 1 to 4"),
        ({"dtype": torch.float32}, "dtype must be bfloat16 or float16"),
        ({"kv_dtype": torch.bfloat16}, "kv_dtype must be float8_e4m3fn or"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"window": 0}, "window must be at least 1"),
    ],
)
def test_wrong_forms_are_refused(wrong, message):
    with pytest.raises(KernelArgumentError, match=message):
        replace(PLAIN, **wrong)


def changed(case: Case, **arguments: object) -> None:
    names = {"q": case.q, "k_pages": case.k, "v_pages": case.v, "page_table": case.table}
    workspace = case.workspace()
    gqa_decode(**{**names, "lengths": case.lengths, "workspace": workspace, **arguments})


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("q", lambda c: c.q[:, :, :7], "q must have shape"),
        ("q", lambda c: c.q.bfloat16(), "q must be float16"),
        ("q", lambda c: c.q.repeat(1, 1, 1, 2)[..., ::2], "q must have neighbouring elements"),
        ("q", lambda c: c.q[:2], "page_table must have shape"),
        ("q", lambda c: c.q.to("meta"), "q must be on the workspace's cpu"),
        ("k_pages", lambda c: c.k[:, :1], "k_pages must have shape"),
        ("v_pages", lambda c: c.v.float(), "v_pages must be float16"),
        ("v_pages", lambda c: c.v[:-1], "v_pages must be as many as k_pages"),
        ("v_pages", lambda c: c.v.to("meta"), "v_pages must be on cpu"),
        (
            "k_pages",
            lambda c: torch.empty(2**31, dtype=c.k.dtype).as_strided(c.k.shape, (0, 0, 2**27, 1)),
            "k_pages must have a page's tokens within",
        ),
        ("page_table", lambda c: c.table.long(), "page_table must be int32"),
        ("page_table", lambda c: c.table.clone().fill_(99), r"numbers of the pool's .* \(0, 0\)"),
        ("page_table", lambda c: c.table[:, :0], "page_table must have at least one column"),
        ("page_table", lambda c: c.table[:, :3], "page_table must have a sequence's 13 pages"),
        ("lengths", lambda c: c.lengths[:3], "lengths must have shape"),
        ("lengths", lambda c: c.lengths + 1, "lengths must be those of the work list"),
        ("k_scale", lambda c: torch.ones(3), "k_scale must have shape"),
        ("v_scale", lambda c: torch.ones(2).double(), "v_scale must be float32"),
        ("out", lambda c: c.q.float(), "out must be float16"),
        ("out", lambda c: c.q[:2], "out must have shape"),
    ],
)
def test_wrong_arguments_are_named(argument, change, message):
    case = Case(PLAIN)
    with pytest.raises(KernelArgumentError, match=message):
        changed(case, **{argument: change(case)})


def test_a_workspace_wants_a_work_list_that_fits():
    case = Case(PLAIN)
    workspace = GqaWorkspace(PLAIN, max_sequences=1, device="cpu", workers=1)
    with pytest.raises(KernelArgumentError, match="q must have the work list's 0 sequences"):
        changed(case, workspace=workspace)
    with pytest.raises(KernelArgumentError, match="worklist must be for at most 1 sequences"):
        workspace.load(workspace.plan([5] * 9))
    with pytest.raises(KernelArgumentError, match="max_sequences must be at least 1"):
        GqaWorkspace(PLAIN, max_sequences=0, device="cpu")


PRINT_SHARED = """
import json
from kvstore_kernels.compiling import compile_for
from kvstore_kernels.gqa_variants import variants
print(compile_for(next(variants())).shared_bytes)
"""


def test_tiles_are_read_ahead():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"}
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_SHARED],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    # Buffers of three tiles of keys and values; a loop that is not pipelined needs none.
    assert int(printed) >= 3 * 2 * 64 * 128 * 2
