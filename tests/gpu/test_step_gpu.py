"""The decode step's small kernels on a GPU: beside float64, a hundred times, and in models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kvstore_kernels.step import add_rmsnorm, rmsnorm, rope_append, rope_append_latent, silu_mul
from kvstore_kernels.step_reference import (
    rmsnorm_reference,
    rotated_reference,
    silu_mul_reference,
)

# Twice what one rounding may do.
MAX_ERROR = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(MAX_ERROR)
TOKENS = (1, 16, 257)
REPEATS = 100
POISON = 77.0


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype)


def near(got: torch.Tensor, want: torch.Tensor) -> bool:
    bound = MAX_ERROR[got.dtype]
    return torch.allclose(got.double(), want, rtol=bound, atol=bound * 1e-2)


def close(got: torch.Tensor, want: torch.Tensor) -> bool:
    """For what may cancel: an error is compared with the largest element."""
    bound = MAX_ERROR[got.dtype] * want.abs().max()
    return bool((got.double() - want).abs().max() <= bound)


@pytest.fixture(autouse=True)
def _seed(gpu: torch.device) -> None:
    torch.manual_seed(13)


def differing(first: torch.Tensor, call) -> int:
    """Elements that differ in any of a hundred more calls."""
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        differ += (call() != first).sum()
    return int(differ)


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(4096, dtype) for dtype in DTYPES]
    + [(dim, torch.bfloat16) for dim in (64, 576, 1536, 7168, 32768)],
)
@pytest.mark.parametrize("tokens", TOKENS)
def test_norm_of_a_sum(tokens, dim, dtype):
    x, delta = numbers(2, tokens, dim + 8, dtype=dtype)[..., :dim]
    weight = numbers(dim, dtype=dtype)
    total, out = torch.full((2, tokens, dim), torch.nan, device="cuda", dtype=dtype)
    add_rmsnorm(x, delta, weight, 1e-5, total=total, out=out)
    assert torch.equal(total, x + delta)
    assert near(out, rmsnorm_reference(total, weight, 1e-5))
    assert near(rmsnorm(x, weight, 1e-5), rmsnorm_reference(x, weight, 1e-5))
    assert differing(out, lambda: add_rmsnorm(x, delta, weight, 1e-5)[1]) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_gated_activation(tokens, dtype):
    gate, up = numbers(tokens, 2 * 14336 + 6, dtype=dtype).mul(4).split(14339, dim=-1)
    out = torch.full(gate.shape, torch.nan, device="cuda", dtype=dtype)
    silu_mul(gate, up, out=out)
    assert near(out, silu_mul_reference(gate, up))
    assert differing(out, lambda: silu_mul(gate, up)) == 0


def test_gated_activation_past_two_to_the_31_elements():
    merged = torch.zeros(80_000, 2 * 14336, device="cuda", dtype=torch.bfloat16)
    merged[-1] = 1.0
    out = silu_mul(*merged.split(14336, dim=-1))
    assert near(out[-1], torch.full((14336,), 0.7310585786, device="cuda").double())
    assert not out[:-1].any()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "normed", "interleaved", "dtype"),
    [
        (32, 8, 128, False, False, torch.bfloat16),
        (32, 8, 128, True, False, torch.bfloat16),
        (32, 8, 128, True, True, torch.bfloat16),
        (28, 4, 96, True, False, torch.float16),
        (28, 4, 96, False, True, torch.float16),
        (3, 1, 64, False, True, torch.float32),
    ],
)
@pytest.mark.parametrize("tokens", TOKENS)
def test_rotation_and_writing_to_pages(tokens, heads, kv_heads, dim, normed, interleaved, dtype):
    q, k, v = numbers(tokens, heads + 2 * kv_heads, dim, dtype=dtype).split(
        [heads, kv_heads, kv_heads], dim=1
    )
    cos, sin = numbers(2, tokens, dim // 2, dtype=dtype)
    norms = dict.fromkeys(("q_norm", "k_norm"), numbers(dim, dtype=dtype)) if normed else {}
    storage = torch.full((40, kv_heads, 3, 2, 16, dim), POISON, device="cuda", dtype=dtype)
    k_pages, v_pages = storage.select(2, 1).unbind(2)
    places = torch.randperm(40 * 16, device="cuda")[:tokens]
    pages, offsets = places // 16, places % 16
    out = torch.full(q.shape, torch.nan, device="cuda", dtype=dtype)
    arguments = (q, k, v, cos, sin, k_pages, v_pages, pages, offsets)
    rope_append(*arguments, **norms, interleaved=interleaved, out=out, check=True)

    def wanted(x: torch.Tensor) -> torch.Tensor:
        x = rmsnorm_reference(x, norms["q_norm"], 1e-6) if normed else x
        return rotated_reference(x, cos, sin, interleaved=interleaved)

    assert close(out, wanted(q))
    assert close(k_pages[pages, :, offsets], wanted(k))
    assert torch.equal(v_pages[pages, :, offsets], v)
    written = storage.clone()
    call = lambda: rope_append(*arguments, **norms, interleaved=interleaved)  # noqa: E731
    assert differing(out, call) == 0
    assert torch.equal(storage, written)
    for pool in (k_pages, v_pages):
        pool[pages, :, offsets] = POISON
    assert bool((storage == POISON).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_latents_and_their_keys(tokens, interleaved, dtype):
    q = numbers(tokens, 128, 192, dtype=dtype)[..., 128:]
    cached = numbers(tokens, 1536 + 576, dtype=dtype)[:, 1536:]
    cos, sin = numbers(2, tokens, 32, dtype=dtype)
    storage = torch.full((9, 2, 64, 576), POISON, device="cuda", dtype=dtype)
    pool, norm = storage[:, 1], numbers(512, dtype=dtype)
    places = torch.randperm(9 * 64, device="cuda")[:tokens]
    pages, offsets = places // 64, places % 64
    wide = torch.full((tokens, 128, 576), POISON, device="cuda", dtype=dtype)

    def run() -> torch.Tensor:
        options = {"norm": norm, "eps": 1e-6, "interleaved": interleaved}
        arguments = (q, cached, cos, sin, pool, pages, offsets)
        return rope_append_latent(*arguments, **options, out=wide[..., 512:])

    got = run().clone()
    assert close(got, rotated_reference(q, cos, sin, interleaved=interleaved))
    assert bool((wide[..., :512] == POISON).all())
    written = pool[pages, offsets]
    assert near(written[:, :512], rmsnorm_reference(cached[:, :512], norm, 1e-6))
    key = rotated_reference(cached[:, None, 512:], cos, sin, interleaved=interleaved)[:, 0]
    assert close(written[:, 512:], key)
    assert differing(got, run) == 0
    assert torch.equal(pool[pages, offsets], written)
    pool[pages, offsets] = POISON
    assert bool((storage == POISON).all())


@pytest.mark.parametrize("page", [-1, 4, 2**31 - 1, -(2**63), 2**40])
def test_a_place_outside_of_the_pool_is_written_nowhere(page):
    q, k, v = numbers(3, 48, 128).split([32, 8, 8], dim=1)
    cos, sin = numbers(2, 3, 64)
    storage = torch.full((4, 8, 2, 16, 128), POISON, device="cuda", dtype=torch.bfloat16)
    pages = torch.tensor([0, page, 2], device="cuda")
    offsets = torch.tensor([1, 2, 3], device="cuda")
    rope_append(q, k, v, cos, sin, *storage.unbind(2), pages, offsets)
    torch.cuda.synchronize()
    assert torch.equal(storage[[0, 2], :, 1, [1, 3]], v[[0, 2]])
    assert int((storage[:, :, 1] != POISON).any(-1).sum()) == 2 * 8


def test_a_pool_past_two_to_the_31_elements():
    q, k, v = numbers(2, 48, 128).split([32, 8, 8], dim=1)
    cos, sin = numbers(2, 2, 64)
    storage = torch.zeros(70_000, 8, 2, 16, 128, device="cuda", dtype=torch.bfloat16)  # 4.6 GB
    pages, offsets = torch.tensor([69_999, 0], device="cuda"), torch.tensor([15, 15], device="cuda")
    rope_append(q, k, v, cos, sin, *storage.unbind(2), pages, offsets)
    assert torch.equal(storage[pages, :, 1, offsets], v)
    assert int(storage.any(-1).sum()) == 2 * 8 * 2


# The models: fewer layers than the benchmark's, and otherwise the same.


class NoAttention:
    """Launches nothing, so that what is counted is all around it."""

    def grouped(self, q, layer_pages, batch, scale):
        return q

    def latent(self, q, layer_pages, batch, scale, rank):
        return q[..., :rank]


@pytest.mark.parametrize("name", ["llama", "deepseek", "deepseek, routed"])
def test_a_models_step_has_few_launches_and_as_good_logits(name):
    pytest.importorskip("safetensors")
    from benchmarks.gpu.launches import (
        MAX_ERROR_RATIO,
        MODELS,
        gpu_attention,
        in_float64,
        kernels_in,
        make_step,
        random_weights,
    )
    from kvstore_engines.attention import TorchAttention
    from kvstore_engines.kernel_ops import KernelOps
    from kvstore_engines.ops import TorchOps

    config = replace(MODELS[name], layers=2)
    weights = random_weights(config)
    wanted = make_step(config, in_float64(weights), TorchOps(), TorchAttention())()
    errors, launches, around = [], [], []
    for ops in (TorchOps(), KernelOps()):
        step = make_step(config, weights, ops, gpu_attention()[1])
        logits = step()
        errors.append(float((logits.double() - wanted).norm() / wanted.norm()))
        launches.append(kernels_in(step))
        around.append(kernels_in(make_step(config, weights, ops, NoAttention())))
    print(f"{name}: {launches} launches with torch's operations and kernels, {around} around them")
    assert errors[1] <= MAX_ERROR_RATIO * errors[0]
    assert around[1] <= 0.3 * around[0]


@pytest.mark.parametrize("name", ["llama", "deepseek", "deepseek, routed"])
@torch.inference_mode()
def test_a_captured_step_gives_the_eager_steps_logits(name):
    pytest.importorskip("safetensors")
    from benchmarks.gpu.launches import MODELS, gpu_attention, make_step, random_weights
    from kvstore_engines.kernel_ops import KernelOps

    config = replace(MODELS[name], layers=2)
    step = make_step(config, random_weights(config), KernelOps(), gpu_attention()[1])
    step()
    wanted = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    logits.fill_(torch.nan)
    graph.replay()
    assert float((logits.double() - wanted.double()).norm() / wanted.double().norm()) < 1e-2
