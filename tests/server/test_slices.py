"""The slices of processor time that threads ask the kernel for."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading
from collections.abc import Callable

import pytest

from kvstore_server import slices
from kvstore_server.slices import LONG_S, SHORT_S, set_slice

_SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
_BYTES = 48
_SINCE = (6, 12)


def _kernel() -> tuple[int, ...]:
    return tuple(int(word) for word in platform.release().split("-")[0].split(".")[:2])


def slice_ns() -> tuple[int, int]:
    """Of the calling thread, with its nice."""
    room = ctypes.create_string_buffer(_BYTES)
    number = _SCHED_GETATTR[platform.machine()]
    assert not ctypes.CDLL(None).syscall(number, 0, room, _BYTES, 0)
    _size, _policy, _flags, nice, _priority, runtime, _, _ = struct.unpack("=IIQiIQQQ", room.raw)
    return runtime, nice


def in_a_thread(work: Callable[[], object]) -> None:
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.skipif(
    platform.machine() not in _SCHED_GETATTR or _kernel() < _SINCE, reason="no slices here"
)
@pytest.mark.parametrize("seconds", [SHORT_S, LONG_S])
def test_a_thread_gets_the_slice_and_keeps_its_nice(seconds: float) -> None:
    found: list[tuple[int, int]] = []
    nice = min(os.getpriority(os.PRIO_PROCESS, 0) + 1, 19)

    def work() -> None:
        os.setpriority(os.PRIO_PROCESS, 0, nice)  # of this thread alone
        set_slice(seconds)
        found.append(slice_ns())
        in_a_thread(lambda: found.append(slice_ns()))

    in_a_thread(work)
    assert found == [(round(1e9 * seconds), nice)] * 2


def test_where_there_are_none_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", None)
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    set_slice(SHORT_S)
    monkeypatch.undo()
    monkeypatch.setattr(ctypes, "CDLL", None)
    monkeypatch.setattr(slices.os, "sched_getscheduler", lambda _: os.SCHED_BATCH)
    set_slice(SHORT_S)
