"""How long a killed daemon takes to find a million blocks on NVMe: `python -m benchmarks.restart`.

Blocks are as small as they get, so that as many as are asked for fit on a test machine's disk. The
daemon is killed by SIGKILL, so its last segments have no footer and are verified block by block.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks import limits
from benchmarks.daemon import daemon
from kvstore import Hit, Layout
from kvstore.errors import KVStoreError
from kvstore_client import KVStoreClient

BLOCK_BYTES = 3840  # with its header one granule
CALL_BLOCKS = 8192
POOL_BYTES = 1 << 30
SAMPLE = 4096
_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Restart:
    """Seconds from the start of the process: until it serves, and until all blocks are found."""

    blocks: int
    found: int
    volume_bytes: int
    serves_s: float
    ready_s: float
    sampled: int


def measure(folder: Path, blocks: int) -> Restart:
    """Fills, kills, restarts, and reads a sample. `KVStoreError` where something is wrong."""
    layout = Layout.opaque(model="restart", block_bytes=BLOCK_BYTES, block_tokens=16)
    nbytes = blocks * 4096 * 5 // 4 // (1 << 20) * (1 << 20) + (64 << 20)
    rows = str(blocks + POOL_BYTES // 4096)
    flags = ("--no-grpc", "--nvme", f"{folder}:{nbytes}", "--nvme-scrub-rate", "0")
    limited = (*flags, "--max-blocks", rows)
    rng = np.random.default_rng(1)
    hashes = rng.integers(0, 256, (blocks, 32), np.uint8)
    with daemon(folder / "first", POOL_BYTES, *limited) as server:
        client = server.connect()
        namespace = client.open_namespace("restart", layout)
        _wait(client)
        stored = 0
        for first in range(0, blocks, CALL_BLOCKS):
            keys = hashes[first : first + CALL_BLOCKS]
            put = client.put(namespace, keys, _rows(keys), persist=True, timeout_s=_DEADLINE_S)
            stored += put.persisted
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        client.close()
    begin = time.monotonic()
    with daemon(folder / "second", POOL_BYTES, *limited) as server, server.connect() as client:
        serves_s = time.monotonic() - begin
        _wait(client)
        ready_s = time.monotonic() - begin
        found = client.stats().nvme_blocks
        if found != stored:
            raise KVStoreError(f"{found} blocks are found of {stored} that were persisted")
        namespace = client.open_namespace("restart", layout)
        sampled = 0
        for i in rng.choice(blocks, min(SAMPLE, blocks), replace=False).tolist():
            into = np.empty(BLOCK_BYTES, np.uint8)
            (result,) = client.get_into(namespace, hashes[i : i + 1], [into])
            if isinstance(result, Hit):
                if not np.array_equal(into, _rows(hashes[i : i + 1])[0]):
                    raise KVStoreError("a wrong byte")
                sampled += 1
    return Restart(blocks, found, nbytes, serves_s, ready_s, sampled)


def _rows(keys: np.ndarray) -> list[np.ndarray]:
    """What is stored under each key."""
    return list(np.tile(keys, (1, BLOCK_BYTES // keys.shape[1])))


def _wait(client: KVStoreClient) -> None:
    while not client.stats().nvme_ready:
        time.sleep(0.005)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path(".cache"), help="on the disk to use")
    parser.add_argument("--blocks", type=int, default=1_000_000)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    name = tempfile.mkdtemp(prefix="nvme-", dir=options.folder.resolve())
    try:
        result = measure(Path(name), options.blocks)
    finally:
        shutil.rmtree(name)
    if options.json:
        options.json.write_text(json.dumps(asdict(result), indent=1) + "\n")
    facts = ", ".join(f"{name} {value}" for name, value in limits.facts().items())
    print(f"Machine: {facts}.\n")
    print("| blocks put and persisted | found | volume | serves after | all found after | sample |")
    print("|---|---|---|---|---|---|")
    print(
        f"| {result.blocks:,} | {result.found:,} | {result.volume_bytes / (1 << 30):.1f} GiB |"
        f" {result.serves_s:.2f} s | {result.ready_s:.2f} s | {result.sampled:,} read, all right |"
    )


if __name__ == "__main__":
    main()
