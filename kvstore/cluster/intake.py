"""How blocks get into a node's store from another process's memory: read, verified, then shown."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore.cluster.messages import PutStatus
from kvstore.cluster.site import Site, Space
from kvstore.cluster.world import Memory
from kvstore.errors import KVStoreError, ResourceExhausted
from kvstore.transfer.base import Pieces

NO_POSITION = 0xFFFFFFFF
_OF_COMMIT = np.array(
    [PutStatus.STORED, PutStatus.EXISTS, PutStatus.BUSY, PutStatus.NO_SPACE], np.uint8
)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Arrivals:
    """n blocks of one namespace that are to be read from a process's memory, none twice.

    addresses: uint64 (n,), there. checksums: (n, cells). put_ids: (n, 16). parents: (n, 32), zeros
    where unknown. positions: uint32 (n,), `NO_POSITION` where unknown. ttl_ms: uint64, 0 for ever.
    """

    hashes: c.U8
    addresses: c.U64
    checksums: c.U64
    put_ids: c.U8
    parents: c.U8
    positions: c.U32
    ttl_ms: c.U64

    def rows(self, which: npt.NDArray[np.intp]) -> Arrivals:
        """Some of them."""
        return Arrivals(
            hashes=self.hashes[which],
            addresses=self.addresses[which],
            checksums=self.checksums[which],
            put_ids=self.put_ids[which],
            parents=self.parents[which],
            positions=self.positions[which],
            ttl_ms=self.ttl_ms[which],
        )


async def take_in(
    site: Site, space: Space, memory: Memory, arrivals: Arrivals, timeout_ms: float
) -> c.U8:
    """Stores blocks that are not stored yet; `PutStatus` of each, uint8 (n,).

    Nothing is shown that is not what its checksums say. After a failed transfer the memory is
    closed, and slots go back only once that has ended for certain.
    """
    n = len(arrivals.hashes)
    status = np.full(n, PutStatus.NO_SPACE, np.uint8)
    slots = await _grant(site, space, n)
    if not len(slots):
        return status
    arrivals = arrivals.rows(np.arange(len(slots)))
    size = space.layout.block_bytes
    pieces = Pieces(
        local=site.store.addresses(space.layout, slots),
        remote=arrivals.addresses,
        nbytes=np.full(len(slots), size, np.uint64),
    )
    sums = np.empty_like(arrivals.checksums)
    hashed = 0

    def hash_up_to(end: int) -> None:
        nonlocal hashed
        sums[hashed:end] = site.store.sums_here(space.layout, slots[hashed:end])
        hashed = end

    try:
        await memory.read(pieces, timeout_ms, hash_up_to)
    except KVStoreError:
        site.counters.failed_transfers += 1
        await give_up(site, memory, slots)
        raise
    site.counters.taken_blocks += len(slots)
    site.counters.taken_bytes += len(slots) * size
    try:
        sums[hashed:] = await site.store.sums(space.layout, slots[hashed:])
        sound = (sums == arrivals.checksums).all(axis=1)
        site.counters.corrupted += int(np.count_nonzero(~sound))
        status[: len(slots)] = PutStatus.FAILED
        for run in _runs(arrivals, sound):
            status[run] = await _commit(site, space, arrivals, run, slots)
    finally:
        left = slots[status[: len(slots)] != PutStatus.STORED]
        if len(left):
            await site.store.command(c.GiveBack(granules=left), site.policy.call_ms)
    return status


async def give_up(site: Site, memory: Memory, slots: c.U32) -> bool:
    """Ends a transfer that failed, and gives back the slots that it wrote to; whether it has ended
    for certain."""
    try:
        await memory.close()
    except KVStoreError:
        # Something may still write there: they stay this process's for as long as it lives.
        site.counters.lost_slots += len(slots)
        return False
    if len(slots):
        await site.store.command(c.GiveBack(granules=slots), site.policy.call_ms)
    return True


async def _grant(site: Site, space: Space, n: int) -> c.U32:
    try:
        command = c.Grant(namespace=space.number, blocks=n)
        granted: c.Granted = await site.store.command(command, site.policy.call_ms)
    except ResourceExhausted:
        return np.empty(0, np.uint32)
    return granted.granules


async def _commit(site: Site, space: Space, arrivals: Arrivals, run: slice, slots: c.U32) -> c.U8:
    first = run.start
    known = arrivals.positions[first] != NO_POSITION
    parent = arrivals.parents[first].tobytes() if arrivals.parents[first].any() else b""
    commit = c.Commit(
        namespace=space.number,
        put_id=arrivals.put_ids[run].tobytes(),
        hashes=arrivals.hashes[run],
        granules=slots[run],
        checksums=arrivals.checksums[run],
        parent=parent if known else b"",
        position=int(arrivals.positions[first]) if known else -1,
        ttl_ms=int(arrivals.ttl_ms[first]),
    )
    committed: c.Committed = await site.store.command(commit, site.policy.call_ms)
    return _OF_COMMIT[committed.status]


def _runs(arrivals: Arrivals, sound: npt.NDArray[np.bool_]) -> Iterator[slice]:
    """Sound blocks that one commit can name: that follow each other in a chain, or have none."""
    n = len(sound)
    follows = np.zeros(n, bool)
    if n > 1:
        before, after = arrivals.positions[:-1], arrivals.positions[1:]
        chained = (after != NO_POSITION) & (after == before + np.uint32(1))
        chained &= (arrivals.parents[1:] == arrivals.hashes[:-1]).all(axis=1)
        alone = (before == NO_POSITION) & (after == NO_POSITION)
        same_end = arrivals.ttl_ms[1:] == arrivals.ttl_ms[:-1]
        follows[1:] = (chained | alone) & same_end & sound[1:] & sound[:-1]
    starts = np.flatnonzero(sound & ~follows)
    ends = np.flatnonzero(sound & ~np.append(follows[1:], False)) + 1
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        yield slice(start, end)
