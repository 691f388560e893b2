"""Where blocks lie on NVMe: arrays by block id, and the volumes' books."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kvstore.commands import U64
from kvstore.nvme.volume import Health, IdArray, Use, UseState, Volume

_NOWHERE = np.int32(-1)
Mask = npt.NDArray[np.bool_]


class Copy(NamedTuple):
    """A second copy of a block. namespace: its number; entry: (1,) ENTRY. serves: whether it may
    take the first one's place; else it expires at another time."""

    namespace: int
    use: Use
    entry: npt.NDArray[np.void]
    serves: bool

    @property
    def place(self) -> int:
        """Its granule in the segment."""
        return int(self.entry["granule"][0])

    @property
    def expires_ms(self) -> int:
        """0: never."""
        return int(self.entry["expires_ms"][0])


class Places:
    """A block has one place at most. Segments are counted through all volumes.

    A restart may find second copies: of blocks that were written anew before their segment made
    room, or put anew before they were found, or while their volume was off. They serve where the
    first is lost, and must not come back in place of a block that was dropped.

    wishes: blocks that are worth a place and have none; whoever writes takes them from here. heirs:
    copies of blocks that are gone but were not dropped, which are to be shown by themselves.
    """

    def __init__(self, max_blocks: int, volumes: Sequence[Volume], *, every: bool) -> None:
        """every: whether all new blocks are worth it, or only those that are read."""
        self.volumes, self._every = tuple(volumes), every
        n = max_blocks if self.volumes else 0
        self._segment = np.full(n, _NOWHERE, np.int32)
        self._place = np.zeros(n, np.uint32)
        self._stamp = np.zeros(n, np.uint64)
        self._reread = np.zeros(n, np.bool_)
        self._uses: dict[int, Use] = {}
        self._begun = 0  # uses since the start
        self.wishes: list[IdArray] = []
        self._emptied: list[Use] = []
        self.heirs: list[Copy] = []
        self._copies: dict[int, list[Copy]] = {}  # by block, the second ones

    def open(self, use: Use) -> None:
        """A use of a segment begins; blocks may settle there."""
        self._uses[self._number(use)] = use
        if use.state is UseState.OPENING:
            self._begun += 1
            use.born = self._begun
        else:  # found after a restart, when none has begun yet
            use.born = use.sequence - self.volumes[use.volume].next_sequence

    def close(self, use: Use) -> None:
        """It is over, and nothing lies there any more."""
        assert not use.live
        del self._uses[self._number(use)]
        for block, copies in list(self._copies.items()):
            self._copies[block] = [copy for copy in copies if copy.use is not use]
        self.heirs = [copy for copy in self.heirs if copy.use is not use]

    def settle(self, ids: IdArray, use: Use, places: npt.NDArray[np.uint32], stamps: U64) -> None:
        """Blocks (distinct ids) lie there from now on."""
        self._segment[ids] = self._number(use)
        self._place[ids] = places
        self._stamp[ids] = stamps
        self._reread[ids] = False
        use.add(ids, places)

    def add_copy(self, block: int, copy: Copy) -> None:
        """A second copy of a block was found."""
        self._copies.setdefault(block, []).append(copy)

    def fall_back(self, ids: IdArray) -> list[tuple[int, Copy]]:
        """Blocks are about to leave memory, or lost their place: a second copy takes the place that
        they lack. Returns those of which one did, and it."""
        if not self._copies:
            return []
        fell = []
        for block in ids[~self.there(ids)].tolist():
            copies = self._copies.get(block, [])
            if copy := next((copy for copy in copies if copy.serves), None):
                copies.remove(copy)
                places, stamps = copy.entry["granule"].copy(), copy.entry["stamp"].copy()
                self.settle(np.array([block], np.uint32), copy.use, places, stamps)
                fell.append((block, copy))
        return fell

    def vanish(self, ids: IdArray, *, heirs_at_ms: int | None) -> None:
        """Blocks are gone. heirs_at_ms: their second copies become `heirs`, but for those that have
        expired by then; None: they must not come back either."""
        if not self._copies:
            return
        for block in ids.tolist():
            for copy in self._copies.pop(block, ()):
                if heirs_at_ms is not None and not 0 < copy.expires_ms <= heirs_at_ms:
                    self.heirs.append(copy)
                else:
                    use = copy.use
                    self.volumes[use.volume].forget([(use.segment, use.sequence, copy.place)])

    def copies_of(self, block: int) -> list[Use]:
        """Where second copies of a block lie."""
        return [copy.use for copy in self._copies.get(block, ())]

    def there(self, ids: IdArray) -> Mask:
        """Which blocks have a place that can be read: bool (n,)."""
        if not self.volumes:
            return np.zeros(len(ids), np.bool_)
        found: Mask = self._segment[ids] != _NOWHERE
        return found

    def durable(self, ids: IdArray) -> Mask:
        """Which blocks survive a power cut, as far as is known: bool (n,)."""
        result = self.there(ids)
        if not result.any():
            return result
        segments, places = self._segment[ids], self._place[ids]
        for number in set(segments[result].tolist()):
            use = self._uses[number]
            synced = 0 if use.state is UseState.LEAVING else use.synced
            result[(segments == number) & (places + use.slot_granules > synced)] = False
        return result

    def new(self, ids: IdArray) -> None:
        """Blocks were stored in memory."""
        if self._every and self.volumes:
            self.wishes.append(ids)

    def read(self, ids: IdArray) -> None:
        """Live blocks were read: those with a place are worth keeping there, others are wished."""
        if not self.volumes:
            return
        there = self._segment[ids] != _NOWHERE
        self._reread[ids[there]] = True
        if not there.all():
            self.wishes.append(ids[~there])

    def leave(self, ids: IdArray, *, forgotten: bool) -> None:
        """Blocks lose the place that they may have. forgotten: they must not come back by it."""
        ids = ids[self.there(ids)]
        if not len(ids):
            return
        for use, mine in self.by_use(ids):
            use.live -= len(mine)
            if not use.live:
                self._emptied.append(use)
            if forgotten:
                volume = self.volumes[use.volume]
                volume.forget(
                    [(use.segment, use.sequence, place) for place in self._place[mine].tolist()]
                )
        self._segment[ids] = _NOWHERE

    def by_use(self, ids: IdArray) -> Iterator[tuple[Use, IdArray]]:
        """The uses in which these blocks lie, with the blocks of each, in their order."""
        segments = self._segment[ids]
        for number in sorted(set(segments.tolist())):
            yield self._uses[number], ids[segments == number]

    def use_of(self, block: int) -> Use:
        """Where one block lies, which has a place."""
        return self._uses[int(self._segment[block])]

    def of(self, ids: IdArray) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], U64]:
        """Segments, granules in them, and stamps of blocks that have a place: (n,) each."""
        return (
            self._segment[ids].astype(np.int64),
            self._place[ids].astype(np.int64),
            self._stamp[ids],
        )

    def in_use(self, use: Use) -> IdArray:
        """The blocks that lie there, in the order in which they were written."""
        ids, places = use.members()
        mine = (self._segment[ids] == self._number(use)) & (self._place[ids] == places)
        found: IdArray = ids[mine]
        return found

    def reread(self, ids: IdArray) -> Mask:
        """Which blocks were read since they were written: bool (n,)."""
        return self._reread[ids]

    def mark_read(self, ids: IdArray) -> None:
        """These were read from there."""
        self._reread[ids] = True

    def take_emptied(self) -> list[Use]:
        """The uses whose last block has left since the last call."""
        if not self._emptied:
            return []
        emptied, self._emptied = self._emptied, []
        with_copies = [copy.use for copies in self._copies.values() for copy in copies]
        with_copies += [copy.use for copy in self.heirs]
        return [use for use in emptied if not use.live and use not in with_copies]

    def by_age(self) -> list[Use]:
        """The uses that may make room, those first that have to."""
        return sorted(
            (use for volume in self.volumes for use in volume.usable()),
            key=lambda use: (use.state is not UseState.WHOLE, use.born),
        )

    def writable(self) -> list[Volume]:
        """The volumes that are written."""
        return [volume for volume in self.volumes if volume.health is Health.OK]

    def check(self, in_index: IdArray) -> None:
        """AssertionError unless the books agree; in_index: ids of all blocks that can be found."""
        placed = np.flatnonzero(self._segment != _NOWHERE).astype(np.uint32)
        assert np.isin(placed, in_index).all(), "a place of a block that is gone"
        counts = dict.fromkeys(self._uses, 0)
        for number, count in zip(
            *np.unique(self._segment[placed], return_counts=True), strict=True
        ):
            counts[int(number)] = int(count)
        for number, use in self._uses.items():
            assert use.live == counts[number] == len(self.in_use(use)), "blocks are miscounted"
        for volume in self.volumes:
            numbers = [*volume.uses, *volume.free]
            assert sorted(numbers) == list(range(volume.geometry.n_segments))
            assert all(self._uses[volume.base + s] is use for s, use in volume.uses.items())

    def _number(self, use: Use) -> int:
        return self.volumes[use.volume].base + use.segment
