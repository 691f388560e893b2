"""Attention over paged KV; a GPU backend takes the place of `TorchAttention`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses

CPU = torch.device("cpu")
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Span:
    """One sequence's share of a batch: its last `tokens` of `context_len` tokens are queries."""

    start: int
    tokens: int
    page_table: torch.Tensor  # (pages,) int64, the pages that hold the context, in order
    context_len: int


@dataclass(frozen=True)
class Batch:
    """Where each token of a forward pass stands; all tensors are (tokens,) int64."""

    positions: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor
    spans: tuple[Span, ...]


def make_batch(
    sequences: Sequence[tuple[Sequence[int] | Numbers, int, int]],
    block_tokens: int,
    device: torch.device = CPU,
) -> Batch:
    """A batch from (page table, first position, end position) of each sequence, at least one.

    Page tables that are int64 arrays already cost no conversion. All numbers go to the device in
    one copy. Raises IndexError for a table that is shorter than its sequence.
    """
    firsts, ends = np.array([span[1:] for span in sequences], np.int64).T
    tokens, used = ends - firsts, -(-ends // block_tokens)
    tables = [
        np.asarray(table[:count], np.int64)
        for (table, _, _), count in zip(sequences, used.tolist(), strict=True)
    ]
    numbers = np.concatenate(tables)
    if len(numbers) != used.sum():
        raise IndexError("a page table must have a page for each of its sequence's blocks")
    starts, origins = np.cumsum(tokens) - tokens, np.cumsum(used) - used
    total = int(tokens.sum())
    positions = np.arange(total) + np.repeat(firsts - starts, tokens)
    # Each at a multiple of 16 bytes: kernels are compiled anew for other addresses.
    places = np.zeros((3, total + total % 2), np.int64)
    places[0, :total] = positions
    places[1, :total] = numbers[np.repeat(origins, tokens) + positions // block_tokens]
    places[2, :total] = positions % block_tokens
    together = torch.from_numpy(np.concatenate([places.ravel(), numbers])).to(device)
    flat, *page_tables = torch.split(together, [places.size, *used.tolist()])
    where, pages, offsets = flat.view(3, -1)[:, :total].unbind()
    spans = map(Span, starts.tolist(), tokens.tolist(), page_tables, ends.tolist())
    return Batch(where, pages, offsets, tuple(spans))


class AttentionBackend(Protocol):
    """Causal attention of a batch over one layer's pages, which hold the queries' own KV too."""

    def grouped(
        self, q: torch.Tensor, layer_pages: torch.Tensor, batch: Batch, scale: float
    ) -> torch.Tensor:
        """q (tokens, heads, dim), pages [pages, kv_heads, 2, block_tokens, dim]; gives q's shape.

        The heads of one key/value group are neighbours.
        """

    def latent(
        self, q: torch.Tensor, layer_pages: torch.Tensor, batch: Batch, scale: float, rank: int
    ) -> torch.Tensor:
        """q (tokens, heads, width), pages [pages, block_tokens, width]; all heads share the keys.

        The values are the first `rank` columns of the keys; gives (tokens, heads, rank).
        """


def attention_for(device: torch.device) -> AttentionBackend:
    """The fastest backend there."""
    if device.type == "cpu":
        return TorchAttention()
    from kvstore_engines.kernel_attention import KernelAttention

    return KernelAttention()


class TorchAttention:
    """For any device: gathers each sequence's pages and calls torch's attention."""

    def grouped(
        self, q: torch.Tensor, layer_pages: torch.Tensor, batch: Batch, scale: float
    ) -> torch.Tensor:
        """See `AttentionBackend.grouped`."""
        out = torch.empty_like(q)
        for span in batch.spans:
            gathered = layer_pages[span.page_table].permute(2, 1, 0, 3, 4).flatten(2, 3)
            k, v = gathered[:, :, : span.context_len]
            rows = slice(span.start, span.start + span.tokens)
            out[rows] = _attend(q[rows], k, v, span, scale)
        return out

    def latent(
        self, q: torch.Tensor, layer_pages: torch.Tensor, batch: Batch, scale: float, rank: int
    ) -> torch.Tensor:
        """See `AttentionBackend.latent`."""
        out = q.new_empty(*q.shape[:2], rank)
        for span in batch.spans:
            k = layer_pages[span.page_table].flatten(0, 1)[None, : span.context_len]
            rows = slice(span.start, span.start + span.tokens)
            out[rows] = _attend(q[rows], k, k[..., :rank], span, scale)
        return out


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, span: Span, scale: float
) -> torch.Tensor:
    """q (tokens, heads, dim), k and v (kv_heads, context, dim) -> (tokens, heads, value dim)."""
    mask = None
    if span.tokens > 1:
        last = span.context_len - span.tokens
        mask = torch.ones(span.tokens, span.context_len, dtype=torch.bool, device=q.device)
        mask = mask.tril(last)
    attended = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1)
