"""A real daemon and real clients: what a user sees on one host, also when somebody dies."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from daemon import Daemon, daemon
from kvstore import Attention, Layout
from kvstore.errors import Unavailable
from kvstore_client import KVStoreClient

LAYOUT = Layout(
    model="test",
    attention=Attention.GQA,
    layers=2,
    kv_heads=3,
    head_dim=16,
    dtype="float32",
    block_tokens=16,
)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--dram", "32MiB") as running:
        yield running


def test_keys_survive_a_restart(tmp_path: Path) -> None:
    keys = []
    for _ in range(2):
        with daemon(tmp_path) as running, KVStoreClient(running.target) as client:
            keys.append(client.open_namespace("t", LAYOUT).key)
            assert os.stat(tmp_path / "data" / "chain.key").st_mode & 0o777 == 0o600
    assert keys[0] == keys[1]


def test_a_killed_daemon_is_a_typed_error_and_a_new_one_serves(tmp_path: Path) -> None:
    with daemon(tmp_path) as running:
        client = KVStoreClient(running.target)
        running.kill(signal.SIGKILL)
        with pytest.raises(Unavailable):
            client.open_namespace("t", LAYOUT)
        client.close()
    with daemon(tmp_path) as again, KVStoreClient(again.target) as client:
        assert client.stats().blocks == 0


def test_a_second_daemon_is_refused_with_a_clear_message(server: Daemon) -> None:
    second = Daemon(server.socket.parent)
    try:
        _, error = second.process.communicate(timeout=20)
        assert second.process.returncode == Unavailable.code
        assert "already serves" in error
    finally:
        second.end()


def test_sigterm_ends_the_daemon_and_its_socket(server: Daemon) -> None:
    assert server.kill(signal.SIGTERM) == 0
    assert not server.socket.exists()


@pytest.mark.parametrize("flag", [("--dram", "9999TiB"), ("--dram", "much"), ("--dram", "4KiB")])
def test_an_impossible_pool_is_refused_at_start(tmp_path: Path, flag: tuple[str, str]) -> None:
    refused = Daemon(tmp_path, *flag)
    try:
        _, error = refused.process.communicate(timeout=20)
        assert refused.process.returncode == 2
        assert "dram" in error
    finally:
        refused.end()


def test_garbage_on_the_socket_hurts_only_its_sender(server: Daemon) -> None:
    rng = np.random.default_rng(1)
    for length in (1, 8, 64, 4096):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(server.socket))
            sock.sendall(rng.bytes(length))
    with KVStoreClient(server.target) as client:
        assert client.stats().blocks == 0


def test_no_daemon_is_unavailable_at_once(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="no daemon answers"):
        KVStoreClient(f"unix://{tmp_path}/none.sock")
