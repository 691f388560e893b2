"""Which files hold a checkpoint's weights, and a cheap fingerprint of them. Loads no tensor."""

import hashlib
from pathlib import Path

from kvstore_engines.fields import CheckpointError, read_json, required

SAMPLE_BYTES = 4096
SAMPLES = 16


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
