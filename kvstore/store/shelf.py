"""The live blocks of a store: how they leave it, and what keeps them there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.errors import ResourceExhausted
from kvstore.eviction import make_policy
from kvstore.index.format import NVME_TIER
from kvstore.nvme.volume import Volume
from kvstore.store.blocks import NO_GRANULE, Blocks, BlockState, IdArray
from kvstore.store.catalog import Catalog
from kvstore.store.deadlines import Deadlines, Due
from kvstore.store.memory import StoreMemory
from kvstore.store.namespaces import Namespaces
from kvstore.store.places import Places
from kvstore.store.room import Room

_NEVER_AGAIN = (c.ExplainStatus.DROPPED, c.ExplainStatus.CORRUPTED)  # also after a restart


@dataclass(slots=True)
class Counters:
    """What has happened since the start, in blocks."""

    lookups: int = 0
    hits: int = 0
    stored: int = 0
    evicted: int = 0
    dropped: int = 0
    expired: int = 0
    refused: int = 0
    cold_hits: int = 0
    promoted: int = 0
    demoted: int = 0
    corrupted: int = 0


class Slots(NamedTuple):
    """Slots that are nobody's to read, and block ids for them: both uint32 (n,)."""

    granules: npt.NDArray[np.uint32]
    ids: IdArray

    def cut(self, n: int) -> tuple[Slots, Slots]:
        """The first n, and the others."""
        first, others = self.granules[:n], self.granules[n:]
        return Slots(first, self.ids[:n]), Slots(others, self.ids[n:])

    def __add__(self, more: Slots) -> Slots:  # type: ignore[override] # not as a tuple
        both = np.concatenate((self.granules, more.granules))
        return Slots(both, np.concatenate((self.ids, more.ids)))


_NO_SLOTS = Slots(np.empty(0, np.uint32), np.empty(0, np.uint32))


class Shelf:
    """The parts that blocks are kept by, and what is done to several of them at once.

    now_ms: the time as the store was last told it. pinned_bytes: of slots that hints pin.
    """

    def __init__(
        self,
        memory: StoreMemory,
        *,
        secret: bytes,
        instance_id: int,
        max_blocks: int,
        policy: str,
        now_ms: int,
        volumes: Sequence[Volume] = (),
        every: bool = False,
    ) -> None:
        """`InvalidArgument` for a pool, policy, secret or number of blocks out of range."""
        self.memory, self.now_ms = memory, now_ms
        self.pool_bytes = memoryview(memory.pool)  # type: ignore[arg-type] # as `bytes_of` says
        self.policy = make_policy(policy, max_blocks)
        self.blocks = Blocks(max_blocks, memory.generations.size)
        self.deadlines = Deadlines(max_blocks)
        self.places = Places(max_blocks, volumes, every=every)
        self.room = Room(
            memory.pool.size,
            self.blocks,
            self.policy,
            self.deadlines,
            elsewhere=self.places.there,
        )
        self.catalog = Catalog(memory.new_index, instance_id=instance_id, max_blocks=max_blocks)
        self.namespaces = Namespaces(secret)
        self.counters = Counters()
        self.pinned_bytes = 0
        self.ready, self._ready_size = _NO_SLOTS, 0  # taken for who asks next, and their bytes

    def evict(self, ids: IdArray) -> None:
        """Live blocks, which the policy has given up, make room for others: they go on from NVMe
        where they are there, and are forgotten else."""
        self.fall_back(ids)
        there = self.places.there(ids)
        if there.any():
            self._demote(ids[there])
            ids = ids[~there]
        self.counters.evicted += len(ids)
        self.forget(ids, c.ExplainStatus.EVICTED)

    def fall_back(self, ids: IdArray) -> None:
        """Blocks are about to leave memory, or lost their place: they go on as a second copy, if
        there is one, which another put may have written."""
        for block, copy in self.places.fall_back(ids):
            self.blocks.put_id[block] = copy.entry["put_id"][0]

    def _demote(self, ids: IdArray) -> None:
        granules = self.blocks.granule[ids]
        for kind in (Due.PIN, Due.TURN):
            self.deadlines.clear(kind, ids)
        # The row first: who still has the old one sees the slot's generation move on.
        self.catalog.move(
            ids,
            granules=np.full(len(ids), NO_GRANULE, np.uint32),
            generations=np.zeros(len(ids), np.uint64),
            tier=NVME_TIER,
        )
        self.blocks.go_cold(ids)
        self.free_slots(granules)
        self.counters.demoted += len(ids)

    def lose_cold(self, ids: IdArray, *, forgotten: bool) -> None:
        """Blocks that are only on NVMe can be had no more. forgotten: nor after a restart."""
        self.counters.evicted += len(ids)
        self.places.leave(ids, forgotten=forgotten)
        self.forget(ids, c.ExplainStatus.EVICTED, heirs=not forgotten)

    def make_ids(self, n: int) -> None:
        """Where blocks on NVMe take up all ids, the oldest of them make room for `n` new ones."""
        if self.blocks.n_free >= n or not self.places.volumes:
            return
        for use in self.places.by_age():
            ids = self.places.in_use(use)
            cold = ids[self.blocks.state[ids] == BlockState.COLD]
            # Were they to come back, they would outlive a drop of the same keys, put anew.
            self.lose_cold(cold, forgotten=True)
            if self.blocks.n_free >= n:
                return

    def lose(self, ids: IdArray) -> None:
        """The index has no place for these any more."""
        if len(ids):
            self.policy.forget(ids)
            self.places.leave(ids, forgotten=True)
            self.counters.evicted += len(ids)
            self._vanish(ids, heirs=False)

    def forget(self, ids: IdArray, why: c.ExplainStatus, *, heirs: bool = True) -> None:
        """Takes live blocks, which the policy has forgotten, out of the index and frees them.

        heirs: whether second copies on NVMe may be shown in their place; never of what is dropped.
        """
        owners = self.blocks.namespace[ids]
        for number in np.unique(owners).tolist():
            mine = ids[(owners == number) & self.blocks.in_index(ids)]
            lineage = self.namespaces.get(number).lineage
            self.places.leave(mine, forgotten=why in _NEVER_AGAIN)
            self.lose(self.catalog.remove(mine, lineage, why, self.now_ms))
            self._vanish(mine, heirs=heirs and why is not c.ExplainStatus.DROPPED)

    def _vanish(self, ids: IdArray, *, heirs: bool) -> None:
        """Blocks are out of the index: their slots come back once nobody leases them."""
        pinned = ids[self.deadlines.has(Due.PIN, ids)]
        self.pinned_bytes -= self.slot_bytes(pinned)
        for kind in Due:
            self.deadlines.clear(kind, ids)
        self.places.vanish(ids, heirs_at_ms=self.now_ms if heirs else None)
        for number, count in zip(
            *np.unique(self.blocks.namespace[ids], return_counts=True), strict=True
        ):
            self.namespaces.get(int(number)).blocks -= int(count)
        gone = self.blocks.vanish(ids)
        slotless = self.blocks.granule[gone] == NO_GRANULE
        self.blocks.give_back(gone[slotless])
        self.free(gone[~slotless])

    @property
    def ready_bytes(self) -> int:
        """Of the slots that were got ready."""
        return self._ready_size * len(self.ready.ids)

    def get_ready(self, slot_bytes: int, n: int) -> None:
        """Evicts for up to n slots, and takes them, for whoever asks for such next."""
        slots = self.take_slots(slot_bytes, n)
        self.let_ready_go()
        self.ready, self._ready_size = slots, slot_bytes

    def let_ready_go(self) -> None:
        """Others need room."""
        slots, self.ready = self.ready, _NO_SLOTS
        if len(slots.ids):
            self.free(slots.ids)

    def take_slots(self, slot_bytes: int, n: int) -> Slots:
        """Up to n slots that are about to be written, with ids of pending blocks."""
        taken = _NO_SLOTS
        if slot_bytes == self._ready_size:
            taken, self.ready = self.ready.cut(n)
        missing = n - len(taken.ids)
        if not missing:
            return taken
        granules = self.make_slots(slot_bytes, missing)
        self.memory.generations[granules] += np.uint64(1)  # odd: being written
        made = Slots(granules, self.blocks.take(granules))
        return taken + made if len(taken.ids) else made

    def make_slots(self, slot_bytes: int, n: int, *, ids: bool = True) -> npt.NDArray[np.uint32]:
        """Up to n slots, and as many free ids unless none are needed, for which blocks go that may;
        but first what was got ready for others."""
        self.let_ready_go()
        if ids:
            self.make_ids(n)
        return self.room.allocate(slot_bytes, n, evict=self.evict, ids=ids)

    @contextlib.contextmanager
    def kept(self, ids: IdArray) -> Iterator[None]:
        """Meanwhile those that are live are in use; an id may come twice."""
        ids = self.live(ids)
        self.blocks.lease(ids)
        try:
            yield
        finally:  # the index may have lost some of them meanwhile
            self.free(self.blocks.release(ids))

    def free(self, ids: IdArray) -> None:
        """Nobody writes these slots, and no lease is on them."""
        self.free_slots(self.blocks.granule[ids])
        self.blocks.give_back(ids)

    def free_slots(self, granules: npt.NDArray[np.uint32]) -> None:
        """Nobody writes or leases these slots, and what was in them is somewhere else or gone."""
        # The next even number: a reader in mid-copy sees that its slot was given up.
        self.memory.generations[granules] = (
            self.memory.generations[granules] | np.uint64(1)
        ) + np.uint64(1)
        self.room.slabs.free(granules)

    def slot_bytes(self, ids: IdArray) -> int:
        """Bytes of the pool that these blocks take."""
        slabs = self.room.slabs
        sizes = slabs.slot_sizes(slabs.slabs_of(self.blocks.granule[ids]))
        return int(sizes.sum()) * limits.GRANULE_BYTES

    def drop(self, ids: IdArray) -> c.Count:
        """A user forgets live blocks."""
        self.policy.forget(ids)
        self.forget(ids, c.ExplainStatus.DROPPED)
        self.counters.dropped += len(ids)
        return c.Count(blocks=len(ids))

    def live(self, ids: npt.NDArray[np.integer]) -> IdArray:
        """Those of some ids, -1 for none, that stand for blocks in memory."""
        known = ids[ids >= 0].astype(np.uint32)
        live: IdArray = known[self.blocks.state[known] == BlockState.LIVE]
        return live

    def read(self, ids: IdArray) -> None:
        """Live blocks were read: the turn that somebody expected has come."""
        self.places.read(ids)
        self.policy.touch(ids)
        self.deadlines.clear(Due.TURN, ids)

    def pin(self, ids: IdArray, for_ms: int) -> None:
        """Keeps live blocks for so long, or no longer; `ResourceExhausted` past the share."""
        if for_ms == 0:
            self.pinned_bytes -= self.slot_bytes(ids[self.deadlines.has(Due.PIN, ids)])
            self.deadlines.clear(Due.PIN, ids)
            return
        more = self.slot_bytes(ids[~self.deadlines.has(Due.PIN, ids)])
        most = int(self.room.slabs.total_bytes * limits.MAX_PINNED_SHARE)
        if self.pinned_bytes + more > most:
            raise ResourceExhausted(
                f"{self.pinned_bytes} of at most {most} bytes are pinned, {more} more are asked",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        self.pinned_bytes += more
        self.deadlines.set(Due.PIN, ids, self.now_ms + for_ms)
