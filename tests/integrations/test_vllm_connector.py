"""The connector's two sides on a real daemon, without vLLM: what is promised, copied and saved."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from integrations.pool import one_bit_off, spoil  # noqa: E402
from integrations.vllm_connector import (  # noqa: E402
    NULL,
    TOKENS,
    WAIT_S,
    Engine,
    Request,
    prompt,
)

from daemon import Daemon, daemon  # noqa: E402
from kvstore_client import KVStoreClient  # noqa: E402
from kvstore_integrations.settings import ConfigurationError  # noqa: E402
from kvstore_integrations.vllm.adapters import Adapters  # noqa: E402
from kvstore_integrations.vllm.plans import Dropped, Part  # noqa: E402
from kvstore_integrations.vllm.scheduling import Group  # noqa: E402

pytestmark = pytest.mark.engines

FULL = Group(block_tokens=TOKENS)
WINDOW = Group(block_tokens=TOKENS, window=3 * TOKENS - 1)
LARGE = Group(block_tokens=2 * TOKENS)
Made = Callable[..., Engine]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("daemon"), "--dram", "64MiB") as running:
        yield running


@pytest.fixture
def made(server: Daemon, request: pytest.FixtureRequest) -> Iterator[Made]:
    """Makes engines on the daemon, each as if in a process of its own, of the test's own model."""
    every: list[Engine] = []

    def make(*tenants: str, **settings: Any) -> Engine:
        every.append(Engine(server.target, **{"model": request.node.name, **settings}))
        return every[-1].open(*tenants)

    yield make
    for engine in every:
        engine.close()


class Spy:
    """A client that notes its calls of `put`, and holds calls back while it is told to."""

    def __init__(self, target: str) -> None:
        self.client = KVStoreClient(target, verify_reads=True, timeout_s=WAIT_S)
        self.puts: list[dict[str, Any]] = []
        self.puts_go, self.gets_go = threading.Event(), threading.Event()
        self.puts_go.set()
        self.gets_go.set()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            if name == "put":
                self.puts.append(kwargs)
                assert self.puts_go.wait(WAIT_S)
            if name == "get_into":
                assert self.gets_go.wait(WAIT_S)
            return method(*args, **kwargs)

        return call


def stored(engine: Engine, request: Request, tenant: str = "default") -> list[int]:
    """By rank and group, how many leading blocks of the request the store has."""
    counts = []
    for rank in engine.spaces:
        for space, group in zip(rank, engine.groups, strict=True):
            handle = space.open_now(tenant)
            per = group.block_tokens // TOKENS
            counts.append(engine.client.match(handle, request.block_hashes[per - 1 :: per]).count)
    return counts


# -- what is promised and loaded -------------------------------------------------------


@pytest.mark.parametrize(
    ("groups", "layout", "ranks"),
    [
        ([FULL], "LBHNC", 1),
        ([FULL], "BLNHC", 2),
        ([FULL, WINDOW], "LBHNC", 1),
        ([LARGE, FULL, WINDOW], "LHBNC", 2),
    ],
)
def test_another_engine_loads_the_bytes_that_were_saved(
    made: Made, groups: list[Group], layout: str, ranks: int
) -> None:
    config = {"groups": groups, "layout": layout, "ranks": ranks}
    first, second = made(**config), made(**config)
    request = prompt(1, 10 * TOKENS + 5)
    assert first.serve(request) == 0
    again = Request(request.tokens)
    assert second.admit_after_add(again) == 10 * TOKENS
    assert second.holds(again, 0, 10 * TOKENS)


def test_one_token_at_least_is_left_to_compute(made: Made) -> None:
    first, second = made(), made()
    request = prompt(1, 6 * TOKENS)
    first.serve(request)
    assert second.serve(Request(request.tokens)) == 5 * TOKENS
    assert second.serve(Request(request.tokens[: TOKENS + 1])) == TOKENS
    assert second.serve(Request(request.tokens[:TOKENS])) == 0


def test_what_the_engine_has_itself_is_not_loaded(made: Made) -> None:
    first, second = made(), made()
    request = prompt(1, 8 * TOKENS + 1)
    first.serve(request)
    again = Request(request.tokens)
    assert second.serve(again, local=5 * TOKENS) == 3 * TOKENS
    assert second.holds(again, 0, 8 * TOKENS)
    assert second.serve(Request(request.tokens), local=8 * TOKENS) == 0


def test_another_prompt_gets_what_it_shares_and_no_more(made: Made) -> None:
    first, second = made(), made()
    request = prompt(1, 8 * TOKENS)
    first.serve(request)
    other = Request(request.tokens[: 3 * TOKENS + 2] + prompt(2, 4 * TOKENS).tokens)
    assert second.serve(other) == 3 * TOKENS
    assert second.serve(Request(request.tokens, salt="salted")) == 0


def test_tenants_models_and_adapters_share_nothing(made: Made) -> None:
    request = prompt(1, 6 * TOKENS + 1)
    made("a").serve(request, tenant="a")
    other = made("a", "b", "a+one")
    assert other.serve(Request(request.tokens), tenant="b") == 0
    assert other.serve(Request(request.tokens), tenant="a", adapter="one") == 0
    assert other.serve(Request(request.tokens), tenant="not/a/tenant") == 0
    assert other.serve(Request(request.tokens), tenant="a") == 6 * TOKENS
    assert made("a", model="another@2").serve(Request(request.tokens), tenant="a") == 0


def test_after_a_reset_an_engine_finds_nothing_that_was_there_before(made: Made) -> None:
    engine, other = made(), made()
    request = prompt(1, 6 * TOKENS + 1)
    engine.serve(request)
    engine.scheduling.reset()
    era = engine.scheduling._era
    for space in engine.spaces[0]:
        space.open_now(f"default{era}")
    assert engine.serve(Request(request.tokens)) == 0
    assert engine.serve(Request(request.tokens)) == 6 * TOKENS  # its own, of now
    assert other.serve(Request(request.tokens)) == 6 * TOKENS  # who has the old weights still


def test_a_block_that_one_rank_lacks_is_not_promised(made: Made) -> None:
    first, second = made(ranks=2), made(ranks=2)
    request = prompt(1, 6 * TOKENS + 1)
    first.serve(request)
    handle = first.spaces[1][0].open_now("default")
    assert first.client.drop(handle, request.block_hashes[4:5]) == 1
    again = Request(request.tokens)
    assert second.serve(again) == 4 * TOKENS
    assert second.holds(again, 0, 6 * TOKENS)
    assert stored(second, request) == [6, 6]


def test_of_ranks_with_equal_bytes_one_saves_and_all_load(made: Made) -> None:
    first, second = made(ranks=2, shared=True), made(ranks=2, shared=True)
    request = prompt(1, 6 * TOKENS + 1)
    first.serve(request)
    counts = [rank.worker.counts() for rank in first.ranks]
    assert counts[0] is not None
    assert counts[0].saved_blocks == 6
    assert counts[1] is None
    again = Request(request.tokens)
    assert second.serve(again) == 6 * TOKENS
    assert second.holds(again, 0, 6 * TOKENS)


def test_a_window_needs_only_what_it_sees(made: Made) -> None:
    groups = [FULL, WINDOW]
    first, second = made(groups=groups), made(groups=groups)
    request = prompt(1, 8 * TOKENS + 1)
    first.serve(request)
    handle = first.spaces[0][1].open_now("default")
    assert first.client.drop(handle, request.block_hashes[:5]) == 5
    again = Request(request.tokens)
    second.place(again)
    table = second.tables[again.request_id]
    table[1][:5] = [NULL] * 5  # vLLM has no blocks there either
    assert second.admit_after_add(again) == 8 * TOKENS
    assert second.holds(again, 0, 8 * TOKENS)


@pytest.mark.parametrize(
    ("missing", "found"),
    # The window is 3 blocks less a token: for a hit of n blocks, it sees n - 3, n - 2, n - 1.
    [([7], 7), ([6], 6), ([5], 5), ([4], 8), ([0], 8), ([6, 4], 4), ([6, 4, 1, 2], 1)],
)
def test_a_hole_in_a_window_shortens_the_hit(made: Made, missing: list[int], found: int) -> None:
    groups = [FULL, WINDOW]
    first, second = made(groups=groups), made(groups=groups)
    request = prompt(1, 8 * TOKENS + 1)
    first.serve(request)
    handle = first.spaces[0][1].open_now("default")
    assert first.client.drop(handle, [request.block_hashes[i] for i in missing]) == len(missing)
    again = Request(request.tokens)
    second.scheduling.add(again, None)
    assert second.scheduling.match(again.request_id, 0) == found * TOKENS


def test_the_last_block_of_a_hit_is_left_to_drafts(made: Made) -> None:
    first, second = made(), made(drop_last=True)
    request = prompt(1, 6 * TOKENS + 1)
    first.serve(request)
    assert second.serve(Request(request.tokens)) == 5 * TOKENS


def test_an_engine_that_only_produces_loads_nothing_and_one_that_only_consumes_saves_nothing(
    made: Made,
) -> None:
    producer, consumer = made(reads=False), made(writes=False)
    request, other = prompt(1, 6 * TOKENS + 1), prompt(2, 6 * TOKENS + 1)
    producer.serve(request)
    assert producer.serve(Request(request.tokens)) == 0
    assert consumer.serve(Request(request.tokens)) == 6 * TOKENS
    consumer.serve(other)
    assert stored(consumer, other) == [0]


# -- what is saved ---------------------------------------------------------------------


def test_what_the_store_has_is_not_sent_again(made: Made) -> None:
    first, second = made(), made()
    request = prompt(1, 6 * TOKENS + 1)
    first.serve(request)
    for engine in (first, second):
        again = Request(request.tokens)
        engine.scheduling.add(again, None)
        engine.admit(again)
        assert engine.compute(again, len(again.tokens)).saves == []


def test_what_the_engine_has_and_the_store_lost_is_sent_again(made: Made) -> None:
    engine = made()
    request = prompt(1, 6 * TOKENS + 1)
    engine.serve(request)
    engine.client.drop(engine.spaces[0][0].open_now("default"), request.block_hashes)
    engine.serve(Request(request.tokens), local=6 * TOKENS)
    assert stored(engine, request) == [6]


def test_each_block_is_saved_in_the_step_that_fills_it_and_once(made: Made) -> None:
    engine = made()
    request = prompt(1, 3 * TOKENS + TOKENS // 2)
    engine.scheduling.add(request, None)
    engine.admit(request)
    saved = []
    for until in range(TOKENS // 2, len(request.tokens) + 1, TOKENS // 2):  # chunks of the prompt
        plan = engine.compute(request, until)
        saved += [(part.position, len(part.blocks)) for s in plan.saves for part in s.parts]
    assert saved == [(0, 1), (1, 1), (2, 1)]
    for token in range(TOKENS):  # what is generated
        request.grow(token)
        plan = engine.compute(request, len(request.tokens))
        assert bool(plan.saves) == (token == TOKENS // 2 - 1)
    assert stored(engine, request) == [4]
    assert made().serve(Request(request.tokens)) == 4 * TOKENS


def test_the_store_is_told_where_in_its_chain_a_block_is(server: Daemon) -> None:
    spy = Spy(server.target)
    engine = Engine(server.target, "chained", client=spy).open()
    request = prompt(1, 5 * TOKENS)
    engine.scheduling.add(request, None)
    engine.admit(request)
    engine.compute(request, 2 * TOKENS)
    engine.compute(request, 5 * TOKENS)
    told = [(one["position"], one["parent"]) for one in spy.puts]
    assert told == [(0, b""), (2, request.block_hashes[1])]
    engine.close()


def test_what_is_generated_is_not_saved_where_that_is_switched_off(made: Made) -> None:
    engine = made(save_decode=False)
    request = prompt(1, 2 * TOKENS + 1)
    engine.serve(request)
    for token in range(2 * TOKENS):
        request.grow(token)
        engine.compute(request, len(request.tokens))
    assert stored(engine, request) == [2]


def test_tokens_that_are_guessed_are_not_saved_before_they_are_sure(made: Made) -> None:
    engine = made()
    request = prompt(1, 2 * TOKENS - 2)
    engine.scheduling.add(request, None)
    engine.admit(request)
    plan = engine.compute(request, len(request.tokens), guessed=5)
    assert [len(part.blocks) for save in plan.saves for part in save.parts] == [1]
    request.grow(1, 2, 3)
    engine.compute(request, len(request.tokens))
    assert stored(engine, request) == [2]


def test_blocks_that_a_window_has_left_behind_are_not_saved(made: Made) -> None:
    engine = made(groups=[FULL, WINDOW])
    request = prompt(1, 6 * TOKENS + 1)
    engine.scheduling.add(request, None)
    engine.place(request)
    engine.tables[request.request_id][1][:2] = [NULL, NULL]
    request.num_computed_tokens = 2 * TOKENS  # as after a hit in the engine's own memory
    plan = engine.compute(request, len(request.tokens))
    spans = [(part.group, part.position, len(part.blocks)) for part in plan.saves[0].parts]
    assert spans == [(0, 0, 6), (1, 2, 4)]


def test_a_save_that_finds_no_memory_is_counted_and_comes_with_the_next_block(
    server: Daemon,
) -> None:
    spy = Spy(server.target)
    engine = Engine(server.target, "dropping", client=spy, staging_bytes=16 << 10).open()
    (rank,) = engine.ranks
    room = (12 << 10) // rank.block_bytes[0]
    request = prompt(1, (room + 3) * TOKENS)
    engine.scheduling.add(request, None)
    engine.place(request)
    spy.puts_go.clear()
    engine.fill(request, 0, len(request.tokens))
    plan = engine.scheduling.step({request.request_id: len(request.tokens)}, engine.tables.get)
    rank.worker.save(plan.saves)  # nothing waits, whatever the store does
    dropped = rank.worker.dropped()
    assert dropped is not None
    assert dropped.first == {(request.request_id, 0): room}
    counts = rank.worker.counts()
    assert counts is not None
    assert counts.dropped_blocks == 3
    engine.scheduling.note(dropped=dropped)
    request.num_computed_tokens = len(request.tokens)
    spy.puts_go.set()
    rank.worker.drain()
    request.grow(*range(TOKENS))
    engine.compute(request, len(request.tokens))
    assert stored(engine, request) == [room + 4]
    engine.close()


def test_an_engine_with_nothing_to_compute_waits_a_moment_for_a_load(
    server: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would ask again at once, and keep the interpreter's lock from the copy."""
    spy = Spy(server.target)
    engine = Engine(server.target, "idle", client=spy).open()
    request = prompt(1, 6 * TOKENS + 1)
    engine.serve(request)
    again = Request(request.tokens)
    engine.scheduling.add(again, None)
    found = engine.scheduling.match(again.request_id, 0)
    engine.place(again)
    engine.scheduling.allocated(again.request_id, engine.tables[again.request_id], found or 0)
    plan, worker = engine.scheduling.step({}, engine.tables.get), engine.ranks[0].worker
    assert plan.idle
    assert not engine.scheduling.step({again.request_id: 1}, engine.tables.get).idle
    spy.gets_go.clear()
    worker.begin_loads(plan.loads)
    assert not worker.ended(idle=True).requests  # a moment, and not until it is over
    monkeypatch.setattr("kvstore_integrations.vllm.worker._IDLE_S", WAIT_S)
    assert not worker.ended().requests
    spy.gets_go.set()
    assert worker.ended(idle=True).requests == {again.request_id}
    begin = time.monotonic()
    assert not worker.ended(idle=True).requests  # nothing is under way
    assert time.monotonic() - begin < WAIT_S
    engine.close()


def test_loads_are_not_held_up_by_saves(server: Daemon) -> None:
    spy = Spy(server.target)
    engine = Engine(server.target, "held up", client=spy).open()
    request = prompt(1, 6 * TOKENS + 1)
    engine.serve(request)
    spy.puts_go.clear()
    other = prompt(2, 6 * TOKENS + 1)
    engine.scheduling.add(other, None)
    engine.place(other)
    engine.fill(other, 0, len(other.tokens))
    plan = engine.scheduling.step({other.request_id: len(other.tokens)}, engine.tables.get)
    engine.ranks[0].worker.save(plan.saves)
    again = Request(request.tokens)
    engine.scheduling.add(again, None)
    found = engine.scheduling.match(again.request_id, 0)
    assert found == 6 * TOKENS
    engine.place(again)
    engine.scheduling.allocated(again.request_id, engine.tables[again.request_id], found)
    engine.ranks[0].worker.begin_loads(engine.scheduling.step({}, engine.tables.get).loads)
    until(lambda: bool(engine.ranks[0].worker.ended().requests))
    assert engine.holds(again, 0, 6 * TOKENS)
    spy.puts_go.set()
    engine.close()


def test_blocks_may_be_written_by_others_as_soon_as_the_step_is_over(server: Daemon) -> None:
    """So neither a preemption nor the end of a request waits for a save."""
    spy = Spy(server.target)
    engine = Engine(server.target, "overwritten", client=spy).open()
    other = Engine(server.target, "overwritten").open()
    request = prompt(1, 6 * TOKENS + 1)
    engine.scheduling.add(request, None)
    engine.place(request)
    engine.fill(request, 0, len(request.tokens))
    spy.puts_go.clear()
    plan = engine.scheduling.step({request.request_id: len(request.tokens)}, engine.tables.get)
    engine.ranks[0].worker.save(plan.saves)
    for layers in engine.ranks[0].groups:
        for layer in layers:
            layer.zero_()
    spy.puts_go.set()
    engine.ranks[0].worker.drain()
    again = Request(request.tokens)
    assert other.serve(again) == 6 * TOKENS
    assert other.holds(again, 0, 6 * TOKENS)
    engine.close()
    other.close()


def test_what_a_request_says_of_the_future_reaches_the_store_behind_its_saves(
    made: Made, server: Daemon
) -> None:
    engine = made()
    request = prompt(1, 6 * TOKENS + 1)
    engine.serve(request, pin_s=600.0)
    engine.scheduling.end(request.request_id)
    engine.save(engine.scheduling.step({}, engine.tables.get))
    assert engine.client.stats().pinned_blocks == 6
    short = prompt(2, 3 * TOKENS)
    engine.serve(short, ttl_s=0.2)
    until(lambda: stored(engine, short) == [0])
    assert stored(engine, request) == [6]


def test_a_request_that_asks_for_it_is_neither_looked_up_nor_stored(
    made: Made, server: Daemon
) -> None:
    engine = made()
    request = prompt(1, 6 * TOKENS + 1)
    engine.serve(request, cache=False)
    assert stored(engine, request) == [0]
    engine.serve(request)
    assert stored(engine, request) == [6]
    assert made().serve(prompt(1, 6 * TOKENS + 1), cache=False) == 0
    assert made().serve(prompt(1, 6 * TOKENS + 1)) == 6 * TOKENS


# -- what goes wrong -------------------------------------------------------------------


@pytest.mark.parametrize("groups", [[FULL], [FULL, WINDOW]])
def test_what_did_not_load_is_not_promised_to_that_request_again(
    made: Made, server: Daemon, groups: list[Group]
) -> None:
    first, second = made(groups=groups), made(groups=groups)
    request = prompt(1, 6 * TOKENS + 1)
    first.serve(request)
    assert spoil(server, one_bit_off) >= 6
    again = Request(request.tokens)
    second.scheduling.add(again, None)
    assert second.admit(again) == 0
    assert second.scheduling.match(again.request_id, 0) == 0
    for _ in groups:  # one request finds what is corrupted of one group, and stores that again
        second.serve(Request(request.tokens))
    last = Request(request.tokens)
    assert made(groups=groups).admit_after_add(last) == 6 * TOKENS


@pytest.mark.parametrize("as_a_whole", [False, True])
def test_a_request_is_not_promised_what_did_not_load_though_it_is_there(
    made: Made, as_a_whole: bool
) -> None:
    first, second = made(), made()
    request = prompt(1, 6 * TOKENS + 1)
    first.serve(request)
    again, other = Request(request.tokens), Request(request.tokens)
    for one in (again, other):
        second.scheduling.add(one, None)
        assert second.scheduling.match(one.request_id, 0) == 6 * TOKENS
        second.place(one)
        second.scheduling.allocated(one.request_id, second.tables[one.request_id], 6 * TOKENS)
    table = second.tables[again.request_id][0]
    if as_a_whole:
        second.scheduling.note(finished=[again.request_id], failed=[again.request_id])
    else:
        second.scheduling.note(lost_blocks={table[4], table[2]})  # of several workers, one by one
        second.scheduling.note(finished=[again.request_id], lost_blocks={table[5]})
    left = 0 if as_a_whole else 2 * TOKENS
    assert second.scheduling.match(again.request_id, 0) == left
    assert second.scheduling.match(other.request_id, 0) == 6 * TOKENS


def test_the_blocks_before_a_lost_one_are_kept(made: Made) -> None:
    first, second = made(), made()
    request = prompt(1, 6 * TOKENS + 1)
    first.serve(request)
    again = Request(request.tokens)
    second.scheduling.add(again, None)
    found = second.scheduling.match(again.request_id, 0)
    second.place(again)
    second.scheduling.allocated(again.request_id, second.tables[again.request_id], found)
    first.client.drop(first.spaces[0][0].open_now("default"), request.block_hashes[4:5])
    assert second.load(second.scheduling.step({}, second.tables.get), found) == 4 * TOKENS
    assert second.holds(again, 0, 4 * TOKENS)
    again.num_computed_tokens = 0  # as after a preemption
    assert second.scheduling.match(again.request_id, 0) == 4 * TOKENS


def test_a_dead_store_costs_misses_and_nothing_else(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "16MiB") as server:
        engine = Engine(server.target).open()
        _lose(server, engine)
        engine.close()


def _lose(server: Daemon, engine: Engine) -> None:
    request = prompt(1, 6 * TOKENS + 1)
    engine.serve(request)
    again = Request(request.tokens)
    engine.scheduling.add(again, None)
    found = engine.scheduling.match(again.request_id, 0)
    assert found == 6 * TOKENS
    engine.place(again)
    engine.scheduling.allocated(again.request_id, engine.tables[again.request_id], found)
    server.kill(signal.SIGKILL)
    loaded = engine.load(engine.scheduling.step({}, engine.tables.get), found)
    assert engine.holds(again, 0, loaded)
    begin = time.monotonic()
    assert engine.serve(Request(request.tokens)) == 0
    engine.serve(prompt(2, 6 * TOKENS))
    assert time.monotonic() - begin < WAIT_S / 2


def test_a_store_that_answers_no_more_holds_no_step_up(server: Daemon, made: Made) -> None:
    engine = made()
    request = prompt(1, 6 * TOKENS + 1)
    engine.serve(request)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        begin = time.monotonic()
        other = prompt(2, 6 * TOKENS)
        for one in (Request(request.tokens), other):
            engine.scheduling.add(one, {"tenant": "another"} if one is other else None)
            engine.scheduling.match(one.request_id, 0)
            engine.place(one)
            count = {one.request_id: len(one.tokens)}
            engine.ranks[0].worker.save(engine.scheduling.step(count, engine.tables.get).saves)
        assert time.monotonic() - begin < 1.0
    finally:
        os.kill(server.process.pid, signal.SIGCONT)


def test_a_new_tenant_waits_for_its_namespace_but_not_for_long(
    made: Made, monkeypatch: pytest.MonkeyPatch, server: Daemon
) -> None:
    now = [100.0]
    monkeypatch.setattr("kvstore_integrations.vllm.scheduling.monotonic", lambda: now[0])
    engine = made()
    request = prompt(1, 6 * TOKENS)
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        engine.scheduling.add(request, {"tenant": "new"})
        assert engine.scheduling.match(request.request_id, 0) is None
        now[0] += 0.05
        assert engine.scheduling.match(request.request_id, 0) is None
        now[0] += 0.06
        assert engine.scheduling.match(request.request_id, 0) == 0
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    until(lambda: engine.scheduling.match(request.request_id, 0) == 0)


def test_a_full_store_takes_what_it_can(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "1MiB") as server:
        engine = Engine(server.target).open()
        for seed in range(12):
            engine.serve(prompt(seed, 40 * TOKENS))
            engine.tables.clear()
            engine._free = [list(range(1, 96))]
        request = prompt(11, 40 * TOKENS)
        loaded = engine.serve(request)
        assert loaded > 0
        assert engine.holds(request, 0, loaded)
        engine.close()


def test_staging_memory_that_holds_no_block_is_an_error_at_start(server: Daemon) -> None:
    with (
        pytest.raises(ConfigurationError, match=r"staging_bytes: 1024 is too little.*set it to"),
        KVStoreClient(server.target) as client,
    ):
        Engine(server.target, client=client, staging_bytes=1024)


# -- small parts -----------------------------------------------------------------------


def test_a_session_that_takes_tokens_back_is_hashed_anew(made: Made) -> None:
    first, second = made(), made()
    request = prompt(1, 6 * TOKENS + 1)
    first.serve(request)
    other = prompt(2, 4 * TOKENS + 1)
    second.scheduling.add(other, None)
    assert second.scheduling.match(other.request_id, 0) == 0
    other.tokens, other.block_hashes = list(request.tokens), list(request.block_hashes)
    assert second.scheduling.match(other.request_id, 0) == 6 * TOKENS


def test_a_part_is_cut_with_its_parent() -> None:
    hashes = [bytes([i]) * 32 for i in range(5)]
    part = Part(
        group=1, position=7, hashes=b"".join(hashes), blocks=(4, 5, 6, 7, 8), parent=b"p" * 32
    )
    assert part.cut(0, 2) == Part(
        group=1, position=7, hashes=b"".join(hashes[:2]), blocks=(4, 5), parent=b"p" * 32
    )
    assert part.cut(3, 5) == Part(
        group=1, position=10, hashes=b"".join(hashes[3:]), blocks=(7, 8), parent=hashes[2]
    )


def test_what_several_workers_drop_is_dropped() -> None:
    one, two = Dropped({("a", 0): 5, ("b", 0): 2}), Dropped({("a", 0): 3, ("a", 1): 9})
    both = Dropped({("a", 0): 3, ("b", 0): 2, ("a", 1): 9})
    assert one.and_of(two) == two.and_of(one) == both


def test_adapters_are_told_apart_by_their_files_and_not_by_their_name(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    adapters = Adapters()
    one = tmp_path / "adapter"
    one.mkdir()
    (one / "adapter_model.safetensors").write_bytes(b"weights")
    first = adapters.digest("sql", 1, str(one))
    assert first is not None
    assert len(first) == 32
    (one / "adapter_model.safetensors").write_bytes(b"other weights")
    assert adapters.digest("sql", 1, str(one)) == first  # what the engine has in its memory
    assert adapters.digest("sql", 1, str(one), again=True) != first
    assert Adapters().digest("sql", 1, str(one)) != first
    with caplog.at_level(logging.WARNING):
        assert adapters.digest("sql", 2, "org/adapter") is None
    assert "requests with the adapter sql are not cached" in caplog.text


def test_a_long_prompt_is_looked_up_in_no_time(made: Made) -> None:
    engine = made()
    request = prompt(1, 90 * TOKENS + 1)
    engine.serve(request)
    long = Request(request.tokens + prompt(2, 8102 * TOKENS).tokens)
    engine.scheduling.add(long, None)
    took = []
    for _ in range(20):
        begin = time.perf_counter()
        assert engine.scheduling.match(long.request_id, 0) == 90 * TOKENS
        took.append(time.perf_counter() - begin)
    assert min(took) < 0.005


def until(there: Callable[[], bool]) -> None:
    """Asks over and over, for a long time at most."""
    end = time.monotonic() + WAIT_S
    while not there():
        assert time.monotonic() < end
