"""Each planted bug is caught, by the hunt or the test that is named with it."""

from __future__ import annotations

import errno
import inspect
from collections.abc import Callable, Iterator

import pytest
from nvme import test_copies, test_promises
from nvme.plants import PLANTS, Plant
from nvme.rig import Rig, small_limits
from nvme.script import PLAN
from nvme.test_corruption import damaged_while_running
from nvme.test_crashes import CRASHING, check_all, crash_points
from nvme.test_histories import live
from nvme.test_io_errors import Fault, fail, ios

from kvstore.errors import KVStoreError

SEEDS = 60


@pytest.fixture(autouse=True)
def small() -> Iterator[None]:
    with small_limits():
        yield


def histories() -> None:
    for seed in range(SEEDS):
        live(seed, faults=seed % 4 == 3, check_each=1)


def crashes() -> None:
    def at(rig: Rig, moment: int) -> None:
        for keeps in range(3):
            check_all(rig.crash(1000 * moment + keeps))

    crash_points(1, CRASHING, at)


def failed_reads() -> None:
    _fail_once("read")


def failed_writes() -> None:
    _fail_once("write")


def failed_syncs() -> None:
    _fail_once("sync")


def _fail_once(kind: str) -> None:
    for n, io in enumerate(ios(1, PLAN)[0], 1):
        if io.kind == kind:
            fail(1, PLAN, Fault(n, kind, errno.EIO, 1))


def damage_while_it_runs() -> None:
    found = damaged_while_running(240, seed=2, scrubs=False)
    assert found["damaged"] > 10


def scrubbed_damage() -> None:
    found = damaged_while_running(60, seed=2, scrubs=True)
    assert found["scrubbed"]


HUNTS: dict[str, Callable[[], None]] = {
    "histories": histories,
    "crashes": crashes,
    "failed reads": failed_reads,
    "failed writes": failed_writes,
    "failed syncs": failed_syncs,
    "damage while it runs": damage_while_it_runs,
    "scrubbed damage": scrubbed_damage,
}


def hunt(name: str) -> None:
    """The hunt, or the test with each of its cases."""
    if name in HUNTS:
        HUNTS[name]()
        return
    test = getattr(test_promises, name, None) or getattr(test_copies, name)
    parameters = inspect.signature(test).parameters
    if "reads" in parameters:
        for reads in range(12):
            test(reads)
    else:
        test()


@pytest.mark.parametrize("planted", PLANTS, ids=lambda planted: planted.name)
def test_a_planted_bug_is_caught(planted: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    planted.apply(monkeypatch)
    with pytest.raises((AssertionError, KVStoreError)):
        hunt(planted.caught_by)


def test_a_hunt_finds_nothing_where_nothing_is_planted() -> None:
    """The same goes for the others, which are run in tests of their own."""
    scrubbed_damage()


def test_there_are_enough() -> None:
    assert len({planted.name for planted in PLANTS}) == len(PLANTS) >= 15
