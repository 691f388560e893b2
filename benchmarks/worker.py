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


def _meet() -> None:
    """Tells the harness that this client is ready, and waits until all are to begin."""
    print(json.dumps({"ready": True}), flush=True)
    time.sleep(max(0.0, json.loads(sys.stdin.readline())["at"] - time.monotonic()))


class Jobs:
    """What the harness can ask for; each method is a job."""

    def __init__(self, client: Client, *, chained: bool) -> None:
        self._client = client
        self._chained = chained  # blocks are found only in the order of the put that stored them

    def move(
        self, *, seed: str, nbytes: int, batch: int, repeats: int, meet: bool
    ) -> dict[str, Any]:
        """Puts and gets fresh batches; every byte that was got is compared afterwards.

        The first of each is not counted: while others had their turn, a virtual machine's host may
        have taken back memory that was idle here. meet: begin each put and each get when the other
        clients do.
        """
        both = self._client.buffers(2 * batch, nbytes)
        sources, targets = both[:batch], both[batch:]
        for i, source in enumerate(sources):
            fill(source, i + 1)
        puts, gets = [], []
        for repeat in range(repeats + 1):
            keys = keys_of(f"{seed}/{repeat}", batch)
            if meet:
                _meet()
            puts.append(self._timed(self._client.put, keys, sources))
            for target in targets:
                target.fill(0)
            if meet:
                _meet()
            gets.append(self._timed(self._client.get, keys, targets))
            for source, target in zip(sources, targets, strict=True):
                if not np.array_equal(source, target):
                    raise AssertionError("a get returned other bytes than were put")
            self._client.drop(keys)
        # The buffers of all systems' clients together may be more than the machine has.
        del both, sources, targets, source, target
        self._client.buffers(0, nbytes)
        return {"put": puts[1:], "get": gets[1:]}

    def load(self, *, seed: str, nbytes: int, n: int, batch: int) -> dict[str, Any]:
        """Stores n blocks of one content, for look-ups."""
        step = n if self._chained else batch
        buffers = self._client.buffers(step, nbytes)
        keys = keys_of(seed, n)
        for at in range(0, n, step):
            chosen = keys[at : at + step]
            if self._client.put(chosen, buffers[: len(chosen)]) != len(chosen):
                raise AssertionError("a block was not stored")
        return {}

    def look(self, *, seed: str, n: int, count: int, repeats: int) -> dict[str, Any]:
        """Looks `count` of the n loaded keys up: random ones, or the chain's first."""
        keys, rng = keys_of(seed, n), np.random.default_rng(count)
        times = []
        for _ in range(repeats):
            order = range(n) if self._chained else rng.permutation(n).tolist()
            chosen = [keys[i] for i in order[:count]]
            times.append(self._timed(self._client.exists, chosen))
        return {"look": times}

    def unload(self, *, seed: str, n: int, batch: int) -> dict[str, Any]:
        """Forgets what `load` stored."""
        keys = keys_of(seed, n)
        step = n if self._chained else batch
        for at in range(0, n, step):
            self._client.drop(keys[at : at + step])
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
    jobs = Jobs(client, chained=getattr(module, "CHAINED", False))
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
