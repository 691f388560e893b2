"""An engine's chunks in a real daemon, whole and shorter; names and settings of LMCache's."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon import Daemon, daemon, notice_end
from kvstore_client import KVStoreClient
from kvstore_integrations.lmcache.chunks import ChunkStore
from kvstore_integrations.lmcache.names import Kind, chunk_name, digest, kind_of
from kvstore_integrations.lmcache.objects import Objects
from kvstore_integrations.lmcache.settings import L2Settings, LMCacheSettings, check_engine
from kvstore_integrations.lmcache.shelves import Shelves
from kvstore_integrations.settings import ConfigurationError

TOKENS, TOKEN_BYTES = 20, 256
FLOAT16, FLOAT32 = np.dtype("float16"), np.dtype("float32")
WHOLE = kind_of("m", [(2, 4, TOKENS, 16)], [FLOAT16], "KV_2LTD")


class Engine:
    """One engine's LMCache."""

    def __init__(
        self, target: str, *, parts: bool = True, whole: Kind = WHOLE, **settings: Any
    ) -> None:
        read = LMCacheSettings.read({"model_revision": "r1", **settings}, "where")
        self.client = KVStoreClient(target, verify_reads=True)
        self.shelves = Shelves(self.client, "test", read.identify, {}, tenant=read.tenant)
        objects = Objects(self.client, self.shelves, leases=False)
        self.chunks = ChunkStore(objects, whole, parts=parts)
        for kind in (whole, *self.chunks.parts):
            self.shelves.open_now(kind)

    def put(self, names: list[bytes], tokens: list[int]) -> None:
        self.chunks.put(names, [bytes_of(*each) for each in zip(names, tokens, strict=True)])

    def get(self, names: list[bytes]) -> list[int]:
        """How many tokens came of each; they are checked, byte by byte."""
        rows = list(np.zeros((len(names), WHOLE.nbytes), np.uint8))
        came = self.chunks.get(names, rows)
        for name, row, nbytes in zip(names, rows, came, strict=True):
            assert np.array_equal(row[:nbytes], bytes_of(name, nbytes // TOKEN_BYTES))
        return [nbytes // TOKEN_BYTES for nbytes in came]

    def close(self) -> None:
        self.shelves.close()
        self.client.close()


def names_of(seed: str, n: int) -> list[bytes]:
    return [hashlib.sha256(f"{seed} {i}".encode()).digest() for i in range(n)]


def bytes_of(name: bytes, tokens: int) -> np.ndarray:
    rng = np.random.default_rng(int.from_bytes(name[:8], "big") + tokens)
    return rng.integers(0, 256, tokens * TOKEN_BYTES, np.uint8)


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--dram", "16MiB") as process:
        yield process


@pytest.fixture
def engines(running: Daemon) -> Iterator[tuple[Engine, Engine]]:
    made = Engine(running.target), Engine(running.target)
    yield made
    for engine in made:
        engine.close()


def test_another_process_counts_finds_and_gets_what_was_put(
    engines: tuple[Engine, Engine],
) -> None:
    first, second = engines
    names = names_of("a", 6)
    first.put([*names[:3], names[4]], [TOKENS] * 4)
    assert second.chunks.count(names) == 3
    assert second.chunks.count(names[3:]) == 0
    assert second.chunks.find(names) == [True, True, True, False, True, False]
    assert second.get(names) == [TOKENS, TOKENS, TOKENS, 0, TOKENS, 0]


def test_a_shorter_chunk_ends_a_prompt(engines: tuple[Engine, Engine]) -> None:
    first, second = engines
    for tokens in range(1, TOKENS):
        names = names_of(f"{tokens} at the end", 3)
        first.put(names, [TOKENS, TOKENS, tokens])
        assert second.chunks.count([*names, *names_of("b", 1)]) == 3
        assert second.chunks.find(names) == [True] * 3
        assert second.get(names) == [TOKENS, TOKENS, tokens]


def test_shorter_chunks_cost_few_namespaces_and_little_room(running: Daemon) -> None:
    engine = Engine(running.target)
    names = names_of("a", TOKENS - 1)
    engine.put(names, list(range(1, TOKENS)))
    sizes = {space.layout.block_bytes: space.blocks for space in engine.client.info().namespaces}
    assert sum(sizes.values()) == TOKENS - 1
    assert len(sizes) <= 8  # the largest is as large as a whole one
    wasted = [
        min(size for size in sizes if size >= n * TOKEN_BYTES) - n * TOKEN_BYTES
        for n in range(1, TOKENS)
    ]
    assert max(wasted) <= 3 * TOKEN_BYTES
    engine.close()


def test_without_parts_shorter_chunks_are_not_stored_and_it_says_so_once(
    running: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Engine(running.target, parts=False)
    names = names_of("a", 3)
    for _ in range(2):
        engine.put(names, [TOKENS, 3, 5])
    assert engine.chunks.find(names) == [True, False, False]
    assert len([r for r in caplog.records if r.levelno == logging.ERROR]) == 1
    engine.close()


def test_a_dropped_chunk_is_gone(engines: tuple[Engine, Engine]) -> None:
    names = names_of("a", 2)
    engines[0].put(names, [TOKENS, 7])
    assert [engines[1].chunks.drop(name) for name in names] == [True, True]
    assert [engines[1].chunks.drop(name) for name in names] == [False, False]
    assert engines[0].chunks.count(names) == 0


def test_tenants_revisions_and_forms_share_nothing(running: Daemon) -> None:
    engine = Engine(running.target)
    names = names_of("a", 2)
    engine.put(names, [TOKENS, 7])
    form: dict[str, Any] = {"whole": replace(WHOLE, form="KV_MLA_FMT")}
    for settings in ({"tenant": "b"}, {"model_revision": "r2"}, form):
        stranger = Engine(running.target, **settings)
        assert stranger.chunks.find(names) == [False, False]
        stranger.close()
    engine.close()


def test_a_dead_store_costs_misses_and_comes_back(tmp_path: Path) -> None:
    names = names_of("a", 2)
    with daemon(tmp_path, "--dram", "16MiB") as process:
        engine = Engine(process.target)
        engine.put(names, [TOKENS, 7])
        process.kill()
        notice_end(engine.client)
    assert engine.chunks.count(names) == 0
    assert engine.get(names) == [0, 0]
    engine.put(names, [TOKENS, 7])
    with daemon(tmp_path, "--dram", "16MiB"):
        engine.client.info(timeout_s=20.0)
        engine.put(names, [TOKENS, 7])
        assert engine.chunks.count(names) == 2
        engine.close()


def test_chunks_that_no_pool_holds_are_an_error_at_start(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "1MiB") as process, KVStoreClient(process.target) as client:
        shelves = Shelves(client, "test", lambda model: model, {}, tenant="default")
        huge = kind_of("m", [(2, 4, 256, 1024)], [FLOAT16])
        with pytest.raises(ConfigurationError, match="--dram"):
            shelves.open_now(huge)
        shelves.close()


# -- names -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Chunk:
    """The fields of LMCache's `CacheEngineKey`."""

    model_name: str = "m"
    world_size: int = 1
    worker_id: int = 0
    chunk_hash: int | bytes = 7
    dtype: np.dtype[Any] = FLOAT16
    tags: tuple[tuple[str, object], ...] | None = None


def test_whatever_differs_in_a_chunks_key_differs_in_its_name() -> None:
    keys = [
        Chunk(),
        Chunk(world_size=2),
        Chunk(worker_id=1),
        Chunk(chunk_hash=8),
        Chunk(chunk_hash=b"7"),
        Chunk(dtype=FLOAT32),
        Chunk(tags=(("user", "a"),)),
        Chunk(tags=(("user", "b"),)),
        Chunk(tags=(("user", 1),)),
        Chunk(tags=(("user", "1"),)),
        Chunk(tags=(("user", "a"), ("x", "b"))),
    ]
    names = [chunk_name(key) for key in keys]
    assert len(set(names)) == len(keys)
    assert {len(name) for name in names} == {32}
    assert chunk_name(Chunk(tags=())) == chunk_name(Chunk())


def test_parts_of_a_name_do_not_run_together() -> None:
    parts: list[tuple[Any, ...]] = [("ab", "c"), ("a", "bc"), ("abc",), (b"ab", "c"), ("1",), (1,)]
    assert len({digest(*each) for each in parts}) == len(parts)


def test_a_kind_has_the_bytes_of_all_its_tensors() -> None:
    assert (WHOLE.tokens, WHOLE.nbytes) == (TOKENS, TOKENS * TOKEN_BYTES)
    two = kind_of("m", [(2, 4, 8, 16), (2, 1, 8, 4)], [FLOAT16, FLOAT32])
    assert two.nbytes == 2 * 4 * 8 * 16 * 2 + 2 * 8 * 4 * 4
    assert two != replace(two, form="other")


# -- settings --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"tagret": "unix:///x"}, r"adapter_params: tagret: .*Known are: target"),
        ({"most_stores": 0}, r"most_stores: .*greater than or equal to 1"),
        ({"tenant": "a/b"}, r"tenant: .*letters"),
        ({"model_revisions": "r1"}, r"model_revisions: "),
    ],
)
def test_a_wrong_setting_is_named(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        L2Settings.read(raw, "adapter_params")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hash_algorithm": "builtin"}, "Set `pre_caching_hash_algorithm` to sha256_cbor"),
        ({"hash_algorithm": "xxhash_cbor"}, "Set `pre_caching_hash_algorithm` to sha256_cbor"),
        ({"has_vllm": False}, "Run LMCache's server"),
        ({"serde": "cachegen"}, "Set `remote_serde` to naive"),
        ({"layerwise": True}, "Set `use_layerwise` to false"),
    ],
)
def test_what_an_engine_cannot_have_is_told(changed: dict[str, Any], message: str) -> None:
    fine: dict[str, Any] = {
        "hash_algorithm": "sha256_cbor",
        "has_vllm": True,
        "serde": "naive",
        "layerwise": False,
    }
    check_engine(**fine)
    with pytest.raises(ConfigurationError, match=message):
        check_engine(**{**fine, **changed})
