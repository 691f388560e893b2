"""Hugging Face checkpoint folders: tensors, in one file or in shards, and a cheap fingerprint."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kvstore_engines.config import ModelConfig, load_config
from kvstore_engines.fields import CheckpointError, read_json, required

SAMPLE_BYTES = 4096
SAMPLES = 16


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


def load_checkpoint(folder: Path, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """Read a checkpoint folder; every tensor comes back on the CPU in `dtype`."""
    config = load_config(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors.update((name, t.to(dtype)) for name, t in _load(file).items())
    if config.tied and "model.embed_tokens.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return Checkpoint(config, Weights(tensors))


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(file.name, f"not safetensors: {error}") from None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files, from the shard index where there is one."""
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise CheckpointError("*.safetensors", "no weights in the checkpoint folder")
        return files
    shards = sorted(set(required(read_json(index), "weight_map").values()))
    for shard in shards:
        # A name with a folder in it could point at any file of the user's.
        if Path(shard).name != shard:
            raise CheckpointError(shard, "shard named by the index is not a file name")
        if not (folder / shard).is_file():
            raise CheckpointError(shard, "shard named by the index is missing")
    return [folder / shard for shard in shards]


def fingerprint(folder: Path) -> str:
    """A cheap identity of the model: config, tensor headers, sizes and sampled weight bytes.

    It tells checkpoints apart without reading gigabytes; it is no proof against a forger.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update((folder / "config.json").read_bytes())
    for file in weight_files(folder):
        size = file.stat().st_size
        digest.update(f"\0{file.name}\0{size}\0".encode())
        with file.open("rb") as stream:
            prefix = stream.read(8)
            header = int.from_bytes(prefix, "little")
            digest.update(prefix + stream.read(header))
            for i in range(SAMPLES):
                stream.seek(8 + header + (size - 8 - header) * i // SAMPLES)
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()
