"""A real etcd for tests, which they may stop, pause and kill; nothing of it is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvstore_engines.etcd import EtcdServer, find_etcd, free_port

__all__ = ["Etcd", "etcd", "free_port", "running_etcd", "shared_etcd"]


class Etcd(EtcdServer):
    """An etcd, and the faults that it can have."""

    def __init__(self, folder: Path, *flags: str, scheme: str = "http") -> None:
        super().__init__(find_etcd(), folder, *flags, scheme=scheme)

    def kill(self) -> None:
        """Ends it as a crash does, also while it is paused."""
        self.stop(signal.SIGKILL)

    def pause(self) -> None:
        """Stops the process where it stands: connections stay open, nothing is answered. When this
        returns all of its threads have stopped."""
        assert self.process
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def resume(self) -> None:
        """Ends a `pause`."""
        assert self.process
        self.process.send_signal(signal.SIGCONT)


@contextmanager
def running_etcd(folder: Path, *flags: str, scheme: str = "http") -> Iterator[Etcd]:
    """An etcd that serves, for the length of a `with`."""
    server = Etcd(folder, *flags, scheme=scheme)
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """One etcd for all tests that leave it as it is, each with a cluster name of its own."""
    with running_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    """An etcd of the test's own, which it may stop, pause and kill."""
    with running_etcd(tmp_path / "etcd") as server:
        yield server
