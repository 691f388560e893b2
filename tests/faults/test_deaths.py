"""Clients and daemons that die or stop at the worst moment, and what the others see of it."""

from __future__ import annotations

import gc
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from faults.workers import content, hashes, is_right, layout, says, tell, worker

from daemon import Daemon, daemon
from kvstore import Hit, Miss, MissReason, limits
from kvstore.commands import Stats
from kvstore.errors import DeadlineExceeded, Unavailable
from kvstore_client import KVStoreClient

BLOCK_BYTES = 3840  # with its header exactly one granule
BIG_BLOCK_BYTES = 64 << 10
WAIT_S = 20.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--dram", "4MiB") as running:
        yield running


def eventually(client: KVStoreClient, reached: Callable[[Stats], bool]) -> Stats:
    """Asks until it is so: a death is noticed in the daemon's own time, and tells nobody."""
    deadline = time.monotonic() + WAIT_S
    while not reached(stats := client.stats()):
        assert time.monotonic() < deadline, stats
    return stats


def put_all(client: KVStoreClient, n: int, block_bytes: int, version: int = 1) -> None:
    namespace = client.open_namespace("race", layout(block_bytes))
    blocks = [content(key, version, block_bytes) for key in range(n)]
    assert client.put(namespace, hashes(n), blocks).stored == n


def test_a_writer_killed_in_mid_put_leaves_nothing(server: Daemon) -> None:
    with (
        worker("mid-put", server.target, BLOCK_BYTES, 8) as writer,
        KVStoreClient(server.target) as client,
    ):
        assert says(writer) == "reserved 8"
        assert client.stats().pending_blocks == 8
        writer.kill()
        stats = eventually(client, lambda now: now.connections == 1 and not now.used_bytes)
        assert (stats.pending_blocks, stats.quarantined_blocks, stats.blocks) == (0, 0, 0)
        namespace = client.open_namespace("race", layout(BLOCK_BYTES))
        assert client.match(namespace, hashes(8, seed=1)).count == 0


def test_a_reader_killed_in_mid_get_gives_its_blocks_back(server: Daemon) -> None:
    with KVStoreClient(server.target) as client:
        put_all(client, 8, BLOCK_BYTES)
        with worker("view", server.target, BLOCK_BYTES, 8) as reader:
            assert says(reader) == "holds 8"
            assert client.stats().leased_blocks == 8
            reader.kill()
            eventually(client, lambda now: now.leased_blocks == 0)
        namespace = client.open_namespace("race", layout(BLOCK_BYTES))
        assert client.drop_namespace(namespace) == 8
        assert client.stats().used_bytes == 0


def refill_and_check(client: KVStoreClient, n_keys: int) -> int:
    """Puts n keys, several pools full, and gets them all; returns how many were there."""
    namespace = client.open_namespace("race", layout(BLOCK_BYTES))
    keys = hashes(n_keys, seed=2)
    blocks = [content(key, 1, BLOCK_BYTES) for key in range(n_keys)]
    for at in range(0, n_keys, 64):
        client.put(namespace, keys[at : at + 64], blocks[at : at + 64])
    return check_all(client, n_keys)


def check_all(client: KVStoreClient, n_keys: int) -> int:
    namespace = client.open_namespace("race", layout(BLOCK_BYTES))
    keys, target, found = hashes(n_keys, seed=2), np.zeros(BLOCK_BYTES, np.uint8), 0
    for key in range(n_keys):
        if isinstance(client.get_into(namespace, keys[key : key + 1], [target])[0], Hit):
            found += 1
            assert is_right(target, key)
    return found


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_stopped_writer_that_goes_on_writes_over_nobody(server: Daemon, forgotten: bool) -> None:
    """While it is stopped the pool is filled again and again; in one case its put is dropped."""
    n_fill = (4 << 20) // 4096
    with (
        worker("mid-put", server.target, BLOCK_BYTES, 64) as writer,
        KVStoreClient(server.target) as client,
    ):
        assert says(writer) == "reserved 64"
        os.kill(writer.pid, signal.SIGSTOP)
        namespace = client.open_namespace("race", layout(BLOCK_BYTES))
        if forgotten:
            client.drop_namespace(namespace)
            assert client.stats().quarantined_blocks == 64
        assert refill_and_check(client, 3 * n_fill) > n_fill // 2
        os.kill(writer.pid, signal.SIGCONT)
        tell(writer)
        assert says(writer) == "written"
        assert check_all(client, 3 * n_fill) > n_fill // 2
        tell(writer)
        assert says(writer) == ("stale" if forgotten else "sealed 64")
        visible = client.match(namespace, hashes(64, seed=1)).count
        assert visible == (0 if forgotten else 64)
        assert check_all(client, 3 * n_fill) > n_fill // 2


def test_a_killed_daemon_is_a_miss_at_once_and_an_error_in_time(tmp_path: Path) -> None:
    with (
        daemon(tmp_path, "--dram", "4MiB") as running,
        KVStoreClient(running.target, timeout_s=1.0) as client,
    ):
        put_all(client, 4, BLOCK_BYTES)
        namespace = client.open_namespace("race", layout(BLOCK_BYTES))
        view = client.view(namespace, hashes(4))
        running.kill()
        with pytest.raises(Unavailable):
            client.stats(timeout_s=0.5)
        began = time.monotonic()
        assert client.match(namespace, hashes(4)).count == 0
        target = np.zeros(BLOCK_BYTES, np.uint8)
        missed = client.get_into(namespace, hashes(1), [target])
        assert missed == [Miss(MissReason.UNAVAILABLE)]
        assert client.put(namespace, hashes(1), [target]).not_stored == 1
        assert time.monotonic() - began < 0.5, "an engine's step waited for a dead store"
        assert all(is_right(block, key) for key, block in enumerate(view.blocks))
        view.release()


def test_a_client_finds_the_daemon_that_comes_back(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "4MiB") as running:
        client = KVStoreClient(running.target)
        namespace = client.open_namespace("race", layout(BLOCK_BYTES))
        put_all(client, 4, BLOCK_BYTES)
        running.kill()
    with client, daemon(tmp_path, "--dram", "4MiB") as again:
        assert client.stats(timeout_s=WAIT_S).blocks == 0
        # The handle of the dead daemon's namespace is good for this one's.
        assert client.match(namespace, hashes(4)).count == 0
        assert client.put(namespace, hashes(1), [content(0, 2, BLOCK_BYTES)]).stored == 1
        assert client.match(namespace, hashes(4)).count == 1
        assert again.process.poll() is None


def test_blocks_that_a_smaller_pool_cannot_hold_are_misses(tmp_path: Path) -> None:
    """The handle was good for the pool before the restart; that is no engine's mistake."""
    size = 3 << 20
    with daemon(tmp_path, "--dram", "8MiB") as running:
        client = KVStoreClient(running.target)
        namespace = client.open_namespace("race", layout(size))
        assert client.put(namespace, hashes(1), [content(0, 1, size)]).stored == 1
        running.kill()
    with client, daemon(tmp_path, "--dram", "2MiB"):
        assert client.stats(timeout_s=WAIT_S).blocks == 0
        target = np.zeros(size, np.uint8)
        assert client.match(namespace, hashes(1)).count == 0
        assert client.get_into(namespace, hashes(1), [target]) == [Miss(MissReason.UNAVAILABLE)]
        assert client.put(namespace, hashes(1), [target]).not_stored == 1


def test_a_lost_connection_gives_the_memory_back(tmp_path: Path) -> None:
    """Else a restarted daemon with a pool of half of the memory would not fit beside the old."""
    gc.collect()  # earlier tests' memory may wait for that
    before = mapped_pools()
    with (
        daemon(tmp_path, "--dram", "64MiB") as running,
        KVStoreClient(running.target) as client,
    ):
        put_all(client, 4, BLOCK_BYTES)
        assert mapped_pools() == before + 1
        running.kill()
        deadline = time.monotonic() + WAIT_S
        while mapped_pools() > before:
            assert time.monotonic() < deadline, "the dead daemon's pool is still mapped"


def mapped_pools() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:kvstore-pool")


def test_what_a_client_put_before_it_was_killed_is_there(server: Daemon) -> None:
    """The daemon had not heard of it: its last word was on the board alone."""
    with (
        KVStoreClient(server.target) as client,
        worker("untold", server.target, BLOCK_BYTES, 8) as writer,
    ):
        namespace = client.open_namespace("race", layout(BLOCK_BYTES))
        assert says(writer) == "stored 8"
        target = [np.zeros(BLOCK_BYTES, np.uint8) for _ in range(8)]
        for _ in range(2):  # while it lives, and after
            assert client.match(namespace, hashes(8, seed=1)).count == 8
            assert all(
                isinstance(each, Hit)
                for each in client.get_into(namespace, hashes(8, seed=1), target)
            )
            assert all(is_right(block, key) for key, block in enumerate(target))
            if writer.poll() is None:
                writer.kill()
                eventually(client, lambda now: now.connections == 1)
        assert client.stats().blocks == 8


def test_a_stopped_daemon_costs_no_more_than_the_deadline(server: Daemon) -> None:
    with KVStoreClient(server.target) as client:
        put_all(client, 4, BLOCK_BYTES)
        namespace = client.open_namespace("race", layout(BLOCK_BYTES))
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            # What shared memory holds can still be read: it needs nobody's help.
            assert client.match(namespace, hashes(4)).count == 4
            # Nor do puts, as long as there are slots that were granted before.
            puts = 0
            while True:
                key = hashes(1, seed=100 + puts)
                block = [content(puts, 1, BLOCK_BYTES)]
                if client.put(namespace, key, block, timeout_s=0.3).not_stored:
                    break
                assert client.match(namespace, key).count == 1
                puts += 1
            assert 0 < puts <= limits.MAX_CASTS
            with pytest.raises((DeadlineExceeded, Unavailable)):
                client.stats(timeout_s=0.3)
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        assert client.stats(timeout_s=WAIT_S).blocks >= 4


def test_a_forked_child_gets_an_error_not_a_fault(server: Daemon) -> None:
    with KVStoreClient(server.target) as client:
        put_all(client, 2, BLOCK_BYTES)
        namespace = client.open_namespace("race", layout(BLOCK_BYTES))
        child = os.fork()
        if child == 0:
            ok = client.match(namespace, hashes(2)).count == 0
            try:
                client.stats()
            except Unavailable as error:
                ok = ok and "fork" in str(error)
            client.close()
            os._exit(0 if ok else 1)
        _, status = os.waitpid(child, 0)
        assert status == 0
        assert client.match(namespace, hashes(2)).count == 2  # the parent's connection lives
        assert client.stats().connections == 1
