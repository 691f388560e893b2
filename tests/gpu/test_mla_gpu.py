"""Paged latent attention on a GPU: beside float64, many times, in graphs, beside itself."""

from __future__ import annotations

import itertools
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.mla_decode import MlaConfig, MlaForm, MlaWorkspace, config_for, mla_decode
from kvstore_kernels.mla_reference import RANK, WIDTH, mla_reference
from kvstore_kernels.worklist import COLUMNS, END, FIRST, PARTS

FP8 = torch.float8_e4m3fn
RANK_OF_8 = MlaForm(heads=16, scale=192**-0.5)  # what one of eight ranks has of 128 heads
RAGGED = (37, 0, 2600, 1, 129, 16384, 15, 777)
RANDOM = tuple(np.random.default_rng(0).integers(256, 16_385, 64).tolist())
DRAFTS = (4641, 45_118, 1730, 1696)
MOST_ERROR = 5e-3
SECONDS = 120  # for a first launch, compilation included


class Case:
    """Random pages and queries; what lies past a sequence's end is NaN, or no page at all."""

    def __init__(self, form: MlaForm, lengths: tuple[int, ...], layers: int = 1) -> None:
        generator = torch.Generator("cuda").manual_seed(3)
        self.form, self.counts = form, np.array(lengths)
        needed = (-(-self.counts // form.page_tokens)).tolist()
        shape = (sum(needed) + 1, layers, form.page_tokens, WIDTH)
        pool = torch.empty(shape, device="cuda", dtype=form.kv_dtype)
        self.pages = pool[:, layers - 1]
        for some in self.pages.split(4096):
            numbers = torch.randn(some.shape, generator=generator, device="cuda")
            some.copy_(numbers.to(form.kv_dtype))
        order = torch.randperm(len(pool), generator=generator, device="cuda", dtype=torch.int32)
        columns = max(*needed, 1)
        self.table = torch.full((len(lengths), columns), -7, dtype=torch.int32, device="cuda")
        at = 0
        for sequence, (count, length) in enumerate(zip(needed, lengths, strict=True)):
            self.table[sequence, :count] = order[at : at + count]
            at += count
            if length % form.page_tokens:
                self._spoil(int(order[at - 1]), length % form.page_tokens)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        shape = (len(lengths), form.q_tokens, form.heads, WIDTH)
        self.q = torch.randn(shape, generator=generator, device="cuda").bfloat16()
        self.scales = None
        if form.kv_dtype is FP8:
            self.scales = torch.rand(len(pool), generator=generator, device="cuda") + 0.5

    def _spoil(self, page: int, used: int) -> None:
        self.pages.view(torch.uint8)[page, used:] = 0xFF  # NaN

    def workspace(self, config: MlaConfig | None = None, **options: int) -> MlaWorkspace:
        workspace = MlaWorkspace(
            self.form, max_sequences=len(self.counts), device="cuda", config=config, **options
        )
        workspace.partials.fill_(torch.nan)
        workspace.moments.fill_(torch.nan)
        workspace.load(workspace.plan(self.counts))
        return workspace

    def run(
        self,
        workspace: MlaWorkspace,
        *,
        q: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        check: bool = False,
    ) -> torch.Tensor:
        if out is None:
            out = torch.full((*self.q.shape[:3], RANK), torch.nan, device="cuda").bfloat16()
        return mla_decode(
            *(self.q if q is None else q, self.pages, self.table, self.lengths, workspace),
            page_scales=self.scales,
            out=out,
            check=check,
        )

    def check(self, out: torch.Tensor, most: int = 12) -> None:
        """Of some sequences, the longest and the shortest among them."""
        assert not out.isnan().any()
        order = np.argsort(self.counts, kind="stable")
        for at in order[np.unique(np.linspace(0, len(order) - 1, most).astype(int))].tolist():
            want = mla_reference(
                *(self.q[at : at + 1], self.pages, self.table[at : at + 1]),
                torch.from_numpy(self.counts[at : at + 1]),
                scale=self.form.scale,
                page_scales=self.scales,
            )[0]
            assert (out[at].double() - want).norm() <= MOST_ERROR * want.norm(), self.counts[at]


@pytest.fixture(scope="module", autouse=True)
def launch_that_ends(gpu):
    """A first launch is in a process which is ended when it takes long."""
    subprocess.run([sys.executable, __file__], timeout=SECONDS, check=True)
    return gpu


FORMS = [
    pytest.param(RANK_OF_8, 1, id="16-rows"),
    pytest.param(RANK_OF_8, 3, id="layers"),
    pytest.param(replace(RANK_OF_8, heads=5), 1, id="5-rows"),
    pytest.param(replace(RANK_OF_8, q_tokens=2), 1, id="32-rows"),
    pytest.param(replace(RANK_OF_8, heads=20, q_tokens=3), 2, id="60-rows"),
    pytest.param(replace(RANK_OF_8, q_tokens=4), 1, id="64-rows"),
    pytest.param(replace(RANK_OF_8, heads=128), 1, id="128-rows"),
    pytest.param(replace(RANK_OF_8, page_tokens=128, q_tokens=2), 1, id="pages-of-128"),
    pytest.param(replace(RANK_OF_8, page_tokens=16), 2, id="pages-of-16"),
    pytest.param(replace(RANK_OF_8, page_tokens=48, q_tokens=4), 1, id="pages-of-48"),
    pytest.param(replace(RANK_OF_8, kv_dtype=FP8), 2, id="float8"),
    pytest.param(replace(RANK_OF_8, kv_dtype=FP8, page_tokens=16, q_tokens=2), 1, id="float8-16"),
]


@pytest.mark.parametrize(("form", "layers"), FORMS)
def test_agrees_with_float64_and_touches_nothing_stale(form, layers):
    case = Case(form, RAGGED, layers)
    workspace = case.workspace()
    case.check(case.run(workspace, check=True))
    assert not workspace.meetings.any()


@pytest.mark.parametrize(("form", "layers"), FORMS[:1] + FORMS[3:4] + FORMS[8:9])
def test_many_whole_sequences(form, layers):
    case = Case(form, tuple(range(1, 1400, 3)), layers)
    case.check(case.run(case.workspace()), most=40)


@pytest.mark.parametrize(
    "config",
    [
        MlaConfig(ahead=False),
        MlaConfig(num_stages=2, blocks_per_sm=1),
        MlaConfig(merge_elements=16384),
        MlaConfig(rows=32),
        MlaConfig(rows=64, num_warps=8, blocks_per_sm=1, merge_elements=16384),
    ],
    ids=["not-ahead", "two-stages", "wide-merge", "32-rows", "64-rows"],
)
def test_other_configurations(config):
    case = Case(replace(RANK_OF_8, q_tokens=2), RAGGED)
    case.check(case.run(case.workspace(config)))


def with_parts(case: Case, parts: int, *, patient: bool) -> MlaWorkspace:
    """With a list that cuts the one sequence into so many parts, a tile each."""
    workspace = case.workspace(workers=parts if patient else 1)
    number = np.arange(parts)
    cuts = np.minimum(np.arange(parts + 1) * 64, case.counts[0])
    rows = [0 * number, 0 * number, cuts[:-1], cuts[1:], number, 0 * number, parts + 0 * number]
    length = case.counts[0] + 0 * number
    items = np.stack([*rows, number, length], axis=1).astype(np.int32)
    workspace.partials = torch.full((parts, 16, RANK), torch.nan, device="cuda")
    workspace.moments = torch.full((parts, 16, 2), torch.nan, device="cuda")
    workspace.items = torch.zeros((1 + parts, COLUMNS), dtype=torch.int32, device="cuda")
    workspace.max_items = parts
    worklist = workspace.plan(case.counts)
    workspace.load(replace(worklist, items=items, n_partials=parts, n_counters=1))
    return workspace


@pytest.mark.parametrize("patient", [False, True])
@pytest.mark.parametrize("parts", [2, 4, 5, 16, 17, 128, 129, 264, 1000])
def test_any_number_of_parts_in_any_order(parts, patient):
    """More than run at once, too: those that run then do not wait for those that do not."""
    case = Case(RANK_OF_8, (64 * parts - 3,))
    workspace = with_parts(case, parts, patient=patient)
    first = case.run(workspace)
    case.check(first)
    rows = workspace.items[1:]
    for seed in range(10):
        torch.manual_seed(seed)
        rows.copy_(rows[torch.randperm(parts, device="cuda")])
        assert torch.equal(case.run(workspace), first)
    assert not workspace.meetings.any()


TABLE = {
    "1x4096": ((4096,), RANK_OF_8),
    "1x65536": ((65_536,), RANK_OF_8),
    "1x131072": ((131_072,), RANK_OF_8),
    "16x4096": ((4096,) * 16, RANK_OF_8),
    "64x4096": ((4096,) * 64, RANK_OF_8),
    "64x16384": ((16_384,) * 64, RANK_OF_8),
    "random": (RANDOM, RANK_OF_8),
    "drafts": (DRAFTS, replace(RANK_OF_8, q_tokens=4)),
    "2-new-64x4096": ((4096,) * 64, replace(RANK_OF_8, q_tokens=2)),
    "128-heads-1x4096": ((4096,), replace(RANK_OF_8, heads=128)),
    "128-heads-1x131072": ((131_072,), replace(RANK_OF_8, heads=128)),
    "128-heads-16x4096": ((4096,) * 16, replace(RANK_OF_8, heads=128)),
    "128-heads-64x4096": ((4096,) * 64, replace(RANK_OF_8, heads=128)),
    "128-heads-64x16384": ((16_384,) * 64, replace(RANK_OF_8, heads=128)),
    "128-heads-128x16384": ((16_384,) * 128, replace(RANK_OF_8, heads=128)),
    "128-heads-random": (RANDOM, replace(RANK_OF_8, heads=128)),
    "pages-of-16-16x4096": ((4096,) * 16, replace(RANK_OF_8, page_tokens=16)),
    "float8-64x4096": ((4096,) * 64, replace(RANK_OF_8, kv_dtype=FP8)),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_hundred_runs_are_right_and_bitwise_equal(name):
    lengths, form = TABLE[name]
    case = Case(form, lengths)
    workspace = case.workspace()
    first = case.run(workspace)
    case.check(first, most=6)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(100):
        differ += (case.run(workspace) != first).sum()
    assert int(differ) == 0
    assert not workspace.meetings.any()


def test_a_captured_graph_serves_other_batches():
    case = Case(RANK_OF_8, (300, 200, 10_000))
    workspace = case.workspace()
    workspace.load(workspace.plan(case.counts), grid=workspace.max_items)
    out = case.run(workspace)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.run(workspace, out=out)
    for lengths in ((300, 200, 10_000), (1, 0, 33), (17, 3, 9999), (256, 2, 8000)):
        case.counts = np.array(lengths)
        case.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        workspace.load(workspace.plan(lengths), grid=workspace.max_items)
        out.fill_(torch.nan)
        graph.replay()
        case.check(out)
    assert not workspace.meetings.any()


@pytest.mark.parametrize("graphed", [False, True])
def test_overlapping_launches_see_what_the_one_before_wrote(graphed):
    """Each layer's latent queries are the output of the layer before."""
    case = Case(RANK_OF_8, (5000, 70, 900))
    outs = []
    for overlap in (False, True):
        workspace = case.workspace(replace(config_for(RANK_OF_8), overlap=overlap))
        chain = [case.q * 4, *(torch.zeros_like(case.q) for _ in range(40))]

        def layers(chain=chain, workspace=workspace) -> None:
            for q, out in itertools.pairwise(chain):
                case.run(workspace, q=q, out=out[..., :RANK])

        layers()
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layers()
            for out in chain[1:]:
                out.fill_(torch.nan)[..., RANK:] = 0
            graph.replay()
        outs.append(torch.stack(chain))
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)


def test_launches_on_several_streams_wait_for_none_of_another():
    """Each fills the GPU and its parts wait for each other; together they must end all the same."""
    case = Case(RANK_OF_8, (65_536,))
    streams = [torch.cuda.Stream() for _ in range(4)]
    workspaces = [case.workspace() for _ in streams]
    first = case.run(workspaces[0])
    assert workspaces[0].plan(case.counts).items[:, PARTS].max() > 100
    torch.cuda.synchronize()
    outs = []
    for _ in range(25):
        for stream, workspace in zip(streams, workspaces, strict=True):
            with torch.cuda.stream(stream):
                outs.append(case.run(workspace))
    torch.cuda.synchronize()
    assert all(torch.equal(out, first) for out in outs)


def test_parts_that_share_the_gpu_with_something_else():
    case = Case(RANK_OF_8, (65_536,))
    workspace = case.workspace()
    first = case.run(workspace)
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    beside = torch.cuda.Stream()
    torch.cuda.synchronize()
    outs = []
    for _ in range(20):
        with torch.cuda.stream(beside):
            matrix @ matrix
        outs.append(case.run(workspace))
    torch.cuda.synchronize()
    assert all(torch.equal(out, first) for out in outs)


@pytest.mark.parametrize("page_tokens", [32, 64])
def test_pools_past_two_to_the_31_elements(page_tokens):
    case = Case(replace(RANK_OF_8, page_tokens=page_tokens), (640, 100))
    near = case.run(case.workspace())
    pages = 2_200_000_000 // (page_tokens * WIDTH)
    pool = torch.empty(pages, page_tokens, WIDTH, device="cuda", dtype=torch.bfloat16)
    there = case.table >= 0
    moved = torch.where(there, pages - 1 - case.table, case.table)
    pool[moved[there].long()] = case.pages[case.table[there].long()]
    case.pages, case.table = pool, moved.int()
    assert pool.numel() > 2**31
    assert torch.equal(case.run(case.workspace(), check=True), near)


@pytest.mark.parametrize("page_tokens", [16, 64])
def test_a_page_number_outside_of_the_pool_harms_its_own_sequence_only(page_tokens):
    case = Case(replace(RANK_OF_8, page_tokens=page_tokens), (3000, 100, 4000))
    good = case.run(case.workspace())
    for wrong in (-1, len(case.pages), 2**31 - 1, -(2**31)):
        case.table[1, 1] = wrong
        out = case.run(case.workspace())
        assert torch.equal(out[[0, 2]], good[[0, 2]])
        with pytest.raises(KernelArgumentError, match="page_table must have numbers of the pool"):
            case.run(case.workspace(), check=True)


def test_tensors_on_the_wrong_device_are_named():
    case = Case(RANK_OF_8, (100,))
    workspace = case.workspace()
    case.table = case.table.cpu()
    with pytest.raises(KernelArgumentError, match="page_table must be on cuda"):
        case.run(workspace)
    case.q = case.q.cpu()
    with pytest.raises(KernelArgumentError, match="q must be on the workspace's cuda"):
        case.run(workspace)


def _first_launch() -> None:
    case = Case(RANK_OF_8, (9000, 5))
    workspace = case.workspace()
    items = workspace.plan(case.counts).items
    assert (items[:, END] - items[:, FIRST]).max() < 9000
    case.check(case.run(workspace))


if __name__ == "__main__":
    _first_launch()
