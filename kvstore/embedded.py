"""The store inside the caller's own process, as SQLite is: `KVStore(dram=1 << 30)`."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Sequence

from kvstore import commands as c
from kvstore import limits
from kvstore.__about__ import __version__
from kvstore.clock import Clock
from kvstore.errors import Unavailable
from kvstore.index.format import IndexView
from kvstore.index.reader import IndexReader
from kvstore.memory import Arenas, HugePages, Placement
from kvstore.session.fork import ForkGuard
from kvstore.session.link import Granted, Memory, fill_directly
from kvstore.session.local import LocalSession
from kvstore.store import Store


def default_max_blocks(pool_bytes: int) -> int:
    """How many blocks a pool of this size is made for: the smallest slots, up to a million."""
    return min(1 << 20, max(64, pool_bytes // limits.GRANULE_BYTES))


class _StoreLink:
    """Hands commands to a store of this process under a lock; the store keeps time by them."""

    def __init__(self, store: Store, arenas: Arenas, clock: Clock, instance: int) -> None:
        self._store, self._arenas, self._clock = store, arenas, clock
        self._instance = instance
        self._connection = store.connect()
        self._lock = threading.Lock()
        self._guard = ForkGuard()
        self._memory: Memory | None = self._map()

    writes_pool = True

    def call(self, command: c.Command, timeout_s: float) -> c.Result:
        """See `Link.call`; there is nothing to wait for."""
        del timeout_s
        self._guard.check()
        with self._lock:
            if self._memory is None:
                raise Unavailable("the store is closed")
            now_ms = self._clock.now_ms()
            due_ms = self._store.next_due_ms
            if due_ms is not None and due_ms <= now_ms:
                self._store.tick(now_ms)
            try:
                return self._store.handle(self._connection, command, now_ms)
            finally:  # also where it was refused after it had moved the index
                if self._memory.index.retired:
                    self._memory = self._map()

    def cast(self, command: c.Command) -> None:
        """See `Link.cast`."""
        self.call(command, 0.0)

    def memory(self, timeout_s: float) -> Memory:
        """See `Link.memory`."""
        del timeout_s
        self._guard.check()
        memory = self._memory
        if memory is None:
            raise Unavailable("the store is closed")
        return memory

    def fill(self, granted: Granted, sources: Sequence[int], timeout_s: float) -> c.U8:
        """See `Link.fill`."""
        return fill_directly(self, self.memory(timeout_s), granted, sources, timeout_s)

    def close(self) -> None:
        """See `Link.close`."""
        if self._guard.forked:
            return  # the memory is the parent's, and so may be the lock
        with self._lock:
            self._memory = None
            self._arenas.close()

    def _map(self) -> Memory:
        assert self._arenas.index
        memory = self._arenas.store_memory()
        return Memory(
            pool=memory.pool,
            generations=memory.generations,
            index=IndexReader(IndexView.open(self._arenas.index.array)),
            instance=self._instance,
        )


class KVStore(LocalSession):
    """An embedded store: a `Session` over memory of its own; thread-safe.

    dram: pool size in bytes. secret: 16 to 64 bytes that key the chains (None: random, so
    nothing outside this process can name its blocks). policy: "lru", "arc" or "s3fifo".
    max_blocks: the most blocks (None: as many as may fit, up to a million). huge_pages,
    numa_node, verify_reads: as `Placement` and `LocalSession` say. `InvalidArgument` names what
    is wrong.
    """

    def __init__(
        self,
        *,
        dram: int,
        secret: bytes | None = None,
        policy: str = "lru",
        max_blocks: int | None = None,
        huge_pages: HugePages = HugePages.AUTO,
        numa_node: int | None = None,
        verify_reads: bool = False,
    ) -> None:
        placement = Placement(huge_pages=huge_pages, numa_node=numa_node)
        arenas = Arenas(dram, placement, pool_writable=False)
        clock, instance = Clock(), secrets.randbits(63)
        try:
            self._store = Store(
                arenas.store_memory(),
                secret=secret or secrets.token_bytes(32),
                instance_id=instance,
                max_blocks=max_blocks or default_max_blocks(dram),
                policy=policy,
                now_ms=clock.now_ms(),
                version=__version__,
            )
        except BaseException:
            arenas.close()
            raise
        link = _StoreLink(self._store, arenas, clock, instance)
        # A call waits for nothing here; its copies take the time that they take.
        super().__init__(link, timeout_s=limits.MAX_DEADLINE_MS / 1e3, verify_reads=verify_reads)

    def check(self) -> None:
        """Walks every invariant of the store; for tests. Nothing else may use it meanwhile."""
        self._store.check()
