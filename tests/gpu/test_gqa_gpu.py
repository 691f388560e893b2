"""Paged decode attention on a GPU: beside float64, many times, in graphs, one after another."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.gqa_decode import gqa_decode
from kvstore_kernels.gqa_form import GqaForm, GqaWorkspace, config_for
from kvstore_kernels.gqa_reference import gqa_reference

FP8 = torch.float8_e4m3fn
LLAMA = GqaForm(heads=32, kv_heads=8, head_dim=128, page_tokens=16)
RAGGED = (37, 0, 2600, 1, 129, 16384, 15, 777)
MAX_ERROR = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


class Case:
    """Random pages and queries; what lies past a sequence's end is NaN, or no page at all."""

    def __init__(self, form: GqaForm, lengths: tuple[int, ...], order: str = "PHKND") -> None:
        torch.manual_seed(3)
        self.form, self.counts = form, np.array(lengths)
        needed = (-(-self.counts // form.page_tokens)).tolist()
        pages = sum(needed) + 1
        self.k, self.v = pools(form, pages, order)
        numbers = torch.randperm(pages, device="cuda", dtype=torch.int32)
        self.table = torch.full(
            (len(lengths), max(*needed, 1)), -7, dtype=torch.int32, device="cuda"
        )
        at = 0
        for sequence, (count, length) in enumerate(zip(needed, lengths, strict=True)):
            self.table[sequence, :count] = numbers[at : at + count]
            at += count
            if length % form.page_tokens:
                page = int(numbers[at - 1])
                for pool in (self.k, self.v):
                    stale = pool.view(torch.uint8)[page, :, length % form.page_tokens :]
                    stale.fill_(0xFF)  # NaNs, in each dtype
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        shape = (len(lengths), form.q_tokens, form.heads, form.head_dim)
        self.q = torch.randn(shape, device="cuda").to(form.dtype)
        self.scales = {}
        if form.kv_dtype is FP8:
            self.scales = {
                "k_scale": torch.rand(form.kv_heads, device="cuda") + 0.5,
                "v_scale": torch.rand(form.kv_heads, device="cuda") + 0.5,
            }

    def workspace(self) -> GqaWorkspace:
        workspace = GqaWorkspace(self.form, max_sequences=len(self.counts), device="cuda")
        workspace.partials.fill_(torch.nan)
        workspace.load(workspace.plan(self.counts))
        return workspace

    def run(self, workspace: GqaWorkspace, *, check: bool = False) -> torch.Tensor:
        out = torch.full_like(self.q, torch.nan)
        gqa_decode(
            self.q,
            self.k,
            self.v,
            self.table,
            self.lengths,
            workspace,
            out=out,
            check=check,
            **self.scales,
        )
        return out

    def wanted(self) -> torch.Tensor:
        return gqa_reference(
            self.q, self.k, self.v, self.table, self.counts, self.form, **self.scales
        )

    def agrees(self, out: torch.Tensor) -> bool:
        want = self.wanted()
        return bool((out.double() - want).norm() / want.norm() < MAX_ERROR[self.form.dtype])


def pools(form: GqaForm, pages: int, order: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Views (pages, heads, tokens, dim) of one pool with dimensions in that order, K: keys and
    values, L: layers."""
    sizes = {"P": pages, "H": form.kv_heads, "K": 2, "N": form.page_tokens, "D": form.head_dim}
    pool = torch.empty([{**sizes, "L": 3}[d] for d in order], dtype=form.kv_dtype, device="cuda")
    for at in range(0, len(pool), 4096):  # float32 of all of it may not fit
        part = pool[at : at + 4096]
        part.copy_(torch.randn(part.shape, device="cuda"))
    if "L" in order:
        pool, order = pool.select(order.index("L"), 1), order.replace("L", "")
    k, v = pool.unbind(order.index("K"))
    left = order.replace("K", "")
    axes = [left.index(d) for d in "PHND"]
    return k.permute(axes), v.permute(axes)


FORMS = [
    pytest.param(LLAMA, "PHKND", id="llama"),
    pytest.param(LLAMA, "PHLKND", id="layers"),
    pytest.param(LLAMA, "KPNHD", id="tokens-first"),
    pytest.param(replace(LLAMA, page_tokens=64), "KPHND", id="pages-of-64"),
    pytest.param(replace(LLAMA, page_tokens=48), "PHKND", id="pages-of-48"),
    pytest.param(replace(LLAMA, page_tokens=128), "PKNHD", id="pages-of-128"),
    pytest.param(
        replace(LLAMA, dtype=torch.float16, kv_dtype=torch.float16), "PHKND", id="float16"
    ),
    pytest.param(replace(LLAMA, kv_dtype=FP8), "PHKND", id="float8"),
    pytest.param(replace(LLAMA, kv_dtype=FP8, dtype=torch.float16), "KPNHD", id="float8-float16"),
    pytest.param(replace(LLAMA, kv_dtype=FP8, head_dim=64, q_tokens=4), "KPNHD", id="float8-64"),
    pytest.param(replace(LLAMA, kv_dtype=FP8, head_dim=256), "PHKND", id="float8-256"),
    pytest.param(replace(LLAMA, head_dim=64), "PHKND", id="dim-64"),
    pytest.param(replace(LLAMA, head_dim=256, kv_heads=4), "PHKND", id="dim-256"),
    pytest.param(replace(LLAMA, heads=8), "PHKND", id="group-1"),
    pytest.param(replace(LLAMA, heads=28, kv_heads=4), "PHKND", id="group-7"),
    pytest.param(replace(LLAMA, q_tokens=4), "PHKND", id="4-new"),
    pytest.param(replace(LLAMA, heads=64, q_tokens=3), "PHKND", id="24-rows"),
    pytest.param(replace(LLAMA, heads=128, q_tokens=4), "PHKND", id="64-rows"),
    pytest.param(
        replace(LLAMA, heads=32, kv_heads=2, head_dim=256, q_tokens=4), "PHKND", id="64-rows-of-256"
    ),
    pytest.param(replace(LLAMA, window=1000, q_tokens=2), "PHKND", id="window"),
    pytest.param(replace(LLAMA, softcap=0.7, scale=0.3), "PHKND", id="cap"),
]


@pytest.mark.parametrize(("form", "order"), FORMS)
def test_agrees_with_float64_and_touches_nothing_stale(form, order):
    case = Case(form, RAGGED, order)
    assert case.agrees(case.run(case.workspace(), check=True))


@pytest.mark.parametrize(("form", "order"), FORMS[:1] + FORMS[7:8] + FORMS[13:17])
def test_many_whole_sequences(form, order):
    case = Case(form, tuple(range(1, 1400, 3)), order)
    workspace = case.workspace()
    assert case.agrees(case.run(workspace))


@pytest.mark.parametrize(
    "lengths",
    [
        (4096,),
        (32768,),
        (1024,) * 16,
        (4096,) * 16,
        (8192,) * 64,
        (1024,) * 256,
        (8192,) * 256,  # 4.3 G elements: offsets need 64 bits
        tuple(np.random.default_rng(63).integers(256, 16385, 64).tolist()),
        (4641, 45118, 1730, 1696),  # in parts of different lengths
        (3000,) * 20,
    ],
    ids=["1x4096", "1x32768", "16x1024", "16x4096", "64x8192", "256x1024", "256x8192", "ragged",
         "4-ragged", "20x3000"],
)  # fmt: skip
def test_a_hundred_runs_are_right_and_bitwise_equal(lengths):
    case = Case(LLAMA, lengths)
    workspace = case.workspace()
    first = case.run(workspace)
    assert case.agrees(first)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        differ += (case.run(workspace) != first).sum()
    assert int(differ) == 0
    assert not workspace.counters.any()


def test_a_captured_graph_serves_other_batches():
    case = Case(LLAMA, (300, 200, 10000))
    workspace = case.workspace()
    workspace.load(workspace.plan(case.counts), grid=workspace.max_items)
    out = case.run(workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gqa_decode(case.q, case.k, case.v, case.table, case.lengths, workspace, out=out)
    for lengths in ((300, 200, 10000), (1, 0, 33), (17, 3, 9999)):
        case.counts = np.array(lengths)
        case.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        case.k.nan_to_num_()  # shorter sequences uncover what lay behind the longer ones
        case.v.nan_to_num_()
        workspace.load(workspace.plan(lengths), grid=workspace.max_items)
        out.fill_(torch.nan)
        graph.replay()
        assert case.agrees(out)


@pytest.mark.parametrize("graphed", [False, True])
def test_overlapping_launches_see_what_the_one_before_wrote(graphed):
    """Each layer's queries are the output of the layer before."""
    case = Case(LLAMA, (5000, 70, 900))
    outs = []
    for overlap in (False, True):
        config = replace(config_for(LLAMA), overlap=overlap)
        workspace = GqaWorkspace(LLAMA, max_sequences=3, device="cuda", config=config)
        workspace.load(workspace.plan(case.counts))
        chain = [case.q * 4, *(torch.full_like(case.q, torch.nan) for _ in range(40))]

        def layers(chain=chain, workspace=workspace) -> None:
            for q, out in itertools.pairwise(chain):
                gqa_decode(q, case.k, case.v, case.table, case.lengths, workspace, out=out)

        layers()
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layers()
            for out in chain[1:]:
                out.fill_(torch.nan)
            graph.replay()
        outs.append(torch.stack(chain))
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)


@pytest.mark.parametrize("graphed", [False, True])
def test_page_tables_that_the_launch_before_wrote(graphed):
    """None of the table before is read, though launches overlap."""
    case = Case(LLAMA, (4096, 70, 900))
    workspace = case.workspace()
    for pool in (case.k, case.v):
        pool.nan_to_num_()  # the other table uncovers what lay behind a sequence
    pages = len(case.k)
    tables = [case.table.clone(), (case.table + pages // 2) % pages]
    expected = []
    for table in tables:
        case.table.copy_(table)
        expected.append(case.run(workspace))
    assert not torch.equal(*expected)
    case.table.fill_(-1)
    outs = [torch.full_like(out, torch.nan) for _ in range(50) for out in expected]

    def launches() -> None:
        for i, out in enumerate(outs):
            torch.add(tables[i % 2], 0, out=case.table)  # by a kernel
            gqa_decode(case.q, case.k, case.v, case.table, case.lengths, workspace, out=out)

    if graphed:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            launches()
        graph.replay()
    else:
        launches()
    for i, out in enumerate(outs):
        assert torch.equal(out, expected[i % 2])


def test_a_page_number_outside_of_the_pool_harms_its_own_sequence_only():
    case = Case(LLAMA, (3000, 100, 4000))
    for pool in (case.k, case.v):
        pool.nan_to_num_()
    good = case.run(case.workspace())
    for wrong in (-1, len(case.k), 2**31 - 1, -(2**31)):
        case.table[1, 2] = wrong
        out = case.run(case.workspace())
        assert torch.equal(out[[0, 2]], good[[0, 2]])
        assert out.isfinite().all()
        with pytest.raises(KernelArgumentError, match="page_table must have numbers of the pool"):
            case.run(case.workspace(), check=True)


def test_tensors_on_the_wrong_device_are_named():
    case = Case(LLAMA, (100,))
    workspace = case.workspace()
    case.table = case.table.cpu()
    with pytest.raises(KernelArgumentError, match="page_table must be on cuda"):
        case.run(workspace)
    case.q = case.q.cpu()
    with pytest.raises(KernelArgumentError, match="q must be on the workspace's cuda"):
        case.run(workspace)
