"""Which kernel for decode attention: what each can do, and what was measured of it.

Of the kernels that can do what is asked for, the one is taken that was fastest at the nearest
measured shape. Nothing here loads a kernel.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch

from kvstore_kernels.errors import KernelArgumentError

FP8 = torch.float8_e4m3fn
HALVES = (torch.bfloat16, torch.float16)
MLA_WIDTH = 576  # elements of a latent, rope included


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked for, as far as it decides the kernel.

    attention: "gqa" or "mla". heads, kv_heads: query and KV heads; kv_heads is 1 for mla. dim: of
    a key. sequences: of the largest batch. modified: whether there is a score_mod or mask_mod.
    scaled: whether there are scales of stored values. hopper: whether the tensors are on a GPU of
    compute capability 9.0.
    """

    attention: Literal["gqa", "mla"]
    heads: int
    kv_heads: int
    dim: int
    page_tokens: int
    q_tokens: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    sequences: int
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    modified: bool = False
    scaled: bool = False
    hopper: bool = True

    @property
    def rows(self) -> int:
        """Queries that attend to the same keys."""
        return self.heads // self.kv_heads * self.q_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The answer. kernel: its name in the registry; reason: in words; refused: why not each of the
    other kernels for that kind of attention, where they cannot; appends: whether that kernel is to
    rotate and write new tokens too, in the one launch."""

    kernel: str
    reason: str
    refused: Mapping[str, str]
    appends: bool


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds per call on an H200 at one shape, in bfloat16; rows as of a Request."""

    attention: str
    rows: int
    sequences: int
    tokens: int
    us: Mapping[str, float]


# By the benchmarks of the kernels. What decides is which is the faster, not by how much. Lengths
# are not known here, and need not be: also where they differ much, the ring is 0.4 to 3 % faster
# from 64 sequences on.
MEASURED = (
    Timing("gqa", 4, 1, 4096, {"gqa_decode": 10.5, "gqa_ring": 34.4, "flex": 12.5}),
    Timing("gqa", 4, 16, 4096, {"gqa_decode": 65.5, "gqa_ring": 69.1, "flex": 71.6}),
    Timing("gqa", 4, 64, 8192, {"gqa_decode": 477.5, "gqa_ring": 473.2, "flex": 484.4}),
    Timing("gqa", 4, 256, 8192, {"gqa_decode": 1879.8, "gqa_ring": 1853.6, "flex": 3014}),
    Timing("mla", 16, 1, 65_536, {"mla_ring": 29.1, "mla_decode": 34.0}),
    Timing("mla", 16, 64, 4096, {"mla_ring": 82.0, "mla_decode": 86.3}),
    Timing("mla", 64, 4, 13_296, {"mla_gluon": 34.1, "mla_decode": 45.5}),
    Timing("mla", 128, 1, 4096, {"mla_gluon": 13.6, "mla_decode": 19.2}),
    Timing("mla", 128, 64, 16384, {"mla_gluon": 438, "mla_decode": 901}),
)

# Those that can append: with a launch that rotates and writes before, and in the one launch; by
# `benchmarks.gpu.fused`.
APPENDED: Mapping[str, tuple[Timing, ...]] = MappingProxyType(
    {
        "gqa_decode": (
            Timing("gqa", 4, 1, 4096, {"one": 12.6, "two": 14.7}),
            Timing("gqa", 4, 16, 4096, {"one": 69.0, "two": 71.1}),
            Timing("gqa", 4, 32, 4096, {"one": 133.0, "two": 134.6}),
            Timing("gqa", 4, 64, 4096, {"one": 258.7, "two": 257.0}),
            Timing("gqa", 4, 256, 1024, {"one": 258.8, "two": 259.8}),
            Timing("gqa", 8, 16, 4096, {"one": 69.2, "two": 71.9}),
            Timing("gqa", 16, 16, 1024, {"one": 24.4, "two": 26.8}),
        ),
        "mla_decode": (
            Timing("mla", 16, 1, 65_536, {"one": 37.6, "two": 39.3}),
            Timing("mla", 16, 16, 4096, {"one": 34.9, "two": 37.3}),
            Timing("mla", 16, 64, 4096, {"one": 89.3, "two": 91.7}),
            Timing("mla", 32, 1, 65_536, {"one": 44.3, "two": 43.8}),
            Timing("mla", 32, 16, 4096, {"one": 43.4, "two": 43.1}),
            Timing("mla", 32, 64, 4096, {"one": 105.0, "two": 104.9}),
        ),
        "mla_ring": (
            Timing("mla", 16, 1, 65_536, {"one": 32.7, "two": 34.4}),
            Timing("mla", 16, 16, 4096, {"one": 32.2, "two": 34.4}),
            Timing("mla", 16, 64, 4096, {"one": 85.9, "two": 88.5}),
        ),
    }
)


def choose(request: Request) -> Choice:
    """The fastest kernel that can. Raises KernelArgumentError, with all reasons, if none can."""
    answers = {name: ask(request) for name, ask in KERNELS[request.attention].items()}
    refused = {name: why for name, why in answers.items() if why}
    able = [name for name, why in answers.items() if not why]
    if not able:
        reasons = "; ".join(f"{name}: {why}" for name, why in refused.items())
        raise KernelArgumentError("q", f"must be what a kernel takes ({reasons})")
    kernel, reason = _fastest(able, request)
    return Choice(
        kernel=kernel,
        reason=reason,
        refused=MappingProxyType(refused),
        appends=appends(kernel, request),
    )


def _fastest(able: list[str], request: Request) -> tuple[str, str]:
    """(kernel, reason)."""
    if len(able) == 1:
        return able[0], "the only kernel that can"
    timings = [t for t in MEASURED if t.attention == request.attention and set(able) <= t.us.keys()]
    if not timings:
        return able[0], "not measured beside the others"
    near = min(timings, key=lambda t: _distance(t, request))
    kernel = min(able, key=lambda name: near.us[name])
    times = ", ".join(f"{name} {near.us[name]:g} us" for name in able)
    shape = f"{near.rows} rows, {near.sequences} x {near.tokens} tokens"
    return kernel, f"the fastest at the nearest measured shape ({shape}: {times})"


def _distance(timing: Timing, request: Request) -> float:
    """In doublings of the rows and of the sequences."""
    rows = abs(math.log2(timing.rows / request.rows))
    return rows + abs(math.log2(timing.sequences / request.sequences))


def _gqa_decode_refuses(request: Request) -> str:
    return _first_of(
        (request.modified, "has no score_mod or mask_mod"),
        (request.dtype not in HALVES, "takes queries in bfloat16 or float16"),
        (request.kv_dtype not in (request.dtype, FP8), "takes pages of q's dtype or float8_e4m3fn"),
        (request.dim not in (64, 128, 256), "takes head dimensions of 64, 128 and 256"),
        (request.heads // request.kv_heads > 16, "takes at most 16 query heads for a KV head"),
        (request.q_tokens > 4, "takes at most 4 new tokens"),
        (not 16 <= request.page_tokens <= 128, "takes pages of 16 to 128 tokens"),
    )


def _gqa_ring_refuses(request: Request) -> str:
    dtypes = (request.dtype, request.kv_dtype)
    sizes = (*range(16, 129, 16),)
    return _first_of(
        (request.modified, "has no score_mod or mask_mod"),
        (not request.hopper, "runs on GPUs of compute capability 9.0 only"),
        (dtypes != (torch.bfloat16,) * 2, "takes queries and pages in bfloat16"),
        (request.scaled, "takes no scales of stored values"),
        (request.softcap is not None, "has no soft cap"),
        (request.window is not None, "has no sliding window"),
        (request.dim != 128, "takes head dimensions of 128"),
        (request.kv_heads % 8 != 0, "takes a multiple of 8 KV heads"),
        (request.heads // request.kv_heads > 8, "takes at most 8 query heads for a KV head"),
        (request.q_tokens > 1, "takes one new token"),
        (request.page_tokens not in sizes, "takes pages of 16, 32 and so on to 128 tokens"),
    )


def _flex_refuses(request: Request) -> str:
    return _first_of(
        (request.kv_dtype is not request.dtype, "takes pages of q's dtype"),
        (request.scaled, "takes no scales of stored values"),
        (request.dtype not in (*HALVES, torch.float32), "takes bfloat16, float16 and float32"),
    )


def _mla_refuses(request: Request) -> str:
    return _first_of(
        (request.modified, "has no score_mod or mask_mod"),
        (request.softcap is not None, "has no soft cap"),
        (request.window is not None, "has no sliding window"),
        (request.dtype is not torch.bfloat16, "takes queries in bfloat16"),
        (request.dim != MLA_WIDTH, f"takes latents of {MLA_WIDTH} elements, rope included"),
        (request.q_tokens > 4, "takes at most 4 new tokens"),
    )


def _mla_decode_refuses(request: Request) -> str:
    return _mla_refuses(request) or _first_of(
        (request.kv_dtype not in (torch.bfloat16, FP8), "takes pages of bfloat16 or float8_e4m3fn"),
        (not 16 <= request.page_tokens <= 128, "takes pages of 16 to 128 tokens"),
    )


def _mla_gluon_refuses(request: Request) -> str:
    return _mla_refuses(request) or _first_of(
        (not request.hopper, "runs on GPUs of compute capability 9.0 only"),
        (request.kv_dtype is not torch.bfloat16, "takes pages of bfloat16"),
        (request.scaled, "takes no scales of stored values"),
        (request.page_tokens % 64 != 0, "takes pages of a multiple of 64 tokens"),
        (request.rows <= 32, "is for more than 32 query rows"),
    )


def _mla_ring_refuses(request: Request) -> str:
    return _mla_refuses(request) or _first_of(
        (not request.hopper, "runs on GPUs of compute capability 9.0 only"),
        (request.kv_dtype is not torch.bfloat16, "takes pages of bfloat16"),
        (request.scaled, "takes no scales of stored values"),
        (request.page_tokens % 64 != 0, "takes pages of a multiple of 64 tokens"),
        (request.rows > 16, "is for at most 16 query rows"),
    )


def _first_of(*reasons: tuple[bool, str]) -> str:
    """The first reason that holds, or none."""
    return next((reason for holds, reason in reasons if holds), "")


def appends(kernel: str, request: Request) -> bool:
    """Whether that kernel, which can do what is asked for, also writes the new tokens: where it can
    and, at the nearest measured shape, one launch took no longer than two."""
    timings = APPENDED.get(kernel, ())
    if request.kv_dtype is not request.dtype or request.scaled or not timings:
        return False
    near = min(timings, key=lambda t: _distance(t, request))
    return near.us["one"] <= near.us["two"]


# By kind of attention: what each kernel says of a request that it cannot do, or nothing.
KERNELS: Mapping[str, Mapping[str, Callable[[Request], str]]] = MappingProxyType(
    {
        "gqa": {
            "gqa_decode": _gqa_decode_refuses,
            "gqa_ring": _gqa_ring_refuses,
            "flex": _flex_refuses,
        },
        "mla": {
            "mla_gluon": _mla_gluon_refuses,
            "mla_ring": _mla_ring_refuses,
            "mla_decode": _mla_decode_refuses,
        },
    }
)
