"""Paged latent attention in Triton's interpreter, beside float64.

The interpreter cuts float32 to bfloat16 where a GPU rounds, which alone is an error of 3.3e-3.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvstore_kernels import mla_decode as module
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.mla_decode import (
    MlaConfig,
    MlaForm,
    MlaWorkspace,
    config_for,
    mla_decode,
    plan_mla,
)
from kvstore_kernels.mla_reference import RANK, WIDTH, mla_reference
from kvstore_kernels.worklist import PARTS

FP8 = torch.float8_e4m3fn
PLAIN = MlaForm(heads=16, scale=0.07)
LENGTHS = (100, 0, 330, 1, 128)
FINE = MlaConfig(min_tokens=64, item_tokens=1)  # cuts as often as it may
MOST_ERROR = 4e-3


def dense(form: MlaForm, pages: int) -> torch.Tensor:
    return torch.empty((pages, form.page_tokens, WIDTH), dtype=form.kv_dtype)


def one_of_layers(form: MlaForm, pages: int) -> torch.Tensor:
    """A layer of [pages, layers, tokens, width], as the thin engines have it."""
    shape = (pages, 3, form.page_tokens, WIDTH)
    return torch.empty(shape, dtype=form.kv_dtype).select(1, 1)


def spaced(form: MlaForm, pages: int) -> torch.Tensor:
    """Tokens with something between them."""
    return torch.empty((pages, form.page_tokens, WIDTH + 16), dtype=form.kv_dtype)[..., :WIDTH]


class Case:
    """Random queries and pages; all that must not be read is NaN, or no page at all."""

    def __init__(self, form: MlaForm, lengths=LENGTHS, pool=dense, scaled=False):
        torch.manual_seed(len(lengths) * form.heads + form.page_tokens)
        self.form, self.counts = form, np.array(lengths)
        needed = -(-self.counts // form.page_tokens)
        self.n_pages = int(needed.sum()) + 2
        self.pages = pool(form, self.n_pages)
        self.pages.view(torch.uint8).fill_(0xFF)
        self.table = torch.full((len(lengths), int(needed.max()) + 1), -7, dtype=torch.int32)
        order = torch.randperm(self.n_pages, dtype=torch.int32).split([*needed.tolist(), 2])
        for row, numbers, length in zip(self.table, order, lengths, strict=False):
            row[: len(numbers)] = numbers
            self._fill(numbers, length)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.q = torch.randn(len(lengths), form.q_tokens, form.heads, WIDTH).bfloat16()
        self.scales = torch.rand(self.n_pages) + 0.5 if scaled else None

    def _fill(self, numbers: torch.Tensor, length: int) -> None:
        for page, left in zip(
            numbers.tolist(), range(length, 0, -self.form.page_tokens), strict=True
        ):
            used = min(left, self.form.page_tokens)
            self.pages[page, :used] = torch.randn(used, WIDTH).to(self.form.kv_dtype)

    def workspace(self, workers: int = 24, config: MlaConfig | None = None) -> MlaWorkspace:
        workspace = MlaWorkspace(
            self.form,
            max_sequences=len(self.counts),
            device="cpu",
            config=config or replace(FINE, rows=config_for(self.form).rows),
            workers=workers,
        )
        workspace.partials.fill_(torch.nan)
        workspace.moments.fill_(torch.nan)
        workspace.load(workspace.plan(self.counts))
        return workspace

    def run(self, workspace: MlaWorkspace | None = None) -> torch.Tensor:
        workspace = workspace or self.workspace()
        out = torch.full((*self.q.shape[:3], RANK), torch.nan, dtype=torch.bfloat16)
        mla_decode(
            *(self.q, self.pages, self.table, self.lengths, workspace),
            page_scales=self.scales,
            out=out,
        )
        assert not workspace.meetings.any(), "a meeting is not over"
        return out

    def error(self, out: torch.Tensor) -> float:
        want = mla_reference(
            *(self.q, self.pages, self.table, self.lengths),
            scale=self.form.scale,
            page_scales=self.scales,
        )
        return float((out.double() - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("form", "pool"),
    [
        pytest.param(PLAIN, dense, id="dense"),
        pytest.param(PLAIN, one_of_layers, id="layers"),
        pytest.param(PLAIN, spaced, id="spaced"),
        pytest.param(replace(PLAIN, page_tokens=128), one_of_layers, id="pages-of-128"),
        pytest.param(replace(PLAIN, page_tokens=16), one_of_layers, id="pages-of-16"),
        pytest.param(replace(PLAIN, page_tokens=48), spaced, id="pages-of-48"),
        pytest.param(replace(PLAIN, heads=5), dense, id="5-heads"),
        pytest.param(replace(PLAIN, q_tokens=2), dense, id="32-rows"),
        pytest.param(replace(PLAIN, heads=20, q_tokens=3), dense, id="60-rows"),
        pytest.param(replace(PLAIN, q_tokens=2, page_tokens=32), dense, id="pages-of-32"),
        pytest.param(replace(PLAIN, kv_dtype=FP8), one_of_layers, id="float8"),
        pytest.param(replace(PLAIN, kv_dtype=FP8, page_tokens=16), spaced, id="float8-pages-of-16"),
    ],
)
def test_agrees_with_float64_and_touches_nothing_stale(form, pool):
    case = Case(form, pool=pool)
    assert case.error(case.run()) < MOST_ERROR


def test_whole_sequences():
    case = Case(PLAIN)
    workspace = case.workspace(1)
    assert not workspace.plan(case.counts).n_partials
    assert case.error(case.run(workspace)) < MOST_ERROR


def parts_of(case: Case, parts: int, merge_elements: int) -> MlaWorkspace:
    """With a list of one sequence's parts, a tile each; those past its end have no tokens."""
    workspace = case.workspace(parts, replace(FINE, merge_elements=merge_elements))
    worklist = workspace.plan(case.counts)
    cuts = np.minimum(np.arange(parts + 1) * 64, case.counts[0])
    number = np.arange(parts)
    rows = [0 * number, 0 * number, cuts[:-1], cuts[1:], number, 0 * number, parts + 0 * number]
    length = case.counts[0] + 0 * number
    items = np.stack([*rows, number, length], axis=1).astype(np.int32)
    workspace.load(replace(worklist, items=items, n_partials=parts, n_counters=1))
    return workspace


@pytest.mark.parametrize(
    ("heads", "parts", "merge_elements"),
    [(16, 4, 8192), (3, 5, 8192), (16, 16, 8192), (3, 17, 16384), (5, 130, 32768)],
)
def test_any_number_of_parts(heads, parts, merge_elements):
    case = Case(replace(PLAIN, heads=heads), (250,))
    assert case.error(case.run(parts_of(case, parts, merge_elements))) < MOST_ERROR


def test_float8_with_a_scale_for_each_page():
    case = Case(replace(PLAIN, kv_dtype=FP8), scaled=True)
    assert case.error(case.run()) < MOST_ERROR


def test_scales_of_any_size_and_stride():
    case = Case(replace(PLAIN, kv_dtype=FP8, scale=0.001), (200, 130), scaled=True)
    case.scales = torch.logspace(-8, 1, 3 * case.n_pages)[::3]
    assert case.error(case.run()) < MOST_ERROR


def test_queries_beyond_float16_saturate_with_float8_pages():
    case = Case(replace(PLAIN, kv_dtype=FP8), (70,))
    case.q *= 1e20
    assert case.run().isfinite().all()


def test_huge_and_tiny_scores():
    case = Case(PLAIN, (150, 260))
    case.q[0] *= 1000
    case.q[1] *= 1e-20
    assert case.error(case.run()) < MOST_ERROR


def test_parts_are_merged_in_an_order_of_their_own():
    case = Case(PLAIN, (500, 3, 450))
    workspace = case.workspace()
    outs = []
    for _ in range(2):
        rows = workspace.items[1 : 1 + workspace.grid]
        workspace.items[1 : 1 + workspace.grid] = rows.flip(0)
        outs.append(case.run(workspace))
    assert workspace.plan(case.counts).n_partials > 5
    assert torch.equal(*outs)


def test_a_sequence_without_tokens_gives_zeros():
    out = Case(PLAIN).run()
    assert not out[LENGTHS.index(0)].any()


@pytest.mark.parametrize("page_tokens", [16, 64])
def test_a_batch_without_tokens_gives_zeros(page_tokens):
    case = Case(replace(PLAIN, page_tokens=page_tokens), (0, 0))
    case.pages = case.pages[:1]
    assert not case.run().any()


def test_new_tokens_that_do_not_exist_give_zeros():
    out = Case(replace(PLAIN, q_tokens=4)).run()[LENGTHS.index(1)]
    assert not out[:3].any()
    assert out[3].any()


def test_each_new_token_sees_those_before_it():
    """As if each were the last one of a sequence of its own."""
    case = Case(replace(PLAIN, q_tokens=4), (67, 130))
    out = case.run()
    single = Case(PLAIN, (67, 130))
    single.pages, single.table = case.pages, case.table
    for token in range(4):
        single.q = case.q[:, token : token + 1]
        single.counts = case.counts - 3 + token
        single.lengths = case.lengths - 3 + token
        assert torch.allclose(single.run()[:, 0].float(), out[:, token].float(), rtol=0.02)


def test_outputs_and_queries_in_any_strides():
    case = Case(PLAIN, (100, 5))
    wide = torch.randn(16, 2, 2, WIDTH + 8).bfloat16()[..., 8:].permute(1, 2, 0, 3)
    case.q = wide[:, :1]
    out = torch.full((2, 16, 1, RANK), torch.nan).bfloat16().transpose(1, 2)
    mla_decode(case.q, case.pages, case.table, case.lengths, case.workspace(), out=out)
    assert case.error(out) < MOST_ERROR


def test_one_workspace_replays_other_batches_in_a_fixed_grid():
    workspace = Case(PLAIN, (300, 20, 10)).workspace(6)
    for lengths in ((300, 20, 10), (1, 0, 2), (16, 500, 64)):
        case = Case(PLAIN, lengths)
        workspace.load(workspace.plan(lengths), grid=workspace.max_items)
        assert workspace.grid == workspace.max_items
        assert case.error(case.run(workspace)) < MOST_ERROR


@pytest.mark.parametrize("page_tokens", [16, 64])
def test_a_page_number_outside_of_the_pool_spoils_its_sequence_alone(monkeypatch, page_tokens):
    monkeypatch.setattr(module, "_check_values", lambda *_: None)
    case = Case(replace(PLAIN, page_tokens=page_tokens), (40, 200))
    case.pages.view(torch.uint8)[case.pages.isnan().any(-1)] = 0
    right, outs = case.run(), []
    for wrong in (-1, case.n_pages, 2**31 - 1, -(2**31)):
        case.table[1, 2] = wrong
        outs.append(case.run())
        assert torch.equal(outs[-1][0], right[0])
        assert torch.equal(outs[-1], outs[0])
    assert outs[0].isfinite().all()


def test_a_plan_longer_than_the_page_table_stays_within_it(monkeypatch):
    monkeypatch.setattr(module, "_check_values", lambda *_: None)
    case = Case(PLAIN, (40, 100))
    full = case.run()
    case.table = case.table[:, :2].contiguous()
    case.pages.view(torch.uint8)[case.pages.isnan().any(-1)] = 0
    workspace = case.workspace()
    workspace.load(workspace.plan((40, 3000)))
    out = case.run(workspace)
    assert out.isfinite().all()
    assert torch.equal(out[0], full[0])


@pytest.mark.parametrize("page_tokens", [32, 64])
def test_pools_past_two_to_the_31_elements(page_tokens):
    near = Case(replace(PLAIN, page_tokens=page_tokens), (130,))
    memory = torch.empty(2_500_000_000, dtype=torch.bfloat16)  # only touched where used
    stride = 2_400_000_000 // (near.n_pages - 1) // 8 * 8
    far = Case(near.form, (130,))
    far.pages = memory.as_strided(near.pages.shape, (stride, WIDTH, 1))
    for page in near.table[0, : -(-130 // page_tokens)].tolist():
        far.pages[page] = near.pages[page]
    assert torch.equal(far.run(), near.run())


def test_partial_results_are_under_a_quarter_of_the_pages():
    form, lengths = replace(PLAIN, q_tokens=4), [70_000, 3000]
    config = config_for(form)
    worklist = plan_mla(form, config, lengths, workers=264)
    read = 2 * sum(lengths) * form.token_bytes
    assert 0 < 4 * worklist.n_partials * config.rows * (RANK + 2) * 4 <= read
    assert worklist.items[:, PARTS].max() > 100


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 0}, "heads must be at least 1"),
        ({"scale": 0.0}, "scale must be above 0"),
        ({"q_tokens": 5}, "q_tokens must be 1 to 4"),
        ({"page_tokens": 8}, "page_tokens must be 16 to 128"),
        ({"kv_dtype": torch.float16}, "kv_dtype must be torch.bfloat16 or"),
    ],
)
def test_wrong_forms_are_refused(wrong, message):
    with pytest.raises(KernelArgumentError, match=message):
        replace(PLAIN, **wrong)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"rows": 8}, "rows must be one of"),
        ({"merge_elements": 512}, "merge_elements must be a power of two, 1024 to 32768"),
        ({"merge_elements": 65536}, "merge_elements must be"),
        ({"merge_elements": 3000}, "merge_elements must be"),
    ],
)
def test_wrong_configurations_are_refused(wrong, message):
    with pytest.raises(KernelArgumentError, match=message):
        replace(FINE, **wrong)


def changed(case: Case, **arguments: object) -> None:
    names = {"q": case.q, "pages": case.pages, "page_table": case.table, "lengths": case.lengths}
    mla_decode(**{**names, "workspace": case.workspace(), **arguments})


@pytest.mark.parametrize(
    ("argument", "change", "message"),
    [
        ("q", lambda c: c.q[:, :, :7], "q must have shape"),
        ("q", lambda c: c.q.float(), "q must be bfloat16"),
        ("q", lambda c: c.q.repeat(1, 1, 1, 2)[..., ::2], "q must have neighbouring elements"),
        ("q", lambda c: c.q[:2], "page_table must have shape"),
        ("q", lambda c: c.q.to("meta"), "q must be on the workspace's cpu"),
        ("q", lambda c: torch.nn.functional.pad(c.q, (0, 1))[..., 1:], "q must have its address"),
        ("pages", lambda c: c.pages[:, :32], "pages must have shape"),
        ("pages", lambda c: c.pages.half(), "pages must be bfloat16"),
        ("pages", lambda c: c.pages.to("meta"), "pages must be on cpu"),
        ("pages", lambda c: c.pages[:0], "pages must not be empty"),
        ("pages", lambda c: torch.nn.functional.pad(c.pages, (0, 4))[..., :WIDTH], "in whole 16"),
        (
            "pages",
            lambda c: torch.empty(2**31, dtype=torch.bfloat16).as_strided(
                (1, 64, WIDTH), (0, 2**25, 1)
            ),
            "pages must have a page's tokens within",
        ),
        ("page_table", lambda c: c.table.long(), "page_table must be int32"),
        ("page_table", lambda c: c.table[:, :0], "page_table must have a column"),
        ("page_table", lambda c: c.table.clone().fill_(99), r"numbers of the pool's .*\[0, 0\]"),
        ("page_table", lambda c: c.table[:, :3], "page_table must have a sequence's 6 pages"),
        ("lengths", lambda c: c.lengths[:3], "lengths must have shape"),
        ("lengths", lambda c: c.lengths + 1, "lengths must be those of the work list"),
        ("page_scales", lambda c: torch.ones(c.n_pages), "page_scales must be given for float8"),
        ("out", lambda c: c.q, "out must have shape"),
        ("out", lambda c: c.q[..., :RANK].float(), "out must be bfloat16"),
    ],
)
def test_wrong_arguments_are_named(argument, change, message):
    case = Case(PLAIN)
    with pytest.raises(KernelArgumentError, match=message):
        changed(case, **{argument: change(case)})


def test_scales_are_one_for_each_page():
    case = Case(replace(PLAIN, kv_dtype=FP8))
    for wrong, message in ((torch.ones(3), "shape"), (torch.ones(case.n_pages).half(), "float32")):
        with pytest.raises(KernelArgumentError, match=f"page_scales must .*{message}"):
            changed(case, page_scales=wrong)


def test_a_workspace_wants_a_work_list_that_fits():
    case = Case(PLAIN)
    workspace = MlaWorkspace(PLAIN, max_sequences=1, device="cpu", workers=1)
    with pytest.raises(KernelArgumentError, match="q must have the work list's 0 sequences"):
        changed(case, workspace=workspace)
    with pytest.raises(KernelArgumentError, match="worklist must be for at most 1 sequences"):
        workspace.load(workspace.plan([5] * 9))
    with pytest.raises(KernelArgumentError, match="n_items must be at least"):
        workspace.load(workspace.plan([5]), grid=0)
    with pytest.raises(KernelArgumentError, match="max_sequences must be at least 1"):
        MlaWorkspace(PLAIN, max_sequences=0, device="cpu")


PRINT_USAGE = """
import dataclasses, json
from kvstore_kernels.compiling import compile_for
from kvstore_kernels.mla_decode import variants
print(json.dumps(dataclasses.asdict(compile_for(next(variants())))))
"""


def test_two_blocks_with_a_tile_each_fit_a_multiprocessor():
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONWARNINGS": "ignore"}
    printed = subprocess.run(
        [sys.executable, "-c", PRINT_USAGE],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    usage = json.loads(printed)
    latents, rope, queries = 64 * RANK * 2, 64 * (WIDTH - RANK) * 2, 16 * WIDTH * 2
    # One copy of a tile serves both products, straight and transposed.
    assert usage["shared_bytes"] <= latents + rope + queries + 1024
    assert not usage["spills"]
