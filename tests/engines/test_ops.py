"""A model whose small operations are kernels gives the tokens that torch's operations give."""

import os
from pathlib import Path
from typing import Any

import pytest

# Kernels run in Triton's interpreter; it is read when they are imported.
os.environ.setdefault("TRITON_INTERPRET", "1")

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("triton")

from engines.tiny import PROMPTS  # noqa: E402

from kvstore_engines.attention import TorchAttention, make_batch  # noqa: E402
from kvstore_engines.checkpoint import load_checkpoint  # noqa: E402
from kvstore_engines.kernel_ops import KernelOps  # noqa: E402
from kvstore_engines.models.deepseek import DeepseekModel  # noqa: E402
from kvstore_engines.models.llama import LlamaModel  # noqa: E402
from kvstore_engines.ops import Linear, Ops, TorchOps, ops_for  # noqa: E402
from kvstore_engines.parallel import SingleRank  # noqa: E402

pytestmark = pytest.mark.engines
BLOCK_TOKENS = 16
NEW_TOKENS = 3


@torch.inference_mode()
def run(folder: Path, ops: Ops, dtype: torch.dtype) -> tuple[list[list[int]], torch.Tensor]:
    """The tokens of each step for two prompts together, and what the pool then holds."""
    checkpoint = load_checkpoint(folder, dtype)
    family = DeepseekModel if checkpoint.config.mla else LlamaModel
    model = family(checkpoint.config, checkpoint.weights, TorchAttention(), SingleRank(), ops)
    pool = model.make_pool(5, BLOCK_TOKENS, dtype)
    fed, lengths, steps = [PROMPTS[0], PROMPTS[1][:15]], [1, 15], []
    for _ in range(NEW_TOKENS):
        spans = [
            (table, length - len(new), length)
            for table, length, new in zip(([3], [4, 0]), lengths, fed, strict=True)
        ]
        batch = make_batch(spans, BLOCK_TOKENS)
        chosen = model.forward(torch.tensor([*fed[0], *fed[1]]), batch, pool).argmax(-1).tolist()
        steps.append(chosen)
        fed, lengths = [[token] for token in chosen], [length + 1 for length in lengths]
    return steps, pool.storage


@pytest.mark.parametrize(
    "name", ["llama3", "qwen2", "qwen3", "deepseek_v2", "deepseek_v3", "deepseek_v3_yarn"]
)
def test_the_same_tokens_and_the_same_cache(name: str, tiny: Any) -> None:
    folder = tiny(name)[0]
    plain, pages = run(folder, TorchOps(), torch.float32)
    steps, kernels_pages = run(folder, KernelOps(), torch.float32)
    assert steps == plain
    assert torch.allclose(kernels_pages, pages, rtol=1e-4, atol=1e-4)


def test_float16_too(tiny: Any) -> None:
    folder = tiny("qwen3")[0]
    plain, pages = run(folder, TorchOps(), torch.float16)
    steps, kernels_pages = run(folder, KernelOps(), torch.float16)
    assert steps == plain
    assert torch.allclose(kernels_pages, pages, rtol=3e-2, atol=3e-2)


@pytest.mark.parametrize("biases", [(False, False), (True, True), (False, True)])
def test_linear_maps_of_one_input_become_one(biases: tuple[bool, bool]) -> None:
    torch.manual_seed(2)
    x = torch.randn(3, 8)
    linears = [
        Linear(torch.randn(rows, 8), torch.randn(rows) if biased else None)
        for rows, biased in zip((5, 2), biases, strict=True)
    ]
    joint = KernelOps().joint(*linears)(x)
    for got, linear in zip(joint, linears, strict=True):
        assert torch.allclose(got, linear(x), atol=1e-5)
    assert joint[0].untyped_storage().data_ptr() == joint[1].untyped_storage().data_ptr()


def test_the_device_decides() -> None:
    assert isinstance(ops_for(torch.device("cpu")), TorchOps)
    assert isinstance(ops_for(torch.device("cuda")), KernelOps)
