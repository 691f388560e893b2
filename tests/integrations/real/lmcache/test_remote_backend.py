"""LMCache's remote backend over our connector, as an engine's process has it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.lmcache_rig import wait_until
from integrations.pool import one_bit_off, spoil
from lmcache.utils import CacheEngineKey
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.exceptions import IrrecoverableException
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.storage_backend import CreateStorageBackends
from lmcache.v1.storage_backend.connector import CreateConnector

from daemon import Daemon, daemon
from kvstore_integrations.settings import ConfigurationError

CHUNK, WIDTH = 64, 128
PLUGIN = "remote_storage_plugin.kvstore"


class Engine:
    """What of LMCache is in one engine's worker, but for the engine."""

    def __init__(self, target: str, *, lmcache: dict[str, Any] | None = None, **settings: Any):
        ours = {"target": target, "model_revision": "r1", **settings}
        self.config = LMCacheEngineConfig.from_defaults(
            chunk_size=CHUNK,
            max_local_cpu_size=0.03,
            remote_storage_plugins=["kvstore"],
            pre_caching_hash_algorithm="sha256_cbor",
            save_unfull_chunk=True,
            extra_config={
                f"{PLUGIN}.module_path": "kvstore_integrations.lmcache.remote",
                f"{PLUGIN}.class_name": "KVStoreConnectorAdapter",
                **{f"{PLUGIN}.{name}": value for name, value in ours.items()},
            },
        )
        for name, value in (lmcache or {}).items():
            setattr(self.config, name, value)
        self.metadata = LMCacheMetadata(
            "m", 1, 1, 0, 0, torch.float16, (4, 2, CHUNK, 2, 64), chunk_size=CHUNK, role="worker"
        )
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()
        self.backends = CreateStorageBackends(self.config, self.metadata, self.loop)
        self.remote: Any = self.backends.get("RemoteBackend-kvstore")
        self.memory: Any = self.backends["LocalCPUBackend"]

    def connect(self) -> Any:
        """A connector, with the errors that LMCache's launcher only logs."""
        return CreateConnector(
            "plugin://kvstore",
            self.loop,
            self.memory,
            self.config,
            self.metadata,
            plugin_name="kvstore",
        )

    def put(self, keys: list[CacheEngineKey], tokens: list[int]) -> None:
        """Puts chunks of their own values, and waits until that is over."""
        objects = []
        for key, n in zip(keys, tokens, strict=True):
            one = self.memory.allocate(torch.Size([2, 4, n, WIDTH]), torch.float16)
            one.tensor.copy_(values(key, n))
            objects.append(one)
        self.remote.batched_submit_put_task(keys, objects)
        for one in objects:
            one.ref_count_down()
        wait_until(lambda: not self.remote.put_tasks and self.free == self.all)

    def get(self, keys: list[CacheEngineKey]) -> list[int]:
        """How many tokens came of each; they are checked."""
        tokens = []
        for key, one in zip(keys, self.remote.batched_get_blocking(keys), strict=True):
            tokens.append(one.get_num_tokens() if one else 0)
            if one:
                assert torch.equal(one.tensor, values(key, tokens[-1]))
                one.ref_count_down()
        return tokens

    @property
    def free(self) -> int:
        return int(self.memory.memory_allocator.pin_allocator.address_manager.get_free_size())

    @property
    def all(self) -> int:
        return int(self.memory.memory_allocator.pin_allocator.address_manager.get_heap_size())

    def close(self) -> None:
        for backend in self.backends.values():
            backend.close()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


def keys_of(seed: int, n: int, **configs: Any) -> list[CacheEngineKey]:
    return [
        CacheEngineKey("m", 1, 0, seed * 1000 + i, torch.float16, configs or None) for i in range(n)
    ]


def values(key: CacheEngineKey, tokens: int) -> torch.Tensor:
    made = torch.Generator().manual_seed(key.chunk_hash)
    return torch.randn((2, 4, tokens, WIDTH), generator=made).half()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--dram", "64MiB") as running:
        yield running


@pytest.fixture
def engine(server: Daemon) -> Iterator[Engine]:
    made = Engine(server.target)
    yield made
    made.close()


def test_put_contains_and_get_are_equal(engine: Engine) -> None:
    keys = keys_of(1, 6)
    assert engine.remote.batched_contains(keys) == 0
    engine.put(keys[:5], [CHUNK] * 4 + [33])
    assert engine.remote.batched_contains(keys) == 5
    assert [engine.remote.contains(key) for key in keys] == [True] * 5 + [False]
    assert engine.get(keys) == [CHUNK] * 4 + [33, 0]
    assert engine.free == engine.all


def test_one_at_a_time_and_without_waiting(engine: Engine) -> None:
    keys = keys_of(1, 4)
    engine.put(keys[:3], [CHUNK] * 3)

    def run(coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, engine.loop).result(20.0)

    engine.config.extra_config["use_exists_sync"] = True
    assert [engine.remote.contains(key) for key in keys] == [True] * 3 + [False]
    assert run(engine.remote.batched_async_contains("look-up", keys)) == 3
    objects = run(engine.remote.batched_get_non_blocking("look-up", [*keys, keys[0]]))
    assert len(objects) == 3
    for key, one in zip(keys, objects, strict=False):
        assert torch.equal(one.tensor, values(key, CHUNK))
        one.ref_count_down()
    one = engine.remote.get_blocking(keys[1])
    assert torch.equal(one.tensor, values(keys[1], CHUNK))
    one.ref_count_down()
    assert engine.remote.get_blocking(keys[3]) is None
    assert engine.remote.remove(keys[0])
    assert not engine.remote.contains(keys[0])
    assert run(engine.remote.connection.list()) == []
    assert engine.free == engine.all


def test_a_fresh_process_hits_all(server: Daemon) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import lmcache\n"
        "from integrations.real.lmcache.test_remote_backend import CHUNK, Engine, keys_of\n"
        "made = Engine(sys.argv[2])\n"
        "made.put(keys_of(1, 5), [CHUNK] * 4 + [7])\n"
        "made.close()\n"
    )
    tests = str(Path(__file__).parents[3])
    command = [sys.executable, "-c", script, tests, server.target]
    subprocess.run(command, check=True, timeout=120)
    engine = Engine(server.target)
    assert engine.get(keys_of(1, 5)) == [CHUNK] * 4 + [7]
    engine.close()


def test_tags_tenants_and_revisions_share_nothing(server: Daemon, engine: Engine) -> None:
    engine.put(keys_of(1, 2), [CHUNK] * 2)
    tagged = keys_of(1, 2, **{"lmcache.tag.user": "a"})
    assert engine.remote.batched_contains(tagged) == 0
    for settings in ({"tenant": "b"}, {"model_revision": "r2"}):
        stranger = Engine(server.target, **settings)
        assert stranger.remote.batched_contains(keys_of(1, 2)) == 0
        stranger.close()


def test_without_free_memory_a_get_is_a_miss_and_waits_for_nothing(engine: Engine) -> None:
    keys = keys_of(1, 2)
    engine.put(keys, [CHUNK] * 2)
    shape, held = torch.Size([2, 4, CHUNK, WIDTH]), []
    while one := engine.memory.allocate(shape, torch.float16, busy_loop=False):
        held.append(one)
    assert engine.get(keys) == [0, 0]
    for one in held:
        one.ref_count_down()
    assert engine.get(keys) == [CHUNK] * 2


def test_a_get_that_is_given_up_gives_its_memory_back(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(1, 2)
    engine.put(keys, [CHUNK] * 2)
    chunks = engine.remote.connection.getWrappedConnector()._chunks
    get, begun, go = chunks.get, threading.Event(), threading.Event()

    def slowly(*args: Any) -> Any:
        begun.set()
        assert go.wait(20.0)
        return get(*args)

    monkeypatch.setattr(chunks, "get", slowly)
    getting = asyncio.run_coroutine_threadsafe(engine.remote.connection.get(keys[0]), engine.loop)
    assert begun.wait(20.0)
    getting.cancel()
    assert engine.free < engine.all
    go.set()
    wait_until(lambda: engine.free == engine.all)


def test_corrupted_chunks_are_not_served(
    server: Daemon, engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of(1, 3)
    engine.put(keys, [CHUNK, CHUNK, 7])
    spoil(server, one_bit_off)
    assert engine.get(keys) == [0, 0, 0]
    assert engine.free == engine.all
    assert "garbage collected" not in caplog.text  # as LMCache says of memory not given back
    engine.put(keys, [CHUNK, CHUNK, 7])
    assert engine.get(keys) == [CHUNK, CHUNK, 7]


def test_a_store_that_dies_costs_misses_and_comes_back(tmp_path: Path) -> None:
    keys = keys_of(1, 3)
    with daemon(tmp_path, "--dram", "64MiB") as server:
        engine = Engine(server.target)
        engine.put(keys, [CHUNK] * 3)
        server.kill()
    assert engine.remote.batched_contains(keys) == 0
    assert engine.get(keys) == [0, 0, 0]
    engine.put(keys, [CHUNK] * 3)
    with daemon(tmp_path, "--dram", "64MiB"):
        engine.remote.connection.getWrappedConnector()._client.info(timeout_s=20.0)
        engine.put(keys, [CHUNK] * 3)
        assert engine.get(keys) == [CHUNK] * 3
        engine.close()


@pytest.mark.parametrize(
    ("settings", "lmcache", "message"),
    [
        ({"tagret": "x"}, {}, f"{PLUGIN}: .*tagret: .*Known are"),
        ({"target": "unix:///nowhere/kvstore.sock", "timeout_s": 0.3}, {}, "no store answers at"),
        ({"model_revision": ""}, {}, "Set `model_revision`"),
        ({}, {"pre_caching_hash_algorithm": "builtin"}, "to sha256_cbor"),
        ({}, {"remote_serde": "cachegen"}, "Set `remote_serde` to naive"),
        ({}, {"use_layerwise": True}, "Set `use_layerwise` to false"),
    ],
)
def test_a_wrong_configuration_fails_at_start_and_says_what_to_change(
    server: Daemon,
    settings: dict[str, Any],
    lmcache: dict[str, Any],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = Engine(**{"target": server.target, "lmcache": lmcache, **settings})
    assert engine.remote is None  # LMCache goes on without, and says why
    assert "Failed to create remote backend for plugin kvstore" in caplog.text
    with pytest.raises(ConfigurationError, match=message) as caught:
        engine.connect()
    assert isinstance(caught.value, IrrecoverableException)
    engine.close()


def test_without_a_store_at_first_it_starts_if_the_store_is_not_required(tmp_path: Path) -> None:
    target, keys = f"unix://{tmp_path}/kvstore.sock", keys_of(1, 2)
    engine = Engine(target, required=False, timeout_s=0.2)
    assert engine.remote.batched_contains(keys) == 0
    with daemon(tmp_path, "--dram", "64MiB"):
        engine.remote.connection.getWrappedConnector()._client.info(timeout_s=20.0)

        def is_stored() -> bool:
            engine.put(keys, [CHUNK] * 2)
            return bool(engine.remote.batched_contains(keys) == 2)

        wait_until(is_stored)
        engine.close()


def test_a_scheduler_looks_up_without_memory_of_its_own(server: Daemon, engine: Engine) -> None:
    engine.put(keys_of(1, 3), [CHUNK] * 3)
    engine.memory = None
    connector = engine.connect()
    assert connector.batched_contains(keys_of(1, 4)) == 3
    asyncio.run_coroutine_threadsafe(connector.close(), engine.loop).result(20.0)
