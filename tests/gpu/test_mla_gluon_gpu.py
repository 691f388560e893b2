"""Latent attention in Gluon on a GPU: against float64, a hundred times each with the same bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kvstore_kernels.mla_gluon import MlaTilesForm, MlaTilesWorkspace, mla_decode_tiles
from tests.gpu.latents import (
    RAGGED,
    LatentCase,
    check_equal_bits,
    check_replays,
    check_wrong_pages,
    ends,
)


class Case(LatentCase):
    """Of `mla_decode_tiles`."""

    form_class = MlaTilesForm
    workspace_class = MlaTilesWorkspace
    decode = staticmethod(mla_decode_tiles)
    most_error = 6e-3

    def __init__(self, lengths: Any, *, heads: int = 128, **options: int) -> None:
        super().__init__(lengths, heads=heads, **options)


@pytest.fixture(scope="module", autouse=True)
def _ends(gpu: torch.device) -> None:
    ends(__file__)


BATCHES: dict[str, dict[str, Any]] = {
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
def test_results(name: str) -> None:
    case = Case(**BATCHES[name])
    case.launch(check=True)
    case.check(most=40)


@pytest.mark.parametrize("name", TABLE)
def test_the_same_bits_a_hundred_times(name: str) -> None:
    check_equal_bits(Case(TABLE[name]))


def test_a_graph_is_replayed_with_other_lengths() -> None:
    check_replays(Case([3000, 1, 700, 129]), [64, 1, 5, 128], [2999, 0, 640, 65])


def test_pools_past_2_to_the_31_elements() -> None:
    case = Case([640, 100])
    case.move_far()
    case.launch(check=True)
    case.check()


def test_pages_outside_of_the_pool() -> None:
    check_wrong_pages(Case([200, 200]))


def _first_launch() -> None:
    case = Case([900, 5])
    case.launch()
    torch.cuda.synchronize()
    case.check()


if __name__ == "__main__":
    _first_launch()
