"""Seeded tiny models of every family, saved as checkpoints, and what transformers says of them."""

from pathlib import Path
from typing import Any

import torch
import transformers

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
YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 8.0,
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
    "deepseek_v3_dense": ("DeepseekV3", {**MLA, "q_lora_rank": 20, "first_k_dense_replace": 3}),
    "qwen3_yarn": ("Qwen3", {"head_dim": 16, "rope_parameters": YARN}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": {**YARN, "attention_factor": 1.3}}),
    "deepseek_v2_yarn": (
        "DeepseekV2",
        {
            **MLA,
            "q_lora_rank": None,
            "topk_method": "greedy",
            "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.9},
        },
    ),
    "deepseek_v3_yarn": (
        "DeepseekV3",
        {
            **MLA,
            "q_lora_rank": 20,
            "rope_parameters": {
                **YARN,
                "original_max_position_embeddings": 128,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "beta_fast": 2.0,
            },
        },
    ),
}
PROMPTS = [[(7 * i + j * j) % 97 for j in range(n)] for i, n in enumerate((1, 16, 37, 50))]


def save_tiny(name: str, folder: Path, **saved: Any) -> Any:
    """A seeded random model, saved; biases too, so that leaving one out shows.

    saved: arguments of `save_pretrained`.
    """
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
    model.save_pretrained(folder, **saved)
    return model


def reference(model: Any, prompt: list[int], count: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return tuple(out[0, len(prompt) :].tolist())


def reference_margins(model: Any, prompt: list[int], count: int) -> list[tuple[int, float]]:
    """Each greedy token, and by how much its logit exceeds the second best."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=count,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = [row[0].float().topk(2).values.tolist() for row in out.logits]
    tokens = out.sequences[0, len(prompt) :].tolist()
    return [(token, top - second) for token, (top, second) in zip(tokens, best, strict=True)]
