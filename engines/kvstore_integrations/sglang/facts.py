"""What SGLang's pages are pages of, from its arguments, its ranks and its host memory pool.

Reads plain values and attributes; loads nothing of SGLang.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from kvstore_integrations.identity import Identity, model_identity
from kvstore_integrations.sglang.pages import PageForm

# Arguments of the server that change what is computed, or the order of its bytes.
_COMPUTING = (
    "attention_backend",
    "decode_attention_backend",
    "device",
    "dtype",
    "json_model_override_args",
    "kv_cache_dtype",
    "load_format",
    "model_impl",
    "modelopt_quant",
    "prefill_attention_backend",
    "quantization",
    "rl_quant_profile",
    "speculative_algorithm",
    "weight_version",
)
# Those that name weights.
_WEIGHTS = (
    "lora_paths",
    "model_path",
    "quantization_param_path",
    "revision",
    "speculative_draft_model_path",
    "speculative_draft_model_revision",
)
ARGUMENTS = (*_COMPUTING, *_WEIGHTS)  # all that this reads
# Attributes of the pool that say which part of the model is in it; pools of MLA have others.
POOL_ATTRIBUTES = (
    "end_layer",
    "head_dim",
    "head_num",
    "kv_cache_dim",
    "kv_lora_rank",
    "layer_num",
    "layout",
    "page_size",
    "qk_rope_head_dim",
    "start_layer",
    "target_layer_num",
    "v_head_dim",
)


class Ranks(Protocol):
    """What this reads of SGLang's `HiCacheStorageConfig`."""

    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    attn_cp_rank: int
    attn_cp_size: int
    is_mla_model: bool


def identity_of(
    arguments: Mapping[str, Any],
    ranks: Ranks,
    pool: object,
    form: PageForm,
    *,
    release: str,
    model_revision: str,
) -> Identity:
    """What the pages of this process are pages of.

    arguments: of the server, resolved. pool: SGLang's host memory pool. release: its version.
    model_revision: as the user has set it. `ConfigurationError` where nothing tells which weights
    they are.
    """
    facts: dict[str, object] = {
        "sglang": release,
        "pool": type(pool).__name__,
        "pool_dtype": str(getattr(pool, "dtype", "")),
        "pieces": list(form.pieces),
        "pipeline": [ranks.pp_rank, ranks.pp_size],
        "context": [ranks.attn_cp_rank, ranks.attn_cp_size],
        # Each rank has the whole latents of MLA, but only its own heads otherwise.
        "heads": [] if ranks.is_mla_model else [ranks.tp_rank, ranks.tp_size],
        "adapters": _adapters(arguments, model_revision),
        "draft": _draft(arguments, model_revision),
        "scales": _file_digest(arguments.get("quantization_param_path")),
    }
    facts |= {name: _plain(arguments.get(name)) for name in _COMPUTING}
    facts |= {name: _plain(getattr(pool, name, None)) for name in POOL_ATTRIBUTES}
    model = _weights(arguments["model_path"], arguments.get("revision"), model_revision)
    return Identity("sglang", model, facts)


def _weights(model: str, revision: str | None, model_revision: str) -> str:
    return model_identity(model, revision=model_revision, commit=_commit(model, revision))


def _commit(model: str, revision: str | None) -> str:
    """The commit of a model that was fetched from the Hugging Face hub; empty if it was not."""
    if Path(model).exists():
        return ""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json", revision=revision)
    except HFValidationError:
        return ""
    return Path(found).parent.name if isinstance(found, str) else ""


def _draft(arguments: Mapping[str, Any], model_revision: str) -> str:
    """The model that guesses tokens ahead: some pools keep its layers behind the other's."""
    draft = arguments.get("speculative_draft_model_path")
    if not draft:
        return ""
    return _weights(draft, arguments.get("speculative_draft_model_revision"), model_revision)


def _adapters(arguments: Mapping[str, Any], model_revision: str) -> list[list[str]]:
    """Names and weights of the LoRA adapters that the server starts with.

    SGLang's keys tell these by name and path alone; those loaded later have random names.
    """
    return sorted(
        [str(one["lora_name"]), _adapter(str(one["lora_path"]), model_revision)]
        for one in arguments.get("lora_paths") or ()
    )


def _adapter(path: str, model_revision: str) -> str:
    files = sorted(Path(path).glob("adapter_*"))
    if files and not model_revision:
        return " ".join(_file_digest(file) for file in files)
    return _weights(path, None, model_revision)


def _file_digest(path: str | Path | None) -> str:
    """Of a file's bytes; empty for none."""
    if not path or not Path(path).is_file():
        return ""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _plain(value: object) -> object:
    """As JSON has it."""
    return value if isinstance(value, str | int | float | bool | None) else str(value)
