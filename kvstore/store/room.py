"""Room for new blocks: slots of the pool, and what is evicted for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.eviction import EvictionPolicy
from kvstore.store.blocks import Blocks, BlockState, Granules, IdArray
from kvstore.store.deadlines import Deadlines, Due
from kvstore.tiers.slab import SlabAllocator

BoolArray = npt.NDArray[np.bool_]
_NO_SLABS: BoolArray = np.zeros(0, np.bool_)
_ROUNDS = 16  # looks at the policy for one allocation, where what it offers is in use


class Room:
    """Slots for blocks of any size. Never evicts what is leased, pinned, or a chain's middle that
    would be gone.

    Memory moves between sizes by whole slabs: a block of another size is evicted only where its
    slab can be emptied and a slot of the wanted size fits then. All of that slab goes, even the
    middles of chains; no more slabs than are needed.
    """

    def __init__(
        self,
        pool_bytes: int,
        blocks: Blocks,
        policy: EvictionPolicy,
        deadlines: Deadlines,
        *,
        elsewhere: Callable[[IdArray], BoolArray],
    ) -> None:
        """elsewhere: which blocks can still be had when they are evicted, so that chains hold."""
        self.slabs = SlabAllocator(pool_bytes)
        self._blocks, self._policy, self._deadlines = blocks, policy, deadlines
        self._elsewhere = elsewhere

    def allocate(
        self, slot_bytes: int, n: int, *, evict: Callable[[IdArray], None], ids: bool = True
    ) -> Granules:
        """Up to `n` slots, with as many free block ids, unless `ids` says that none are needed.

        evict: takes live blocks out of memory.
        """
        n = min(n, self._blocks.state.size)
        wanted = self.slabs.slot_granules(slot_bytes)
        parts = [self.slabs.alloc(slot_bytes, n)]
        full = min(len(parts[0]), self._free_ids(ids, n)) < n
        # Once for all rounds: eviction makes nothing that could be emptied stuck.
        emptiable = self._emptiable_slabs(wanted) if full else _NO_SLABS
        for may_go in (self._may_go_gladly, self._may_go):
            for _ in range(_ROUNDS):
                have = sum(len(part) for part in parts)
                short = max(n - have, n - self._free_ids(ids, n))
                if short <= 0:
                    break
                victims = self._victims(wanted, short, may_go, emptiable)
                if len(victims):
                    evict(victims)
                    parts.append(self.slabs.alloc(slot_bytes, n - have))
                elif len(self._policy) < limits.MIN_SCAN // 4:
                    break  # all of them were looked at: a policy's queues share what it may scan
        granules = np.concatenate(parts)
        usable = min(n, self._free_ids(ids, n))
        if len(granules) > usable:
            self.slabs.free(granules[usable:])
        return granules[:usable]

    def _free_ids(self, needed: bool, n: int) -> int:
        return self._blocks.n_free if needed else n

    def _may_go_gladly(self, ids: IdArray) -> BoolArray:
        """Also not wanted again soon."""
        free: BoolArray = self._may_go(ids) & ~self._deadlines.has(Due.TURN, ids)
        return free

    def _may_go(self, ids: IdArray) -> BoolArray:
        free: BoolArray = (self._blocks.leases[ids] == 0) & ~self._deadlines.has(Due.PIN, ids)
        return free

    def _victims(
        self,
        wanted: int,
        n: int,
        may_go: Callable[[IdArray], BoolArray],
        emptiable: BoolArray,
    ) -> IdArray:
        """Blocks, no longer in the policy, whose going gives up to `n` slots of `wanted`."""

        def gives_room(ids: IdArray) -> BoolArray:
            slabs = self.slabs.slabs_of(self._blocks.granule[ids])
            own = self.slabs.slot_sizes(slabs) == wanted
            free = may_go(ids) & (own | emptiable[slabs])
            goes: BoolArray = self._blocks.tails(ids, free) | (free & self._elsewhere(ids))
            return goes

        victims = self._policy.victims(n, gives_room)
        slabs = self.slabs.slabs_of(self._blocks.granule[victims])
        foreign = self.slabs.slot_sizes(slabs) != wanted
        if not foreign.any():
            return victims
        _, first = np.unique(slabs, return_index=True)
        gain = np.zeros(len(victims), np.int64)  # granules; a slab's with the first of its victims
        gain[first] = self.slabs.slab_sizes(slabs[first])
        gain[~foreign] = wanted
        needed = int(np.searchsorted(np.cumsum(gain), n * wanted)) + 1
        return self._with_slabs(victims[:needed], foreign[:needed], spare=victims[needed:])

    def _with_slabs(self, victims: IdArray, foreign: BoolArray, *, spare: IdArray) -> IdArray:
        """Adds what shares a slab with the foreign victims; of `spare` the others stay."""
        granules = self._blocks.granule[victims[foreign]]
        _, first = np.unique(self.slabs.slabs_of(granules), return_index=True)
        mates = [
            self._blocks.at(self.slabs.slab_slots(int(granule))) for granule in granules[first]
        ]
        everyone: IdArray = np.unique(np.concatenate([victims, *mates]))
        self._policy.forget(everyone)
        self._policy.spare(spare[~np.isin(spare, everyone)])
        return everyone

    def _emptiable_slabs(self, wanted: int) -> BoolArray:
        """By slab: whether all of it can go, and that makes room for a slot of `wanted`."""
        stuck = np.zeros(self.slabs.n_units, np.bool_)
        if self.slabs.is_alone(wanted):
            return stuck
        blocks = self._blocks
        held = (blocks.leases > 0) | (self._deadlines.times[Due.PIN] > 0)
        held |= blocks.state == BlockState.PENDING
        stuck[self.slabs.slabs_of(blocks.granule[held])] = True
        return self.slabs.would_hold(wanted, stuck)
