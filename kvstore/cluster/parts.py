"""How several clients' cells of the same blocks get into a node's store, each client's by itself:
read, verified, and gathered there, until a block is whole and shown."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore.cluster.intake import NO_POSITION, Arrivals, give_up
from kvstore.cluster.messages import PutStatus
from kvstore.cluster.site import Site, Space
from kvstore.cluster.world import Memory, Seat
from kvstore.errors import KVStoreError, ResourceExhausted
from kvstore.session.parts import part_of
from kvstore.transfer.base import Pieces

Rows = npt.NDArray[np.intp]

_NO_SLOTS = np.empty(0, np.uint32)
_OF_RESERVE = np.array(
    [PutStatus.FAILED, PutStatus.EXISTS, PutStatus.BUSY, PutStatus.NO_SPACE], np.uint8
)
_OF_SEAL = np.array([PutStatus.STORED, PutStatus.WAITING, PutStatus.FAILED], np.uint8)


async def take_part(
    site: Site,
    space: Space,
    memory: Memory,
    arrivals: Arrivals,
    *,
    cells: c.U32,
    timeout_ms: float,
) -> c.U8:
    """Adds some cells (uint32, ascending) to blocks that are not stored yet; `PutStatus` of each,
    uint8 (n,): STORED for those that are whole by it.

    arrivals: addresses of the cells' bytes, one cell after another, and the checksums of these
    cells. Raises as `take_in`. Blocks whose cells did not arrive well are dropped for all who put
    cells of them, as where a rank dies in the middle of its part.
    """
    end_ms = site.world.now_ms() + timeout_ms
    async with site.store.seat(timeout_ms) as seat:
        return await _Part(site, space, seat, arrivals, cells).take(memory, end_ms)


class _Part:
    """One client's cells of some blocks, on their way in.

    `_held` says which blocks are reserved, and neither sealed nor given up.
    """

    def __init__(
        self, site: Site, space: Space, seat: Seat, arrivals: Arrivals, cells: c.U32
    ) -> None:
        self._site, self._space, self._seat = site, space, seat
        self._arrivals, self._cells = arrivals, cells
        self._runs = list(_of_one_put(arrivals))
        n = len(arrivals.hashes)
        self._status = np.full(n, PutStatus.NO_SPACE, np.uint8)
        self._granules = np.zeros(n, np.uint32)
        self._held = np.zeros(n, bool)

    async def take(self, memory: Memory, end_ms: float) -> c.U8:
        """See `take_part`."""
        try:
            for run in self._runs:
                await self._reserve(run)
            rows = np.flatnonzero(self._held)
            if len(rows):
                await self._read(memory, rows, end_ms)
                await self._seal(rows)
        except KVStoreError:
            with contextlib.suppress(KVStoreError):  # then the connection is over, and all with it
                await self._abort(self._held)
            raise
        return self._status

    async def _reserve(self, run: slice) -> None:
        arrivals, first = self._arrivals, run.start
        known = arrivals.positions[first] != NO_POSITION
        parent = arrivals.parents[first].tobytes() if arrivals.parents[first].any() else b""
        reserve = c.Reserve(
            namespace=self._space.number,
            put_id=arrivals.put_ids[first].tobytes(),
            hashes=arrivals.hashes[run],
            cells=self._cells,
            parent=parent if known else b"",
            position=int(arrivals.positions[first]) if known else -1,
            ttl_ms=int(arrivals.ttl_ms[first]),
        )
        try:
            reserved: c.Reserved = await self._command(reserve)
        except ResourceExhausted:
            return
        self._status[run] = _OF_RESERVE[reserved.status]
        self._granules[run] = reserved.granules
        self._held[run] = reserved.status == c.ReserveStatus.GRANTED

    async def _read(self, memory: Memory, rows: Rows, end_ms: float) -> None:
        """After a failure the memory is closed, and the slots go back once that has ended for
        certain."""
        site, part = self._site, part_of(self._space.layout, self._cells)
        starts = site.store.addresses(self._space.layout, self._granules[rows])
        sources = self._arrivals.addresses[rows]
        runs = np.array(part.runs, np.uint64).reshape(-1, 3)  # in the block, in the part, bytes
        pieces = Pieces(
            local=(starts[:, None] + runs[None, :, 0]).ravel(),
            remote=(sources[:, None] + runs[None, :, 1]).ravel(),
            nbytes=np.tile(runs[:, 2], len(rows)),
        )
        try:
            await memory.read(pieces, max(end_ms - site.world.now_ms(), 1.0))
        except KVStoreError:
            site.counters.failed_transfers += 1
            if not await give_up(site, memory, _NO_SLOTS):
                site.counters.lost_slots += len(rows)
                self._held[:] = False
                await self._seat.lose()
            raise
        site.counters.taken_bytes += len(rows) * part.nbytes

    async def _seal(self, rows: Rows) -> None:
        site, arrivals = self._site, self._arrivals
        sums = await site.store.sums(self._space.layout, self._granules[rows], self._cells)
        sound = (sums == arrivals.checksums[rows]).all(axis=1)
        site.counters.corrupted += int(np.count_nonzero(~sound))
        damaged = np.zeros_like(self._held)
        damaged[rows[~sound]] = True
        await self._abort(damaged)
        for run in self._runs:
            own = np.arange(run.start, run.stop)[self._held[run]]
            if not len(own):
                continue
            seal = c.Seal(
                namespace=self._space.number,
                put_id=arrivals.put_ids[own[0]].tobytes(),
                hashes=np.ascontiguousarray(arrivals.hashes[own]),
                checksums=np.ascontiguousarray(arrivals.checksums[own]),
            )
            sealed: c.Sealed = await self._command(seal)
            self._held[own] = False
            self._status[own] = _OF_SEAL[sealed.status]
        site.counters.taken_blocks += int(np.count_nonzero(self._status == PutStatus.STORED))

    async def _abort(self, which: npt.NDArray[np.bool_]) -> None:
        """Gives blocks up that are held, for all who put cells of them."""
        for run in self._runs:
            own = np.arange(run.start, run.stop)[which[run]]
            if not len(own):
                continue
            abort = c.Abort(
                namespace=self._space.number,
                put_id=self._arrivals.put_ids[own[0]].tobytes(),
                hashes=np.ascontiguousarray(self._arrivals.hashes[own]),
            )
            await self._command(abort)
            self._held[own] = False

    async def _command(self, command: c.Command) -> Any:
        return await self._seat.command(command, self._site.policy.call_ms)


def _of_one_put(arrivals: Arrivals) -> Iterator[slice]:
    """Blocks that one command can name: of one put id, that follow each other in a chain, or have
    none."""
    n = len(arrivals.hashes)
    if not n:
        return
    before, after = arrivals.positions[:-1], arrivals.positions[1:]
    chained = (after != NO_POSITION) & (after == before + np.uint32(1))
    chained &= (arrivals.parents[1:] == arrivals.hashes[:-1]).all(axis=1)
    alone = (before == NO_POSITION) & (after == NO_POSITION)
    same = (arrivals.put_ids[1:] == arrivals.put_ids[:-1]).all(axis=1)
    edges = np.flatnonzero(~((chained | alone) & same)) + 1
    bounds = [0, *edges.tolist(), n]
    for start, end in itertools.pairwise(bounds):
        yield slice(start, end)
