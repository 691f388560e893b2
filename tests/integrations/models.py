"""A tiny Llama of random weights that real engines load: any wrong KV changes its tokens."""

from __future__ import annotations

from pathlib import Path


def save_llama(folder: Path, *, seed: int = 0) -> Path:
    """Saves one of 4 layers, 4 heads and 2 for keys and values, 64 wide, with its seed's weights.

    Its tokens are numbers below 512; there is no tokenizer.
    """
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
