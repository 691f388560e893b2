"""One interface, every way to it: each test here runs against all of them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
from cluster.nodes import nodes

from daemon import daemon
from kvstore import Attention, KVStore, Layout, Session
from kvstore_client import KVStoreClient

POOL_BYTES = 32 << 20
LAYOUT = Layout(
    model="test",
    attention=Attention.GQA,
    layers=2,
    kv_heads=3,
    head_dim=16,
    dtype="float32",
    block_tokens=16,
)
WAYS = ["embedded", "direct", "copy-in", "grpc", "cluster"]
_names = itertools.count()


@dataclass(frozen=True)
class Place:
    """One store and a session with it. holder: a session whose views hold blocks in the store."""

    session: Session
    holder: Session


@pytest.fixture(scope="module", params=WAYS)
def place(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Place]:
    """A store, reached by one of the ways; shared by a module's tests, whose namespaces differ."""
    way = request.param
    if way == "embedded":
        with KVStore(dram=POOL_BYTES) as embedded:
            yield Place(embedded, embedded)
            embedded.check()
        return
    folder = tmp_path_factory.mktemp(way)
    if way == "cluster":
        # One node: what a store counts is counted once. Views of a cluster hold nothing in it.
        flags = ("--dram", "32MiB", "--transfer", "grpc")
        with (
            nodes(folder, 1, *flags, replicas=1) as cluster,
            cluster.client(transfer="grpc") as many,
            KVStoreClient(cluster.daemons["a"].target) as client,
        ):
            yield Place(many, client)
        return
    trust = "copy-in" if way == "copy-in" else "direct"
    with (
        daemon(folder, "--dram", "32MiB", "--trust", trust, grpc=way == "grpc") as running,
        KVStoreClient(running.target) as client,
    ):
        if way != "grpc":
            yield Place(client, client)
            return
        # Views over gRPC are copies, which hold nothing.
        with KVStoreClient(f"grpc+unix://{running.grpc_socket}") as remote:
            yield Place(remote, client)


@pytest.fixture
def store(place: Place) -> Session:
    """The session of `place`."""
    return place.session


@pytest.fixture
def name() -> str:
    """A namespace that no other test uses."""
    return f"test-{next(_names)}"


def random_hashes(n: int, seed: int = 0) -> np.ndarray:
    """Hashes as an engine of its own scheme would bring."""
    return np.random.default_rng([n, seed]).integers(0, 256, (n, 32), np.uint8)


def random_blocks(n: int, seed: int = 0, layout: Layout = LAYOUT) -> list[np.ndarray]:
    """Distinct bytes for n blocks."""
    rng = np.random.default_rng([n, seed, 1])
    return [rng.integers(0, 256, layout.block_bytes, np.uint8) for _ in range(n)]


def empty_blocks(n: int, layout: Layout = LAYOUT) -> list[np.ndarray]:
    """Destinations for n blocks."""
    return [np.zeros(layout.block_bytes, np.uint8) for _ in range(n)]
