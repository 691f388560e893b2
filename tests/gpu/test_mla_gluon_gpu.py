"""Latent attention in Gluon on a GPU: against float64, a hundred times each with the same bits."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.mla_gluon import MlaTilesForm, MlaTilesWorkspace, mla_decode_tiles
from kvstore_kernels.mla_reference import RANK, WIDTH, mla_reference

TIMES = 100
SCALE = 192**-0.5
MOST_ERROR = 6e-3
RAGGED = tuple(int(n) for n in np.random.default_rng(0).integers(256, 16_385, 64))
SECONDS = 90  # for a first launch, compilation included


def seeded(seed):
    return torch.Generator("cuda").manual_seed(seed)


class Case:
    """A batch in random pages; all that must not be read is NaN, all that must be written too."""

    def __init__(self, lengths, *, heads=128, q_tokens=1, page_tokens=64, layers=1):
        self.lengths = lengths
        self.form = MlaTilesForm(
            heads=heads,
            q_tokens=q_tokens,
            page_tokens=page_tokens,
            scale=SCALE,
        )
        used = [-(-length // page_tokens) for length in lengths]
        pool = torch.full(
            (sum(used) + 2, layers, page_tokens, WIDTH),
            math.nan,
            device="cuda",
            dtype=torch.bfloat16,
        )
        self.pages = pool[:, layers - 1]
        table = np.full((len(lengths), max(*used, 1, 1)), -7, np.int32)
        numbers = np.random.default_rng(1).permutation(len(pool))
        at = 0
        generator = seeded(1)
        for sequence, (length, count) in enumerate(zip(lengths, used, strict=True)):
            table[sequence, :count] = numbers[at : at + count]
            at += count
            tokens = torch.randn(
                count * page_tokens, WIDTH, generator=generator, device="cuda"
            ).bfloat16()
            tokens[length:] = math.nan
            mine = torch.from_numpy(table[sequence, :count]).cuda().long()
            self.pages[mine] = tokens.view(count, page_tokens, WIDTH)
        self.table = torch.from_numpy(table).cuda()
        shape = (len(lengths), q_tokens, heads)
        self.q = torch.randn(*shape, WIDTH, generator=generator, device="cuda").bfloat16()
        self.workspace = MlaTilesWorkspace(self.form, max_sequences=len(lengths), device="cuda")
        self.workspace.partials.fill_(math.nan)
        self.workspace.load(self.workspace.plan(lengths))
        self.out = torch.full((*shape, RANK), math.nan, device="cuda", dtype=torch.bfloat16)

    def launch(self, **options):
        return mla_decode_tiles(
            self.q, self.pages, self.table, self.workspace, out=self.out, **options
        )

    def check(self, most=8):
        """Of some sequences, the longest and the shortest among them."""
        order = np.argsort(self.lengths, kind="stable")
        chosen = order[np.unique(np.linspace(0, len(order) - 1, most).astype(int))].tolist()
        assert not self.out.isnan().any()
        for at in chosen:
            expected = mla_reference(
                self.q[at : at + 1],
                self.pages,
                self.table[at : at + 1].clamp(min=0),
                torch.tensor([self.lengths[at]]),
                scale=SCALE,
            )[0]
            difference = (self.out[at].double() - expected).norm()
            assert difference <= MOST_ERROR * expected.norm(), (at, self.lengths[at])
        assert not self.workspace.counters.any()


@pytest.fixture(scope="module", autouse=True)
def _ends(gpu):
    """The kernel ends: its first launch is in a process which is ended when it takes long."""
    try:
        subprocess.run([sys.executable, __file__], timeout=SECONDS, check=True)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the first launch did not end in {SECONDS} s")


BATCHES = {
    "one token": {"lengths": [1]},
    "any number of blocks": {"lengths": [64 * n - s for n in range(1, 10) for s in (0, 1, 63)]},
    "without tokens": {"lengths": [0, 450, 0]},
    "64 heads": {"lengths": [900, 20], "heads": 64},
    "half a tile left": {"lengths": [333, 5, 2000], "heads": 96},
    "tokens in the middle of a tile": {"lengths": [1260, 70], "heads": 96, "q_tokens": 2},
    "four new tokens": {"lengths": [515, 5000], "q_tokens": 4},
    "more new tokens than tokens": {"lengths": [2, 65], "q_tokens": 4, "heads": 64},
    "few heads, four tokens": {"lengths": [4641, 45_118, 1730, 1696], "heads": 16, "q_tokens": 4},
    "pages of more blocks": {"lengths": [4000, 1290], "page_tokens": 192},
    "a layer of several": {"lengths": [1000, 300], "layers": 3},
    "more sequences than workers": {"lengths": [128 * (n % 7) + n for n in range(300)]},
}
TABLE = {
    "1 x 4096": [4096],
    "1 x 131072": [131_072],
    "16 x 4096": [4096] * 16,
    "64 x 4096": [4096] * 64,
    "64 x 16384": [16_384] * 64,
    "random": RAGGED,
}


@pytest.mark.parametrize("name", BATCHES)
def test_results(name):
    case = Case(**BATCHES[name])
    case.launch(check=True)
    case.check(most=40)


@pytest.mark.parametrize("name", TABLE)
def test_the_same_bits_a_hundred_times(name):
    case = Case(TABLE[name])
    first = case.launch().clone()
    case.check()
    for _ in range(TIMES):
        case.out.fill_(math.nan)
        assert torch.equal(case.launch(), first)


def test_a_graph_is_replayed_with_other_lengths():
    case = Case([3000, 1, 700, 129])
    case.launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.launch()
    for lengths in ([3000, 1, 700, 129], [64, 1, 5, 128], [2999, 0, 640, 65]):
        case.lengths = lengths
        case.workspace.load(case.workspace.plan(lengths))
        case.out.fill_(math.nan)
        graph.replay()
        case.check()


def test_pools_past_2_to_the_31_elements():
    pages = 60_000  # 2.2 milliards of elements, 4.4 GB
    case = Case([640, 100])
    pool = torch.empty(pages, 64, WIDTH, device="cuda", dtype=torch.bfloat16)
    assert pool.numel() > 2**31
    there = case.table >= 0
    moved = torch.where(there, pages - 1 - case.table, case.table)
    pool[moved[there].long()] = case.pages[case.table[there].long()]
    case.pages, case.table = pool, moved.int()
    case.launch(check=True)
    case.check()


def test_pages_outside_of_the_pool():
    case = Case([200, 200])
    case.table[0, 1] = 2**31 - 1
    with pytest.raises(KernelArgumentError, match="page_table"):
        case.launch(check=True)
    case.launch()
    assert not case.out.isnan().any()


def _first_launch():
    case = Case([900, 5])
    case.launch()
    torch.cuda.synchronize()
    case.check()


if __name__ == "__main__":
    _first_launch()
