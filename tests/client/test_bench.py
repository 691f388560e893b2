"""`kvstore bench`: what it plans, that it notices wrong bytes, and that it leaves nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from client.scripted import stats

from daemon import Daemon, daemon
from kvstore import KVStore, limits
from kvstore.errors import InvalidArgument, Unavailable
from kvstore.session.base import PutResult
from kvstore_client import KVStoreClient
from kvstore_client.cli import bench, bench_process
from kvstore_client.cli.app import run
from kvstore_client.cli.bench_client import Client, Measured, Plan, make_pattern
from kvstore_client.cli.bench_plan import NAMESPACE, Case, fit, layout_of, parse_grid, slot_bytes

MIB = 1 << 20
SIZE = 64 << 10
END_S = 30.0


def plan(**given: Any) -> Plan:
    """One client that reads its own blocks, each once a phase."""
    usual = {"seed": 3, "client": 0, "reads_from": 0, "size_bytes": SIZE, "batch": 4, "blocks": 8}
    return Plan(**{**usual, "seconds": 1e-6, **given})


# -- what will be done ----------------------------------------------------------------


def test_grid_is_every_combination_in_order() -> None:
    cases = parse_grid("1MiB,64KiB,1MiB", "8,1", "2")
    assert [(case.size_bytes, case.batch, case.clients) for case in cases] == [
        *((SIZE, 1, 2), (SIZE, 8, 2)),
        *((MIB, 1, 2), (MIB, 8, 2)),
    ]
    assert len(parse_grid(None, None, None)) == 3 * 2 * 2


@pytest.mark.parametrize(
    ("grid", "field"),
    [
        (("x", None, None), "size"),
        (("0", None, None), "size"),
        (("1TiB", None, None), "size"),
        (("1MiB,", None, None), "size"),
        ((None, "0", None), "batch"),
        ((None, "1,x", None), "batch"),
        ((None, str(limits.MAX_KEYS_PER_CALL + 1), None), "batch"),
        ((None, None, "-1"), "clients"),
        ((None, None, "65"), "clients"),
    ],
)
def test_bad_grids_name_the_field(grid: tuple[str | None, ...], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_grid(*grid)
    assert caught.value.field == field


def test_only_what_fits_beside_the_blocks_of_others_is_run() -> None:
    small, large = cases = parse_grid("64KiB,1MiB", "16", "1")
    empty = stats(total_bytes=32 * MIB)
    busy = stats(total_bytes=32 * MIB, used_bytes=20 * MIB, blocks=20)
    assert fit(cases, empty, 1024, force=False, chosen=False).cases == (small, large)
    grid = fit(cases, busy, 1024, force=False, chosen=False)
    assert (grid.cases, grid.left_out) == ((small,), (large,))
    assert fit(cases, busy, 1024, force=True, chosen=True).cases == (small, large)
    for chosen, blocks in [(True, 1024), (False, 30)]:  # 30: there is no room for 16 more
        with pytest.raises(InvalidArgument, match="--force") as caught:
            fit(cases, busy, blocks, force=False, chosen=chosen)
        assert caught.value.field == "size"


def test_a_client_s_blocks_are_whole_batches_that_find_room() -> None:
    case = Case(size_bytes=MIB, batch=4, clients=2)
    assert case.least_bytes == 8 * slot_bytes(MIB)
    for free_bytes, free_blocks, expected in [
        (1 << 40, 1 << 20, 124),  # the working set
        (64 * MIB, 1 << 20, 20),
        (64 * MIB, 17, 8),
        (0, 0, 4),  # with --force: one batch, whatever is there
    ]:
        assert case.blocks_per_client(free_bytes, free_blocks) == expected


# -- one client -----------------------------------------------------------------------


@pytest.fixture
def store() -> Iterator[KVStore]:
    """A small store of this process."""
    with KVStore(dram=8 * MIB) as made:
        yield made


@pytest.mark.parametrize("batch", [1, 4])
def test_a_client_puts_matches_gets_and_views_all_its_blocks(store: KVStore, batch: int) -> None:
    client = Client(store, plan(batch=batch))
    for phase in ("put", "match", "get", "view"):
        found = client.run(phase)
        assert len(found.latencies_ns) == 8 // batch
        assert min(found.latencies_ns) > 0
        assert (found.blocks, found.misses, found.wrong) == (8, 0, 0)
        assert found.checked == (8 if phase in ("get", "view") else 0)


def test_rounds_go_on_until_the_time_is_over(store: KVStore) -> None:
    client = Client(store, plan(seconds=0.05))
    for phase in ("put", "get"):
        found = client.run(phase)
        assert len(found.latencies_ns) % 2 == 0
        assert found.blocks == 4 * len(found.latencies_ns) > 8
        assert found.misses == 0
    assert 8 < found.checked < found.blocks  # all of the first round, then a sample


def test_a_client_reads_what_its_neighbour_put(store: KVStore) -> None:
    Client(store, plan(client=1)).run("put")
    client = Client(store, plan(reads_from=1))
    assert client.run("put").blocks == 8
    for phase in ("match", "get"):
        found = client.run(phase)
        assert (found.blocks, found.wrong) == (8, 0)
    assert not np.array_equal(make_pattern(plan(), 0).stored, make_pattern(plan(), 1).stored)


@pytest.mark.parametrize("phase", ["get", "view"])
def test_a_single_wrong_byte_is_noticed(store: KVStore, phase: str) -> None:
    namespace = store.open_namespace(NAMESPACE, layout_of(SIZE))
    pattern = make_pattern(plan(), 0)
    pattern.stored[5, -1] ^= 1
    store.put(namespace, pattern.hashes, list(pattern.stored))
    client = Client(store, plan())
    client.run("match")
    assert client.run(phase).wrong == 1


def test_missing_blocks_are_counted_and_not_checked(store: KVStore) -> None:
    namespace = store.open_namespace(NAMESPACE, layout_of(SIZE))
    client = Client(store, plan())
    client.run("put")
    store.drop(namespace, make_pattern(plan(), 0).hashes[2:3])
    for phase in ("match", "get", "view"):
        found = client.run(phase)
        assert (found.blocks, found.misses, found.wrong) == (6, 2, 0)


def test_blocks_that_are_not_stored_are_no_throughput(
    store: KVStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = PutResult(stored=1, existed=0, waiting=0, not_stored=3)
    monkeypatch.setattr(store, "put", lambda *_: full)
    found = Client(store, plan()).run("put")
    assert (found.blocks, found.misses) == (2, 6)


def test_a_row_sums_up_all_clients() -> None:
    case = Case(size_bytes=1000, batch=2, clients=2)
    fast = Measured(latencies_ns=[1000] * 99, blocks=198, checked=2)
    slow = Measured(latencies_ns=[9000], blocks=1, misses=1, checked=1, wrong=1)
    row = bench.summarize(case, "get", [fast, slow], evicted=7)
    assert (row.calls, row.p50_us, row.p999_us > 8) == (100, 1.0, True)
    assert row.gb_per_s == pytest.approx(2.0 + 1 / 9)
    assert (row.blocks, row.misses, row.checked, row.wrong, row.evicted) == (199, 1, 3, 1, 7)
    assert bench.summarize(case, "match", [fast], evicted=0).gb_per_s is None
    assert len(row.as_text()) == len(bench.HEADER)


def test_a_client_that_cannot_start_is_said_so(tmp_path: Path) -> None:
    with bench_process.processes(f"unix://{tmp_path}/none.sock", 0.5, 2) as (first, second):
        first.ask({})
        with pytest.raises(Unavailable, match=r"a client of the benchmark ended: .*none\.sock"):
            first.answer()
        pids = [first.pid, second.pid]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


# -- the whole ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with room for a small benchmark."""
    with daemon(tmp_path_factory.mktemp("bench"), "--dram", "32MiB") as started:
        yield started


def bench_blocks(session: KVStoreClient) -> int:
    """Blocks that benchmarks have left."""
    return sum(each.blocks for each in session.info().namespaces if each.name == NAMESPACE)


QUICK = ["--size", "64KiB,256KiB", "--batch", "1,8", "--seconds", "0.05", "--seed", "5"]


def test_bench_measures_every_case_and_leaves_nothing(
    running: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*QUICK, "--clients", "1,2", "--target", running.target]
    assert run(["bench", *options, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    found = json.loads(out)
    assert (found["seed"], found["left_out"]) == (5, [])
    assert len(found["rows"]) == 2 * 2 * 2 * 4
    for row in found["rows"]:
        assert 0 < row["p50_us"] <= row["p99_us"] <= row["p999_us"]
        assert (row["misses"], row["wrong"], row["evicted"]) == (0, 0, 0)
        assert row["blocks"] == row["calls"] * row["batch"]
        assert (row["checked"] > 0) == (row["phase"] in ("get", "view"))
        assert ((row["gb_per_s"] or 0) > 0) == (row["phase"] in ("put", "get"))
    with KVStoreClient(running.target) as session:
        assert bench_blocks(session) == 0


def test_bench_prints_rows_as_they_come(
    running: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--size", "64KiB", "--batch", "1", "--clients", "1", "--seconds", "0.01"]
    assert run(["bench", *options, "--seed", "9", "--target", running.target]) == 0
    first, header, *rows = capsys.readouterr().out.splitlines()
    assert first == "seed 9, 0.01 s a phase"
    assert header == bench.HEADER
    assert [row.split()[0] for row in rows] == ["put", "match", "get", "view"]


def test_bench_refuses_to_evict_the_blocks_of_others(
    running: Daemon, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = layout_of(MIB)
    hashes = np.random.default_rng(1).integers(0, 256, (20, 32), np.uint8)
    too_much = ["--size", "1MiB", "--batch", "16", "--clients", "1", "--seconds", "0.01"]
    with KVStoreClient(running.target) as session:
        others = session.open_namespace("others", layout)
        session.put(others, hashes, [np.zeros(MIB, np.uint8)] * 20)
        assert run(["bench", *too_much, "--target", running.target, "--json"]) == 2
        error = json.loads(capsys.readouterr().err)["error"]
        assert (error["code"], error["field"]) == ("invalid_argument", "size")
        assert session.match(others, hashes).count == 20
        assert run(["bench", *too_much, "--force", "--target", running.target, "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert rows[0]["evicted"] > 0
        assert bench_blocks(session) == 0
        session.drop_namespace(others)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "61"])
def test_bench_refuses_a_time_that_is_none(
    running: Daemon, capsys: pytest.CaptureFixture[str], seconds: str
) -> None:
    assert run(["bench", "--seconds", seconds, "--target", running.target]) == 2
    assert capsys.readouterr().err.startswith("kvstore: seconds: ")


@pytest.mark.parametrize("phases", [0, 1, 3])
def test_ctrl_c_ends_the_clients_and_drops_the_blocks(running: Daemon, phases: int) -> None:
    options = ["--size", "64KiB", "--batch", "4", "--clients", "2", "--seconds", "0.3"]
    command = [sys.executable, "-m", "kvstore_client.cli", "bench", *options]
    with subprocess.Popen(
        [*command, "--target", running.target],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            for _ in range(2 + phases):
                process.stdout.readline()
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=END_S)
        finally:
            process.kill()
    assert (process.returncode, err) == (130, "")
    with KVStoreClient(running.target) as session:
        assert bench_blocks(session) == 0
        assert session.stats().leased_blocks == 0
        assert session.stats().connections == 1  # the clients are gone
