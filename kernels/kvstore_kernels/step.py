"""What stands between a decode step's matrix products and its attention, in few launches.

A new token's row is some kilobytes, so these operations take no time to compute; what they cost is
their number. A launch takes about 11 us of the host's time, or half a microsecond in a graph, and
written with torch a layer has 44 to 68 beside its attention. Here neighbours are one kernel:

    add_rmsnorm          residual addition and the norm of the sum             9 launches of torch
    rope_append          norms of q and k, rotation, writing k and v to pages  16 to 32
    rope_append_latent   the same for latent attention's cache                 25
    silu_mul             the gated activation                                  2

The floor is bytes read and written / memory rate, below the cost of a launch for some hundred
tokens of most models. Every input is read once and every output written once. A program has whole
rows, so nothing is reduced across programs: the same input gives the same bits, whatever else is
in the batch.

None of the launchers waits for the GPU, unless `check` is set, so they can be captured in a graph.
A token whose page id or offset is outside of the pool is written nowhere. Two tokens of a call must
not have the same place.
"""

# ruff: noqa: PLR0917 - the tensors of one operation, in the order in which they are used

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.compiling import Variant
from kvstore_kernels.step_kernels import (
    add_rmsnorm_kernel,
    rope_append_kernel,
    rope_append_latent_kernel,
    silu_mul_kernel,
)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_DIM = 1 << 15  # of a normed row: one program holds all of it in registers
_HEADS = 4  # of a program: of 128 elements, one warp then loads 16 bytes a thread
_SILU_TILE = 1024
_NORM_ELEMENTS = 8  # of a row, a thread


def add_rmsnorm(
    x: torch.Tensor,
    delta: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    total: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x + delta rounded to x's dtype, and the RMSNorm of that (Zhang and Sennrich, 2019).

    x, delta: (tokens, dim) in bfloat16, float16 or float32, rows at any stride. weight: (dim,) of
    the same dtype. total, out: where the results go, as x; made where there is none. Raises
    KernelArgumentError.
    """
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device) if total is None else total
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _check_norm(x, weight, out)
    for name, tensor in (("delta", delta), ("total", total)):
        check_tensor(name, tensor, shape=x.shape, dtypes=(x.dtype,), device=x.device)
    _launch_norm(x, delta, weight, eps, total, out)
    return total, out


def rmsnorm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """The RMSNorm of x; see `add_rmsnorm`."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    _check_norm(x, weight, out)
    _launch_norm(x, None, weight, eps, None, out)
    return out


def silu_mul(
    gate: torch.Tensor, up: torch.Tensor, *, out: torch.Tensor | None = None
) -> torch.Tensor:
    """silu(gate) * up, (tokens, dim) each, rows at any stride.

    gate and up may be the halves of what one merged projection gave. dtypes: as `add_rmsnorm`'s.
    Raises KernelArgumentError.
    """
    out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    check_tensor("gate", gate, shape=(None, None), dtypes=DTYPES)
    for name, tensor in (("up", up), ("out", out)):
        check_tensor(name, tensor, shape=gate.shape, dtypes=(gate.dtype,), device=gate.device)
    tokens, dim = gate.shape
    if tokens and dim:
        with _on(gate):
            silu_mul_kernel[(tokens, -(-dim // _SILU_TILE))](
                gate,
                up,
                out,
                dim,
                *(tensor.stride(0) for tensor in (gate, up, out)),
                tile=_SILU_TILE,
            )
    return out


def rope_append(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_ids: torch.Tensor,
    offsets: torch.Tensor,
    *,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    out: torch.Tensor | None = None,
    check: bool = False,
) -> torch.Tensor:
    """Gives q rotated, and writes k, rotated, and v to their places in the pool.

    q: (tokens, heads, dim) in bfloat16, float16 or float32; k, v: (tokens, kv_heads, dim), the
    same dtype, heads and tokens at any stride: parts of one merged projection too. cos, sin:
    (tokens, dim / 2). k_pages, v_pages: (pages, kv_heads, page_tokens, dim), any strides but the
    last; modified. page_ids, offsets: (tokens,) int64 or int32, each token's page and place in it.
    q_norm, k_norm: (dim,) weights of the norms of each head before rotation (Qwen3), or none of
    both. interleaved: pairs are neighbours, else (i, i + dim / 2); they come out as halves. out: as
    q, not q itself. check: waits for the GPU, to say which place is outside of the pool.
    Raises KernelArgumentError, before anything is written.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    _check_rotated(q, cos, sin, out, "q")
    tokens, heads, dim = q.shape
    _check_keys(q, k, v, k_pages, v_pages)
    _check_head_norms(q, q_norm, k_norm)
    _check_places(page_ids, offsets, q, k_pages.shape[0], k_pages.shape[2], check=check)
    if tokens:
        kv_heads = k.shape[1]
        with _on(q):
            rope_append_kernel[(tokens, _blocks(heads) + _blocks(kv_heads))](
                *(q, k, v, out, k_pages, v_pages, cos, sin, page_ids, offsets, q_norm, k_norm),
                eps,
                k_pages.shape[0],
                k_pages.shape[2],
                cos.stride(0),
                *(tensor.stride(axis) for tensor in (q, k, v, out) for axis in (0, 1)),
                *(pages.stride(axis) for pages in (k_pages, v_pages) for axis in (0, 1, 2)),
                heads=heads,
                kv_heads=kv_heads,
                half=dim // 2,
                tile=_power_of_two(dim // 2),
                rows=_HEADS,
                normed=q_norm is not None,
                interleaved=interleaved,
                num_warps=1,
            )
    return out


def rope_append_latent(
    q: torch.Tensor,
    cached: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    pool: torch.Tensor,
    page_ids: torch.Tensor,
    offsets: torch.Tensor,
    *,
    norm: torch.Tensor,
    eps: float,
    interleaved: bool = True,
    out: torch.Tensor | None = None,
    check: bool = False,
) -> torch.Tensor:
    """Gives the queries' rotated part, and writes latents, normed, with their rotated keys.

    q: (tokens, heads, rope_dim), the part that is rotated. cached: (tokens, rank + rope_dim), the
    projected latent and key. pool: (pages, page_tokens, rank + rope_dim), any strides but the last;
    modified. norm: (rank,) weight of the latent's RMSNorm. out: as q, not q itself; may be a part
    of a wider tensor. All else is as in `rope_append`. Raises KernelArgumentError.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    _check_rotated(q, cos, sin, out, "q")
    tokens, heads, dim = q.shape
    check_tensor("norm", norm, shape=(None,), dtypes=(q.dtype,), device=q.device)
    rank = len(norm)
    require(0 < rank <= MAX_DIM, "norm", f"must have 1 to {MAX_DIM} elements, not {rank}")
    width = rank + dim
    check_tensor("cached", cached, shape=(tokens, width), dtypes=(q.dtype,), device=q.device)
    check_tensor("pool", pool, shape=(None, None, width), dtypes=DTYPES, device=q.device)
    _check_places(page_ids, offsets, q, pool.shape[0], pool.shape[1], check=check)
    if tokens:
        with _on(q):
            rope_append_latent_kernel[(tokens, 1 + _blocks(heads))](
                *(q, cached, out, pool, cos, sin, page_ids, offsets, norm),
                eps,
                pool.shape[0],
                pool.shape[1],
                cos.stride(0),
                *(q.stride(0), q.stride(1), cached.stride(0), out.stride(0), out.stride(1)),
                *(pool.stride(0), pool.stride(1)),
                heads=heads,
                rank=rank,
                rank_tile=_power_of_two(rank),
                half=dim // 2,
                tile=_power_of_two(dim // 2),
                rows=_HEADS,
                interleaved=interleaved,
                num_warps=1,
            )
    return out


# --------------------------------------------------------------------------------- launching


def _launch_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    total: torch.Tensor | None,
    out: torch.Tensor,
) -> None:
    tokens, dim = x.shape
    if not tokens:
        return
    with _on(x):
        add_rmsnorm_kernel[(tokens,)](
            *(x, delta, weight, total, out),
            eps,
            *(0 if tensor is None else tensor.stride(0) for tensor in (x, delta, total, out)),
            dim=dim,
            tile=_power_of_two(dim),
            added=delta is not None,
            num_warps=_norm_warps(dim),
        )


def _blocks(heads: int) -> int:
    """Programs that have these heads of one token."""
    return -(-heads // _HEADS)


def _norm_warps(dim: int) -> int:
    return max(1, min(16, _power_of_two(dim) // (32 * _NORM_ELEMENTS)))


def _on(tensor: torch.Tensor) -> AbstractContextManager[object]:
    """Launches go to the tensor's GPU, whichever is current."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def _power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()


# ---------------------------------------------------------------------------------- checking


def _check_norm(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> None:
    check_tensor("x", x, shape=(None, None), dtypes=DTYPES)
    dim = x.shape[1]
    require(0 < dim <= MAX_DIM, "x", f"must have rows of 1 to {MAX_DIM} elements, not {dim}")
    check_tensor("weight", weight, shape=(dim,), dtypes=(x.dtype,), device=x.device)
    check_tensor("out", out, shape=x.shape, dtypes=(x.dtype,), device=x.device)


def _check_rotated(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor, name: str
) -> None:
    check_tensor(name, x, shape=(None, None, None), dtypes=DTYPES)
    tokens, _, dim = x.shape
    require(dim >= 2 and dim % 2 == 0, name, f"must have heads of an even size, not {dim}")
    check_tensor("cos", cos, shape=(tokens, dim // 2), dtypes=DTYPES, device=x.device)
    check_tensor("sin", sin, shape=cos.shape, dtypes=(cos.dtype,), device=x.device)
    require(cos.stride() == sin.stride(), "sin", "must have cos's strides")
    check_tensor("out", out, shape=x.shape, dtypes=(x.dtype,), device=x.device)
    require(out.data_ptr() != x.data_ptr() or not x.numel(), "out", f"must not be {name}")


def _check_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
) -> None:
    tokens, heads, dim = q.shape
    check_tensor("k", k, shape=(tokens, None, dim), dtypes=(q.dtype,), device=q.device)
    kv_heads = k.shape[1]
    divides = kv_heads > 0 and heads % kv_heads == 0
    require(divides, "k", f"must have a number of heads that divides {heads}, not {kv_heads}")
    check_tensor("v", v, shape=k.shape, dtypes=(q.dtype,), device=q.device)
    shape = (None, kv_heads, None, dim)
    check_tensor("k_pages", k_pages, shape=shape, dtypes=DTYPES, device=q.device)
    check_tensor("v_pages", v_pages, shape=k_pages.shape, dtypes=(k_pages.dtype,), device=q.device)


def _check_head_norms(
    q: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None
) -> None:
    require((q_norm is None) == (k_norm is None), "k_norm", "must be there where q_norm is")
    for name, norm in (("q_norm", q_norm), ("k_norm", k_norm)):
        if norm is not None:
            check_tensor(name, norm, shape=q.shape[2:], dtypes=(q.dtype,), device=q.device)


def _check_places(
    page_ids: torch.Tensor,
    offsets: torch.Tensor,
    q: torch.Tensor,
    n_pages: int,
    page_tokens: int,
    *,
    check: bool,
) -> None:
    for name, numbers, end in (("page_ids", page_ids, n_pages), ("offsets", offsets, page_tokens)):
        dtypes = (torch.int64, torch.int32)
        check_tensor(name, numbers, shape=(len(q),), dtypes=dtypes, device=q.device)
        if check:
            wrong = ((numbers < 0) | (numbers >= end)).nonzero()
            first = int(wrong[0]) if len(wrong) else 0
            problem = f"must be 0 to {end - 1}; token {first} has another"
            require(not len(wrong), name, problem)


# ---------------------------------------------------------------------------------- variants


def variants() -> Iterator[Variant]:
    """As Llama 3 8B, Qwen3 8B and DeepSeek-V3 have them, in bfloat16."""
    yield _norm_variant("add_rmsnorm_4096", 4096, added=True)
    yield _norm_variant("add_rmsnorm_7168", 7168, added=True)
    yield _norm_variant("rmsnorm_1536", 1536, added=False)
    yield _variant(
        "silu_mul",
        silu_mul_kernel,
        pointers=("gate_ptr", "up_ptr", "out_ptr"),
        constants={"tile": _SILU_TILE},
        num_warps=4,
    )
    for name, normed in (("llama", False), ("qwen3", True)):
        yield _append_variant(f"rope_append_{name}", normed=normed)
    yield _variant(
        "rope_append_latent_deepseek",
        rope_append_latent_kernel,
        pointers=_BF16["latent"],
        constants={
            "heads": 128,
            "rank": 512,
            "rank_tile": 512,
            "half": 32,
            "tile": 32,
            "rows": _HEADS,
            "interleaved": True,
        },
    )


_BF16 = {
    "append": (
        *("q_ptr", "k_ptr", "v_ptr", "out_ptr", "k_pages_ptr", "v_pages_ptr"),
        *("cos_ptr", "sin_ptr", "q_weight_ptr", "k_weight_ptr"),
    ),
    "latent": (
        *("q_ptr", "cached_ptr", "out_ptr", "pool_ptr", "cos_ptr", "sin_ptr", "weight_ptr"),
    ),
    "norm": ("x_ptr", "delta_ptr", "weight_ptr", "total_ptr", "out_ptr"),
}


def _append_variant(name: str, *, normed: bool) -> Variant:
    return _variant(
        name,
        rope_append_kernel,
        pointers=_BF16["append"],
        constants={
            "heads": 32,
            "kv_heads": 8,
            "half": 64,
            "tile": 64,
            "rows": _HEADS,
            "normed": normed,
            "interleaved": False,
            **({} if normed else {"q_weight_ptr": None, "k_weight_ptr": None}),
        },
    )


def _norm_variant(name: str, dim: int, *, added: bool) -> Variant:
    return _variant(
        name,
        add_rmsnorm_kernel,
        pointers=_BF16["norm"],
        constants={
            "dim": dim,
            "tile": _power_of_two(dim),
            "added": added,
            **({} if added else {"delta_ptr": None, "total_ptr": None}),
        },
        num_warps=_norm_warps(dim),
    )


def _variant(
    name: str,
    kernel: Any,
    *,
    pointers: tuple[str, ...],
    constants: Mapping[str, Any],
    num_warps: int = 1,
) -> Variant:
    """All numbers are multiples of 16, as those of these models are."""
    known = {
        **dict.fromkeys(pointers, "*bf16"),
        **dict.fromkeys(("page_ids_ptr", "offsets_ptr"), "*i64"),
        "eps": "fp32",
    }
    names = [n for n in kernel.arg_names if n not in constants]
    numbers = [n for n in names if n not in known and n != "n_pages"]
    return Variant(
        name=name,
        kernel=kernel,
        signature={n: known.get(n, "i32") for n in names},
        constants=constants,
        aligned=(*(n for n in names if n.endswith("_ptr")), *numbers),
        options={"num_warps": num_warps},
        max_registers=128,
    )
