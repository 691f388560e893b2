"""An engine whose running sequences are attended to by the decode kernels: in Triton's interpreter
here, on a GPU with `make test-gpu`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported

from engines.wide import PROMPTS, save_wide

from kvstore_engines.attention import TorchAttention
from kvstore_engines.engine import Engine
from kvstore_engines.kernel_attention import KernelAttention


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_wide(tmp_path_factory.mktemp("wide"))


class Counting(KernelAttention):
    """Counts the calls that a kernel did."""

    calls = 0

    def _decode(self, *arguments: Any) -> torch.Tensor | None:
        found = super()._decode(*arguments)
        self.calls += found is not None
        return found


def answers(folder: Path, attention: Any, dtype: torch.dtype) -> list[tuple[int, ...]]:
    engine = Engine(folder, store=None, num_pages=32, dtype=dtype, attention=attention)
    return [tuple(result.token_ids) for result in engine.generate(PROMPTS, 6)]


def test_the_kernels_give_the_tokens_that_torch_gives(wide: Path) -> None:
    counting = Counting()
    wanted = answers(wide, TorchAttention(), torch.float16)
    assert answers(wide, counting, torch.float16) == wanted
    assert counting.calls > 2 * 5


def test_what_no_kernel_takes_is_left_to_torch(wide: Path) -> None:
    counting = Counting()
    wanted = answers(wide, TorchAttention(), torch.float32)
    assert answers(wide, counting, torch.float32) == wanted
    assert not counting.calls
