"""Decoders by model family."""

from typing import Protocol

import torch

from kvstore.errors import InvalidArgument
from kvstore_engines.attention import AttentionBackend, Batch
from kvstore_engines.checkpoint import Checkpoint
from kvstore_engines.models.deepseek import DeepseekModel
from kvstore_engines.models.llama import LlamaModel
from kvstore_engines.paged import PagePool
from kvstore_engines.parallel import Parallel


class Model(Protocol):
    """A decoder over paged KV."""

    def make_pool(self, num_pages: int, block_tokens: int, dtype: torch.dtype) -> PagePool:
        """A pool whose pages have this model's shape."""

    def forward(self, token_ids: torch.Tensor, batch: Batch, pool: PagePool) -> torch.Tensor:
        """token_ids (tokens,) int64 -> logits (sequences, vocab) of each span's last token."""


def build_model(checkpoint: Checkpoint, attention: AttentionBackend, parallel: Parallel) -> Model:
    """This rank's part of the decoder of the checkpoint's family.

    Latent attention has one head of keys for all queries, which ranks cannot split: it raises
    InvalidArgument for more than one.
    """
    config, weights = checkpoint.config, checkpoint.weights
    if config.mla is None:
        return LlamaModel(config, weights, attention, parallel)
    if parallel.size > 1:
        raise InvalidArgument("parallel", f"{config.model_type} runs on one rank only")
    return DeepseekModel(config, weights, attention)
