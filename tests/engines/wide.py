"""A tiny model whose heads are as wide as the decode kernels take them."""

from pathlib import Path
from typing import Any

import torch
import transformers

PROMPTS = [[(7 * i + j * j) % 97 for j in range(n)] for i, n in enumerate((1, 16, 37, 50))]


def save_wide(folder: Path) -> Path:
    """A seeded random Llama."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def save_wide_latent(folder: Path, **changed: Any) -> Path:
    """A seeded random DeepSeek V3 with latents of the usual width, without routed experts.

    changed: other fields of its config.
    """
    torch.manual_seed(5)
    fields = {"first_k_dense_replace": 2, **changed}
    config = transformers.DeepseekV3Config(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=16,
        num_key_value_heads=16,
        q_lora_rank=32,
        kv_lora_rank=512,
        qk_nope_head_dim=32,
        qk_rope_head_dim=64,
        v_head_dim=32,
        max_position_embeddings=256,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=None,
        **fields,
    )
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(folder)
    return folder


def save_wide_routed(folder: Path) -> Path:
    """The same with routed experts in its second layer."""
    return save_wide_latent(
        folder,
        first_k_dense_replace=1,
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=3,
        moe_intermediate_size=64,
        n_group=4,
        topk_group=2,
    )
