"""The ring of tiles of keys and values on a GPU: beside float64, many times, in graphs, beside
itself."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.gqa_decode import gqa_decode
from kvstore_kernels.gqa_form import GqaForm, GqaWorkspace
from kvstore_kernels.gqa_reference import gqa_reference
from kvstore_kernels.gqa_ring import GqaRingWorkspace, gqa_decode_ring
from tests.gpu.latents import RAGGED, check_equal_bits, check_replays, ends


class Case:
    """A batch in random pages; all that must not be read is NaN, all that must be written too."""

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        heads: int = 32,
        kv_heads: int = 8,
        page_tokens: int = 16,
        layout: str = "HND",
        layers: int = 1,
    ) -> None:
        self.lengths = list(lengths)
        self.form = GqaForm(heads=heads, kv_heads=kv_heads, head_dim=128, page_tokens=page_tokens)
        used = [-(-length // page_tokens) for length in lengths]
        pages = sum(used) + 2
        shape = (
            (pages, layers, kv_heads, 2, page_tokens, 128)
            if layout == "HND"
            else (pages, layers, 2, page_tokens, kv_heads, 128)
        )
        generator = torch.Generator("cuda").manual_seed(1)
        pool = torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)
        mine = pool[:, layers - 1]
        both = mine.unbind(2) if layout == "HND" else mine.transpose(2, 3).unbind(1)
        self.k, self.v = both
        order = torch.randperm(pages, generator=generator, device="cuda").int()
        self.table = torch.full((len(used), max(*used, 1, 1)), -7, dtype=torch.int32, device="cuda")
        at = 0
        for sequence, (length, count) in enumerate(zip(lengths, used, strict=True)):
            self.table[sequence, :count] = order[at : at + count]
            at += count
            if length % page_tokens:  # what lies behind the last token
                last = int(self.table[sequence, count - 1])
                for tensor in both:
                    tensor[last, :, length % page_tokens :] = math.nan
        for page in order[at:].tolist():
            for tensor in both:
                tensor[page] = math.nan
        self.q = torch.randn(
            len(used), 1, heads, 128, generator=generator, device="cuda", dtype=torch.bfloat16
        )
        self.workspace = self.planned()
        self.out = torch.full_like(self.q, math.nan)

    def planned(self, **options: int) -> GqaRingWorkspace:
        """A workspace with this batch's plan."""
        workspace = GqaRingWorkspace(
            self.form, max_sequences=len(self.lengths), device="cuda", **options
        )
        workspace.partials.fill_(math.nan)
        workspace.lse.fill_(math.nan)
        workspace.load(workspace.plan(self.lengths))
        return workspace

    def launch(self, **options: Any) -> torch.Tensor:
        options = {"out": self.out, "workspace": self.workspace, "q": self.q} | options
        q, workspace = options.pop("q"), options.pop("workspace")
        return gqa_decode_ring(q, self.k, self.v, self.table, workspace, **options)

    def check(self, most: int = 12) -> None:
        """Of some sequences, the longest and the shortest among them."""
        order = np.argsort(self.lengths, kind="stable")
        chosen = order[np.unique(np.linspace(0, len(order) - 1, most).astype(int))].tolist()
        assert not self.out.isnan().any()
        for at in chosen:
            one = slice(at, at + 1)
            expected = gqa_reference(
                self.q[one], self.k, self.v, self.table[one], self.lengths[one], self.form
            )
            difference = (self.out[one].double() - expected).norm()
            assert difference <= 5e-3 * expected.norm(), (at, self.lengths[at])
        self.check_words()

    def check_words(self) -> None:
        """What launches count in is zero again."""
        assert not self.workspace.counters.any()
        assert not self.workspace.claims.any()


@pytest.fixture(scope="module", autouse=True)
def _ends(gpu: torch.device) -> None:
    ends(__file__)


BATCHES: dict[str, dict[str, Any]] = {
    "one token": {"lengths": [1]},
    "any number of tiles": {"lengths": [16 * n - s for n in range(1, 40) for s in (0, 1, 15)]},
    "without tokens": {"lengths": [0, 450, 0]},
    "a part and more for each": {"lengths": [16_384] * 9 + [40_000, 9, 0]},
    "one long": {"lengths": [300_000]},
    "short ones that end in the middle of a tile": {"lengths": [1000] * 300},
    "16 KV heads": {"lengths": [900, 20, 5000], "heads": 64, "kv_heads": 16},
    "as many KV heads": {"lengths": [900, 20, 5000], "heads": 8},
    "3 query heads each": {"lengths": [333, 5, 2000], "heads": 24},
    "8 query heads each": {"lengths": [333, 5, 20_000], "heads": 64},
    "pages of 64": {"lengths": [4000, 1290], "page_tokens": 64},
    "pages of 48": {"lengths": [4000, 1290], "page_tokens": 48},
    "tokens before heads": {"lengths": [4000, 1290, 7], "layout": "NHD"},
    "a layer of several": {"lengths": [1000, 300], "layers": 3},
    "more sequences than workers": {"lengths": [128 * (n % 7) + n for n in range(300)]},
}
TABLE = {
    "1 x 4096": [4096],
    "16 x 4096": [4096] * 16,
    "64 x 8192": [8192] * 64,
    "256 x 1024": [1024] * 256,
    "random": RAGGED,
}


@pytest.mark.parametrize("name", BATCHES)
def test_results(name: str) -> None:
    case = Case(**BATCHES[name])
    for _ in range(3):
        case.out.fill_(math.nan)
        case.launch(check=True)
        case.check(most=40)


@pytest.mark.parametrize("workers", [1, 2, 7, 100, 132, 400])
def test_any_number_of_workers(workers: int) -> None:
    case = Case([20_000, 64, 5000, 1, 700])
    case.workspace = case.planned(workers=workers)
    for _ in range(3):
        case.out.fill_(math.nan)
        case.launch()
        case.check()


@pytest.mark.parametrize("name", TABLE)
def test_the_same_bits_a_hundred_times(name: str) -> None:
    check_equal_bits(Case(TABLE[name]))  # type: ignore[arg-type]


def test_as_the_kernel_for_all_forms() -> None:
    case = Case(RAGGED)
    workspace = GqaWorkspace(case.form, max_sequences=len(RAGGED), device="cuda")
    workspace.load(workspace.plan(RAGGED))
    lengths = torch.tensor(RAGGED, dtype=torch.int32, device="cuda")
    other = gqa_decode(case.q, case.k, case.v, case.table.clamp(min=0), lengths, workspace)
    found = case.launch()
    assert (found.float() - other.float()).norm() <= 5e-3 * other.float().norm()


def test_a_graph_is_replayed_with_other_lengths() -> None:
    check_replays(Case([30_000, 1, 700, 129]), [64, 1, 5, 128], [2999, 0, 640, 65])  # type: ignore[arg-type]


def test_an_output_in_strides() -> None:
    case = Case([5000, 70])
    out = torch.full((2, 1, 32, 256), math.nan, device="cuda", dtype=torch.bfloat16)
    case.launch(out=out[..., :128])
    case.launch()
    assert torch.equal(out[..., :128], case.out)
    assert out[..., 128:].isnan().all()


def test_launches_on_several_streams_wait_for_none_of_another() -> None:
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


def test_pages_outside_of_the_pool_read_as_zeros_for_their_sequence_alone() -> None:
    case = Case([2000, 2000])
    good = case.launch().clone()
    for wrong in (-1, len(case.k), 2**31 - 1, -(2**31)):
        case.table[0, 1] = wrong
        with pytest.raises(KernelArgumentError, match="page_table"):
            case.launch(check=True)
        assert torch.equal(case.launch()[1], good[1])
        assert not case.out.isnan().any()


if __name__ == "__main__":
    Case([1000, 70]).launch()
    torch.cuda.synchronize()
