"""LMCache's server by shared memory (its engine-driven mode), with the client classes it ships.

It hashes chunks of tokens in a chain, so a batch is found again only as the chain that was put.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.adapters import lmcache_server as server
from benchmarks.client import Bytes1D, Keys

NAME = "LMCache, shared memory"
REQUIREMENTS, WITHOUT_DEPENDENCIES = server.REQUIREMENTS, server.WITHOUT_DEPENDENCIES
CHAINED = True
start = server.start


class Client:
    """Blocks of one size are chunks of a model of their own; a key is its chunk's 16 tokens."""

    def __init__(self, info: dict[str, Any]) -> None:
        os.environ.update(server.QUIET)
        import torch

        factory = server.part("transport.factory").RequestClientFactory
        self._rpc, self._web = factory.create(info["url"]), info["web"]
        self._chain = server.part("custom_types").IPCCacheServerKey.from_token_ids
        self._tensor = torch.from_numpy
        # Two threads as ours: torch's own spin, and take 100 times as long where others run too.
        torch.set_num_threads(1)
        self._threads = ThreadPoolExecutor(2)
        self._contexts: dict[int, tuple[Any, int]] = {}
        self._nbytes = 0
        self._unlocking: tuple[Any, str] | None = None

    def buffers(self, n: int, nbytes: int) -> list[Bytes1D]:
        self._nbytes = nbytes
        return list(np.zeros((n, nbytes), np.uint8))

    def put(self, keys: Keys, sources: Sequence[Bytes1D]) -> int:
        key, (context, instance) = self._key(keys, keys[0].hex()), self._context()
        slots, places = context.prepare_store(key, instance)
        self._copy([(slots[i].view(-1), self._tensor(sources[at])) for i, at in enumerate(places)])
        return len(slots) if context.commit_store(key, instance, []) else 0

    def get(self, keys: Keys, targets: Sequence[Bytes1D]) -> int:
        key, (context, instance) = self._key(keys, keys[0].hex()), self._context()
        self._look(key)  # it locks what is then read in place
        slots = context.prepare_retrieve(key, instance) or []
        self._copy([(self._tensor(targets[i]), slot.view(-1)) for i, slot in enumerate(slots)])
        context.commit_retrieve(key, instance)
        self._rpc.end_session(key.request_id)
        return len(slots)

    def exists(self, keys: Keys) -> int:
        if self._unlocking:  # the server had the time between two look-ups
            self._unlocking[0].result(timeout=server.TIMEOUT_S)
            self._rpc.end_session(self._unlocking[1])
        key = self._key(keys, os.urandom(8).hex())
        found = self._look(key)
        self._unlocking = self._rpc.free_lookup_locks(key, 1), key.request_id
        return found

    def drop(self, keys: Keys) -> None:
        server.delete(self._web, self._key(keys, ""))

    def close(self) -> None:
        self._rpc.close()

    def _copy(self, pairs: Sequence[tuple[Any, Any]]) -> None:
        def copy(some: Sequence[tuple[Any, Any]]) -> None:
            for target, source in some:
                target.copy_(source)

        list(self._threads.map(copy, (pairs[::2], pairs[1::2])))

    def _look(self, key: Any) -> int:
        self._rpc.lookup(key.no_worker_id_version(), 1).result(timeout=server.TIMEOUT_S)
        found = self._rpc.wait_prefetch_status(key.request_id, server.TIMEOUT_S)
        return int(found.result(timeout=server.TIMEOUT_S) or 0)

    def _key(self, keys: Keys, request: str) -> Any:
        tokens = np.frombuffer(b"".join(keys), np.uint16).tolist()
        return self._chain(str(self._nbytes), 1, 0, tokens, 0, len(tokens), request)

    def _context(self) -> tuple[Any, int]:
        if self._nbytes not in self._contexts:
            self._contexts[self._nbytes] = server.register(self._rpc, self._nbytes)
        return self._contexts[self._nbytes]
