"""Calls that vLLM 0.32 made of our tier in a real run, made again of its core."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from integrations.recorded import replay

from daemon import Daemon, daemon
from kvstore_client import KVStoreClient
from kvstore_integrations.identity import Identity
from kvstore_integrations.spaces import Spaces
from kvstore_integrations.vllm.chunks import ChunkCache, Group

HERE = Path(__file__).parent
STORES = (HERE / "recorded_vllm_tier_stores.jsonl").read_text().splitlines()
LOADS = (HERE / "recorded_vllm_tier_loads.jsonl").read_text().splitlines()
ROWS, BYTES, TOKENS = 1024, 4096, 32


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--dram", "32MiB") as running:
        yield running


class Process:
    """One engine's process, with host memory of random bytes."""

    def __init__(self, server: Daemon, seed: int) -> None:
        self.client = KVStoreClient(server.target)
        rng = np.random.default_rng(seed)
        self.rows = rng.integers(0, 256, (ROWS, BYTES), np.uint8)
        spaces = Spaces(
            self.client, Identity("test", "m@1", {}), block_bytes=BYTES, block_tokens=TOKENS
        )
        spaces.open_now("default")
        groups = {0: Group(spaces, TOKENS)}
        self.cache = ChunkCache(self.client, groups, self.rows, most_stores=8)

    def close(self) -> None:
        self.cache.close()
        self.client.close()


def test_a_second_process_is_answered_as_then_and_gets_the_firsts_bytes(server: Daemon) -> None:
    first, second = Process(server, 1), Process(server, 2)
    stored = replay(STORES, first.cache)
    assert stored.differ == []
    assert stored.failed == 0
    assert stored.stored
    loaded = replay(LOADS, second.cache)
    assert loaded.differ == []
    assert loaded.failed == 0
    assert loaded.hits > 0
    assert set(loaded.loaded) <= set(stored.stored)
    for key, row in loaded.loaded.items():
        assert np.array_equal(second.rows[row], first.rows[stored.stored[key]])
    first.close()
    second.close()


def test_without_the_firsts_blocks_every_answer_is_a_miss(server: Daemon) -> None:
    process = Process(server, 1)
    answers = replay([line for line in LOADS if not line.startswith('["store"')], process.cache)
    assert answers.hits == 0
    assert answers.failed == sum(line.startswith('["load"') for line in LOADS)
    process.close()
