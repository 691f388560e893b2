"""SGLang's pages in a real daemon: what is found and copied, and what happens when it dies."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integrations.pool import one_bit_off, spoil
from integrations.sglang_pool import HostPool
from integrations.spy import Spy

from daemon import Daemon, daemon
from kvstore import ExplainStatus, limits
from kvstore.errors import Unavailable
from kvstore_client import KVStoreClient
from kvstore_integrations.identity import Identity
from kvstore_integrations.settings import ConfigurationError
from kvstore_integrations.sglang.pages import PageForm, PageStore
from kvstore_integrations.spaces import Spaces

WAIT_S = 20.0
POOLS = {
    "page_first": HostPool(16 * 64),
    "layer_first": HostPool(16 * 64, layout="layer_first"),
    "latents": HostPool(16 * 64, latent=96),
    "latents of layers": HostPool(16 * 64, layout="layer_first", latent=96),
    "values narrower than keys": HostPool(16 * 64, v_head_dim=32),
    "large pages": HostPool(64 * 8, page_size=64, layer_num=32, layout="layer_first"),
}


class Engine:
    """One engine's pages, and its host memory."""

    def __init__(
        self,
        target: str,
        pool: HostPool = POOLS["page_first"],
        *,
        facts: dict[str, Any] | None = None,
        model: str = "m@1",
        tenant: str = "default",
        lazy: bool = False,
        ttl_s: float | None = None,
    ) -> None:
        self.pool = dataclasses.replace(pool)  # memory of its own
        form = PageForm(tokens=pool.page_size, pieces=pool.pieces)
        self.spy = Spy(KVStoreClient(target, verify_reads=True, lazy=lazy, timeout_s=WAIT_S))
        self.spaces = Spaces(
            self.spy.client,
            Identity("test", model, facts or {}),
            block_bytes=form.block_bytes,
            block_tokens=form.tokens,
        )
        self.form = form
        self.pages = PageStore(self.spy, self.spaces, form, tenant=tenant, ttl_s=ttl_s)
        if not lazy:
            self.pages.open()

    def store(
        self, keys: list[str], pages: list[int], before: list[str] | None = None
    ) -> list[bool]:
        return self.pages.store(keys, self.pool.addresses(pages), before)

    def load(self, keys: list[str], pages: list[int]) -> list[bool]:
        return self.pages.load(keys, self.pool.addresses(pages))

    def close(self) -> None:
        self.pages.close()
        self.spy.client.close()


def keys_of(seed: str, n: int) -> list[str]:
    return [hashlib.sha256(f"{seed} {i}".encode()).hexdigest() for i in range(n)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("server"), "--dram", "256MiB") as running:
        yield running


@pytest.fixture
def engines(server: Daemon, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Makes engines, each as if in a process of its own; each test has a model of its own."""
    made: list[Engine] = []

    def make(*args: Any, target: str = server.target, model: str = "m@1", **said: Any) -> Engine:
        made.append(Engine(target, *args, model=f"{request.node.name} {model}", **said))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.mark.parametrize("name", POOLS)
def test_another_process_loads_the_bytes_that_were_stored(engines: Any, name: str) -> None:
    first, second = engines(POOLS[name]), engines(POOLS[name])
    n = first.pool.size // first.pool.page_size
    from_pages, to_pages = [np.random.default_rng(i).permutation(n).tolist() for i in (1, 2)]
    first.pool.fill(1)
    second.pool.fill(2)
    keys = keys_of("a", n - 1)
    assert first.store(keys, from_pages[:-1]) == [True] * (n - 1)
    assert second.pages.count_leading([*keys, *keys_of("b", 1)]) == n - 1
    untouched = second.pool.page(to_pages[-1])
    assert second.load(keys, to_pages[:-1]) == [True] * (n - 1)
    for source, target in zip(from_pages[:-1], to_pages[:-1], strict=True):
        assert second.pool.page(target) == first.pool.page(source)
    assert second.pool.page(to_pages[-1]) == untouched


def test_pages_of_one_or_two_pieces_are_copied_where_they_lie(engines: Any) -> None:
    for name in ("page_first", "latents"):
        engine = engines(POOLS[name])
        engine.store(keys_of(name, 3), [5, 2, 9])
        engine.load(keys_of(name, 3), [1, 0, 4])
        (put, _), (get, _) = engine.spy.of("put")[0], engine.spy.of("get_into")[0]
        assert [each.ctypes.data for each in put[2]] == engine.pool.addresses([5, 2, 9])
        assert [each.ctypes.data for each in get[2]] == engine.pool.addresses([1, 0, 4])


@pytest.mark.parametrize("name", POOLS)
def test_a_block_is_a_pages_pieces_in_order(engines: Any, name: str) -> None:
    """Else engines of another release of ours would read other bytes."""
    engine = engines(POOLS[name])
    engine.pool.fill(1)
    engine.store(keys_of("a", 1), [5])
    chain = engine.spy.of("put")[0][0][1]
    with engine.spy.client.view(engine.spaces.get("default"), chain) as view:
        assert b"".join(block.tobytes() for block in view.blocks) == engine.pool.page(5)


def test_a_page_counts_only_when_all_of_it_is_there(engines: Any) -> None:
    first, second = engines(), engines()
    keys = keys_of("a", 4)
    first.pool.fill(1)
    first.store(keys, [0, 1, 2, 3])
    blocks = first.spy.of("put")[0][0][1]
    assert len(blocks) == 8
    space = first.spaces.get("default")
    assert first.spy.client.drop(space, blocks[5:6]) == 1  # the values of the third
    assert second.pages.count_leading(keys) == 2
    assert second.load(keys, [0, 1, 2, 3]) == [True, True, False, False]


@pytest.mark.parametrize("name", ["page_first", "layer_first", "large pages"])
def test_nothing_is_loaded_behind_a_page_that_is_missing(engines: Any, name: str) -> None:
    first, second = engines(POOLS[name]), engines(POOLS[name])
    keys = keys_of("a", 7)
    first.store([*keys[:2], *keys[3:]], [0, 1, 2, 3, 4, 5])
    assert second.pages.count_leading(keys) == 2
    assert second.load(keys, list(range(7))) == [True, True, *[False] * 5]
    assert second.pages.count_leading(keys[3:]) == 4


def test_the_store_learns_where_in_its_chain_a_page_is(engines: Any) -> None:
    for name in ("page_first", "large pages"):
        engine = engines(POOLS[name])
        keys, pages = keys_of(name, 13), list(range(6))
        blocks = engine.form.blocks
        engine.store(keys[:6], pages, [])
        engine.store(keys[6:12], pages, keys[:6])
        engine.store(keys[12:], pages[:1], None)
        chain, position = b"", 0
        for args, said in engine.spy.of("put")[:-1]:
            assert said["parent"] == chain[-limits.KEY_BYTES :]
            assert said["position"] == position
            chain += args[1].tobytes()
            position += len(args[1])
        assert position == 12 * blocks
        assert engine.spy.of("put")[-1][1]["parent"] == b""
        assert engine.spy.of("put")[-1][1]["position"] == -1


def test_a_look_up_asks_the_index_once_and_copies_nothing(engines: Any) -> None:
    engine = engines()
    engine.store(keys_of("a", 3), [0, 1, 2])
    engine.spy.calls.clear()
    assert engine.pages.count_leading(keys_of("a", 128)) == 3
    assert [name for name, _, _ in engine.spy.calls] == ["match"]


def test_more_keys_than_a_call_takes_are_looked_up_in_parts(
    engines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines()
    keys = keys_of("a", 40)
    engine.store(keys, list(range(40)))
    monkeypatch.setattr("kvstore.limits.MAX_KEYS_PER_CALL", 32)
    assert engine.pages.count_leading([*keys, *keys_of("b", 30)]) == 40
    assert len(engine.spy.of("match")) == 3


def test_tenants_models_and_dtypes_share_nothing(engines: Any) -> None:
    keys = keys_of("a", 2)
    assert engines(facts={"dtype": "float32"}).store(keys, [0, 1]) == [True, True]
    assert engines(facts={"dtype": "float32"}).pages.count_leading(keys) == 2
    for other in (
        {"facts": {"dtype": "float16"}},
        {"facts": {"dtype": "float32"}, "tenant": "other"},
        {"facts": {"dtype": "float32"}, "model": "m@2"},
    ):
        engine = engines(**other)
        assert engine.pages.count_leading(keys) == 0
        assert engine.load(keys, [0, 1]) == [False, False]


def test_clearing_forgets_one_tenants_pages(engines: Any) -> None:
    keys = keys_of("a", 2)
    mine, theirs = engines(), engines(tenant="other")
    for one in (mine, theirs):
        one.store(keys, [0, 1])
    mine.pages.clear()
    assert mine.pages.count_leading(keys) == 0
    assert theirs.pages.count_leading(keys) == 2
    assert mine.store(keys, [0, 1]) == [True, True]
    assert mine.pages.count_leading(keys) == 2


def test_pages_are_forgotten_after_their_time(engines: Any) -> None:
    engine = engines(ttl_s=0.2)
    keys = keys_of("a", 2)
    assert engine.store(keys, [0, 1]) == [True, True]
    deadline = time.monotonic() + WAIT_S
    while engine.pages.count_leading(keys):
        assert time.monotonic() < deadline
    report = engine.spy.client.explain(engine.spaces.get("default"), [bytes.fromhex(keys[0])])
    assert report[0].status is ExplainStatus.EXPIRED


@pytest.mark.parametrize("name", ["page_first", "layer_first"])
def test_threads_that_load_and_store_at_once_get_the_right_bytes(engines: Any, name: str) -> None:
    engine = engines(POOLS[name])
    engine.pool.fill(1)
    rounds, wrong = 20, []

    def work(thread: int) -> None:
        mine = list(range(16 * thread, 16 * thread + 8))
        free = [page + 8 for page in mine]
        for turn in range(rounds):
            keys = keys_of(f"{thread} {turn}", 8)
            if not all(engine.store(keys, mine)) or engine.pages.count_leading(keys) != 8:
                wrong.append("not stored")
            if not all(engine.load(keys, free)):
                wrong.append("not loaded")
            if any(
                engine.pool.page(a) != engine.pool.page(b) for a, b in zip(mine, free, strict=True)
            ):
                wrong.append("other bytes")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert wrong == []


@pytest.mark.parametrize("name", ["page_first", "layer_first"])
def test_a_dead_daemon_is_a_miss_and_a_new_one_is_used_again(tmp_path: Path, name: str) -> None:
    keys = keys_of("a", 4)
    with daemon(tmp_path, "--dram", "64MiB") as server:
        engine = Engine(server.target, POOLS[name])
        engine.pool.fill(1)
        assert engine.store(keys, [0, 1, 2, 3]) == [True] * 4
        server.kill()
    deadline = time.monotonic() + WAIT_S
    while all(engine.load(keys, [4, 5, 6, 7])):  # its memory is there until its end is noticed
        assert [engine.pool.page(4 + i) for i in range(4)] == list(map(engine.pool.page, range(4)))
        assert time.monotonic() < deadline
    assert engine.load(keys, [4, 5, 6, 7]) == [False] * 4
    assert engine.store(keys, [0, 1, 2, 3]) == [False] * 4
    assert engine.pages.count_leading(keys) == 0
    with daemon(tmp_path, "--dram", "64MiB"):
        engine.spy.client.info(timeout_s=WAIT_S)  # returns when it has been reached
        assert engine.store(keys, [0, 1, 2, 3]) == [True] * 4
        assert engine.load(keys, [4, 5, 6, 7]) == [True] * 4
    engine.close()


def test_a_store_that_comes_later_is_used_then(tmp_path: Path) -> None:
    engine = Engine(f"unix://{tmp_path}/kvstore.sock", lazy=True)
    keys = keys_of("a", 2)
    assert engine.pages.count_leading(keys) == 0
    assert engine.store(keys, [0, 1]) == [False, False]
    assert engine.load(keys, [0, 1]) == [False, False]
    with pytest.raises(Unavailable, match="not answered yet"):
        engine.pages.clear()
    with daemon(tmp_path, "--dram", "64MiB"):
        deadline = time.monotonic() + WAIT_S
        while not all(engine.store(keys, [0, 1])):
            assert time.monotonic() < deadline
        assert engine.pages.count_leading(keys) == 2
    engine.close()


@pytest.mark.parametrize("name", ["page_first", "layer_first"])
def test_a_full_pool_costs_old_pages_and_never_a_wrong_byte(tmp_path: Path, name: str) -> None:
    with daemon(tmp_path, "--dram", "2MiB") as server:
        engine = Engine(server.target, POOLS[name])
        engine.pool.fill(1)
        for turn in range(8):
            keys = keys_of(str(turn), 16)
            engine.store(keys, list(range(16)), [])
            loaded = engine.load(keys, list(range(16, 32)))
            assert sum(loaded) == engine.pages.count_leading(keys)
            for page in range(sum(loaded)):
                assert engine.pool.page(16 + page) == engine.pool.page(page)
        assert engine.spy.client.stats().evicted > 0
        # More at once than there is room for: not all is stored, which is no error.
        assert not all(engine.store(keys_of("all", 64), list(range(64)), []))
        engine.close()


@pytest.mark.parametrize("name", ["page_first", "layer_first"])
def test_bytes_that_changed_in_the_store_are_a_miss(
    tmp_path: Path, engines: Any, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    keys = keys_of("a", 3)
    with daemon(tmp_path, "--dram", "64MiB") as server:
        first, second = [engines(POOLS[name], target=server.target) for _ in range(2)]
        first.pool.fill(1)
        first.store(keys, [0, 1, 2])
        assert spoil(server, one_bit_off) == 3 * first.form.blocks
        with caplog.at_level(logging.WARNING):
            assert second.load(keys, [0, 1, 2]) == [False] * 3
        assert "fail their checksum" in caplog.text


@pytest.mark.parametrize("keys", [["ab"], ["x" * 64], [" a" * 32]])
def test_what_is_no_key_is_a_miss_and_a_line_in_the_log(
    engines: Any, caplog: pytest.LogCaptureFixture, keys: list[str]
) -> None:
    engine = engines()
    with caplog.at_level(logging.WARNING):
        assert engine.pages.count_leading(keys) == 0
        assert engine.store(keys, [0]) == [False]
        assert engine.load(keys, [0]) == [False]
    assert len(caplog.records) == 3


def test_addresses_that_do_not_fit_are_refused(
    engines: Any, caplog: pytest.LogCaptureFixture
) -> None:
    engine = engines()
    assert engine.store(keys_of("a", 2), [0]) == [False, False]
    assert engine.load(keys_of("a", 2), [0]) == [False, False]
    assert "2 addresses for 2 pages of 2 pieces" in caplog.text


def test_what_was_copied_is_told_once(engines: Any) -> None:
    engine = engines()
    keys = keys_of("a", 3)
    engine.store(keys, [0, 1, 2])
    engine.load(keys[:2], [0, 1])
    engine.load(keys_of("b", 1), [0])
    stored, loaded = engine.pages.copies()
    assert (stored.stored, stored.pages, stored.nbytes) == (True, 3, 3 * engine.form.nbytes)
    assert (loaded.stored, loaded.pages, loaded.nbytes) == (False, 2, 2 * engine.form.nbytes)
    assert stored.seconds > 0
    assert engine.pages.copies() == []


def test_pages_that_no_store_takes_fail_at_start(server: Daemon) -> None:
    pool = HostPool(64, page_size=64, layer_num=1024, head_num=16)
    form, identity = PageForm(tokens=64, pieces=pool.pieces), Identity("test", "m@1", {})
    with (
        KVStoreClient(server.target) as client,
        pytest.raises(ConfigurationError, match="Choose other blocks"),
    ):
        Spaces(client, identity, block_bytes=form.block_bytes, block_tokens=form.tokens)
