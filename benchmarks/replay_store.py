"""A trace through the real `Store`, driven as an engine drives it; no block's bytes move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.replay_trace import BLOCK_TOKENS, Chain, keys_of
from kvstore import commands as c
from kvstore import limits
from kvstore.errors import ResourceExhausted
from kvstore.index import IndexReader, IndexView, Match
from kvstore.layout import Attention, Layout
from kvstore.limits import default_max_blocks
from kvstore.nvme.volume import Volume
from kvstore.store import Deferred, NvmePolicy, Store, StoreMemory
from kvstore.tiers.slab import SlabAllocator

# What is counted: blocks of a model of the 8-billion class.
MODEL = Layout(
    model="32 layers, 8 heads for keys and values, 128 wide, bfloat16",
    attention=Attention.GQA,
    layers=32,
    kv_heads=8,
    head_dim=128,
    dtype="bfloat16",
    block_tokens=BLOCK_TOKENS,
)
# What the pool is cut for: a block with its header is one granule.
_SMALL = Layout.opaque(model="trace", block_bytes=3840, block_tokens=BLOCK_TOKENS)
_PUT_ID = bytes(16)


@dataclass(frozen=True, slots=True)
class Found:
    """Blocks found as leading runs, and blocks put."""

    hits: int
    put: int


def whole_slabs(blocks: int) -> int:
    """About so many blocks: as many as a pool has room for that is all slabs."""
    nbytes = max(blocks * limits.GRANULE_BYTES, limits.MIN_POOL_BYTES)
    unit = SlabAllocator(nbytes).unit_bytes
    return round(nbytes / unit) * unit // limits.GRANULE_BYTES


def rows_for(blocks: int) -> int:
    """How many blocks a daemon is ready for whose pool holds so many of `MODEL`."""
    return default_max_blocks(blocks * MODEL.block_bytes)


def replay(
    blocks: int, policy: str, requests: Sequence[Chain], over: npt.NDArray[np.bool_]
) -> Found:
    """All requests through a new store. over: of which it is told that their session is over."""
    client = Client(blocks, policy)
    keys = keys_of(requests)
    for chain, ends in zip(requests, over, strict=True):
        hashes = keys[chain]
        n = client.read(hashes)
        if n < len(hashes):
            client.put(hashes, n)
        if ends:
            client.end_session(hashes)
    return Found(client.hits, client.stored)


class Client:
    """One client of a new store, and what came of its calls so far."""

    def __init__(
        self,
        blocks: int,
        policy: str,
        *,
        volumes: Sequence[Volume] = (),
        nvme: NvmePolicy | None = None,
        more_rows: int = 0,
    ) -> None:
        """more_rows: for blocks on NVMe."""
        self.hits = self.stored = 0
        memory = StoreMemory(
            pool=np.zeros(blocks * limits.GRANULE_BYTES, np.uint8),
            generations=np.zeros(blocks, np.uint64),
            new_index=self._new_index,
        )
        rows = rows_for(blocks)
        self.store = Store(
            memory,
            secret=bytes(32),
            instance_id=1,
            max_blocks=rows + more_rows,
            policy=policy,
            now_ms=0,
            volumes=volumes,
            nvme=nvme or NvmePolicy(),
        )
        self._number = self.store.connect()
        opened = self._call(c.OpenNamespace(name="trace", layout=_SMALL.encode()))
        assert isinstance(opened, c.NamespaceOpened)
        self._namespace = opened.namespace
        self._reader = IndexReader(IndexView.open(self._index))

    def read(self, hashes: npt.NDArray[np.uint8]) -> int:
        """How many leading ones are there; the store is told that they were read."""
        found = self._match(hashes)
        self.hits += found.count
        self._touch(found, found.count)
        return found.count

    def _touch(self, found: Match, n: int) -> None:
        """Tells that the first `n` of these were read."""
        if n:
            touch = c.Touch(
                granules=found.granules[:n].astype(np.uint32),
                generations=found.generations[:n],
                lookups=n,
                hits=n,
                cold_hits=0,
            )
            self._call(touch)

    def put(self, hashes: npt.NDArray[np.uint8], first: int) -> None:
        """Stores a chain from its block `first` on, as far as there is room."""
        new = hashes[first:]
        try:
            granted = self._call(c.Grant(namespace=self._namespace, blocks=len(new)))
        except ResourceExhausted:
            return
        assert isinstance(granted, c.Granted)
        granules = np.full(len(new), c.NO_SLOT, np.uint32)
        granules[: len(granted.granules)] = granted.granules
        commit = c.Commit(
            namespace=self._namespace,
            put_id=_PUT_ID,
            hashes=new,
            granules=granules,
            checksums=np.zeros((len(new), 1), np.uint64),
            parent=hashes[first - 1].tobytes() if first else b"",
            position=first,
        )
        committed = self._call(commit)
        assert isinstance(committed, c.Committed)
        stored = committed.status == c.CommitStatus.STORED
        self.stored += int(stored.sum())
        left = granules[~stored & (granules != c.NO_SLOT)]
        if len(left):
            self._call(c.GiveBack(granules=left))

    def end_session(self, hashes: npt.NDArray[np.uint8]) -> None:
        """Nobody will come back to this chain."""
        kind = int(c.HintKind.SESSION_ENDS)
        self._call(c.Hint(namespace=self._namespace, kind=kind, for_ms=0, hashes=hashes))

    def _match(self, hashes: npt.NDArray[np.uint8]) -> Match:
        if self._reader.retired:
            self._reader = IndexReader(IndexView.open(self._index))
        return self._reader.match(self._namespace, hashes)

    def _call(self, command: c.Command) -> c.Result | Deferred:
        return self.store.handle(self._number, command, 0)

    def _new_index(self, nbytes: int) -> npt.NDArray[np.uint8]:
        self._index = np.zeros(nbytes, np.uint8)
        return self._index
