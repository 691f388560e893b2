"""What the decoders read of a Hugging Face config.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvstore_engines.fields import CheckpointError, count, read_json, required
from kvstore_engines.rope import RopeConfig, read_rope

LLAMA_FAMILY = ("llama", "qwen2", "qwen3")
DEEPSEEK_FAMILY = ("deepseek_v2", "deepseek_v3")


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """Multi-head latent attention: ranks and the widths of a head's parts."""

    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool

    @property
    def key_dim(self) -> int:
        """Elements of one head's query and key: what is not rotated, and what is."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def width(self) -> int:
        """Elements that one token caches in one layer: its latent and its rotated key."""
        return self.kv_lora_rank + self.qk_rope_head_dim


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """Mixture of experts: layers from `first_dense` on route each token to `top_k` experts."""

    experts: int
    top_k: int
    first_dense: int
    groups: int
    top_groups: int
    method: str
    normalize: bool
    scaling: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The fields of config.json that the decoders read."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rms_eps: float
    rope: RopeConfig
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    max_positions: int
    eos_ids: frozenset[int]
    mla: MlaConfig | None = None
    moe: MoeConfig | None = None


def load_config(folder: Path) -> ModelConfig:
    """Read config.json (and the end-of-sequence ids of generation_config.json)."""
    raw = read_json(folder / "config.json")
    kind = required(raw, "model_type")
    if kind not in LLAMA_FAMILY + DEEPSEEK_FAMILY:
        raise CheckpointError("model_type", f"{kind!r} is not supported")
    _refuse_unsupported(raw)
    heads = count(raw, "num_attention_heads")
    bias = bool(raw.get("attention_bias", False))
    mla = _mla(raw) if kind in DEEPSEEK_FAMILY else None
    rope = read_rope(raw)
    return ModelConfig(
        model_type=kind,
        vocab_size=count(raw, "vocab_size"),
        hidden_size=count(raw, "hidden_size"),
        intermediate_size=count(raw, "intermediate_size"),
        layers=count(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=_kv_heads(raw, heads),
        head_dim=count(raw, "head_dim", count(raw, "hidden_size") // heads),
        rms_eps=required(raw, "rms_norm_eps"),
        rope=rope,
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias and kind != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        max_positions=max(count(raw, "max_position_embeddings"), rope.max_positions),
        eos_ids=_eos_ids(raw, folder),
        mla=mla,
        moe=_moe(raw) if mla and raw.get("n_routed_experts") else None,
    )


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    """Refuse what would run but compute something else."""
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError("hidden_act", f"{raw['hidden_act']!r} is not supported")
    if raw.get("use_sliding_window"):
        raise CheckpointError("use_sliding_window", "sliding windows are not supported")
    if raw.get("quantization_config"):
        raise CheckpointError("quantization_config", "quantized weights are not supported")


def _kv_heads(raw: dict[str, Any], heads: int) -> int:
    kv_heads = count(raw, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise CheckpointError("num_key_value_heads", f"{kv_heads} do not divide {heads} heads")
    return kv_heads


def _eos_ids(raw: dict[str, Any], folder: Path) -> frozenset[int]:
    """generation_config.json wins over config.json, as in transformers."""
    path = folder / "generation_config.json"
    found = read_json(path).get("eos_token_id") if path.exists() else None
    found = raw.get("eos_token_id") if found is None else found
    if found is None:
        return frozenset()
    return frozenset(found) if isinstance(found, list) else frozenset([int(found)])


def _mla(raw: dict[str, Any]) -> MlaConfig:
    return MlaConfig(
        kv_lora_rank=count(raw, "kv_lora_rank"),
        q_lora_rank=raw.get("q_lora_rank"),
        qk_nope_head_dim=count(raw, "qk_nope_head_dim"),
        qk_rope_head_dim=count(raw, "qk_rope_head_dim"),
        v_head_dim=count(raw, "v_head_dim"),
        rope_interleave=bool(raw.get("rope_interleave", True)),
    )


def _moe(raw: dict[str, Any]) -> MoeConfig:
    v3 = raw["model_type"] == "deepseek_v3"
    method = "noaux_tc" if v3 else raw.get("topk_method") or "greedy"
    if method not in ("noaux_tc", "greedy", "group_limited_greedy"):
        raise CheckpointError("topk_method", f"{method!r} is not supported")
    if raw.get("moe_layer_freq", 1) != 1:
        raise CheckpointError("moe_layer_freq", "only 1 is supported")
    experts, groups = count(raw, "n_routed_experts"), count(raw, "n_group", 1)
    if experts % groups:
        raise CheckpointError("n_group", f"{groups} groups do not divide {experts} experts")
    return MoeConfig(
        experts=experts,
        top_k=count(raw, "num_experts_per_tok"),
        first_dense=int(raw.get("first_k_dense_replace", 0)),
        groups=groups,
        top_groups=count(raw, "topk_group", 1),
        method=method,
        # V2 never normalizes in the reference model, whatever its config says.
        normalize=v3 and bool(raw.get("norm_topk_prob", True)),
        scaling=float(raw.get("routed_scaling_factor", 1.0)),
    )
