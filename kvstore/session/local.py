"""A session over mapped memory: matches read the index, gets and puts copy, calls are few.

Ours: the order of reads and copies that keeps a racing eviction from ever showing. Not ours:
what to evict, where to put (the store decides), and how commands travel (the link).
"""

from __future__ import annotations

import contextlib
import math
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.block import copied_headers, read_headers
from kvstore.errors import (
    DeadlineExceeded,
    KVStoreError,
    ResourceExhausted,
    StaleNamespace,
    Unavailable,
)
from kvstore.index.format import MASK56, W_PLACE, W_SPACE, W_STAMP
from kvstore.index.reader import Lookup, Match
from kvstore.pieces import growing
from kvstore.session.base import (
    NVME_CODE,
    TIERS,
    Bytes1D,
    Hashes,
    Hint,
    Hit,
    Matched,
    Miss,
    MissReason,
    NamespaceHandle,
    PutResult,
)
from kvstore.session.buffers import HeldBlocks, own_buffers
from kvstore.session.control import ControlSession, Deadline
from kvstore.session.copies import copy_in_parallel, groups_of, in_parallel
from kvstore.session.link import Granted, Link, Memory
from kvstore.session.requests import (
    GetRequest,
    PutRequest,
    checked_chain,
    checked_get,
    checked_put,
    checked_timeout,
    hint_ms,
)
from kvstore.session.writes import Writer
from kvstore.streaming import copy_rows

_ANSWER_S = 0.05  # before the deadline: when a call that waits for NVMe is answered
_DURABLE_PIECE_BYTES = (4 << 20, 24 << 20)  # of the first piece of a durable put, and the most
_DURABLE_GROWTH = 3  # so much faster than most disks write can one be copied
_MOST_STALLS = 3  # fetches whose blocks are gone again before they are copied
_HITS = {code: Hit(tier) for code, tier in TIERS.items()}


class LocalView(HeldBlocks):
    """A `View` of a store's own memory, under a lease."""

    def __init__(self, session: LocalSession, lease: int, blocks: list[Bytes1D]) -> None:
        super().__init__(blocks)
        self._session, self._lease = session, lease

    def release(self) -> None:
        """See `View.release`; a store that is gone holds nothing any more."""
        super().release()
        if self._lease:
            lease, self._lease = self._lease, 0
            self._session.release(lease)


class LocalSession(ControlSession):
    """One client of one store on the same host (or in the same process).

    Implements `Session`, but for one thing: when the store is gone it raises instead of missing;
    `ResilientSession` adds that. verify_reads: check the checksums at each get. ahead: hold empty
    slots for the next puts.
    """

    def __init__(
        self, link: Link, *, timeout_s: float, verify_reads: bool = False, ahead: bool = False
    ) -> None:
        super().__init__(link, timeout_s=timeout_s)
        self._writer = Writer(link, ahead=ahead)
        # Readers order their loads by what x86 guarantees; elsewhere only a checksum can tell.
        self._verify = verify_reads or platform.machine() != "x86_64"

    # -- reading -----------------------------------------------------------------------

    def match(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        *,
        hint: Hint | None = None,
        prefetch: bool = False,
        timeout_s: float | None = None,
    ) -> Matched:
        """See `Session.match`; makes no call, unless a hint goes with it or blocks are fetched."""
        deadline = self._deadline(timeout_s)
        chain = checked_chain(hashes)
        if hint:
            hint_ms(hint)
        memory = self._link.memory(deadline.left_s)
        number = self._number_in(memory, namespace, deadline)
        found = memory.index.match(number, chain)
        cold = int(np.count_nonzero(found.tiers == NVME_CODE))
        self._note(found, found.count, len(chain), cold)
        if prefetch and cold:
            self._prefetch(number, chain[: found.count], deadline)
        if hint and found.count:
            self._advise(namespace, chain[: found.count], hint, deadline)
        return Matched(found.count, found.tiers)

    def get_into(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        destinations: Sequence[Bytes1D],
        *,
        cells: Iterable[int] = (),
        timeout_s: float | None = None,
    ) -> list[Hit | Miss]:
        """See `Session.get_into`; makes no call, unless blocks come from NVMe."""
        deadline = self._deadline(timeout_s)
        request = checked_get(namespace, hashes, destinations, cells)
        memory = self._link.memory(deadline.left_s)
        number = self._number_in(memory, namespace, deadline)
        found = memory.index.match(number, request.chain)
        tiers = found.tiers
        if (tiers == NVME_CODE).any():
            hits, reason, tiers = self._copy_out_cold(number, request, found, deadline)
        else:
            hits, reason = self._copy_out(memory, request, found, deadline)
            self._note(found, hits, len(request.chain))
        results: list[Hit | Miss] = [_HITS[code] for code in tiers[:hits].tolist()]
        if hits < len(request.chain):
            results.append(Miss(reason))
            behind = len(request.chain) - len(results)
            results += [Miss(MissReason.NOT_STORED)] * behind
        return results

    def view(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> LocalView:
        """See `Session.view`; the arrays are the store's own memory."""
        deadline = self._deadline(timeout_s)
        chain = checked_chain(hashes)
        # First, because a lease that cannot be shown would stay for as long as the connection.
        memory = self._link.memory(deadline.left_s)
        self._bring(namespace, chain, memory, deadline)
        leased = self._inside(
            namespace,
            max(deadline.left_s, 1e-3),
            lambda number: c.Lease(namespace=number, hashes=chain),
            c.Leased,
        )
        blocks = [memory.payload(namespace.layout, granule) for granule in leased.granules.tolist()]
        for block in blocks:
            block.flags.writeable = False
        return LocalView(self, leased.lease, blocks)

    def buffers(self, n: int, nbytes: int) -> HeldBlocks:
        """See `Session.buffers`."""
        return own_buffers(n, nbytes)

    def release(self, lease: int) -> None:
        """Ends a view's lease; with the store gone there is none."""
        release = c.Release(lease=lease)
        try:
            self._call(release, c.Count, Deadline(self._timeout_s))
        except Unavailable:
            pass
        except DeadlineExceeded:
            self._give_back(release)

    # -- writing -----------------------------------------------------------------------

    def put(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        sources: Sequence[Bytes1D],
        *,
        put_id: bytes | None = None,
        cells: Iterable[int] = (),
        parent: bytes = b"",
        position: int = -1,
        ttl_s: float | None = None,
        hint: Hint | None = None,
        persist: bool = False,
        timeout_s: float | None = None,
    ) -> PutResult:
        """See `Session.put`; few calls, often none, and one more with a hint."""
        plain = hint is None and ttl_s is None and not persist
        if plain and isinstance(cells, tuple) and not cells:
            if timeout_s is not None:
                checked_timeout(timeout_s)
            memory = self._link.ready
            done = memory and self._writer.put_one(
                *(memory, namespace, hashes, sources),
                put_id=put_id,
                parent=parent,
                position=position,
                note=self._came_upon,
            )
            if done:
                return done
        deadline = self._deadline(timeout_s)
        put = checked_put(
            namespace,
            hashes,
            sources,
            put_id=put_id,
            cells=cells,
            parent=parent,
            position=position,
            ttl_s=ttl_s,
            hint=hint,
        )
        result = self._put_durably(put, deadline) if persist else self._put(put, deadline)
        if hint:
            self._advise(namespace, put.chain, hint, deadline)
        return result

    def close(self) -> None:
        """See `Session.close`."""
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------

    def _advise(
        self, namespace: NamespaceHandle, chain: c.U8, hint: Hint, deadline: Deadline
    ) -> None:
        """A hint beside a match or a put is advice: where it is not taken, nothing is lost."""
        with contextlib.suppress(ResourceExhausted, StaleNamespace, Unavailable, DeadlineExceeded):
            self.hint(namespace, chain, hint, timeout_s=max(deadline.left_s, 1e-3))

    def _prefetch(self, number: int, chain: c.U8, deadline: Deadline) -> None:
        """Advice as well."""
        with contextlib.suppress(StaleNamespace, Unavailable, DeadlineExceeded):
            self._fetch(number, chain, deadline, wait=False)

    def _fetch(self, number: int, chain: c.U8, deadline: Deadline, *, wait: bool = True) -> int:
        """How many leading blocks are in memory, once it is more than at first, if it can be."""
        # So that the answer comes before the call is given up, and the connection with it.
        wait_ms = max(int(1e3 * (deadline.left_s - _ANSWER_S)), 0) if wait else 0
        command = c.Fetch(namespace=number, hashes=chain, wait_ms=wait_ms)
        try:
            return self._call(command, c.Count, deadline).blocks
        except StaleNamespace:
            return 0

    def _put_durably(self, put: PutRequest, deadline: Deadline) -> PutResult:
        """Puts piece by piece, so that one is written while the next one is copied."""
        least, most = (max(1, nbytes // put.part.nbytes) for nbytes in _DURABLE_PIECE_BYTES)
        total, first = PutResult(stored=0, existed=0, waiting=0, not_stored=0), 0
        for size in growing(len(put.chain), least=least, most=most, factor=_DURABLE_GROWTH):
            piece = put.cut(first, first + size)
            total += self._put(piece, deadline)
            first += size
            if first < len(put.chain):
                self._begin_to_persist(piece, deadline)
                if first == size and self._is_whole(put):
                    self._ask_for_slots(put.cut(first, len(put.chain)), deadline)
        if total.stored + total.existed:
            persisted = self._persist(put.namespace, put.chain, deadline)
            total = replace(total, persisted=persisted)
        return total

    def _begin_to_persist(self, put: PutRequest, deadline: Deadline) -> None:
        """Has what was put written while this goes on; what fails is asked for again at the end."""
        with contextlib.suppress(KVStoreError):
            number = self._number(put.namespace, deadline)
            persist = c.Persist(namespace=number, hashes=put.chain, wait_ms=0)
            self._link.cast(persist, deadline.left_s)

    def _ask_for_slots(self, rest: PutRequest, deadline: Deadline) -> None:
        """For the pieces that are left, while the first one is written."""
        with contextlib.suppress(KVStoreError):
            memory = self._link.memory(deadline.left_s)
            number = self._number_in(memory, rest.namespace, deadline)
            before = self._report_before_eviction
            self._writer.ask(rest, number, memory, deadline, before=before)

    def _persist(self, namespace: NamespaceHandle, chain: c.U8, deadline: Deadline) -> int:
        """How many of these blocks are durable when the call ends."""
        wait_ms = max(int(1e3 * (deadline.left_s - _ANSWER_S)), 0)
        with contextlib.suppress(Unavailable, DeadlineExceeded):
            persisted = self._inside(
                namespace,
                max(deadline.left_s, 1e-3),
                lambda number: c.Persist(namespace=number, hashes=chain, wait_ms=wait_ms),
                c.Persisted,
            )
            return int(persisted.durable.sum())
        return 0

    def _bring(
        self, namespace: NamespaceHandle, chain: c.U8, memory: Memory, deadline: Deadline
    ) -> None:
        """Has what is stored of the chain brought into memory, as far as there is room."""
        number = self._number_in(memory, namespace, deadline)
        found = memory.index.match(number, chain)
        there = _leading(found.tiers != NVME_CODE)
        while there < found.count and deadline.left_s > 0:
            now = self._fetch(number, chain[: found.count], deadline)
            if now <= there:
                break
            there = now

    def _copy_out_cold(
        self, number: int, request: GetRequest, found: Match, deadline: Deadline
    ) -> tuple[int, MissReason, c.U8]:
        """`_copy_out` where some blocks are on NVMe: those in memory are copied while the others
        come. Also returns where each was at first (uint8)."""
        tiers, n, known = found.tiers, len(request.chain), found.count
        done = stalls = 0
        while True:
            memory = self._link.memory(deadline.left_s)
            warm = _leading(found.tiers != NVME_CODE)
            part = Match(found.rows[:warm])
            hits, reason = self._copy_out(memory, request.behind(done), part, deadline)
            cold = int(np.count_nonzero(tiers[done : done + hits] == NVME_CODE))
            self._note(part, hits, hits, cold)
            done += hits
            if hits < warm or done == known:
                break
            stalls = 0 if hits else stalls + 1
            reason = MissReason.UNAVAILABLE
            # Also where the next one was not seen, because its row was just being moved: when the
            # store answers, it is not.
            if stalls > _MOST_STALLS or not self._fetch(number, request.chain[done:], deadline):
                break
            memory = self._link.memory(deadline.left_s)
            found = memory.index.match(number, request.chain[done:])
            known = max(known, done + found.count)
            tiers = np.concatenate((tiers, found.tiers[len(tiers) - done :]))
        self._note(found, 0, n - done)
        return done, reason, tiers

    def _put(self, put: PutRequest, deadline: Deadline) -> PutResult:
        store = self._put_whole if self._is_whole(put) else self._put_part
        try:
            try:
                return store(put, deadline)
            except StaleNamespace:
                self._ids.clear()
                return store(put, deadline)
        except ResourceExhausted as error:  # an engine goes on without its cache
            return PutResult(
                stored=0,
                existed=0,
                waiting=0,
                not_stored=len(put.chain),
                retry_after_ms=error.retry_after_ms,
            )

    def _is_whole(self, put: PutRequest) -> bool:
        return self._link.writes_pool and not len(put.part.cells)

    def _put_whole(self, put: PutRequest, deadline: Deadline) -> PutResult:
        memory = self._link.memory(deadline.left_s)
        epoch = memory.index.namespace_epoch
        number = self._number_in(memory, put.namespace, deadline)
        return self._writer.put(
            *(put, number, memory, deadline),
            epoch=epoch,
            before=self._report_before_eviction,
            note=self._came_upon,
        )

    def _put_part(self, put: PutRequest, deadline: Deadline) -> PutResult:
        """Some cells of blocks, or whole ones where the store copies: two calls."""
        number = self._number(put.namespace, deadline)
        self._report_before_eviction(deadline)
        reserved = self._call(put.reserve(number), c.Reserved, deadline)
        granted = np.flatnonzero(reserved.status == c.ReserveStatus.GRANTED)
        existed = int((reserved.status == c.ReserveStatus.EXISTS).sum())
        full = bool((reserved.status == c.ReserveStatus.NO_SPACE).any())
        status = self._fill(put, number, reserved, granted, deadline)
        stored = int((status == c.SealStatus.STORED).sum())
        waiting = int((status == c.SealStatus.WAITING).sum())
        return PutResult(
            stored=stored,
            existed=existed,
            waiting=waiting,
            not_stored=len(put.chain) - existed - stored - waiting,
            retry_after_ms=limits.RETRY_AFTER_MS if full else 0,
        )

    def _fill(
        self,
        put: PutRequest,
        number: int,
        reserved: c.Reserved,
        chosen: np.ndarray[tuple[int], np.dtype[np.intp]],
        deadline: Deadline,
    ) -> c.U8:
        """Moves the granted blocks' bytes in; a failure gives their slots back.

        Of a namespace that was dropped meanwhile nothing is stored.
        """
        if not len(chosen):
            return np.empty(0, np.uint8)
        granted = Granted(
            namespace=number,
            layout=put.namespace.layout,
            put_id=put.put_id,
            hashes=put.chain[chosen],
            granules=reserved.granules[chosen],
            part=put.part,
        )
        sources = put.addresses[chosen]
        try:
            return self._link.fill(granted, sources, deadline.left_s)
        except BaseException as error:
            self._give_back(c.Abort(namespace=number, put_id=put.put_id, hashes=granted.hashes))
            if not isinstance(error, StaleNamespace):
                raise
            return np.full(len(chosen), c.SealStatus.DROPPED, np.uint8)

    def _give_back(self, command: c.Abort | c.Release) -> None:
        """The slots of a put that came to nothing, or a lease for whose end there was no time."""
        with contextlib.suppress(KVStoreError):
            self._call(command, c.Count, Deadline(self._timeout_s))

    def _copy_out(
        self, memory: Memory, request: GetRequest, found: Match, deadline: Deadline
    ) -> tuple[int, MissReason]:
        """Copies the found blocks; returns how many leading ones count, and why not the next."""
        if found.count == 1 and not self._verify:
            return _copy_out_one(memory, request, found)
        granules, generations = found.granules, found.generations
        n = _leading(memory.generations[granules] == generations)
        copied = _copy(memory, request, granules[:n], deadline.end_s)
        # Again: a slot that changed hands meanwhile had other bytes at some moment.
        sound = _leading(memory.generations[granules[:copied]] == generations[:copied])
        if self._verify:
            checked = _leading_sound(memory, request, Lookup(found.rows[:sound]))
            sound_still = _leading(memory.generations[granules[:sound]] == generations[:sound])
            if checked < sound_still:
                return checked, MissReason.CORRUPTED
            sound = sound_still
        if sound < copied or copied == n < found.count:
            return sound, MissReason.OVERWRITTEN
        return sound, MissReason.UNAVAILABLE if copied < n else MissReason.NOT_STORED

    def _note(self, found: Match, hits: int, lookups: int, cold: int = 0) -> None:
        now = time.monotonic()
        rows = found.rows if hits == found.count else found.rows[:hits].copy()
        began = self._touches.add(rows, lookups=lookups, hits=hits, now=now, cold_hits=cold)
        self._touched(began)

    def _came_upon(self, known: Lookup) -> None:
        """A put has found these there already; none: there is something to report soon."""
        if not len(known.rows) and self._touches.pending:
            return
        now = time.monotonic()
        self._touched(self._touches.add(known.rows, lookups=0, hits=0, now=now))

    def _touched(self, began: bool) -> None:
        """Touches were noted; `began`: they are the first of a batch. Reports what is due."""
        del began
        if self._touches.due(time.monotonic()):
            with contextlib.suppress(Unavailable, DeadlineExceeded):
                self.report_touches(self._timeout_s)

    def _report_before_eviction(self, deadline: Deadline) -> None:
        """What was read must not be what a put evicts because nobody told."""
        touch = self._touches.take()
        if touch is not None:
            self._link.cast(touch, deadline.left_s)


def _leading(holds: npt.NDArray[np.bool_]) -> int:
    """How many leading elements are true."""
    return len(holds) if holds.all() else int(holds.argmin())


def _copy_out_one(memory: Memory, request: GetRequest, found: Match) -> tuple[int, MissReason]:
    """`_copy_out` of one block, by plain numbers: arrays of one cost more than the work."""
    place, stamp = int(found.rows[0, W_PLACE]), int(found.rows[0, W_STAMP])
    granule, generation = place >> 32, stamp & MASK56
    generations = memory.generations
    if int(generations[granule]) != generation:
        return 0, MissReason.OVERWRITTEN
    first = memory.pool_address + granule * limits.GRANULE_BYTES
    start, target = first + request.part.payload_at, int(request.targets[0])
    for at, own, nbytes in request.part.runs:
        copy_rows(np.array([target + own], np.uint64), np.array([start + at], np.uint64), nbytes)
    if int(generations[granule]) != generation:
        return 0, MissReason.OVERWRITTEN
    return 1, MissReason.NOT_STORED


def _copy(
    memory: Memory, request: GetRequest, granules: npt.NDArray[np.int64], end_s: float
) -> int:
    """Copies blocks to their targets in order; returns how many were whole by `end_s`."""
    starts = memory.payload_addresses(request.namespace.layout, granules)
    if not len(starts):
        return 0
    targets = request.targets[: len(starts)]
    runs = [(own, at, nbytes) for at, own, nbytes in request.part.runs]
    return copy_in_parallel(targets, starts, runs, end_s)


def _leading_sound(memory: Memory, request: GetRequest, there: Lookup) -> int:
    """How many leading copied blocks are what the headers of those blocks say."""
    n, part, n_cells = len(there.rows), request.part, request.namespace.layout.n_cells
    packed = copied_headers(memory.slot_addresses(there.granules), n_cells)
    headers = read_headers(packed, n_cells)
    said = headers.checksums[:, part.cells] if len(part.cells) else headers.checksums
    found = np.empty_like(said)

    def check(first: int, end: int) -> None:
        found[first:end] = part.own_sums(request.targets[first:end])

    in_parallel(check, groups_of(n, part.nbytes), part.nbytes * n, math.inf)
    sound = headers.sound & (headers.fields["key"] == request.chain[:n]).all(axis=1)
    # The same key in another namespace has other bytes.
    sound &= headers.fields["namespace"] == there.rows[:, W_SPACE] >> np.uint64(32)
    return _leading(sound & (found == said).all(axis=1))
