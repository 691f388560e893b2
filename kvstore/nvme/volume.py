"""The books of one volume: which segments are in use, for what, and what must not come back."""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument
from kvstore.nvme.format import FLOOR, HEADER_GRANULES, WHOLE_USE, Geometry, head_granules

IdArray = npt.NDArray[np.uint32]
U32 = npt.NDArray[np.uint32]
Record = tuple[int, int, int]  # segment, sequence, granule, WHOLE_USE or FLOOR


class Health(enum.IntEnum):
    """What a volume is still good for; it only ever gets worse, until the next start."""

    OK = 0
    DEGRADED = 1  # what is there is read; nothing is written any more
    OFF = 2


class UseState(enum.IntEnum):
    """Where one use of a segment is in its life."""

    OPENING = 0  # its header is being written
    OPEN = 1
    CLOSING = 2  # its footer is being written
    WHOLE = 3
    LEAVING = 4  # what is worth it is being read, to be written again elsewhere


@dataclass(slots=True, eq=False)
class Use:
    """One use of a segment, for blocks of one namespace (its lineage).

    next_granule, batches, header, last: where and how the next batch goes on. written, synced: the
    granules up to which all is written, and durable. entries: of all batches that are written,
    until the footer is. live: blocks that are found here. reads: operations that read from it now.
    writing: whether some write to it, be it batches, the header or the footer. ends: whether few
    whole batches fit behind the one that was begun last. torn: whether a batch was not written, so
    that none behind it counts. born: lower than of uses that began later, on any volume: sequences
    of two volumes say nothing of each other; where a header was unreadable they go on far above.
    """

    volume: int
    segment: int
    sequence: int
    lineage: int
    slot_granules: int
    state: UseState = UseState.OPENING
    next_granule: int = HEADER_GRANULES
    batches: int = 0
    header: int = 0
    last: int = 0
    written: int = 0
    synced: int = 0
    entries: list[npt.NDArray[np.void]] = field(default_factory=list)
    live: int = 0
    reads: int = 0
    writing: bool = False
    ends: bool = False
    torn: bool = False
    born: int = 0
    _ids: list[IdArray] = field(default_factory=list)
    _places: list[U32] = field(default_factory=list)

    def add(self, ids: IdArray, places: U32) -> None:
        """Blocks that lie in slots at these granules of the segment."""
        self._ids.append(ids)
        self._places.append(places)
        self.live += len(ids)

    def members(self) -> tuple[IdArray, U32]:
        """All that were ever added, and where; an id may stand for another block by now."""
        if len(self._ids) > 1:
            self._ids, self._places = [np.concatenate(self._ids)], [np.concatenate(self._places)]
        if not self._ids:
            return np.empty(0, np.uint32), np.empty(0, np.uint32)
        return self._ids[0], self._places[0]


class Volume:
    """One volume's segments. number: its place among the store's volumes; base: of its segments
    in the store's own count."""

    def __init__(self, number: int, base: int, geometry: Geometry, volume_id: bytes) -> None:
        self.number, self.base, self.geometry, self.id = number, base, geometry, volume_id
        self.health = Health.OK
        self.why = ""
        self.uses: dict[int, Use] = {}  # by segment
        self.free = list(range(geometry.n_segments - 1, -1, -1))
        self.next_sequence = 1
        self.forgotten: list[Record] = []  # that the log has yet to say
        self.n_forgotten = self.n_said = 0  # all that were ever in that list, and said durably
        self.logged: dict[Record, None] = {}  # what it says already
        self._on_disk: dict[int, int] = {}  # by segment, the use whose header is there
        self._unknown: set[int] = set()  # segments with a header that could not be read
        self.floor_at = 0  # of all that was forgotten, up to where it is said before a use begins
        self._floor = 0
        self._over: dict[int, int] = {}  # by segment, the last use that was forgotten as a whole
        self._unread: dict[int, int] = {}  # by segment, a use of which nobody knows what it holds
        self.read_errors = 0

    def begin(self, lineage: int, slot_granules: int) -> Use:
        """Takes a free segment, of which there must be one."""
        segment = self.free.pop()
        use = Use(self.number, segment, self.next_sequence, lineage, slot_granules)
        self.next_sequence += 1
        self.uses[segment] = use
        return use

    def end(self, use: Use) -> None:
        """The segment is free: what it holds must not come back."""
        del self.uses[use.segment]
        self.free.insert(0, use.segment)
        self.forget([(use.segment, use.sequence, WHOLE_USE)])

    def forget(self, records: Collection[Record]) -> None:
        """These must not come back after a restart; the log is to say so."""
        self.forgotten += records
        self.n_forgotten += len(records)

    def found(
        self,
        headers: Iterable[tuple[int, int]],
        unknown: Iterable[int],
        records: Iterable[Record],
    ) -> None:
        """What was there before the start: segment and sequence of the headers, segments whose
        header could not be read, and the log."""
        self._on_disk, self._unknown = dict(headers), set(unknown)
        self.logged = dict.fromkeys(records)
        self._note_over(self.logged)
        self._floor = max((s for _, s, granule in self.logged if granule == FLOOR), default=0)

    def set_floor(self) -> None:
        """A header could not be read: the log is to say from where on the sequences of this life
        are, before any use begins."""
        self._floor = self.next_sequence - 1
        self.forget([(0, self._floor, FLOOR)])
        self.floor_at = self.n_forgotten

    def opened(self, use: Use) -> None:
        """The use's header is durable: whatever the segment held before is over."""
        self._on_disk[use.segment] = use.sequence
        self._unknown.discard(use.segment)

    def _note_over(self, records: Iterable[Record]) -> None:
        for segment, sequence, granule in records:
            if granule == WHOLE_USE:
                self._over[segment] = max(sequence, self._over.get(segment, 0))

    def leave_unread(self, segment: int, sequence: int) -> None:
        """What this use holds cannot be known now, but perhaps after the next restart. Its segment
        is free, and the last to be used again. sequence: of an unknown use, one that it is below
        or at."""
        self._unread[segment] = sequence
        self.free.remove(segment)
        self.free.insert(0, segment)

    def forget_unread(self) -> None:
        """Something was dropped that may lie there as well."""
        unread = self._unread.items()
        self.forget([(s, n, WHOLE_USE) for s, n in unread if self._on_disk.get(s, n) == n])
        self._unread = {}

    def oldest(self) -> Use | None:
        """The use that has to make room first, if there is one: one that nothing was written to, as
        it was opened ahead of need."""
        usable = self.usable()
        if spare := next((use for use in usable if not use.batches), None):
            return spare
        whole = [use for use in usable if use.state is UseState.WHOLE]
        return min(whole or usable, key=lambda use: use.sequence, default=None)

    def usable(self) -> list[Use]:
        """The uses that can make room now: that are not being written or left."""
        states = (UseState.WHOLE, UseState.OPEN)
        return [use for use in self.uses.values() if use.state in states and not use.writing]

    def room_in(self, use: Use, most: int) -> int:
        """How many slots, up to `most`, a next batch of the segment can have."""
        granules = self.geometry.footer_granule(use.slot_granules) - use.next_granule
        n = min(most, granules // use.slot_granules)
        while n > 0 and head_granules(n) + n * use.slot_granules > granules:
            n -= 1
        return max(n, 0)

    def holds(self, slot_granules: int) -> bool:
        """Whether a slot of this size fits into a segment."""
        try:
            return self.geometry.slots(slot_granules) > 0
        except InvalidArgument:
            return False

    def offset(self, use: Use, granule: int) -> int:
        """Where a granule of the segment lies on the volume, in bytes."""
        return self.geometry.offset(use.segment, granule)

    def due_records(self, *, hold: bool) -> list[Record]:
        """What the log has to say and does not say yet. hold: but for uses whose segment is getting
        another header right now, which will say as much; they stay among the forgotten."""
        forgotten, self.forgotten = self.forgotten, []
        if hold:
            self.forgotten = [r for r in forgotten if self._is_being_replaced(r)]
            held = set(self.forgotten)
            forgotten = [r for r in forgotten if r not in held]
        # Not of those that are held: until they are said, the log needs what it says of their uses.
        self._note_over(forgotten)
        due = dict.fromkeys(r for r in forgotten if r not in self.logged and self._is_needed(r))
        self.logged |= due
        return list(due)

    def useful_records(self) -> list[Record]:
        """What the log has to say still: of uses whose headers are on disk, or may be."""
        return [record for record in self.logged if self._is_needed(record) and self._tells(record)]

    def _is_needed(self, record: Record) -> bool:
        """Whether neither another record nor a newer header says that all of this use is over."""
        segment, sequence, granule = record
        if granule == FLOOR:
            return sequence == self._floor
        if self._on_disk.get(segment, 0) > sequence:
            return False
        over = self._over.get(segment, 0)
        return sequence >= over if granule == WHOLE_USE else sequence > over

    def _is_being_replaced(self, record: Record) -> bool:
        segment, sequence, granule = record
        use = self.uses.get(segment)
        if use is None or granule == FLOOR:
            return False
        return use.state is UseState.OPENING and use.sequence > sequence

    def _tells(self, record: Record) -> bool:
        segment, sequence, granule = record
        there = self._on_disk.get(segment)
        if there == sequence or segment in self._unknown or granule == FLOOR:
            return True
        return granule == WHOLE_USE and sequence > (there or 0)
