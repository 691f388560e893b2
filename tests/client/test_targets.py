"""Targets: what they say, and which way is taken."""

from __future__ import annotations

import pytest

from kvstore.errors import InvalidArgument, Unavailable
from kvstore_client import KVStoreClient
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
