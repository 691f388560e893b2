"""Llama, Qwen2 and Qwen3: grouped-query attention with optional biases and q/k norms."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses

from kvstore_engines.appending import Appending
from kvstore_engines.attention import AttentionBackend, Batch
from kvstore_engines.checkpoint import Weights
from kvstore_engines.config import ModelConfig
from kvstore_engines.models.layers import (
    SummedLinear,
    SwiGlu,
    last_rows,
    linear,
    split_swiglu,
    summed_linear,
)
from kvstore_engines.ops import HeadNorms, Joint, LayerCache, Ops, RMSNorm, ops_for
from kvstore_engines.paged import PagePool
from kvstore_engines.parallel import Parallel
from kvstore_engines.rope import inverse_frequencies, rope_tables


@dataclass(frozen=True)
class _Layer:
    attention_norm: RMSNorm
    qkv: Joint
    head_norms: HeadNorms | None
    o: SummedLinear
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
        ops: Ops | None = None,
    ) -> None:
        """ops: those of the weights' device where there are none."""
        self._config = config
        share = _Share.of(config, parallel)
        self._kv_heads = share.kv_heads
        shape = (config.vocab_size, config.hidden_size)
        self._embed = weights.shaped("model.embed_tokens.weight", shape)
        self._ops = ops or ops_for(self._embed.device)
        self._appending = Appending(attention, self._ops)
        self._layers = [_layer(config, weights, share, self._ops, i) for i in range(config.layers)]
        last = RMSNorm(weights["model.norm.weight"], config.rms_eps)
        self._norms_after = [*(layer.attention_norm for layer in self._layers[1:]), last]
        self._head = weights.shaped("lm_head.weight", shape)
        frequencies = inverse_frequencies(config.rope, config.head_dim)
        self._frequencies = frequencies.to(self._embed.device)

    def make_pool(self, num_pages: int, block_tokens: int, dtype: torch.dtype) -> PagePool:
        """Pages [this rank's kv_heads, layers, 2, block_tokens, head_dim]."""
        c = self._config
        shape = (len(self._kv_heads), c.layers, 2, block_tokens, c.head_dim)
        return PagePool(num_pages, shape, layer_dim=2, dtype=dtype, device=self._embed.device)

    def forward(self, token_ids: torch.Tensor, batch: Batch, pool: PagePool) -> torch.Tensor:
        """token_ids (tokens,) int64 -> logits (sequences, vocab) of each span's last token."""
        x = F.embedding(token_ids, self._embed)
        factor = self._config.rope.attention_factor
        cos, sin = rope_tables(self._frequencies, batch.positions, x.dtype, factor)
        normed = self._ops.norm(x, self._layers[0].attention_norm)
        for i, (layer, norm_after) in enumerate(zip(self._layers, self._norms_after, strict=True)):
            cache = LayerCache(pool.layer(i), batch, cos, sin)
            attended = self._attend(layer, normed, cache)
            x, normed = self._ops.add_norm(x, attended, layer.mlp_norm)
            x, normed = self._ops.add_norm(x, layer.mlp(normed), norm_after)
        return F.linear(last_rows(normed, batch), self._head)

    def _attend(self, layer: _Layer, x: torch.Tensor, cache: LayerCache) -> torch.Tensor:
        """Write the batch's keys and values to the pages, then attend; x (tokens, hidden)."""
        dim = self._config.head_dim
        q, k, v = (torch.unflatten(part, -1, (-1, dim)) for part in layer.qkv(x))
        attended = self._appending.grouped(q, k, v, layer.head_norms, cache, scale=dim**-0.5)
        return layer.o(attended.flatten(1))


def _layer(config: ModelConfig, weights: Weights, share: _Share, ops: Ops, index: int) -> _Layer:
    name = f"model.layers.{index}"
    at = f"{name}.self_attn"
    for part, heads in (("q", config.heads), ("k", config.kv_heads), ("v", config.kv_heads)):
        # A rank takes rows by number: of a larger weight they would be other heads' rows.
        shape = (heads * config.head_dim, config.hidden_size)
        weights.shaped(f"{at}.{part}_proj.weight", shape)

    def norm(path: str) -> RMSNorm:
        return RMSNorm(weights[f"{path}.weight"], config.rms_eps)

    q, k, v = (
        linear(weights, f"{at}.{part}_proj", config.qkv_bias, rows)
        for part, rows in (("q", share.q_rows), ("k", share.kv_rows), ("v", share.kv_rows))
    )
    normed = config.model_type == "qwen3"
    return _Layer(
        attention_norm=norm(f"{name}.input_layernorm"),
        qkv=ops.joint(q, k, v),
        head_norms=HeadNorms(norm(f"{at}.q_norm"), norm(f"{at}.k_norm")) if normed else None,
        o=summed_linear(weights, f"{at}.o_proj", share.parallel, share.q_rows, config.o_bias),
        mlp_norm=norm(f"{name}.post_attention_layernorm"),
        mlp=split_swiglu(ops, weights, f"{name}.mlp", share.parallel, config.mlp_bias),
    )
