"""A tiny model whose heads are as wide as the decode kernels take them."""

from pathlib import Path

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


def save_wide_latent(folder: Path) -> Path:
    """A seeded random DeepSeek V3 without routed experts, with latents of the usual width."""
    torch.manual_seed(5)
    config = transformers.DeepseekV3Config(
        vocab_size=97,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        first_k_dense_replace=2,
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
    )
    transformers.DeepseekV3ForCausalLM(config).save_pretrained(folder)
    return folder
