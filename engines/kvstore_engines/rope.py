"""Rotary position embedding: plain, Llama 3's, and YaRN as Qwen and DeepSeek use it."""

import math
from dataclasses import dataclass
from typing import Any

import torch

from kvstore_engines.fields import CheckpointError, required

KINDS = ("default", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """`kind` is one of `KINDS`; what a kind does not use keeps its default.

    mscale_all_dim: DeepSeek's factor of the softmax scale, 0 for none. attention_factor: what
    cosines and sines are multiplied by.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    mscale_all_dim: float = 0.0

    @property
    def softmax_factor(self) -> float:
        """What DeepSeek multiplies the softmax scale by, for contexts that YaRN stretched."""
        return _mscale(self.factor, self.mscale_all_dim) ** 2

    @property
    def max_positions(self) -> int:
        """Positions that YaRN stretches the model to; 0 where it does not."""
        return round(self.factor * self.original_max_positions) if self.kind == "yarn" else 0


def read_rope(raw: dict[str, Any]) -> RopeConfig:
    """From config.json's `rope_parameters`, or the older `rope_theta` and `rope_scaling`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor", "partial rotation is not supported")
    if kind not in KINDS:
        raise CheckpointError("rope_type", f"{kind!r} is not supported")
    if kind == "default":
        return RopeConfig(theta=theta)
    known = rope.get("original_max_position_embeddings")
    original = int(known or required(raw, "max_position_embeddings"))
    return (
        _llama3_config(rope, theta, original)
        if kind == "llama3"
        else _yarn_config(rope, theta, original, required(raw, "max_position_embeddings"))
    )


def inverse_frequencies(rope: RopeConfig, dim: int) -> torch.Tensor:
    """(dim / 2,) float32: the rotation per position."""
    plain = 1.0 / (rope.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    return _yarn(plain, rope, dim) if rope.kind == "yarn" else plain


def rope_tables(
    frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype, factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin times `factor`, (tokens, 1, dim / 2); the angles are taken in float32."""
    angles = (positions[:, None].float() * frequencies)[:, None]
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool = False
) -> torch.Tensor:
    """Rotate x (tokens, heads, dim). Pairs are (i, i + dim/2), or neighbours if interleaved.

    Interleaved pairs come out de-interleaved: a dot product of two such vectors is the same.
    """
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def _llama3_config(rope: dict[str, Any], theta: float, original: int) -> RopeConfig:
    return RopeConfig(
        theta=theta,
        kind="llama3",
        factor=float(required(rope, "factor")),
        original_max_positions=original,
        low_freq_factor=float(required(rope, "low_freq_factor")),
        high_freq_factor=float(required(rope, "high_freq_factor")),
    )


def _yarn_config(rope: dict[str, Any], theta: float, original: int, positions: int) -> RopeConfig:
    # DeepSeek may leave the factor out: it is then what the context grew by.
    factor = float(rope.get("factor") or positions / original)
    return RopeConfig(
        theta=theta,
        kind="yarn",
        factor=factor,
        original_max_positions=original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        truncate=bool(rope.get("truncate", True)),
        attention_factor=_attention_factor(rope, factor),
        mscale_all_dim=float(rope.get("mscale_all_dim") or 0),
    )


def _attention_factor(rope: dict[str, Any], factor: float) -> float:
    given, mscale, all_dim = (
        rope.get(name) for name in ("attention_factor", "mscale", "mscale_all_dim")
    )
    if given is not None:
        return float(given)
    # DeepSeek names both: what `mscale_all_dim` does to the softmax scale is taken out here.
    if mscale and all_dim:
        return _mscale(factor, mscale) / _mscale(factor, all_dim)
    return _mscale(factor, 1.0)


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def _llama3(plain: torch.Tensor, rope: RopeConfig) -> torch.Tensor:
    """Long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    low, high = rope.low_freq_factor, rope.high_freq_factor
    turns = rope.original_max_positions / (2 * math.pi / plain)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return (1 - kept) * plain / rope.factor + kept * plain


def _yarn(plain: torch.Tensor, rope: RopeConfig, dim: int) -> torch.Tensor:
    """Peng et al., "YaRN" (arXiv 2309.00071): what turns fast is kept, the slow is stretched."""
    low, high = (_turning(rope, dim, turns) for turns in (rope.beta_fast, rope.beta_slow))
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    stretched = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return plain / rope.factor * stretched + plain * (1 - stretched)


def _turning(rope: RopeConfig, dim: int, turns: float) -> float:
    """The (fractional) pair that turns so often over the original context."""
    around = rope.original_max_positions / (turns * 2 * math.pi)
    return dim * math.log(around) / (2 * math.log(rope.theta))
