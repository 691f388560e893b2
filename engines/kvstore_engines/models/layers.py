"""The parts both families share: linear maps, RMSNorm, rope and SwiGLU."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses

from kvstore_engines.attention import Batch
from kvstore_engines.checkpoint import RopeConfig, Weights


@dataclass(frozen=True)
class Linear:
    """weight (out, in), bias (out,) or none."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)."""
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class RMSNorm:
    """weight (dim,); the mean square is taken in float32 whatever the dtype."""

    weight: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., dim) -> the same shape and dtype."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


@dataclass(frozen=True)
class SwiGlu:
    """The gated feed-forward network."""

    gate: Linear
    up: Linear
    down: Linear

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, hidden) -> the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def linear(weights: Weights, name: str, bias: bool = False) -> Linear:
    """The linear map called `name`."""
    return Linear(weights[f"{name}.weight"], weights[f"{name}.bias"] if bias else None)


def swiglu(weights: Weights, name: str, bias: bool = False) -> SwiGlu:
    """The feed-forward network called `name`."""
    gate, up, down = (
        linear(weights, f"{name}.{part}_proj", bias) for part in ("gate", "up", "down")
    )
    return SwiGlu(gate, up, down)


def inverse_frequencies(rope: RopeConfig, dim: int) -> torch.Tensor:
    """(dim / 2,) float32 rotation per position."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    return _llama3(plain, rope) if rope.kind == "llama3" else plain


def _llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = rope.original_max_positions / (2 * math.pi / plain)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def rope_tables(
    frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (tokens, 1, dim / 2); the angles are taken in float32."""
    angles = (positions[:, None].float() * frequencies)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Rotate x (tokens, heads, dim). Pairs are (i, i + dim/2), or neighbours if interleaved.

    Interleaved pairs come out de-interleaved: a dot product of two such vectors is the same.
    """
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def last_rows(x: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The last token's row of each span, (sequences, hidden)."""
    return x[[span.start + span.tokens - 1 for span in batch.spans]]
