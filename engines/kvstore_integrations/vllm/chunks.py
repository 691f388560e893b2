"""Chunks of vLLM's host memory in the store: look-ups on the scheduler's thread, copies off it.

Knows keys and rows, but nothing of vLLM's classes: `tier.py` translates. A key is what vLLM makes
of a chunk: its block hash (32 bytes of SHA-256) and the number of its cache group (4 bytes).
"""

from __future__ import annotations

import enum
import functools
import itertools
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore import Hit, Miss, MissReason, NamespaceHandle, Session, limits
from kvstore_integrations.jobs import Jobs
from kvstore_integrations.options import RequestOptions
from kvstore_integrations.spaces import Spaces

U8 = npt.NDArray[np.uint8]
_GROUP_BYTES = 4
_KEY_BYTES = limits.KEY_BYTES + _GROUP_BYTES
log = logging.getLogger(__name__)


class Found(enum.Enum):
    """What a look-up says of one chunk."""

    HIT = enum.auto()
    MISS = enum.auto()
    LATER = enum.auto()  # the tenant's namespace is being opened


@dataclass(slots=True)
class _Chain:
    """One group's chunks of a request, in order. low: the first of them that was asked for."""

    keys: list[bytes]
    hashes: U8  # (n, 32)
    low: int = limits.MAX_POSITION


@dataclass(slots=True)
class Request:
    """One request.

    options: None for a request that is not cached. keys: its chunks' keys in the order of its
    tokens, groups mixed, with the position at which each ends; it grows with the request.
    """

    options: RequestOptions | None
    keys: Mapping[bytes, int]
    chains: dict[bytes, _Chain] = field(default_factory=dict)  # by group
    hits: set[bytes] = field(default_factory=set)  # known to be stored
    missed: dict[bytes, int] = field(default_factory=dict)  # to the step in which it was not
    failed: set[bytes] = field(default_factory=set)  # did not load, and is not promised again


@dataclass(frozen=True, slots=True, kw_only=True)
class Copied:
    """The end of a job: the keys whose bytes are where they were to go; seconds, bytes.

    stored: whether they went to the store.
    """

    asked: int
    stored: bool = False
    keys: frozenset[bytes] = frozenset()
    seconds: float = 0.0
    nbytes: int = 0

    @property
    def complete(self) -> bool:
        """Whether all of them are."""
        return len(self.keys) == self.asked


@dataclass(frozen=True, slots=True)
class Group:
    """One of the engine's cache groups: its layers' namespaces, and the tokens of a chunk."""

    spaces: Spaces
    tokens: int


class ChunkCache:
    """The store as a tier for chunks of one size.

    rows: (chunks, bytes) uint8, the engine's host memory. groups: by the number in their keys. All
    calls are made by the scheduler's thread, and none of them waits for a copy or for the store,
    but for `drain` and `close`.
    """

    def __init__(
        self,
        session: Session,
        groups: Mapping[int, Group],
        rows: U8,
        *,
        most_stores: int,
    ) -> None:
        self._session, self._rows = session, rows
        self._groups = {
            number.to_bytes(_GROUP_BYTES, "big"): group for number, group in groups.items()
        }
        self._jobs: Jobs[Copied] = Jobs("kvstore", most_stores=most_stores)
        self._loads: dict[int, tuple[Request, list[bytes]]] = {}
        self._step = 0
        self._warned = False

    def next_step(self) -> None:
        """The scheduler has ended a step: what was missing may be there in the next one."""
        self._step += 1

    def look_up(self, request: Request, key: bytes) -> Found:
        """Whether the chunk is stored.

        The first look-up of a run asks for all of the request's later chunks too, in one pass over
        the shared index; the scheduler's next ones are answered from that.
        """
        if key in request.hits:
            return Found.HIT
        if request.options is None or key in request.failed:
            return Found.MISS
        if request.missed.get(key) == self._step or key not in request.keys:
            return Found.MISS
        if not self._is_ours(key):
            return Found.MISS
        spaces = self._groups[key[limits.KEY_BYTES :]].spaces
        space = spaces.get(request.options.tenant)
        if space is None:
            return Found.LATER if spaces.is_opening(request.options.tenant) else Found.MISS
        self._probe(request, key, space)
        return Found.HIT if key in request.hits else Found.MISS

    def load(
        self, number: int, request: Request, keys: Sequence[bytes], rows: npt.NDArray[np.integer]
    ) -> None:
        """Starts to copy the chunks into rows of the host memory, which nobody else touches."""
        self._loads[number] = (request, list(keys))
        parts = self._parts(request, keys, rows)
        failed = Copied(asked=len(keys))
        if not parts:
            self._jobs.finish(number, failed)
            return
        self._jobs.load(number, functools.partial(self._get, parts, len(keys)), failed=failed)

    def store(
        self, number: int, request: Request, keys: Sequence[bytes], rows: npt.NDArray[np.integer]
    ) -> None:
        """Starts to put the chunks, whose rows nobody changes until it is over."""
        parts = self._parts(request, keys, rows)
        failed = Copied(asked=len(keys))
        if not parts or request.options is None:
            self._jobs.finish(number, failed)
            return
        work = functools.partial(self._put, parts, len(keys), request.options.ttl_s)
        self._jobs.store(number, work, failed=failed)

    def finished(self) -> list[tuple[int, Copied]]:
        """The jobs that are over since the last call; what did not load counts as missing for its
        request from now on."""
        done = self._jobs.finished()
        for number, copied in done:
            request, keys = self._loads.pop(number, (None, []))
            if request is not None and not copied.complete:
                lost = set(keys) - copied.keys
                request.failed |= lost
                request.hits -= lost
        return done

    def end(self, request: Request) -> None:
        """The request is over: the store is told what becomes of its chunks."""
        if request.options is None or request.options.hint is None:
            return
        options, hint = request.options, request.options.hint
        for number, group in self._groups.items():
            handle = group.spaces.get(options.tenant)
            hashes = self._chain(request, number).hashes
            if handle is not None and len(hashes):
                self._jobs.aside(functools.partial(self._session.hint, handle, hashes, hint))

    def drain(self) -> None:
        """Waits until no copy is under way."""
        self._jobs.drain()

    def close(self) -> None:
        """Ends the threads; waits for the copies that have begun."""
        self._jobs.close()
        for group in self._groups.values():
            group.spaces.close()

    # -- inside ------------------------------------------------------------------------

    def _is_ours(self, key: bytes) -> bool:
        if len(key) == _KEY_BYTES and key[limits.KEY_BYTES :] in self._groups:
            return True
        if not self._warned:
            self._warned = True
            log.error(
                "nothing is cached: block hashes of %d bytes; set --prefix-caching-hash-algo to "
                "sha256_cbor",
                len(key) - _GROUP_BYTES,
            )
        return False

    def _row(self, request: Request, key: bytes) -> int:
        return request.keys[key] // self._groups[key[limits.KEY_BYTES :]].tokens - 1

    def _chain(self, request: Request, group: bytes) -> _Chain:
        """The group's chunks as far as they are known now."""
        known = request.chains.get(group)
        keys: list[bytes] = list(request.keys)
        if len(self._groups) > 1:
            keys = [key for key in keys if key.endswith(group)]
        if known is not None and len(known.keys) == len(keys):
            return known
        rows = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _KEY_BYTES)
        hashes = np.ascontiguousarray(rows[:, : limits.KEY_BYTES])
        low = known.low if known is not None else limits.MAX_POSITION
        chain = request.chains[group] = _Chain(keys, hashes, low)
        return chain

    def _probe(self, request: Request, key: bytes, space: NamespaceHandle) -> None:
        """Asks the store for the chunk and those behind it, and notes what it says."""
        chain, row = self._chain(request, key[limits.KEY_BYTES :]), self._row(request, key)
        keys = [key]
        if row < len(chain.keys) and chain.keys[row] == key:
            # A window's chunks are asked for from its end: then those behind are known already.
            last = row + 1 if row < chain.low < limits.MAX_POSITION else len(chain.keys)
            keys = chain.keys[row : min(last, row + limits.MAX_KEYS_PER_CALL)]
            chain.low = min(chain.low, row)
            found = self._session.match(space, chain.hashes[row : row + len(keys)]).count
        else:
            found = self._session.match(space, [key[: limits.KEY_BYTES]]).count
        request.hits.update(keys[:found])
        request.hits -= request.failed
        if found < len(keys):
            request.missed[keys[found]] = self._step

    def _parts(
        self, request: Request, keys: Sequence[bytes], rows: npt.NDArray[np.integer]
    ) -> list[_Part]:
        """The chunks as runs of one group's chain that follow each other; nothing where a
        namespace is not open."""
        if request.options is None or not all(self._is_ours(key) for key in keys):
            return []
        parts: list[_Part] = []
        order = sorted(
            (key[limits.KEY_BYTES :], self._row(request, key) if key in request.keys else -1, key)
            for key in keys
        )
        row_of = dict(zip(keys, rows.tolist(), strict=True))
        for group, chunk in itertools.groupby(order, key=lambda each: each[0]):
            space = self._groups[group].spaces.get(request.options.tenant)
            if space is None:
                return []
            hashes = self._chain(request, group).hashes
            for _, position, key in chunk:
                last = parts[-1] if parts else None
                if last and last.space is space and 0 <= last.position + len(last.keys) == position:
                    last.keys.append(key)
                    last.rows.append(self._rows[row_of[key]])
                    continue
                parent = hashes[position - 1].tobytes() if 0 < position <= len(hashes) else b""
                parts.append(_Part(space, position, parent, [key], [self._rows[row_of[key]]]))
        return parts

    def _get(self, parts: Iterable[_Part], asked: int) -> Copied:
        begin, loaded = time.monotonic(), set()
        for part in parts:
            at = 0
            while at < len(part.keys):  # behind a miss others may be there
                answers = self._session.get_into(part.space, part.hashes[at:], part.rows[at:])
                hits = sum(isinstance(answer, Hit) for answer in answers)
                loaded.update(part.keys[at : at + hits])
                at += hits + 1
                if Miss(MissReason.CORRUPTED) in answers[hits : hits + 1]:
                    # Else it would be promised, and taken for stored, for ever.
                    self._session.drop(part.space, [part.hashes[at - 1]])
        return self._copied(begin, loaded, asked, stored=False)

    def _put(self, parts: Iterable[_Part], asked: int, ttl_s: float | None) -> Copied:
        begin, stored = time.monotonic(), set()
        for part in parts:
            put = self._session.put(
                part.space,
                part.hashes,
                part.rows,
                parent=part.parent,
                position=part.position,
                ttl_s=ttl_s,
            )
            if put.not_stored == 0:
                stored.update(part.keys)
        return self._copied(begin, stored, asked, stored=True)

    def _copied(self, begin: float, keys: set[bytes], asked: int, *, stored: bool) -> Copied:
        return Copied(
            asked=asked,
            stored=stored,
            keys=frozenset(keys),
            seconds=time.monotonic() - begin,
            nbytes=len(keys) * self._rows.shape[1],
        )


@dataclass(slots=True)
class _Part:
    """Chunks that follow each other in one chain, from `position` on (-1: unknown)."""

    space: NamespaceHandle
    position: int
    parent: bytes
    keys: list[bytes]
    rows: list[U8]

    @property
    def hashes(self) -> list[bytes]:
        return [key[: limits.KEY_BYTES] for key in self.keys]
