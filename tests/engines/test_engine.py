"""The engine gives transformers' greedy tokens, with and without a store."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from engines.fakes import FakeBlockStore  # noqa: E402

from kvstore_engines.checkpoint import CheckpointError, fingerprint, load_checkpoint  # noqa: E402
from kvstore_engines.engine import Engine  # noqa: E402
from kvstore_engines.smollm2 import ensure_smollm2, load_tokenizer  # noqa: E402

pytestmark = [pytest.mark.engines, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

COMMON: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.4,
    "bos_token_id": None,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "num_attention_heads": 4,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_group": 4,
    "topk_group": 2,
    "initializer_range": 0.2,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "deepseek_v2": ("DeepseekV2", {**MLA, "q_lora_rank": None, "topk_method": "greedy"}),
    "deepseek_v2_groups": (
        "DeepseekV2",
        {**MLA, "q_lora_rank": 20, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3", {**MLA, "q_lora_rank": 20}),
}
PROMPTS = [[(7 * i + j * j) % 97 for j in range(n)] for i, n in enumerate((1, 16, 37, 50))]


def save_tiny(name: str, folder: Path) -> Any:
    """A seeded random model, saved; biases too, so that leaving one out shows."""
    family, extra = MODELS[name]
    torch.manual_seed(5)
    config = getattr(transformers, f"{family}Config")(**{**COMMON, **extra})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            if key.endswith("bias"):
                value.normal_(0, 0.3)
        for key, value in model.named_buffers():
            if key.endswith("correction_bias"):
                value.normal_(0, 0.3)
    model.save_pretrained(folder)
    return model


def reference(model: Any, prompt: list[int], count: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return tuple(out[0, len(prompt) :].tolist())


@pytest.mark.parametrize("name", MODELS)
def test_tokens_equal_transformers_greedy(name: str, tmp_path: Path) -> None:
    model = save_tiny(name, tmp_path)
    engine = Engine(tmp_path, store=None, num_pages=12)
    results = engine.generate(PROMPTS, 20)
    for prompt, result in zip(PROMPTS, results, strict=True):
        assert result.token_ids == reference(model, prompt, 20)
        assert (result.matched_tokens, result.tier, result.stored_blocks) == (0, None, 0)
    assert engine.pool.free_pages == 12


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_prefix_comes_from_the_store(name: str, tmp_path: Path) -> None:
    save_tiny(name, tmp_path)
    plain = Engine(tmp_path, store=None, num_pages=8).generate([PROMPTS[3]], 20)[0]
    store = FakeBlockStore(16)
    first = Engine(tmp_path, store=store, num_pages=8).generate([PROMPTS[3]], 20)[0]
    second = Engine(tmp_path, store=store, num_pages=8).generate([PROMPTS[3]], 20)[0]
    assert plain.token_ids == first.token_ids == second.token_ids
    assert (first.matched_tokens, first.stored_blocks) == (0, 4)  # three of the prompt, one decoded
    assert (second.matched_tokens, second.tier, second.stored_blocks) == (48, "fake", 0)
    store.zero()
    spoiled = Engine(tmp_path, store=store, num_pages=8).generate([PROMPTS[3]], 20)[0]
    assert spoiled.matched_tokens == 48
    assert spoiled.token_ids != plain.token_ids


def test_one_prompt_token_is_always_computed(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    store = FakeBlockStore(16)
    for _ in range(2):
        result = Engine(tmp_path, store=store, num_pages=8).generate([PROMPTS[1] * 2], 4)[0]
    assert (result.prompt_tokens, result.matched_tokens) == (32, 16)


def test_a_broken_store_is_a_miss(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    plain = Engine(tmp_path, store=None, num_pages=8).generate([PROMPTS[3]], 20)[0]
    broken = FakeBlockStore(16, broken=True)
    result = Engine(tmp_path, store=broken, num_pages=8).generate([PROMPTS[3]], 20)[0]
    assert result.token_ids == plain.token_ids
    assert (result.matched_tokens, result.stored_blocks) == (0, 0)


def test_page_bytes_are_the_block_layout(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    engine = Engine(tmp_path, store=None, num_pages=2, dtype=torch.bfloat16)
    assert engine.pool.storage.shape == (2, 2, 3, 2, 16, 8)
    view = engine.pool.page_bytes(1)
    view[:] = np.arange(view.size, dtype=np.uint32).astype(np.uint8)
    block = engine.pool.storage[1].contiguous().view(torch.uint8).numpy().reshape(-1)
    assert view.size == 2 * 3 * 2 * 16 * 8 * 2
    assert np.array_equal(block, view)


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


def test_smollm2_equals_transformers() -> None:
    folder = ensure_smollm2()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = load_tokenizer(folder).encode("The capital of France is").ids
    result = Engine(folder, store=None, num_pages=4).generate([prompt], 16)[0]
    assert result.token_ids == reference(model, prompt, 16)
