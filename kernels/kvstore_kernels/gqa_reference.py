"""What `gqa_decode` computes, in float64 and without haste."""

# ruff: noqa: PLR0917 - called as gqa_decode is

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch

from kvstore_kernels.gqa_form import GqaForm


def gqa_reference(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: npt.ArrayLike,
    form: GqaForm,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `gqa_decode` computes, in float64, a sequence at a time; gives float64."""
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for sequence, length in enumerate(np.asarray(lengths).tolist()):
        if length:
            pages = page_table[sequence, : -(-length // form.page_tokens)].long()
            k, v = (_gathered(p, pages, length, form) for p in (k_pages, v_pages))
            if k_scale is not None:
                k = k * k_scale.double().repeat_interleave(form.group)[:, None, None]
            if v_scale is not None:
                v = v * v_scale.double().repeat_interleave(form.group)[:, None, None]
            out[sequence] = _attend(q[sequence].double(), k, v, form)
    return out


def _gathered(pool: torch.Tensor, pages: torch.Tensor, length: int, form: GqaForm) -> torch.Tensor:
    """(heads, length, head_dim) float64."""
    raw = pool.view(torch.uint8) if pool.dtype is torch.float8_e4m3fn else pool
    rows = raw[pages].view(pool.dtype).transpose(0, 1).flatten(1, 2)[:, :length]
    return rows.double().repeat_interleave(form.group, 0)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: GqaForm) -> torch.Tensor:
    """q (q_tokens, heads, head_dim), k and v (heads, length, head_dim) -> as q."""
    scale = form.head_dim**-0.5 if form.scale is None else form.scale
    scores = torch.einsum("qhd,htd->hqt", q, k) * scale
    if form.softcap is not None:
        scores = form.softcap * torch.tanh(scores / form.softcap)
    length = k.shape[1]
    position = torch.arange(length - form.q_tokens, length, device=q.device)[:, None]
    token = torch.arange(length, device=q.device)
    unseen = token > position
    if form.window is not None:
        unseen |= token <= position - form.window
    weights = scores.masked_fill(unseen, -math.inf).softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqt,htd->qhd", weights, v)
