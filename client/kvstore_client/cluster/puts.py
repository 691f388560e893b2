"""How blocks that are put get from the caller's buffers to where nodes read them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.cluster import messages as m
from kvstore.cluster.contacts import ClusterSpace
from kvstore.cluster.puts import PutOutcome, Puts
from kvstore.cluster.router import Router
from kvstore.errors import DeadlineExceeded, InvalidArgument, Unavailable
from kvstore.pieces import growing
from kvstore.session.base import PutResult
from kvstore.session.control import Deadline
from kvstore.session.copies import groups_of, in_parallel
from kvstore.session.parts import ALL_CELLS
from kvstore.session.requests import PutRequest
from kvstore_client.cluster.loop import SLACK_S, LoopThread
from kvstore_client.cluster.memory import LandingRing

_SLOTS = 8  # of the arena: while nodes read from some of them, the next one is filled

# Makes blocks [first, last) readable for nodes, in a slot; their addresses and checksums.
Show = Callable[[int, int, int], tuple[c.U64, c.U64]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PutPlan:
    """One put. places: uint64 (n,). copies: for how many nodes it waits."""

    space: ClusterSpace
    request: PutRequest
    places: c.U64
    copies: int
    persist: bool
    deadline: Deadline


class Putter:
    """Puts of one client. Blocks that lie in its registered memory are read where they lie; others
    are copied into the arena first, by one put at a time."""

    def __init__(self, router: Router, ring: LandingRing, thread: LoopThread) -> None:
        self._router, self._ring, self._thread = router, ring, thread
        self._arena_lock = threading.Lock()

    def put(self, plan: PutPlan) -> PutResult:
        """`InvalidArgument` for a block that the arena cannot hold, or that is not in the buffers
        of a client with a GPU's memory. What nobody took in time is `not_stored`."""
        done: list[PutResult] = []
        request = plan.request
        addresses = np.array(request.addresses, np.uint64)
        in_place = self._ring.registered(addresses, request.part.nbytes)
        if self._ring.on_device and not in_place:
            raise InvalidArgument("sources", "must be of this client's buffers")
        try:
            if in_place:
                self._put_in_place(plan, addresses, done)
            else:
                with self._arena_lock:
                    self._put_through_arena(plan, done)
        except (Unavailable, DeadlineExceeded):
            over = sum(each.stored + each.existed + each.waiting + each.not_stored for each in done)
            left, retry_ms = len(request.chain) - over, 1000
            done.append(
                PutResult(stored=0, existed=0, waiting=0, not_stored=left, retry_after_ms=retry_ms)
            )
        total = done[0]
        for each in done[1:]:
            total += each
        return total

    def _put_in_place(self, plan: PutPlan, addresses: c.U64, done: list[PutResult]) -> None:
        part = plan.request.part

        def show(first: int, last: int, _slot: int) -> tuple[c.U64, c.U64]:
            sums = np.empty((last - first, len(part.cell_runs)), np.uint64)

            shown = addresses[first:last]

            def hash_some(first: int, end: int) -> None:
                sums[first:end] = self._ring.sums(part, shown[first:end])

            if self._ring.on_device:  # on the caller's thread, whose stream has what it wrote there
                hash_some(0, last - first)
            else:
                self._all(hash_some, last - first, plan)
            return shown, sums

        # Each piece is a call, which costs more than what small ones would let go on beside it.
        step, n = max(1, self._router.policy.piece_bytes // part.nbytes), len(addresses)
        self._put_pieces(plan, show, growing(n, least=step, most=step), slots=_SLOTS, done=done)

    def _put_through_arena(self, plan: PutPlan, done: list[PutResult]) -> None:
        part, size = plan.request.part, plan.request.part.nbytes
        fit = self._ring.arena.size // size
        if not fit:
            raise InvalidArgument("arena_bytes", f"a block of {size} bytes does not fit")
        slots = min(_SLOTS, fit)
        step = fit // slots

        def show(first: int, last: int, slot: int) -> tuple[c.U64, c.U64]:
            arena, at, n = self._ring.arena, slot * step * size, last - first
            start = int(arena.__array_interface__["data"][0])
            sources = np.array(plan.request.addresses[first:last], np.uint64)
            targets = (start + at + size * np.arange(n)).astype(np.uint64)
            sums = np.empty((n, len(part.cell_runs)), np.uint64)

            def copy(first: int, end: int) -> None:
                sums[first:end] = part.take_out(sources[first:end], targets[first:end])

            self._all(copy, n, plan)
            return targets, sums

        least = max(1, self._router.policy.least_piece_bytes // size)
        sizes = growing(len(plan.request.chain), least=least, most=step)
        self._put_pieces(plan, show, sizes, slots=slots, done=done)

    def _put_pieces(
        self, plan: PutPlan, show: Show, sizes: list[int], *, slots: int, done: list[PutResult]
    ) -> None:
        """Puts so many blocks at a time, the next ones while nodes read from others."""
        flights: deque[Future[PutOutcome]] = deque()
        try:
            first = 0
            for turn, size in enumerate(sizes):
                if len(flights) == slots:
                    done.append(self._result(plan, flights.popleft()))
                shown = show(first, first + size, turn % slots)
                flights.append(self._begin(plan, first, *shown))
                first += size
            while flights:
                done.append(self._result(plan, flights.popleft()))
        finally:
            for running in flights:
                running.cancel()

    def _all(self, work: Callable[[int, int], None], n: int, plan: PutPlan) -> None:
        nbytes = plan.request.part.nbytes
        groups = groups_of(n, nbytes)
        done = in_parallel(work, groups, n * nbytes, plan.deadline.end_s)
        if done < len(groups):
            raise DeadlineExceeded(f"{groups[done][0]} of {n} blocks were copied in time")

    def _begin(
        self, plan: PutPlan, first: int, addresses: c.U64, sums: c.U64
    ) -> Future[PutOutcome]:
        request, last = plan.request, first + len(addresses)
        cells, whole = request.part.cells, sums.shape[1] == request.namespace.layout.n_cells
        piece = request.cut(first, last)
        puts = Puts(
            hashes=piece.chain,
            addresses=addresses,
            checksums=sums,
            places=plan.places[first:last],
            parent=piece.parent,
            position=piece.position,
            ttl_ms=piece.ttl_ms,
            copies=plan.copies,
            persist=plan.persist,
            cells=ALL_CELLS if whole else cells,
            agreed=b"" if whole else piece.put_id,
        )
        left_ms = 1e3 * max(plan.deadline.left_s - SLACK_S, 1e-3)
        return self._thread.begin(self._router.put(plan.space, puts, left_ms))

    def _result(self, plan: PutPlan, running: Future[PutOutcome]) -> PutResult:
        outcome = self._thread.end(running, plan.deadline.left_s)
        n, status = len(outcome.status), outcome.status
        stored = int(np.count_nonzero(status == m.PutStatus.STORED))
        existed = int(np.count_nonzero(status == m.PutStatus.EXISTS))
        waiting = int(np.count_nonzero(status == m.PutStatus.WAITING))
        left = n - stored - existed - waiting
        return PutResult(
            stored=stored,
            existed=existed,
            waiting=waiting,
            not_stored=left,
            retry_after_ms=limits.RETRY_AFTER_MS if left else 0,
            persisted=int(outcome.persisted.sum()),
            replicated=int(np.count_nonzero(outcome.copies >= plan.copies)),
        )
