"""`Ops` on a GPU: each group of neighbouring operations is one launch."""

import torch

from kvstore_engines.ops import HeadNorms, Joint, LayerCache, Linear, RMSNorm
from kvstore_kernels.step import add_rmsnorm, rmsnorm, rope_append, rope_append_latent, silu_mul


class KernelOps:
    """Linear maps of the same input become one, on a copy of their weights."""

    def joint(self, *linears: Linear) -> Joint:
        """See `Ops.joint`; the results are parts of one tensor."""
        merged, sizes = _merged(linears), [len(linear.weight) for linear in linears]
        return lambda x: merged(x).split_with_sizes(sizes, dim=-1)

    def norm(self, x: torch.Tensor, norm: RMSNorm) -> torch.Tensor:
        """See `Ops.norm`."""
        return rmsnorm(x, norm.weight, norm.eps)

    def add_norm(
        self, x: torch.Tensor, delta: torch.Tensor, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Ops.add_norm`."""
        return add_rmsnorm(x, delta, norm.weight, norm.eps)

    def silu_mul(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """See `Ops.silu_mul`."""
        return silu_mul(gate, up)

    def append_grouped(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        norms: HeadNorms | None,
        cache: LayerCache,
    ) -> torch.Tensor:
        """See `Ops.append_grouped`."""
        k_pages, v_pages = cache.pages.unbind(2)
        return rope_append(
            q,
            k,
            v,
            cache.cos[:, 0],
            cache.sin[:, 0],
            k_pages,
            v_pages,
            cache.batch.pages,
            cache.batch.offsets,
            q_norm=norms.q.weight if norms else None,
            k_norm=norms.k.weight if norms else None,
            eps=norms.q.eps if norms else 0.0,
        )

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
        _, width, rank = key_up.shape
        out = q.new_empty(*q.shape[:2], cached.shape[-1])
        folded = out[..., :rank].transpose(0, 1)  # written in place: nothing is put together after
        torch.bmm(q[..., :width].transpose(0, 1), key_up, out=folded)
        rope_append_latent(
            q[..., width:],
            cached,
            cache.cos[:, 0],
            cache.sin[:, 0],
            cache.pages,
            cache.batch.pages,
            cache.batch.offsets,
            norm=norm.weight,
            eps=norm.eps,
            interleaved=interleaved,
            out=out[..., rank:],
        )
        return out


def _merged(linears: tuple[Linear, ...]) -> Linear:
    """One map whose output rows are those of all; where some have a bias, others add zero."""
    weight = torch.cat([linear.weight for linear in linears])
    if all(linear.bias is None for linear in linears):
        return Linear(weight)
    biases = [
        linear.weight.new_zeros(len(linear.weight)) if linear.bias is None else linear.bias
        for linear in linears
    ]
    return Linear(weight, torch.cat(biases))
