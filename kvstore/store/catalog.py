"""What can be found: the index that readers map, its growth, and the memory of what is gone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.commands import U8, U64, ExplainStatus
from kvstore.index.format import capacity_for, index_bytes, key_words
from kvstore.index.table import IndexTable
from kvstore.store.blocks import IdArray
from kvstore.store.history import History

# From so many rows on, and this share of all, making a table anew is quicker than taking rows out
# one by one: that takes about 3 us a row, the other most of its time for fresh pages.
_MANY, _SHARE = 4096, 8
_NONE = np.empty(0, np.uint32)
NewIndex = Callable[[int], npt.NDArray[np.uint8]]


class Catalog:
    """Keys and where their blocks lie. A key is (namespace id, 32-byte hash)."""

    def __init__(self, new_index: NewIndex, *, instance_id: int, max_blocks: int) -> None:
        self._new_index = new_index
        self._max_capacity = capacity_for(max_blocks)
        capacity = capacity_for(min(max_blocks, limits.FIRST_INDEX_BLOCKS))
        self._index = IndexTable.create(
            new_index(index_bytes(capacity)),
            capacity,
            instance_id.to_bytes(8, "little"),
            max_blocks=max_blocks,
        )
        self._history = History()

    @property
    def entries(self) -> int:
        """Blocks that can be found."""
        return self._index.entries

    @property
    def capacity(self) -> int:
        """Rows of the index now."""
        return self._index.view.capacity

    def find(self, namespace: int, hashes: U8) -> npt.NDArray[np.int64]:
        """Block ids int64 (n,) of hashes (n, 32); -1 where missing."""
        return self._index.find(namespace, hashes)

    def make_room(self, n: int) -> IdArray:
        """Lets the index grow where n rows more do not fit; returns ids it has lost by that.

        Losing a block is a legal miss, and takes keys that were chosen to collide.
        """
        wanted = self._index.entries + n
        capacity = self.capacity
        while capacity // 2 < wanted and capacity < self._max_capacity:
            capacity = min(4 * capacity, self._max_capacity)
        lost = self._rebuild(capacity, without=_NONE) if capacity > self.capacity else None
        # Where there is no memory for it, the old one goes on until it is full.
        return _NONE if lost is None else lost

    def insert(
        self,
        hashes: U8,
        *,
        namespace: int,
        length: int,
        tier: int,
        ids: IdArray,
        granules: npt.NDArray[np.uint32],
        generations: U64,
    ) -> npt.NDArray[np.bool_]:
        """Shows blocks to readers; bool (n,): which have found a place."""
        return self._index.insert(
            hashes,
            namespace=namespace,
            lengths=np.full(len(ids), length, np.uint32),
            granules=granules,
            block_ids=ids,
            generations=generations,
            tier=tier,
        )

    def insert_one(
        self,
        key: bytes,
        *,
        namespace: int,
        length: int,
        tier: int,
        block: int,
        granule: int,
        generation: int,
    ) -> bool:
        """`insert` of one block."""
        return self._index.insert_one(
            key,
            namespace=namespace,
            length=length,
            granule=granule,
            block_id=block,
            generation=generation,
            tier=tier,
        )

    def move(
        self, ids: IdArray, *, granules: npt.NDArray[np.uint32], generations: U64, tier: int
    ) -> None:
        """Shows readers where these blocks lie now."""
        self._index.move(ids, granules=granules, generations=generations, tier=tier)

    def words_of(self, ids: IdArray) -> U64:
        """The keys of blocks that can be found, as (n, 4) words."""
        return self._index.words_of(ids)

    def remove(self, ids: IdArray, name: int, why: ExplainStatus, now_ms: int) -> IdArray:
        """Hides blocks that lie under one name, and remembers why.

        Returns ids of others that were lost by the way, see `make_room`.
        """
        self._history.note(self._index.words_of(ids), name, why, now_ms)
        many = len(ids) > max(_MANY, self.entries // _SHARE)
        lost = self._rebuild(self.capacity, without=ids) if many else None
        if lost is not None:
            return lost
        self._index.delete(ids)
        return _NONE

    def recall(self, hashes: U8, name: int) -> tuple[U8, U64]:
        """Why (uint8 `ExplainStatus`, 0 for unknown) and when (ms) keys of a name went."""
        return self._history.recall(key_words(hashes), name)

    def forget_namespaces(self) -> None:
        """Tells readers that ids of namespaces may have become stale."""
        self._index.bump_namespace_epoch()

    def check(self) -> None:
        """Walks the index."""
        self._index.check()

    def _rebuild(self, capacity: int, *, without: IdArray) -> IdArray | None:
        """Returns ids that were lost; None, with nothing changed, where there is no memory."""
        old = self._index
        try:
            buffer = self._new_index(index_bytes(capacity))
        except OSError:
            return None
        self._index, lost = old.rebuilt(buffer, capacity, without=without)
        # Last, so that who sees the flag and asks gets the new one.
        old.retire()
        # Who still looks there would not hear of namespaces that are dropped from now on.
        old.bump_namespace_epoch()
        return lost
