"""Which of the kernel's policies the core runs by, and what it starts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from daemon import daemon
from kvstore.nvme.runner import go_first
from kvstore_server.turns import as_usual, let_wakers_go_on

T = TypeVar("T")
ASK = [sys.executable, "-c", "import os; print(os.sched_getscheduler(0))"]


def apart(work: Callable[[], T]) -> T:
    """The result of work in a thread of its own: policies are threads'."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def policy() -> int:
    return os.sched_getscheduler(0)


def of_a_child() -> int:
    return int(subprocess.run(ASK, capture_output=True, check=True).stdout)


def test_who_wakes_the_core_goes_on_and_its_processes_are_as_others(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "32MiB", grpc=True) as running:
        pid = running.process.pid
        assert os.sched_getscheduler(pid) == os.SCHED_BATCH
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        assert [os.sched_getscheduler(int(child)) for child in children] == [os.SCHED_OTHER]


def test_what_is_started_later_is_as_others_too() -> None:
    def work() -> list[int]:
        let_wakers_go_on()
        found = [policy()]
        with as_usual():
            found.append(of_a_child())
        return [*found, policy()]

    assert apart(work) == [os.SCHED_BATCH, os.SCHED_OTHER, os.SCHED_BATCH]


def test_threads_that_wait_for_a_disk_are_as_others() -> None:
    def work() -> list[int]:
        let_wakers_go_on()
        go_first()
        return [policy()]

    assert apart(work) == [os.SCHED_OTHER]


def test_a_thread_that_is_as_others_stays_so() -> None:
    def work() -> list[int]:
        with as_usual():
            found = [of_a_child()]
        return [*found, policy()]

    assert apart(work) == [os.SCHED_OTHER] * 2


def test_a_policy_that_somebody_chose_stays() -> None:
    def work() -> list[int]:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        let_wakers_go_on()
        with as_usual():
            found = [policy()]
        return [*found, policy()]

    assert apart(work) == [os.SCHED_IDLE] * 2


def test_where_policies_are_forbidden_all_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refused)

    def work() -> int:
        let_wakers_go_on()
        with as_usual():
            return policy()

    assert apart(work) == os.SCHED_OTHER
