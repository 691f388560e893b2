"""Mooncake Store by its client daemon and shared memory (`MC_STORE_MEMCPY`)."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.client import Bytes1D, Keys
from benchmarks.processes import free_port, server, wait_for_port

NAME = "Mooncake, shared memory"
REQUIREMENTS: tuple[str, ...] = ("mooncake-transfer-engine-non-cuda==0.3.13.post1", "numpy")
_CLIENT_BYTES = 1 << 30


@contextlib.contextmanager
def start(folder: Path, environment: Path, pool_bytes: int) -> Iterator[dict[str, Any]]:
    """Its master with the HTTP metadata server, and a client daemon that owns the segment."""
    with master(folder, environment) as ports:
        port, log = free_port(), folder / "mooncake-client.log"
        package = package_of(environment)
        command: list[str | Path] = [
            package / "mooncake_client",
            "--host=127.0.0.1",
            f"--port={port}",
            f"--master_server_address=127.0.0.1:{ports['rpc']}",
            f"--metadata_server=http://127.0.0.1:{ports['http']}/metadata",
            f"--global_segment_size={2 * pool_bytes >> 30 or 1} GB",
            "--threads=2",
        ]
        env = {"MC_STORE_MEMCPY": "1", "LD_LIBRARY_PATH": str(package)}
        with server(command, log=log, env=env) as process:
            wait_for_port(port, process, log)
            yield {"address": f"127.0.0.1:{port}"}


@contextlib.contextmanager
def master(folder: Path, environment: Path) -> Iterator[dict[str, int]]:
    """Its master."""
    ports = {name: free_port() for name in ("rpc", "http", "metrics")}
    package, log = package_of(environment), folder / "mooncake-master.log"
    for binary in ("mooncake_master", "mooncake_client"):
        (package / binary).chmod(0o755)
    command: list[str | Path] = [
        package / "mooncake_master",
        "--rpc_address=127.0.0.1",
        f"--rpc_port={ports['rpc']}",
        "--enable_http_metadata_server=true",
        "--http_metadata_server_host=127.0.0.1",
        f"--http_metadata_server_port={ports['http']}",
        f"--metrics_port={ports['metrics']}",
    ]
    with server(command, log=log, env={"LD_LIBRARY_PATH": str(package)}) as process:
        wait_for_port(ports["http"], process, log)
        yield ports


def package_of(environment: Path) -> Path:
    """The folder of its binaries and libraries."""
    return next(environment.glob("lib/python3*/site-packages/mooncake"))


class Client:
    """A client of the daemon, with buffers from the memory that both have mapped."""

    def __init__(self, info: dict[str, Any]) -> None:
        os.environ["MC_STORE_MEMCPY"] = "1"
        from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

        self._store = MooncakeDistributedStore()
        if self._store.setup_dummy(_CLIENT_BYTES, 64 << 20, info["address"]):
            raise RuntimeError("Mooncake refused the client")
        self._base = self._store.alloc_from_mem_pool(_CLIENT_BYTES - (64 << 20))
        self._nbytes = _CLIENT_BYTES - (64 << 20)
        if self._store.register_buffer(self._base, self._nbytes):
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
