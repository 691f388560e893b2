"""Reads make no call, and the store knows of them all the same before it evicts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from daemon import daemon
from kvstore import Hit, KVStore, Layout, Session
from kvstore_client import KVStoreClient

BLOCK_BYTES = 3840  # with its header one granule
LAYOUT = Layout.opaque(model="reads", block_bytes=BLOCK_BYTES, block_tokens=16)


@pytest.fixture(params=["embedded", "direct"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Session]:
    if request.param == "embedded":
        with KVStore(dram=1 << 20) as embedded:
            yield embedded
        return
    with daemon(tmp_path, "--dram", "1MiB") as running, KVStoreClient(running.target) as client:
        yield client


def test_what_was_just_read_is_not_what_the_next_put_evicts(store: Session) -> None:
    namespace = store.open_namespace("reads", LAYOUT)
    hashes = np.random.default_rng(0).integers(0, 256, (400, 32), np.uint8)
    block, target = [np.zeros(BLOCK_BYTES, np.uint8)], [np.zeros(BLOCK_BYTES, np.uint8)]
    n = 0
    while not store.stats().evicted:  # full, and the first block has gone
        store.put(namespace, hashes[n : n + 1], block)
        n += 1
    oldest = hashes[1:2]
    assert isinstance(store.get_into(namespace, oldest, target)[0], Hit)
    gone = store.stats().evicted
    while store.stats().evicted == gone:  # a client may hold empty slots for its next puts
        store.put(namespace, hashes[n : n + 1], block)
        n += 1
    assert store.match(namespace, oldest).count == 1
    assert store.match(namespace, hashes[2:3]).count == 0
