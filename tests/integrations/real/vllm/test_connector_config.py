"""What our connector makes of vLLM's own configuration objects, without an engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from integrations.models import save_llama
from vllm.config import set_current_vllm_config
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorRole, supports_hma
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    MambaSpec,
    SlidingWindowSpec,
)

from daemon import Daemon, daemon
from kvstore_integrations.settings import ConfigurationError
from kvstore_integrations.vllm import description
from kvstore_integrations.vllm.connector import ConnectorSettings, KVStoreConnector
from kvstore_integrations.vllm.scheduling import Group

BLOCK = 32
LAYERS = [f"model.layers.{i}.self_attn.attn" for i in range(4)]
FULL = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.float32)
WINDOW = SlidingWindowSpec(
    block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.float32, sliding_window=100
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("daemon"), "--dram", "16MiB") as running:
        yield running


def configured(model: Path, extra: dict[str, Any], **arguments: Any) -> Any:
    """A `VllmConfig` as a user's arguments make it."""
    transfer = {
        "kv_connector": "KVStoreConnector",
        "kv_connector_module_path": "kvstore_integrations.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra,
        **arguments.pop("transfer", {}),
    }
    return EngineArgs(
        **{
            "model": str(model),
            "dtype": "float32",
            "max_model_len": 1024,
            "block_size": BLOCK,
            "skip_tokenizer_init": True,
            "kv_transfer_config": transfer,
            **arguments,
        }
    ).create_engine_config()


def groups(*specs: Any) -> Any:
    """A `KVCacheConfig` of such groups."""
    made = [KVCacheGroupSpec(layer_names=list(LAYERS), kv_cache_spec=spec) for spec in specs]
    return KVCacheConfig(num_blocks=8, kv_cache_tensors=[], kv_cache_groups=made)


def start(config: Any, cache: Any) -> None:
    """What vLLM does at the start of its scheduler."""
    made = KVConnectorFactory.create_connector(config, KVConnectorRole.SCHEDULER, cache)
    made.shutdown()


def test_a_configuration_of_a_users_starts(model: Path, server: Daemon) -> None:
    config = configured(model, {"target": server.target, "staging_bytes": 64 << 20})
    start(config, groups(FULL, WINDOW))
    assert supports_hma(KVStoreConnector)
    assert not config.scheduler_config.disable_hybrid_kv_cache_manager


@pytest.mark.parametrize(
    ("extra", "arguments", "message"),
    [
        (
            {"stagging_bytes": 1},
            {},
            r"kv_connector_extra_config: stagging_bytes.*Known are: target",
        ),
        ({"staging_bytes": 5}, {}, "staging_bytes: .*greater than"),
        ({"save_decode": "perhaps"}, {}, "save_decode"),
        ({"tenant": "a/b"}, {}, "tenant: "),
        ({"target": "unix:///no/such.sock", "timeout_s": 0.2}, {}, r"no store answers at unix"),
        ({}, {"transfer": {"kv_load_failure_policy": "fail"}}, '"kv_load_failure_policy": "recomp'),
        ({}, {"prefix_caching_hash_algo": "xxhash"}, "--prefix-caching-hash-algo xxhash"),
        ({}, {"prefix_caching_hash_algo": "xxhash_cbor"}, "Set it to sha256_cbor"),
    ],
)
def test_what_cannot_work_ends_the_start_with_what_to_change(
    model: Path, server: Daemon, extra: dict[str, Any], arguments: dict[str, Any], message: str
) -> None:
    config = configured(model, {"target": server.target, **extra}, **arguments)
    with pytest.raises(ConfigurationError, match=message):
        start(config, groups(FULL))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            MambaSpec(block_size=BLOCK, shapes=((4, 4),), dtypes=(torch.float32,)),
            "keep MambaSpec, which cannot be found by prefix",
        ),
        (
            ChunkedLocalAttentionSpec(
                block_size=BLOCK,
                num_kv_heads=2,
                head_size=64,
                dtype=torch.float32,
                attention_chunk_size=64,
            ),
            "keep ChunkedLocalAttentionSpec",
        ),
        (replace(FULL, non_causal=True), "look at later tokens too"),
    ],
)
def test_layers_whose_blocks_are_no_prefixes_are_refused(
    model: Path, server: Daemon, spec: Any, message: str
) -> None:
    config = configured(model, {"target": server.target})
    with pytest.raises(ConfigurationError, match=message):
        start(config, groups(FULL, spec))


def test_context_parallelism_is_refused(model: Path) -> None:
    config = configured(model, {})
    config.parallel_config.decode_context_parallel_size = 2
    with pytest.raises(ConfigurationError, match="context parallelism is not supported"):
        description.check(config, groups(FULL))


def test_groups_have_the_tokens_of_their_blocks_and_what_a_window_sees(model: Path) -> None:
    config = configured(model, {})
    assert description.groups_of(config, groups(FULL)) == ([Group(block_tokens=BLOCK)], BLOCK)
    found, hash_tokens = description.groups_of(
        config, groups(replace(FULL, block_size=2 * BLOCK), WINDOW)
    )
    assert found == [Group(block_tokens=2 * BLOCK), Group(block_tokens=BLOCK, window=99)]
    assert hash_tokens == BLOCK


# -- identities ------------------------------------------------------------------------


class Tp:
    """vLLM's group of tensor-parallel ranks, as far as it is asked."""

    rank_in_group = 0


class Layer:
    """An attention layer, as far as it is asked."""

    def get_attn_backend(self) -> Any:
        class Backend:
            @staticmethod
            def get_name() -> str:
                return "CPU_ATTN"

        return Backend


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Tp:
    """The rank that this process is taken for."""
    made = Tp()
    monkeypatch.setattr(description, "get_tp_group", lambda: made)
    monkeypatch.setattr(
        description,
        "get_layers_from_vllm_config",
        lambda config, kind, names: {name: Layer() for name in names},
    )
    return made


def named(config: Any, cache: Any, **settings: Any) -> tuple[str, ...]:
    """The namespaces' names, by group."""
    read = ConnectorSettings(**settings)
    with set_current_vllm_config(config):
        made = description.identities(config, cache, read)
    return tuple(identity.namespace("t") for identity in made if identity)


def test_whatever_changes_the_bytes_changes_the_namespace(
    model: Path, rank: Tp, tmp_path: Path
) -> None:
    cache = groups(FULL)
    base = named(configured(model, {}), cache)
    assert named(configured(model, {}), groups(FULL)) == base
    rope = {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}
    others = {
        "weights": named(configured(save_llama(tmp_path / "other", seed=1), {}), cache),
        "revision": named(configured(model, {}), cache, model_revision="2"),
        "dtype": named(configured(model, {}, dtype="bfloat16"), cache),
        "hashes": named(configured(model, {}, prefix_caching_hash_algo="sha256_cbor"), cache),
        "rope": named(configured(model, {}, hf_overrides=rope), cache),
        "dummy": named(configured(model, {}, load_format="dummy"), cache),
        "heads": named(configured(model, {}), groups(replace(FULL, num_kv_heads=1))),
        "tokens": named(configured(model, {}), groups(replace(FULL, block_size=2 * BLOCK))),
        "window": named(configured(model, {}), groups(WINDOW)),
        "layout": named(configured(model, {}), replace(cache, kv_cache_layout="BLHNC")),
    }
    rank.rank_in_group = 1
    others["rank"] = named(configured(model, {}), cache)
    assert len({base, *others.values()}) == len(others) + 1
    assert len(set(named(configured(model, {}), groups(FULL, FULL)))) == 2


def test_ranks_with_equal_bytes_have_one_namespace_and_one_writer(model: Path, rank: Tp) -> None:
    cache = groups(FULL)
    cache.kv_tp_replicas = 2
    config = configured(model, {})
    names, writers = [], []
    for number in range(4):
        rank.rank_in_group = number
        names.append(named(config, cache))
        writers.append(description.is_writer(cache))
    assert names[0] == names[1] != names[2] == names[3]
    assert writers == [True, False, True, False]
