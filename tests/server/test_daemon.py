"""A real daemon and real clients: what a user sees on one host, also when somebody dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from daemon import Daemon, daemon
from kvstore import Attention, Hit, KVStore, Layout, Miss, hash_chain
from kvstore.errors import InvalidArgument, LayoutMismatch, Unavailable
from kvstore.session import LocalSession
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


@pytest.fixture(params=["embedded", "channel"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[LocalSession]:
    """One interface, two ways to it: every test that takes it is a test of conformance."""
    if request.param == "embedded":
        with KVStore(dram=32 << 20) as embedded:
            yield embedded
            embedded.check()
        return
    with daemon(tmp_path, "--dram", "32MiB") as running, KVStoreClient(running.target) as client:
        yield client


def blocks(n: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, LAYOUT.block_bytes, np.uint8) for _ in range(n)]


def empty(n: int) -> list[np.ndarray]:
    return [np.zeros(LAYOUT.block_bytes, np.uint8) for _ in range(n)]


def test_a_get_returns_the_exact_bytes_that_were_put(store: LocalSession) -> None:
    namespace = store.open_namespace("t", LAYOUT)
    chain = hash_chain(range(64), block_tokens=16, key=namespace.key)
    data = blocks(4)
    assert store.match(namespace, chain) == 0
    result = store.put(namespace, chain[:3], data[:3], position=0)
    assert (result.stored, result.existed) == (3, 0)
    assert store.put(namespace, chain[:3], data[:3]).existed == 3
    assert store.match(namespace, chain) == 3
    got = empty(4)
    answers = store.get_into(namespace, chain, got)
    assert [type(a) for a in answers] == [Hit, Hit, Hit, Miss]
    for i in range(3):
        np.testing.assert_array_equal(got[i], data[i])


def test_two_ranks_put_parts_and_one_reads_the_whole(store: LocalSession) -> None:
    namespace = store.open_namespace("t", LAYOUT)
    chain = hash_chain(range(16), block_tokens=16, key=namespace.key)
    whole = blocks(1)[0]
    cut = LAYOUT.cells[1].offset
    first = store.put(namespace, chain, [whole[:cut]], put_id=b"x" * 16, cells=[0])
    assert (first.stored, first.waiting) == (0, 1)
    assert store.match(namespace, chain) == 0
    second = store.put(namespace, chain, [whole[cut:]], put_id=b"x" * 16, cells=[1, 2])
    assert second.stored == 1
    got = empty(1)
    store.get_into(namespace, chain, got)
    np.testing.assert_array_equal(got[0], whole)


def test_a_view_shows_the_bytes_without_a_copy(store: LocalSession) -> None:
    namespace = store.open_namespace("t", LAYOUT)
    chain = hash_chain(range(32), block_tokens=16, key=namespace.key)
    data = blocks(2)
    store.put(namespace, chain, data)
    with store.view(namespace, chain) as view:
        for shown, put in zip(view.blocks, data, strict=True):
            np.testing.assert_array_equal(shown, put)
            assert not shown.flags.writeable
        assert store.stats().leased_blocks == 2
        shown = None  # type: ignore[assignment]
    assert store.stats().leased_blocks == 0


def test_a_drop_is_a_miss(store: LocalSession) -> None:
    namespace = store.open_namespace("t", LAYOUT)
    chain = hash_chain(range(32), block_tokens=16, key=namespace.key)
    store.put(namespace, chain, blocks(2))
    assert store.drop(namespace, chain[1:]) == 1
    assert store.match(namespace, chain) == 1


def test_wrong_buffers_are_refused_with_their_name(store: LocalSession) -> None:
    namespace = store.open_namespace("t", LAYOUT)
    chain = hash_chain(range(32), block_tokens=16, key=namespace.key)
    with pytest.raises(LayoutMismatch, match=r"sources\[0\]"):
        store.put(namespace, chain, [np.zeros(3, np.uint8)] * 2)
    with pytest.raises(InvalidArgument, match="1 buffers for 2 keys"):
        store.get_into(namespace, chain, empty(1))


def test_tenants_of_other_names_share_nothing(store: LocalSession) -> None:
    one, two = store.open_namespace("one", LAYOUT), store.open_namespace("two", LAYOUT)
    tokens = range(32)
    chain = hash_chain(tokens, block_tokens=16, key=one.key)
    store.put(one, chain, blocks(2))
    assert store.match(two, chain) == 0
    assert store.match(two, hash_chain(tokens, block_tokens=16, key=two.key)) == 0


def test_keys_survive_a_restart(tmp_path: Path) -> None:
    keys = []
    for _ in range(2):
        with daemon(tmp_path) as running, KVStoreClient(running.target) as client:
            keys.append(client.open_namespace("t", LAYOUT).key)
            assert os.stat(tmp_path / "data" / "chain.key").st_mode & 0o777 == 0o600
    assert keys[0] == keys[1]


WRITER = """
import sys, numpy as np
from kvstore import commands as c
from kvstore_client import KVStoreClient
from test_daemon import LAYOUT
client = KVStoreClient(sys.argv[1])
ns = client.open_namespace("t", LAYOUT)
hashes = np.random.default_rng(5).integers(0, 256, (8, 32), np.uint8)
client._call(c.Reserve(namespace=ns.id, put_id=b"w" * 16, hashes=hashes,
                       cells=np.empty(0, np.uint32)), c.Reserved)
print("reserved", flush=True)
sys.stdin.read()
"""


def test_a_writer_killed_in_mid_put_leaves_nothing(server: Daemon) -> None:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, server.target],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parent}:{Path(__file__).parent.parent}"},
    )
    with writer, KVStoreClient(server.target) as client:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"reserved\n"
        assert client.stats().pending_blocks == 8
        writer.kill()
        writer.wait()
        while client.stats().connections > 1:  # the daemon sees the death in its own time
            pass
        stats = client.stats()
        assert (stats.pending_blocks, stats.quarantined_blocks, stats.used_bytes) == (0, 0, 0)


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
