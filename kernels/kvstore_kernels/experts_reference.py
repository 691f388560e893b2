"""What the kernels of `experts` compute, by torch, in float64 and without haste."""

from __future__ import annotations

import torch

from kvstore_kernels.experts import RouteForm
from kvstore_kernels.step_reference import silu_mul_reference


def route_reference(
    form: RouteForm, logits: torch.Tensor, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """logits (tokens, experts) -> weights in float64 and experts in int64, (tokens, top_k) each;
    the first of equals is chosen first."""
    wide = logits.double()
    scores = wide.sigmoid() if form.sigmoid else wide.softmax(-1)
    choice = scores if correction is None else scores + correction.double()
    if form.top_groups < form.groups:
        grouped = torch.unflatten(choice, -1, (form.groups, -1))
        best = grouped.topk(form.ranked_by, dim=-1).values.sum(-1)
        kept = _first_best(best, form.top_groups)
        out = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        choice = grouped.masked_fill(out[..., None], float("-inf")).flatten(1)
    chosen = _first_best(choice, form.top_k)
    weights = scores.gather(1, chosen)
    if form.normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * form.scaling, chosen


def experts_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    weights: torch.Tensor,
    chosen: torch.Tensor,
    *,
    first: int = 0,
) -> torch.Tensor:
    """The arguments of `routed_experts` -> (tokens, dim), float64."""
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for index in range(len(gate_up)):
        rows, slot = torch.where(chosen == first + index)
        gate, up = (x[rows].double() @ gate_up[index].double().T).chunk(2, dim=-1)
        made = silu_mul_reference(gate, up) @ down[index].double().T
        out.index_add_(0, rows, made * weights[rows, slot, None].double())
    return out


def _first_best(values: torch.Tensor, count: int) -> torch.Tensor:
    """As topk's indices, but that equals come in their order."""
    return values.sort(dim=-1, descending=True, stable=True).indices[:, :count]
