"""Decoders by model family."""

from typing import Protocol

import torch

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

    Raises CheckpointError for a tensor that is missing or misfits, and InvalidArgument for a
    split that is not the model's.
    """
    family = DeepseekModel if checkpoint.config.mla else LlamaModel
    return family(checkpoint.config, checkpoint.weights, attention, parallel)
