"""The index alone as it grows: a table and a reader in one process, without store and pool."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.samples import random_keys, summary, timed
from kvstore.index import IndexReader, IndexTable, capacity_for, index_bytes
from kvstore.memory import Arena

# Keys of a look-up: how many look-ups one table gets before it is the next one's turn.
LOOKS = {1: 1000, 64: 200, 1024: 40, 8192: 10}
_INSERT = 1 << 16
_NAMESPACE = 1
_POSITION_BYTES = 8  # the writer's own memory for a block id


class GrownIndex:
    """A table of `entries` random keys, in the kind of memory that a daemon's lies in."""

    def __init__(self, entries: int, rng: np.random.Generator) -> None:
        self.entries, self._rng = entries, rng
        capacity = capacity_for(entries)
        self._arena = Arena.create("growth", index_bytes(capacity))
        self._keys = random_keys(rng, entries)
        begin = time.perf_counter()
        table = IndexTable.create(self._arena.array, capacity, bytes(8), max_blocks=entries)
        for at in range(0, entries, _INSERT):
            self._insert(table, np.arange(at, min(at + _INSERT, entries)))
        self.insert_rate = entries / (time.perf_counter() - begin)
        self.bytes_per_entry = self._arena.nbytes / entries + _POSITION_BYTES
        self.load = entries / capacity
        self._reader = IndexReader(table.view)

    def _insert(self, table: IndexTable, ids: npt.NDArray[np.int64]) -> None:
        done = table.insert(
            self._keys[ids],
            namespace=_NAMESPACE,
            lengths=np.full(len(ids), 512),
            granules=ids,
            block_ids=ids,
            generations=np.full(len(ids), 2),
            tier=1,
        )
        if not done.all():
            raise AssertionError("a key found no place")

    def look(self, count: int, repeats: int) -> list[float]:
        """Seconds of look-ups of `count` present keys; other keys each time, all checked."""
        picks = [self._rng.choice(self.entries, count, replace=False) for _ in range(repeats + 1)]
        chains = [self._keys[pick] for pick in picks]
        seconds = timed(lambda chain: self._reader.match(_NAMESPACE, chain).count, chains, count)
        for pick, chain in zip(picks, chains, strict=True):
            if (self._reader.lookup(_NAMESPACE, chain).block_ids != pick).any():
                raise AssertionError("a look-up found another key's row")
        if self._reader.lookup(_NAMESPACE, random_keys(self._rng, count)).found.any():
            raise AssertionError("a look-up found a key that nobody inserted")
        return seconds[1:]  # the first warms the code up, not the rows of the others

    def close(self) -> None:
        """Gives the memory back."""
        del self._reader
        self._arena.close()


@contextlib.contextmanager
def _all_grown(sizes: Sequence[int]) -> Iterator[list[GrownIndex]]:
    rng = np.random.default_rng(0)
    with contextlib.ExitStack() as stack:
        indexes = []
        for entries in sizes:
            indexes.append(GrownIndex(entries, rng))
            stack.callback(indexes[-1].close)
        yield indexes


def measure(sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """One row for each size and number of keys; sizes take turns within each round."""
    with _all_grown(sizes) as indexes:
        seconds: dict[tuple[int, int], list[float]] = {}
        for _ in range(rounds):
            for count, repeats in LOOKS.items():
                for index in indexes:
                    times = index.look(count, repeats)
                    seconds.setdefault((index.entries, count), []).extend(times)
        return [
            {
                "entries": index.entries,
                "load": index.load,
                "bytes_per_entry": index.bytes_per_entry,
                "insert_rate": index.insert_rate,
                "looks": {
                    count: summary(times, count)
                    for (entries, count), times in seconds.items()
                    if entries == index.entries
                },
            }
            for index in indexes
        ]
