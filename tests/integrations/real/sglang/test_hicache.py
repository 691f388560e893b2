"""SGLang's HiCache with our backend, in an engine on a CPU: the tokens never change."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integrations.pool import one_bit_off, spoil, zeros
from integrations.real.sglang.engine import Engine, backend, hicache
from integrations.real.sglang.prompts import from_store, full_pages, prompts, tokens

from daemon import Daemon, daemon
from kvstore_client import KVStoreClient


@pytest.fixture(scope="module")
def made(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """An engine that tests attach to stores of their own; as fresh then as a new one."""
    folder = tmp_path_factory.mktemp("made")
    with daemon(folder, "--dram", "64MiB") as server:
        made = Engine(folder / "log", model_path=str(model), **hicache(server.target))
    yield made
    made.close()


def test_what_is_loaded_is_what_the_tokens_are_made_of(
    made: Engine, right: dict[int, Any], server: Daemon
) -> None:
    asked = prompts(2)
    assert made.attach(backend(server.target, verify_reads=False)) == ""
    assert tokens(made, asked) == right[2]
    made.forget()
    assert spoil(server, zeros) > 0
    answers = made.run(*asked)
    assert sum(answer.stored for answer in answers) >= 0.9 * full_pages(asked)
    assert [answer.tokens for answer in answers] != right[2]


def test_corrupted_pages_are_computed_again(
    made: Engine, right: dict[int, Any], server: Daemon
) -> None:
    asked = prompts(3)
    assert made.attach(backend(server.target)) == ""
    assert from_store(made, asked, right[3]) == 0
    made.forget()
    assert spoil(server, one_bit_off) > 0
    assert from_store(made, asked, right[3]) == 0
    assert "fail their checksum" in made.log


def test_tenants_and_revisions_share_nothing(
    made: Engine, right: dict[int, Any], server: Daemon
) -> None:
    asked = prompts(4)
    for stored, settings in [
        (False, {"tenant": "a"}),
        (False, {"tenant": "b"}),
        (False, {"tenant": "a", "model_revision": "2"}),
        (True, {"tenant": "a"}),
    ]:
        assert made.attach(backend(server.target, **settings)) == ""
        assert (from_store(made, asked, right[4]) > 0) == stored


def test_clearing_the_storage_backend_forgets_its_pages_and_no_others(
    made: Engine, right: dict[int, Any], server: Daemon
) -> None:
    asked = prompts(5)
    for tenant in ("a", "b"):
        assert made.attach(backend(server.target, tenant=tenant)) == ""
        assert from_store(made, asked, right[5]) == 0
    made.forget()
    assert made.clear()
    assert from_store(made, asked, right[5]) == 0
    assert made.attach(backend(server.target, tenant="a")) == ""
    assert from_store(made, asked, right[5]) >= 0.9 * full_pages(asked)


def test_the_daemons_death_changes_no_token_and_a_new_one_is_used_again(
    made: Engine, right: dict[int, Any], tmp_path: Path
) -> None:
    asked, more = prompts(6), prompts(7)
    with daemon(tmp_path, "--dram", "256MiB") as server:
        assert made.attach(backend(server.target)) == ""
        assert from_store(made, asked, right[6]) == 0
        made.begin(*more)
        server.kill()  # before, while, or after they are stored
        assert [answer.tokens for answer in made.finish()] == right[7]
    while from_store(made, asked, right[6]):  # until its end is noticed
        pass
    with daemon(tmp_path, "--dram", "256MiB") as server:
        with KVStoreClient(server.target) as client:
            while not client.stats().blocks:  # it is reached in the background
                assert from_store(made, asked, right[6]) == 0
        made.forget()
        assert from_store(made, asked, right[6]) > 0
        made.forget()
        made.begin(*asked, *more)
        server.kill()  # before, while, or after they are loaded
        assert [answer.tokens for answer in made.finish()] == right[6] + right[7]


def test_an_engine_begins_without_a_store_where_none_is_required(
    made: Engine, right: dict[int, Any], tmp_path: Path
) -> None:
    asked = prompts(8)
    assert made.attach(backend(f"unix://{tmp_path}/kvstore.sock", required=False)) == ""
    assert from_store(made, asked, right[8]) == 0
    with daemon(tmp_path, "--dram", "256MiB") as server:
        with KVStoreClient(server.target) as client:
            while not client.stats().blocks:  # it is reached in the background
                assert from_store(made, asked, right[8]) == 0
        assert from_store(made, asked, right[8]) > 0


def test_a_full_pool_costs_hits_and_no_token(
    made: Engine, right: dict[int, Any], tmp_path: Path
) -> None:
    with daemon(tmp_path, "--dram", "3MiB") as server:
        assert made.attach(backend(server.target)) == ""
        for _ in range(2):
            for seed in range(9, 13):
                from_store(made, prompts(seed), right[seed])
        made.forget()
        with KVStoreClient(server.target) as client:
            assert client.stats().evicted > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tagret": "x"}, "extra-config: tagret: Extra inputs are not permitted"),
        ({"tenant": "a/b"}, "tenant: "),
        ({"interface_v1": 0}, 'add "interface_v1": 1'),
        ({"target": "unix:///nowhere/kvstore.sock", "timeout_s": 0.3}, "no store answers at unix"),
    ],
)
def test_a_wrong_configuration_is_refused_and_says_what_to_change(
    made: Engine, server: Daemon, settings: dict[str, Any], message: str
) -> None:
    assert message in made.attach(backend(**{"target": server.target, **settings}))
