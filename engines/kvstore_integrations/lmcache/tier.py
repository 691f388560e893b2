"""The store as a tier below the memory of LMCache's server: tasks that look up, load and store.

Knows nothing of LMCache's classes: `l2.py` translates.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence

from kvstore_integrations.lmcache.names import Item, Kind, Line
from kvstore_integrations.lmcache.objects import U8, Objects, Stored
from kvstore_integrations.lmcache.tasks import Tasks

_SERIALIZED = (
    "nothing is stored: a `serde` packs the objects, and no look-up can tell how many bytes they "
    "have then; take it out of this adapter's configuration"
)
_UNNAMED = (
    "nothing is cached: chunks are named by hashes that two prompts may share; start LMCache's "
    "server with --hash-algorithm blake3"
)
log = logging.getLogger(__name__)


class ObjectTier:
    """Each kind of task runs on a thread of its own, in order; no call waits, but `close`.

    on_stored, on_found, on_loaded: called when a task's result can be taken. most_stores: tasks
    that may wait to be stored. Thread-safe.
    """

    def __init__(
        self,
        objects: Objects,
        *,
        on_stored: Callable[[], None],
        on_found: Callable[[], None],
        on_loaded: Callable[[], None],
        most_stores: int,
    ) -> None:
        self._objects = objects
        self._stores: Tasks[Stored] = Tasks("kvstore-store", on_stored, most=most_stores)
        self._look_ups: Tasks[list[bool]] = Tasks("kvstore-find", on_found)
        self._loads: Tasks[list[bool]] = Tasks("kvstore-load", on_loaded)
        self._lock = threading.Lock()
        # Of the objects seen so far, by model, rank and group.
        self._kinds: dict[tuple[str, int, int], set[Kind]] = {}
        self._said: set[str] = set()

    def store(self, items: Sequence[Item], rows: Sequence[U8]) -> int:
        """Starts to store objects from rows that nobody changes until it is over."""
        self._note(items)
        work = functools.partial(self._store, items, rows)
        return self._stores.begin(work, failed=Stored(complete=False))

    def stored(self) -> dict[int, Stored]:
        """The stores that are over since the last call."""
        return self._stores.take_all()

    def look_up(self, items: Sequence[Item]) -> int:
        """Starts to find and lock objects: what is found stays until it is unlocked."""
        self._note(items)
        work = functools.partial(self._look_up, items)
        return self._look_ups.begin(work, failed=[False] * len(items))

    def found(self, number: int) -> list[bool] | None:
        """Which of a look-up's objects are there and locked; None until it is over, or again."""
        return self._look_ups.take(number)

    def unlock(self, names: Sequence[bytes]) -> None:
        """Ends one lock of each object, after the look-ups that have been asked for."""
        self._look_ups.aside(functools.partial(self._objects.unlock, list(names)))

    @property
    def locked(self) -> int:
        """How many locks there are."""
        return self._objects.locked

    def load(self, items: Sequence[Item], rows: Sequence[U8]) -> int:
        """Starts to copy objects into rows that nobody else touches until it is over."""
        work = functools.partial(self._load, items, rows)
        return self._loads.begin(work, failed=[False] * len(items))

    def loaded(self, number: int) -> list[bool] | None:
        """Which of a load's objects are in their rows; None until it is over, or again."""
        return self._loads.take(number)

    def drop(self, model: str, line: Line, names: Sequence[bytes]) -> int:
        """Forgets objects of one chain; how many bytes one had, as far as that was ever known.

        Waits for the store.
        """
        nbytes = 0
        with self._lock:
            kinds = list(self._kinds.get((model, line.rank, line.group), ()))
        for kind in kinds:
            self._objects.drop(kind, names)
            nbytes = max(nbytes, kind.nbytes)
        return nbytes

    def close(self) -> None:
        """Ends the threads; waits for the tasks that have begun."""
        for tasks in (self._look_ups, self._loads, self._stores):
            tasks.close()

    # -- inside ------------------------------------------------------------------------

    def _store(self, items: Sequence[Item], rows: Sequence[U8]) -> Stored:
        new: list[int] = []
        complete = True
        for kind, places in self._runs(items):
            if kind.is_serialized:
                self._say_once(_SERIALIZED)
                complete = False
                continue
            names, some = [items[i].name for i in places], [rows[i] for i in places]
            stored = self._objects.put(kind, names, some)
            complete = complete and stored.complete
            new += [places[i] for i in stored.new]
        return Stored(complete and all(item.name for item in items), tuple(sorted(new)))

    def _look_up(self, items: Sequence[Item]) -> list[bool]:
        found = [False] * len(items)
        try:
            for kind, places in self._runs(items):
                hits = self._objects.lock(kind, [items[i].name for i in places])
                for i, hit in zip(places, hits, strict=True):
                    found[i] = hit
        except BaseException:  # nobody will learn of these locks
            self._objects.unlock(item.name for item, hit in zip(items, found, strict=True) if hit)
            raise
        return found

    def _load(self, items: Sequence[Item], rows: Sequence[U8]) -> list[bool]:
        came = [False] * len(items)
        for kind, places in self._runs(items):
            names, some = [items[i].name for i in places], [rows[i] for i in places]
            for i, hit in zip(places, self._objects.get(kind, names, some), strict=True):
                came[i] = hit
        return came

    def _note(self, items: Sequence[Item]) -> None:
        with self._lock:
            for item in items:
                of = (item.kind.model, item.line.rank, item.line.group)
                self._kinds.setdefault(of, set()).add(item.kind)

    def _runs(self, items: Sequence[Item]) -> list[tuple[Kind, list[int]]]:
        """The items' places, those of one chain together and in their order."""
        runs: dict[tuple[Kind, Line], list[int]] = {}
        for i, item in enumerate(items):
            if item.name:
                runs.setdefault((item.kind, item.line), []).append(i)
            else:
                self._say_once(_UNNAMED)
        return [(kind, places) for (kind, _), places in runs.items()]

    def _say_once(self, message: str) -> None:
        if message not in self._said:
            self._said.add(message)
            log.error(message)
