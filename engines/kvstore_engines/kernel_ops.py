"""`Ops` on a GPU: each group of neighbouring operations is one launch."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses

from kvstore_engines.ops import Expert, Experts, HeadNorms, Joint, LayerCache, Linear, RMSNorm
from kvstore_engines.routing import Router
from kvstore_kernels.experts import RouteForm, route, routed_experts
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

    def experts(self, router: Router, experts: Sequence[Expert], first: int) -> Experts:
        """See `Ops.experts`; nothing waits for the GPU. On a copy of the weights."""
        if not experts:
            return torch.zeros_like
        form, wide = _route_form(router), router.weight.float()
        merged = [torch.cat((expert.gate.weight, expert.up.weight)) for expert in experts]
        gate_up, down = torch.stack(merged), torch.stack([e.down.weight for e in experts])

        def routed(x: torch.Tensor) -> torch.Tensor:
            weights, chosen = route(form, F.linear(x.float(), wide), router.correction)
            return routed_experts(x, gate_up, down, weights, chosen, first=first)

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


def _route_form(router: Router) -> RouteForm:
    config = router.config
    grouped = config.method != "greedy"
    return RouteForm(
        experts=config.experts,
        top_k=config.top_k,
        groups=config.groups if grouped else 1,
        top_groups=config.top_groups if grouped else 1,
        ranked_by=router.ranked_by if grouped else 1,
        sigmoid=router.correction is not None,
        normalize=config.normalize,
        scaling=config.scaling,
    )


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
