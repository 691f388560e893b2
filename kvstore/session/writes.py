"""Puts of whole blocks over mapped memory, in slots that were granted ahead: a call, or none.

Where there is a board the blocks are posted there, and the store is told of it without waiting for
it; else, and where the board is full, one call shows them.

Ours: which slots are written when. A slot is written only between its grant and the post or the
call that shows its block; after a failure it is written again only where nothing was posted, or
that call was never sent or was refused, which is why slots outlive no connection.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.block import pack_many, write_headers
from kvstore.errors import (
    DeadlineExceeded,
    KVStoreError,
    ResourceExhausted,
    StaleNamespace,
    Unavailable,
)
from kvstore.filling import fill_slot
from kvstore.index.format import ROW_WORDS, W_CHECK, key_words
from kvstore.index.reader import Lookup
from kvstore.session.addresses import PROMISED
from kvstore.session.base import Bytes1D, Hashes, NamespaceHandle, PutResult
from kvstore.session.control import Deadline
from kvstore.session.copies import ALONE_BYTES
from kvstore.session.link import Link, Memory, copy_all_in
from kvstore.session.requests import PUT_ID_BYTES, PutRequest
from kvstore.session.single import POSTED, UNSEEN

# After these a command was never sent, or its connection is over.
_UNSENT = (DeadlineExceeded, Unavailable)
Rows = npt.NDArray[np.intp]
_NOTHING = Lookup(np.empty((0, ROW_WORDS), np.uint64))
_STORED = PutResult(stored=1, existed=0, waiting=0, not_stored=0)
_EXISTED = PutResult(stored=0, existed=1, waiting=0, not_stored=0)
_NO_ROW: Rows = np.arange(0)
_ONE_ROW: Rows = np.arange(1)
_FEWEST_AHEAD = 16  # slots to ask for ahead, so that small puts seldom ask
_MOST_SINGLES = 64  # namespaces
_INDEXED = list, tuple, np.ndarray
_FEW_PROCESSORS = len(os.sched_getaffinity(0)) <= 2
_UNUSED_PUTS = 8  # of other sizes, after which slots of a size are of more use to the store


class SlotStock:
    """Empty slots of one connection that no put is writing; thread-safe. The store knows them too.

    By size in granules; each slot is its first granule.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: dict[int, list[int]] = {}
        self._takes = 0
        self._taken_at: dict[int, int] = {}  # by size: the number of its last `take`

    def __len__(self) -> int:
        return sum(map(len, self._slots.values()))

    def count(self, size: int) -> int:
        """How many there are."""
        return len(self._slots.get(size, ()))

    def take(self, size: int, n: int) -> list[int]:
        """Up to n slots."""
        with self._lock:
            self._takes += 1
            self._taken_at[size] = self._takes
            slots = self._slots.get(size, [])
            keep = max(0, len(slots) - n)
            taken = slots[keep:]
            del slots[keep:]
            return taken

    def take_spare(self, size: int, keep: int) -> int | None:
        """One slot, if so many are left then."""
        with self._lock:
            slots = self._slots.get(size)
            if not slots or len(slots) <= keep:
                return None
            self._takes += 1
            self._taken_at[size] = self._takes
            return slots.pop()

    def put(self, size: int, slots: Sequence[int]) -> None:
        """Slots that nobody writes."""
        with self._lock:
            self._slots.setdefault(size, []).extend(slots)

    def take_unused(self) -> dict[int, list[int]]:
        """By size, every slot of those that none of the last puts was of."""
        with self._lock:
            taken: dict[int, list[int]] = {}
            for size, slots in self._slots.items():
                if slots and self._takes - self._taken_at.get(size, 0) > _UNUSED_PUTS:
                    taken[size] = slots.copy()
                    slots.clear()
            return taken

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
        self._short = False  # whether the store gave less for later than it was asked for
        self.stock = SlotStock()

    def put(
        self,
        put: PutRequest,
        number: int,
        memory: Memory,
        deadline: Deadline,
        *,
        epoch: int,
        before: Callable[[Deadline], None],
        note: Callable[[Lookup], None],
    ) -> PutResult:
        """Stores whole blocks in the namespace `number`; a call or none, and one more where the
        stock is too small. memory: the link's now. epoch: its index's of namespaces, when `number`
        was the right one. before: called where the store may have to evict for this, or for the
        next put, before it does. note: is told of blocks that are stored already, and of none
        where something was posted that the store has yet to be told of.

        `ResourceExhausted` where there is no room for any of them, `StaleNamespace`.
        """
        n = len(put.chain)
        self._link.take_answers(0)
        if n == 1:
            self._prepare(put, number, memory, epoch)
        there = memory.index.lookup(number, put.chain)
        absent = _absent(there)
        if len(absent) < n:
            note(there.only_found())
            if not len(absent):
                return PutResult(stored=0, existed=n, waiting=0, not_stored=0)
        size = put.part.slot_granules
        left = self.stock.count(size) - len(absent)
        in_pieces = put.of > n  # then `ask` has seen to the slots
        more = 0 if in_pieces else self._wanted(size, len(absent), left)
        asks = left < 0 or more > 0
        # While much is copied the store can hear of it; a little is copied before it would wake.
        early = left < 0 or len(absent) * put.part.nbytes > ALONE_BYTES
        if asks and early:
            before(deadline)
        slots = self._slots(size, number, len(absent), deadline)
        try:
            fill = _filled(memory, put, number, rows=absent[: len(slots)], slots=slots, by=deadline)
            if left < 0 and not in_pieces:  # what came of asking may be more than they are, or less
                more = self._wanted(size, len(slots), self.stock.count(size))
            if asks and not early:
                before(deadline)
        except BaseException:
            self.stock.put(size, slots)
            raise
        # Whatever breaks this off, the slots are not written again: the blocks may be shown.
        if len(slots) == len(absent) and fill.post(epoch):
            if more:
                self._have_adopted(number, size, more, deadline)
            else:
                note(_NOTHING)  # soon the next report tells the store
            return PutResult(stored=len(slots), existed=n - len(slots), waiting=0, not_stored=0)
        try:
            committed = self._link.call(fill.commit(absent, more), deadline.left_s)
            assert isinstance(committed, c.Committed)
        except BaseException as error:
            # What else a store may answer it should not; then, and where the store may yet show the
            # blocks or has shown them, nobody writes to the slots any more.
            if isinstance(error, StaleNamespace) or self._was_unsent(error):
                self.stock.put(size, slots)
            raise
        self._short = len(committed.granules) < more
        return self._after(committed, size, slots, absent, n)

    def ask(
        self,
        rest: PutRequest,
        number: int,
        memory: Memory,
        deadline: Deadline,
        *,
        before: Callable[[Deadline], None],
    ) -> None:
        """Asks for the slots of the pieces that are left of a put, and of the next call like it,
        and waits for none: once a call, because it costs the store as much for one piece as for
        all."""
        size = rest.part.slot_granules
        nbytes = size * limits.GRANULE_BYTES
        share = memory.pool.size // limits.AHEAD_SHARE
        ahead = min(share, limits.MAX_AHEAD_BYTES) // nbytes if self._ahead else 0
        missing = len(_absent(memory.index.lookup(number, rest.chain)))
        more = missing + min(rest.of, ahead) - self.stock.count(size)
        # What is put is not to make room for what is to come.
        more = min(more, memory.pool.size // limits.ALL_AHEAD_SHARE // nbytes)
        if not missing or more <= 0:
            return

        def then(answer: object) -> None:
            if isinstance(answer, c.Granted):
                self.stock.put(size, answer.granules.tolist())

        before(deadline)
        self._link.cast(c.Grant(namespace=number, blocks=more), deadline.left_s, then)

    def put_one(
        self,
        memory: Memory,
        namespace: NamespaceHandle,
        hashes: Hashes,
        sources: Sequence[Bytes1D],
        *,
        put_id: bytes | None,
        parent: bytes,
        position: int,
        note: Callable[[Lookup], None],
    ) -> PutResult | None:
        """A put of one small block that nothing has to be asked for; None where it is not that, or
        where what the caller gave has to be looked at more closely.

        memory: the link's now. note: as `put` says.
        """
        single = memory.singles.get(id(namespace))
        if single is None or len(sources) != 1 or not isinstance(sources, _INDEXED):
            return None
        key: object = hashes
        if isinstance(hashes, list):
            key = hashes[0] if len(hashes) == 1 and type(hashes[0]) is bytes else None
        if put_id is not None and not _is_bytes(put_id, (PUT_ID_BYTES,)):
            return None
        if not _is_bytes(parent, (0, limits.KEY_BYTES)) or type(position) is not int:
            return None
        if not -1 <= position < limits.MAX_POSITION:
            return None
        self._link.take_answers(0)
        slot = self.stock.take_spare(single.size, _FEWEST_AHEAD // 2 if self._ahead else 0)
        if slot is None:
            return None
        assert memory.board
        found = np.empty((1, ROW_WORDS), np.uint64)
        # Whatever breaks this off, the slot is not written again: the block may be shown.
        state = memory.board.put_one(
            *(single, slot, memory.pool_address + slot * limits.GRANULE_BYTES),
            key=key,
            source=sources[0],
            put_id=put_id or os.urandom(PUT_ID_BYTES),
            parent=parent,
            position=position,
            found=found,
        )
        if state == POSTED:
            note(_NOTHING)
            return _STORED
        self.stock.put(single.size, [slot])
        if state == UNSEEN:
            return None
        note(Lookup(found))
        return _EXISTED

    def _prepare(self, put: PutRequest, number: int, memory: Memory, epoch: int) -> None:
        """The next puts of one block here may be `put_one`."""
        board, part, namespace = memory.board, put.part, put.namespace
        if board is None or part.nbytes > ALONE_BYTES or not PROMISED:
            return
        known = memory.singles.get(id(namespace))
        if known and known.epoch == epoch:
            return
        if len(memory.singles) >= _MOST_SINGLES:  # each keeps a caller's handle
            memory.singles.clear()
        memory.singles[id(namespace)] = board.single(
            *(namespace, number, part),
            index=memory.index,
            generations=memory.generations,
            epoch=epoch,
        )

    def _after(
        self, committed: c.Committed, size: int, slots: list[int], absent: Rows, n: int
    ) -> PutResult:
        """What came of a commit for the put of n blocks; slots that show nothing stay here."""
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
            self._link.take_answers(deadline.left_s)  # with slots, where earlier puts posted theirs
            slots += self.stock.take(size, n - len(slots))
            if len(slots) == n:
                return slots
            self._give_unused_back(deadline)
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

    def _give_unused_back(self, deadline: Deadline) -> None:
        """A client may hold so many bytes ahead: slots of a size that it has done with would keep
        it from having enough of another one, and each of its puts would ask for some."""
        unused = self.stock.take_unused()
        if not unused:
            return
        slots = [slot for each in unused.values() for slot in each]
        try:
            self._link.cast(c.GiveBack(granules=np.array(slots, np.uint32)), deadline.left_s)
        except KVStoreError as error:
            if self._was_unsent(error):
                for size, each in unused.items():
                    self.stock.put(size, each)
            raise

    def _was_unsent(self, error: BaseException) -> bool:
        """Whether what failed like this has never reached the store, nor will."""
        return isinstance(error, _UNSENT) and not self._link.closed

    def _have_adopted(self, number: int, size: int, more: int, deadline: Deadline) -> None:
        """Asks for slots, and so lets the store take over what was posted by now, which is shown
        already: whatever becomes of this, it is put. Small puts do this once in a while, because
        the wake-up takes longer than the rest of the put, and the store less for several blocks."""

        def then(answer: object) -> None:
            if isinstance(answer, c.Granted):
                self.stock.put(size, answer.granules.tolist())
                self._short = len(answer.granules) < more

        with contextlib.suppress(KVStoreError):
            if self._short:
                self._give_unused_back(deadline)
            self._link.cast(c.Adopt(namespace=number, more=more), deadline.left_s, then)

    def _wanted(self, size: int, n: int, left: int) -> int:
        """How many slots to ask for where so many are left, so that the next put of n blocks finds
        them here; of small puts the next few, for which the answer may be late."""
        if not self._ahead:
            return 0
        most = limits.MAX_AHEAD_BYTES // (size * limits.GRANULE_BYTES)
        enough = min(max(n, _FEWEST_AHEAD), most)
        return max(0, enough - left) if left < max(n, enough // 2) else 0


@dataclass(frozen=True, slots=True, eq=False)
class _Filled:
    """Blocks of a put whose bytes are in slots: `rows` of its chain, ascending; their slots' first
    granules, and checksums (n, cells)."""

    memory: Memory
    put: PutRequest
    number: int
    rows: Rows
    granules: c.U32
    checksums: c.U64

    def post(self, epoch: int) -> bool:
        """Writes the headers of more than one, and posts them; False, and nobody sees them, where
        that cannot be: without a board, on a full one, with a time to live or a key that comes
        twice, after a namespace was dropped."""
        memory, put = self.memory, self.put
        if memory.board is None or put.ttl_ms or memory.index.namespace_epoch != epoch:
            return False
        keys = put.chain if len(self.rows) == len(put.chain) else put.chain[self.rows]
        words = key_words(keys)
        if len(keys) > 1:
            if len(set(words[:, 0].tolist())) < len(keys):
                return False
            self._write_headers(keys)
        return memory.board.post(
            self.number,
            words,
            length=put.namespace.layout.block_bytes,
            granules=self.granules,
            generations=memory.generations,
        )

    def commit(self, absent: Rows, more: int) -> c.Commit:
        """What shows them by a call; the answer is about all blocks from the first of the absent
        ones on."""
        put, first = self.put, int(absent[0])
        hashes, granules, sums = put.chain[first:], self.granules, self.checksums
        if len(granules) < len(hashes):
            granules, sums = _spread(self.rows - first, len(hashes), granules, sums)
        return c.Commit(
            namespace=self.number,
            put_id=put.put_id,
            hashes=hashes,
            granules=granules,
            checksums=sums,
            parent=put.chain[first - 1].tobytes() if first else put.parent,
            position=put.position + first if put.position >= 0 else -1,
            ttl_ms=put.ttl_ms,
            more=more,
        )

    def _write_headers(self, keys: c.U8) -> None:
        put, rows, n = self.put, self.rows, len(self.rows)
        parents, positions = np.zeros_like(keys), np.full(n, -1, np.int32)
        if put.position >= 0:
            positions = (put.position + rows).astype(np.int32)
            parents = put.chain[rows - 1]
            if not rows[0]:
                parents[0] = np.frombuffer(put.parent, np.uint8) if put.parent else 0
        headers = pack_many(
            namespace=self.number,
            keys=keys,
            put_ids=put.put_id * n,
            length=put.namespace.layout.block_bytes,
            checksums=self.checksums,
            parents=parents,
            positions=positions,
        )
        write_headers(self.memory.pool, self.granules, headers)


def _is_bytes(value: object, sizes: tuple[int, ...]) -> bool:
    return type(value) is bytes and len(value) in sizes


def _absent(there: Lookup) -> Rows:
    """Which of the keys are not there, ascending."""
    if len(there.rows) == 1:
        return _NO_ROW if there.rows[0, W_CHECK] else _ONE_ROW
    found = there.found
    return np.flatnonzero(~found) if found.any() else np.arange(len(found))


def _filled(
    memory: Memory,
    put: PutRequest,
    number: int,
    *,
    rows: Rows,
    slots: list[int],
    by: Deadline,
) -> _Filled:
    """Copies these blocks of the put into the slots, one with its header."""
    granules, n = np.array(slots, np.uint32), len(put.addresses)
    if len(slots) == 1:
        sums = _fill_one(memory, put, number, int(rows[0]), slots[0])
        return _Filled(memory, put, number, rows, granules, sums)
    sums = copy_all_in(
        memory,
        put.namespace.layout,
        put.part,
        sources=put.addresses if len(rows) == n else put.addresses[rows],
        slots=granules,
        end_s=by.end_s,
        # Of a durable put, beside which the daemon verifies and writes what came before: on few
        # processors a second thread would take one from that.
        alone=_FEW_PROCESSORS and put.of > len(put.chain),
    )
    return _Filled(memory, put, number, rows, granules, sums)


def _fill_one(memory: Memory, put: PutRequest, number: int, row: int, slot: int) -> c.U64:
    """Copies a block of the put into a slot, with its header; returns its checksums (1, cells)."""
    part, parent = put.part, b""
    if put.position >= 0:
        parent = put.chain[row - 1].tobytes() if row else put.parent
    return fill_slot(
        memory.pool_address + slot * limits.GRANULE_BYTES,
        int(put.addresses[row]),
        cells=part.cell_words,
        header_bytes=part.payload_at,
        namespace=number,
        key=put.chain[row].tobytes(),
        put_id=put.put_id,
        length=part.nbytes,
        parent=parent,
        position=put.position + row if put.position >= 0 else -1,
    )


def _spread(rows: npt.NDArray[np.intp], n: int, slots: c.U32, sums: c.U64) -> tuple[c.U32, c.U64]:
    """The written blocks' slots and checksums at their rows of n; the others have no slot."""
    all_slots = np.full(n, c.NO_SLOT, np.uint32)
    all_sums = np.zeros((n, sums.shape[1]), np.uint64)
    all_slots[rows], all_sums[rows] = slots, sums
    return all_slots, all_sums
