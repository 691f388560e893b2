"""Work on two threads: all of it is done, or over, when the call returns."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest

from kvstore.session.copies import (
    ALONE_BYTES,
    GROUP_BYTES,
    copy_in_parallel,
    groups_of,
    in_parallel,
    pieces_of,
)

MUCH = ALONE_BYTES + 1  # so that the other thread takes part
WAIT_S = 10.0


@pytest.mark.parametrize("nbytes", [1, MUCH])
def test_each_piece_is_done_once(nbytes: int) -> None:
    done: list[int] = []
    assert in_parallel(done.append, [(i,) for i in range(200)], nbytes, math.inf) == 200
    assert sorted(done) == list(range(200))


def test_two_threads_work_at_once() -> None:
    both = threading.Barrier(2)
    assert in_parallel(lambda _: both.wait(WAIT_S), [(0,), (1,)], MUCH, math.inf) == 2


def test_who_is_to_work_alone_does() -> None:
    threads: list[int] = []

    def work(_: int) -> None:
        threads.append(threading.get_ident())

    assert in_parallel(work, [(i,) for i in range(50)], MUCH, math.inf, alone=True) == 50
    assert threads == [threading.get_ident()] * 50


@pytest.mark.parametrize("nbytes", [1, MUCH])
def test_what_is_done_in_time_is_counted_from_the_front(nbytes: int) -> None:
    done: list[int] = []
    count = in_parallel(done.append, [(i,) for i in range(50)], nbytes, time.monotonic() - 1)
    assert 1 <= count <= 2  # each thread's first
    assert sorted(done) == list(range(count))


@pytest.mark.parametrize("fails_here", [True, False])
def test_an_error_ends_both_threads_before_it_is_raised(fails_here: bool) -> None:
    here, both, busy = threading.get_ident(), threading.Barrier(2), []

    def work(i: int) -> None:
        if i < 2:
            both.wait(WAIT_S)  # one piece in each thread
        busy.append(i)
        if (threading.get_ident() == here) is fails_here:
            raise ValueError("as planted")
        busy.remove(i)

    with pytest.raises(ValueError, match="as planted"):
        in_parallel(work, [(i,) for i in range(1000)], MUCH, math.inf)
    assert len(busy) == 1  # the one that failed; nobody is in the middle of another


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_copied_from_wherever_they_lie_to_wherever_they_go(seed: int) -> None:
    rng = np.random.default_rng(seed)
    nbytes = int(rng.choice([1, 100, GROUP_BYTES // 4, GROUP_BYTES + 1]))
    n = int(rng.integers(1, 12))
    pools = [rng.integers(0, 256, (n, nbytes + 64), np.uint8) for _ in range(2)]
    source, target = ([pool[i, 7 : 7 + nbytes] for i in rng.permutation(n)] for pool in pools)
    outside = pools[1].copy()
    runs = [(at, at, size) for at, size in pieces_of(nbytes)]
    addresses = [
        np.array([each.ctypes.data for each in rows], np.uint64) for rows in (target, source)
    ]
    assert copy_in_parallel(*addresses, runs, math.inf) == n
    for mine, theirs in zip(target, source, strict=True):
        assert (mine == theirs).all()
    assert (pools[1][:, :7] == outside[:, :7]).all()
    assert (pools[1][:, 7 + nbytes :] == outside[:, 7 + nbytes :]).all()


@pytest.mark.parametrize("n", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("nbytes", [1, 4096, ALONE_BYTES, 4 << 20])
def test_groups_hold_each_row_once_and_leave_something_for_the_other_thread(
    n: int, nbytes: int
) -> None:
    groups = groups_of(n, nbytes)
    assert [row for first, end in groups for row in range(first, end)] == list(range(n))
    assert all((end - first) * nbytes <= max(GROUP_BYTES, nbytes) for first, end in groups)
    if n > 1 and n * nbytes > ALONE_BYTES:
        assert len(groups) > 1
