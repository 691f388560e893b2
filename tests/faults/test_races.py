"""Readers, writers and evictions at once, in several processes: never a wrong byte."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import pytest
from faults.workers import content, hashes, is_right, layout, says, worker

from daemon import daemon
from kvstore import Hit
from kvstore_client import KVStoreClient


def race(folder: Path, *, trust: str, block_bytes: int, reads: int, seed: int) -> tuple[int, int]:
    """Two writers and two readers over twice as many keys as fit; returns (hits, evictions)."""
    dram = 2 << 20
    n_keys = 2 * dram // (-(-block_bytes // 4096) * 4096)
    numbers = (block_bytes, n_keys)
    with (
        contextlib.ExitStack() as stack,
        daemon(folder, "--dram", str(dram), "--trust", trust) as running,
        KVStoreClient(running.target) as client,
    ):
        writers = [
            stack.enter_context(worker("put", running.target, seed + i, *numbers)) for i in range(2)
        ]
        assert [says(writer) for writer in writers] == ["ready", "ready"]
        readers = [
            stack.enter_context(worker("read", running.target, seed + 8 + i, *numbers, reads))
            for i in range(2)
        ]
        assert [says(reader) for reader in readers] == ["ready", "ready"]
        hits = 0
        for reader in readers:
            _, found, _, wrong = says(reader).split()
            assert int(wrong) == 0, f"{wrong} of {found} hits were wrong"
            hits += int(found)
        for writer in writers:
            assert writer.stdin
            writer.stdin.close()
            assert says(writer).startswith("stored ")
            writer.stdin = None
        return hits, client.stats().evicted


@pytest.mark.parametrize("trust", ["direct", "copy-in"])
@pytest.mark.parametrize("block_bytes", [3840, 60_000])
def test_readers_never_see_a_wrong_byte(tmp_path: Path, trust: str, block_bytes: int) -> None:
    hits, evicted = race(tmp_path, trust=trust, block_bytes=block_bytes, reads=8_000, seed=11)
    assert hits > 1_000
    assert evicted > 100


def test_many_reads_see_no_wrong_byte(tmp_path: Path) -> None:
    hits, evicted = race(tmp_path, trust="direct", block_bytes=3840, reads=150_000, seed=23)
    assert hits > 30_000
    assert evicted > 300


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("trust", ["direct", "copy-in"])
def test_a_million_reads_see_no_wrong_byte(tmp_path: Path, trust: str) -> None:
    hits, evicted = race(tmp_path, trust=trust, block_bytes=3840, reads=500_000, seed=23)
    assert hits > 100_000
    assert evicted > 1_000


def test_two_engines_that_put_one_key_never_mix(tmp_path: Path) -> None:
    """Two writers of the same few keys, each block's words telling who wrote it and when."""
    numbers = (60_000, 8)
    with (
        daemon(tmp_path, "--dram", "2MiB") as running,
        KVStoreClient(running.target) as client,
        worker("put", running.target, 1, *numbers) as one,
        worker("put", running.target, 2, *numbers) as other,
    ):
        assert (says(one), says(other)) == ("ready", "ready")
        namespace = client.open_namespace("race", layout(60_000))
        keys, target, hits = hashes(8), np.zeros(60_000, np.uint8), 0
        for i in range(4_000):
            key = i % 8
            if isinstance(client.get_into(namespace, keys[key : key + 1], [target])[0], Hit):
                hits += 1
                assert is_right(target, key)
        assert hits > 100
        assert client.put(namespace, keys[:1], [content(0, 1, 60_000)]).not_stored <= 1
