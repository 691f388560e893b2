"""The space of a pool, cut in slabs of equal slots; bookkeeping only, no byte is touched.

A pool is cut in units of U bytes. A size class (a slot size in granules) takes slabs of k
contiguous units, or what a shorter run of free units holds when none of k is left, so that no
unit lies idle between slabs of different lengths. A slab whose last slot is freed
gives its units back at once, so that memory moves between classes. A slab is named by its first
unit; a slot by its first granule.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.errors import InvalidArgument

U32Array = npt.NDArray[np.uint32]
I64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

MIN_UNIT_BYTES = 64 << 10
MAX_UNIT_BYTES = 32 << 20
UNITS_WANTED = 32
CLASSES_KEPT = 64  # size classes without a slab are forgotten beyond so many
MAX_SLAB_UNITS = 16
MAX_WASTE = 1 / 32
MAX_SLOT_BYTES = limits.MAX_BLOCK_BYTES + (64 << 10)
MAX_POOL_BYTES = limits.GRANULE_BYTES << 32  # granules are counted in 32 bits


def slot_granules(nbytes: int) -> int:
    """Granules of a slot for `nbytes` bytes (rounded up). InvalidArgument if not positive."""
    if nbytes <= 0:
        raise InvalidArgument("slot_bytes", f"must be positive, got {nbytes}")
    return -(-nbytes // limits.GRANULE_BYTES)


@dataclass(slots=True)
class _SizeClass:
    """A slot size with its slab geometry and its slabs that have a free slot."""

    granules: int
    units: int
    per_slab: int
    slabs: int = 0
    partial: dict[int, None] = field(default_factory=dict)  # an ordered set


def _unit_bytes(pool_bytes: int) -> int:
    """The unit of a pool in bytes: a power of two, about 1/32 of the pool."""
    share = max(1, -(-pool_bytes // UNITS_WANTED))
    return min(max(1 << (share - 1).bit_length(), MIN_UNIT_BYTES), MAX_UNIT_BYTES)


class SlabAllocator:
    """Slots of a pool of `pool_bytes` bytes; a tail shorter than a unit is not used.

    Errors: InvalidArgument for a pool smaller than one unit or larger than 16 TiB.
    Not thread-safe.
    """

    def __init__(self, pool_bytes: int) -> None:
        self._unit = _unit_bytes(pool_bytes)
        if not self._unit <= pool_bytes <= MAX_POOL_BYTES:
            raise InvalidArgument(
                "pool_bytes", f"must be {self._unit} to {MAX_POOL_BYTES} bytes, got {pool_bytes}"
            )
        self._unit_granules = self._unit // limits.GRANULE_BYTES
        self._n_units = pool_bytes // self._unit
        self._owner = np.full(self._n_units, -1, np.int64)  # unit -> slab, -1: free
        self._slab_slot = np.zeros(self._n_units, np.int64)  # slab -> granules of a slot
        self._slab_units = np.zeros(self._n_units, np.int64)  # slab -> units
        self._slab_live = np.zeros(self._n_units, np.int64)  # slab -> live slots
        self._live = np.zeros(self._n_units * self._unit_granules, np.bool_)
        self._classes: dict[int, _SizeClass] = {}
        self._used_granules = 0

    @property
    def total_bytes(self) -> int:
        """Bytes that the units cover."""
        return self._n_units * self._unit

    @property
    def used_bytes(self) -> int:
        """Bytes of the live slots, each rounded up to granules."""
        return self._used_granules * limits.GRANULE_BYTES

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit."""
        return self._unit

    def slot_granules(self, nbytes: int) -> int:
        """Granules of a slot for `nbytes` bytes. InvalidArgument if it never fits this pool."""
        granules = slot_granules(nbytes)
        if nbytes > MAX_SLOT_BYTES or -(-granules // self._unit_granules) > self._n_units:
            most = min(MAX_SLOT_BYTES, self.total_bytes)
            raise InvalidArgument("slot_bytes", f"at most {most} bytes, got {nbytes}")
        return granules

    def alloc(self, slot_bytes: int, n: int) -> U32Array:
        """Take up to `n` slots; uint32 [<=n] first granules, fewer when the pool is full.

        Errors: InvalidArgument for a size that never fits or a negative `n`. Modifies the
        bookkeeping.
        """
        if n < 0:
            raise InvalidArgument("n", f"must not be negative, got {n}")
        size_class = self._class(slot_bytes)
        parts: list[U32Array] = []
        missing = n
        while missing and size_class.partial:
            parts.append(self._take(next(iter(size_class.partial)), size_class, missing))
            missing -= parts[-1].size
        for slab in self._new_slabs(size_class, missing):
            parts.append(self._take(slab, size_class, missing))
            missing -= parts[-1].size
        return np.concatenate(parts) if parts else np.empty(0, np.uint32)

    def free(self, granules: npt.NDArray[np.integer]) -> None:
        """Give slots back by first granule (int [n], no order).

        AssertionError, before any change, for a slot that is not live or is named twice.
        Modifies the bookkeeping; the units of emptied slabs become free.
        """
        at = np.asarray(granules, np.int64)
        if at.size == 0:
            return
        self._require_live(at)
        if np.unique(at).size != at.size:
            raise AssertionError("double free: a slot is named twice")
        self._live[at] = False
        slabs, counts = np.unique(self._owner[at // self._unit_granules], return_counts=True)
        self._slab_live[slabs] -= counts
        self._used_granules -= int((self._slab_slot[slabs] * counts).sum())
        for slab in slabs.tolist():
            self._settle(slab)

    def slab_slots(self, granule: int) -> U32Array:
        """First granules (uint32 [m]) of all live slots of the slab holding `granule`.

        AssertionError when no slab holds it.
        """
        slab = self._slab_at(granule)
        size_class = self._classes[int(self._slab_slot[slab])]
        return self._slots_of(slab, size_class, np.flatnonzero(self._slots(slab, size_class)))

    def class_of(self, granule: int) -> int:
        """Slot bytes of the slab that holds `granule`. AssertionError when no slab holds it."""
        return int(self._slab_slot[self._slab_at(granule)]) * limits.GRANULE_BYTES

    @property
    def n_units(self) -> int:
        """Units of the pool; a slab is named by one of them."""
        return self._n_units

    def is_alone(self, granules: int) -> bool:
        """Whether no slab is cut for slots of another size."""
        return all(size == granules or not c.slabs for size, c in self._classes.items())

    def slabs_of(self, granules: npt.NDArray[np.integer]) -> I64Array:
        """The slabs (int64 [n]) that hold these granules, -1 where none does."""
        return self._owner[np.asarray(granules, np.int64) // self._unit_granules]

    def slot_sizes(self, slabs: I64Array) -> I64Array:
        """Granules of a slot (int64 [n]) in each of these slabs."""
        return self._slab_slot[slabs]

    def slab_sizes(self, slabs: I64Array) -> I64Array:
        """Granules (int64 [n]) of each of these slabs."""
        return self._slab_units[slabs] * self._unit_granules

    def would_hold(self, granules: int, stuck: BoolArray) -> BoolArray:
        """Where a slot of so many granules fits once slabs of other sizes are emptied.

        stuck: bool [n_units], the slabs that cannot be. bool [n_units]: whether the unit is in a
        run, long enough, of units that are free or can be.
        """
        owned = self._owner >= 0
        own = self._slab_slot[self._owner] == granules
        starts, lengths = _runs(~owned | ~(own | stuck[self._owner]))
        enough = lengths * self._unit_granules >= granules
        edges = np.zeros(self._n_units + 1, np.int64)
        edges[starts[enough]] += 1
        edges[(starts + lengths)[enough]] -= 1
        holds: BoolArray = np.cumsum(edges)[:-1] > 0
        return holds

    def n_free(self, slot_bytes: int) -> int:
        """Slots that `alloc(slot_bytes, ...)` could give now, from free units too."""
        granules = self.slot_granules(slot_bytes)
        size_class = self._classes.get(granules) or self._geometry(granules)
        slabs = np.fromiter(size_class.partial, np.int64, len(size_class.partial))
        room = self._slab_units[slabs] * self._unit_granules // granules
        in_slabs = int((room - self._slab_live[slabs]).sum())
        _, lengths = self._free_runs()
        whole, rest = np.divmod(lengths, size_class.units)
        in_rests = int((rest * self._unit_granules // granules).sum())
        return in_slabs + int(whole.sum()) * size_class.per_slab + in_rests

    def check(self) -> None:
        """Walk every invariant; AssertionError names the one that does not hold."""
        covered = self._owner < 0
        live_granules = live_slots = 0
        for slab in np.unique(self._owner[~covered]).tolist():
            size_class = self._classes[int(self._slab_slot[slab])]
            units = slice(slab, slab + int(self._slab_units[slab]))
            _ensure(bool((self._owner[units] == slab).all()), "a slab's units are its own")
            _ensure(not covered[units].any(), "no unit is in two slabs")
            covered[units] = True
            live = int(self._slots(slab, size_class).sum())
            _ensure(live == self._slab_live[slab] > 0, "a slab's live count is right")
            is_partial = slab in size_class.partial
            _ensure(is_partial == (live < self._slab_room(slab)), "partial slabs are listed")
            live_slots += live
            live_granules += live * size_class.granules
        _ensure(bool(covered.all()), "every unit is free or in one slab")
        _ensure(live_slots == int(self._live.sum()), "no slot lives outside a slab")
        _ensure(live_granules == self._used_granules, "used bytes are the live slots'")
        slabs = np.unique(self._owner[self._owner >= 0])
        held = sum(c.slabs for c in self._classes.values())
        _ensure(held == slabs.size, "each slab is counted by its class")

    def _class(self, slot_bytes: int) -> _SizeClass:
        granules = self.slot_granules(slot_bytes)
        found = self._classes.get(granules)
        if found is not None:
            return found
        if len(self._classes) >= CLASSES_KEPT:  # the others have a slab each: there is an end to it
            self._classes = {g: c for g, c in self._classes.items() if c.slabs}
        made = self._classes[granules] = self._geometry(granules)
        return made

    def _geometry(self, granules: int) -> _SizeClass:
        """The smallest slab that wastes at most 1/32, else the one that wastes least."""
        least = -(-granules // self._unit_granules)
        most = min(max(least, MAX_SLAB_UNITS), self._n_units)
        best, best_waste = least, 1.0
        for units in range(least, most + 1):
            size = units * self._unit_granules
            waste = (size % granules) / size
            if waste < best_waste:
                best, best_waste = units, waste
            if waste <= MAX_WASTE:
                break
        return _SizeClass(granules, best, best * self._unit_granules // granules)

    def _free_runs(self) -> tuple[I64Array, I64Array]:
        """First units and lengths (int64 [r] each) of the runs of free units."""
        return _runs(self._owner < 0)

    def _new_slabs(self, size_class: _SizeClass, slots: int) -> list[int]:
        """New slabs for up to `slots` slots: of k units, then of runs shorter than k."""
        if slots <= 0:
            return []
        made = self._whole_slabs(size_class, -(-slots // size_class.per_slab))
        slots -= len(made) * size_class.per_slab
        if slots <= 0:
            return made
        starts, lengths = self._free_runs()
        room = lengths * self._unit_granules // size_class.granules
        for run in np.argsort(-room, kind="stable").tolist():
            if slots <= 0 or room[run] == 0:
                break
            # No more units than the run's slots need: the others stay free.
            units = -(-int(room[run]) * size_class.granules // self._unit_granules)
            self._open(size_class, int(starts[run]), units)
            made.append(int(starts[run]))
            slots -= int(room[run])
        return made

    def _whole_slabs(self, size_class: _SizeClass, wanted: int) -> list[int]:
        """Up to `wanted` slabs of k units, smallest runs first: long ones serve large slabs."""
        made: list[int] = []
        starts, lengths = self._free_runs()
        k = size_class.units
        for run in np.argsort(lengths, kind="stable").tolist():
            count = min(int(lengths[run]) // k, wanted - len(made))
            made.extend(int(starts[run]) + i * k for i in range(count))
        for slab in made:
            self._open(size_class, slab, k)
        return made

    def _open(self, size_class: _SizeClass, slab: int, units: int) -> None:
        """Make the free units from `slab` on an empty slab of the class."""
        self._owner[slab : slab + units] = slab
        self._slab_units[slab] = units
        self._slab_slot[slab] = size_class.granules
        size_class.partial[slab] = None
        size_class.slabs += 1

    def _slab_room(self, slab: int) -> int:
        """Slots of the slab, live or not."""
        return int(self._slab_units[slab]) * self._unit_granules // int(self._slab_slot[slab])

    def _slots(self, slab: int, size_class: _SizeClass) -> BoolArray:
        """View (bool [per_slab]) of the slab's slots in the live map."""
        first = slab * self._unit_granules
        return self._live[first : first + self._slab_room(slab) * size_class.granules][
            :: size_class.granules
        ]

    def _slots_of(self, slab: int, size_class: _SizeClass, index: npt.NDArray[np.intp]) -> U32Array:
        return (slab * self._unit_granules + index * size_class.granules).astype(np.uint32)

    def _take(self, slab: int, size_class: _SizeClass, n: int) -> U32Array:
        """Make up to `n` free slots of the slab live."""
        slots = self._slots(slab, size_class)
        index = np.flatnonzero(~slots)[:n]
        slots[index] = True
        self._slab_live[slab] += index.size
        self._used_granules += int(index.size) * size_class.granules
        if self._slab_live[slab] == self._slab_room(slab):
            del size_class.partial[slab]
        return self._slots_of(slab, size_class, index)

    def _settle(self, slab: int) -> None:
        """After a free: list the slab as partial, or give its units back when it is empty."""
        size_class = self._classes[int(self._slab_slot[slab])]
        if self._slab_live[slab]:
            size_class.partial[slab] = None
            return
        size_class.partial.pop(slab, None)
        size_class.slabs -= 1
        self._owner[slab : slab + int(self._slab_units[slab])] = -1

    def _slab_at(self, granule: int) -> int:
        slab = -1
        if 0 <= granule < self._live.size:
            slab = int(self._owner[granule // self._unit_granules])
        if slab < 0:
            raise AssertionError(f"granule {granule} is in no slab")
        return slab

    def _require_live(self, at: I64Array) -> None:
        """Only first granules of live slots are set in the live map."""
        if at.min() < 0 or at.max() >= self._live.size or not self._live[at].all():
            raise AssertionError("double free, or a granule at which no slot starts")


def _runs(units: BoolArray) -> tuple[I64Array, I64Array]:
    """First units and lengths (int64 [r] each) of the runs of units that are True."""
    edges = np.diff(np.concatenate(([0], units.astype(np.int8), [0])))
    starts = np.flatnonzero(edges == 1)
    return starts, np.flatnonzero(edges == -1) - starts


def _ensure(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"does not hold: {what}")
