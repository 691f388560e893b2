"""A pool larger than half of the memory: a dead daemon's must go before the next one can fill."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from daemon import daemon
from kvstore import Hit, Layout
from kvstore.host import read_host
from kvstore_client import KVStoreClient

BLOCK_BYTES = 32 << 20
WAIT_S = 120.0


def fill(client: KVStoreClient, n: int, seed: int) -> np.ndarray:
    """Puts n large blocks, one a call, whose bytes tell their number; returns their hashes."""
    layout = Layout.opaque(model="large", block_bytes=BLOCK_BYTES, block_tokens=16)
    namespace = client.open_namespace("large", layout)
    hashes = np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)
    block = np.empty(BLOCK_BYTES, np.uint8)
    for i in range(n):
        block[:] = i % 251
        assert client.put(namespace, hashes[i : i + 1], [block]).stored == 1
    return hashes


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_restart_needs_no_more_memory_than_one_pool(tmp_path: Path) -> None:
    room = read_host().room
    assert room
    pool_bytes = int(room.nbytes * 0.55)
    flags = ("--dram", str(pool_bytes), "--no-prefault")
    n = int(pool_bytes * 0.9) // BLOCK_BYTES
    with daemon(tmp_path, *flags) as running:
        client = KVStoreClient(running.target)
        hashes = fill(client, n, seed=1)
        running.kill()
    with client:
        deadline = time.monotonic() + WAIT_S
        while read_host().room.nbytes < pool_bytes:  # type: ignore[union-attr]
            assert time.monotonic() < deadline, "the dead daemon's pool is still held"
        with daemon(tmp_path, *flags):
            assert client.stats(timeout_s=WAIT_S).blocks == 0
            hashes = fill(client, n, seed=2)
            namespace = client.open_namespace(
                "large", Layout.opaque(model="large", block_bytes=BLOCK_BYTES, block_tokens=16)
            )
            got = np.zeros(BLOCK_BYTES, np.uint8)
            assert client.get_into(namespace, hashes[-1:], [got]) == [Hit("dram")]
            assert (got == (n - 1) % 251).all()
