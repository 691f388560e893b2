"""Work on two threads: all of it is done, or over, when the call returns."""

from __future__ import annotations

import math
import threading
import time

import pytest

from kvstore.session.copies import ALONE_BYTES, in_parallel

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
