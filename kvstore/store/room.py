"""Room for new blocks: slots of the pool, and what is evicted for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.eviction import EvictionPolicy
from kvstore.store.blocks import NO_BLOCK, Blocks, BlockState, Granules, IdArray
from kvstore.store.deadlines import Deadlines, Due
from kvstore.tiers.slab import SlabAllocator

BoolArray = npt.NDArray[np.bool_]
_ROUNDS = 16  # looks at the policy for one allocation, where what it offers is in use


class Room:
    """Slots for blocks of any size. Never evicts what is leased, pinned, or a chain's middle.

    Memory moves between sizes by whole slabs: a block of another size is evicted only where its
    slab can be emptied, and then all of that slab goes.
    """

    def __init__(
        self, pool_bytes: int, blocks: Blocks, policy: EvictionPolicy, deadlines: Deadlines
    ) -> None:
        self.slabs = SlabAllocator(pool_bytes)
        self._blocks, self._policy, self._deadlines = blocks, policy, deadlines

    def allocate(self, slot_bytes: int, n: int, *, evict: Callable[[IdArray], None]) -> Granules:
        """Up to `n` slots, with as many free block ids. evict: forgets live blocks."""
        n = min(n, self._blocks.state.size)
        parts = [self.slabs.alloc(slot_bytes, n)]
        for may_go in (self._may_go_gladly, self._may_go):
            for _ in range(_ROUNDS):
                have = sum(len(part) for part in parts)
                short = max(n - have, n - self._blocks.n_free)
                if short <= 0:
                    break
                victims = self._victims(slot_bytes, short, may_go)
                if len(victims):
                    evict(victims)
                    parts.append(self.slabs.alloc(slot_bytes, n - have))
                elif len(self._policy) < limits.MIN_SCAN:
                    break  # all of them were looked at
        granules = np.concatenate(parts)
        usable = min(n, self._blocks.n_free)
        if len(granules) > usable:
            self.slabs.free(granules[usable:])
        return granules[:usable]

    def _may_go_gladly(self, ids: IdArray) -> BoolArray:
        """Also not wanted again soon."""
        free: BoolArray = self._may_go(ids) & ~self._deadlines.has(Due.TURN, ids)
        return free

    def _may_go(self, ids: IdArray) -> BoolArray:
        blocks = self._blocks
        in_use = (blocks.leases[ids] > 0) | (blocks.children[ids] > 0)
        free: BoolArray = ~in_use & ~self._deadlines.has(Due.PIN, ids)
        return free

    def _victims(self, slot_bytes: int, n: int, may_go: Callable[[IdArray], BoolArray]) -> IdArray:
        wanted = self.slabs.slot_granules(slot_bytes)
        if self.slabs.is_alone(wanted):
            return self._policy.victims(n, may_go)
        stuck = self._stuck_slabs()

        def gives_room(ids: IdArray) -> BoolArray:
            slabs = self.slabs.slabs_of(self._blocks.granule[ids])
            own = self.slabs.slot_sizes(slabs) == wanted
            given: BoolArray = may_go(ids) & (own | ~stuck[slabs])
            return given

        return self._with_slabs(self._policy.victims(n, gives_room), wanted)

    def _stuck_slabs(self) -> BoolArray:
        """By slab: whether something in it cannot go."""
        blocks = self._blocks
        held = (blocks.leases > 0) | (self._deadlines.times[Due.PIN] > 0)
        held |= blocks.state == BlockState.PENDING
        stuck = np.zeros(self.slabs.n_units, np.bool_)
        stuck[self.slabs.slabs_of(blocks.granule[held])] = True
        return stuck

    def _with_slabs(self, victims: IdArray, wanted: int) -> IdArray:
        """Adds what shares a slab with victims of another size."""
        granules = self._blocks.granule[victims]
        slabs = self.slabs.slabs_of(granules)
        foreign = self.slabs.slot_sizes(slabs) != wanted
        if not foreign.any():
            return victims
        _, first = np.unique(slabs[foreign], return_index=True)
        mates = [
            self._blocks.at(self.slabs.slab_slots(int(granule)))
            for granule in granules[foreign][first]
        ]
        everyone: IdArray = np.unique(np.concatenate([victims, *mates]))
        everyone = everyone[everyone != NO_BLOCK]
        self._policy.forget(np.setdiff1d(everyone, victims))
        return everyone
