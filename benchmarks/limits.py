"""What this machine can do at most, measured in the same rounds as the systems."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import platform
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.client import Bytes1D

MOST_BYTES = 256 << 20  # no cache holds a part of that worth speaking of
_STREAM_BYTES = 64 << 20
_IO_BYTES = 4 << 20

Span = tuple[float, float]


def facts() -> dict[str, Any]:
    """What the results depend on: processor, cores, memory, kernel."""
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return {
        "processor": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(_memory_bytes("MemTotal") / (1 << 30), 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def available_bytes() -> int:
    """Memory that is free, or could be."""
    return _memory_bytes("MemAvailable")


def _memory_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found
    return int(found[1]) << 10


class Memcpy:
    """Copies a batch between private memory and a memfd, both of its size, piece by piece.

    A put ends in the shared memory, a get in the private one. A second thread takes pieces from the
    same list, as the store's does; of a single block each thread takes a half. Between two copies
    both sides are compared, as the worker does, so that the caches hold what they hold there.
    """

    _helper = ThreadPoolExecutor(1, "memcpy")

    def __init__(self, nbytes: int, batch: int) -> None:
        self._batch = max(1, min(batch, MOST_BYTES // nbytes))
        self.nbytes = nbytes * self._batch
        fd = os.memfd_create("benchmark")
        try:
            os.ftruncate(fd, self.nbytes)
            self._shared: Bytes1D = np.frombuffer(mmap.mmap(fd, self.nbytes), np.uint8)
        finally:
            os.close(fd)
        self._private: Bytes1D = np.ones(self.nbytes, np.uint8)
        self._shared[:] = 1

    def spans(self, op: str, threads: int, repeats: int) -> list[Span]:
        """Begin and end of as many copies of the batch; op: put or get."""
        target, source = self._shared.ctypes.data, self._private.ctypes.data
        if op == "get":
            target, source = source, target
        size = self.nbytes // max(self._batch, threads)
        spans = []
        for _ in range(repeats):
            left = iter(range(0, self.nbytes, size))  # hands each piece out once

            def copy(left: Iterator[int] = left) -> None:
                for at in left:
                    ctypes.memmove(target + at, source + at, size)

            begin = time.monotonic()
            others = [self._helper.submit(copy) for _ in range(threads - 1)]
            copy()
            for other in others:
                other.result()
            spans.append((begin, time.monotonic()))
            assert np.array_equal(self._private, self._shared)
        return spans


def machine_rates(folder: Path) -> dict[str, float]:
    """Bytes a second by which this machine moves bytes in other ways."""
    write, read = _disk_rates(folder)
    return {
        "loopback TCP": _tcp_rate(),
        "unix socket": _stream(socket.socketpair()),
        "O_DIRECT write": write,
        "O_DIRECT read": read,
    }


def _stream(ends: tuple[socket.socket, socket.socket]) -> float:
    """Bytes a second through a connected pair, between two threads."""
    near, far = ends
    data, into = np.ones(_IO_BYTES, np.uint8), np.ones(_IO_BYTES, np.uint8)

    def send() -> None:
        for _ in range(_STREAM_BYTES // _IO_BYTES):
            near.sendall(data.data)

    with contextlib.closing(near), contextlib.closing(far):
        thread = threading.Thread(target=send)
        begin = time.monotonic()
        thread.start()
        left = _STREAM_BYTES
        while left:
            left -= far.recv_into(into.data, min(left, _IO_BYTES))
        thread.join()
        return _STREAM_BYTES / (time.monotonic() - begin)


def _tcp_rate() -> float:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        return _stream((near, far))


def _disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes a second written and read with O_DIRECT, one request of 4 MiB at a time."""
    buffer = mmap.mmap(-1, _IO_BYTES)
    n = _STREAM_BYTES // _IO_BYTES
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        fd = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        try:
            begin = time.monotonic()
            for i in range(n):
                os.pwrite(fd, buffer, i * _IO_BYTES)
            wrote = time.monotonic()
            for i in range(n):
                os.preadv(fd, [buffer], i * _IO_BYTES)
            return _STREAM_BYTES / (wrote - begin), _STREAM_BYTES / (time.monotonic() - wrote)
        finally:
            os.close(fd)
