"""One client process of one system: `python -m benchmarks.worker MODULE`, driven over a pipe.

Runs in the system's own environment. Reads a line of JSON for each job and answers with one; all
times are seconds of CLOCK_MONOTONIC, which processes of one machine share.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
import time
from typing import Any

import numpy as np

from benchmarks.client import Bytes1D, Client


def keys_of(seed: str, n: int) -> list[bytes]:
    """n keys that no other seed has."""
    return [hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=32).digest() for i in range(n)]


def fill(buffer: Bytes1D, seed: int) -> None:
    """Bytes that differ between seeds in every word."""
    words = buffer[: len(buffer) // 8 * 8].view(np.uint64)
    words[:] = np.arange(len(words), dtype=np.uint64)
    words *= np.uint64(2 * seed + 1)
    words += np.uint64(seed << 32)


class Jobs:
    """What the harness can ask for; each method is a job."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._sources: list[Bytes1D] = []
        self._targets: list[Bytes1D] = []

    def move(self, *, seed: str, nbytes: int, batch: int, repeats: int) -> dict[str, Any]:
        """Puts and gets fresh batches; every byte that was got is compared afterwards."""
        if len(self._sources) != batch or self._sources[0].nbytes != nbytes:
            both = self._client.buffers(2 * batch, nbytes)
            self._sources, self._targets = both[:batch], both[batch:]
            for i, source in enumerate(self._sources):
                fill(source, i + 1)
        puts, gets = [], []
        for repeat in range(repeats):
            keys = keys_of(f"{seed}/{repeat}", batch)
            puts.append(self._timed(self._client.put, keys, self._sources))
            for target in self._targets:
                target.fill(0)
            gets.append(self._timed(self._client.get, keys, self._targets))
            for source, target in zip(self._sources, self._targets, strict=True):
                if not np.array_equal(source, target):
                    raise AssertionError("a get returned other bytes than were put")
            self._client.drop(keys)
        return {"put": puts, "get": gets}

    def load(self, *, seed: str, nbytes: int, n: int, batch: int) -> dict[str, Any]:
        """Stores n blocks of one content, for look-ups."""
        buffers = self._client.buffers(batch, nbytes)
        self._sources = []
        keys = keys_of(seed, n)
        for at in range(0, n, batch):
            chosen = keys[at : at + batch]
            if self._client.put(chosen, buffers[: len(chosen)]) != len(chosen):
                raise AssertionError("a block was not stored")
        return {}

    def look(self, *, seed: str, n: int, count: int, repeats: int) -> dict[str, Any]:
        """Looks `count` random ones of the n loaded keys up."""
        keys, rng = keys_of(seed, n), np.random.default_rng(count)
        times = []
        for _ in range(repeats):
            chosen = [keys[i] for i in rng.permutation(n)[:count]]
            times.append(self._timed(self._client.exists, chosen))
        return {"look": times}

    def unload(self, *, seed: str, n: int, batch: int) -> dict[str, Any]:
        """Forgets what `load` stored."""
        keys = keys_of(seed, n)
        for at in range(0, n, batch):
            self._client.drop(keys[at : at + batch])
        return {}

    @staticmethod
    def _timed(work: Any, keys: list[bytes], *rest: Any) -> tuple[float, float]:
        begin = time.monotonic()
        done = work(keys, *rest)
        end = time.monotonic()
        if done != len(keys):
            raise AssertionError(f"{work.__name__}: {done} of {len(keys)} blocks")
        return begin, end


def main() -> None:
    """Serves jobs until the input ends."""
    module = importlib.import_module(sys.argv[1])
    client = module.Client(json.loads(sys.stdin.readline()))
    jobs = Jobs(client)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        try:
            answer = getattr(jobs, job.pop("job"))(**job)
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    client.close()


if __name__ == "__main__":
    main()
