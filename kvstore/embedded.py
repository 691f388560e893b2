"""The store inside the caller's own process, as SQLite is: `KVStore(dram=1 << 30)`."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.__about__ import __version__
from kvstore.clock import Clock
from kvstore.errors import DeadlineExceeded, Unavailable
from kvstore.index.boards import BOARDS_BYTES, Boards
from kvstore.index.format import IndexView
from kvstore.index.reader import IndexReader
from kvstore.memory import Arenas, HugePages, Placement
from kvstore.nvme.opening import EngineName, Location, Opened, open_all
from kvstore.nvme.runner import Runner
from kvstore.session.fork import ForkGuard
from kvstore.session.link import Granted, Memory, fill_directly
from kvstore.session.local import LocalSession
from kvstore.session.posting import Board
from kvstore.store import Deferred, NvmePolicy, Store

VOLUME_NAME = "blocks.kvs"


class _StoreLink:
    """Hands commands to a store of this process under a lock; the store keeps time by them, and
    where it has disks by a thread."""

    def __init__(
        self,
        store: Store,
        arenas: Arenas,
        boards: Boards,
        *,
        clock: Clock,
        instance: int,
        opened: Opened,
    ) -> None:
        self._store, self._arenas, self._clock = store, arenas, clock
        self._instance, self._boards = instance, boards
        self._connection = store.connect()
        number = store.board_of(self._connection)
        assert number is not None
        self._board = Board(boards, number)
        self._changed = threading.Condition(threading.Lock())
        self._guard = ForkGuard()
        self._memory: Memory | None = self._map()
        self._answers: dict[int, c.Result] = {}
        self._due_ms: int | None = None  # when a call that asks the store nothing has to keep time
        self._runner: Runner | None = None
        self._ticker: threading.Thread | None = None
        if opened.volumes:
            self._runner = Runner(
                store,
                opened,
                arenas.pool.array,
                soon=self._soon,
                now_ms=clock.now_ms,
                after=self._settle,
            )
            self._runner.start()
            self._ticker = threading.Thread(target=self._keep_time, name="kvstore-time")
            self._ticker.start()

    writes_pool = True

    def call(self, command: c.Command, timeout_s: float) -> c.Result:
        """See `Link.call`; waits only for disks."""
        self._guard.check()
        with self._changed:
            if self._memory is None:
                raise Unavailable("the store is closed")
            now_ms = self._tick()
            try:
                result = self._store.handle(self._connection, command, now_ms)
            finally:  # also where it was refused after it had moved the index
                self._settle()
            if isinstance(result, Deferred):
                return self._await(result.ticket, timeout_s)
            return result

    def _await(self, ticket: int, timeout_s: float) -> c.Result:
        """The answer that was promised; `DeadlineExceeded` where it does not come."""
        self._changed.wait_for(lambda: ticket in self._answers or self._memory is None, timeout_s)
        answer = self._answers.pop(ticket, None)
        if answer is None:
            raise (
                Unavailable("the store is closed")
                if self._memory is None
                else DeadlineExceeded("NVMe did not answer in time")
            )
        return answer

    def _tick(self) -> int:
        now_ms = self._clock.now_ms()
        due_ms = self._store.next_due_ms
        if due_ms is not None and due_ms <= now_ms:
            self._store.tick(now_ms)
        return now_ms

    def _settle(self) -> None:
        """After each change of the store."""
        if self._memory and self._memory.index.retired:
            self._memory = self._map()
        if self._runner is None:
            self._due_ms = self._store.next_due_ms
        else:
            self._runner.pump()
            self._answers.update(self._store.nvme.tickets.take())
            self._changed.notify_all()

    def _soon(self, work: Callable[[], None]) -> None:
        """Called by the threads that read and write disks."""
        with self._changed:
            if self._memory is not None:
                work()

    def _keep_time(self) -> None:
        """The thread: does what is due though nobody calls."""
        with self._changed:
            while self._memory is not None:
                now_ms = self._tick()
                self._settle()
                due_ms = self._store.next_due_ms
                wait_ms = limits.TICK_MS if due_ms is None else max(due_ms - now_ms, 1)
                self._changed.wait(min(wait_ms, limits.TICK_MS) / 1e3)

    def cast(
        self, command: c.Command, timeout_s: float, then: Callable[[object], None] | None = None
    ) -> None:
        """See `Link.cast`."""
        result = self.call(command, timeout_s)
        if then:
            then(result)

    def take_answers(self, timeout_s: float) -> None:
        """See `Link.take_answers`; they are there at once."""

    def memory(self, timeout_s: float) -> Memory:
        """See `Link.memory`."""
        del timeout_s
        self._guard.check()
        self._keep_up()
        memory = self._memory
        if memory is None:
            raise Unavailable("the store is closed")
        return memory

    @property
    def ready(self) -> Memory | None:
        """See `Link.ready`."""
        if self._guard.forked:
            return None
        self._keep_up()
        return self._memory

    @property
    def closed(self) -> bool:
        """See `Link.closed`."""
        return self._memory is None

    def _keep_up(self) -> None:
        """Nothing is found past its time, though nobody has asked the store for anything since."""
        due_ms = self._due_ms
        if due_ms is not None and due_ms <= self._clock.now_ms():
            with self._changed:
                if self._memory is not None:
                    self._tick()
                    self._settle()

    def fill(self, granted: Granted, sources: c.U64, timeout_s: float) -> c.U8:
        """See `Link.fill`."""
        return fill_directly(self, self.memory(timeout_s), granted, sources, timeout_s)

    def check(self) -> None:
        """See `KVStore.check`."""
        with self._changed:
            self._store.check()

    def close(self) -> None:
        """See `Link.close`."""
        if self._guard.forked:
            return  # the memory is the parent's, and so may be the lock
        with self._changed:
            if self._memory is None:
                return
            self._memory = None
            self._changed.notify_all()
        if self._ticker:
            self._ticker.join()
        if self._runner:
            self._runner.close()
        self._arenas.close()

    def _map(self) -> Memory:
        assert self._arenas.index
        memory = self._arenas.store_memory()
        return Memory(
            pool=memory.pool,
            generations=memory.generations,
            index=IndexReader(IndexView.open(self._arenas.index.array), self._boards),
            instance=self._instance,
            board=self._board,
        )


class KVStore(LocalSession):
    """An embedded store: a `Session` over memory of its own; thread-safe. It holds a few
    empty slots for its next puts, at most 1/32 of the pool and 32 MiB.

    dram: pool size in bytes. secret: 16 to 64 bytes that key the chains (None: random, so
    nothing outside this process can name its blocks). policy: "lru", "arc" or "s3fifo".
    max_blocks: the most blocks (None: as many as may fit, up to a million). huge_pages,
    numa_node, verify_reads: as `Placement` and `LocalSession` say. nvme: directories or block
    devices, with bytes of each, for blocks that leave memory; what they hold is found again by a
    store with the same `secret`. One that cannot be used is logged, and the store goes on without.
    nvme_policy: what is written there. nvme_engine: what moves it, "pread" or "nixl".
    `InvalidArgument` names what is wrong.
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
        nvme: Mapping[str | Path, int] | None = None,
        nvme_policy: NvmePolicy | None = None,
        nvme_engine: EngineName = "pread",
    ) -> None:
        locations = [
            Location(Path(path), nbytes, nvme_engine) for path, nbytes in (nvme or {}).items()
        ]
        placement = Placement(huge_pages=huge_pages, numa_node=numa_node)
        arenas = Arenas(dram, placement, pool_writable=False)
        # So that a put of a small block is no command to the store either: that takes longer than
        # to copy it. Nobody else sees them, so they are memory like any other.
        boards = Boards.create(np.zeros(BOARDS_BYTES, np.uint8))
        clock, instance = Clock(), secrets.randbits(63)
        opened = Opened()
        try:
            opened = open_all(locations, name=VOLUME_NAME)
            policy_of_nvme = nvme_policy or NvmePolicy()
            store = Store(
                replace(arenas.store_memory(), boards=boards),
                secret=secret or secrets.token_bytes(32),
                instance_id=instance,
                max_blocks=max_blocks or limits.default_max_blocks(dram, opened.nbytes),
                policy=policy,
                now_ms=clock.now_ms(),
                version=__version__,
                volumes=opened.books(),
                nvme=replace(policy_of_nvme, broken=bool(opened.problems)),
            )
        except BaseException:
            opened.close()
            arenas.close()
            raise
        link = _StoreLink(store, arenas, boards, clock=clock, instance=instance, opened=opened)
        # A call waits for disks alone here; its copies take the time that they take.
        self._own = link
        super().__init__(
            link, timeout_s=limits.MAX_DEADLINE_MS / 1e3, verify_reads=verify_reads, ahead=True
        )

    def check(self) -> None:
        """Walks every invariant of the store; for tests."""
        self._own.check()
