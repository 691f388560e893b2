"""LMCache's storage manager over our adapter: what is written comes back, in any process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from integrations.lmcache_rig import wait_until
from integrations.pool import one_bit_off, spoil
from integrations.real.lmcache.manager import LAYOUTS, OURS, RANKS, Manager, chain, rows_of
from integrations.real.lmcache.record import FILE, packed, record

from daemon import Daemon, daemon
from kvstore_client import KVStoreClient
from kvstore_integrations.settings import ConfigurationError

ROWS = len(LAYOUTS) * len(RANKS)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--dram", "64MiB") as running:
        yield running


@pytest.fixture
def manager(server: Daemon) -> Iterator[Manager]:
    made = Manager(OURS, target=server.target, model_revision="r1")
    yield made
    made.close()


def all_of(rows: list[list[Any]]) -> list[Any]:
    return [key for row in rows for key in row]


def test_objects_come_back_from_the_store_with_their_values(manager: Manager) -> None:
    written, asked = rows_of(1, 4), rows_of(1, 6)
    manager.write(all_of(written))
    manager.clear()
    result = manager.prefetch(*asked)
    assert (result.l1_hit_count, result.l2_hit_count) == (0, 4 * ROWS)
    assert [row.get_indices_list() for row in result.hit_cells] == [[0, 1, 2, 3]] * ROWS
    manager.check(all_of(written))


def test_a_fresh_process_hits_all_at_its_first_request(server: Daemon, manager: Manager) -> None:
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from integrations.real.lmcache.manager import OURS, Manager, rows_of\n"
        "made = Manager(OURS, target=sys.argv[2], model_revision='r1')\n"
        "made.write([key for row in rows_of(1, 4) for key in row])\n"
        "made.close()\n"
    )
    tests = str(Path(__file__).parents[3])
    subprocess.run([sys.executable, "-c", script, tests, server.target], check=True, timeout=120)
    assert manager.prefetch(*rows_of(1, 4)).l2_hit_count == 4 * ROWS
    manager.check(all_of(rows_of(1, 4)))


def test_with_the_full_policy_objects_behind_a_gap_come_too(manager: Manager) -> None:
    keys = chain(1, 6)
    manager.write([*keys[:2], *keys[4:]])
    manager.clear()
    result = manager.prefetch(keys, policy="full")
    assert result.hit_cells[0].get_indices_list() == [0, 1, 4, 5]
    manager.check([*keys[:2], *keys[4:]])


def test_another_salt_tenant_revision_or_dtype_hits_nothing(
    server: Daemon, manager: Manager
) -> None:
    manager.write(all_of(rows_of(1, 4)))
    manager.clear()
    assert manager.prefetch(*rows_of(1, 4, salt="user")).l2_hit_count == 0
    for settings in ({"tenant": "b"}, {"model_revision": "r2"}):
        read = {"target": server.target, "model_revision": "r1", **settings}
        stranger = Manager(OURS, **read)
        assert stranger.prefetch(*rows_of(1, 4)).l2_hit_count == 0
        stranger.close()


def test_what_is_found_but_finds_no_memory_is_unlocked_and_comes_later(server: Daemon) -> None:
    manager = Manager(OURS, l1_bytes=1 << 20, target=server.target, model_revision="r1")
    written = [chain(seed, 24) for seed in range(3)]
    for keys in written:
        manager.write(keys)
        manager.clear()
    for keys in written[:2]:
        assert manager.prefetch(keys).l2_hit_count == 24
    assert manager.prefetch(written[2]).l2_hit_count == 0  # waits until nothing is locked
    for keys in written[:2]:
        manager.check(keys)
    manager.clear()
    assert manager.prefetch(written[2]).l2_hit_count == 24
    manager.check(written[2])
    manager.close()


def test_a_store_that_dies_costs_misses_and_comes_back(tmp_path: Path) -> None:
    keys = all_of(rows_of(1, 4))
    with daemon(tmp_path, "--dram", "64MiB") as server:
        manager = Manager(OURS, target=server.target, model_revision="r1")
        manager.write(keys)
        manager.clear()
        server.kill()
    assert manager.prefetch(*rows_of(1, 4)).l2_hit_count == 0
    assert manager.manager.report_status()["is_healthy"]
    with daemon(tmp_path, "--dram", "64MiB") as server:
        with KVStoreClient(server.target):
            manager.adapter._client.info(timeout_s=20.0)
        manager.stored.clear()
        manager.write(keys)
        manager.clear()
        assert manager.prefetch(*rows_of(1, 4)).l2_hit_count == 4 * ROWS
        manager.check(keys)
        manager.close()


def test_corrupted_objects_are_not_served(server: Daemon, manager: Manager) -> None:
    manager.write(all_of(rows_of(1, 4)))
    manager.clear()
    assert spoil(server, one_bit_off) == 4 * ROWS
    assert manager.prefetch(*rows_of(1, 4)).l2_hit_count == 0
    manager.stored.clear()
    manager.write(all_of(rows_of(1, 4)))  # what was wrong does not stay in the way
    manager.clear()
    assert manager.prefetch(*rows_of(1, 4)).l2_hit_count == 4 * ROWS


def test_lmcache_can_delete_what_it_stored(server: Daemon, manager: Manager) -> None:
    keys = chain(1, 4)
    manager.write(keys)
    before = manager.adapter.get_usage().total_bytes_used
    manager.adapter.delete(keys[2:])
    assert manager.adapter.get_usage().total_bytes_used == before // 2
    manager.clear()
    assert manager.prefetch(keys).l2_hit_count == 2


def test_a_serde_is_refused_when_the_first_object_comes(
    server: Daemon, caplog: pytest.LogCaptureFixture
) -> None:
    packed = {**OURS, "serde": {"type": "fp8"}}
    manager = Manager(packed, target=server.target, model_revision="r1")
    manager.begin(chain(1, 2))
    wait_until(lambda: "take it out of this adapter's configuration" in caplog.text)
    manager.close()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tagret": "x"}, "adapter_params: tagret: .*Known are"),
        ({"target": "unix:///nowhere/kvstore.sock", "timeout_s": 0.3}, "no store answers at unix"),
        ({"tenant": "a/b"}, "tenant: "),
    ],
)
def test_a_wrong_configuration_fails_at_start_and_says_what_to_change(
    server: Daemon, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Manager(OURS, **{"target": server.target, **settings})


def test_without_a_store_at_first_it_starts_if_the_store_is_not_required(tmp_path: Path) -> None:
    target = f"unix://{tmp_path}/kvstore.sock"
    manager = Manager(OURS, target=target, required=False, model_revision="r1", timeout_s=0.2)
    assert manager.prefetch(*rows_of(1, 4)).l2_hit_count == 0
    with daemon(tmp_path, "--dram", "64MiB"):
        manager.adapter._client.info(timeout_s=20.0)

        def is_stored() -> bool:
            manager.begin(chain(7, 1))
            manager.clear()
            return bool(manager.stored)

        wait_until(is_stored)
        assert manager.prefetch(chain(7, 1)).l2_hit_count == 1
        manager.close()


def test_the_memory_is_handed_over_once_and_the_signals_are_distinct(manager: Manager) -> None:
    desc = manager.manager.l1_memory_desc
    assert manager.adapter._base == desc.ptr
    assert len(manager.adapter._memory) == desc.size
    (one,) = manager.manager.reserve_write(chain(1, 1), LAYOUTS[0]).values()
    row = manager.adapter._row(one)
    assert row.base is not None
    assert row.ctypes.data == one.data_ptr
    assert len(row) == one.get_size()
    fds = {
        manager.adapter.get_store_event_fd(),
        manager.adapter.get_lookup_and_lock_event_fd(),
        manager.adapter.get_load_event_fd(),
    }
    assert len(fds) == 3


def test_the_recorded_calls_are_still_those_that_lmcache_makes(server: Daemon) -> None:
    made = packed(record(server.target))
    assert json.loads(FILE.read_text()) == json.loads(json.dumps(made)), (
        f"run {record.__module__} anew, and look at what has changed"
    )
