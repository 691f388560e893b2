"""Mooncake Store by TCP: the segment in one process, the client in another."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.adapters import mooncake, mooncake_server
from benchmarks.adapters.mooncake_server import BUFFER_BYTES, REQUIREMENTS
from benchmarks.client import Bytes1D
from benchmarks.processes import free_port

__all__ = ["NAME", "REQUIREMENTS", "Client", "start"]

NAME = "Mooncake, TCP"


@contextlib.contextmanager
def start(folder: Path, environment: Path, pool_bytes: int) -> Iterator[dict[str, Any]]:
    """Its servers."""
    with mooncake_server.start(folder, environment, pool_bytes, {}) as info:
        yield info


class Client(mooncake.Client):
    """A client that moves blocks between its own registered memory and the segment."""

    def __init__(self, info: dict[str, Any]) -> None:
        from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

        self._store, host = MooncakeDistributedStore(), f"127.0.0.1:{free_port()}"
        servers = (info["metadata"], 0, BUFFER_BYTES, "tcp", "", info["master"])
        if failed := self._store.setup(host, *servers):
            raise RuntimeError(f"Mooncake refused the client ({failed})")
        self._memory: Bytes1D = np.zeros(0, np.uint8)

    def buffers(self, n: int, nbytes: int) -> list[Bytes1D]:
        if self._memory.nbytes:
            self._store.unregister_buffer(self._memory.ctypes.data)
        self._memory = np.full(n * nbytes, 0, np.uint8)
        if n and self._store.register_buffer(self._memory.ctypes.data, self._memory.nbytes):
            raise RuntimeError("Mooncake refused the buffer")
        return list(self._memory.reshape(n, nbytes))
