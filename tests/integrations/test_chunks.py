"""vLLM's chunks in a real daemon: what is promised and copied, and what happens when it dies."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integrations.pool import one_bit_off, spoil
from integrations.spy import Spy

from daemon import Daemon, daemon, notice_end
from kvstore import HintKind
from kvstore_client import KVStoreClient
from kvstore_integrations.identity import Identity
from kvstore_integrations.options import RequestOptions
from kvstore_integrations.spaces import Spaces
from kvstore_integrations.vllm.chunks import ChunkCache, Found, Group, Request

BYTES, TOKENS, ROWS = 8192, 32, 64
WAIT_S = 20.0


class Engine:
    """One engine's cache, and the host memory that it copies from and to."""

    model = "m@1"

    def __init__(self, target: str, model: str = "", *, groups: int = 1, lazy: bool = False):
        self.spy = Spy(KVStoreClient(target, verify_reads=True, lazy=lazy, timeout_s=WAIT_S))
        self.rows = np.zeros((ROWS, BYTES), np.uint8)
        spaces = [
            Spaces(
                self.spy.client,
                Identity("test", model or self.model, {"group": i}),
                block_bytes=BYTES,
                block_tokens=TOKENS,
            )
            for i in range(groups)
        ]
        self.spaces = spaces
        by_number = {i: Group(space, TOKENS) for i, space in enumerate(spaces)}
        self.cache = ChunkCache(self.spy, by_number, self.rows, most_stores=8)
        self._job = 0

    def open(self, tenant: str = "default") -> Engine:
        for space in self.spaces:
            space.open_now(tenant)
        return self

    def run(self, kind: str, request: Request, keys: list[bytes], rows: list[int]) -> Any:
        """A job from begin to end."""
        self._job += 1
        getattr(self.cache, kind)(self._job, request, keys, np.array(rows))
        self.cache.drain()
        ((number, copied),) = self.cache.finished()
        assert number == self._job
        return copied

    def found(self, request: Request, keys: list[bytes]) -> list[Found]:
        return [self.cache.look_up(request, key) for key in keys]

    def close(self) -> None:
        self.cache.close()
        self.spy.client.close()


def keys_of(seed: str, n: int, group: int = 0) -> list[bytes]:
    rng = np.random.default_rng(list(seed.encode()))
    return [rng.bytes(32) + group.to_bytes(4, "big") for _ in range(n)]


def request_of(keys: list[bytes], **said: Any) -> Request:
    options = RequestOptions.read(said, tenant="default")
    return Request(options=options, keys={k: (i + 1) * TOKENS for i, k in enumerate(keys)})


def fill(engine: Engine, rows: list[int], seed: int) -> np.ndarray:
    made = np.random.default_rng(seed).integers(0, 256, (len(rows), BYTES), np.uint8)
    engine.rows[rows] = made
    return made


_numbers = itertools.count()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests that leave it as it is; what each of them stores is its own."""
    with daemon(tmp_path_factory.mktemp("store"), "--dram", "16MiB") as running:
        yield running


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon of the test's own."""
    with daemon(tmp_path, "--dram", "16MiB") as running:
        yield running


@pytest.fixture(autouse=True)
def own_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that another test has stored is of this model."""
    monkeypatch.setattr(Engine, "model", f"test@{next(_numbers)}")


@pytest.fixture
def engine(server: Daemon) -> Iterator[Engine]:
    made = Engine(server.target)
    yield made.open()
    made.close()


@pytest.fixture
def other(server: Daemon) -> Iterator[Engine]:
    """Another process of the same engine, as far as the store can tell."""
    made = Engine(server.target)
    yield made.open()
    made.close()


def test_another_process_finds_and_loads_the_bytes_that_were_stored(
    engine: Engine, other: Engine
) -> None:
    keys = keys_of("a", 6)
    bytes_put = fill(engine, [3, 4, 5, 6, 9, 8], 1)
    assert engine.run("store", request_of(keys), keys, [3, 4, 5, 6, 9, 8]).complete
    assert other.found(request_of([*keys, *keys_of("b", 1)]), keys) == [Found.HIT] * 6
    request = request_of(keys)
    copied = other.run("load", request, keys, [1, 0, 2, 10, 11, 12])
    assert copied.complete
    assert copied.nbytes == 6 * BYTES
    assert np.array_equal(other.rows[[1, 0, 2, 10, 11, 12]], bytes_put)


def test_all_chunks_of_a_request_are_looked_up_in_one_pass(engine: Engine, other: Engine) -> None:
    keys = keys_of("a", 40)
    engine.run("store", request_of(keys), keys[:30], list(range(30)))
    request = request_of(keys)
    assert other.found(request, keys[:31]) == [Found.HIT] * 30 + [Found.MISS]
    assert other.spy.count("match") == 1
    other.cache.next_step()
    assert other.found(request, keys[:30]) == [Found.HIT] * 30
    assert other.spy.count("match") == 1


def test_what_was_missing_is_asked_for_again_in_the_next_step_only(
    engine: Engine, other: Engine
) -> None:
    keys, request = keys_of("a", 4), request_of(keys_of("a", 4))
    assert other.found(request, keys[:1]) == [Found.MISS]
    engine.run("store", request_of(keys), keys, [0, 1, 2, 3])
    assert other.found(request, keys[:1]) == [Found.MISS]
    other.cache.next_step()
    assert other.found(request, keys) == [Found.HIT] * 4


def test_a_window_is_looked_up_from_its_end(engine: Engine, other: Engine) -> None:
    keys = keys_of("a", 8)
    engine.run("store", request_of(keys), keys[5:], [0, 1, 2])
    request = request_of(keys)
    assert other.found(request, [keys[7], keys[6], keys[5], keys[4]]) == [
        Found.HIT,
        Found.HIT,
        Found.HIT,
        Found.MISS,
    ]


def test_chunks_are_put_with_their_place_in_the_chain(engine: Engine) -> None:
    keys = keys_of("a", 6)
    engine.run("store", request_of(keys), [keys[4], keys[1], keys[2]], [0, 1, 2])
    puts = [kwargs for name, _, kwargs in engine.spy.calls if name == "put"]
    assert [(put["position"], put["parent"]) for put in puts] == [
        (1, keys[0][:32]),
        (4, keys[3][:32]),
    ]


def test_groups_do_not_share_chunks(server: Daemon) -> None:
    engine = Engine(server.target, groups=2).open()
    first, second = keys_of("a", 2), [k[:32] + (1).to_bytes(4, "big") for k in keys_of("a", 2)]
    bytes_put = fill(engine, [0, 1], 1)
    request = request_of(first)
    request.keys.update({k: (i + 1) * TOKENS for i, k in enumerate(second)})  # type: ignore[attr-defined]
    assert engine.run("store", request, first, [0, 1]).complete
    assert engine.found(request, second) == [Found.MISS] * 2
    fill(engine, [2, 3], 2)
    assert engine.run("store", request, second, [2, 3]).complete
    assert engine.run("load", request, first, [4, 5]).complete
    assert np.array_equal(engine.rows[[4, 5]], bytes_put)
    engine.close()


def test_tenants_revisions_and_uncached_requests_share_nothing(
    server: Daemon, engine: Engine
) -> None:
    keys = keys_of("a", 2)
    engine.run("store", request_of(keys), keys, [0, 1])
    engine.open("b")
    assert engine.found(request_of(keys, tenant="b"), keys) == [Found.MISS] * 2
    later = Engine(server.target, "m@2").open()
    assert later.found(request_of(keys), keys) == [Found.MISS] * 2
    later.close()
    hostile = request_of(keys, tenant="../default")
    assert hostile.options is None
    assert engine.found(hostile, keys) == [Found.MISS] * 2
    assert not engine.run("store", hostile, keys, [0, 1]).complete
    assert not engine.run("load", hostile, keys, [0, 1]).complete


def test_a_new_tenants_namespace_opens_off_the_scheduling_thread(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, go = keys_of("a", 1), threading.Event()
    opened = engine.spy.client.open_namespace

    def slowly(*args: Any, **kwargs: Any) -> Any:
        assert go.wait(WAIT_S)
        return opened(*args, **kwargs)

    monkeypatch.setattr(engine.spy.client, "open_namespace", slowly)
    request = request_of(keys, tenant="new")
    assert engine.found(request, keys) == [Found.LATER]
    assert engine.found(request, keys) == [Found.LATER]
    go.set()
    engine.spaces[0].open_now("new")
    assert engine.found(request, keys) == [Found.MISS]


def test_a_load_that_fails_is_not_promised_again_to_its_request(
    engine: Engine, other: Engine
) -> None:
    keys, request = keys_of("a", 4), request_of(keys_of("a", 4))
    bytes_put = fill(engine, [0, 1, 2, 3], 1)
    engine.run("store", request_of(keys), keys, [0, 1, 2, 3])
    assert other.found(request, keys) == [Found.HIT] * 4
    space = engine.spaces[0].get("default")
    assert space is not None
    engine.spy.client.drop(space, [keys[1][:32]])
    copied = other.run("load", request, keys, [0, 1, 2, 3])
    assert copied.keys == {keys[0], keys[2], keys[3]}
    assert np.array_equal(other.rows[[0, 2, 3]], bytes_put[[0, 2, 3]])
    other.cache.next_step()
    assert other.found(request, keys)[:2] == [Found.HIT, Found.MISS]


def test_corrupted_bytes_are_a_miss(alone: Daemon) -> None:
    keys = keys_of("a", 3)
    engine, other = Engine(alone.target).open(), Engine(alone.target).open()
    bytes_put = fill(engine, [0, 1, 2], 1)
    engine.run("store", request_of(keys), keys, [0, 1, 2])

    def second(block: np.ndarray) -> np.ndarray:
        return one_bit_off(block) if np.array_equal(block, bytes_put[1]) else block

    assert spoil(alone, second) == 3
    request = request_of(keys)
    copied = other.run("load", request, keys, [0, 1, 2])
    assert copied.keys == {keys[0], keys[2]}
    assert engine.run("store", request_of(keys), keys, [0, 1, 2]).complete  # stored anew
    assert other.run("load", request_of(keys), keys, [0, 1, 2]).complete
    assert np.array_equal(other.rows[1], bytes_put[1])
    engine.close()
    other.close()


def test_a_dead_store_costs_misses_and_comes_back(tmp_path: Path) -> None:
    keys = keys_of("a", 3)
    with daemon(tmp_path, "--dram", "16MiB") as running:
        engine = Engine(running.target).open()
        engine.run("store", request_of(keys), keys, [0, 1, 2])
        request = request_of(keys)
        assert engine.found(request, keys) == [Found.HIT] * 3
        running.kill()
        notice_end(engine.spy.client)
        assert not engine.run("load", request, keys, [0, 1, 2]).keys
        assert not engine.run("store", request_of(keys), keys, [0, 1, 2]).complete
        assert engine.found(request_of(keys), keys) == [Found.MISS] * 3
    with daemon(tmp_path, "--dram", "16MiB"):
        engine.spy.client.info(timeout_s=WAIT_S)
        assert engine.run("store", request_of(keys), keys, [0, 1, 2]).complete
        assert engine.found(request_of(keys), keys) == [Found.HIT] * 3
        engine.close()


def test_without_a_store_at_first_it_is_used_as_soon_as_it_is_there(tmp_path: Path) -> None:
    keys = keys_of("a", 2)
    engine = Engine(f"unix://{tmp_path}/kvstore.sock", lazy=True)
    assert engine.found(request_of(keys), keys)[0] in (Found.LATER, Found.MISS)
    with daemon(tmp_path, "--dram", "16MiB"):
        engine.spy.client.info(timeout_s=WAIT_S)
        engine.open()
        assert engine.run("store", request_of(keys), keys, [0, 1]).complete
        engine.close()


def test_a_full_pool_evicts_and_never_serves_other_bytes(engine: Engine) -> None:
    rounds = 80  # of 64 chunks of 8 KiB each: more than twice the pool
    expected = {}
    for i in range(rounds):
        keys = keys_of(f"round {i}", ROWS)
        made = fill(engine, list(range(ROWS)), i)
        engine.run("store", request_of(keys), keys, list(range(ROWS)))
        expected.update(zip(keys, made, strict=True))
    loaded = 0
    for i in range(rounds):
        keys = keys_of(f"round {i}", ROWS)
        copied = engine.run("load", request_of(keys), keys, list(range(ROWS)))
        for row, key in enumerate(keys):
            if key in copied.keys:
                assert np.array_equal(engine.rows[row], expected[key])
        loaded += len(copied.keys)
    assert 0 < loaded < rounds * ROWS / 2


def test_a_sessions_end_is_told_to_the_store(engine: Engine) -> None:
    keys = keys_of("a", 3)
    request = request_of(keys, session_ends=True)
    engine.run("store", request, keys, [0, 1, 2])
    engine.cache.end(request)
    engine.cache.drain()
    ((_, (_, chain, hint), _),) = [call for call in engine.spy.calls if call[0] == "hint"]
    assert hint.kind is HintKind.SESSION_ENDS
    assert [row.tobytes() for row in chain] == [key[:32] for key in keys]


def test_keys_of_another_hash_are_not_cached_and_said_once(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    short = [b"x" * 16 + bytes(4), b"y" * 16 + bytes(4)]
    with caplog.at_level(logging.ERROR):
        assert engine.found(request_of(short), short) == [Found.MISS] * 2
        assert not engine.run("store", request_of(short), short, [0, 1]).complete
    assert [record.message for record in caplog.records] == [
        "nothing is cached: block hashes of 16 bytes; set --prefix-caching-hash-algo to sha256_cbor"
    ]
