"""A batch's keys and values are written to their pages, then attended to, in one launch or two."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch

from kvstore_engines.attention import AttentionBackend
from kvstore_engines.ops import HeadNorms, LayerCache, Ops, RMSNorm, TorchOps


@runtime_checkable
class AppendingAttention(AttentionBackend, Protocol):
    """An attention that also does what `Ops.append_grouped` and `append_latent` do.

    Either method gives what `AttentionBackend`'s gives, or None for a batch that it leaves to the
    two of them, having written nothing.
    """

    def append_grouped(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        norms: HeadNorms | None,
        cache: LayerCache,
        *,
        scale: float,
    ) -> torch.Tensor | None:
        """See `Appending.grouped`."""

    def append_latent(
        self,
        q: torch.Tensor,
        cached: torch.Tensor,
        key_up: torch.Tensor,
        norm: RMSNorm,
        cache: LayerCache,
        *,
        scale: float,
        interleaved: bool,
    ) -> torch.Tensor | None:
        """See `Appending.latent`."""


class Appending:
    """What a layer does with its queries, keys and values."""

    def __init__(self, attention: AttentionBackend, ops: Ops) -> None:
        """In one launch if the attention can, and if ops are not torch's, which are one by one."""
        self._attention, self._ops = attention, ops
        self._in_one: AppendingAttention | None = None
        if isinstance(attention, AppendingAttention) and not isinstance(ops, TorchOps):
            self._in_one = attention

    def grouped(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        norms: HeadNorms | None,
        cache: LayerCache,
        *,
        scale: float,
    ) -> torch.Tensor:
        """q (tokens, heads, dim), k and v (tokens, kv_heads, dim), before norm and rotation; gives
        q's shape. The cache's pages are modified."""
        if self._in_one is not None:
            attended = self._in_one.append_grouped(q, k, v, norms, cache, scale=scale)
            if attended is not None:
                return attended
        q = self._ops.append_grouped(q, k, v, norms, cache)
        return self._attention.grouped(q, cache.pages, cache.batch, scale)

    def latent(
        self,
        q: torch.Tensor,
        cached: torch.Tensor,
        key_up: torch.Tensor,
        norm: RMSNorm,
        cache: LayerCache,
        *,
        scale: float,
        interleaved: bool,
    ) -> torch.Tensor:
        """q (tokens, heads, nope + rope), cached (tokens, rank + rope), before norm and rotation;
        key_up (heads, nope, rank). Gives (tokens, heads, rank). The cache's pages are modified."""
        tensors = (q, cached, key_up, norm, cache)
        if self._in_one is not None:
            attended = self._in_one.append_latent(*tensors, scale=scale, interleaved=interleaved)
            if attended is not None:
                return attended
        q = self._ops.append_latent(*tensors, interleaved=interleaved)
        rank = key_up.shape[-1]
        return self._attention.latent(q, cache.pages, cache.batch, scale, rank)
