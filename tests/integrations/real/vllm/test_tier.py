"""vLLM's offloading connector with our tier, in real engines on a CPU: the tokens never change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integrations.models import save_llama
from integrations.real.vllm.engine import Engine, engine

from daemon import Daemon, daemon
from kvstore_client import KVStoreClient

BLOCK = 32
LENGTHS = (5 * BLOCK + 7, 8 * BLOCK + 1, 3 * BLOCK)


def prompts(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 512, length).tolist() for length in LENGTHS]


def full_blocks(prompt: list[int]) -> int:
    """Tokens that a cache can hold: whole blocks, less the last token, which is computed."""
    return (len(prompt) - 1) // BLOCK * BLOCK


def tier(target: str, **settings: Any) -> dict[str, Any]:
    """What a user writes, but for the stand-in of the copies that need a GPU."""
    return {
        "kv_transfer_config": {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {
                "spec_name": "CpuTieringSpec",
                "spec_module_path": "cpu_spec",
                "cpu_bytes_to_use": 64 << 20,
                "secondary_tiers": [
                    {
                        "type": "KVStoreTier",
                        "module_path": "kvstore_integrations.vllm.tier",
                        "target": target,
                        **settings,
                    }
                ],
            },
        }
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM without us, whose tokens are the right ones."""
    with engine(tmp_path_factory.mktemp("plain") / "log", model=str(model)) as made:
        yield made


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--dram", "256MiB") as running:
        yield running


def tokens(engine: Engine, *asked: list[int], **params: Any) -> list[list[int]]:
    return [answer.tokens for answer in engine.run(*asked, **params)]


def test_a_fresh_process_loads_what_another_stored_and_its_tokens_are_the_same(
    model: Path, plain: Engine, server: Daemon, tmp_path: Path
) -> None:
    asked = prompts(1)
    right = tokens(plain, *asked)
    with engine(tmp_path / "a", model=str(model), **tier(server.target)) as first:
        assert tokens(first, *asked) == right
        first.run(prompts(99)[0])  # one more step, in which what was stored is taken note of
    with KVStoreClient(server.target) as client:
        assert client.stats().blocks >= sum(map(full_blocks, asked)) // BLOCK
    with engine(tmp_path / "b", model=str(model), **tier(server.target)) as second:
        answers = second.run(*asked)
        assert [answer.tokens for answer in answers] == right
        cached = sum(answer.cached for answer in answers)
        assert cached >= 0.9 * sum(map(full_blocks, asked))
