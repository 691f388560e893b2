"""Copies between an engine's KV memory and the store, for one worker.

Knows pages and plans, but nothing of vLLM's classes: `connector.py` translates. The engine's thread
begins copies and fetches results; only `close` waits for them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import logging
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

import numpy as np
import torch

from kvstore import Hint, Hit, Layout, Miss, MissReason, NamespaceHandle, Session
from kvstore.errors import InvalidArgument, KVStoreError
from kvstore_integrations.identity import Identity
from kvstore_integrations.jobs import Jobs
from kvstore_integrations.settings import ConfigurationError
from kvstore_integrations.vllm.pages import Mover, Pages, Ring, Wait
from kvstore_integrations.vllm.plans import Dropped, Load, Part, Plan, Save

_LOAD_SHARE = 4  # one part in so many of the host memory is for loads
_MOST_AT_ONCE = 32 << 20  # bytes of a save: its memory comes back when it is over
_MOST_SAVES = 4096  # that wait; their memory runs out before
_MOST_KEPT = 1024  # open namespaces
_END_S = 5.0
_IDLE_S = 0.001  # as long as vLLM's own pause between steps that compute nothing
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Counts:
    """What was copied. saved: blocks that the store had not; refused: that it had no room for;
    dropped: that found no memory here; lost: that were promised and did not load."""

    loaded_blocks: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    lost_blocks: int = 0
    saved_blocks: int = 0
    saved_bytes: int = 0
    save_seconds: float = 0.0
    refused_blocks: int = 0
    dropped_blocks: int = 0

    def add(self, other: Counts) -> None:
        """Adds each number of the other's."""
        for one in dataclasses.fields(self):
            setattr(self, one.name, getattr(self, one.name) + getattr(other, one.name))


@dataclass(frozen=True, slots=True)
class Store:
    """Where a group's blocks are, and what they are."""

    identity: Identity
    layout: Layout
    pages: Pages

    @classmethod
    def of(cls, identity: Identity, pages: Pages, block_tokens: int) -> Store:
        """`ConfigurationError` for blocks that no store takes."""
        try:
            layout = identity.layout(block_bytes=pages.block_bytes, block_tokens=block_tokens)
        except InvalidArgument as error:
            raise ConfigurationError(
                f"blocks of {block_tokens} tokens take {pages.block_bytes} bytes, which the store "
                f"does not: {error}. Choose a smaller --block-size."
            ) from error
        return cls(identity, layout, pages)


@dataclass(slots=True)
class Ended:
    """Loads that are over: the requests, and the blocks that did not load."""

    requests: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    lost_blocks: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _Done:
    """One job's end. ticket: of the memory that it used."""

    counts: Counts = field(default_factory=Counts)
    request: str = ""
    lost: Sequence[int] = ()
    ticket: int = -1


class BlockWorker:
    """The copies of one worker.

    stores: by cache group, None where the worker has no layer of it. writes: whether it saves; of
    several workers whose bytes are equal one does. staging_bytes: host memory for blocks on their
    way; `ConfigurationError` where no block fits.
    """

    def __init__(
        self,
        session: Session,
        stores: Sequence[Store | None],
        mover: Mover,
        *,
        staging_bytes: int,
        writes: bool = True,
    ) -> None:
        self._session, self._stores, self._mover, self._writes = session, stores, mover, writes
        largest = max((store.layout.block_bytes for store in stores if store), default=0)
        for_loads = staging_bytes // _LOAD_SHARE
        if largest > for_loads:
            raise ConfigurationError(
                f"staging_bytes: {staging_bytes} is too little for blocks of {largest} bytes; set "
                f"it to {16 * _LOAD_SHARE * largest} or more"
            )
        self._rows = mover.host_memory(for_loads)
        self._ring = Ring(mover.host_memory(staging_bytes - for_loads))
        self._jobs: Jobs[_Done] = Jobs("kvstore", most_stores=_MOST_SAVES)
        self._numbers = itertools.count()
        self._handles: dict[tuple[str, int], NamespaceHandle] = {}
        self._opening = threading.Lock()
        self._counts = Counts()
        self._dropped: dict[tuple[str, int], int] = {}
        self._loading = 0
        self._ended = Ended()

    def begin_loads(self, loads: Iterable[Load]) -> None:
        """Starts to load blocks, which nobody else touches before `ended` names the request."""
        for load in loads:
            blocks = [block for part in load.parts for block in part.blocks]
            failed = _Done(Counts(lost_blocks=len(blocks)), load.request, blocks)
            work = functools.partial(self._load, load, self._mover.mark())
            self._loading += 1
            self._jobs.load(next(self._numbers), work, failed=failed)

    def save(self, saves: Iterable[Save]) -> None:
        """Takes the blocks out of the KV memory as the engine has filled it so far, and starts to
        store them; those that find no memory are dropped."""
        self._collect()
        if not self._writes:
            return
        for save in saves:
            for part in save.parts:
                store = self._stores[part.group]
                if store is not None:
                    self._save(save, part, store)

    def end(self, plan: Plan) -> None:
        """Tells the store what becomes of blocks, behind the saves that were begun before."""
        if not self._writes:
            return
        for end in plan.ends:
            for group, chain in end.chains.items():
                if chain and self._stores[group] is not None:
                    work = functools.partial(self._hint, end.space, group, chain, end.hint)
                    self._jobs.aside(work)

    def ended(self, *, idle: bool = False) -> Ended:
        """The loads that are over since the last call.

        idle: the engine has nothing to compute, and waits a moment for a load if one is under way.
        An engine that asks again at once would keep the interpreter's lock from the copies.
        """
        self._collect(_IDLE_S if idle and self._loading and not self._ended.requests else 0.0)
        ended, self._ended = self._ended, Ended()
        return ended

    def dropped(self) -> Dropped | None:
        """The saves that found no memory since the last call, if there were any."""
        dropped, self._dropped = self._dropped, {}
        return Dropped(dropped) if dropped else None

    def counts(self) -> Counts | None:
        """What was copied since the last call, if anything was."""
        self._collect()
        counts, self._counts = self._counts, Counts()
        return counts if counts != Counts() else None

    def drain(self, timeout_s: float | None = None) -> None:
        """Waits until all copies are over, or for so long."""
        self._jobs.drain(timeout_s)

    def close(self) -> None:
        """Ends the threads. What is being saved is saved, unless the store is slow: then what has
        not begun in time is dropped."""
        self.drain(_END_S)
        self._jobs.close()

    # -- on the engine's thread --------------------------------------------------------

    def _save(self, save: Save, part: Part, store: Store) -> None:
        unit = store.layout.block_bytes
        at, total = 0, len(part.blocks)
        while at < total:
            most = min(total - at, max(_MOST_AT_ONCE // unit, 1))
            lent = self._ring.take(unit, most)
            if lent is None:
                key = (save.request, part.group)
                position = part.position + at
                self._dropped[key] = min(position, self._dropped.get(key, position))
                self._counts.dropped_blocks += total - at
                return
            ticket, rows = lent
            piece = part.cut(at, at + len(rows))
            wait = self._mover.gather(store.pages, np.array(piece.blocks), rows)
            work = functools.partial(self._put, save, piece, rows, ticket, wait)
            failed = _Done(Counts(refused_blocks=len(rows)), ticket=ticket)
            self._jobs.store(next(self._numbers), work, failed=failed)
            at += len(rows)

    def _collect(self, wait_s: float = 0.0) -> None:
        for _, done in self._jobs.finished(wait_s):
            self._counts.add(done.counts)
            if done.ticket >= 0:
                self._ring.give_back(done.ticket)
            if done.request:
                self._loading -= 1
                self._ended.requests.add(done.request)
                self._ended.lost_blocks.update(done.lost)
                if done.lost:
                    self._ended.failed.add(done.request)

    # -- on threads of their own -------------------------------------------------------

    def _handle(self, space: str, group: int) -> NamespaceHandle:
        """The namespace, opened if it is not; errors: those of the client."""
        with self._opening:
            handle = self._handles.get((space, group))
            if handle is None:
                store = self._stores[group]
                assert store is not None
                name = store.identity.namespace(space)
                if len(self._handles) >= _MOST_KEPT:
                    self._handles.clear()
                handle = self._session.open_namespace(name, store.layout)
                self._handles[space, group] = handle
            return handle

    def _load(self, load: Load, mark: Any) -> _Done:
        begin, counts = monotonic(), Counts()
        lost: list[int] = []
        for part in load.parts:
            store = self._stores[part.group]
            if store is None:
                continue
            # With some blocks lost, those of other cache groups are of no use.
            loaded = 0 if lost else self._load_part(load.space, part, store, mark)
            counts.loaded_blocks += loaded
            counts.loaded_bytes += loaded * store.layout.block_bytes
            lost += part.blocks[loaded:]
        counts.load_seconds = monotonic() - begin
        counts.lost_blocks = len(lost)
        return _Done(counts, load.request, lost)

    def _load_part(self, space: str, part: Part, store: Store, mark: Any) -> int:
        """Loads the blocks up to the first that is not whole; returns how many."""
        try:
            handle = self._handle(space, part.group)
        except KVStoreError as error:
            log.warning("blocks are not loaded: %s", error)
            return 0
        unit = store.layout.block_bytes
        most = len(self._rows) // unit
        memory = self._rows[: most * unit].view(most, unit)
        for first in range(0, len(part.blocks), most):
            piece = part.cut(first, min(first + most, len(part.blocks)))
            rows = memory[: len(piece.blocks)]
            answers = self._session.get_into(handle, piece.hashes, list(rows.numpy()))
            hits = sum(isinstance(answer, Hit) for answer in answers)
            if hits:
                blocks = np.array(piece.blocks[:hits])
                self._mover.scatter(store.pages, rows[:hits], blocks, mark)
            if hits < len(answers):
                if answers[hits] == Miss(MissReason.CORRUPTED):
                    self._forget(handle, part.cut(first + hits, len(part.blocks)))
                return first + hits
        return len(part.blocks)

    def _forget(self, handle: NamespaceHandle, part: Part) -> None:
        """Drops blocks of which the first is not what was stored, so that all are stored again: the
        request computes them, and those behind one corrupted block may be too."""
        log.error("a block in the store is corrupted; it and those behind it are dropped")
        try:
            self._session.drop(handle, part.hashes)
        except KVStoreError as error:
            log.warning("corrupted blocks were not dropped: %s", error)

    def _put(self, save: Save, part: Part, rows: torch.Tensor, ticket: int, wait: Wait) -> _Done:
        wait()
        begin = monotonic()
        try:
            handle = self._handle(save.space, part.group)
        except KVStoreError as error:
            log.warning("blocks are not stored: %s", error)
            return _Done(Counts(refused_blocks=len(rows)), ticket=ticket)
        put = self._session.put(
            handle,
            part.hashes,
            list(rows.numpy()),
            parent=part.parent,
            position=part.position,
            ttl_s=save.ttl_s,
        )
        counts = Counts(
            saved_blocks=put.stored,
            saved_bytes=put.stored * rows.shape[1],
            save_seconds=monotonic() - begin,
            refused_blocks=put.not_stored,
        )
        return _Done(counts, ticket=ticket)

    def _hint(self, space: str, group: int, chain: bytes, hint: Hint) -> None:
        self._session.hint(self._handle(space, group), chain, hint)
