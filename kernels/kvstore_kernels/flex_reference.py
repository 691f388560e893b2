"""What `flex_attention_paged` computes, in float64 and without haste."""

from __future__ import annotations

import math

import torch

from kvstore_kernels.flex_masks import MaskMod, ScoreMod

Tensor = torch.Tensor


def flex_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    query_lengths: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    scale: float | None = None,
) -> Tensor:
    """The same as `flex_attention_paged`, a sequence at a time; gives float64.

    q: (batch, queries, heads, dim). The mods are called once a sequence, with tensors of positions
    that broadcast.
    """
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    group = q.shape[2] // k_pages.shape[1]
    for sequence, length in enumerate(lengths.tolist()):
        rows = q.shape[1] if query_lengths is None else int(query_lengths[sequence])
        missing = max(0, rows - length)  # queries that would be before the sequence's first token
        if rows == missing:
            continue
        pages = page_table[sequence, : -(-length // k_pages.shape[2])].long()
        k, v = (_gathered(pool[pages], length, group) for pool in (k_pages, v_pages))
        scores = torch.einsum("qhd,htd->hqt", q[sequence, missing:rows].double(), k)
        scores = scores * (q.shape[3] ** -0.5 if scale is None else scale)
        weights = _changed(scores, sequence, score_mod, mask_mod).softmax(-1).nan_to_num(0.0)
        out[sequence, missing:rows] = torch.einsum("hqt,htd->qhd", weights, v)
    return out


def _gathered(pages: Tensor, length: int, group: int) -> Tensor:
    """(query heads, length, dim) float64."""
    return pages.transpose(0, 1).flatten(1, 2)[:, :length].double().repeat_interleave(group, 0)


def _changed(
    scores: Tensor, sequence: int, score_mod: ScoreMod | None, mask_mod: MaskMod | None
) -> Tensor:
    """(heads, queries, keys), -inf where a key is not seen."""
    heads, queries, keys = scores.shape
    batch, head, query, key = (
        torch.tensor(sequence, device=scores.device),
        torch.arange(heads, device=scores.device)[:, None, None],
        torch.arange(keys - queries, keys, device=scores.device)[:, None],
        torch.arange(keys, device=scores.device),
    )
    if score_mod is not None:
        scores = score_mod(scores, batch, head, query, key)
    if mask_mod is not None:
        scores = scores.masked_fill(~mask_mod(batch, head, query, key), -math.inf)
    return scores
