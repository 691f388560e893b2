"""LMCache's objects in a real daemon: stored, found, locked and loaded, and what goes wrong."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from integrations.lmcache_rig import (
    BYTES,
    WAIT_S,
    WIDE,
    Key,
    Layout,
    Server,
    bytes_of,
    keys_of,
    result_of,
    wait_until,
)
from integrations.pool import one_bit_off, spoil

from daemon import Daemon, daemon, notice_end
from kvstore import limits
from kvstore_client import KVStoreClient

_numbers = itertools.count()


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests that leave it as it is; what each of them stores is its own."""
    with daemon(tmp_path_factory.mktemp("store"), "--dram", "16MiB") as process:
        yield process


@pytest.fixture(autouse=True)
def own_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that another test has stored is of these weights."""
    monkeypatch.setattr(Server, "revision", f"test-{next(_numbers)}")


@pytest.fixture
def server(running: Daemon) -> Iterator[Server]:
    made = Server(running.target)
    yield made
    made.close()


@pytest.fixture
def other(running: Daemon) -> Iterator[Server]:
    """Another process, as far as the store can tell."""
    made = Server(running.target)
    yield made
    made.close()


# -- what is stored is found and loaded ------------------------------------------------


def test_another_process_finds_at_once_and_loads_what_was_stored(
    server: Server, other: Server
) -> None:
    keys = keys_of("a", 6)
    stored = server.store(keys)
    assert stored.complete
    assert stored.new == tuple(range(6))
    assert other.found([*keys, *keys_of("b", 1)]) == [True] * 6 + [False]
    assert other.load(keys) == [True] * 6
    assert server.store(keys).new == ()


def test_chains_of_ranks_groups_and_sizes_mix_in_one_task(server: Server, other: Server) -> None:
    rows = [keys_of("a", 3, kv_rank=rank) for rank in (7, 8)]
    wide = keys_of("a", 3, object_group_id=1)
    server.store(rows[0])
    server.store(rows[1][:1])
    server.store(wide[1:], WIDE)
    keys = [*rows[1], *rows[0], *wide]
    items = other.items([*rows[1], *rows[0]]) + other.items(wide, WIDE)
    number = other.tier.look_up(items)
    found = other.wait(1, lambda: other.tier.found(number))
    assert found == [True, False, False] + [True] * 3 + [False, True, True]
    there = [i for i, hit in enumerate(found) if hit]
    layouts = [Layout()] * 6 + [WIDE] * 3
    places = np.cumsum([0, *(layout.kind("m").nbytes for layout in layouts)])
    memory = [other.memory[places[i] : places[i + 1]] for i in there]
    number = other.tier.load([items[i] for i in there], memory)
    assert other.wait(2, lambda: other.tier.loaded(number)) == [True] * len(there)
    for i, row in zip(there, memory, strict=True):
        assert np.array_equal(row, bytes_of(keys[i], layouts[i]))


def test_objects_behind_a_gap_are_found_locked_and_loaded(server: Server) -> None:
    keys = keys_of("a", 9)
    server.store([keys[i] for i in (0, 1, 3, 4, 8)])
    there = [True, True, False, True, True, False, False, False, True]
    assert server.found(keys) == there
    assert server.tier.locked == 5
    assert server.load(keys) == there


def test_a_result_is_there_once_and_each_kind_has_its_own_signal(server: Server) -> None:
    keys = keys_of("a", 2)
    server.store(keys)  # `Server.wait` looks at the signals
    assert server.tier.stored() == {}
    number = server.tier.look_up(server.items(keys))
    assert server.wait(1, lambda: server.tier.found(number)) == [True, True]
    assert server.tier.found(number) is None
    number = server.tier.load(server.items(keys), server.rows(keys))
    assert server.wait(2, lambda: server.tier.loaded(number)) == [True, True]
    assert server.tier.loaded(number) is None


def test_objects_are_put_and_got_where_they_lie(server: Server) -> None:
    keys = keys_of("a", 2)
    server.store(keys)
    server.load(keys)
    moved = [args[2] for name, args, _ in server.spy.calls if name in ("put", "get_into")]
    assert len(moved) == 2
    assert all(np.shares_memory(row, server.memory) for rows in moved for row in rows)


def test_looking_for_what_is_missing_asks_the_daemon_nothing(server: Server) -> None:
    keys = keys_of("a", 4)
    assert server.found(keys) == [False] * 4  # opens the namespace
    server.spy.calls.clear()
    assert server.found(keys) == [False] * 4
    assert {name for name, _, _ in server.spy.calls} == {"match"}


def test_dropped_objects_are_gone(server: Server) -> None:
    keys = keys_of("a", 3)
    server.store(keys)
    line, names = server.items(keys)[0].line, [item.name for item in server.items(keys[:2])]
    assert server.tier.drop("m", line, names) == BYTES
    assert server.hits(keys) == 1
    assert server.tier.drop("another model", line, names) == 0


def test_many_threads_at_once_get_their_own_results(running: Daemon) -> None:
    server = Server(running.target, memory_bytes=8 * 4 * BYTES)
    failed: list[BaseException] = []

    def work(i: int) -> None:
        try:
            keys = keys_of(f"thread {i}", 4)
            rows = [server.memory[(4 * i + j) * BYTES :][:BYTES] for j in range(4)]
            items = server.items(keys)
            for key, row in zip(keys, rows, strict=True):
                row[:] = bytes_of(key, Layout())
            server.tier.store(items, rows)
            for _ in range(50):
                wait_until(lambda: _found(server, items) == [True] * 4)
                for row in rows:
                    row[:] = 0
                assert _loaded(server, items, rows) == [True] * 4
                for key, row in zip(keys, rows, strict=True):
                    assert np.array_equal(row, bytes_of(key, Layout()))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * WAIT_S)
    assert not failed
    wait_until(lambda: server.tier.locked == 0)
    server.close()


def _loaded(server: Server, items: list[Any], rows: list[np.ndarray]) -> list[bool]:
    number = server.tier.load(items, rows)
    return result_of(lambda: server.tier.loaded(number))


def _found(server: Server, items: list[Any]) -> list[bool]:
    number = server.tier.look_up(items)
    found = result_of(lambda: server.tier.found(number))
    server.tier.unlock([item.name for item, hit in zip(items, found, strict=True) if hit])
    return found


# -- what shares nothing ---------------------------------------------------------------


@pytest.mark.parametrize(
    "changed", [{"cache_salt": "user"}, {"kv_rank": 1}, {"object_group_id": 1}, {"model_name": "n"}]
)
def test_another_salt_rank_group_or_model_hits_nothing(
    server: Server, changed: dict[str, Any]
) -> None:
    keys = keys_of("a", 3)
    server.store(keys)
    assert server.hits([dataclasses.replace(key, **changed) for key in keys]) == 0
    assert server.hits(keys) == 3


@pytest.mark.parametrize(
    "layout",
    [
        WIDE,
        Layout(shapes=((2, 4, 32, 8),)),  # as many bytes
        Layout(dtypes=(np.dtype("int16"),)),
        Layout(shapes=((2, 2, 16, 16),) * 2, dtypes=(np.dtype("float16"),) * 2),
    ],
)
def test_another_shape_or_dtype_hits_nothing(server: Server, layout: Layout) -> None:
    keys = keys_of("a", 3)
    server.store(keys)
    assert server.hits(keys, layout) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"tenant": "b"},
        {"model_revision": "r2"},
        {"model_revisions": {"m": "r3"}},
        {"facts": {"device": "another"}},
    ],
)
def test_another_tenant_revision_or_machine_hits_nothing(
    running: Daemon, server: Server, settings: dict[str, Any]
) -> None:
    keys = keys_of("a", 3)
    server.store(keys)
    stranger = Server(running.target, **settings)
    assert stranger.hits(keys) == 0
    assert stranger.store(keys).new == (0, 1, 2)
    stranger.close()


# -- locks -----------------------------------------------------------------------------


def fill(server: Server, rounds: int = 12) -> None:
    """More than twice as much as the pool holds."""
    for i in range(rounds):
        server.store(keys_of(f"more {i}", 64))


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Server]:
    """A server whose store holds 300 objects."""
    with daemon(tmp_path, "--dram", "4MiB") as process:
        made = Server(process.target)
        yield made
        made.close()


def test_a_locked_object_outlasts_a_full_pool_until_it_is_unlocked(small: Server) -> None:
    locked, free = keys_of("locked", 4), keys_of("free", 4)
    small.store(locked)
    small.store(free)
    assert small.found(locked) == [True] * 4
    fill(small)
    assert small.load([*locked, *free]) == [True] * 4 + [False] * 4
    small.unlock(locked)
    assert small.tier.locked == 0
    fill(small)
    assert small.hits(locked) == 0


def test_an_object_is_locked_as_often_as_it_was_found(small: Server) -> None:
    keys = keys_of("locked", 4)
    small.store(keys)
    for _ in range(2):
        assert small.found(keys) == [True] * 4
    small.unlock(keys)
    assert small.tier.locked == 4
    fill(small)
    assert small.load(keys) == [True] * 4
    small.unlock(keys)
    fill(small)
    assert small.hits(keys) == 0


def test_unlocking_a_part_keeps_the_rest(small: Server) -> None:
    keys = keys_of("locked", 4)
    small.store(keys)
    assert small.found(keys) == [True] * 4
    small.unlock([*keys[2:], *keys_of("never locked", 1)])
    fill(small)
    assert small.load(keys[:2]) == [True] * 2


def test_a_lock_ends_with_its_process(small: Server) -> None:
    keys = keys_of("locked", 4)
    small.store(keys)
    script = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from integrations.lmcache_rig import Server, keys_of\n"
        "Server.revision = sys.argv[3]\n"
        "assert all(Server(sys.argv[1]).found(keys_of('locked', 4)))\n"
        "print('locked', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c", script, small.spy.client.target),
            *(str(Path(__file__).parents[1]), Server.revision),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout
    assert holder.stdout.readline() == "locked\n"
    fill(small)
    assert small.load(keys) == [True] * 4
    holder.kill()
    holder.communicate(timeout=WAIT_S)

    def gone() -> bool:
        fill(small)
        return small.hits(keys) == 0

    wait_until(gone)


def test_a_pool_full_of_locked_objects_takes_no_more_and_says_so(
    small: Server, caplog: pytest.LogCaptureFixture
) -> None:
    fill(small)
    for i in range(12):
        small.found(keys_of(f"more {i}", 64))
    with caplog.at_level(logging.WARNING):
        stored = small.store(keys_of("new", 64))
    assert not stored.complete
    assert small.found(keys_of("new", 64)) == [i in stored.new for i in range(64)]
    (said,) = [record.message for record in caplog.records]
    assert said.endswith("objects were not stored: the store is away or full")


def test_over_grpc_nothing_is_copied_to_lock_it(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "16MiB", grpc=True) as process:
        server = Server(f"grpc+unix://{process.grpc_socket}", leases=False)
        keys = keys_of("a", 3)
        assert server.store(keys).complete
        assert server.found(keys) == [True] * 3
        assert server.spy.count("view") == 0
        assert server.load(keys) == [True] * 3
        server.unlock(keys)
        server.close()


# -- what goes wrong -------------------------------------------------------------------


def test_a_full_pool_evicts_and_never_serves_other_bytes(server: Server) -> None:
    rounds = 60  # of 64 objects of 8 KiB each: about twice the pool
    for i in range(rounds):
        assert server.store(keys_of(f"round {i}", 64)).complete
    loaded = sum(sum(server.load(keys_of(f"round {i}", 64))) for i in range(rounds))
    assert 0 < loaded < rounds * 64 * 0.9


def test_corrupted_bytes_are_a_miss_and_can_be_stored_anew(running: Daemon, server: Server) -> None:
    keys = keys_of("a", 3)
    server.store(keys)
    wrong = bytes_of(keys[1], Layout())
    spoil(running, lambda block: one_bit_off(block) if np.array_equal(block, wrong) else block)
    assert server.load(keys) == [True, False, True]
    assert server.found(keys) == [True, False, True]
    assert server.store(keys).new == (2,)  # as many as are new, told as the last ones
    assert server.load(keys) == [True] * 3


def test_a_store_that_dies_between_look_up_and_load_costs_misses_and_comes_back(
    tmp_path: Path,
) -> None:
    keys = keys_of("a", 3)
    with daemon(tmp_path, "--dram", "16MiB") as process:
        server = Server(process.target)
        server.store(keys)
        assert server.found(keys) == [True] * 3
        process.kill()
        notice_end(server.spy.client)
    assert server.load(keys) == [False] * 3
    server.unlock(keys)
    assert server.tier.locked == 0
    assert not server.store(keys).complete
    assert server.found(keys) == [False] * 3
    with daemon(tmp_path, "--dram", "16MiB"):
        server.spy.client.info(timeout_s=WAIT_S)
        assert server.found(keys) == [False] * 3
        assert server.store(keys).complete
        assert server.found(keys) == [True] * 3
        assert server.load(keys) == [True] * 3
        server.close()


def test_without_a_store_at_first_it_is_used_as_soon_as_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of("a", 2)
    server = Server(f"unix://{tmp_path}/kvstore.sock", lazy=True)
    monkeypatch.setattr(
        server.spy, "open_namespace", _shortly(server.spy.client.open_namespace), raising=False
    )
    assert server.found(keys) == [False] * 2
    assert not server.store(keys).complete
    with daemon(tmp_path, "--dram", "16MiB"):
        server.spy.client.info(timeout_s=WAIT_S)
        wait_until(lambda: server.store(keys).complete)
        assert server.found(keys) == [True] * 2
        server.close()


def _shortly(opened: Any) -> Any:
    return lambda name, layout: opened(name, layout, timeout_s=0.1)


def test_more_tasks_than_may_wait_fail_at_once(
    running: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, go, begun = Server(running.target, most_stores=2), threading.Event(), threading.Event()
    put = server.spy.client.put

    def slowly(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert go.wait(WAIT_S)
        return put(*args, **kwargs)

    monkeypatch.setattr(server.spy.client, "put", slowly)
    keys = keys_of("a", 5)
    rows = server.rows(keys)
    first = server.tier.store(server.items(keys[:1]), rows[:1])
    assert begun.wait(WAIT_S)
    waiting = [server.tier.store(server.items([key]), rows[:1]) for key in keys[1:3]]
    late = [server.tier.store(server.items([key]), rows[:1]) for key in keys[3:]]
    assert {n: s.complete for n, s in server.tier.stored().items()} == dict.fromkeys(late, False)
    go.set()
    done: dict[int, Any] = {}
    wait_until(lambda: done.update(server.tier.stored()) or len(done) == 3)
    assert {n: s.complete for n, s in done.items()} == dict.fromkeys([first, *waiting], True)
    server.close()


def test_a_task_that_raises_counts_as_missing(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = keys_of("a", 2)
    server.store(keys)

    def broken(*_: Any, **__: Any) -> Any:
        raise OSError("no memory")

    for name in ("put", "match", "get_into"):
        monkeypatch.setattr(server.spy.client, name, broken)
    assert not server.store(keys).complete
    assert server.found(keys) == [False] * 2
    assert server.load(keys) == [False] * 2
    assert [record.message for record in caplog.records if record.levelno >= logging.ERROR] == [
        "a task failed; its objects count as missing"
    ] * 3


def test_a_look_up_that_raises_leaves_nothing_locked(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [*keys_of("a", 3), *keys_of("a", 5, kv_rank=1)]
    server.store([*keys[:3], *keys[3:5], *keys[6:]])
    match, asked = server.spy.client.match, []

    def breaks_behind_the_gap(*args: Any, **kwargs: Any) -> Any:
        asked.append(args)
        if len(asked) > 2:
            raise OSError("no memory")
        return match(*args, **kwargs)

    monkeypatch.setattr(server.spy.client, "match", breaks_behind_the_gap)
    assert server.found(keys) == [False] * 8
    assert server.spy.count("view") == 2
    assert server.tier.locked == 0


@pytest.mark.parametrize(
    ("keys", "layout", "message"),
    [
        ([Key(b"12345678")], Layout(), "named by hashes that two prompts may share"),
        (keys_of("a", 1), Layout(((64,),), (np.dtype("uint8"),)), "a `serde` packs the objects"),
        (
            keys_of("a", 1),
            Layout(((2, 1 << 12, 16, limits.MAX_BLOCK_BYTES >> 17),)),
            "Choose other blocks in the engine's configuration",
        ),
    ],
)
def test_what_cannot_be_cached_is_said_once(
    server: Server,
    caplog: pytest.LogCaptureFixture,
    keys: list[Key],
    layout: Layout,
    message: str,
) -> None:
    row = np.zeros(layout.kind("m").nbytes, np.uint8)
    for _ in range(2):
        number = server.tier.store(server.items(keys, layout), [row])
        assert not server.wait(0, server.tier.stored)[number].complete
    assert server.found(keys, layout) == [False]
    said = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert message in said[0]
    assert server.store(keys_of("b", 1)).complete


def test_a_model_of_unknown_revision_is_not_cached_and_it_says_what_to_set(
    running: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(running.target, model_revision="")
    assert not server.store(keys_of("a", 2)).complete
    assert server.found(keys_of("a", 2)) == [False] * 2
    said = [record.message for record in caplog.records if record.levelno == logging.ERROR]
    assert len(said) == 1
    assert "`model_revision`" in said[0]
    server.close()


def test_folders_are_told_apart_by_their_weights_and_names_by_all_of_their_path(
    running: Daemon, tmp_path: Path
) -> None:
    folders = [tmp_path / name / "final" for name in ("a", "b", "c")]
    for folder, weights in zip(folders, (b"1", b"1", b"2"), strict=True):
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")
        (folder / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}" + weights)
    by_weights = Server(running.target, model_revision="")
    keys = [keys_of("a", 2, model_name=str(folder)) for folder in folders]
    by_weights.store(keys[0])
    assert [by_weights.hits(some) for some in keys] == [2, 2, 0]
    by_weights.close()
    by_revision = Server(running.target, model_revision="r1")
    by_revision.store(keys[0])
    assert [by_revision.hits(some) for some in keys] == [2, 0, 0]
    by_revision.close()


def test_closing_ends_all_threads(running: Daemon) -> None:
    before = threading.active_count()
    server = Server(running.target)
    server.store(keys_of("a", 2))
    server.found(keys_of("a", 2))
    server.close()
    assert threading.active_count() == before


def test_stored_objects_outlive_their_server(running: Daemon, server: Server) -> None:
    with KVStoreClient(running.target) as client:
        before = client.stats().blocks
        server.store(keys_of("a", 4))
        wait_until(lambda: client.stats().blocks == before + 4)
