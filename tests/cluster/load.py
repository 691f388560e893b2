"""Puts and gets that go on while nodes fail, and a model of what must be readable meanwhile."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from cluster.nodes import LAYOUT, Nodes, blocks, chain, eventually

from kvstore import Hit, NamespaceHandle
from kvstore.errors import DeadlineExceeded, KVStoreError, Unavailable
from kvstore_client.cluster.session import ClusterSession

_JOIN_S = 30.0
_DROP_S = 20.0
_PAUSE_S = 0.002  # between two calls, so that the nodes have the processors as well
_FULL_PAUSE_S = 0.05  # likewise, once there is as much as there may be
_MEMORY = {"arena_bytes": 8 << 20, "ring_bytes": 32 << 20}


@dataclass(frozen=True, slots=True)
class Sample:
    """One call. began_s: monotonic. missed: blocks that it should have had and had not."""

    began_s: float
    took_s: float
    missed: int


class Load:
    """One thread that puts chains and one that gets those that were acknowledged as replicated.

    Chain i has the keys and the bytes of seed i. most: chains that are kept, so that
    nothing need be evicted; the oldest is dropped for a new one.
    forget: drops all of it in the end.
    """

    def __init__(
        self,
        nodes: Nodes,
        space: str,
        *,
        seed: int = 1,
        blocks_each: int = 8,
        most: int = 40,
        transfer: str = "grpc",
        forget: bool = True,
    ) -> None:
        self._nodes, self._forget = nodes, forget
        self.space, self.blocks_each, self._most = space, blocks_each, most
        self._random, self._first = random.Random(seed), seed * 1_000_000
        self.reader = nodes.client(transfer=transfer, **_MEMORY)
        try:
            self.writer = nodes.client(transfer=transfer, **_MEMORY)
        except BaseException:
            self.reader.close()
            raise
        self._lock = threading.Lock()
        self.acknowledged: list[int] = []
        self._may_miss: set[int] = set()
        self._any_may_miss = False
        self._dropped: list[int] = []
        self.gets: list[Sample] = []
        self.puts: list[Sample] = []
        self.good_gets = self.good_puts = 0
        self.wrong: list[str] = []
        self._stop, self._seen = threading.Event(), threading.Condition()
        self._threads = [
            threading.Thread(target=self._guarded, args=(work,), name=f"load-{work.__name__}")
            for work in (self._put_for_ever, self._get_for_ever)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        self.wait_for(puts=1, gets=1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_S)
        try:
            if error is None:
                self.check()
                if self._forget:
                    eventually(self._dropped_all, _DROP_S, "the namespace is dropped")
        finally:
            self.writer.close()
            self.reader.close()

    def _dropped_all(self) -> bool:
        """Room for the next test; refused until all nodes are there."""
        self.writer.drop_namespace(self.writer.open_namespace(self.space, LAYOUT))
        return True

    def wait_for(self, *, puts: int = 0, gets: int = 0, timeout_s: float = 20.0) -> None:
        """Until so many more have ended well."""
        with self._seen:
            gets, puts = gets + self.good_gets, puts + self.good_puts
            enough = self._seen.wait_for(
                lambda: (self.good_gets >= gets and self.good_puts >= puts) or self.wrong, timeout_s
            )
        self.check()
        assert enough, f"no {gets} gets and {puts} puts within {timeout_s} s: {self.words()}"

    def check(self) -> None:
        """Nothing wrong was read so far, and nothing was missed that must be there."""
        assert not self.wrong, "\n".join(self.wrong[:10])

    @contextlib.contextmanager
    def pressure(self) -> Iterator[None]:
        """Blocks may be evicted meanwhile: of those that are acknowledged by its end, a miss is
        legal from now on. Wrong bytes never are."""
        with self._lock:
            self._any_may_miss = True
        try:
            yield
        finally:
            with self._lock:
                self._may_miss |= set(self.acknowledged)
                self._any_may_miss = False

    def keys(self) -> np.ndarray:
        """Of all blocks that must be readable, uint8 (n, 32)."""
        due = [chain(self.blocks_each, seed) for seed in self.due()]
        return np.concatenate(due) if due else np.empty((0, 32), np.uint8)

    def due(self) -> list[int]:
        """The seeds of all chains that must be readable."""
        with self._lock:
            return [seed for seed in self.acknowledged if seed not in self._may_miss]

    def longest_put_s(self, since_s: float) -> float:
        """Of those that ended after that moment."""
        with self._lock:
            return max((p.took_s for p in self.puts if p.began_s + p.took_s >= since_s), default=0)

    def longest_get_s(self, since_s: float) -> float:
        """Of those that ended after that moment and found all; others are of dropped chains, for
        which every node is asked."""
        with self._lock:
            found = [get for get in self.gets if not get.missed]
            return max((g.took_s for g in found if g.began_s + g.took_s >= since_s), default=0)

    def words(self) -> str:
        """How it went."""
        with self._lock:
            took = np.array([g.took_s for g in self.gets] or [0.0]) * 1e3
            missed = sum(bool(g.missed) for g in self.gets)
            median, tail = np.percentile(took, [50, 99])
            return (
                f"{len(self.gets)} gets (median {median:.0f} ms, p99 {tail:.0f},"
                f" longest {took.max():.0f}; {missed} missed),"
                f" {self.good_puts} of {len(self.puts)} puts replicated,"
                f" {self.reader.router.counters}"
            )

    # -- the threads -------------------------------------------------------------------

    def _guarded(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._note(f"{work.__name__} ended: {type(error).__name__}: {error}")

    def _note(self, wrong: str) -> None:
        with self._seen:
            self.wrong.append(wrong)
            self._seen.notify_all()

    def _put_for_ever(self) -> None:
        seed = self._first
        space = _opened(self.writer, self.space, self._stop)
        while not self._stop.wait(_PAUSE_S):
            if len(self.acknowledged) >= self._most:
                self._stop.wait(_FULL_PAUSE_S)
                self._drop_oldest(space)
            seed += 1
            began_s = time.monotonic()
            n = self.blocks_each
            try:
                done = self.writer.put(space, chain(n, seed), list(blocks(n, seed)), position=0)
            except KVStoreError as error:
                self._note(f"a put raised {type(error).__name__}: {error}")
                return
            took_s = time.monotonic() - began_s
            with self._seen, self._lock:
                self.puts.append(Sample(began_s, took_s, n - done.replicated))
                if done.replicated == n:
                    self.acknowledged.append(seed)
                    self.good_puts += 1
                self._seen.notify_all()

    def _drop_oldest(self, space: NamespaceHandle) -> None:
        with self._lock:
            seed = self.acknowledged.pop(0)
            self._may_miss.add(seed)  # the other thread may be reading it
            self._dropped.append(seed)
        # A node that is away keeps it, and brings it back: see `drop_again`.
        with contextlib.suppress(Unavailable, DeadlineExceeded):
            self.writer.drop(space, chain(self.blocks_each, seed), timeout_s=1.0)

    def drop_again(self) -> None:
        """Once all nodes are there: so that what came back takes no room."""
        space = self.writer.open_namespace(self.space, LAYOUT)
        with self._lock:
            dropped, self._dropped = self._dropped, []
        for seed in dropped:
            self.writer.drop(space, chain(self.blocks_each, seed))

    def _get_for_ever(self) -> None:
        space = _opened(self.reader, self.space, self._stop)
        n = self.blocks_each
        target = np.zeros((n, LAYOUT.block_bytes), np.uint8)
        while not self._stop.wait(_PAUSE_S):
            with self._lock:
                if not self.acknowledged:
                    continue
                seed = self._random.choice(self.acknowledged)
            target[:] = 0
            began_s = time.monotonic()
            try:
                got = self.reader.get_into(space, chain(n, seed), list(target))
            except KVStoreError as error:
                self._note(f"a get raised {type(error).__name__}: {error}")
                return
            took_s = time.monotonic() - began_s
            hits = sum(isinstance(each, Hit) for each in got)
            truth = blocks(n, seed)
            if not (target[:hits] == truth[:hits]).all():
                self._note(f"chain {seed}: other bytes were read than were put")
            if (target[:hits] == truth[:hits]).all() and hits < n and not self._legal(seed):
                where = self._nodes.where(self.space, chain(n, seed))
                self._note(
                    f"chain {seed}: {got[hits]} after {took_s:.3f} s, {self.words()} {where}"
                )
            with self._seen, self._lock:
                self.gets.append(Sample(began_s, took_s, n - hits))
                self.good_gets += hits == n
                self._seen.notify_all()

    def _legal(self, seed: int) -> bool:
        with self._lock:
            return self._any_may_miss or seed in self._may_miss


def _opened(session: ClusterSession, name: str, stop: threading.Event) -> NamespaceHandle:
    while True:
        try:
            return session.open_namespace(name, LAYOUT)
        except KVStoreError:
            if stop.wait(0.05):
                raise
