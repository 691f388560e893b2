"""The store's layout of a checkpoint's blocks: what the bytes of the engines' pages mean."""

from pathlib import Path

import torch

from kvstore import Attention, Layout
from kvstore_engines.config import load_config
from kvstore_engines.weights import fingerprint


def layout_of(checkpoint: Path, block_tokens: int, dtype: torch.dtype) -> Layout:
    """The layout of blocks that an engine of `dtype` computes from a checkpoint folder.

    Grouped-query attention has one key/value head per cell and all layers in one cell, so that
    any split of the heads among ranks is a run of cells; latent attention has one cell. Raises
    CheckpointError, and InvalidArgument for blocks that no store takes.
    """
    config = load_config(checkpoint)
    return Layout(
        model=fingerprint(checkpoint),
        attention=Attention.MLA if config.mla else Attention.GQA,
        layers=config.layers,
        kv_heads=1 if config.mla else config.kv_heads,
        head_dim=config.mla.width if config.mla else config.head_dim,
        dtype=str(dtype).removeprefix("torch."),
        block_tokens=block_tokens,
    )
