"""vLLM with LMCache on our store, in real engines on a CPU: the tokens never change."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integrations.lmcache_rig import wait_until
from integrations.models import save_llama
from integrations.pool import one_bit_off, spoil, zeros
from integrations.real.vllm.engine import Engine, engine

from daemon import Daemon, daemon
from kvstore_client import KVStoreClient

CHUNK = 64
LENGTHS = (3 * CHUNK + 8, 4 * CHUNK + 44, 2 * CHUNK)
_START_S = 120.0


def prompts(seed: int) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 512, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def right(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """The tokens of vLLM without us."""
    with engine(tmp_path_factory.mktemp("plain") / "log", model=str(model)) as made:
        return tokens(made, prompts(1))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--dram", "256MiB") as running:
        yield running


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the engines and of LMCache's server."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    monkeypatch.setenv("LMCACHE_TRACK_USAGE", "false")
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(tmp_path / "lmcache.yaml"))


def tokens(made: Engine, asked: list[list[int]]) -> list[list[int]]:
    return [answer.tokens for answer in made.run(*asked)]


def chunks(asked: list[list[int]]) -> int:
    return sum(len(prompt) // CHUNK for prompt in asked)


def wait_for_blocks(target: str, n: int) -> None:
    with KVStoreClient(target) as client:
        wait_until(lambda: client.stats().blocks >= n)


# -- LMCache in the engine's process, the store as its remote storage ------------------

IN_PROCESS: dict[str, Any] = {
    "kv_transfer_config": {
        "kv_connector": "LMCacheOnCpu",
        "kv_connector_module_path": "cpu_connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
    }
}


def configure(folder: Path, target: str, **settings: Any) -> None:
    """What a user writes into LMCache's configuration file."""
    plugin = "remote_storage_plugin.kvstore"
    own = "".join(f"  {plugin}.{name}: {json.dumps(one)}\n" for name, one in settings.items())
    (folder / "lmcache.yaml").write_text(
        f"chunk_size: {CHUNK}\n"
        "local_cpu: false\n"
        "max_local_cpu_size: 0.25\n"
        "pre_caching_hash_algorithm: sha256_cbor\n"
        'remote_storage_plugins: ["kvstore"]\n'
        "extra_config:\n"
        f"  {plugin}.module_path: kvstore_integrations.lmcache.remote\n"
        f"  {plugin}.class_name: KVStoreConnectorAdapter\n"
        f"  {plugin}.target: {target}\n" + own
    )


@pytest.fixture
def stored(model: Path, server: Daemon, tmp_path: Path, right: list[list[int]]) -> None:
    """An engine has stored the prompts."""
    configure(tmp_path, server.target)
    with engine(tmp_path / "storing", model=str(model), **IN_PROCESS) as first:
        answers = first.run(*prompts(1))
        assert [answer.tokens for answer in answers] == right
        assert sum(answer.cached for answer in answers) == 0
        wait_for_blocks(server.target, chunks(prompts(1)))


@pytest.mark.usefixtures("stored")
def test_another_engine_hits_what_one_stored_and_other_weights_hit_nothing(
    model: Path, tmp_path: Path, right: list[list[int]]
) -> None:
    with engine(tmp_path / "same", model=str(model), **IN_PROCESS) as second:
        answers = second.run(*prompts(1))
        assert [answer.tokens for answer in answers] == right
        assert [answer.cached for answer in answers] == [3 * CHUNK, 4 * CHUNK, 2 * CHUNK - 1]
    other = save_llama(tmp_path / "model", seed=1)
    with engine(tmp_path / "other", model=str(other), **IN_PROCESS) as third:
        assert sum(answer.cached for answer in third.run(*prompts(1))) == 0


@pytest.mark.usefixtures("stored")
def test_corrupted_chunks_are_computed_again_unless_nobody_verifies_them(
    model: Path, server: Daemon, tmp_path: Path, right: list[list[int]]
) -> None:
    assert spoil(server, one_bit_off) > 0
    with engine(tmp_path / "verified", model=str(model), **IN_PROCESS) as second:
        assert tokens(second, prompts(1)) == right
        wait_for_blocks(server.target, chunks(prompts(1)))  # what was wrong has been replaced
    assert spoil(server, zeros) > 0
    configure(tmp_path, server.target, verify_reads=False)
    with engine(tmp_path / "believed", model=str(model), **IN_PROCESS) as third:
        answers = third.run(*prompts(1))
        assert all(answer.cached for answer in answers)
        assert [answer.tokens for answer in answers] != right  # so they are made of what is loaded


def test_the_daemons_death_changes_no_token(
    model: Path, server: Daemon, tmp_path: Path, right: list[list[int]]
) -> None:
    configure(tmp_path, server.target)
    with engine(tmp_path / "log", model=str(model), **IN_PROCESS) as made:
        made.begin(*prompts(1))
        server.kill()  # before, while, or after they are stored
        assert [answer.tokens for answer in made.finish()] == right
        assert tokens(made, prompts(1)) == right
        with daemon(tmp_path, "--dram", "256MiB") as again:
            with KVStoreClient(again.target) as client:
                client.info(timeout_s=20.0)

            def is_stored() -> bool:
                assert tokens(made, prompts(1)) == right
                with KVStoreClient(again.target) as client:
                    return client.stats().blocks >= chunks(prompts(1))

            wait_until(is_stored)
            assert sum(answer.cached for answer in made.run(*prompts(1))) > 0


# -- LMCache's server, the store below its memory --------------------------------------


@contextlib.contextmanager
def lmcache_server(folder: Path, target: str) -> Iterator[dict[str, Any]]:
    """LMCache's server as a user starts it, and what an engine says to use it."""
    port, web = _free_port(), _free_port()
    adapter = {
        "type": "plugin",
        "module_path": "kvstore_integrations.lmcache.l2",
        "class_name": "KVStoreL2Adapter",
        "adapter_params": {"target": target},
    }
    command = [
        *(str(Path(sys.executable).with_name("lmcache")), "server", "--transport=zmq"),
        *("--host=127.0.0.1", f"--port={port}", f"--http-port={web}", f"--shm-name={port}"),
        *("--l1-size-gb=0.0625", "--no-l1-use-lazy", "--eviction-policy=LRU"),
        *(f"--chunk-size={CHUNK}", "--max-workers=2", "--supported-transfer-mode=auto"),
        f"--l2-adapter={json.dumps(adapter)}",
    ]
    log = folder / f"lmcache-{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
        try:
            _wait_for(web, process, log)
            yield {
                "kv_transfer_config": {
                    "kv_connector": "LMCacheMPConnector",
                    "kv_connector_module_path": "cpu_connector",
                    "kv_role": "kv_both",
                    "kv_connector_extra_config": {
                        "lmcache.mp.host": "tcp://127.0.0.1",
                        "lmcache.mp.port": port,
                    },
                }
            }
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30.0)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1.0).close()
            return
        assert process.poll() is None, log.read_text()[-2000:]
        assert time.monotonic() < end
        threading.Event().wait(0.1)


def test_a_fresh_server_and_engine_hit_what_others_stored_and_the_tokens_are_the_same(
    model: Path, server: Daemon, tmp_path: Path, right: list[list[int]]
) -> None:
    with (
        lmcache_server(tmp_path, server.target) as config,
        engine(tmp_path / "a", model=str(model), **config) as first,
    ):
        answers = first.run(*prompts(1))
        assert [answer.tokens for answer in answers] == right
        assert sum(answer.cached for answer in answers) == 0
        wait_for_blocks(server.target, chunks(prompts(1)))
    with (
        lmcache_server(tmp_path, server.target) as config,
        engine(tmp_path / "b", model=str(model), **config) as second,
    ):
        answers = second.run(*prompts(1))
        assert [answer.tokens for answer in answers] == right
        assert sum(answer.cached for answer in answers) >= 0.9 * CHUNK * chunks(prompts(1))
        server.kill()
        second.run(*prompts(2))  # what it has not in its own memory either
        assert tokens(second, prompts(1)) == right


def test_a_server_without_its_store_does_not_start_and_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(AssertionError, match="no store answers at unix:///nowhere"),
        lmcache_server(tmp_path, "unix:///nowhere/kvstore.sock"),
    ):
        pass
