"""The ring of tiles on a GPU: beside float64, many times, in graphs, beside itself."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from kvstore_kernels.fused import NewLatents, rotate_first
from kvstore_kernels.mla_reference import RANK, WIDTH
from kvstore_kernels.mla_ring import MlaRingForm, MlaRingWorkspace, mla_decode_ring
from tests.gpu.latents import (
    RAGGED,
    TIMES,
    LatentCase,
    check_equal_bits,
    check_replays,
    check_wrong_pages,
    ends,
)


class Case(LatentCase):
    """Of `mla_decode_ring`."""

    form_class = MlaRingForm
    workspace_class = MlaRingWorkspace
    decode = staticmethod(mla_decode_ring)
    most_error = 5e-3

    def __init__(self, lengths: Any, *, heads: int = 16, **options: int) -> None:
        super().__init__(lengths, heads=heads, **options)

    def check_words(self) -> None:
        super().check_words()
        assert not self.workspace.claims.any()

    def new_tokens(self, *, interleaved: bool = True) -> NewLatents:
        """The newest tokens, which are no longer in the pages."""
        size = self.form.page_tokens
        lengths = torch.tensor(self.lengths, device="cuda")
        position = lengths[:, None] + torch.arange(-self.form.q_tokens, 0, device="cuda")
        column = (position // size).clamp(min=0)
        page_ids = torch.where(position >= 0, self.table.gather(1, column), -1).long()
        offsets = (position % size).long()
        self.places = page_ids[position >= 0], offsets[position >= 0]
        self.pages[self.places] = math.nan

        def numbers(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device="cuda", dtype=torch.bfloat16)

        cos, sin = numbers(2, *self.shape[:2], 32)
        return NewLatents(
            q_rope=numbers(*self.shape, 192)[..., 128:],
            latents=numbers(*self.shape[:2], 1536 + WIDTH)[..., 1536:],
            norm=numbers(RANK),
            cos=cos,
            sin=sin,
            page_ids=page_ids,
            offsets=offsets,
            interleaved=interleaved,
        )


@pytest.fixture(scope="module", autouse=True)
def _ends(gpu: torch.device) -> None:
    ends(__file__)


BATCHES: dict[str, dict[str, Any]] = {
    "one token": {"lengths": [1]},
    "any number of tiles": {"lengths": [64 * n - s for n in range(1, 10) for s in (0, 1, 63)]},
    "without tokens": {"lengths": [0, 450, 0]},
    "a part and more for each": {"lengths": [16_384] * 9 + [40_000, 9, 0]},
    "one long": {"lengths": [300_000]},
    "5 heads": {"lengths": [900, 20, 5000], "heads": 5},
    "40 heads": {"lengths": [333, 5, 2000], "heads": 40},
    "four new tokens": {"lengths": [515, 5000], "heads": 4, "q_tokens": 4},
    "tokens in the middle of a group": {"lengths": [1260, 70], "heads": 6, "q_tokens": 4},
    "more new tokens than tokens": {"lengths": [2, 65], "q_tokens": 4, "heads": 4},
    "pages of more tiles": {"lengths": [4000, 1290], "page_tokens": 192},
    "a layer of several": {"lengths": [1000, 300], "layers": 3},
    "more sequences than workers": {"lengths": [128 * (n % 7) + n for n in range(300)]},
}
TABLE = {
    "1 x 4096": [4096],
    "1 x 65536": [65_536],
    "16 x 4096": [4096] * 16,
    "64 x 4096": [4096] * 64,
    "64 x 16384": [16_384] * 64,
    "256 x 1024": [1024] * 256,
    "random": RAGGED,
}


@pytest.mark.parametrize("name", BATCHES)
def test_results(name: str) -> None:
    case = Case(**BATCHES[name])
    case.launch(check=True)
    case.check(most=40)


@pytest.mark.parametrize("workers", [1, 2, 7, 100, 132, 400])
def test_any_number_of_workers(workers: int) -> None:
    """More than run at once, too: those that run then do not wait for those that do not."""
    case = Case([20_000, 64, 5000, 1, 700])
    case.workspace = case.planned(workers=workers)
    for _ in range(3):
        case.out.fill_(math.nan)
        case.launch()
        case.check()


@pytest.mark.parametrize("name", TABLE)
def test_the_same_bits_a_hundred_times(name: str) -> None:
    check_equal_bits(Case(TABLE[name]))


@pytest.mark.parametrize("name", ["1 x 4096", "64 x 4096", "random"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_new_tokens_in_the_launch(name: str, interleaved: bool) -> None:
    case = Case(TABLE[name], layers=2)
    new = case.new_tokens(interleaved=interleaved)
    q, wanted = case.q, case.pages.clone()
    case.q = q.clone()
    rotate_first(case.q, new, wanted, None)
    before = case.pages.clone()
    first = case.launch(q=q, append=new, check=True).clone()
    case.check(pages=wanted)
    bits = case.pages[case.places].clone()
    apart = (bits.view(torch.int16).int() - wanted[case.places].view(torch.int16).int()).abs()
    assert int(apart.max()) <= 1  # the norm's sum is taken in another order
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(TIMES):
        case.pages[case.places] = math.nan
        differ += (case.launch(q=q, append=new) != first).sum()
        differ += (case.pages[case.places] != bits).sum()
    assert int(differ) == 0
    case.pages[case.places] = before[case.places]
    assert torch.equal(case.pages.view(torch.int16), before.view(torch.int16)), "more was written"


@pytest.mark.parametrize("shape", [(5, 3, 128), (8, 2, 64), (20, 1, 64)])
def test_several_new_tokens_in_the_launch(shape: tuple[int, int, int]) -> None:
    heads, q_tokens, page_tokens = shape
    case = Case([1000, 2, 64, 65, 9000], heads=heads, q_tokens=q_tokens, page_tokens=page_tokens)
    new = case.new_tokens()
    q, wanted = case.q, case.pages.clone()
    case.q = q.clone()
    rotate_first(case.q, new, wanted, None)
    case.launch(q=q, append=new, check=True)
    case.check(pages=wanted)


def test_a_graph_is_replayed_with_other_lengths() -> None:
    check_replays(Case([30_000, 1, 700, 129]), [64, 1, 5, 128], [2999, 0, 640, 65])


@pytest.mark.parametrize("graphed", [False, True])
def test_overlapping_launches_see_what_the_one_before_wrote(graphed: bool) -> None:
    """Each layer's latent queries are the output of the layer before."""
    case = Case([5000, 70, 900])
    outs = []
    for waiting in (True, False):
        chain = [case.q * 4, *(torch.zeros_like(case.q) for _ in range(40))]

        def layers(chain: list[torch.Tensor] = chain, waiting: bool = waiting) -> None:
            for q, out in itertools.pairwise(chain):
                out[..., :RANK] = case.launch(q=q, out=None)
                if waiting and not graphed:
                    torch.cuda.synchronize()

        layers()
        if graphed:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                layers()
            for out in chain[1:]:
                out.fill_(math.nan)[..., RANK:] = 0
            graph.replay()
        outs.append(torch.stack(chain))
    assert outs[0].isfinite().all()
    assert torch.equal(*outs)


def test_launches_on_several_streams_wait_for_none_of_another() -> None:
    """Each fills the GPU and its parts wait for each other; together they must end all the same."""
    case = Case([65_536, 3000])
    streams = [torch.cuda.Stream(priority=-(number % 2)) for number in range(4)]
    workspaces = [case.planned() for _ in streams]
    first = case.launch().clone()
    torch.cuda.synchronize()
    outs = []
    for _ in range(25):
        for stream, workspace in zip(streams, workspaces, strict=True):
            with torch.cuda.stream(stream):
                outs.append(case.launch(workspace=workspace, out=None))
    torch.cuda.synchronize()
    assert all(torch.equal(out, first) for out in outs)


def test_parts_that_share_the_gpu_with_something_else() -> None:
    case = Case([65_536])
    first = case.launch().clone()
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    beside = torch.cuda.Stream()
    torch.cuda.synchronize()
    outs = []
    for _ in range(20):
        with torch.cuda.stream(beside):
            matrix @ matrix
        outs.append(case.launch(out=None))
    torch.cuda.synchronize()
    assert all(torch.equal(out, first) for out in outs)


def test_pools_past_2_to_the_31_elements() -> None:
    case = Case([640, 100])
    case.move_far()
    new = case.new_tokens()
    q, case.q = case.q, case.q.clone()
    case.launch(q=q, append=new, check=True)
    rotate_first(case.q, new, case.pages, None)
    case.check()


def test_pages_outside_of_the_pool() -> None:
    check_wrong_pages(Case([200, 200]))


def _first_launch() -> None:
    case = Case([90_000, 5])
    case.launch()
    torch.cuda.synchronize()
    case.check()
    new = case.new_tokens()
    case.launch(append=new)
    torch.cuda.synchronize()


if __name__ == "__main__":
    _first_launch()
