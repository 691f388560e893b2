"""The core's loop: order, timers, threads, and callbacks that end each other."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest

from kvstore_server.loop import Loop


class Hand:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop()
    yield made
    made.close()


def test_timers_run_in_the_order_of_their_times() -> None:
    hand, ran = Hand(), list[str]()
    loop = Loop(hand)
    loop.call_later(0.0, lambda: ran.append("now"))
    loop.call_later(-1.0, lambda: ran.append("late"))
    loop.call_later(0.0, lambda: ran.append("now too"))
    loop.call_later(-2.0, loop.stop)
    loop.run()
    assert ran == ["late", "now", "now too"]
    loop.close()


def test_a_timer_set_by_a_timer_runs_too(loop: Loop) -> None:
    loop.call_later(0.0, lambda: loop.call_later(0.001, loop.stop))
    loop.run()


def test_a_timer_that_is_always_due_keeps_nobody_from_a_turn() -> None:
    loop = Loop(Hand())

    def again() -> None:
        loop.call_later(0.0, again)

    again()
    loop.call_soon(loop.stop)
    loop.run()  # it ends
    loop.close()


def test_work_of_other_threads_runs_in_the_loops(loop: Loop) -> None:
    ran: list[int] = []

    def hand_over() -> None:
        loop.call_soon(lambda: ran.append(threading.get_ident()))
        loop.call_soon(loop.stop)

    thread = threading.Thread(target=hand_over)
    thread.start()
    loop.run()
    thread.join()
    assert ran == [threading.get_ident()]


def test_a_callback_may_end_the_watch_of_one_that_is_due(loop: Loop) -> None:
    pipes = [os.pipe() for _ in range(2)]
    ran: list[int] = []

    def once(mine: int, other: int) -> None:
        ran.append(mine)
        loop.unwatch(other)
        loop.unwatch(mine)
        loop.stop()

    for (mine, write), (other, _) in (pipes, pipes[::-1]):
        os.write(write, b"x")
        loop.watch(mine, lambda mine=mine, other=other: once(mine, other))
    loop.run()
    assert len(ran) == 1
    for pipe in pipes:
        for fd in pipe:
            os.close(fd)


def test_a_full_pipe_calls_back_when_it_takes_bytes(loop: Loop) -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    loop.watch(write, loop.stop)  # not readable: only writability can end this
    loop.want_write(write, True)
    loop.run()
    for fd in (read, write):
        os.close(fd)
