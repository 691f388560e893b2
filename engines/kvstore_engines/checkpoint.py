"""Hugging Face checkpoint folders: configuration, tensors and a cheap fingerprint."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

LLAMA_FAMILY = ("llama", "qwen2", "qwen3")
DEEPSEEK_FAMILY = ("deepseek_v2", "deepseek_v3")
SAMPLE_BYTES = 4096
SAMPLES = 16


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; `name` is the tensor, field or file at fault."""

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"{name}: {problem}")
        self.name = name


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: `kind` is "default" or "llama3"; the rest is used by "llama3" only."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class MlaConfig:
    """Multi-head latent attention: ranks and the widths of a head's parts."""

    kv_lora_rank: int
    q_lora_rank: int | None
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    rope_interleave: bool


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class ModelConfig:
    """The fields of config.json that the decoders read."""

    model_type: str
    vocab_size: int
    hidden_size: int
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


class Weights(Mapping[str, torch.Tensor]):
    """Tensors by name; a missing one is a CheckpointError that names it."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(name, "tensor is missing from the checkpoint") from None

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint: its configuration and its tensors in one dtype."""

    config: ModelConfig
    weights: Weights


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Read a checkpoint folder; every tensor comes back on the CPU in `dtype`."""
    config = load_config(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors.update((name, t.to(dtype)) for name, t in load_file(file).items())
    if config.tied and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return Checkpoint(config, Weights(tensors))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files, from the shard index where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError("*.safetensors", "no weights in the checkpoint folder")
        return files
    shards = sorted(set(_field(_json(index), "weight_map").values()))
    for shard in shards:
        if not (folder / shard).is_file():
            raise CheckpointError(shard, "shard named by the index is missing")
    return [folder / shard for shard in shards]


def load_config(folder: Path) -> ModelConfig:
    """Read config.json (and the end-of-sequence ids of generation_config.json)."""
    raw = _json(folder / "config.json")
    kind = _field(raw, "model_type")
    if kind not in LLAMA_FAMILY + DEEPSEEK_FAMILY:
        raise CheckpointError("model_type", f"{kind!r} is not supported")
    _refuse_unsupported(raw)
    heads = _field(raw, "num_attention_heads")
    bias = bool(raw.get("attention_bias", False))
    mla = _mla(raw) if kind in DEEPSEEK_FAMILY else None
    return ModelConfig(
        model_type=kind,
        vocab_size=_field(raw, "vocab_size"),
        hidden_size=_field(raw, "hidden_size"),
        layers=_field(raw, "num_hidden_layers"),
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or _field(raw, "hidden_size") // heads,
        rms_eps=_field(raw, "rms_norm_eps"),
        rope=_rope(raw),
        tied=bool(raw.get("tie_word_embeddings", False)),
        qkv_bias=bias or kind == "qwen2",
        o_bias=bias and kind != "qwen2",
        mlp_bias=bool(raw.get("mlp_bias", False)),
        max_positions=_field(raw, "max_position_embeddings"),
        eos_ids=_eos_ids(raw, folder),
        mla=mla,
        moe=_moe(raw) if mla and raw.get("n_routed_experts") else None,
    )


def fingerprint(folder: Path) -> str:
    """A cheap identity of the model: config, tensor headers, sizes and sampled weight bytes.

    It tells checkpoints apart without reading gigabytes; it is no proof against a forger.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"\0{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header = int.from_bytes(prefix, "little")
            digest.update(prefix + stream.read(header))
            for i in range(SAMPLES):
                stream.seek(8 + header + (size - 8 - header) * i // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(path.name, "file is missing from the checkpoint") from None
    except ValueError as error:
        raise CheckpointError(path.name, f"not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise CheckpointError(path.name, "not a JSON object")
    return raw


def _field(raw: dict[str, Any], name: str) -> Any:
    if raw.get(name) is None:
        raise CheckpointError(name, "field is missing")
    return raw[name]


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    """Refuse what would run but compute something else."""
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError("hidden_act", f"{raw['hidden_act']!r} is not supported")
    if raw.get("use_sliding_window"):
        raise CheckpointError("use_sliding_window", "sliding windows are not supported")
    if raw.get("quantization_config"):
        raise CheckpointError("quantization_config", "quantized weights are not supported")


def _rope(raw: dict[str, Any]) -> RopeConfig:
    """Rope fields, from `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise CheckpointError("partial_rotary_factor", "partial rotation is not supported")
    if kind == "default":
        return RopeConfig(theta)
    if kind != "llama3":
        raise CheckpointError("rope_type", f"{kind!r} is not supported")
    return RopeConfig(
        theta,
        kind,
        float(_field(rope, "factor")),
        float(_field(rope, "low_freq_factor")),
        float(_field(rope, "high_freq_factor")),
        int(rope.get("original_max_position_embeddings") or _field(raw, "max_position_embeddings")),
    )


def _eos_ids(raw: dict[str, Any], folder: Path) -> frozenset[int]:
    """generation_config.json wins over config.json, as in transformers."""
    path = folder / "generation_config.json"
    found = _json(path).get("eos_token_id") if path.exists() else None
    found = raw.get("eos_token_id") if found is None else found
    if found is None:
        return frozenset()
    return frozenset(found) if isinstance(found, list) else frozenset([int(found)])


def _mla(raw: dict[str, Any]) -> MlaConfig:
    return MlaConfig(
        kv_lora_rank=_field(raw, "kv_lora_rank"),
        q_lora_rank=raw.get("q_lora_rank"),
        qk_nope_head_dim=_field(raw, "qk_nope_head_dim"),
        qk_rope_head_dim=_field(raw, "qk_rope_head_dim"),
        v_head_dim=_field(raw, "v_head_dim"),
        rope_interleave=bool(raw.get("rope_interleave", True)),
    )


def _moe(raw: dict[str, Any]) -> MoeConfig:
    v3 = raw["model_type"] == "deepseek_v3"
    method = "noaux_tc" if v3 else raw.get("topk_method") or "greedy"
    if method not in ("noaux_tc", "greedy", "group_limited_greedy"):
        raise CheckpointError("topk_method", f"{method!r} is not supported")
    if raw.get("moe_layer_freq", 1) != 1:
        raise CheckpointError("moe_layer_freq", "only 1 is supported")
    return MoeConfig(
        experts=_field(raw, "n_routed_experts"),
        top_k=_field(raw, "num_experts_per_tok"),
        first_dense=int(raw.get("first_k_dense_replace", 0)),
        groups=int(raw.get("n_group") or 1),
        top_groups=int(raw.get("topk_group") or 1),
        method=method,
        # V2 never normalizes in the reference model, whatever its config says.
        normalize=v3 and bool(raw.get("norm_topk_prob", True)),
        scaling=float(raw.get("routed_scaling_factor", 1.0)),
    )
