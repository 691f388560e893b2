"""Llama, Qwen2 and Qwen3: grouped-query attention with optional biases and q/k norms."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses

from kvstore_engines.attention import AttentionBackend, Batch
from kvstore_engines.checkpoint import Weights
from kvstore_engines.config import ModelConfig
from kvstore_engines.models.layers import (
    Linear,
    RMSNorm,
    SummedLinear,
    SwiGlu,
    last_rows,
    linear,
    split_swiglu,
    summed_linear,
)
from kvstore_engines.paged import PagePool
from kvstore_engines.parallel import Parallel
from kvstore_engines.rope import inverse_frequencies, rope_tables, rotate


@dataclass(frozen=True)
class _Layer:
    attention_norm: RMSNorm
    q: Linear
    k: Linear
    v: Linear
    o: SummedLinear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: SwiGlu


@dataclass(frozen=True)
class _Share:
    """One rank's part of every layer: heads, and what rows or columns of the weights they are."""

    parallel: Parallel
    kv_heads: range
    q_rows: slice
    kv_rows: slice

    @staticmethod
    def of(config: ModelConfig, parallel: Parallel) -> "_Share":
        kv = parallel.kv_heads(config.kv_heads)
        width, group = config.head_dim, config.heads // config.kv_heads
        return _Share(
            parallel=parallel,
            kv_heads=kv,
            q_rows=slice(kv.start * group * width, kv.stop * group * width),
            kv_rows=slice(kv.start * width, kv.stop * width),
        )


class LlamaModel:
    """The decoder of the Llama family; weights are read once, at construction.

    A rank holds its key/value heads, the query heads that read them, and a share of the
    feed-forward width; embeddings and norms are on every rank.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        attention: AttentionBackend,
        parallel: Parallel,
    ) -> None:
        self._config = config
        self._attention = attention
        share = _Share.of(config, parallel)
        self._kv_heads = share.kv_heads
        shape = (config.vocab_size, config.hidden_size)
        self._embed = weights.shaped("model.embed_tokens.weight", shape)
        self._layers = [_layer(config, weights, share, i) for i in range(config.layers)]
        self._norm = RMSNorm(weights["model.norm.weight"], config.rms_eps)
        self._head = weights.shaped("lm_head.weight", shape)
        self._frequencies = inverse_frequencies(config.rope, config.head_dim)

    def make_pool(self, num_pages: int, block_tokens: int, dtype: torch.dtype) -> PagePool:
        """Pages [this rank's kv_heads, layers, 2, block_tokens, head_dim]."""
        c = self._config
        shape = (len(self._kv_heads), c.layers, 2, block_tokens, c.head_dim)
        return PagePool(num_pages, shape, layer_dim=2, dtype=dtype)

    def forward(self, token_ids: torch.Tensor, batch: Batch, pool: PagePool) -> torch.Tensor:
        """token_ids (tokens,) int64 -> logits (sequences, vocab) of each span's last token."""
        x = F.embedding(token_ids, self._embed)
        factor = self._config.rope.attention_factor
        tables = rope_tables(self._frequencies, batch.positions, x.dtype, factor)
        for i, layer in enumerate(self._layers):
            x = x + self._attend(layer, layer.attention_norm(x), tables, batch, pool.layer(i))
            x = x + layer.mlp(layer.mlp_norm(x))
        return F.linear(self._norm(last_rows(x, batch)), self._head)

    def _attend(
        self,
        layer: _Layer,
        x: torch.Tensor,
        tables: tuple[torch.Tensor, torch.Tensor],
        batch: Batch,
        pages: torch.Tensor,
    ) -> torch.Tensor:
        """Write the batch's keys and values to the pages, then attend; x (tokens, hidden)."""
        dim = self._config.head_dim
        q, k, v = (torch.unflatten(part(x), -1, (-1, dim)) for part in (layer.q, layer.k, layer.v))
        q = rotate(layer.q_norm(q) if layer.q_norm else q, *tables)
        k = rotate(layer.k_norm(k) if layer.k_norm else k, *tables)
        pages[batch.pages, :, :, batch.offsets] = torch.stack((k, v), dim=2)
        return layer.o(self._attention.grouped(q, pages, batch, dim**-0.5).flatten(1))


def _layer(config: ModelConfig, weights: Weights, share: _Share, index: int) -> _Layer:
    name = f"model.layers.{index}"
    at = f"{name}.self_attn"
    for part, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        # A rank takes rows by number: of a larger weight they would be other heads' rows.
        shape = (heads * config.head_dim, config.hidden_size)
        weights.shaped(f"{at}.{part}_proj.weight", shape)

    def norm(path: str) -> RMSNorm:
        return RMSNorm(weights[f"{path}.weight"], config.rms_eps)

    normed = config.model_type == "qwen3"
    return _Layer(
        attention_norm=norm(f"{name}.input_layernorm"),
        q=linear(weights, f"{at}.q_proj", config.qkv_bias, share.q_rows),
        k=linear(weights, f"{at}.k_proj", config.qkv_bias, share.kv_rows),
        v=linear(weights, f"{at}.v_proj", config.qkv_bias, share.kv_rows),
        o=summed_linear(weights, f"{at}.o_proj", share.parallel, share.q_rows, config.o_bias),
        q_norm=norm(f"{at}.q_norm") if normed else None,
        k_norm=norm(f"{at}.k_norm") if normed else None,
        mlp_norm=norm(f"{name}.post_attention_layernorm"),
        mlp=split_swiglu(weights, f"{name}.mlp", share.parallel, config.mlp_bias),
    )
