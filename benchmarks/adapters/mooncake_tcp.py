"""Mooncake Store by TCP: the segment in one process, the client in another."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.adapters import mooncake
from benchmarks.client import Bytes1D
from benchmarks.processes import free_port, server, wait_for_port

NAME = "Mooncake, TCP"
REQUIREMENTS = mooncake.REQUIREMENTS
_CLIENT_BYTES = 1 << 30


@contextlib.contextmanager
def start(folder: Path, environment: Path, pool_bytes: int) -> Iterator[dict[str, Any]]:
    """Its master, and a client daemon that owns the segment and serves it over TCP."""
    with mooncake.master(folder, environment) as ports:
        port, log = free_port(), folder / "mooncake-tcp.log"
        package = mooncake.package_of(environment)
        metadata = f"http://127.0.0.1:{ports['http']}/metadata"
        command: list[str | Path] = [
            package / "mooncake_client",
            "--host=127.0.0.1",
            f"--port={port}",
            f"--master_server_address=127.0.0.1:{ports['rpc']}",
            f"--metadata_server={metadata}",
            f"--global_segment_size={2 * pool_bytes >> 30 or 1} GB",
            "--threads=2",
        ]
        with server(command, log=log, env={"LD_LIBRARY_PATH": str(package)}) as process:
            wait_for_port(port, process, log)
            yield {"metadata": metadata, "master": f"127.0.0.1:{ports['rpc']}"}


class Client(mooncake.Client):
    """A client that moves blocks between its own registered memory and the segment."""

    def __init__(self, info: dict[str, Any]) -> None:
        from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

        self._store = MooncakeDistributedStore()
        host = f"127.0.0.1:{free_port()}"
        failed = self._store.setup(host, info["metadata"], 0, 64 << 20, "tcp", "", info["master"])
        if failed:
            raise RuntimeError(f"Mooncake refused the client ({failed})")
        self._map = mmap.mmap(-1, _CLIENT_BYTES)
        self._nbytes = _CLIENT_BYTES
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        np.frombuffer(self._map, np.uint8)[::4096] = 0
        if self._store.register_buffer(self._base, _CLIENT_BYTES):
            raise RuntimeError("Mooncake refused the buffer")

    def buffers(self, n: int, nbytes: int) -> list[Bytes1D]:
        return list(np.frombuffer(self._map, np.uint8)[: n * nbytes].reshape(n, nbytes))
