"""The store inside the caller's own process, as SQLite is: `KVStore(dram=1 << 30)`."""

from __future__ import annotations

import secrets
import threading

from kvstore import commands
from kvstore.memory import Arenas
from kvstore.session import LocalSession
from kvstore.store import Store

_BYTES_PER_BLOCK_GUESS = 4096  # the smallest slot: the index is sized for it, up to a million


def default_max_blocks(pool_bytes: int) -> int:
    """How many blocks an index beside a pool of this size is made for."""
    return min(1 << 20, max(64, pool_bytes // _BYTES_PER_BLOCK_GUESS))


class _DirectPort:
    """Hands commands to the store under a lock."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._connection = store.connect()
        self._lock = threading.Lock()

    def call(self, command: commands.Command, timeout_s: float) -> commands.Result:
        del timeout_s  # nothing to wait for: the store is synchronous
        with self._lock:
            return self._store.handle(self._connection, command)


class KVStore(LocalSession):
    """An embedded store: a `LocalSession` over memory of its own.

    dram: pool size in bytes. secret: 16 to 64 bytes that key the chains (None: random, so
    nothing outside this process can name its blocks). policy: "lru", "arc" or "s3fifo".
    """

    def __init__(
        self,
        *,
        dram: int,
        secret: bytes | None = None,
        policy: str = "lru",
        max_blocks: int | None = None,
    ) -> None:
        max_blocks = max_blocks or default_max_blocks(dram)
        self._arenas = Arenas.create(dram, max_blocks)
        memory = self._arenas.store_memory()
        self._store = Store(
            memory,
            secret=secret or secrets.token_bytes(32),
            instance_id=secrets.randbits(63),
            max_blocks=max_blocks,
            policy=policy,
        )
        super().__init__(
            _DirectPort(self._store),
            pool=memory.pool,
            generations=memory.generations,
            index=memory.index,
            timeout_s=1.0,
        )

    def check(self) -> None:
        """Walks every invariant of the store."""
        self._store.check()

    def close(self) -> None:
        """Gives the memory back; views must have been released."""
        self._arenas.close()

    def __enter__(self) -> KVStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
