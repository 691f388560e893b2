"""Mooncake Store by its client daemon and shared memory (`MC_STORE_MEMCPY`)."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.adapters import mooncake_server
from benchmarks.adapters.mooncake_server import BUFFER_BYTES, REQUIREMENTS
from benchmarks.client import Bytes1D, Keys

__all__ = ["NAME", "REQUIREMENTS", "Client", "start"]

NAME = "Mooncake, shared memory"
_MEMCPY = {"MC_STORE_MEMCPY": "1"}
_CLIENT_BYTES = 512 << 20


@contextlib.contextmanager
def start(folder: Path, environment: Path, pool_bytes: int) -> Iterator[dict[str, Any]]:
    """Its servers."""
    with mooncake_server.start(folder, environment, pool_bytes, _MEMCPY) as info:
        yield info


class Client:
    """A client of the daemon, with buffers from the memory that both have mapped."""

    def __init__(self, info: dict[str, Any]) -> None:
        os.environ.update(_MEMCPY)
        from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

        self._store = MooncakeDistributedStore()
        if self._store.setup_dummy(_CLIENT_BYTES + BUFFER_BYTES, BUFFER_BYTES, info["daemon"]):
            raise RuntimeError("Mooncake refused the client")
        self._base = self._store.alloc_from_mem_pool(_CLIENT_BYTES)
        if self._store.register_buffer(self._base, _CLIENT_BYTES):
            raise RuntimeError("Mooncake refused the buffer")

    def buffers(self, n: int, nbytes: int) -> list[Bytes1D]:
        raw = (ctypes.c_uint8 * (n * nbytes)).from_address(self._base)
        return list(np.frombuffer(memoryview(raw), np.uint8).reshape(n, nbytes))

    def put(self, keys: Keys, sources: Sequence[Bytes1D]) -> int:
        names, pointers, sizes = _arguments(keys, sources)
        return int(self._store.batch_put_from(names, pointers, sizes).count(0))

    def get(self, keys: Keys, targets: Sequence[Bytes1D]) -> int:
        names, pointers, sizes = _arguments(keys, targets)
        got = self._store.batch_get_into(names, pointers, sizes)
        return sum(size >= 0 for size in got)

    def exists(self, keys: Keys) -> int:
        return int(self._store.batch_is_exist([key.hex() for key in keys]).count(1))

    def drop(self, keys: Keys) -> None:
        self._store.batch_remove([key.hex() for key in keys], True)

    def close(self) -> None:
        self._store.close()


def _arguments(keys: Keys, buffers: Sequence[Bytes1D]) -> tuple[list[str], list[int], list[int]]:
    pointers = [buffer.ctypes.data for buffer in buffers]
    return [key.hex() for key in keys], pointers, [buffer.nbytes for buffer in buffers]
