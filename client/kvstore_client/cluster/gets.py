"""How blocks that are got come from where nodes write them to where the caller reads them."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore.block import header_bytes, read_headers
from kvstore.cluster.contacts import ClusterSpace
from kvstore.cluster.gets import Accept, Keep
from kvstore.cluster.router import Router
from kvstore.layout import Layout
from kvstore.session.base import Bytes1D
from kvstore.session.control import Deadline
from kvstore.session.copies import groups_of, in_parallel
from kvstore.session.parts import Part
from kvstore_client.cluster.landing import Landings
from kvstore_client.cluster.loop import SLACK_S, LoopThread
from kvstore_client.cluster.memory import LandingRing, RingView

_NOTHING: Bytes1D = np.empty(0, np.uint8)
_CHECK_S = 60.0
_CHECK_HERE_BYTES = 1 << 20  # takes less than it takes to wake another thread
# Takes rows that have landed at addresses; their cells' checksums, uint64 (k, cells).
Arrive = Callable[[npt.NDArray[np.intp], c.U64], c.U64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GetPlan:
    """One get. chain: uint8 (n, 32). places: uint64 (n,). part: the cells of each block."""

    space: ClusterSpace
    chain: c.U8
    places: c.U64
    part: Part
    deadline: Deadline


class Getter:
    """Gets of one client. early: whether what has landed is believed before the node has answered:
    only where no transport writes it once more."""

    def __init__(
        self, router: Router, ring: LandingRing, thread: LoopThread, *, early: bool
    ) -> None:
        self._router, self._ring, self._thread, self._early = router, ring, thread, early
        self._copies = ThreadPoolExecutor(1, "kvstore-landing")

    def into(self, plan: GetPlan, targets: c.U64) -> c.U8:
        """Copies blocks to addresses (n,); the tiers of the leading ones that came, uint8 (k,).
        `Unavailable`, `DeadlineExceeded`."""

        def arrive(rows: npt.NDArray[np.intp], addresses: c.U64) -> c.U64:
            return plan.part.take_out(addresses, targets[rows])

        watch = self._watch(plan, arrive)
        running = self._begin(plan, arrive, watch)
        self._follow(running, plan, watch)
        return self._end(running, plan)

    def land(self, plan: GetPlan, view: RingView) -> None:
        """Gets blocks to stay where they land; the leading ones that came are the view's. Raises
        as `into`. Nobody waits for the nodes' answers where all blocks are there and sound: the
        parts of the ring, which the nodes have until then, are the view's one by one as they
        come."""
        landed = np.zeros(len(plan.chain), np.uint64)
        blocks: list[Bytes1D] = [_NOTHING] * len(plan.chain)
        nbytes = plan.part.nbytes

        def arrive(rows: npt.NDArray[np.intp], addresses: c.U64) -> c.U64:
            landed[rows] = addresses
            for row, address in zip(rows.tolist(), addresses.tolist(), strict=True):
                blocks[row] = self._ring.row(address, nbytes, writable=False)
            return self._ring.sums(plan.part, addresses)

        watch = self._watch(plan, arrive)
        running = self._begin(plan, arrive, watch, view.keep)
        self._follow(running, plan, watch)
        if watch and watch.complete:
            count = len(landed)
            self._ring.sweep()
        else:
            count = len(self._end(running, plan))
            view.keep_only(landed[:count] - np.uint64(watch.head if watch else 0))
        view.blocks = blocks[:count]

    def close(self) -> None:
        """Nothing is got any more."""
        self._copies.shutdown()

    def _watch(self, plan: GetPlan, arrive: Arrive) -> Landings | None:
        part, n = plan.part, len(plan.chain)
        if not self._early or not Landings.worth_it(n, part.nbytes, part.payload_at):
            return None

        def verify(
            rows: npt.NDArray[np.intp], addresses: c.U64, headers: c.U8
        ) -> npt.NDArray[np.bool_]:
            said, sound = _said(headers, plan.chain[rows], plan.space.layout, part)
            here = np.flatnonzero(sound)
            if len(here):
                sound[here] = (arrive(rows[here], addresses[here]) == said[here]).all(axis=1)
            return sound

        return Landings(self._ring, n, part.nbytes, head=part.payload_at, verify=verify)

    def _begin(
        self, plan: GetPlan, arrive: Arrive, watch: Landings | None, keep: Keep | None = None
    ) -> Future[c.U8]:
        return self._thread.begin(
            self._router.get(
                plan.space,
                plan.chain,
                plan.places,
                cells=plan.part.cells,
                nbytes=plan.part.nbytes,
                accept=self._accepting(plan, arrive),
                keep=keep,
                watch=watch,
                leading=True,
                timeout_ms=1e3 * max(plan.deadline.left_s - SLACK_S, 1e-3),
            )
        )

    @staticmethod
    def _follow(running: Future[c.U8], plan: GetPlan, watch: Landings | None) -> None:
        try:
            if watch:
                watch.follow(running.done, time.monotonic() + plan.deadline.left_s)
        except BaseException:
            running.cancel()  # after Ctrl-C nobody takes what comes of it
            raise

    def _end(self, running: Future[c.U8], plan: GetPlan) -> c.U8:
        """The tiers of the leading blocks that came."""
        try:
            tiers = self._thread.end(running, plan.deadline.left_s)
        finally:
            self._ring.sweep()
        return tiers if tiers.all() else tiers[: int(tiers.argmin())]

    def _accepting(self, plan: GetPlan, arrive: Arrive) -> Accept:
        """Says which blocks are sound, of `arrive`'s checksums of rows that landed at addresses.
        Where it copies, they are the copies': whatever lands later cannot change what was
        checked."""
        part = plan.part

        def check(
            rows: npt.NDArray[np.intp], addresses: c.U64, headers: c.U8
        ) -> npt.NDArray[np.bool_]:
            said, sound = _said(headers, plan.chain[rows], plan.space.layout, part)

            def check_some(first: int, end: int) -> None:
                found = arrive(rows[first:end], addresses[first:end])
                sound[first:end] &= (found == said[first:end]).all(axis=1)

            n = len(rows)
            groups = [(0, n)] if self._ring.on_device else groups_of(n, part.nbytes)
            end_s = time.monotonic() + _CHECK_S
            done = in_parallel(check_some, groups, part.nbytes * len(rows), end_s)
            for first, end in groups[done:]:
                sound[first:end] = False
            return sound

        async def accept(
            rows: npt.NDArray[np.intp], addresses: c.U64, headers: c.U8
        ) -> npt.NDArray[np.bool_]:
            if len(rows) * part.nbytes <= _CHECK_HERE_BYTES:
                return check(rows, addresses, headers)
            loop = self._thread.loop
            return await loop.run_in_executor(self._copies, check, rows, addresses, headers)

        return accept


def _said(
    headers: c.U8, chain: c.U8, layout: Layout, part: Part
) -> tuple[c.U64, npt.NDArray[np.bool_]]:
    """What headers (n, bytes) say the checksums of the part's cells are, and which of them are
    sound headers of the chain's blocks."""
    if headers.shape[1:] != (header_bytes(layout.n_cells),):
        return np.zeros((len(chain), len(part.cell_runs)), np.uint64), np.zeros(len(chain), bool)
    read = read_headers(np.ascontiguousarray(headers), layout.n_cells)
    sound = read.sound & (read.fields["key"] == chain).all(axis=1)
    return read.checksums[:, part.cells] if len(part.cells) else read.checksums, sound
