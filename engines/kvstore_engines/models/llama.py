"""Llama, Qwen2 and Qwen3: grouped-query attention with optional biases and q/k norms."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses

from kvstore_engines.attention import AttentionBackend, Batch
from kvstore_engines.checkpoint import ModelConfig, Weights
from kvstore_engines.models.layers import (
    Linear,
    RMSNorm,
    SwiGlu,
    inverse_frequencies,
    last_rows,
    linear,
    rope_tables,
    rotate,
    swiglu,
)
from kvstore_engines.paged import PagePool


@dataclass(frozen=True)
class _Layer:
    attention_norm: RMSNorm
    q: Linear
    k: Linear
    v: Linear
    o: Linear
    q_norm: RMSNorm | None
    k_norm: RMSNorm | None
    mlp_norm: RMSNorm
    mlp: SwiGlu


class LlamaModel:
    """The decoder of the Llama family; weights are read once, at construction."""

    def __init__(self, config: ModelConfig, weights: Weights, attention: AttentionBackend) -> None:
        self._config = config
        self._attention = attention
        self._embed = weights["model.embed_tokens.weight"]
        self._layers = [_layer(config, weights, i) for i in range(config.layers)]
        self._norm = RMSNorm(weights["model.norm.weight"], config.rms_eps)
        self._head = weights["lm_head.weight"]
        self._frequencies = inverse_frequencies(config.rope, config.head_dim)

    def make_pool(self, num_pages: int, block_tokens: int, dtype: torch.dtype) -> PagePool:
        """Pages [kv_heads, layers, 2, block_tokens, head_dim]."""
        c = self._config
        shape = (c.kv_heads, c.layers, 2, block_tokens, c.head_dim)
        return PagePool(num_pages, shape, layer_dim=2, dtype=dtype)

    def forward(self, token_ids: torch.Tensor, batch: Batch, pool: PagePool) -> torch.Tensor:
        """token_ids (tokens,) int64 -> logits (sequences, vocab) of each span's last token."""
        x = F.embedding(token_ids, self._embed)
        tables = rope_tables(self._frequencies, batch.positions, x.dtype)
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


def _layer(config: ModelConfig, weights: Weights, index: int) -> _Layer:
    name = f"model.layers.{index}"
    attention = f"{name}.self_attn"

    def norm(path: str) -> RMSNorm:
        return RMSNorm(weights[f"{path}.weight"], config.rms_eps)

    normed = config.model_type == "qwen3"
    return _Layer(
        attention_norm=norm(f"{name}.input_layernorm"),
        q=linear(weights, f"{attention}.q_proj", config.qkv_bias),
        k=linear(weights, f"{attention}.k_proj", config.qkv_bias),
        v=linear(weights, f"{attention}.v_proj", config.qkv_bias),
        o=linear(weights, f"{attention}.o_proj", config.o_bias),
        q_norm=norm(f"{attention}.q_norm") if normed else None,
        k_norm=norm(f"{attention}.k_norm") if normed else None,
        mlp_norm=norm(f"{name}.post_attention_layernorm"),
        mlp=swiglu(weights, f"{name}.mlp", config.mlp_bias),
    )
