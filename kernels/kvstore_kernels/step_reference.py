"""What the kernels of `step` compute, in float64 and without haste."""

from __future__ import annotations

import torch


def rmsnorm_reference(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x (..., dim), weight (dim,) -> x's shape, float64."""
    wide = x.double()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def add_rmsnorm_reference(
    x: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum in x's dtype, and the norm of that, float64."""
    total = (x.double() + delta.double()).to(x.dtype)
    return total, rmsnorm_reference(total, weight, eps)


def silu_mul_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, float64."""
    wide = gate.double()
    return wide * torch.sigmoid(wide) * up.double()


def rotated_reference(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool = False
) -> torch.Tensor:
    """x (tokens, heads, dim), cos and sin (tokens, dim / 2) -> x's shape, float64; the pairs come
    out as halves."""
    wide = x.double()
    pairs = (wide[..., ::2], wide[..., 1::2]) if interleaved else wide.chunk(2, -1)
    first, second = pairs
    cos, sin = cos.double()[:, None], sin.double()[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
