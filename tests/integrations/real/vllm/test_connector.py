"""Our connector in real vLLM engines on a CPU: hits where they should be, never another token."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integrations.models import save_llama
from integrations.pool import one_bit_off, spoil, zeros
from integrations.real.vllm.engine import Answer, Engine, EngineError, engine

from daemon import Daemon, daemon
from kvstore_client import KVStoreClient

BLOCK = 32
LENGTHS = (5 * BLOCK + 7, 8 * BLOCK + 1, 3 * BLOCK)
RECORDED = Path(__file__).parents[2] / "vllm_connector_calls.jsonl"
MODULE = "kvstore_integrations.vllm.connector"


def prompts(seed: int, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 512, length).tolist() for length in lengths]


def save_windowed(folder: Path) -> Path:
    """The same model, but every other layer sees two blocks only."""
    file = save_llama(folder) / "config.json"
    config = json.loads(file.read_text())
    config["sliding_window"] = 2 * BLOCK
    config["layer_types"] = ["sliding_attention", "full_attention"] * 2
    file.write_text(json.dumps(config))
    return folder


def full_blocks(asked: list[list[int]]) -> int:
    """Tokens that a cache can hold: whole blocks, less the last token, which is computed."""
    return sum((len(prompt) - 1) // BLOCK * BLOCK for prompt in asked)


def connector(target: str, *, name: str = "KVStoreConnector", module: str = MODULE, **extra: Any):
    """What a user writes."""
    return {
        "kv_transfer_config": {
            "kv_connector": name,
            "kv_connector_module_path": module,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"target": target, **extra},
        },
        "disable_log_stats": False,
    }


class Home:
    """One engine with our connector, and one daemon after another at the same socket."""

    def __init__(self, folder: Path, model: Path, **arguments: Any) -> None:
        self.folder, self.model, self.arguments = folder, model, arguments
        self.target = f"unix://{folder}/kvstore.sock"
        self.engine: Engine | None = None
        self._seed = 1000

    @contextlib.contextmanager
    def serve(self, *flags: str) -> Iterator[tuple[Daemon, Engine]]:
        """A daemon, and the engine once it has found it."""
        with daemon(self.folder, *(flags or ("--dram", "256MiB"))) as server:
            if self.engine is None:
                config = {**connector(self.target), **self.arguments}
                self.engine = Engine(self.folder / "log", model=str(self.model), **config)
            self._wait(self.engine)
            yield server, self.engine

    def _wait(self, made: Engine) -> None:
        for _ in range(1000):
            self._seed += 1
            probe = prompts(self._seed, (2 * BLOCK,))
            made.run(*probe)
            if made.run(*probe)[0].cached:
                return
        raise AssertionError("the engine does not find the store")

    def close(self) -> None:
        if self.engine:
            self.engine.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """vLLM without us, whose tokens are the right ones."""
    with engine(tmp_path_factory.mktemp("plain") / "log", model=str(model)) as made:
        yield made


@pytest.fixture(scope="module")
def home(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    made = Home(tmp_path_factory.mktemp("home"), model)
    yield made
    made.close()


def tokens(answers: list[Answer]) -> list[list[int]]:
    return [answer.tokens for answer in answers]


def cached(answers: list[Answer]) -> int:
    return sum(answer.cached for answer in answers)


def settled(made: Engine) -> None:
    """One more step, in which the engine takes note of what was copied."""
    made.run(prompts(99)[2][:BLOCK])


def test_a_fresh_process_loads_what_another_saved_and_its_tokens_are_the_same(
    plain: Engine, home: Home, tmp_path: Path
) -> None:
    asked = prompts(1)
    right = tokens(plain.run(*asked, tokens=40))
    with home.serve() as (server, first):
        assert tokens(first.run(*asked, tokens=40)) == right
        settled(first)
        config = connector(server.target)
        with engine(tmp_path / "log", model=str(home.model), **config) as second:
            answers = second.run(*asked, tokens=40)
            assert tokens(answers) == right
            assert cached(answers) >= 0.9 * full_blocks(asked)
            # What was generated is there too: a next turn finds it.
            turns = [prompt + answer for prompt, answer in zip(asked, right, strict=True)]
            again = second.run(*turns)
            assert cached(again) == full_blocks(turns)
            assert tokens(again) == tokens(plain.run(*turns))
            settled(second)
            metrics = second.metrics()
            assert metrics["vllm:kvstore_loaded_blocks"] == (cached(answers + again)) // BLOCK
            assert metrics["vllm:kvstore_loaded_bytes"] > 0
            assert metrics["vllm:external_prefix_cache_hits"] == cached(answers + again)
        assert first.metrics()["vllm:kvstore_saved_blocks"] > full_blocks(asked) // BLOCK


def test_what_a_process_saved_last_is_there_when_it_has_ended(
    plain: Engine, home: Home, tmp_path: Path
) -> None:
    asked = prompts(2)
    with home.serve() as (server, second):
        with engine(tmp_path / "log", model=str(home.model), **connector(server.target)) as first:
            first.run(*asked)
        answers = second.run(*asked)
        assert cached(answers) == full_blocks(asked)
        assert tokens(answers) == tokens(plain.run(*asked))


def test_what_is_loaded_is_what_the_tokens_are_made_of(
    plain: Engine, home: Home, tmp_path: Path
) -> None:
    asked = prompts(3)
    with home.serve() as (server, first):
        first.run(*asked)
        settled(first)
        assert spoil(server, zeros) > 0
        config = connector(server.target, verify_reads=False)
        with engine(tmp_path / "log", model=str(home.model), **config) as second:
            answers = second.run(*asked)
            assert cached(answers) == full_blocks(asked)
            assert tokens(answers) != tokens(plain.run(*asked))


def test_corrupted_blocks_are_computed_again_and_stored_again(plain: Engine, home: Home) -> None:
    asked = prompts(4)
    right = tokens(plain.run(*asked))
    with home.serve() as (server, made):
        made.run(*asked)
        settled(made)
        before = made.metrics()["vllm:kvstore_lost_blocks"]
        assert spoil(server, one_bit_off) > 0
        assert tokens(made.run(*asked)) == right
        settled(made)
        assert made.metrics()["vllm:kvstore_lost_blocks"] - before == full_blocks(asked) // BLOCK
        assert "a block in the store is corrupted" in made.log
        answers = made.run(*asked)
        assert tokens(answers) == right
        assert cached(answers) == full_blocks(asked)


def test_tenants_share_nothing_and_a_wrong_tenant_gets_nothing(plain: Engine, home: Home) -> None:
    asked = prompts(5)
    right = tokens(plain.run(*asked))
    with home.serve() as (_, made):
        made.run(*asked)
        settled(made)
        for tenant, second in (("other", full_blocks(asked)), ("no/tenant", 0)):
            answers = made.run(*asked, tenant=tenant)
            assert tokens(answers) == right
            assert cached(answers) == 0
            settled(made)
            answers = made.run(*asked, tenant=tenant)
            assert tokens(answers) == right
            assert cached(answers) == second
        assert "a request is not cached" in made.log


def test_another_revision_of_the_weights_or_another_dtype_hits_nothing(
    home: Home, tmp_path: Path
) -> None:
    asked = prompts(6)
    with home.serve() as (server, made):
        made.run(*asked)
        settled(made)
        assert cached(made.run(*asked)) == full_blocks(asked)
        others = (
            (save_llama(tmp_path / "other", seed=1), {}),
            (home.model, {"dtype": "bfloat16"}),
        )
        for folder, more in others:
            config = {"model": str(folder), **connector(server.target), **more}
            with engine(tmp_path / "log", **config) as second:
                assert cached(second.run(*asked)) == 0


def test_the_daemons_death_before_during_and_after_a_load_changes_no_token(
    plain: Engine, home: Home
) -> None:
    asked, more = prompts(7, (600, 900, 700)), prompts(8)
    right, right_more = tokens(plain.run(*asked)), tokens(plain.run(*more))
    for _ in range(3):
        with home.serve() as (server, made):
            assert tokens(made.run(*asked)) == right
            made.begin(*asked, *more)
            server.kill()  # while they are loaded, or before, and while others are saved
            assert tokens(made.finish()) == right + right_more
            assert tokens(made.run(*more)) == right_more
    with home.serve() as (_, made):
        for _ in range(2):
            answers = made.run(*asked, *more)
            assert tokens(answers) == right + right_more
        assert cached(answers) == full_blocks(asked + more)


def test_a_full_pool_costs_hits_and_no_token(plain: Engine, home: Home) -> None:
    rounds = [prompts(seed) for seed in range(10, 16)]
    right = [tokens(plain.run(*asked)) for asked in rounds]
    with home.serve("--dram", "2MiB") as (server, made):
        for _ in range(2):
            assert [tokens(made.run(*asked)) for asked in rounds] == right
        with KVStoreClient(server.target) as client:
            assert client.stats().evicted > 0


@pytest.mark.parametrize("own_cache", [False, True], ids=["alone", "beside vLLM's own cache"])
def test_preempted_requests_keep_their_tokens(
    model: Path, plain: Engine, tmp_path: Path, own_cache: bool
) -> None:
    asked = prompts(9, (4 * BLOCK + 3,) * 4)
    right = tokens(plain.run(*asked, tokens=100))
    small = {"num_gpu_blocks_override": 20, "max_model_len": 512}
    made = Home(tmp_path, model, enable_prefix_caching=own_cache, **small)
    try:
        with made.serve() as (_, one):
            for _ in range(3):
                assert tokens(one.run(*asked, tokens=100)) == right
            metrics = one.metrics()
            assert metrics["vllm:num_preemptions"] > 0
            assert metrics["vllm:kvstore_loaded_blocks"] > 0
    finally:
        made.close()


def test_a_model_with_windows_has_two_cache_groups(plain: Engine, tmp_path: Path) -> None:
    model = save_windowed(tmp_path / "model")
    asked = prompts(20)
    with engine(tmp_path / "plain", model=str(model)) as one:
        right = tokens(one.run(*asked, tokens=40))
        assert right != tokens(plain.run(*asked, tokens=40))
    made = Home(tmp_path, model, num_gpu_blocks_override=60, max_model_len=512)
    try:
        with made.serve() as (server, one):
            assert tokens(one.run(*asked, tokens=40)) == right
            for seed in (21, 22, 23):  # else the blocks that are loaded into hold the same already
                one.run(*prompts(seed))
            answers = one.run(*asked, tokens=40)
            assert tokens(answers) == right
            assert cached(answers) == full_blocks(asked)
            settled(one)
            assert spoil(server, one_bit_off) > 0
            assert tokens(one.run(*asked, tokens=40)) == right
            assert one.metrics()["vllm:kvstore_lost_blocks"] > 0
            for _ in range(2):  # one for each group's corrupted blocks
                assert tokens(one.run(*asked, tokens=40)) == right
                settled(one)
            assert cached(one.run(*asked)) == full_blocks(asked)
            settled(one)
            assert spoil(server, zeros) > 0
            assert tokens(one.run(*asked, tokens=40)) == right
    finally:
        made.close()


def test_calls_are_as_they_were_recorded(
    model: Path, plain: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what is replayed without vLLM is not what vLLM does: see `connector_recorder.py`.

    With KEEP=1 the recording becomes the one that is replayed.
    """
    asked = prompts(30, (4 * BLOCK + 3, 4 * BLOCK + 3, 2 * BLOCK, 3 * BLOCK + 20))
    asked[2][:BLOCK] = asked[0][:BLOCK]
    right = tokens(plain.run(*asked, tokens=70))
    monkeypatch.setenv("RECORD", str(tmp_path / "calls"))
    with daemon(tmp_path, "--dram", "256MiB") as server:
        config = connector(server.target, name="RecordingConnector", module="connector_recorder")
        small = {"num_gpu_blocks_override": 16, "max_model_len": 256}
        with engine(tmp_path / "log", model=str(model), **config, **small) as made:
            for _ in range(2):
                assert tokens(made.run(*asked, tokens=70)) == right
            assert spoil(server, one_bit_off) > 0
            assert tokens(made.run(*asked[:2], tokens=4)) == [one[:4] for one in right[:2]]
            assert made.metrics()["vllm:num_preemptions"] > 0
    calls = (tmp_path / "calls").read_text()
    if os.environ.get("KEEP"):
        RECORDED.write_text(calls)
    assert calls == RECORDED.read_text()


def test_a_start_that_cannot_work_ends_with_what_to_change(model: Path, home: Home) -> None:
    with home.serve() as (server, _):
        config = connector(server.target)
        del config["kv_transfer_config"]["kv_load_failure_policy"]
        with pytest.raises(EngineError, match=r'ConfigurationError: set "kv_load_failure_policy"'):
            Engine(home.folder / "failed", model=str(model), **config)
