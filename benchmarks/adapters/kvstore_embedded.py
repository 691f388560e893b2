"""Ours: the store in the caller's own process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.adapters import kvstore_daemon
from kvstore import KVStore
from kvstore.__about__ import __version__

NAME = "kvstore, embedded"
SHARED = False
REQUIREMENTS = kvstore_daemon.REQUIREMENTS


@contextlib.contextmanager
def start(folder: Path, environment: Path, pool_bytes: int) -> Iterator[dict[str, Any]]:
    """Nothing to start."""
    del folder, environment
    yield {"dram": pool_bytes, "version": __version__}


class Client(kvstore_daemon.Client):
    """A store of its own."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._session = KVStore(dram=info["dram"])
        self._namespaces = {}
        self._nbytes = 0
