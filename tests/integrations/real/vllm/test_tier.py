"""vLLM's offloading connector with our tier, in real engines on a CPU: the tokens never change."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integrations.models import save_llama
from integrations.pool import one_bit_off, spoil, zeros
from integrations.real.vllm.engine import Engine, EngineError, engine

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


@pytest.fixture
def stored(
    model: Path, plain: Engine, server: Daemon, tmp_path: Path
) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts that an engine has stored, and the right tokens."""
    asked = prompts(2)
    with engine(tmp_path / "storing", model=str(model), **tier(server.target)) as first:
        first.run(*asked)
        first.run(prompts(99)[0])
    return asked, tokens(plain, *asked)


Stored = tuple[list[list[int]], list[list[int]]]


def test_what_is_loaded_is_what_the_tokens_are_made_of(
    model: Path, server: Daemon, stored: Stored, tmp_path: Path
) -> None:
    asked, right = stored
    assert spoil(server, zeros) > 0
    with engine(
        tmp_path / "log", model=str(model), **tier(server.target, verify_reads=False)
    ) as second:
        answers = second.run(*asked)
        assert all(answer.cached for answer in answers)
        assert [answer.tokens for answer in answers] != right


def test_corrupted_blocks_are_computed_again(
    model: Path, server: Daemon, stored: Stored, tmp_path: Path
) -> None:
    asked, right = stored
    assert spoil(server, one_bit_off) > 0
    with engine(tmp_path / "log", model=str(model), **tier(server.target)) as second:
        answers = second.run(*asked)
        assert [answer.tokens for answer in answers] == right
        assert sum(answer.cached for answer in answers) == 0


def test_tenants_share_nothing_and_a_wrong_tenant_gets_nothing(
    model: Path, server: Daemon, stored: Stored, tmp_path: Path
) -> None:
    asked, right = stored
    for tenant in ("other", "no/tenant"):
        # A fresh engine each: vLLM's own caches tell tenants apart by their salt alone.
        with engine(tmp_path / "log", model=str(model), **tier(server.target)) as second:
            answers = second.run(*asked, tenant=tenant)
            assert [answer.tokens for answer in answers] == right
            assert sum(answer.cached for answer in answers) == 0
    assert "a request is not cached" in (tmp_path / "log").read_text()


def test_another_revision_of_the_weights_or_another_dtype_hits_nothing(
    server: Daemon, stored: Stored, tmp_path: Path
) -> None:
    asked, _ = stored
    other = save_llama(tmp_path / "model", seed=1)
    with engine(tmp_path / "weights", model=str(other), **tier(server.target)) as made:
        assert sum(answer.cached for answer in made.run(*asked)) == 0
    same = save_llama(tmp_path / "same")
    with engine(
        tmp_path / "dtype", model=str(same), dtype="bfloat16", **tier(server.target)
    ) as made:
        assert sum(answer.cached for answer in made.run(*asked)) == 0


def test_the_daemons_death_before_during_and_after_a_load_changes_no_token(
    model: Path, plain: Engine, tmp_path: Path
) -> None:
    asked, more = prompts(3), prompts(4)
    right, right_more = tokens(plain, *asked), tokens(plain, *more)
    config = tier(f"unix://{tmp_path}/kvstore.sock")
    with daemon(tmp_path, "--dram", "256MiB") as server:
        made = Engine(tmp_path / "log", model=str(model), **config)
        assert tokens(made, *asked) == right
        server.kill()  # with stores under way
    assert tokens(made, *more) == right_more
    assert "lost the store" in made.log
    with daemon(tmp_path, "--dram", "256MiB") as server:
        with KVStoreClient(server.target) as client:
            end = time.monotonic() + 60.0  # until the engine has found the new daemon
            while not client.stats().blocks:
                assert time.monotonic() < end
                assert tokens(made, *asked, *more) == right + right_more
        with engine(tmp_path / "second", model=str(model), **config) as second:
            second.begin(*asked, *more)
            server.kill()  # before, while, or after they are loaded
            assert [answer.tokens for answer in second.finish()] == right + right_more
            assert tokens(second, *more) == right_more
    made.close()


def test_a_full_pool_costs_hits_and_no_token(model: Path, plain: Engine, tmp_path: Path) -> None:
    rounds = [prompts(seed) for seed in range(10, 16)]
    with daemon(tmp_path, "--dram", "2MiB") as server:
        with engine(tmp_path / "log", model=str(model), **tier(server.target)) as made:
            for _ in range(2):
                for asked in rounds:
                    assert tokens(made, *asked) == tokens(plain, *asked)
        with KVStoreClient(server.target) as client:
            assert client.stats().evicted > 0


def test_preempted_requests_keep_their_tokens(
    model: Path, plain: Engine, server: Daemon, tmp_path: Path
) -> None:
    rng = np.random.default_rng(5)
    asked = [rng.integers(0, 512, 4 * BLOCK + 3).tolist() for _ in range(4)]
    right = [answer.tokens for answer in plain.run(*asked, tokens=100)]
    config = {**tier(server.target), "num_gpu_blocks_override": 20, "max_model_len": 512}
    with engine(tmp_path / "log", model=str(model), disable_log_stats=False, **config) as made:
        for _ in range(2):
            assert [answer.tokens for answer in made.run(*asked, tokens=100)] == right
        assert made.metrics()["vllm:num_preemptions"] > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tagret": "x"}, "secondary tier KVStoreTier: tagret"),
        ({"target": "unix:///nowhere/kvstore.sock", "timeout_s": 0.3}, "no store answers at unix"),
        ({"tenant": "a/b"}, "tenant: "),
    ],
)
def test_a_wrong_configuration_fails_at_start_and_says_what_to_change(
    model: Path, server: Daemon, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(EngineError, match="ConfigurationError") as caught:
        Engine(tmp_path / "log", model=str(model), **tier(**{"target": server.target, **settings}))
    assert message in str(caught.value)


def test_the_calls_recorded_for_tests_without_vllm_are_those_it_makes(
    model: Path, server: Daemon, tmp_path: Path
) -> None:
    """With RECORD=tests/integrations they are kept there."""
    folder = Path(os.environ.get("RECORD", tmp_path))
    files = [folder / f"recorded_vllm_tier_{name}.jsonl" for name in ("stores", "loads")]
    for file in files:
        config = tier(server.target, record=str(file))
        (entry,) = config["kv_transfer_config"]["kv_connector_extra_config"]["secondary_tiers"]
        entry.update(type="RecordingTier", module_path="recording")
        with engine(tmp_path / "log", model=str(model), **config) as made:
            made.run(*prompts(6), tokens=40)
            made.run(prompts(7)[0])
    calls = [json.loads(line) for line in files[1].read_text().splitlines()]
    kinds = {call[0] for call in calls}
    assert kinds == {"new", "keys", "look_up", "load", "store", "finished", "end", "step"}
    assert [call for call in calls if call[0] == "look_up" and call[-1] == "HIT"]
