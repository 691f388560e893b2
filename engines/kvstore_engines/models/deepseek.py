"""DeepSeek-V2 and V3: latent attention over a compressed cache, and routed experts."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses

from kvstore_engines.appending import Appending
from kvstore_engines.attention import AttentionBackend, Batch
from kvstore_engines.checkpoint import Weights
from kvstore_engines.config import MlaConfig, ModelConfig
from kvstore_engines.fields import CheckpointError
from kvstore_engines.models.layers import (
    SummedLinear,
    SwiGlu,
    expert,
    last_rows,
    linear,
    split_swiglu,
    summed_linear,
)
from kvstore_engines.ops import Experts, Joint, LayerCache, Linear, Ops, RMSNorm, ops_for
from kvstore_engines.paged import PagePool
from kvstore_engines.parallel import Parallel, even_share
from kvstore_engines.rope import inverse_frequencies, rope_tables
from kvstore_engines.routing import Router

LATENT_EPS = 1e-6  # the latent norms do not follow rms_norm_eps in the reference model


@dataclass(frozen=True)
class _Moe:
    """Routed experts, of which a rank has its share, and the shared ones of every token."""

    routed: Experts  # of this rank
    shared: SwiGlu
    parallel: Parallel

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x (tokens, hidden) -> the same shape."""
        return self.shared(x) + self.parallel.all_reduce(self.routed(x))


@dataclass(frozen=True)
class _Layer:
    attention_norm: RMSNorm
    down: Joint  # to the queries, or their low-rank form, and to what is cached
    q_norm: RMSNorm | None  # of the low-rank form
    q_up: Linear | None
    latent_norm: RMSNorm
    key_up: torch.Tensor  # (this rank's heads, qk_nope_head_dim, kv_lora_rank)
    value_up: torch.Tensor  # (this rank's heads, v_head_dim, kv_lora_rank)
    o: SummedLinear
    mlp_norm: RMSNorm
    mlp: SwiGlu | _Moe


class DeepseekModel:
    """The decoder of the DeepSeek family; a token caches its latent and its rotated key.

    A rank holds its query heads, with the key and value projections folded into them, its share
    of the experts and of the other feed-forward widths. The cache serves all heads: every rank
    computes it whole, to the same bits.
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
        if config.mla is None:
            raise CheckpointError("kv_lora_rank", "field is missing")
        self._config = config
        self._mla = config.mla
        shape = (config.vocab_size, config.hidden_size)
        self._embed = weights.shaped("model.embed_tokens.weight", shape)
        self._ops = ops or ops_for(self._embed.device)
        self._appending = Appending(attention, self._ops)
        self._layers = [
            _layer(config, config.mla, weights, parallel, self._ops, index=i)
            for i in range(config.layers)
        ]
        last = RMSNorm(weights["model.norm.weight"], config.rms_eps)
        self._norms_after = [*(layer.attention_norm for layer in self._layers[1:]), last]
        self._head = weights.shaped("lm_head.weight", shape)
        frequencies = inverse_frequencies(config.rope, config.mla.qk_rope_head_dim)
        self._frequencies = frequencies.to(self._embed.device)
        self._scale = config.mla.key_dim**-0.5 * config.rope.softmax_factor

    def make_pool(self, num_pages: int, block_tokens: int, dtype: torch.dtype) -> PagePool:
        """Pages [layers, block_tokens, kv_lora_rank + qk_rope_head_dim]."""
        shape = (self._config.layers, block_tokens, self._mla.width)
        return PagePool(num_pages, shape, layer_dim=1, dtype=dtype, device=self._embed.device)

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
        """Write the batch's latents to the pages, then attend; x (tokens, hidden)."""
        m = self._mla
        narrow, cached = layer.down(x)
        mixed = self._appending.latent(
            torch.unflatten(self._query(layer, narrow), -1, (-1, m.key_dim)),
            cached,
            layer.key_up,
            layer.latent_norm,
            cache,
            scale=self._scale,
            interleaved=m.rope_interleave,
        )
        return layer.o(torch.einsum("thr,hvr->thv", mixed, layer.value_up).flatten(1))

    def _query(self, layer: _Layer, narrow: torch.Tensor) -> torch.Tensor:
        """(tokens, this rank's heads * key_dim), where `narrow` is not that already."""
        if layer.q_up is None or layer.q_norm is None:
            return narrow
        return layer.q_up(self._ops.norm(narrow, layer.q_norm))


def _layer(
    config: ModelConfig,
    mla: MlaConfig,
    weights: Weights,
    parallel: Parallel,
    ops: Ops,
    *,
    index: int,
) -> _Layer:
    name = f"model.layers.{index}"
    at = f"{name}.self_attn"
    low = mla.q_lora_rank is not None
    q = f"{at}.q_b_proj" if low else f"{at}.q_proj"
    weights.shaped(
        f"{q}.weight", (config.heads * mla.key_dim, mla.q_lora_rank or config.hidden_size)
    )
    heads = parallel.kv_heads(config.heads)  # each query head has a key and value head of its own
    key_up, value_up = _up_projections(config, mla, weights, f"{at}.kv_b_proj.weight", heads)
    whole_q = linear(weights, q, rows=_slice(heads, mla.key_dim))
    first_q = linear(weights, f"{at}.q_a_proj", config.qkv_bias) if low else whole_q
    latent = linear(weights, f"{at}.kv_a_proj_with_mqa", config.qkv_bias)
    return _Layer(
        attention_norm=RMSNorm(weights[f"{name}.input_layernorm.weight"], config.rms_eps),
        down=ops.joint(first_q, latent),
        q_norm=RMSNorm(weights[f"{at}.q_a_layernorm.weight"], LATENT_EPS) if low else None,
        q_up=whole_q if low else None,
        latent_norm=RMSNorm(weights[f"{at}.kv_a_layernorm.weight"], LATENT_EPS),
        key_up=key_up,
        value_up=value_up,
        o=summed_linear(
            weights, f"{at}.o_proj", parallel, _slice(heads, mla.v_head_dim), config.o_bias
        ),
        mlp_norm=RMSNorm(weights[f"{name}.post_attention_layernorm.weight"], config.rms_eps),
        mlp=_mlp(config, weights, parallel, ops, index),
    )


def _slice(heads: range, width: int) -> slice:
    """The rows, or columns, of `heads` where each has `width`."""
    return slice(heads.start * width, heads.stop * width)


def _up_projections(
    config: ModelConfig, mla: MlaConfig, weights: Weights, name: str, heads: range
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `heads`: (heads, qk_nope_head_dim, kv_lora_rank) and (heads, v_head_dim, same)."""
    width = mla.qk_nope_head_dim + mla.v_head_dim
    up = weights.shaped(name, (config.heads * width, mla.kv_lora_rank))[_slice(heads, width)]
    by_head = torch.unflatten(up, 0, (-1, width))
    key_up, value_up = by_head.split_with_sizes((mla.qk_nope_head_dim, mla.v_head_dim), dim=1)
    return key_up, value_up


def _mlp(
    config: ModelConfig, weights: Weights, parallel: Parallel, ops: Ops, index: int
) -> SwiGlu | _Moe:
    name = f"model.layers.{index}.mlp"
    moe = config.moe
    if moe is None or index < moe.first_dense:
        return split_swiglu(ops, weights, name, parallel, config.mlp_bias)
    corrected = moe.method == "noaux_tc"
    router = Router(
        config=moe,
        weight=weights[f"{name}.gate.weight"],
        correction=weights[f"{name}.gate.e_score_correction_bias"] if corrected else None,
    )
    mine = even_share(moe.experts, parallel.rank, parallel.size)
    experts = [expert(weights, f"{name}.experts.{i}") for i in mine]
    return _Moe(
        routed=ops.experts(router, experts, mine.start),
        shared=split_swiglu(ops, weights, f"{name}.shared_experts", parallel, config.mlp_bias),
        parallel=parallel,
    )
