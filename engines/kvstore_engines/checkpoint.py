"""Hugging Face checkpoint folders: tensors, in one file or in shards."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kvstore_engines.attention import CPU
from kvstore_engines.config import ModelConfig, load_config
from kvstore_engines.fields import CheckpointError
from kvstore_engines.weights import weight_files


class Weights(Mapping[str, torch.Tensor]):
    """Tensors by name; a missing one is a CheckpointError that names it."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(name, "tensor is missing from the checkpoint") from None

    def shaped(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor called `name`; CheckpointError unless its shape is `shape`."""
        tensor = self[name]
        if tensor.shape != shape:
            raise CheckpointError(
                name, f"shape {tuple(tensor.shape)}, config.json asks for {shape}"
            )
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded checkpoint: its configuration and its tensors in one dtype."""

    config: ModelConfig
    weights: Weights


def load_checkpoint(
    folder: Path, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Checkpoint:
    """Read a checkpoint folder; every tensor comes back on the device in `dtype`."""
    config = load_config(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors.update((name, t.to(device, dtype)) for name, t in _load(file).items())
    if config.tied and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return Checkpoint(config, Weights(tensors))


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(file.name, f"not safetensors: {error}") from None
