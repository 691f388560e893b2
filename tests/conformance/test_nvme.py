"""The NVMe tier by every way to a store: what leaves memory comes back, also after a restart."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from conformance.conftest import WAYS, random_hashes

from daemon import daemon
from kvstore import ExplainStatus, Hit, KVStore, Layout, Session, Tier
from kvstore.commands import Stats
from kvstore.index import IndexReader, Match
from kvstore.nvme.nixl import why_not
from kvstore.session.base import MissReason
from kvstore.store import NvmePolicy
from kvstore_client import KVStoreClient

POOL = 8 << 20
VOLUME = 128 << 20
LAYOUT = Layout.opaque(model="test", block_bytes=200_000, block_tokens=16)
N = 100  # blocks; about 36 of them fit into memory
SECRET = b"s" * 32
WAIT_S = 30.0
Open = Callable[[], contextlib.AbstractContextManager[Session]]


OVER_NIXL = pytest.param(
    "over nixl",
    marks=pytest.mark.skipif(bool(why_not()), reason="NIXL's POSIX plugin does not work here"),
)


# A node of a cluster has this tier as any daemon does; how a cluster uses it, see test_nodes.py.
@pytest.fixture(params=[*(way for way in WAYS if way != "cluster"), OVER_NIXL])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens a store on one volume; again and again, as if restarted."""
    way, volume = request.param, tmp_path / "nvme"
    volume.mkdir()

    @contextlib.contextmanager
    def open_one() -> Iterator[Session]:
        if way == "embedded":
            policy = NvmePolicy(every=True)
            with KVStore(
                dram=POOL, secret=SECRET, nvme={volume: VOLUME}, nvme_policy=policy
            ) as store:
                yield store
                store.check()
            return
        flags = ["--dram", str(POOL), "--nvme", f"{volume}:{VOLUME}", "--nvme-admission", "every"]
        flags += ["--trust", "copy-in" if way == "copy-in" else "direct"]
        flags += ["--nvme-engine", "nixl" if way == "over nixl" else "pread"]
        with daemon(tmp_path, *flags, grpc=way == "grpc") as running:
            grpc = f"grpc+unix://{running.grpc_socket}"
            with KVStoreClient(grpc if way == "grpc" else running.target, timeout_s=WAIT_S) as one:
                yield one

    return open_one


def block(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, LAYOUT.block_bytes, np.uint8)


def fill(store: Session, hashes: np.ndarray, *, persist: bool = True) -> None:
    namespace = store.open_namespace("a", LAYOUT)
    for first in range(0, len(hashes), 10):
        put = store.put(
            namespace,
            hashes[first : first + 10],
            [block(i) for i in range(first, min(first + 10, len(hashes)))],
            parent=hashes[first - 1].tobytes() if first else b"",
            position=first,
            persist=persist,
            timeout_s=WAIT_S,
        )
        assert put.stored == 10
        if persist:
            assert put.persisted == 10


def get(store: Session, hashes: np.ndarray) -> list[Tier | MissReason]:
    """Where each block was, or why it was not got; those that were are the right bytes."""
    namespace = store.open_namespace("a", LAYOUT)
    rows = [np.empty(LAYOUT.block_bytes, np.uint8) for _ in hashes]
    results = store.get_into(namespace, hashes, rows, timeout_s=WAIT_S)
    for i, result in enumerate(results):
        if isinstance(result, Hit):
            assert (rows[i] == block(i)).all()
    return [each.tier if isinstance(each, Hit) else each.reason for each in results]


def recovered(store: Session) -> int:
    """How many blocks a restarted store has found."""
    return until(store, lambda stats: bool(stats.nvme_ready)).nvme_blocks


def until(store: Session, holds: Callable[[Stats], bool]) -> Stats:
    """The counters, once something holds of them."""
    end_s = time.monotonic() + WAIT_S
    while not holds(stats := store.stats()):
        assert time.monotonic() < end_s, stats
    return stats


def test_what_does_not_fit_into_memory_comes_back_from_nvme(open_store: Open) -> None:
    hashes = random_hashes(N)
    with open_store() as store:
        assert recovered(store) == 0
        fill(store, hashes)
        namespace = store.open_namespace("a", LAYOUT)
        before = store.stats()
        matched = store.match(namespace, hashes)
        assert matched.count == N
        assert set(matched.tiers) == {Tier.DRAM, Tier.NVME}
        found = get(store, hashes)
        # What comes may take the place of what was to be read behind it.
        assert found.count(Tier.NVME) >= matched.tiers.count(Tier.NVME)
        assert set(found) <= {Tier.DRAM, Tier.NVME}
        stats = store.stats()
        assert (stats.lookups - before.lookups, stats.hits - before.hits) == (2 * N, 2 * N)
        assert stats.cold_hits == matched.tiers.count(Tier.NVME) + found.count(Tier.NVME)
        assert stats.promoted >= matched.tiers.count(Tier.NVME)
        assert stats.corrupted == 0


def test_a_restart_keeps_what_was_persisted(open_store: Open) -> None:
    hashes = random_hashes(N)
    with open_store() as store:
        recovered(store)
        fill(store, hashes)
    with open_store() as store:
        assert recovered(store) == N
        assert get(store, hashes) == [Tier.NVME] * N


def test_what_was_dropped_does_not_come_back(open_store: Open) -> None:
    hashes = random_hashes(N)
    with open_store() as store:
        recovered(store)
        fill(store, hashes)
        namespace = store.open_namespace("a", LAYOUT)
        assert store.drop(namespace, hashes[40:60], timeout_s=WAIT_S) == 20
    with open_store() as store:
        assert recovered(store) == N - 20
        namespace = store.open_namespace("a", LAYOUT)
        assert store.match(namespace, hashes).count == 40
        assert store.drop_namespace(namespace, timeout_s=WAIT_S) == N - 20
    with open_store() as store:
        assert recovered(store) == 0


def test_a_match_brings_blocks_ahead_of_need(open_store: Open) -> None:
    hashes = random_hashes(20)
    with open_store() as store:
        recovered(store)
        fill(store, hashes)
    with open_store() as store:
        recovered(store)
        namespace = store.open_namespace("a", LAYOUT)
        assert store.match(namespace, hashes, prefetch=True).tiers == [Tier.NVME] * 20
        until(store, lambda stats: stats.promoted == 20)
        assert store.match(namespace, hashes).tiers == [Tier.DRAM] * 20


def test_explain_tells_the_tier(open_store: Open) -> None:
    hashes = random_hashes(N)
    with open_store() as store:
        recovered(store)
        fill(store, hashes)
        namespace = store.open_namespace("a", LAYOUT)
        reports = store.explain(namespace, hashes)
        assert {report.status for report in reports} == {ExplainStatus.STORED}
        assert [report.tier for report in reports] == store.match(namespace, hashes).tiers


def test_a_view_shows_blocks_from_nvme(open_store: Open) -> None:
    hashes = random_hashes(20)
    with open_store() as store:
        recovered(store)
        fill(store, hashes)
    with open_store() as store:
        recovered(store)
        namespace = store.open_namespace("a", LAYOUT)
        with store.view(namespace, hashes, timeout_s=WAIT_S) as view:
            assert len(view.blocks) == 20
            assert all((view.blocks[i] == block(i)).all() for i in range(20))


def test_a_block_whose_row_is_just_being_moved_is_looked_at_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = random_hashes(20)
    settings = {"dram": POOL, "secret": SECRET, "nvme": {tmp_path: VOLUME}}
    with KVStore(**settings) as store:
        recovered(store)
        fill(store, hashes)
    whole, calls = IndexReader.match, 0

    def missing_once(self: IndexReader, namespace: int, asked: np.ndarray) -> Match:
        nonlocal calls
        calls += 1
        return whole(self, namespace, asked) if calls != 2 else Match(np.empty((0, 8), np.uint64))

    with KVStore(**settings) as store:
        recovered(store)
        store.open_namespace("a", LAYOUT)
        monkeypatch.setattr(IndexReader, "match", missing_once)
        assert get(store, hashes) == [Tier.NVME] * 20
        assert calls > 2
