"""LMCache's objects in the store: put, found, held and got. Each call waits for the store.

Knows names, kinds and rows of bytes, but nothing of LMCache's classes: `l2.py` and `remote.py`
translate.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import Hit, Miss, MissReason, NamespaceHandle, Session, View, limits
from kvstore.errors import KVStoreError
from kvstore_integrations.lmcache.names import Kind
from kvstore_integrations.lmcache.shelves import Shelves

U8 = npt.NDArray[np.uint8]
# A look-up waits no longer, also where the store died since it was last seen.
_LOOK_UP_S = 0.5
_OPEN_S = 10.0  # that a put waits for its namespace
_QUIET_S = 10.0  # between two lines in the log that say the same
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stored:
    """The end of a put. new: which ones were not there before and are now, by their index."""

    complete: bool
    new: tuple[int, ...] = ()


@dataclass(slots=True)
class _Hold:
    """A view, and how many of its objects are still locked."""

    view: View
    left: int


class Objects:
    """The objects of one LMCache process; thread-safe.

    names: 32 bytes each, in the order of their chain; rows: uint8, as long as the kind's objects.
    A store that is away or full has nothing and takes nothing. leases: whether a lock is a lease,
    as it can be over shared memory; else nothing is locked.
    """

    def __init__(self, session: Session, shelves: Shelves, *, leases: bool) -> None:
        self._session, self._shelves, self._leases = session, shelves, leases
        self._lock = threading.Lock()
        self._holds: dict[bytes, list[_Hold]] = {}  # by name, as many as there are locks
        self._said_s = -_QUIET_S

    def put(self, kind: Kind, names: Sequence[bytes], rows: Sequence[U8]) -> Stored:
        """Stores objects that nobody changes meanwhile."""
        space = self._shelves.get(kind, wait_s=_OPEN_S)
        if space is None:
            self._say_not_stored(len(names))
            return Stored(complete=False)
        new: list[int] = []
        missing, parent = 0, b""
        for at in range(0, len(names), limits.MAX_KEYS_PER_CALL):
            end = min(at + limits.MAX_KEYS_PER_CALL, len(names))
            put = self._session.put(space, names[at:end], rows[at:end], parent=parent)
            there = list(range(at, end))
            if put.not_stored:
                missing += put.not_stored
                there = [at + i for i, hit in enumerate(self.find(kind, names[at:end])) if hit]
            # What was there before comes first, as a chain is stored from its beginning.
            new += there[len(there) - put.stored :]
            parent = names[end - 1]
        if missing:
            self._say_not_stored(missing)
        return Stored(not missing, tuple(new))

    def find(self, kind: Kind, names: Sequence[bytes]) -> list[bool]:
        """Which ones are stored."""
        found = [False] * len(names)
        space = self._shelves.get(kind, wait_s=_LOOK_UP_S)
        if space is not None:
            for run in self._runs(space, _chain(names)):
                found[run.start : run.stop] = [True] * len(run)
        return found

    def count(self, kind: Kind, names: Sequence[bytes]) -> int:
        """How many of the first ones are stored."""
        space = self._shelves.get(kind, wait_s=_LOOK_UP_S)
        if space is None:
            return 0
        first = next(self._runs(space, _chain(names)), range(0))
        return len(first) if first.start == 0 else 0

    def lock(self, kind: Kind, names: Sequence[bytes]) -> list[bool]:
        """Which ones are stored; these are not evicted until `unlock`, or the connection's end."""
        if not self._leases:
            return self.find(kind, names)
        found = [False] * len(names)
        space = self._shelves.get(kind, wait_s=_LOOK_UP_S)
        if space is None:
            return found
        chain = _chain(names)
        try:
            for run in self._runs(space, chain):
                for at in self._hold(space, chain, names, run):
                    found[at] = True
        except BaseException:  # nobody will learn of these locks
            self.unlock(name for name, hit in zip(names, found, strict=True) if hit)
            raise
        return found

    def unlock(self, names: Iterable[bytes]) -> None:
        """Ends one lock of each; those that are not locked are passed over."""
        over = []
        with self._lock:
            for name in names:
                holds = self._holds.get(name)
                if not holds:
                    continue
                hold = holds.pop(0)
                if not holds:
                    del self._holds[name]
                hold.left -= 1
                if not hold.left:
                    over.append(hold.view)
        for view in over:
            view.release()

    @property
    def locked(self) -> int:
        """How many locks there are."""
        with self._lock:
            return sum(map(len, self._holds.values()))

    def get(self, kind: Kind, names: Sequence[bytes], rows: Sequence[U8]) -> list[bool]:
        """Copies objects into rows; which ones came. The others' rows mean nothing."""
        came = [False] * len(names)
        space = self._shelves.get(kind, wait_s=_LOOK_UP_S)
        if space is None:
            return came
        chain, at = _chain(names), 0
        while at < len(chain):  # behind a miss others may be there
            some = chain[at:][: limits.MAX_KEYS_PER_CALL]
            answers = self._session.get_into(space, some, rows[at : at + len(some)])
            hits = sum(isinstance(answer, Hit) for answer in answers)
            came[at : at + hits] = [True] * hits
            at += hits
            if hits < len(some):
                if answers[hits] == Miss(MissReason.CORRUPTED):
                    log.error("an object's bytes fail their checksum; it is dropped")
                    self.drop(kind, [names[at]])  # else it could not be stored anew
                at += 1
        return came

    def drop(self, kind: Kind, names: Sequence[bytes]) -> int:
        """Forgets them; how many there were."""
        space = self._shelves.get(kind, wait_s=_LOOK_UP_S)
        if space is None:
            return 0
        try:
            return self._session.drop(space, _chain(names), timeout_s=_LOOK_UP_S)
        except KVStoreError as error:
            log.warning("%d objects were not dropped: %s", len(names), error)
            return 0

    # -- inside ------------------------------------------------------------------------

    def _runs(self, space: NamespaceHandle, chain: U8) -> Iterator[range]:
        """The stored parts of the chain, one after another."""
        at, some = 0, limits.MAX_KEYS_PER_CALL
        while at < len(chain):
            asked = chain[at : at + some]
            count = self._session.match(space, asked, timeout_s=_LOOK_UP_S).count
            if count < len(asked):
                # One by one behind a gap: the store counts all that it is asked for.
                some = 1
                if count:
                    yield range(at, at + count)
                at += count + 1
            elif some == 1 and at + 1 < len(chain):
                some = limits.MAX_KEYS_PER_CALL
            else:
                yield range(at, at + count)
                at += count

    def _hold(
        self, space: NamespaceHandle, chain: U8, names: Sequence[bytes], run: range
    ) -> Iterator[int]:
        """Locks a run that was stored a moment ago; yields what is locked."""
        at = run.start
        while at < run.stop:
            try:
                view = self._session.view(space, chain[at : run.stop], timeout_s=_LOOK_UP_S)
            except KVStoreError as error:
                log.warning("stored objects count as missing, they cannot be held: %s", error)
                return
            held = range(at, at + len(view.blocks))
            if held:
                hold = _Hold(view, len(held))
                with self._lock:
                    for i in held:
                        self._holds.setdefault(names[i], []).append(hold)
                yield from held
            at = held.stop + 1  # the next one was evicted since

    def _say_not_stored(self, n: int) -> None:
        now = time.monotonic()
        if now - self._said_s >= _QUIET_S:
            self._said_s = now
            log.warning("%d objects were not stored: the store is away or full", n)


def _chain(names: Sequence[bytes]) -> U8:
    return np.frombuffer(b"".join(names), np.uint8).reshape(-1, limits.KEY_BYTES)
