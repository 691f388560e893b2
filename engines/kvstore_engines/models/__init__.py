"""Decoders by model family."""

from typing import Protocol

import torch

from kvstore_engines.attention import AttentionBackend, Batch
from kvstore_engines.checkpoint import Checkpoint
from kvstore_engines.models.deepseek import DeepseekModel
from kvstore_engines.models.llama import LlamaModel
from kvstore_engines.paged import PagePool


class Model(Protocol):
    """A decoder over paged KV."""

    def make_pool(self, num_pages: int, block_tokens: int, dtype: torch.dtype) -> PagePool:
        """A pool whose pages have this model's shape."""

    def forward(self, token_ids: torch.Tensor, batch: Batch, pool: PagePool) -> torch.Tensor:
        """token_ids (tokens,) int64 -> logits (sequences, vocab) of each span's last token."""


def build_model(checkpoint: Checkpoint, attention: AttentionBackend) -> Model:
    """The decoder of the checkpoint's family."""
    if checkpoint.config.mla is not None:
        return DeepseekModel(checkpoint.config, checkpoint.weights, attention)
    return LlamaModel(checkpoint.config, checkpoint.weights, attention)
