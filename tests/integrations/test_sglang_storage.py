"""Our backend as SGLang calls it: recorded calls made again, over a real daemon."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from integrations.sglang_double import Double, StorageConfig, save_weights
from integrations.sglang_pool import HostPool

from daemon import Daemon, daemon
from kvstore.errors import Unavailable
from kvstore_client import KVStoreClient
from kvstore_integrations.settings import ConfigurationError

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.engines

CALLS = json.loads(Path(__file__).with_name("sglang_calls.json").read_text())
PAGE = 16
WAIT_S = 20.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("server"), "--dram", "64MiB") as running:
        yield running


class Rig:
    """Makes backends of one engine's model, each as if in a process of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, target: str, model: Path) -> None:
        self.sglang = Double(monkeypatch, {"model_path": str(model)})
        self.target, self.made = target, []

    def make(self, pool: Any = None, *, config: Any = None, **settings: Any) -> Any:
        extra = {"interface_v1": 1, "target": self.target, **settings}
        config = config or StorageConfig()
        config.extra_config = extra
        backend = self.sglang.module.KVStoreHiCache(config, {})
        self.made.append(backend)
        pool = pool or HostPool(PAGE * 32)
        backend.register_mem_pool_host(pool)
        backend.register_mem_host_pool_v2(pool, "kv")
        backend.on_host_pools_registered()
        return backend


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch, server: Daemon, tmp_path: Path) -> Iterator[Rig]:
    weights = save_weights(tmp_path / "model", content=bytes(tmp_path))  # each test has its own
    made = Rig(monkeypatch, server.target, weights)
    yield made
    for backend in made.made:
        backend.close()


def indices(*pages: int) -> Any:
    tokens = [page * PAGE + token for page in pages for token in range(PAGE)]
    return torch.tensor(tokens)


def keys_of(n: int) -> list[str]:
    return [f"{i:064x}" for i in range(1, n + 1)]


def told(prefix: list[str] | None = None) -> Any:
    return SimpleNamespace(prefix_keys=prefix)


def test_what_sglang_called_is_answered_as_it_was_then(rig: Rig) -> None:
    """Two requests in an engine that forgot all between them, of which the second begins like the
    first; a page's bytes in host memory are those of its key."""
    begun, registered, *calls = CALLS
    pool = HostPool(**{k: v for k, v in registered["pool"].items() if k in _POOL_FIELDS})
    rig.sglang.arguments = {**begun["arguments"], "model_path": rig.sglang.arguments["model_path"]}
    fields = {k: v for k, v in begun["config"].items() if k in vars(StorageConfig())}
    backend = rig.make(pool, config=StorageConfig(**fields))
    counts = {"batch_exists": 0, "batch_get_v1": 0, "batch_set_v1": 0}
    for call in calls:
        name = call["call"]
        if name not in counts:
            continue
        counts[name] += 1
        keys, prefix = call["keys"], told(call["prefix"])
        if name == "batch_exists":
            assert backend.batch_exists(keys, prefix) == call["answer"]
            continue
        distances = [at - pool.memory.ctypes.data for at in pool.addresses(call["pages"])]
        assert distances == call["distances"]
        if name == "batch_set_v1":
            for key, page in zip(keys, call["pages"], strict=True):
                _write(pool, page, key)
            assert backend.batch_set_v1(keys, indices(*call["pages"]), prefix) == call["answer"]
        else:
            pool.memory[:] = 0
            assert backend.batch_get_v1(keys, indices(*call["pages"]), prefix) == call["answer"]
            for key, page in zip(keys, call["pages"], strict=True):
                assert pool.page(page) == _bytes_of(key, sum(pool.pieces))
    assert all(counts.values())


_POOL_FIELDS = (
    *("size", "page_size", "layer_num", "head_num", "head_dim", "v_head_dim", "dtype", "layout"),
    *("start_layer", "end_layer"),
)


def _bytes_of(key: str, nbytes: int) -> bytes:
    return (bytes.fromhex(key) * (nbytes // 32 + 1))[:nbytes]


def _write(pool: HostPool, page: int, key: str) -> None:
    left = memoryview(_bytes_of(key, sum(pool.pieces)))
    start = pool.memory.ctypes.data
    for at, nbytes in zip(pool.addresses([page]), pool.pieces, strict=True):
        pool.memory[at - start : at - start + nbytes] = left[:nbytes]
        left = left[nbytes:]


def test_the_keys_before_a_page_go_to_the_store_too(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, before, seen = rig.make(), keys_of(4), []
    store = backend._pages.store
    monkeypatch.setattr(backend._pages, "store", lambda *said: seen.append(said[2]) or store(*said))
    for prefix in (told(before[:3]), told([]), told(None), None):
        assert backend.batch_set_v1(before[3:], indices(0), prefix) == [True]
    assert seen == [before[:3], [], None, None]


def test_of_ranks_with_the_same_latents_one_writes_and_all_read(rig: Rig) -> None:
    pools = [HostPool(PAGE * 32, latent=96) for _ in range(2)]
    writer, reader = [
        rig.make(pool, config=StorageConfig(tp_rank=rank, tp_size=2, is_mla_model=True))
        for rank, pool in enumerate(pools)
    ]
    for pool, seed in zip(pools, (1, 2), strict=True):
        pool.fill(seed)
    keys = keys_of(3)
    assert reader.batch_set_v1(keys, indices(0, 1, 2), told()) == [True] * 3
    assert reader.batch_exists(keys) == 0
    assert writer.batch_set_v1(keys, indices(0, 1, 2), told()) == [True] * 3
    assert reader.batch_exists(keys, told()) == 3
    assert reader.batch_get_v1(keys, indices(4, 5, 6), told()) == [True] * 3
    assert pools[1].page(5) == pools[0].page(1)


def test_ranks_with_heads_of_their_own_read_their_own(rig: Rig) -> None:
    ranks = [rig.make(config=StorageConfig(tp_rank=rank, tp_size=2)) for rank in range(2)]
    assert ranks[0].batch_set_v1(keys_of(2), indices(0, 1), told()) == [True] * 2
    assert [rank.batch_exists(keys_of(2)) for rank in ranks] == [2, 0]


def test_tenants_models_and_dtypes_share_nothing(rig: Rig, tmp_path: Path) -> None:
    keys = keys_of(2)
    assert rig.make().batch_set_v1(keys, indices(0, 1), told()) == [True, True]
    assert rig.make().batch_exists(keys) == 2
    assert rig.make(tenant="other").batch_exists(keys) == 0
    assert rig.make(HostPool(PAGE * 32, dtype="torch.float16")).batch_exists(keys) == 0
    rig.sglang.arguments["model_path"] = str(save_weights(tmp_path / "revised", content=b"others"))
    backend = rig.make()
    assert backend.batch_exists(keys) == 0
    assert backend.batch_get_v1(keys, indices(0, 1), told()) == [False, False]


def test_other_weights_in_a_running_engine_end_its_caching(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    backend, keys = rig.make(), keys_of(2)
    assert backend.batch_set_v1(keys, indices(0, 1), told()) == [True, True]
    rig.sglang.serving.weight_version = "2"
    with caplog.at_level(logging.ERROR):
        assert backend.batch_exists(keys) == 0
        assert backend.batch_get_v1(keys, indices(0, 1), told()) == [False, False]
        assert backend.batch_set_v1(keys, indices(0, 1), told()) == [False, False]
    assert len(caplog.records) == 1
    assert "Attach the storage backend again" in caplog.text
    assert rig.make().batch_exists(keys) == 0  # attached again: nothing of the old weights
    rig.sglang.serving.weight_version = "default"
    assert rig.make().batch_exists(keys) == 2


def test_clearing_forgets_for_all_engines(rig: Rig) -> None:
    one, two, keys = rig.make(), rig.make(), keys_of(2)
    one.batch_set_v1(keys, indices(0, 1), told())
    assert two.exists(keys[0])
    two.clear()
    assert not one.exists(keys[0])


def test_metrics_tell_each_copy_once(rig: Rig) -> None:
    backend, keys = rig.make(), keys_of(3)
    backend.batch_set_v1(keys, indices(0, 1, 2), told())
    backend.batch_get_v1(keys[:2], indices(3, 4), told())
    metrics = backend.get_stats()
    assert (metrics.backup_pgs, metrics.prefetch_pgs) == ([3], [2])
    assert metrics.backup_bandwidth[0] > 0
    assert metrics.prefetch_bandwidth[0] > 0
    metrics = backend.get_stats()
    assert (metrics.backup_pgs, metrics.prefetch_pgs) == ([], [])


def test_calls_of_the_copying_interface_are_no_silent_misses(rig: Rig) -> None:
    backend = rig.make()
    for name in ("get", "set", "batch_get", "batch_set"):
        with pytest.raises(NotImplementedError, match="interface_v1"):
            getattr(backend, name)(keys_of(1), None)


# -- at start --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interface_v1": 0}, "interface_v1"),
        ({"tagret": "x"}, "tagret: "),
        ({"target": "unix:///nowhere/kvstore.sock", "timeout_s": 0.2}, "no store answers at unix"),
        ({"target": "http://x"}, "target: "),
    ],
)
def test_a_wrong_configuration_fails_and_says_what_to_change(
    rig: Rig, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        rig.make(**settings)


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        (HostPool(PAGE * 4, layout="page_unified"), "page_unified.* --hicache-mem-layout"),
        (HostPool(64, page_size=64, layer_num=512, head_num=32), "Choose other blocks"),
        (SimpleNamespace(page_size=16, get_page_buffer_meta=lambda _: None), "plain KV and MLA"),
    ],
)
def test_a_pool_whose_pages_cannot_be_stored_fails_at_start(
    rig: Rig, pool: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        rig.make(pool)


def test_pages_larger_than_the_stores_memory_fail_at_start(rig: Rig, tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "1MiB") as small:
        with pytest.raises(ConfigurationError, match="--dram"):
            rig.make(HostPool(64, page_size=64, layer_num=64), target=small.target)
        rig.made.pop().close()


def test_a_model_that_keeps_more_than_kv_fails_at_start(rig: Rig) -> None:
    backend = rig.make()
    with pytest.raises(ConfigurationError, match="a pool `mamba` beside its KV"):
        backend.register_mem_host_pool_v2(HostPool(PAGE * 4), "mamba")


def test_an_engine_begins_without_a_store_where_none_is_required(rig: Rig, tmp_path: Path) -> None:
    backend = rig.make(target=f"unix://{tmp_path}/kvstore.sock", required=False)
    keys = keys_of(2)
    assert backend.batch_exists(keys, told()) == 0
    assert backend.batch_set_v1(keys, indices(0, 1), told()) == [False, False]
    assert backend.batch_get_v1(keys, indices(0, 1), told()) == [False, False]
    with pytest.raises(Unavailable):
        backend.clear()
    with daemon(tmp_path, "--dram", "64MiB") as late, KVStoreClient(late.target) as client:
        deadline = time.monotonic() + WAIT_S
        while not client.stats().blocks:
            assert time.monotonic() < deadline
            backend.batch_set_v1(keys, indices(0, 1), told())
        assert backend.batch_exists(keys, told()) == 2


def test_before_its_pool_is_registered_a_backend_knows_nothing(rig: Rig, server: Daemon) -> None:
    config = StorageConfig(extra_config={"interface_v1": 1, "target": server.target})
    backend = rig.sglang.module.KVStoreHiCache(config, {})
    assert backend.batch_exists(keys_of(1)) == 0
    assert backend.get_stats().backup_pgs == []
    backend.clear()
    backend.close()
