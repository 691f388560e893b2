"""Checkpoint folders: what is read of them, and that what is at fault is named."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engines.tiny import PROMPTS, reference, save_tiny  # noqa: E402

from kvstore_engines.checkpoint import load_checkpoint  # noqa: E402
from kvstore_engines.config import load_config  # noqa: E402
from kvstore_engines.engine import Engine  # noqa: E402
from kvstore_engines.fields import CheckpointError  # noqa: E402
from kvstore_engines.weights import fingerprint  # noqa: E402

pytestmark = pytest.mark.engines


def test_a_missing_tensor_or_field_is_named(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    before = fingerprint(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.absent\.weight"):
        load_checkpoint(tmp_path).weights["model.absent.weight"]
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert fingerprint(tmp_path) != before
    with pytest.raises(CheckpointError, match="vocab_size"):
        load_checkpoint(tmp_path)


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    result = Engine(tmp_path, store=None, num_pages=8).generate([PROMPTS[3]], 20)[0]
    assert result.token_ids == reference(model, PROMPTS[3], 20)
    before = fingerprint(tmp_path)
    tail = bytearray(shards[1].read_bytes())
    tail[-1] ^= 1
    shards[1].write_bytes(tail)
    assert fingerprint(tmp_path) != before
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=shards[1].name):
        load_checkpoint(tmp_path)


def test_a_shard_outside_the_folder_is_refused(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="not a file name"):
        load_checkpoint(tmp_path)


def test_rope_fields_in_their_older_form_mean_the_same(tmp_path: Path) -> None:
    save_tiny("deepseek_v3_yarn", tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    new = load_config(tmp_path)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    path.write_text(json.dumps({**config, "rope_scaling": rope}))
    assert load_config(tmp_path) == new
    assert new.rope.kind == "yarn"
    assert new.max_positions == 1024  # eight times 128


ROPE = {"rope_theta": 10000.0}
UNUSABLE: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"model_type": "gpt2"}, "model_type"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    ("llama", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "linear"}}, "rope_type"),
    ("llama", {"rope_parameters": {**ROPE, "rope_type": "llama3"}}, "factor"),
    ("llama", {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama", {"num_hidden_layers": 0}, "num_hidden_layers"),
    ("llama", {"hidden_size": "wide"}, "hidden_size"),
    ("llama", {"max_position_embeddings": None}, "max_position_embeddings"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
    ("llama", {"vocab_size": 98}, "model.embed_tokens.weight"),
    ("llama", {"num_key_value_heads": 1}, "model.layers.0.self_attn.k_proj.weight"),
    ("llama", {"num_hidden_layers": 4}, "model.layers.3.self_attn.q_proj.weight"),
    ("qwen2", {"use_sliding_window": True}, "use_sliding_window"),
    ("deepseek_v2", {"topk_method": "other"}, "topk_method"),
    ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
    ("deepseek_v3", {"n_group": 3}, "n_group"),
    ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank"),
    ("deepseek_v3", {"v_head_dim": 8}, "model.layers.0.self_attn.kv_b_proj.weight"),
    ("deepseek_v3", {"num_attention_heads": 8}, "model.layers.0.self_attn.q_b_proj.weight"),
]


@pytest.mark.parametrize(("name", "change", "field"), UNUSABLE)
def test_a_config_that_cannot_be_run_names_the_field(
    name: str, change: dict[str, Any], field: str, tiny: Any, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny(name)[0], tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(CheckpointError) as raised:
        Engine(folder, store=None, num_pages=1)
    assert raised.value.field == field


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_that_is_none_of_its_kind_is_named(name: str, tiny: Any, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny("llama")[0], tmp_path / "llama")
    (folder / name).write_bytes(b"?" * 100)
    with pytest.raises(CheckpointError) as raised:
        Engine(folder, store=None, num_pages=1)
    assert raised.value.field == name
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"missing|no weights"):
        Engine(folder, store=None, num_pages=1)
