"""The store as it grows: real daemons with more and more blocks, asked over shared memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.daemon import Daemon, daemon
from benchmarks.growth_index import LOOKS
from benchmarks.samples import random_keys, summary, timed
from kvstore import Hit, KVStore, Layout, Session, limits
from kvstore_client import KVStoreClient

BLOCK_BYTES = 512
PUTS = {1: 200, 64: 40}  # blocks of a put: how many puts one daemon gets in its turn
_FILL = 2000
_SPARE_BLOCKS = 8192  # room that is left beside the blocks, for the puts that are measured
_LAYOUT = Layout.opaque(model="growth", block_bytes=BLOCK_BYTES, block_tokens=16)
_START_POOL_BYTES = 1 << 30


class GrownStore:
    """A daemon with `blocks` small blocks, and one client of it."""

    def __init__(
        self, blocks: int, running: Daemon, client: KVStoreClient, rng: np.random.Generator
    ) -> None:
        self.blocks, self._daemon, self._client, self._rng = blocks, running, client, rng
        self._block = rng.integers(0, 256, BLOCK_BYTES, np.uint8)
        self._space = client.open_namespace("growth", _LAYOUT)
        empty = running.beside_pool_bytes()
        self._keys = random_keys(rng, blocks)
        parts = [self._keys[at : at + _FILL] for at in range(0, blocks, _FILL)]
        begin = time.perf_counter()
        seconds = [self._put([part])[0] for part in parts]
        self.filling: dict[str, Any] = {
            "rate": blocks / (time.perf_counter() - begin),
            "longest_put_ms": 1e3 * max(seconds),
        }
        self.beside_pool_bytes = running.beside_pool_bytes()
        self.bytes_per_block = (self.beside_pool_bytes - empty) / blocks

    def look(self, count: int, repeats: int) -> list[float]:
        """Seconds of matches of `count` present keys; other keys each time."""
        client, space = self._client, self._space
        picks = (self._rng.choice(self.blocks, count, replace=False) for _ in range(repeats + 1))
        chains = [self._keys[pick] for pick in picks]
        seconds = timed(lambda chain: client.match(space, chain).count, chains, count)
        if client.match(space, random_keys(self._rng, count)).count:
            raise AssertionError("a match found a key that nobody stored")
        return seconds[1:]

    def put(self, count: int, repeats: int) -> list[float]:
        """Seconds of puts of `count` new blocks; they are dropped again, so that there is room."""
        chains = [random_keys(self._rng, count) for _ in range(repeats)]
        seconds = self._put(chains)
        self._client.drop(self._space, np.concatenate(chains))
        return seconds

    def put_while_full(self, count: int, repeats: int) -> list[float]:
        """Seconds of puts of `count` new blocks, for each of which another one goes."""
        before = self._client.stats().evicted
        seconds = self._put([random_keys(self._rng, count) for _ in range(repeats)])
        evicted = self._client.stats().evicted - before
        # Some may have gone before: for slots that the client got ahead of its need, and as many
        # more, for which the store has made room.
        if evicted < count * repeats - 2 * max(PUTS):
            raise AssertionError(f"{evicted} blocks went for {count * repeats} new ones")
        return seconds

    def fill_up(self) -> None:
        """Puts until blocks are evicted."""
        while not self._client.stats().evicted:
            self._put([random_keys(self._rng, max(PUTS))])

    def _put(self, chains: Sequence[np.ndarray[Any, np.dtype[np.uint8]]]) -> list[float]:
        blocks = [self._block] * len(chains[0])
        client, space = self._client, self._space
        return timed(lambda chain: client.put(space, chain, blocks).stored, chains, len(blocks))


@contextlib.contextmanager
def _all_grown(sizes: Sequence[int], folder: Path) -> Iterator[list[GrownStore]]:
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        stores = []
        for blocks in sizes:
            room = blocks + _SPARE_BLOCKS
            flags = ("--no-grpc", "--max-blocks", str(room))
            running = daemon(folder / str(blocks), room * limits.GRANULE_BYTES, *flags)
            started = stack.enter_context(running)
            client = stack.enter_context(started.connect())
            stores.append(GrownStore(blocks, started, client, rng))
        yield stores


def measure(sizes: Sequence[int], folder: Path, rounds: int) -> list[dict[str, Any]]:
    """One row for each number of blocks; daemons take turns within each round."""
    seconds: dict[tuple[int, str, int], list[float]] = {}

    def note(store: GrownStore, op: str, count: int, times: list[float]) -> None:
        seconds.setdefault((store.blocks, op, count), []).extend(times)

    with _all_grown(sizes, folder) as stores:
        for _ in range(rounds):
            for count, repeats in LOOKS.items():
                for store in stores:
                    note(store, "match", count, store.look(count, repeats))
        for turn in range(rounds + 1):  # the first warms up
            for count, repeats in PUTS.items():
                for store in stores:
                    times = store.put(count, repeats)
                    note(store, "put", count, times if turn else [])
        for store in stores:
            store.fill_up()
        for _ in range(rounds):
            for count, repeats in PUTS.items():
                for store in stores:
                    times = store.put_while_full(count, repeats)
                    note(store, "put while full", count, times)
        return [
            {
                "blocks": store.blocks,
                "beside_pool_bytes": store.beside_pool_bytes,
                "bytes_per_block": store.bytes_per_block,
                "filling": store.filling,
                "calls": [
                    {"op": op, "count": count, **summary(times, count)}
                    for (blocks, op, count), times in seconds.items()
                    if blocks == store.blocks
                ],
            }
            for store in stores
        ]


def measure_start(folder: Path, rounds: int) -> list[dict[str, Any]]:
    """From the start of a process, or of the embedded store's making, to a block put and got."""
    kinds: dict[str, tuple[str, ...]] = {
        "daemon": ("--no-grpc",),
        "daemon, no prefault": ("--no-grpc", "--no-prefault"),
        "daemon with gRPC": (),
    }
    seconds: dict[str, list[float]] = {}
    for turn in range(rounds):
        for kind, flags in kinds.items():
            begin = time.perf_counter()
            with (
                daemon(folder / f"{kind}-{turn}", _START_POOL_BYTES, *flags) as started,
                started.connect() as client,
            ):
                _put_and_get(client)
                seconds.setdefault(kind, []).append(time.perf_counter() - begin)
        begin = time.perf_counter()
        with KVStore(dram=_START_POOL_BYTES) as store:
            _put_and_get(store)
            seconds.setdefault("embedded", []).append(time.perf_counter() - begin)
    return [
        {"kind": kind, "median_s": float(np.median(times)), "longest_s": max(times)}
        for kind, times in seconds.items()
    ]


def _put_and_get(session: Session) -> None:
    """AssertionError unless the block comes back as it was."""
    space = session.open_namespace("growth", _LAYOUT)
    sent, got = np.ones(BLOCK_BYTES, np.uint8), np.zeros(BLOCK_BYTES, np.uint8)
    keys = random_keys(np.random.default_rng(0), 1)
    stored = session.put(space, keys, [sent]).stored
    answers = session.get_into(space, keys, [got])
    if not (stored and isinstance(answers[0], Hit) and np.array_equal(sent, got)):
        raise AssertionError("the first block did not come back")
