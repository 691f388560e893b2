"""LMCache's server as our tier sees it: keys, layouts, a memory of objects, and three signals."""

from __future__ import annotations

import hashlib
import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from integrations.spy import Spy

from kvstore_client import KVStoreClient
from kvstore_integrations.lmcache.names import Kind, item_of, kind_of, object_name
from kvstore_integrations.lmcache.objects import Objects, Stored
from kvstore_integrations.lmcache.settings import L2Settings
from kvstore_integrations.lmcache.shelves import Shelves
from kvstore_integrations.lmcache.tier import ObjectTier

WAIT_S = 20.0
R = TypeVar("R")


@dataclass(frozen=True)
class Key:
    """The fields of LMCache's `ObjectKey`."""

    chunk_hash: bytes
    model_name: str = "m"
    kv_rank: int = 0
    object_group_id: int = 0
    cache_salt: str = ""


@dataclass(frozen=True)
class Layout:
    """The fields of LMCache's `MemoryLayoutDesc`."""

    shapes: tuple[tuple[int, ...], ...] = ((2, 4, 16, 16),)
    dtypes: tuple[np.dtype[Any], ...] = (np.dtype("float16"),)

    def kind(self, model: str) -> Kind:
        return kind_of(model, self.shapes, self.dtypes)


WIDE = Layout(shapes=((2, 4, 16, 32),))
BYTES = Layout().kind("m").nbytes


def keys_of(seed: str, n: int, **fields: Any) -> list[Key]:
    """A chain of n chunks."""
    return [Key(hashlib.sha256(f"{seed} {i}".encode()).digest(), **fields) for i in range(n)]


def bytes_of(key: Key, layout: Layout) -> np.ndarray:
    """What the object of this name holds in all tests."""
    seed = int.from_bytes(object_name(key)[:8], "big")
    size = layout.kind(key.model_name).nbytes
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


class Server:
    """One process of LMCache's server. revision: of the weights, unless it is told another one."""

    revision = "r1"

    def __init__(
        self,
        target: str,
        *,
        lazy: bool = False,
        leases: bool = True,
        facts: Mapping[str, object] | None = None,
        memory_bytes: int = 1 << 20,
        **settings: Any,
    ) -> None:
        read = L2Settings.read({"model_revision": self.revision, **settings}, "where")
        self.spy = Spy(KVStoreClient(target, verify_reads=True, lazy=lazy, timeout_s=WAIT_S))
        self.memory = np.zeros(memory_bytes, np.uint8)
        self.shelves = Shelves(self.spy, "test", read.identify, facts or {}, tenant=read.tenant)
        self.fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        self.tier = ObjectTier(
            Objects(self.spy, self.shelves, leases=leases),
            on_stored=lambda: os.eventfd_write(self.fds[0], 1),
            on_found=lambda: os.eventfd_write(self.fds[1], 1),
            on_loaded=lambda: os.eventfd_write(self.fds[2], 1),
            most_stores=read.most_stores,
        )

    # -- one task from begin to end ----------------------------------------------------

    def store(self, keys: Sequence[Key], layout: Layout = Layout()) -> Stored:
        """Stores the objects' own bytes."""
        rows = self.rows(keys, layout)
        for key, row in zip(keys, rows, strict=True):
            row[:] = bytes_of(key, layout)
        number = self.tier.store(self.items(keys, layout), rows)
        (stored,) = self.wait(0, self.tier.stored).items()
        assert stored[0] == number
        return stored[1]

    def found(self, keys: Sequence[Key], layout: Layout = Layout()) -> list[bool]:
        """Which are there; they are locked."""
        number = self.tier.look_up(self.items(keys, layout))
        return self.wait(1, lambda: self.tier.found(number))

    def load(self, keys: Sequence[Key], layout: Layout = Layout()) -> list[bool]:
        """Which come; they are checked, byte by byte."""
        rows = self.rows(keys, layout)
        for row in rows:
            row[:] = 0
        number = self.tier.load(self.items(keys, layout), rows)
        came = self.wait(2, lambda: self.tier.loaded(number))
        for key, row, hit in zip(keys, rows, came, strict=True):
            assert not hit or np.array_equal(row, bytes_of(key, layout))
        return came

    def unlock(self, keys: Sequence[Key]) -> None:
        """Ends a lock of each, and waits until that is done."""
        self.tier.unlock([object_name(key) for key in keys])
        self.found([])

    def hits(self, keys: Sequence[Key], layout: Layout = Layout()) -> int:
        """How many are there; none stays locked."""
        found = self.found(keys, layout)
        self.unlock([key for key, hit in zip(keys, found, strict=True) if hit])
        return sum(found)

    # -- parts of one ------------------------------------------------------------------

    def items(self, keys: Sequence[Key], layout: Layout = Layout()) -> list[Any]:
        return [item_of(key, layout.kind(key.model_name)) for key in keys]

    def rows(self, keys: Sequence[Key], layout: Layout = Layout()) -> list[np.ndarray]:
        """Where LMCache has the objects."""
        size = layout.kind("m").nbytes
        return [self.memory[i * size : (i + 1) * size] for i in range(len(keys))]

    def wait(self, fd: int, take: Callable[[], R | None]) -> R:
        """The result, once its own signal and no other has come."""
        poller = select.poll()
        for one in self.fds:
            poller.register(one, select.POLLIN)
        assert [ready for ready, _ in poller.poll(WAIT_S * 1e3)] == [self.fds[fd]]
        os.eventfd_read(self.fds[fd])
        result = take()
        assert result is not None
        return result

    def close(self) -> None:
        self.tier.close()
        self.shelves.close()
        self.spy.client.close()
        for fd in self.fds:
            os.close(fd)


def result_of(take: Callable[[], R | None]) -> R:
    """What is taken at last, whatever is signalled."""
    results: list[R | None] = []
    wait_until(lambda: bool(results.append(take()) or results[-1] is not None))
    assert results[-1] is not None
    return results[-1]


def wait_until(reached: Callable[[], bool]) -> None:
    """Fails where it is not so in time."""
    end = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < end
        threading.Event().wait(0.01)
