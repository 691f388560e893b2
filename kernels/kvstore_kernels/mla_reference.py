"""Latent attention over pages in plain torch and float64: what the kernels' results are held to."""

from __future__ import annotations

import torch

WIDTH = 576  # elements of a token: the latent part, then the rope part
RANK = 512  # elements of the latent part, which is the value too


def mla_reference(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    page_scales: torch.Tensor | None = None,
) -> torch.Tensor:
    """Absorbed multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) of the newest tokens.

    q: [batch, q_tokens, heads, 576]. pages: [pages, page_tokens, 576] of any dtype, 8-bit ones
    multiplied by page_scales [pages] float32. page_table: [batch, max_pages] int32. lengths, in
    tokens with the queries' own: [batch] int32. Query i sees the tokens before position
    length - q_tokens + i + 1; one that sees none gives zeros. scale multiplies the logits.

    Gives [batch, q_tokens, heads, 512] float64 on q's device.
    """
    out = q.new_zeros(*q.shape[:3], RANK, dtype=torch.float64)
    for sequence, length in enumerate(lengths.tolist()):
        tokens = _gather(pages, page_table[sequence], length, page_scales)
        out[sequence] = _attend(q[sequence].double(), tokens, scale)
    return out


def _gather(
    pages: torch.Tensor, table: torch.Tensor, length: int, page_scales: torch.Tensor | None
) -> torch.Tensor:
    """(length, 576) float64: one sequence's tokens in order."""
    page_tokens = pages.shape[1]
    used = table[: -(-length // page_tokens)].long()
    gathered = pages[used].double()
    if page_scales is not None:
        gathered *= page_scales[used].double()[:, None, None]
    return gathered.flatten(0, 1)[:length]


def _attend(q: torch.Tensor, tokens: torch.Tensor, scale: float) -> torch.Tensor:
    """q (q_tokens, heads, 576), tokens (length, 576) -> (q_tokens, heads, 512)."""
    q_tokens, length = len(q), len(tokens)
    positions = torch.arange(length, device=q.device)
    newest = length - q_tokens + torch.arange(q_tokens, device=q.device)
    hidden = positions > newest[:, None]
    logits = (torch.einsum("qhw,tw->qht", q, tokens) * scale).masked_fill(
        hidden[:, None], -torch.inf
    )
    blind = (newest < 0)[:, None, None]  # the softmax over nothing is NaN
    weights = logits.softmax(-1).masked_fill(blind, 0.0)
    return weights @ tokens[:, :RANK]
