"""An agent whose passive side is a process of its own: the same bytes, and a certain end."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from kvstore.errors import DeadlineExceeded, Unavailable
from kvstore.memory import Arena
from kvstore.transfer import nixl
from kvstore.transfer.apart import ApartAgent, export, make_safe_agent
from kvstore.transfer.base import Pieces, Remote, TransferFailed

MEMORY_BYTES = 4 << 20
WAIT_S = 20.0


def _has_nixl() -> bool:
    try:
        nixl.load()
    except Unavailable:
        return False
    return True


pytestmark = pytest.mark.skipif(not _has_nixl(), reason="no NIXL is installed")


class Pair:
    """An active agent of this process, and one whose passive side is a child."""

    def __init__(self) -> None:
        self.near, self.far = (Arena.create("test", MEMORY_BYTES) for _ in range(2))
        self.active, self.passive = (make_safe_agent("nixl", name) for name in ("near", "far"))
        export(self.active, self.near.array, self.near.fd)
        export(self.passive, self.far.array, self.far.fd)

    @property
    def child(self) -> int:
        """The passive side's process."""
        assert isinstance(self.passive, ApartAgent)
        assert self.passive._child
        return self.passive._child.pid

    def connect(self) -> Remote:
        return self.active.connect(self.passive.describe(), WAIT_S)

    def pieces(self, n: int = 3, nbytes: int = 70_001) -> Pieces:
        offsets = np.arange(n, dtype=np.uint64) * np.uint64(2 * nbytes)
        here, there = (int(a.array.ctypes.data) for a in (self.near, self.far))
        sizes = np.full(n, nbytes, np.uint64)
        return Pieces(offsets + np.uint64(here), offsets + np.uint64(there), sizes)

    def close(self) -> None:
        for agent in (self.active, self.passive):
            agent.close()
        for arena in (self.near, self.far):
            arena.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    with contextlib.closing(Pair()) as made:
        yield made


def test_bytes_go_both_ways_at_the_addresses_of_this_process(pair: Pair) -> None:
    rng = np.random.default_rng(0)
    pair.near.array[:] = rng.integers(0, 256, MEMORY_BYTES, np.uint8)
    remote = pair.connect()
    remote.write(pair.pieces(), WAIT_S)
    for at in range(3):
        span = slice(at * 140_002, at * 140_002 + 70_001)
        np.testing.assert_array_equal(pair.far.array[span], pair.near.array[span])
    pair.far.array[:] = 7
    remote.read(pair.pieces(), WAIT_S)
    assert (pair.near.array[:70_001] == 7).all()
    assert pair.near.array[70_001:140_002].any()
    remote.close()


def test_a_child_that_dies_is_noticed_and_another_takes_its_place(pair: Pair) -> None:
    died = threading.Event()
    assert isinstance(pair.passive, ApartAgent)
    pair.passive.on_death = died.set
    remote = pair.connect()
    first = pair.child
    os.kill(first, signal.SIGKILL)
    assert died.wait(WAIT_S)
    with pytest.raises((TransferFailed, DeadlineExceeded)):
        remote.write(pair.pieces(), 2.0)
    remote.close()
    again = pair.connect()
    assert pair.child != first
    pair.near.array[:] = 9
    again.write(pair.pieces(), WAIT_S)
    assert (pair.far.array[:70_001] == 9).all()
    again.close()


def test_after_close_nothing_lands_and_no_process_is_left(pair: Pair) -> None:
    remote = pair.connect()
    child = pair.child
    pair.passive.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
    pair.near.array[:] = 5
    with pytest.raises((TransferFailed, DeadlineExceeded)):
        remote.write(pair.pieces(), 2.0)
    assert not pair.far.array.any()
    remote.close()
    with pytest.raises(TransferFailed):
        pair.passive.describe()


def test_memory_that_no_other_process_can_map_is_refused(pair: Pair) -> None:
    with pytest.raises(TransferFailed, match="shared memory"):
        pair.passive.register(np.zeros(4096, np.uint8))


def test_a_kind_that_is_none_says_so() -> None:
    arena = Arena.create("test", MEMORY_BYTES)
    agent = ApartAgent("pigeon", "far", lambda name: make_safe_agent("grpc", name))
    export(agent, arena.array, arena.fd)
    with pytest.raises(Unavailable, match="pigeon"):
        agent.describe()
    agent.close()
    arena.close()
