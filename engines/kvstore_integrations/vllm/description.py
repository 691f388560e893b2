"""What vLLM's configuration says of its blocks: whether they can be stored, and what they are."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    MLAAttentionSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    iter_layer_specs,
)

from kvstore_integrations.identity import Identity, model_identity
from kvstore_integrations.settings import ConfigurationError, StoreSettings
from kvstore_integrations.vllm.facts import machine_facts
from kvstore_integrations.vllm.scheduling import Group

_HASHES = ("sha256_cbor", "sha256")  # of 32 bytes, and equal in all processes
_ATTENTION = (FullAttentionSpec, MLAAttentionSpec, SlidingWindowSpec, SlidingWindowMLASpec)
_STRETCHED = ("longrope", "su", "dynamic")  # ropes that depend on the longest context
_DIGEST_BYTES = 16


def check(config: Any, kv_cache_config: Any) -> None:
    """`ConfigurationError` for a `VllmConfig` and a `KVCacheConfig` that cannot work."""
    if config.kv_transfer_config.kv_load_failure_policy != "recompute":
        raise ConfigurationError(
            'set "kv_load_failure_policy": "recompute" in kv_transfer_config: with "fail", each '
            "block that the store loses would fail a request"
        )
    algorithm = config.cache_config.prefix_caching_hash_algo
    if algorithm not in _HASHES:
        raise ConfigurationError(
            f"--prefix-caching-hash-algo {algorithm} cannot be used, its hashes are no names that "
            f"two processes share. Set it to {_HASHES[0]}."
        )
    parallel = config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ConfigurationError(
            "context parallelism is not supported: its blocks are spread over ranks. Start without "
            "--decode-context-parallel-size and --prefill-context-parallel-size."
        )
    for group in kv_cache_config.kv_cache_groups:
        for spec in iter_layer_specs(group.kv_cache_spec):
            _check_attention(spec, group.layer_names)


def groups_of(config: Any, kv_cache_config: Any) -> tuple[list[Group], int]:
    """The cache groups, and the tokens of a block hash."""
    hash_tokens: int = resolve_kv_cache_block_sizes(kv_cache_config, config)[1]
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        spec = next(iter(iter_layer_specs(group.kv_cache_spec)))
        if spec.block_size % hash_tokens:
            raise ConfigurationError(
                f"blocks of {spec.block_size} tokens are hashed by {hash_tokens}: choose a "
                "--block-size that is a multiple of that"
            )
        window = None
        if isinstance(spec, SlidingWindowSpec):
            window = spec.sliding_window - 1 + spec.extra_retained_tokens
        groups.append(Group(block_tokens=spec.block_size, window=window))
    return groups, hash_tokens


def identities(config: Any, kv_cache_config: Any, settings: StoreSettings) -> list[Identity | None]:
    """What this worker's blocks are, by cache group; None where it has no layer of one.

    Workers whose bytes are equal have equal identities. `ConfigurationError` where nothing tells
    which weights they are made with.
    """
    model = _model(config.model_config, settings)
    facts = _common_facts(config, kv_cache_config, settings)
    made: list[Identity | None] = []
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        layers = get_layers_from_vllm_config(config, AttentionLayerBase, group.layer_names)
        backends = {layer.get_attn_backend().get_name() for layer in layers.values()}
        of_group = {
            "group": number,
            "layers": list(group.layer_names),
            "spec": repr(group.kv_cache_spec),
            "backends": sorted(backends),
        }
        made.append(Identity("vllm", model, {**facts, **of_group}) if layers else None)
    return made


def is_writer(kv_cache_config: Any) -> bool:
    """Whether this worker saves for all that hold equal bytes."""
    return bool(get_tp_group().rank_in_group % kv_cache_config.kv_tp_replicas == 0)


# -- inside ----------------------------------------------------------------------------


def _check_attention(spec: Any, layers: list[str]) -> None:
    kind = type(spec)
    if kind not in _ATTENTION or not spec.prefix_cacheable or spec.prefix_replay_tokens:
        raise ConfigurationError(
            f"the layers {layers[0]} and its like keep {kind.__name__}, which cannot be found by "
            "prefix; only full and sliding-window attention can. Start this model without the "
            "KVStoreConnector."
        )
    if getattr(spec, "non_causal", False):
        raise ConfigurationError(
            f"the layers {layers[0]} and its like look at later tokens too, so no prefix of theirs "
            "can be reused. Start this model without the KVStoreConnector."
        )


def _model(model_config: Any, settings: StoreSettings) -> str:
    commit = getattr(model_config.hf_config, "_commit_hash", None) or ""
    return model_identity(model_config.model, revision=settings.model_revision, commit=commit)


def _common_facts(config: Any, kv_cache_config: Any, settings: StoreSettings) -> dict[str, object]:
    model, cache = config.model_config, config.cache_config
    text = json.dumps(_settings_of(model.hf_config), sort_keys=True, default=str)
    replicas = kv_cache_config.kv_tp_replicas
    facts: dict[str, object] = {
        **machine_facts(),
        "dtype": str(model.dtype),
        "cache_dtype": str(cache.cache_dtype),
        "quantization": str(model.quantization),
        "config": hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).hexdigest(),
        "layout": str(kv_cache_config.kv_cache_layout),
        "hash": cache.prefix_caching_hash_algo,
        "shard": [
            get_tp_group().rank_in_group // replicas,
            config.parallel_config.tensor_parallel_size // replicas,
        ],
    }
    if any(kind in text.lower() for kind in _STRETCHED):
        facts["max_model_len"] = model.max_model_len
    if config.load_config.load_format == "dummy":
        facts["weights"] = "dummy"
    draft = config.speculative_config and config.speculative_config.draft_model_config
    if draft:
        facts["draft"] = [config.speculative_config.method, _model(draft, settings)]
    return facts


def _settings_of(hf_config: Any) -> dict[str, Any]:
    """Less what may differ between processes of one model."""
    every: dict[str, Any] = hf_config.to_dict()
    return {k: v for k, v in every.items() if k not in ("_name_or_path", "transformers_version")}
