"""Hit rates of the store's policies on a public trace: `python -m benchmarks.replay TRACE`.

Replays requests block by block through the real `Store` (no bytes move: a block is one granule),
at several sizes of the pool, for every policy, with and without hints. TRACE: JSON lines with
`hash_ids`, as in Mooncake's FAST 25 release, plain or packed with xz. Beside it, where it can be
installed, libCacheSim simulates its own LRU and S3-FIFO over the same accesses.
"""

from __future__ import annotations

import argparse
import json
import lzma
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.systems import environment_for
from kvstore import commands as c
from kvstore import limits
from kvstore.errors import ResourceExhausted
from kvstore.layout import Layout
from kvstore.store import Store, StoreMemory

SHARES = (0.01, 0.05, 0.10, 0.25, 0.50)
POLICIES = ("lru", "arc", "s3fifo")
HINT_ACCURACY = 0.8
BLOCK_TOKENS = 512
SIMULATOR = ("libcachesim==0.3.5",)
_BLOCK_BYTES = 3840
_NO_CELLS = np.empty(0, np.uint32)
_PUT_ID = bytes(16)
Chain = npt.NDArray[np.int64]


def read_trace(path: Path) -> list[Chain]:
    """The block ids of each request, in order; a last block that is not full is left out."""
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as lines:
        requests = [json.loads(line) for line in lines]
    return [
        np.array(r["hash_ids"][: r["input_length"] // BLOCK_TOKENS], np.int64) for r in requests
    ]


def names(chain: Chain) -> npt.NDArray[np.uint8]:
    """32-byte hashes of block ids."""
    hashes = np.empty((len(chain), 4), np.uint64)
    for word in range(4):
        mixed = (chain.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15 + 2 * word)
        hashes[:, word] = mixed ^ (mixed >> np.uint64(29))
    return hashes.view(np.uint8)


def returns(requests: Sequence[Chain]) -> npt.NDArray[np.bool_]:
    """Which requests are continued later: their last block is asked for again."""
    last_use: dict[int, int] = {}
    for i, chain in enumerate(requests):
        last_use.update(dict.fromkeys(chain.tolist(), i))
    return np.array([len(ch) > 0 and last_use[int(ch[-1])] > i for i, ch in enumerate(requests)])


@dataclass(slots=True)
class Replay:
    """A store of `blocks` slots that requests go through."""

    blocks: int
    policy: str

    def run(
        self, requests: Sequence[Chain], ends: npt.NDArray[np.bool_] | None = None
    ) -> tuple[int, int]:
        """Blocks found as leading runs, and blocks looked up. ends: sessions hinted to be over."""
        store, connection, namespace = self._open()
        hits = lookups = 0
        for i, chain in enumerate(requests):
            if not len(chain):
                continue
            hashes = names(chain)
            command: c.Command = c.Lease(namespace=namespace, hashes=hashes)
            leased = store.handle(connection, command, 0)
            assert isinstance(leased, c.Leased)
            found = len(leased.granules)
            hits, lookups = hits + found, lookups + len(chain)
            if leased.lease:
                store.handle(connection, c.Release(lease=leased.lease), 0)
            self._put(store, connection, namespace, hashes)
            if ends is not None and ends[i]:
                kind = int(c.HintKind.SESSION_ENDS)
                hint = c.Hint(namespace=namespace, kind=kind, for_ms=0, hashes=hashes)
                store.handle(connection, hint, 0)
        return hits, lookups

    def _open(self) -> tuple[Store, int, int]:
        pool = np.zeros(max(self.blocks * limits.GRANULE_BYTES, limits.MIN_POOL_BYTES), np.uint8)
        memory = StoreMemory(
            pool=pool,
            generations=np.zeros(len(pool) // limits.GRANULE_BYTES, np.uint64),
            new_index=lambda nbytes: np.zeros(nbytes, np.uint8),
        )
        store = Store(
            memory,
            secret=bytes(32),
            instance_id=1,
            max_blocks=self.blocks,
            policy=self.policy,
            now_ms=0,
        )
        connection = store.connect()
        layout = Layout.opaque(model="trace", block_bytes=_BLOCK_BYTES, block_tokens=BLOCK_TOKENS)
        opened = store.handle(connection, c.OpenNamespace(name="t", layout=layout.encode()), 0)
        assert isinstance(opened, c.NamespaceOpened)
        return store, connection, opened.namespace

    @staticmethod
    def _put(store: Store, connection: int, namespace: int, hashes: npt.NDArray[np.uint8]) -> None:
        reserve = c.Reserve(
            namespace=namespace, put_id=_PUT_ID, hashes=hashes, cells=_NO_CELLS, position=0
        )
        try:
            reserved = store.handle(connection, reserve, 0)
        except ResourceExhausted:
            return
        assert isinstance(reserved, c.Reserved)
        granted = hashes[reserved.status == c.ReserveStatus.GRANTED]
        if len(granted):
            sums = np.zeros((len(granted), 1), np.uint64)
            seal = c.Seal(namespace=namespace, put_id=_PUT_ID, hashes=granted, checksums=sums)
            store.handle(connection, seal, 0)


def attainable(requests: Sequence[Chain]) -> float:
    """The hit rate of a store without end."""
    seen: set[int] = set()
    hits = lookups = 0
    for chain in requests:
        ids = chain.tolist()
        hits += next((i for i, block in enumerate(ids) if block not in seen), len(ids))
        lookups += len(ids)
        seen.update(ids)
    return hits / lookups


def simulated(requests: Sequence[Chain], sizes: Sequence[int]) -> dict[str, list[float]]:
    """libCacheSim's LRU and S3-FIFO over the same accesses; RuntimeError where it is missing."""
    python = environment_for(SIMULATOR) / "bin/python"
    accesses = np.concatenate(requests).tolist()
    done = subprocess.run(
        [python, "-c", _SIMULATE],
        input=json.dumps({"accesses": accesses, "sizes": list(sizes)}),
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    rates: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return rates


_SIMULATE = """
import json, sys
import libcachesim as lcs
asked = json.load(sys.stdin)
rates = {}
for name, kind in (("lru", lcs.LRU), ("s3fifo", lcs.S3FIFO)):
    rates[name] = []
    for size in asked["sizes"]:
        cache, hits, request = kind(cache_size=size), 0, lcs.Request()
        request.obj_size = 1
        for block in asked["accesses"]:
            request.obj_id = block
            hits += cache.get(request)
        rates[name].append(hits / len(asked["accesses"]))
print(json.dumps(rates))
"""


def rows(requests: Sequence[Chain], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """One row for each policy, with and without hints."""
    unique = len(np.unique(np.concatenate(requests)))
    sizes = [max(1, int(share * unique)) for share in SHARES]
    ends = ~returns(requests)
    wrong = rng.random(len(ends)) > HINT_ACCURACY
    for policy in POLICIES:
        for hinted in (False, True):
            rates = []
            for size in sizes:
                told = (ends ^ wrong) if hinted else None
                hits, lookups = Replay(size, policy).run(requests, told)
                rates.append(hits / lookups)
            label = f"{policy}, hints {HINT_ACCURACY:.0%} right" if hinted else policy
            yield {"policy": label, "rates": rates}
    try:
        for name, rates in simulated(requests, sizes).items():
            yield {"policy": f"libCacheSim {name}, any block counts", "rates": rates}
    except RuntimeError as error:
        yield {"policy": f"libCacheSim missing: {error}", "rates": []}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    requests = read_trace(options.trace)
    print(f"attainable: {attainable(requests):.3f}")
    print("| policy | " + " | ".join(f"{share:.0%}" for share in SHARES) + " |")
    print("|---" * (len(SHARES) + 1) + "|", flush=True)
    done = []
    for row in rows(requests, np.random.default_rng(options.seed)):
        print(f"| {row['policy']} | " + " | ".join(f"{r:.3f}" for r in row["rates"]) + " |")
        sys.stdout.flush()
        done.append(row)
    if options.json:
        options.json.write_text(json.dumps(done, indent=1))


if __name__ == "__main__":
    main()
