"""SGLang's HiCache with our backend, in fresh processes: the tokens never change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from integrations.real.sglang.engine import Engine, EngineError, engine, hicache
from integrations.real.sglang.prompts import from_store, full_pages, prompts, tokens

from daemon import Daemon, daemon


@pytest.mark.parametrize("layout", ["page_first_direct", "layer_first"])
def test_a_fresh_process_loads_what_another_stored_and_its_tokens_are_the_same(
    model: Path, right: dict[int, Any], server: Daemon, tmp_path: Path, layout: str
) -> None:
    asked, config = prompts(1), hicache(server.target, layout=layout)
    with engine(tmp_path / "a", model_path=str(model), **config) as first:
        assert tokens(first, asked) == right[1]
        first.forget()  # returns when all is stored
    with engine(tmp_path / "b", model_path=str(model), **config) as second:
        answers = second.run(*asked)
        assert [answer.tokens for answer in answers] == right[1]
        assert sum(answer.stored for answer in answers) >= 0.9 * full_pages(asked)


def test_host_memory_may_be_a_mere_buffer_before_the_store(
    model: Path, right: dict[int, Any], server: Daemon, tmp_path: Path
) -> None:
    config = {**hicache(server.target), "hicache_host_memory_mode": "buffer_only"}
    with engine(tmp_path / "log", model_path=str(model), **config) as made:
        assert from_store(made, prompts(17), right[17]) == 0
        assert from_store(made, prompts(17), right[17]) >= 0.9 * full_pages(prompts(17))


def test_a_wrong_configuration_ends_the_start_and_says_what_to_change(
    model: Path, server: Daemon, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"ConfigurationError.*tagret: Extra inputs"):
        Engine(tmp_path / "log", model_path=str(model), **hicache(server.target, tagret="x"))


def test_calls_that_fail_or_take_long_change_no_token(
    model: Path, right: dict[int, Any], tmp_path: Path
) -> None:
    faults = {
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.1",
        "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.3",
    }
    with daemon(tmp_path, "--dram", "256MiB") as server:
        config = {"model_path": str(model), **hicache(server.target)}
        with engine(tmp_path / "log", env=faults, **config) as faulty:
            assert "test injector enabled" in faulty.log
            hits = [
                from_store(faulty, prompts(seed), right[seed])
                for _ in range(4)
                for seed in range(13, 17)
            ]
            assert any(hits)
            assert not all(hits)
            faulty.forget()
            faulty.begin(*prompts(13), *prompts(14))
            server.kill()  # with calls under way, which take their time
            assert [one.tokens for one in faulty.finish()] == right[13] + right[14]
            from_store(faulty, prompts(15), right[15])
