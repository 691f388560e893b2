"""Ours: `kvstore-server` and shared memory, clients that write the pool themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.client import Bytes1D, Keys
from benchmarks.processes import server
from kvstore import Hit, Layout
from kvstore.__about__ import __version__
from kvstore_client import KVStoreClient

NAME = "kvstore, shared memory (direct)"
REQUIREMENTS: tuple[str, ...] = ()  # the project's own environment
_FLAGS = ("--trust", "direct", "--no-grpc")


@contextlib.contextmanager
def start(
    folder: Path, environment: Path, pool_bytes: int, flags: Sequence[str] = _FLAGS
) -> Iterator[dict[str, Any]]:
    """A daemon of its own, with its pool pre-faulted like the peers'."""
    socket, log = folder / "kvstore.sock", folder / "kvstore.log"
    (folder / "server.toml").touch()
    command: list[str | Path] = [
        environment / "bin/kvstore-server",
        "--config",
        folder / "server.toml",
    ]
    command += ["--socket", socket, "--data-dir", folder / "data", "--dram", str(pool_bytes)]
    with server([*command, *flags], log=log):
        target = f"unix://{socket}"
        with KVStoreClient(target, lazy=True) as client:
            client.info(timeout_s=30.0)
        yield {"target": target, "version": __version__}


class Client:
    """A session with the daemon. All calls take the chain's keys as they are."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._session: Any = KVStoreClient(info["target"], timeout_s=30.0)
        self._namespaces: dict[int, Any] = {}
        self._nbytes = 0

    def buffers(self, n: int, nbytes: int) -> list[Bytes1D]:
        self._nbytes = nbytes
        return list(np.zeros((n, nbytes), np.uint8))

    def put(self, keys: Keys, sources: Sequence[Bytes1D]) -> int:
        return int(self._session.put(self._namespace(), _hashes(keys), sources).stored)

    def get(self, keys: Keys, targets: Sequence[Bytes1D]) -> int:
        answers = self._session.get_into(self._namespace(), _hashes(keys), targets)
        return sum(isinstance(answer, Hit) for answer in answers)

    def exists(self, keys: Keys) -> int:
        return int(self._session.match(self._namespace(), _hashes(keys)).count)

    def drop(self, keys: Keys) -> None:
        self._session.drop(self._namespace(), _hashes(keys))

    def close(self) -> None:
        self._session.close()

    def _namespace(self) -> Any:
        if self._nbytes not in self._namespaces:
            layout = Layout.opaque(model="benchmark", block_bytes=self._nbytes, block_tokens=16)
            self._namespaces[self._nbytes] = self._session.open_namespace("benchmark", layout)
        return self._namespaces[self._nbytes]


def _hashes(keys: Keys) -> bytes:
    return b"".join(keys)
