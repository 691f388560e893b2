"""Blocks on their way from NVMe into memory, in few large reads, the first of a chain first."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.index.format import DRAM_TIER
from kvstore.nvme.ops import CheckBlocks, Outcome, ReadBlocks, Run
from kvstore.nvme.volume import Health, Use, Volume
from kvstore.store.blocks import BlockState, IdArray
from kvstore.store.desk import Desk
from kvstore.store.namespaces import Namespace
from kvstore.store.shelf import Shelf

_NOTHING = np.empty(0, np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class _Reading:
    """Blocks that are being read, as they were when it began."""

    volume: Volume
    ids: IdArray
    births: npt.NDArray[np.uint32]
    segments: npt.NDArray[np.int64]
    places: npt.NDArray[np.int64]
    uses: Sequence[Use]


class Fetcher:
    """Reads cold blocks into slots of the pool. `bytes_coming`: of slots that are being filled."""

    def __init__(self, shelf: Shelf, desk: Desk) -> None:
        self._shelf, self._desk = shelf, desk
        self.bytes_coming = 0
        self.scrubbed_blocks = 0
        self.scrubs = False  # whether a read is under way that nobody waits for
        self.leased: dict[int, IdArray] = {}  # of reads under way

    def fetch(self, namespace: Namespace, ids: IdArray, *, keep: IdArray = _NOTHING) -> int:
        """Begins to read cold blocks of one namespace, in order, as many as there is room for.

        keep: blocks that must not make room for them. Returns how many reads have begun.
        """
        shelf = self._shelf
        size = namespace.slot_bytes
        most = max(shelf.room.slabs.total_bytes // limits.NVME_COMING_SHARE, size)
        n = min(len(ids), (min(most, limits.MAX_COMING_BYTES) - self.bytes_coming) // size)
        if self.bytes_coming == 0:
            n = max(n, min(1, len(ids)))  # a block larger than the limit comes alone
        if n <= 0:
            return 0
        with shelf.kept(keep):
            granules = shelf.make_slots(size, n, ids=False)
        ids = ids[: len(granules)]
        # Making room may have cost some of these their place.
        cold = (shelf.blocks.state[ids] == BlockState.COLD) & shelf.places.there(ids)
        if not cold.all():
            shelf.room.slabs.free(granules[~cold])
            ids, granules = ids[cold], granules[cold]
        shelf.memory.generations[granules] += np.uint64(1)  # odd: being written
        shelf.blocks.come(ids, granules)
        self.bytes_coming += size * len(ids)
        for volume, mine in self._by_volume(ids):
            for part in _parts(mine, size, first=not keep.size):
                self._read(namespace, volume, part)
        return len(ids)

    def _by_volume(self, ids: IdArray) -> Iterator[tuple[Volume, IdArray]]:
        """Neighbours in the chain that lie on one volume."""
        segments, _, _ = self._shelf.places.of(ids)
        volumes = self._shelf.places.volumes
        bases = np.array([volume.base for volume in volumes])
        numbers = np.searchsorted(bases, segments, side="right") - 1
        edges = np.flatnonzero(np.diff(numbers)) + 1
        for part in np.split(np.arange(len(ids)), edges):
            if len(part):
                yield volumes[int(numbers[part[0]])], ids[part]

    def _read(self, namespace: Namespace, volume: Volume, ids: IdArray) -> None:
        shelf = self._shelf
        segments, places, _ = shelf.places.of(ids)
        ids = ids[np.lexsort((places, segments))]  # they are shown together: so in fewest runs
        reading = self._hold(volume, ids)
        self.leased[id(reading)] = ids
        runs, keys, stamps = self._where(volume, namespace, ids)
        self._desk.emit(
            lambda number: ReadBlocks(
                number=number,
                volume=volume.number,
                runs=runs,
                granules=shelf.blocks.granule[ids],
                slot_granules=namespace.slot_bytes // limits.GRANULE_BYTES,
                keys=keys,
                stamps=stamps,
                layout=namespace.layout,
                namespace=namespace.id,
            ),
            functools.partial(self._done, namespace, reading),
        )

    def _hold(self, volume: Volume, ids: IdArray) -> _Reading:
        """Nobody takes these segments while they are read."""
        shelf = self._shelf
        segments, places, _ = shelf.places.of(ids)
        uses = [use for use, _ in shelf.places.by_use(ids)]
        for use in uses:
            use.reads += 1
        return _Reading(volume, ids, shelf.blocks.birth[ids].copy(), segments, places, uses)

    def _let_go(self, reading: _Reading, outcome: Outcome) -> None:
        for use in reading.uses:
            use.reads -= 1
        self._note_health(reading.volume, outcome)

    def _where(
        self, volume: Volume, namespace: Namespace, ids: IdArray
    ) -> tuple[tuple[Run, ...], c.U8, c.U64]:
        segments, places, stamps = self._shelf.places.of(ids)
        keys = self._shelf.catalog.words_of(ids)
        step = namespace.slot_bytes // limits.GRANULE_BYTES
        follows = (np.diff(segments) == 0) & (np.diff(places) == step)
        edges = [0, *(np.flatnonzero(~follows) + 1).tolist(), len(ids)]
        runs = tuple(
            Run(
                offset=volume.geometry.offset(int(segments[a]) - volume.base, int(places[a])),
                count=b - a,
            )
            for a, b in itertools.pairwise(edges)
        )
        return runs, np.ascontiguousarray(keys).view(np.uint8).reshape(-1, 32), stamps

    def _done(self, namespace: Namespace, reading: _Reading, outcome: Outcome) -> None:
        shelf, ids = self._shelf, reading.ids
        del self.leased[id(reading)]
        self.bytes_coming -= namespace.slot_bytes * len(ids)
        self._let_go(reading, outcome)
        bad = np.ones(len(ids), np.bool_) if outcome.error else outcome.bad
        same = shelf.blocks.birth[ids] == reading.births
        shelf.free(shelf.blocks.release(ids[~same]))  # dropped while they came
        self._show(ids[same & ~bad])
        self._give_up(ids[same & bad])

    def _show(self, ids: IdArray) -> None:
        """They are in their slots, and whole."""
        if not len(ids):
            return
        shelf = self._shelf
        granules = shelf.blocks.granule[ids]
        shelf.memory.generations[granules] += np.uint64(1)  # even: stable
        shelf.blocks.arrive(ids)
        shelf.catalog.move(
            ids, granules=granules, generations=shelf.memory.generations[granules], tier=DRAM_TIER
        )
        shelf.policy.admit(ids, shelf.catalog.words_of(ids)[:, 0].copy())
        shelf.places.mark_read(ids)
        shelf.counters.promoted += len(ids)

    def _give_up(self, ids: IdArray) -> None:
        """What came is not what was stored, or did not come at all."""
        if not len(ids):
            return
        shelf = self._shelf
        granules = shelf.blocks.granule[ids]
        shelf.blocks.stay_away(ids)
        shelf.free_slots(granules)
        shelf.counters.corrupted += len(ids)
        self._lose(ids)

    def _lose(self, ids: IdArray) -> None:
        """What cold blocks have there is bad: they go on from another place, if there is one."""
        shelf = self._shelf
        shelf.places.leave(ids, forgotten=True)
        shelf.fall_back(ids)
        shelf.forget(ids[~shelf.places.there(ids)], c.ExplainStatus.CORRUPTED)

    def _note_health(self, volume: Volume, outcome: Outcome) -> None:
        if not outcome.error:
            volume.read_errors = 0
            return
        volume.read_errors += 1
        if volume.read_errors >= limits.MAX_NVME_READ_ERRORS and volume.health is not Health.OFF:
            volume.health, volume.why = Health.OFF, f"reads fail: {outcome.error}"

    # -- scrubbing ---------------------------------------------------------------------

    def scrub(self, namespace: Namespace, volume: Volume, ids: IdArray) -> None:
        """Reads blocks, which have a place, to see whether they are still what they were."""
        self.scrubs = True
        reading = self._hold(volume, ids)
        runs, keys, stamps = self._where(volume, namespace, ids)
        self._desk.emit(
            lambda number: CheckBlocks(
                number=number,
                volume=volume.number,
                runs=runs,
                slot_granules=namespace.slot_bytes // limits.GRANULE_BYTES,
                keys=keys,
                stamps=stamps,
                layout=namespace.layout,
            ),
            functools.partial(self._scrubbed, reading),
        )

    def _scrubbed(self, reading: _Reading, outcome: Outcome) -> None:
        shelf, ids = self._shelf, reading.ids
        self.scrubs = False
        self._let_go(reading, outcome)
        if outcome.error:
            return
        self.scrubbed_blocks += len(ids)
        segments, places, _ = shelf.places.of(ids)
        there = (shelf.blocks.birth[ids] == reading.births) & shelf.places.there(ids)
        there &= (segments == reading.segments) & (places == reading.places)
        bad = ids[there & outcome.bad]
        shelf.counters.corrupted += len(bad)
        cold = shelf.blocks.state[bad] == BlockState.COLD
        self._lose(bad[cold])
        # Of those in memory only the copy is bad: it is written anew.
        live = bad[~cold]
        shelf.places.leave(live, forgotten=True)
        if len(live):
            shelf.places.wishes.append(live)


def _parts(ids: IdArray, slot_bytes: int, *, first: bool) -> Iterator[IdArray]:
    """Blocks that one read takes. first: whether somebody waits for the first of them; then that
    read is a small one."""
    most = max(1, limits.NVME_READ_BYTES // slot_bytes)
    at = 0
    while at < len(ids):
        n = max(1, most // 4) if first and at == 0 else most
        yield ids[at : at + n]
        at += n
