"""What the daemon takes beside its pool, by blocks stored: `python -m benchmarks.memory`.

Stores small blocks in a daemon of its own and reads its resident memory from /proc; the pool's own
share is the bytes of the slots in use, each of which has been touched.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.processes import server
from kvstore import Layout, limits
from kvstore_client import KVStoreClient

BATCH = 2000
BLOCK_BYTES = 512


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, shared memory included."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert found
    return int(found[1]) << 10


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, default=1_000_000)
    blocks = parser.parse_args().blocks
    layout = Layout.opaque(model="memory", block_bytes=BLOCK_BYTES, block_tokens=16)
    rng, block = np.random.default_rng(0), np.zeros(BLOCK_BYTES, np.uint8)
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as name:
        folder = Path(name)
        socket, config = folder / "kvstore.sock", folder / "server.toml"
        config.touch()
        dram = blocks * limits.GRANULE_BYTES + (64 << 20)
        command: list[str | Path] = [Path(sys.prefix) / "bin/kvstore-server", "--no-grpc"]
        command += ["--config", config, "--socket", socket]
        command += ["--data-dir", folder / "data", "--dram", str(dram), "--no-prefault"]
        with (
            server(command, log=folder / "log") as daemon,
            KVStoreClient(f"unix://{socket}", timeout_s=60.0, lazy=True) as client,
        ):
            namespace = client.open_namespace("memory", layout)
            for at in range(0, blocks, BATCH):
                hashes = rng.integers(0, 256, (min(BATCH, blocks - at), 32), np.uint8)
                client.put(namespace, hashes, [block] * len(hashes))
            stats = client.stats()
            beside = resident_bytes(daemon.pid) - stats.used_bytes
            print(f"{stats.blocks:,} blocks: {beside / 1e6:.0f} MB beside the pool")


if __name__ == "__main__":
    main()
