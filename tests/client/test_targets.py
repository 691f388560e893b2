"""Targets: what they say, and which way is taken."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from cluster.nodes import LAYOUT, Nodes, blocks, chain, nodes

from daemon import daemon
from kvstore import Hit, Layout, Miss, MissReason, NamespaceHandle, Tier
from kvstore.errors import InvalidArgument, PermissionDenied, Unavailable
from kvstore_client import AsyncKVStoreClient, KVStoreClient, targets
from kvstore_client.cluster.access import find_tls, find_token
from kvstore_client.targets import (
    DataPath,
    Target,
    connect_to_ask,
    default_target,
    parse_target,
)
from kvstore_proto.cluster.rpc import Tls, client_token


@pytest.fixture(autouse=True)
def no_access_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of whoever runs the tests must not change what they see."""
    for name in ("TOKEN", "TOKEN_FILE", "TLS_CA", "TLS_CERTIFICATE", "TLS_KEY"):
        monkeypatch.delenv(f"KVSTORE_CLUSTER_{name}", raising=False)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unix:///run/kvstore.sock", Target(DataPath.SHARED_MEMORY, "/run/kvstore.sock")),
        ("grpc+unix:///run/k.grpc.sock", Target(DataPath.GRPC, "unix:/run/k.grpc.sock")),
        ("grpc://127.0.0.1:7000", Target(DataPath.GRPC, "127.0.0.1:7000")),
        ("grpc://[::1]:7000", Target(DataPath.GRPC, "[::1]:7000")),
        ("cluster://h:7420", Target(DataPath.CLUSTER, "h:7420")),
        (
            "cluster://10.0.0.1:7420,[::1]:7421,h-2.x:1?transfer=grpc&replicas=3",
            Target(DataPath.CLUSTER, "10.0.0.1:7420,[::1]:7421,h-2.x:1", "grpc", 3),
        ),
        ("cluster://h:1?replicas=1", Target(DataPath.CLUSTER, "h:1", None, 1)),
        (
            "cluster://h:1?ring=1GiB&arena=64MiB",
            Target(DataPath.CLUSTER, "h:1", arena=64 << 20, ring=1 << 30),
        ),
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
        "grpc://[::1",
        "grpc://a@b:1",
        "grpc://a:1,b:2",
        "clusters://h:1",
    ],
)
def test_other_targets_are_refused_with_the_forms_there_are(text: str) -> None:
    with pytest.raises(InvalidArgument, match=r"target: .*expected unix:///"):
        parse_target(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cluster://", "'' is not HOST:PORT"),
        ("cluster://h", "'h' is not HOST:PORT"),
        ("cluster://h:1,", "'' is not HOST:PORT"),
        ("cluster://h:1,g:x", "'g:x' is not HOST:PORT"),
        ("cluster://h:0", "'h:0' is not HOST:PORT"),
        ("cluster://h:70000", "'h:70000' is not HOST:PORT"),
        ("cluster://h:1/x", "'h:1/x' is not HOST:PORT"),
        ("cluster://secret@h:1", "is not HOST:PORT"),
        ("cluster://h:1#x", "is not HOST:PORT"),
        ("cluster://[::1:7", "is not HOST:PORT"),
        ("cluster://h:1?transfer=carrier", "transfer is none of shm, nixl, ucxx, grpc"),
        ("cluster://h:1?transfer=", "transfer is none of"),
        ("cluster://h:1?replicas=0", "replicas must be 1 to 7"),
        ("cluster://h:1?replicas=8", "replicas must be 1 to 7"),
        ("cluster://h:1?replicas=", "replicas must be 1 to 7"),
        ("cluster://h:1?copies=2", "transfer, replicas, arena, ring, each once"),
        ("cluster://h:1?ring=much", "ring: 'much' is no size: write 8GiB"),
        ("cluster://h:1?arena=0", "arena must be 1B to 1TiB"),
        ("cluster://h:1?replicas=2&replicas=3", "each once"),
    ],
)
def test_a_cluster_s_target_that_is_none_is_told_why(text: str, words: str) -> None:
    with pytest.raises(InvalidArgument, match="target: ") as caught:
        parse_target(text)
    assert words in caught.value.message


def test_a_token_is_an_argument_else_a_variable_else_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidArgument, match=r"token: .*kvstore-server cluster-token"):
        find_token(None)
    path = tmp_path / "token"
    path.write_text("of-the-file\n")
    monkeypatch.setenv("KVSTORE_CLUSTER_TOKEN_FILE", str(path))
    assert find_token(None) == "of-the-file"
    monkeypatch.setenv("KVSTORE_CLUSTER_TOKEN", "of-the-variable")
    assert find_token(None) == "of-the-variable"
    monkeypatch.setenv("KVSTORE_CLUSTER_TOKEN", "")
    assert find_token(None) == "of-the-file"
    assert find_token("given") == "given"


@pytest.mark.parametrize("content", [b"", b"\n", b"two\nlines", b"\xff\xfe", None])
def test_a_file_without_a_token_is_named(
    content: bytes | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setenv("KVSTORE_CLUSTER_TOKEN_FILE", str(path))
    with pytest.raises(InvalidArgument, match=r"KVSTORE_CLUSTER_TOKEN_FILE: .*holds no token"):
        find_token(None)
    with pytest.raises(InvalidArgument, match=r"^token: holds no token"):
        find_token("a\nb")


def test_certificates_are_named_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_tls() is None
    monkeypatch.setenv("KVSTORE_CLUSTER_TLS_CA", "/ca.pem")
    monkeypatch.setenv("KVSTORE_CLUSTER_TLS_KEY", "/me.key")
    with pytest.raises(InvalidArgument, match=r"KVSTORE_CLUSTER_TLS_CERTIFICATE: .*go together"):
        find_tls()
    monkeypatch.setenv("KVSTORE_CLUSTER_TLS_CERTIFICATE", "/me.pem")
    paths = {"ca": "/ca.pem", "certificate": "/me.pem", "key": "/me.key"}
    assert find_tls() == Tls(**{name: Path(path) for name, path in paths.items()})


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


# -- a cluster ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Two nodes that have everything twice."""
    with nodes(tmp_path_factory.mktemp("nodes"), 2, "--transfer", "grpc") as found:
        yield found


def target_of(found: Nodes, options: str = "?transfer=grpc") -> str:
    return f"cluster://{','.join(found.seeds)}{options}"


def test_a_client_puts_to_a_cluster_and_gets_from_it(two_nodes: Nodes) -> None:
    keys, data = chain(8, 1), blocks(8, 1)
    token = client_token(two_nodes.secret)
    with KVStoreClient(target_of(two_nodes), token=token) as client:
        assert client.data_path is DataPath.CLUSTER
        assert "data_path='cluster'" in repr(client)
        assert token not in repr(client)
        namespace = client.open_namespace("x", LAYOUT)
        put = client.put(namespace, keys, list(data), position=0)
        assert (put.stored, put.replicated) == (8, 8)
        assert client.match(namespace, keys).count == 8
        out = np.zeros_like(data)
        assert client.get_into(namespace, keys, list(out)) == [Hit(Tier.DRAM)] * 8
        np.testing.assert_array_equal(out, data)
        client.open_namespace("w", LAYOUT)  # at one node, which knows others by other numbers
        found = client.info().namespaces
        assert [(each.id, each.name, each.blocks) for each in found] == [(1, "w", 0), (2, "x", 16)]
        assert client.drop(namespace, keys) > 0


def test_a_target_says_for_how_many_copies_a_put_waits(
    two_nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVSTORE_CLUSTER_TOKEN", client_token(two_nodes.secret))
    with KVStoreClient(target_of(two_nodes, "?transfer=grpc&replicas=1")) as client:
        namespace = client.open_namespace("x", LAYOUT)
        put = client.put(namespace, chain(4, 2), list(blocks(4, 2)), position=0)
        assert (put.stored, put.replicated) == (4, 4)  # at one node each, which is what was asked


def test_the_asyncio_client_reaches_a_cluster(
    two_nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "token"
    path.write_text(client_token(two_nodes.secret))
    monkeypatch.setenv("KVSTORE_CLUSTER_TOKEN_FILE", str(path))

    async def use() -> None:
        target = target_of(two_nodes)
        async with await AsyncKVStoreClient.connect(target) as client:
            namespace = await client.open_namespace("y", LAYOUT)
            data = blocks(2, 3)
            assert (await client.put(namespace, chain(2, 3), list(data), position=0)).stored == 2
            async with await client.view(namespace, chain(2, 3)) as view:
                np.testing.assert_array_equal(view.blocks, data)

    asyncio.run(use())


def test_a_wrong_token_is_refused_and_a_lazy_client_waits_for_nobody(two_nodes: Nodes) -> None:
    with pytest.raises(PermissionDenied, match="token is missing or wrong"):
        KVStoreClient(target_of(two_nodes), token="x" * 64)
    with pytest.raises(InvalidArgument, match="token: "):
        KVStoreClient(target_of(two_nodes))
    nobody = "cluster://127.0.0.1:1?transfer=grpc"
    with pytest.raises(Unavailable, match=r"no node of the cluster answers: tried 127.0.0.1:1"):
        KVStoreClient(nobody, token="x", timeout_s=1.0)
    handle = NamespaceHandle(id=0, name="x", layout=LAYOUT, generation=0, key=bytes(32))
    with KVStoreClient(nobody, token="x", lazy=True, timeout_s=0.5) as client:
        assert client.match(handle, [bytes(32)]).count == 0
        assert client.put(handle, [bytes(32)], list(blocks(1, 0))).not_stored == 1


def test_questions_about_a_cluster_need_no_device(two_nodes: Nodes) -> None:
    token = client_token(two_nodes.secret)
    with connect_to_ask(target_of(two_nodes, ""), timeout_s=5.0, token=token) as session:
        assert list(session.status()) == two_nodes.names
    with pytest.raises(InvalidArgument, match="is no cluster"):
        connect_to_ask("unix:///k.sock", timeout_s=5.0, token=token)
