"""What all tests rely on."""

from __future__ import annotations

import gc
import re
import signal
import threading
from collections.abc import Iterator

import pytest

gc.disable()  # while tests are collected: nothing that they import is garbage

# Who starts the tests in the background of a shell has them ignore Ctrl-C, and their children with
# them; tests that send it need what a user's terminal gives.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The files that take longest, the longest first: of two processes that take a file when they are
# done with one, the other must not be left alone with such a file in the end.
LONGEST = (
    "kernels/test_compiling",
    "cluster/sim/test_simulation",
    "kernels/test_compiling_oldest",
    "cluster/test_nodes",
    "cluster/test_nodes_memory",
    "cluster/test_nodes_input",
    "conformance/test_nvme",
    "engines/test_engine",
    "engines/test_ranks",
    "cluster/test_nodes_shm",
    "cluster/test_nodes_parts",
    "nvme/test_crashes",
    "nvme/test_corruption",
    "cluster/test_coordination",
    "cluster/test_cluster_cli",
    "cluster/sim/test_plants",
    "kernels/test_fused",
    "transfer/test_conformance",
    "conformance/test_session",
    "nvme/test_histories",
    "faults/test_deaths",
    "faults/test_races",
    "client/test_bench",
    "client/test_cli",
    "engines/test_appending",
    "engines/test_store",
    "engines/test_ops",
    "client/test_targets",
    "kvstore/test_store",
    "integrations/test_sglang_pages",
    "kvstore/test_store_machine",
    "engines/test_failures",
    "server/test_supervisor",
)
OURS = re.compile("kvstore-(?!copy)")  # the copies' thread lasts as long as its process


@pytest.fixture(scope="module", autouse=True)
def no_thread_of_ours_is_left() -> Iterator[None]:
    """A session that a test did not close goes on reaching for its daemon, in other tests' time."""
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    ours = [thread for thread in left if OURS.match(thread.name)]
    for thread in ours:
        thread.join(5.0)  # some end a moment after whoever started them
    still = [thread.name for thread in ours if thread.is_alive()]
    assert not still, f"not closed by a test of this module: {still}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; all else in the order that it has."""
    place = {f"tests/{file}.py": i for i, file in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.nodeid.partition("::")[0], len(place)))


def pytest_collection_finish() -> None:
    """From now on the collector goes over what tests leave, and not over all that is imported."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Libraries that count what is left of theirs at the end find all of it gone."""
    gc.unfreeze()
