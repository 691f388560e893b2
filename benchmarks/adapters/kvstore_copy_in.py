"""Ours: `kvstore-server` and shared memory, clients whose blocks the daemon copies in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.adapters import kvstore_daemon
from benchmarks.adapters.kvstore_daemon import Client

__all__ = ["NAME", "REQUIREMENTS", "Client", "start"]

NAME = "kvstore, shared memory (copy-in)"
REQUIREMENTS = kvstore_daemon.REQUIREMENTS


@contextlib.contextmanager
def start(folder: Path, environment: Path, pool_bytes: int) -> Iterator[dict[str, Any]]:
    """A daemon that alone writes its pool."""
    flags = ("--trust", "copy-in", "--no-grpc")
    with kvstore_daemon.start(folder, environment, pool_bytes, flags) as info:
        yield info
