"""What a layer computes around its matrix products and its attention; a GPU has other `Ops`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses

from kvstore_engines.attention import Batch
from kvstore_engines.rope import rotate
from kvstore_engines.routing import Router

Joint = Callable[[torch.Tensor], Sequence[torch.Tensor]]
Experts = Callable[[torch.Tensor], torch.Tensor]


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
class HeadNorms:
    """The norms of each query and key head before rotation (Qwen3)."""

    q: RMSNorm
    k: RMSNorm


@dataclass(frozen=True)
class Expert:
    """One routed expert, a gated feed-forward network: down(silu(gate(x)) * up(x))."""

    gate: Linear
    up: Linear
    down: Linear


@dataclass(frozen=True)
class LayerCache:
    """One layer's pages, and the batch whose tokens are written to them."""

    pages: torch.Tensor  # a `PagePool.layer`
    batch: Batch
    cos: torch.Tensor  # of the batch's positions, (tokens, 1, rotated dim / 2)
    sin: torch.Tensor


class Ops(Protocol):
    """The operations of one rank; `Linear`s and `RMSNorm`s hold the weights."""

    def joint(self, *linears: Linear) -> Joint:
        """One map from x (tokens, in) to what each of the linear maps gives for it."""

    def norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """x (tokens, dim) -> the same shape."""

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x + delta and the norm of that, all (tokens, dim)."""

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up, all (tokens, dim)."""

    def experts(self, router: Router, experts: Sequence[Expert], first: int) -> Experts:
        """The weighed sum of those experts that the router chooses for a token, of x's shape.

        first: the router's number of the first of these experts, which are neighbours; the others
        are elsewhere and add nothing. x (tokens, hidden).
        """

    def append_grouped(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        norms: HeadNorms | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        """Write keys, normed and rotated, and values to their pages; gives the queries likewise.

        q (tokens, heads, dim), k and v (tokens, kv_heads, dim); the cache's pages are modified.
        """

    def append_latent(
        self,
        q: torch.Tensor,
        cached: torch.Tensor,
        key_up: torch.Tensor,
        norm: RMSNorm,
        cache: LayerCache,
        *,
        interleaved: bool,
    ) -> torch.Tensor:
        """Write latents, normed, with their rotated keys to the pages; gives what attends to them.

        q (tokens, heads, nope + rope), cached (tokens, rank + rope), key_up (heads, nope, rank);
        the cache's pages are modified. Gives (tokens, heads, rank + rope): the key's up-projection
        is folded into the query, so that the cache is attended to as it is stored.
        """


def ops_for(device: torch.device) -> Ops:
    """The fastest there are."""
    if device.type == "cpu":
        return TorchOps()
    from kvstore_engines.kernel_ops import KernelOps

    return KernelOps()


class TorchOps:
    """For any device, an operation at a time."""

    def joint(self, *linears: Linear) -> Joint:
        """See `Ops.joint`."""
        return lambda x: [linear(x) for linear in linears]

    def norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `Ops.norm`."""
        return norm(x)

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ops.add_norm`."""
        total = x + delta
        return total, norm(total)

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """See `Ops.silu_mul`."""
        return F.silu(gate) * up

    def experts(self, router: Router, experts: Sequence[Expert], first: int) -> Experts:
        """See `Ops.experts`; the host reads what was chosen."""

        def routed(x: torch.Tensor) -> torch.Tensor:
            out = torch.zeros_like(x)
            weights, chosen = router(x)
            here = range(first, first + len(experts))
            for index in sorted(set(here) & set(chosen.flatten().tolist())):
                rows, slot = torch.where(chosen == index)
                expert, taken = experts[index - first], x[rows]
                made = expert.down(self.silu_mul(expert.gate(taken), expert.up(taken)))
                out.index_add_(0, rows, (made * weights[rows, slot, None]).to(out.dtype))
            return out

        return routed

    def append_grouped(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        norms: HeadNorms | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        """See `Ops.append_grouped`."""
        k = rotate(norms.k(k) if norms else k, cache.cos, cache.sin)
        batch = cache.batch
        cache.pages[batch.pages, :, :, batch.offsets] = torch.stack((k, v), dim=2)
        return rotate(norms.q(q) if norms else q, cache.cos, cache.sin)

    def append_latent(
        self,
        q: torch.Tensor,
        cached: torch.Tensor,
        key_up: torch.Tensor,
        norm: RMSNorm,
        cache: LayerCache,
        *,
        interleaved: bool,
    ) -> torch.Tensor:
        """See `Ops.append_latent`."""
        rank = key_up.shape[-1]
        latent, key = cached[:, :rank], cached[:, rank:]
        key = rotate(key[:, None], cache.cos, cache.sin, interleaved)[:, 0]
        batch = cache.batch
        cache.pages[batch.pages, batch.offsets] = torch.cat((norm(latent), key), dim=-1)
        nope, rope = q[..., : key_up.shape[1]], q[..., key_up.shape[1] :]
        folded = torch.einsum("thn,hnr->thr", nope, key_up)
        return torch.cat((folded, rotate(rope, cache.cos, cache.sin, interleaved)), dim=-1)
