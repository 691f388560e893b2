"""Kernel launches in one decode step of a model, and what the step takes: torch's operations, ours.

Random models with the widths of Llama 3 8B and DeepSeek-V3 (with a dense feed-forward network, and
with a few routed experts, which with torch's operations are a loop over experts on the host), 16
sequences of 1,024 tokens, bfloat16. Eager, and in a CUDA graph where the step can be captured. The
logits count only if they are about as near to those in float64 as torch's are. A second table has
the kernels alone, in a graph, beside their bytes; `--sweep` times several configurations of each.
`--engine` times the steps of a whole engine, with a small model of eight layers instead: launches
one by one, and in CUDA graphs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.profile_decode import save_model
from benchmarks.gpu.timing import eager_us, graph_us, rotations
from kvstore_engines.attention import AttentionBackend, Batch, TorchAttention, make_batch
from kvstore_engines.checkpoint import Weights
from kvstore_engines.config import MlaConfig, ModelConfig, MoeConfig
from kvstore_engines.engine import Engine
from kvstore_engines.kernel_ops import KernelOps
from kvstore_engines.models.deepseek import DeepseekModel
from kvstore_engines.models.llama import LlamaModel
from kvstore_engines.ops import Ops, TorchOps
from kvstore_engines.paged import PagePool
from kvstore_engines.parallel import SingleRank
from kvstore_engines.rope import RopeConfig
from kvstore_kernels import experts, step
from kvstore_kernels.experts import FEW, routed_experts

SEQUENCES = 16
CONTEXT = 1024
ENGINE_TOKENS = 40
# Errors of two orders of rounding differ by chance.
MAX_ERROR_RATIO = 1.5

LLAMA = ModelConfig(
    model_type="llama",
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    layers=8,
    heads=32,
    kv_heads=8,
    head_dim=128,
    rms_eps=1e-5,
    rope=RopeConfig(theta=5e5),
    tied=False,
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    max_positions=8192,
    eos_ids=frozenset(),
)
DEEPSEEK = replace(
    LLAMA,
    model_type="deepseek_v3",
    hidden_size=7168,
    intermediate_size=18432,
    layers=4,
    heads=128,
    kv_heads=128,
    mla=MlaConfig(
        kv_lora_rank=512,
        q_lora_rank=1536,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        rope_interleave=True,
    ),
)
ROUTED = replace(
    DEEPSEEK,
    intermediate_size=2048,  # of an expert
    layers=2,
    moe=MoeConfig(
        experts=16,
        top_k=4,
        first_dense=0,
        groups=4,
        top_groups=2,
        method="noaux_tc",
        normalize=True,
        scaling=2.5,
    ),
)
MODELS = {"llama": LLAMA, "deepseek": DEEPSEEK, "deepseek, routed": ROUTED}


@dataclass(frozen=True, slots=True)
class Step:
    """One decode step that can be run again and again: it writes the same to the same places."""

    model: LlamaModel | DeepseekModel
    token_ids: torch.Tensor
    batch: Batch
    pool: PagePool

    @torch.inference_mode()
    def __call__(self) -> torch.Tensor:
        """The logits (sequences, vocab)."""
        return self.model.forward(self.token_ids, self.batch, self.pool)


def random_weights(config: ModelConfig) -> Weights:
    """bfloat16, on the GPU; scaled so that activations keep their size."""
    torch.manual_seed(1)
    tensors = {}
    for name, shape in _shapes(config):
        tensor = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        tensors[name] = 1 + tensor * 0.1 if len(shape) == 1 else tensor * shape[-1] ** -0.5
    return Weights(tensors)


def in_float64(weights: Weights) -> Weights:
    """The same numbers."""
    return Weights({name: tensor.double() for name, tensor in weights.items()})


def make_step(config: ModelConfig, weights: Weights, ops: Ops, attention: AttentionBackend) -> Step:
    """One new token of each sequence; what the pages hold is random, and the same for any dtype."""
    family = DeepseekModel if config.mla else LlamaModel
    model = family(config, weights, attention, SingleRank(), ops)
    block_tokens = 64 if config.mla else 16
    each = CONTEXT // block_tokens
    dtype = weights["model.embed_tokens.weight"].dtype
    pool = model.make_pool(SEQUENCES * each, block_tokens, dtype)
    generator = torch.Generator("cuda").manual_seed(2)
    shape = pool.storage.shape
    pool.storage.copy_(torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator))
    tables = [list(range(i * each, (i + 1) * each)) for i in range(SEQUENCES)]
    spans = [(table, CONTEXT - 1, CONTEXT) for table in tables]
    batch = make_batch(spans, block_tokens, torch.device("cuda"))
    return Step(model, torch.arange(SEQUENCES, device="cuda") * 97, batch, pool)


def kernels_in(call: Callable[[], object]) -> int:
    """Kernels that one call launches; copies and fills by the driver are not counted."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profiled.events() if str(e.device_type) == "DeviceType.CUDA"]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in on_gpu)


def gpu_attention() -> tuple[str, AttentionBackend]:
    """Its name, and the fastest attention that there is."""
    try:
        from kvstore_engines.kernel_attention import KernelAttention
    except ImportError as error:
        print(f"no attention kernels ({error}): torch's attention instead")
        return "torch", TorchAttention()
    return "kernels", KernelAttention()


def _shapes(c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a checkpoint's tensors."""
    yield "model.embed_tokens.weight", (c.vocab_size, c.hidden_size)
    yield "lm_head.weight", (c.vocab_size, c.hidden_size)
    yield "model.norm.weight", (c.hidden_size,)
    for i in range(c.layers):
        name = f"model.layers.{i}"
        yield f"{name}.input_layernorm.weight", (c.hidden_size,)
        yield f"{name}.post_attention_layernorm.weight", (c.hidden_size,)
        attention = _latent_shapes(c, c.mla) if c.mla else _grouped_shapes(c)
        for part, shape in attention:
            yield f"{name}.self_attn.{part}.weight", shape
        for part, shape in _routed_shapes(c, c.moe) if c.moe else _swiglu_shapes(c):
            yield f"{name}.mlp.{part}", shape


def _grouped_shapes(c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    for part, heads in (("q", c.heads), ("k", c.kv_heads), ("v", c.kv_heads)):
        yield f"{part}_proj", (heads * c.head_dim, c.hidden_size)
    yield "o_proj", (c.hidden_size, c.heads * c.head_dim)


def _latent_shapes(c: ModelConfig, m: MlaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    assert m.q_lora_rank is not None
    yield "q_a_proj", (m.q_lora_rank, c.hidden_size)
    yield "q_a_layernorm", (m.q_lora_rank,)
    yield "q_b_proj", (c.heads * m.key_dim, m.q_lora_rank)
    yield "kv_a_proj_with_mqa", (m.width, c.hidden_size)
    yield "kv_a_layernorm", (m.kv_lora_rank,)
    yield "kv_b_proj", (c.heads * (m.qk_nope_head_dim + m.v_head_dim), m.kv_lora_rank)
    yield "o_proj", (c.hidden_size, c.heads * m.v_head_dim)


def _swiglu_shapes(c: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "gate_proj.weight", (c.intermediate_size, c.hidden_size)
    yield "up_proj.weight", (c.intermediate_size, c.hidden_size)
    yield "down_proj.weight", (c.hidden_size, c.intermediate_size)


def _routed_shapes(c: ModelConfig, moe: MoeConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "gate.weight", (moe.experts, c.hidden_size)
    yield "gate.e_score_correction_bias", (moe.experts,)
    for expert in ("shared_experts", *(f"experts.{i}" for i in range(moe.experts))):
        for part, shape in _swiglu_shapes(c):
            yield f"{expert}.{part}", shape


# ----------------------------------------------------------------------------------- the step


def measure(name: str) -> bool:
    """Prints a model's two rows; whether our logits are as good as torch's."""
    config = MODELS[name]
    weights = random_weights(config)
    wanted = make_step(config, in_float64(weights), TorchOps(), TorchAttention())()
    torch.cuda.empty_cache()
    rows, errors = {}, {}
    for title, ops in (("torch", TorchOps()), ("kernels", KernelOps())):
        attention, backend = gpu_attention()
        one = make_step(config, weights, ops, backend)
        logits = one()
        errors[title] = float((logits.double() - wanted).norm() / wanted.norm())
        rows[title] = kernels_in(one)
        # With torch's operations the host reads which experts were chosen.
        captured = not (config.moe and title == "torch")
        times = f"{eager_us(one):9.0f} {_captured(one) if captured else '-':>9}"
        print(
            f"{name:17} {title:8} {attention:10} {rows[title]:8} {times} {errors[title]:9.5f}",
            flush=True,
        )
    fewer = 1 - rows["kernels"] / rows["torch"]
    # A last bit may decide which experts are chosen.
    good = config.moe is not None or errors["kernels"] <= MAX_ERROR_RATIO * errors["torch"]
    print(f"{name:17} {fewer:.0%} fewer launches{'' if good else '; WRONG LOGITS'}", flush=True)
    return good


def _captured(one: Step) -> str:
    """Microseconds in a graph."""
    try:
        return f"{graph_us([one]):.0f}"
    except Exception as error:
        print(f"not captured: {error}")
        return "-"


# -------------------------------------------------------------------------- the kernels alone


@dataclass(frozen=True, slots=True)
class Alone:
    """One kernel on inputs of its own each time. constant, values: a name in its module, and other
    values of it for a sweep."""

    make: Callable[[], Callable[[], object]]
    nbytes: int
    constant: str
    values: tuple[object, ...]
    module: ModuleType = step


def alone(tokens: int = SEQUENCES) -> dict[str, Alone]:
    """Each kernel at the widths of the models."""

    def norm() -> Callable[[], object]:
        x, delta, weight = _random(tokens, 4096), _random(tokens, 4096), _random(4096)
        return lambda: step.add_rmsnorm(x, delta, weight, 1e-5)

    def gated() -> Callable[[], object]:
        gate, up = _random(tokens, 2 * 14336).chunk(2, dim=-1)
        return lambda: step.silu_mul(gate, up)

    def append() -> Callable[[], object]:
        q, k, v = _random(tokens, 48, 128).split_with_sizes([32, 8, 8], dim=1)
        cos, sin, where = _random(tokens, 64), _random(tokens, 64), _places(tokens)
        k_pages, v_pages = _random(tokens, 8, 2, 16, 128).unbind(2)
        return lambda: step.rope_append(q, k, v, cos, sin, k_pages, v_pages, *where)

    def latent() -> Callable[[], object]:
        q, cached, pool = _random(tokens, 128, 64), _random(tokens, 576), _random(tokens, 64, 576)
        cos, sin, where = _random(tokens, 32), _random(tokens, 32), _places(tokens)
        weight = _random(512)
        return lambda: step.rope_append_latent(
            q, cached, cos, sin, pool, *where, norm=weight, eps=1e-6
        )

    heads = (2, 4, 8, 16)
    return {
        "add_rmsnorm": Alone(norm, tokens * 4096 * 8, "_NORM_ELEMENTS", (2, 4, 8, 16)),
        "silu_mul": Alone(gated, tokens * 14336 * 6, "_SILU_TILE", (512, 1024, 2048, 4096)),
        "rope_append": Alone(append, tokens * 48 * 128 * 4, "_HEADS", heads),
        "rope_append_latent": Alone(latent, tokens * (128 * 64 + 576) * 4, "_HEADS", heads),
        "experts, 4 of 16": _experts_alone(tokens, 16, 4),
        "experts, 8 of 64, 1": _experts_alone(1, 64, 8),
    }


def _experts_alone(tokens: int, number: int, top_k: int) -> Alone:
    """Of DeepSeek-V3's widths; weights of those that are chosen are what is read."""
    dim, inner = 7168, 2048
    used = min(number, tokens * top_k)

    def make() -> Callable[[], object]:
        x, weights = _random(tokens, dim), torch.rand(tokens, top_k, device="cuda")
        gate_up, down = _random(number, 2 * inner, dim), _random(number, dim, inner)
        pairs = torch.arange(tokens * top_k, dtype=torch.int32, device="cuda")
        chosen = (pairs * 7 % number).view(tokens, top_k)
        return lambda: routed_experts(x, gate_up, down, weights, chosen)

    configs = tuple(
        replace(FEW, tile=tile, depth=depth, num_stages=stages, num_warps=warps)
        for tile, depth, stages, warps in (
            (16, 128, 4, 4),
            (16, 256, 4, 4),
            (32, 64, 6, 4),
            (32, 128, 3, 4),
            (32, 128, 4, 4),
            (32, 128, 5, 4),
            (32, 256, 3, 4),
            (64, 64, 4, 4),
            (64, 64, 6, 4),
            (64, 128, 3, 4),
            (64, 128, 4, 4),
            (64, 128, 3, 8),
            (128, 64, 4, 8),
        )
    )
    return Alone(make, used * 3 * dim * inner * 2, "FEW", configs, experts)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _places(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A page of its own for each token, and the sixth place in it."""
    numbers = torch.arange(tokens, device="cuda")
    return numbers, torch.full_like(numbers, 5)


def measure_alone(name: str, kernel: Alone, *, sweep: bool) -> bool:
    """Prints a kernel's row, or a row for each configuration and the best."""
    calls = [kernel.make() for _ in range(rotations(kernel.nbytes))]
    ours = getattr(kernel.module, kernel.constant)
    times = {}
    for value in kernel.values if sweep else (ours,):
        try:
            with patch.object(kernel.module, kernel.constant, value):
                times[value] = graph_us(calls)
        except Exception as error:  # one configuration may not fit the GPU
            print(f"{name}, {value}: {type(error).__name__}: {str(error)[:100]}")
            continue
        rate = kernel.nbytes / times[value] / 1e3
        label = f"{kernel.constant} {value}" if sweep else ""
        print(
            f"{name:20} {times[value]:7.2f} us  {kernel.nbytes / 1e3:8.0f} KB {rate:6.0f} GB/s  "
            f"{label}",
            flush=True,
        )
    if sweep:
        best = min(times, key=lambda value: times[value])
        print(f"{name:20} best: {kernel.constant} {best} (in use: {ours})", flush=True)
    return ours in times


# --------------------------------------------------------------------------------- the engine


def engine_steps(folder: Path, sequences: int, *, graphs: bool) -> tuple[float, list[list[int]]]:
    """Median milliseconds of a decode step, and each sequence's tokens."""
    engine = Engine(
        folder,
        store=None,
        num_pages=80 * sequences,
        dtype=torch.bfloat16,
        device="cuda",
        graphs=graphs,
    )
    for i in range(sequences):
        engine.submit([(7 * i + j * j) % 8191 for j in range(CONTEXT)], ENGINE_TOKENS + sequences)
    times, results = [], []
    while engine.busy:
        began = time.perf_counter()
        results += engine.step()
        times.append(time.perf_counter() - began)
    tokens = [list(r.token_ids) for r in sorted(results, key=lambda r: r.request_id)]
    decoding = times[-ENGINE_TOKENS // 2 - sequences : -sequences]  # all prompts are through
    return statistics.median(decoding) * 1e3, tokens


def measure_engine() -> None:
    """Prints a row for each number of sequences."""
    print("sequences   one by one, ms   graphs, ms   same tokens")
    with tempfile.TemporaryDirectory() as made:
        save_model(Path(made))
        for sequences in (1, 4, 16, 64):
            before, wanted = engine_steps(Path(made), sequences, graphs=False)
            after, tokens = engine_steps(Path(made), sequences, graphs=True)
            same = sum(a == b for a, b in zip(tokens, wanted, strict=True))
            print(f"{sequences:9} {before:16.2f} {after:12.2f} {same:6} of {sequences}", flush=True)


def main() -> None:
    """Prints both tables, or the engine's; exits with 1 where a row failed or is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="only kernels, configurations of each")
    parser.add_argument("--engine", action="store_true", help="only an engine's steps")
    given = parser.parse_args()
    if given.engine:
        measure_engine()
        return
    sweep = given.sweep
    failed = []
    rows: dict[str, Callable[[], bool]] = {}
    if not sweep:
        print("model             ops      attention  launches  eager us  graph us     error")
        rows |= {name: partial(measure, name) for name in MODELS}
    rows |= {
        name: partial(measure_alone, name, kernel, sweep=sweep) for name, kernel in alone().items()
    }
    for name, row in rows.items():
        try:
            if not row():
                failed.append(name)
        except Exception:
            traceback.print_exc(limit=4)
            failed.append(name)
        torch.cuda.empty_cache()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
