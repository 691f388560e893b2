"""Ours: `kvstore-server` by its gRPC fallback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.adapters import kvstore_daemon
from benchmarks.adapters.kvstore_daemon import Client
from kvstore_client import KVStoreClient

__all__ = ["NAME", "REQUIREMENTS", "Client", "start"]

NAME = "kvstore, gRPC"
REQUIREMENTS = kvstore_daemon.REQUIREMENTS


@contextlib.contextmanager
def start(folder: Path, environment: Path, pool_bytes: int) -> Iterator[dict[str, Any]]:
    """A daemon with its gateway."""
    with kvstore_daemon.start(folder, environment, pool_bytes, ()) as info:
        target = f"grpc+unix://{folder / 'kvstore.grpc.sock'}"
        with KVStoreClient(target, lazy=True) as client:
            client.info(timeout_s=30.0)
        yield {**info, "target": target}
