"""Targets: what they say, and which way is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from daemon import daemon
from kvstore import Layout, Miss, MissReason, NamespaceHandle
from kvstore.errors import InvalidArgument, Unavailable
from kvstore_client import KVStoreClient, targets
from kvstore_client.targets import DataPath, Target, default_target, parse_target


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:///run/kvstore.sock", Target(DataPath.SHARED_MEMORY, "/run/kvstore.sock")),
        ("grpc+unix:///run/k.grpc.sock", Target(DataPath.GRPC, "unix:/run/k.grpc.sock")),
        ("grpc://127.0.0.1:7000", Target(DataPath.GRPC, "127.0.0.1:7000")),
        ("grpc://[::1]:7000", Target(DataPath.GRPC, "[::1]:7000")),
    ],
)
def test_a_target_says_how_and_where(text: str, expected: Target) -> None:
    assert parse_target(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kvstore.sock",
        "unix://kvstore.sock",
        "http://x",
        "grpc://host",
        "grpc://host:x",
        "grpc:///",
    ],
)
def test_other_targets_are_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"target: .*expected unix:///"):
        parse_target(text)


def test_the_default_is_the_users_own_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nowhere")
    assert default_target() == "unix:///nowhere/kvstore.sock"
    with pytest.raises(Unavailable, match=r"/nowhere/kvstore.sock"):
        KVStoreClient(timeout_s=0.2)


def test_a_client_says_what_it_is(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "8MiB", grpc=True) as running:
        with KVStoreClient(running.target) as client:
            assert client.data_path is DataPath.SHARED_MEMORY
            assert repr(client) == f"KVStoreClient('{running.target}', data_path='shared memory')"
        # The banner's path of gRPC's socket, under the channel's scheme.
        with pytest.raises(Unavailable, match=rf"write grpc\+unix://{running.grpc_socket}"):
            KVStoreClient(f"unix://{running.grpc_socket}")
        with pytest.raises(Unavailable, match=rf"no store answers at unix:{running.socket}"):
            KVStoreClient(f"grpc+unix://{running.socket}")


def test_a_daemon_whose_memory_cannot_be_mapped_is_reached_by_grpc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no mapping here, for the test")

    monkeypatch.setattr(targets, "ChannelSession", refuse)
    with (
        daemon(tmp_path, "--dram", "8MiB", grpc=True) as running,
        KVStoreClient(running.target) as client,
    ):
        assert client.data_path is DataPath.GRPC
        assert client.info().version
    assert "no shared memory" in caplog.text


@pytest.mark.parametrize("scheme", ["unix", "grpc+unix"])
def test_a_lazy_client_needs_no_store_and_finds_one_later(tmp_path: Path, scheme: str) -> None:
    layout = Layout.opaque(model="test", block_bytes=100, block_tokens=1)
    handle = NamespaceHandle(id=1, name="x", layout=layout, generation=0, key=bytes(32))
    socket = "kvstore.sock" if scheme == "unix" else "kvstore.grpc.sock"
    with KVStoreClient(f"{scheme}://{tmp_path}/{socket}", lazy=True, timeout_s=30.0) as client:
        assert client.match(handle, [bytes(32)]).count == 0
        got = client.get_into(handle, [bytes(32)], [np.zeros(100, np.uint8)])
        assert got == [Miss(MissReason.UNAVAILABLE)]
        assert client.put(handle, [bytes(32)], [np.zeros(100, np.uint8)]).not_stored == 1
        with pytest.raises(Unavailable):
            client.stats(timeout_s=0.05)
        with daemon(tmp_path, "--dram", "8MiB", grpc=scheme != "unix"):
            assert client.stats().total_bytes == 8 << 20
