"""What this machine can do at most, measured in the same run as the systems."""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.client import Bytes1D

BUFFER_BYTES = 256 << 20
_IO_BYTES = 4 << 20
_ROUNDS = 5


def _shared(nbytes: int) -> Bytes1D:
    """Touched memory of the kind that a pool is made of."""
    memory: Bytes1D = np.frombuffer(mmap.mmap(-1, nbytes, flags=mmap.MAP_SHARED), np.uint8)
    memory[:] = 1
    return memory


class Memcpy:
    """Copies between private and shared memory, with one or more threads."""

    def __init__(self, nbytes: int = BUFFER_BYTES) -> None:
        self._source = np.ones(nbytes, np.uint8)
        self._target = _shared(nbytes)

    def rate(self, threads: int) -> float:
        """Bytes copied a second, once over the buffer."""
        parts = np.array_split(np.arange(0, len(self._source), _IO_BYTES), threads)

        def copy(starts: np.ndarray) -> None:
            for start in starts.tolist():
                end = start + _IO_BYTES
                self._target[start:end] = self._source[start:end]

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(copy, [parts[0][:1]] * threads))  # the threads exist
            begin = time.perf_counter()
            list(pool.map(copy, parts))
            return len(self._source) / (time.perf_counter() - begin)


def _stream(ends: tuple[socket.socket, socket.socket], nbytes: int) -> float:
    """Bytes a second through a connected pair, between two threads."""
    near, far = ends
    data, into = np.ones(_IO_BYTES, np.uint8), np.empty(_IO_BYTES, np.uint8)

    def send() -> None:
        for _ in range(nbytes // _IO_BYTES):
            near.sendall(data.data)

    with contextlib.closing(near), contextlib.closing(far):
        thread = threading.Thread(target=send)
        begin = time.perf_counter()
        thread.start()
        left = nbytes
        while left:
            left -= far.recv_into(into.data, min(left, _IO_BYTES))
        thread.join()
        return nbytes / (time.perf_counter() - begin)


def tcp_rate() -> float:
    """Bytes a second over loopback TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        return _stream((near, far), BUFFER_BYTES)


def unix_rate() -> float:
    """Bytes a second over a unix socket."""
    return _stream(socket.socketpair(), BUFFER_BYTES)


def disk_rates(folder: Path) -> tuple[float, float]:
    """Bytes a second written and read with O_DIRECT, one request of 4 MiB at a time."""
    buffer = mmap.mmap(-1, _IO_BYTES)
    n = BUFFER_BYTES // _IO_BYTES
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        fd = os.open(file.name, os.O_RDWR | os.O_DIRECT)
        try:
            begin = time.perf_counter()
            for i in range(n):
                os.pwrite(fd, buffer, i * _IO_BYTES)
            wrote = time.perf_counter()
            for i in range(n):
                os.preadv(fd, [buffer], i * _IO_BYTES)
            return BUFFER_BYTES / (wrote - begin), BUFFER_BYTES / (time.perf_counter() - wrote)
        finally:
            os.close(fd)


def medians(measure: Callable[[], float]) -> float:
    """The median of a few rounds."""
    return statistics.median(measure() for _ in range(_ROUNDS))
