"""What the store knows of each block: arrays by block id, where a million blocks are rows."""

from __future__ import annotations

import enum

import numpy as np
import numpy.typing as npt
from numba import types

from kvstore.compiled import compiled

IdArray = npt.NDArray[np.uint32]
Granules = npt.NDArray[np.uint32]
NO_BLOCK = np.uint32(0xFFFFFFFF)
NO_GRANULE = np.uint32(0xFFFFFFFF)  # of a block without a slot
_PUT_ID_BYTES = 16


class BlockState(enum.IntEnum):
    """Where a block id is in its life."""

    FREE = 0
    PENDING = 1  # reserved: its slot is being written
    LIVE = 2  # in the index
    DOOMED = 3  # out of the index, but leased: its slot comes back with the last lease
    COLD = 4  # in the index, but only on NVMe: it has no slot
    COMING = 5  # as COLD, and a slot is being filled from there


_LIVE = int(BlockState.LIVE)
_IN_INDEX = np.isin(
    np.arange(len(BlockState)), (BlockState.LIVE, BlockState.COLD, BlockState.COMING)
)  # by state


def _show(
    ids: IdArray,
    namespace: int,
    state: npt.NDArray[np.uint8],
    namespaces: npt.NDArray[np.uint32],
    children: npt.NDArray[np.uint32],
    parents: IdArray,
    granule: Granules,
    at_granule: IdArray,
) -> None:
    for block in ids:
        state[block] = _LIVE
        namespaces[block] = namespace
        children[block] = 0
        parents[block] = NO_BLOCK
        if granule[block] != NO_GRANULE:
            at_granule[granule[block]] = block


def _join(
    ids: IdArray,
    theirs: IdArray,
    parents: IdArray,
    births: npt.NDArray[np.uint32],
    birth: npt.NDArray[np.uint32],
    children: npt.NDArray[np.uint32],
) -> None:
    for i in range(len(ids)):
        parents[ids[i]] = theirs[i]
        births[ids[i]] = birth[theirs[i]]
        children[theirs[i]] += np.uint32(1)


_IDS, _READ_IDS = types.uint32[::1], types.Array(types.uint32, 1, "C", readonly=True)
_appear = compiled(
    types.void(_READ_IDS, types.uint32, types.uint8[::1], _IDS, _IDS, _IDS, _READ_IDS, _IDS), _show
)
_link = compiled(types.void(_READ_IDS, _READ_IDS, _IDS, _IDS, _READ_IDS, _IDS), _join)


class Blocks:
    """Ids from 0 to `max_blocks`, their slots, chains and leases. Decides nothing.

    A child knows its parent by id and birth, so that a parent's going needs no visit to its
    children: a link to an earlier life of an id counts for nothing. `children` counts those in
    memory.
    """

    def __init__(self, max_blocks: int, granules: int) -> None:
        self.state = np.zeros(max_blocks, np.uint8)
        self.granule = np.zeros(max_blocks, np.uint32)
        self.namespace = np.zeros(max_blocks, np.uint32)
        self.children = np.zeros(max_blocks, np.uint32)
        self.leases = np.zeros(max_blocks, np.uint32)
        self._parent = np.full(max_blocks, NO_BLOCK, np.uint32)
        self._parent_birth = np.zeros(max_blocks, np.uint32)
        self.birth = np.zeros(max_blocks, np.uint32)
        self.put_id = np.zeros((max_blocks, _PUT_ID_BYTES), np.uint8)  # of those in the index
        self._place = np.zeros(max_blocks, np.uint32)  # scratch of `tails`
        self._at_granule = np.full(granules, NO_BLOCK, np.uint32)
        self._free = np.arange(max_blocks - 1, -1, -1, dtype=np.uint32)
        self.n_free = max_blocks

    def take(self, granules: Granules) -> IdArray:
        """Ids for slots that are to be written; at most `n_free` of them."""
        n = len(granules)
        ids = self._free[self.n_free - n : self.n_free][::-1].copy()
        self.n_free -= n
        self.state[ids] = BlockState.PENDING
        self.granule[ids] = granules
        return ids

    def give_back(self, ids: IdArray) -> None:
        """These ids are free again, and their slots are somebody else's business."""
        self.state[ids] = BlockState.FREE
        self.birth[ids] += np.uint32(1)
        self._free[self.n_free : self.n_free + len(ids)] = ids
        self.n_free += len(ids)

    def appear(self, ids: IdArray, namespace: int) -> None:
        """Pending blocks are in the index, under a namespace, from now on."""
        _appear(
            ids,
            namespace,
            self.state,
            self.namespace,
            self.children,
            self._parent,
            self.granule,
            self._at_granule,
        )

    def appear_one(self, block: int, namespace: int, parent: int) -> None:
        """`appear`, and `link` unless the parent is -1, of one block."""
        self.state[block] = BlockState.LIVE
        self.namespace[block] = namespace
        self.children[block] = 0
        self._at_granule[self.granule[block]] = block
        self._parent[block] = NO_BLOCK
        if parent >= 0:
            self._parent[block] = parent
            self._parent_birth[block] = self.birth[parent]
            self.children[parent] += 1

    def link(self, children: IdArray, parents: IdArray) -> None:
        """Says which block comes before which live one in a chain."""
        _link(children, parents, self._parent, self._parent_birth, self.birth, self.children)

    def link_cold(self, children: IdArray, parents: IdArray) -> None:
        """Says which block comes before which cold one in a chain."""
        self._parent[children] = parents
        self._parent_birth[children] = self.birth[parents]

    def appear_cold(self, ids: IdArray, namespace: int) -> None:
        """Ids, just taken without slots, are blocks in the index that lie on NVMe."""
        self.appear(ids, namespace)
        self._leave_memory(ids, BlockState.COLD)

    def take_without_slots(self, n: int) -> IdArray:
        """Ids for blocks that will have no slot; at most `n_free` of them."""
        return self.take(np.full(n, NO_GRANULE, np.uint32))

    def go_cold(self, ids: IdArray) -> None:
        """Live blocks (distinct ids, unleased) are only on NVMe from now on."""
        self._uncount(ids)
        self._leave_memory(ids, BlockState.COLD)

    def come(self, ids: IdArray, granules: Granules) -> None:
        """Slots of cold blocks are being filled; they are leased meanwhile."""
        self.state[ids] = BlockState.COMING
        self.granule[ids] = granules
        self.lease(ids)

    def arrive(self, ids: IdArray) -> None:
        """Blocks that were coming are in their slots."""
        self.leases[ids] -= np.uint32(1)
        self.state[ids] = BlockState.LIVE
        self._at_granule[self.granule[ids]] = ids
        parents = self._current_parents(ids)
        np.add.at(self.children, parents, 1)

    def stay_away(self, ids: IdArray) -> None:
        """Blocks that were coming are cold again; their slots are the caller's."""
        self.leases[ids] -= np.uint32(1)
        self.state[ids] = BlockState.COLD
        self.granule[ids] = NO_GRANULE

    def in_index(self, ids: IdArray) -> npt.NDArray[np.bool_]:
        """Which of the ids stand for blocks that can be found."""
        found: npt.NDArray[np.bool_] = _IN_INDEX[self.state[ids]]
        return found

    def vanish(self, ids: IdArray) -> IdArray:
        """Blocks in the index (distinct ids) have left it; returns those that nobody leases.

        The others are doomed; the caller gives the returned ones back.
        """
        live = ids[self.state[ids] == BlockState.LIVE]
        self._uncount(live)
        # Their children's links end with this life: one that is doomed must not get them back.
        self.birth[ids] += np.uint32(1)
        self.children[ids] = 0
        self._at_granule[self.granule[live]] = NO_BLOCK
        leased = self.leases[ids] > 0
        self.state[ids[leased]] = BlockState.DOOMED
        return ids[~leased]

    def tails(self, ids: IdArray, free: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Which of some live blocks (distinct ids) may go in this order, of those that are `free`.

        bool (n,): those without children, or whose children all go before them.
        """
        n = len(ids)
        self._place[ids] = np.arange(n, dtype=np.uint32)
        parents = self._parent[ids]
        linked = np.flatnonzero(parents != NO_BLOCK)
        parents = parents[linked]
        linked = linked[self.birth[parents] == self._parent_birth[ids[linked]]]
        at = self._place[self._parent[ids[linked]]].astype(np.int64)
        after = (at < n) & (at > linked)
        after[after] &= ids[at[after]] == self._parent[ids[linked[after]]]
        child, parent = linked[after], at[after]
        up = np.arange(n)
        up[child] = parent
        stays = ~free | (self.children[ids] != np.bincount(parent, minlength=n))
        # What stays keeps all that come before it in its chain: twice as far up in each round.
        for _ in range(n.bit_length()):
            stays[up[stays]] = True
            up = up[up]
        goes: npt.NDArray[np.bool_] = ~stays
        return goes

    def lease(self, ids: IdArray) -> None:
        """One more lease on each live block; an id may come twice."""
        np.add.at(self.leases, ids, 1)

    def release(self, ids: IdArray) -> IdArray:
        """One lease less on each; returns the doomed ones that nobody leases any more."""
        np.subtract.at(self.leases, ids, 1)
        doomed = ids[self.state[ids] == BlockState.DOOMED]
        return np.unique(doomed[self.leases[doomed] == 0]) if len(doomed) else doomed

    def live_in(self, namespace: int) -> IdArray:
        """All blocks of a namespace that can be found."""
        found = _IN_INDEX[self.state] & (self.namespace == namespace)
        return np.flatnonzero(found).astype(np.uint32)

    def page(self, first: int, most: int) -> tuple[IdArray, int]:
        """Blocks in the index among `most` ids from `first` on, and where to go on (0: over)."""
        last = min(first + most, self.state.size)
        ids = np.arange(first, last, dtype=np.uint32)
        return ids[self.in_index(ids)], last if last < self.state.size else 0

    def at(self, granules: Granules) -> IdArray:
        """The live blocks whose slots begin at these granules, `NO_BLOCK` where there is none."""
        return self._at_granule[granules]

    def count(self, state: BlockState) -> int:
        """How many ids are in a state."""
        return int(np.count_nonzero(self.state == state))

    def check(self) -> None:
        """AssertionError unless the arrays agree with each other."""
        free = self._free[: self.n_free]
        assert self.count(BlockState.FREE) == self.n_free == len(np.unique(free))
        assert (self.state[free] == BlockState.FREE).all()
        live = np.flatnonzero(self.state == BlockState.LIVE).astype(np.uint32)
        assert (self.at(self.granule[live]) == live).all()
        assert np.count_nonzero(self._at_granule != NO_BLOCK) == len(live)
        leased = np.flatnonzero(self.leases)
        leasable = (BlockState.LIVE, BlockState.DOOMED, BlockState.COMING)
        assert np.isin(self.state[leased], leasable).all()
        assert (self.leases[self.state == BlockState.DOOMED] > 0).all()
        assert (self.leases[self.state == BlockState.COMING] > 0).all()
        cold = self.state == BlockState.COLD
        assert (self.granule[cold] == NO_GRANULE).all()
        counted = np.zeros_like(self.children)
        np.add.at(counted, self._current_parents(live), 1)
        known = _IN_INDEX[self.state]
        assert (counted[known] == self.children[known]).all(), "children are miscounted"

    def _current_parents(self, ids: IdArray) -> IdArray:
        """The parents of those that have one which is still there."""
        parents = self._parent[ids]
        linked = parents != NO_BLOCK
        parents, births = parents[linked], self._parent_birth[ids[linked]]
        current: IdArray = parents[self.birth[parents] == births]
        return current

    def _uncount(self, live: IdArray) -> None:
        """Their parents have these as children in memory no more."""
        np.subtract.at(self.children, self._current_parents(live), 1)

    def _leave_memory(self, ids: IdArray, state: BlockState) -> None:
        with_slot = ids[self.granule[ids] != NO_GRANULE]
        self._at_granule[self.granule[with_slot]] = NO_BLOCK
        self.state[ids] = state
        self.granule[ids] = NO_GRANULE
