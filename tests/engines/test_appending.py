"""An engine whose decode steps write and attend in one launch, in Triton's interpreter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from engines.wide import PROMPTS, save_wide, save_wide_latent

from kvstore_engines.appending import Appending
from kvstore_engines.attention import TorchAttention
from kvstore_engines.engine import Engine
from kvstore_engines.kernel_attention import KernelAttention
from kvstore_engines.kernel_ops import KernelOps
from kvstore_engines.models import deepseek, llama
from kvstore_engines.ops import TorchOps

MODELS = {
    "llama": (save_wide, torch.float16),
    "deepseek_v3": (save_wide_latent, torch.bfloat16),
}


class InTwo(KernelAttention):
    """Leaves the writing to the operations."""

    def append_grouped(self, *_: Any, **__: Any) -> None:
        """Never in one launch."""

    def append_latent(self, *_: Any, **__: Any) -> None:
        """Never in one launch."""


class InOne(KernelAttention):
    """Counts what was done in one launch."""

    launches = 0

    def _decode(self, *arguments: Any) -> torch.Tensor | None:
        found = super()._decode(*arguments)
        appended = len(arguments) > 4 and arguments[4] is not None
        self.launches += appended and found is not None
        return found


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    save, dtype = MODELS[request.param]
    return save(tmp_path_factory.mktemp(request.param)), dtype


def run(folder: Path, dtype: torch.dtype, attention: Any) -> tuple[Any, torch.Tensor]:
    """The answers, and the pages."""
    engine = Engine(folder, store=None, num_pages=32, dtype=dtype, attention=attention)
    results = engine.generate(PROMPTS[1:3], 3)
    return [result.token_ids for result in results], engine.pool.storage


def test_one_launch_gives_the_tokens_that_two_give(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (llama, deepseek):
        monkeypatch.setattr(module, "ops_for", lambda _: KernelOps())
    in_one = InOne()
    tokens, pages = run(*model, in_one)
    wanted, wanted_pages = run(*model, InTwo())
    assert tokens == wanted
    assert in_one.launches >= 2 * 2  # layers; steps after the prompts
    difference = (pages.double() - wanted_pages.double()).norm()
    assert difference <= 1e-2 * wanted_pages.double().norm()


@pytest.mark.parametrize(
    ("attention", "ops", "able"),
    [
        (KernelAttention(), KernelOps(), True),
        (KernelAttention(), TorchOps(), False),
        (TorchAttention(), KernelOps(), False),
    ],
)
def test_torch_does_one_thing_at_a_time(attention: Any, ops: Any, able: bool) -> None:
    assert (Appending(attention, ops)._in_one is attention) is able
