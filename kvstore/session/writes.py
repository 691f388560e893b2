"""Puts of whole blocks over mapped memory, in slots that were granted ahead: one call each.

Ours: which slots are written when. A slot is written only between its grant and the call that
shows its block; after a failure it is written again only where that call was never sent or was
refused, which is why slots outlive no connection.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.errors import (
    DeadlineExceeded,
    KVStoreError,
    ResourceExhausted,
    StaleNamespace,
    Unavailable,
)
from kvstore.index.reader import Lookup
from kvstore.session.base import PutResult
from kvstore.session.control import Deadline
from kvstore.session.copies import ALONE_BYTES
from kvstore.session.link import Link, Memory, copy_all_in
from kvstore.session.parts import slot_granules
from kvstore.session.requests import PutRequest

# After these a commit has shown nothing, or its connection is over. What else a store may answer it
# should not; then nobody writes to the slots any more.
_UNCHANGED = (StaleNamespace, DeadlineExceeded, Unavailable)
_FEWEST_AHEAD = 8  # slots to ask for ahead, so that small puts seldom ask


class SlotStock:
    """Empty slots of one connection that no put is writing; thread-safe. The store knows them too.

    By size in granules; each slot is its first granule.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[int, list[int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def count(self, size: int) -> int:
        """How many there are."""
        return len(self._slots.get(size, ()))

    def take(self, size: int, n: int) -> list[int]:
        """Up to n slots."""
        with self._lock:
            slots = self._slots.get(size, [])
            keep = max(0, len(slots) - n)
            taken = slots[keep:]
            del slots[keep:]
            return taken

    def put(self, size: int, slots: Sequence[int]) -> None:
        """Slots that nobody writes."""
        with self._lock:
            self._slots.setdefault(size, []).extend(slots)

    def take_all(self) -> list[int]:
        """Every slot, of any size."""
        with self._lock:
            taken = [slot for slots in self._slots.values() for slot in slots]
            self._slots.clear()
            return taken


class Writer:
    """The puts of one connection.

    ahead: whether to hold empty slots for later puts, which saves them a call.
    """

    def __init__(self, link: Link, *, ahead: bool) -> None:
        self._link, self._ahead = link, ahead
        self.stock = SlotStock()

    def put(
        self,
        put: PutRequest,
        number: int,
        deadline: Deadline,
        *,
        before: Callable[[], None],
        note: Callable[[Lookup], None],
    ) -> PutResult:
        """Stores whole blocks in the namespace `number`; one call, and one more where the stock is
        too small. before: called where the store may have to evict for this, or for the next
        put, before it does. note: is told of blocks that are stored already.

        `ResourceExhausted` where there is no room for any of them, `StaleNamespace`.
        """
        memory, n = self._link.memory(deadline.left_s), len(put.chain)
        there = memory.index.lookup(number, put.chain)
        found = there.found
        absent = np.arange(n) if not found.any() else np.flatnonzero(~found)
        if len(absent) < n:
            note(there.only_found())
            if not len(absent):
                return PutResult(stored=0, existed=n, waiting=0, not_stored=0)
        size = slot_granules(put.namespace.layout)
        spare = self.stock.count(size) - len(absent)
        # While much is copied the store can hear of it; a little is copied before it would wake.
        with_commit = 0 <= spare < len(absent) and len(absent) * put.part.nbytes <= ALONE_BYTES
        if spare < (len(absent) if self._ahead else 0) and not with_commit:
            before()
        slots = self._slots(size, number, len(absent), deadline)
        try:
            commit = self._written(
                put, number, memory, absent=absent, slots=slots, deadline=deadline
            )
            if with_commit and commit.more:
                before()
            committed = self._link.call(commit, deadline.left_s)
            assert isinstance(committed, c.Committed)
        except BaseException as error:
            if not isinstance(error, KVStoreError) or isinstance(error, _UNCHANGED):
                self.stock.put(size, slots)
            raise
        status = committed.status
        shown = status[absent[: len(slots)] - absent[0]] == c.CommitStatus.STORED
        left = [slots[i] for i in np.flatnonzero(~shown).tolist()]
        self.stock.put(size, left + committed.granules.tolist())
        stored = len(slots) - len(left)
        existed = n - len(status) + int(np.count_nonzero(status == c.CommitStatus.EXISTS))
        return PutResult(
            stored=stored,
            existed=existed,
            waiting=0,
            not_stored=n - stored - existed,
            retry_after_ms=limits.RETRY_AFTER_MS
            if (status == c.CommitStatus.NO_SPACE).any()
            else 0,
        )

    def _slots(self, size: int, number: int, n: int, deadline: Deadline) -> list[int]:
        """Slots for n blocks, fewer where the pool is full; `ResourceExhausted` for none."""
        slots = self.stock.take(size, n)
        if len(slots) == n:
            return slots
        try:
            asked = c.Grant(namespace=number, blocks=n - len(slots))
            granted = self._link.call(asked, deadline.left_s)
        except ResourceExhausted:
            if not slots:
                raise
            return slots
        except BaseException:
            self.stock.put(size, slots)
            raise
        assert isinstance(granted, c.Granted)
        slots += granted.granules.tolist()
        return slots

    def _written(
        self,
        put: PutRequest,
        number: int,
        memory: Memory,
        *,
        absent: npt.NDArray[np.intp],
        slots: list[int],
        deadline: Deadline,
    ) -> c.Commit:
        """Writes the first of the absent blocks, as many as there are slots; what shows them.

        The answer is about the blocks from the first absent one on.
        """
        layout, first = put.namespace.layout, int(absent[0])
        hashes, written = put.chain[first:], absent[: len(slots)]
        granules = np.array(slots, np.uint32)
        sums = copy_all_in(
            memory,
            layout,
            put.part,
            sources=put.addresses[written],
            slots=granules,
            end_s=deadline.end_s,
        )
        if len(slots) < len(hashes):
            granules, sums = _spread(written - first, len(hashes), granules, sums)
        more = self._wanted(slot_granules(layout), len(slots))
        return c.Commit(
            namespace=number,
            put_id=put.put_id,
            hashes=hashes,
            granules=granules,
            checksums=sums,
            parent=put.chain[first - 1].tobytes() if first else put.parent,
            position=put.position + first if put.position >= 0 else -1,
            ttl_ms=put.ttl_ms,
            more=more,
        )

    def _wanted(self, size: int, n: int) -> int:
        """How many slots to ask for, so that the next put of n blocks finds them here."""
        if not self._ahead:
            return 0
        left = self.stock.count(size)
        most = limits.MAX_AHEAD_BYTES // (size * limits.GRANULE_BYTES)
        return max(0, min(max(n, _FEWEST_AHEAD), most) - left) if left < n else 0


def _spread(rows: npt.NDArray[np.intp], n: int, slots: c.U32, sums: c.U64) -> tuple[c.U32, c.U64]:
    """The written blocks' slots and checksums at their rows of n; the others have no slot."""
    all_slots = np.full(n, c.NO_SLOT, np.uint32)
    all_sums = np.zeros((n, sums.shape[1]), np.uint64)
    all_slots[rows], all_sums[rows] = slots, sums
    return all_slots, all_sums
