"""Blocks on their way to NVMe: which are worth it, and the batches that they are written in."""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.block import fixed_fields
from kvstore.nvme.format import (
    ENTRY,
    BatchHead,
    Footer,
    SegmentHeader,
    checksum_of,
    head_granules,
    pack_footer,
    pack_head,
    pack_segment_header,
)
from kvstore.nvme.ops import Outcome, Sync, WriteBlocks, WriteRaw
from kvstore.nvme.slots import stamps_of
from kvstore.nvme.volume import Health, Use, UseState, Volume
from kvstore.store.blocks import BlockState, IdArray
from kvstore.store.deadlines import Due
from kvstore.store.desk import Desk
from kvstore.store.namespaces import Namespace
from kvstore.store.shelf import Shelf

_MOST_AT_ONCE = 4096  # blocks of a batch, however small
_NOT_QUEUED = -1
_IN_FLIGHT = 4  # batches of one segment: some are checked while others are written


@dataclass(slots=True, eq=False)
class _Queue:
    """Blocks of one lineage that wait to be written. since_ms: when the first of them came.
    goes_on: whether another segment is to be ready when the one that is written ends."""

    namespace: Namespace
    parts: deque[tuple[IdArray, npt.NDArray[np.uint32]]] = field(default_factory=deque)
    count: int = 0
    since_ms: int = 0
    urgent: bool = False
    goes_on: bool = False


@dataclass(slots=True, eq=False)
class _Batch:
    """A batch that is being written. outcome: None until it is known."""

    number: int
    namespace: Namespace
    use: Use
    ids: IdArray
    births: npt.NDArray[np.uint32]
    entries: npt.NDArray[np.void]
    outcome: Outcome | None = None


@dataclass(slots=True)
class Written:
    """What went to NVMe since the start. nbytes: with heads and footers, of which payload_bytes
    were blocks'. again: blocks that were there before, in a segment that made room. refused: that
    found no place in the queue."""

    blocks: int = 0
    nbytes: int = 0
    payload_bytes: int = 0
    again: int = 0
    refused: int = 0


class Writer:
    """Writes blocks in batches, each queue's into a segment of its own."""

    def __init__(self, shelf: Shelf, desk: Desk, *, bytes_per_s: int, run: int) -> None:
        """bytes_per_s: what blocks that nobody waits for may take of the disks; 0: all of it.
        run: another number for each run of the store."""
        self._shelf, self._desk, self._run = shelf, desk, run
        self._rate = bytes_per_s
        self._tokens, self._tokens_ms = float(bytes_per_s), shelf.now_ms
        self._queues: dict[int, _Queue] = {}
        self._open: dict[int, list[Use]] = {}
        self._flights: dict[Use, deque[_Batch]] = {}  # in the order of their places
        n = len(shelf.blocks.state) if shelf.places.volumes else 0
        self._queued = np.full(n, _NOT_QUEUED, np.int64)  # the birth that was queued
        self.queued_bytes = 0
        self.leased: dict[int, IdArray] = {}  # of batches under way, by their number
        self._next_batch = 1
        self._syncing: set[int] = set()
        self.sync_wanted = False
        self._ends = False  # nothing more comes after what waits
        self.needed: set[int] = set()  # slot sizes in granules for which no segment is free
        self.needed_ahead: set[int] = set()  # likewise, of segments that nothing waits for yet
        self.written = Written()

    # -- what is to be written ---------------------------------------------------------

    def wish(self, ids: IdArray, *, urgent: bool = False, again: bool = False) -> None:
        """Queues live blocks that are neither on NVMe nor on their way there.

        urgent: somebody waits for it. again: they were there before.
        """
        shelf = self._shelf
        if not shelf.places.writable():
            return
        fit = (shelf.blocks.state[ids] == BlockState.LIVE) & ~shelf.places.there(ids)
        # As they came: neighbours in a chain are to lie side by side, because they are read so.
        ids = _distinct(ids[fit])
        waiting = self._waits(ids)
        numbers = shelf.blocks.namespace[ids]
        for number in sorted(set(numbers.tolist())):
            mine = numbers == number
            self._queue(shelf.namespaces.get(number), ids[mine & ~waiting], urgent)
            self.written.again += int(np.count_nonzero(mine)) if again else 0

    def _queue(self, namespace: Namespace, ids: IdArray, urgent: bool) -> None:
        queue = self._queues.get(namespace.lineage)
        if queue is None:
            queue = self._queues[namespace.lineage] = _Queue(namespace)
        queue.urgent |= urgent
        most = self._shelf.room.slabs.total_bytes // limits.NVME_QUEUE_SHARE
        room = len(ids) if urgent else max(0, most - self.queued_bytes) // namespace.slot_bytes
        if not self._fits(namespace):
            room = 0
        self.written.refused += max(0, len(ids) - room)
        ids = ids[:room]
        if not len(ids):
            return
        births = self._shelf.blocks.birth[ids]
        self._queued[ids] = births
        if not queue.count:
            queue.since_ms = self._shelf.now_ms
        queue.parts.append((ids, births))
        queue.count += len(ids)
        self.queued_bytes += len(ids) * namespace.slot_bytes

    def flush(self) -> None:
        """All that waits goes now, and is synced: the store ends."""
        self._ends = True
        for queue in self._queues.values():
            queue.urgent = True
        self.sync_wanted = True

    def waits(self, ids: IdArray) -> npt.NDArray[np.bool_]:
        """Which blocks are queued or being written: bool (n,)."""
        return self._waits(ids)

    def _waits(self, ids: IdArray) -> npt.NDArray[np.bool_]:
        if not len(self._queued):  # there are no volumes
            return np.zeros(len(ids), np.bool_)
        found: npt.NDArray[np.bool_] = self._queued[ids] == self._shelf.blocks.birth[ids]
        return found

    def _fits(self, namespace: Namespace) -> bool:
        granules = namespace.slot_bytes // limits.GRANULE_BYTES
        return any(volume.holds(granules) for volume in self._shelf.places.writable())

    # -- writing -----------------------------------------------------------------------

    def pump(self) -> None:
        """Begins what can be begun now."""
        self.needed.clear()
        self.needed_ahead.clear()
        self._refill()
        for queue in list(self._queues.values()):
            if queue.count and not self._fits(queue.namespace):
                self._void(queue)
            while self._due(queue) and self._write(queue):
                pass
            if queue.goes_on and not self._ends:
                # Now, so that its header is synced while the last one is still written.
                self._open_another(queue, ahead=True)
            if not queue.count:
                queue.urgent = False
        self.sync()

    def _void(self, queue: _Queue) -> None:
        """No volume that is still written can have its blocks."""
        for ids, births in queue.parts:
            self._unqueue(ids, births)
        self.written.refused += queue.count
        self._empty(queue)

    def _unqueue(self, ids: IdArray, births: npt.NDArray[np.uint32]) -> None:
        self._queued[ids[self._queued[ids] == births]] = _NOT_QUEUED

    def _empty(self, queue: _Queue) -> None:
        self.queued_bytes -= queue.count * queue.namespace.slot_bytes
        queue.parts.clear()
        queue.count = 0

    @property
    def next_due_ms(self) -> int | None:
        """When `pump` has something to do, if nothing else happens; None: never."""
        times = [
            queue.since_ms + limits.NVME_GATHER_MS
            for queue in self._queues.values()
            if queue.count and not self._busy(queue)
        ]
        if not times:
            return None
        late = self._tokens_ms + limits.TICK_MS if self._rate and self._tokens <= 0 else 0
        return max(min(times), late)

    def _busy(self, queue: _Queue) -> bool:
        """Whether it goes on when an operation ends, be it one that gives a segment free."""
        uses = self._open.get(queue.namespace.lineage, [])
        if not uses:
            return queue.namespace.slot_bytes // limits.GRANULE_BYTES in self.needed
        return not any(self._takes(use) for use in uses)

    def _takes(self, use: Use) -> bool:
        """Whether another batch of the use, or its footer, can be begun now."""
        if use.state is not UseState.OPEN or use.torn:
            return False
        if not use.writing:
            return True
        volume = self._shelf.places.volumes[use.volume]
        under_way = sum(batch.outcome is None for batch in self._flights[use])
        return under_way < _IN_FLIGHT and volume.room_in(use, 1) > 0

    def _refill(self) -> None:
        passed = self._shelf.now_ms - self._tokens_ms
        if self._rate and passed > 0:
            self._tokens = min(float(self._rate), self._tokens + self._rate * passed / 1e3)
            self._tokens_ms = self._shelf.now_ms

    def _due(self, queue: _Queue) -> bool:
        if not queue.count:
            return False
        if queue.urgent:
            return True
        if self._rate and self._tokens <= 0:
            return False
        whole = queue.count * queue.namespace.slot_bytes >= limits.NVME_WRITE_BYTES
        return whole or self._shelf.now_ms >= queue.since_ms + limits.NVME_GATHER_MS

    def _write(self, queue: _Queue) -> bool:
        """One step: whether there may be another at once."""
        use = self._use_for(queue)
        if use is None:
            return False
        volume = self._shelf.places.volumes[use.volume]
        slot_bytes = queue.namespace.slot_bytes
        most = min(max(1, limits.NVME_WRITE_BYTES // slot_bytes), _MOST_AT_ONCE)
        room = volume.room_in(use, most)
        if not room:
            self._close(use, volume)
            return True
        ids = self._pop(queue, room)
        if not len(ids):
            return False
        self._write_batch(queue.namespace, use, volume, ids)
        use.ends = volume.room_in(use, _IN_FLIGHT * most) < _IN_FLIGHT * most
        # Who fills batches and waits for them goes on, most likely.
        fills = len(ids) == most and queue.urgent
        queue.goes_on |= use.ends and (fills or self._is_much(queue))
        return True

    def _pop(self, queue: _Queue, n: int) -> IdArray:
        """Up to `n` of the blocks that are still there and not written."""
        blocks, chosen, count = self._shelf.blocks, [], 0
        while queue.parts and count < n:
            ids, births = queue.parts.popleft()
            if len(ids) > n - count:
                queue.parts.appendleft((ids[n - count :], births[n - count :]))
                ids, births = ids[: n - count], births[: n - count]
            queue.count -= len(ids)
            self.queued_bytes -= len(ids) * queue.namespace.slot_bytes
            same = (blocks.birth[ids] == births) & (blocks.state[ids] == BlockState.LIVE)
            same &= ~self._shelf.places.there(ids)  # where it may have gone meanwhile, by a copy
            self._unqueue(ids[~same], births[~same])
            chosen.append(ids[same])
            count += int(same.sum())
        queue.since_ms = self._shelf.now_ms
        return np.concatenate(chosen) if chosen else np.empty(0, np.uint32)

    def _write_batch(self, namespace: Namespace, use: Use, volume: Volume, ids: IdArray) -> None:
        shelf, unit = self._shelf, limits.GRANULE_BYTES
        granules = shelf.blocks.granule[ids]
        pool = shelf.memory.pool[: shelf.room.slabs.total_bytes].reshape(-1, unit)
        headers = pool[granules, : namespace.header_bytes]
        fields, stamps = fixed_fields(headers), stamps_of(headers)
        heads = head_granules(len(ids))
        places = use.next_granule + heads + np.arange(len(ids)) * use.slot_granules
        entries = np.zeros(len(ids), ENTRY)
        for name in ("key", "parent", "put_id", "position"):
            entries[name] = fields[name]
        entries["stamp"], entries["granule"] = stamps, places
        entries["expires_ms"] = shelf.deadlines.times[Due.EXPIRY][ids]
        head = pack_head(
            BatchHead(
                segment=use.segment,
                sequence=use.sequence,
                batch=use.batches,
                granule=use.next_granule,
                previous=use.last,
            ),
            entries,
        )
        births = shelf.blocks.birth[ids].copy()
        shelf.blocks.lease(ids)
        batch = _Batch(self._next_batch, namespace, use, ids, births, entries)
        self._next_batch += 1
        self.leased[batch.number] = ids
        self._flights.setdefault(use, deque()).append(batch)
        use.writing = True
        self._tokens -= len(ids) * namespace.slot_bytes + head.size
        offset = volume.offset(use, use.next_granule)
        self._desk.emit(
            lambda number: WriteBlocks(
                number=number,
                volume=volume.number,
                offset=offset,
                head=head,
                granules=granules,
                slot_granules=use.slot_granules,
                keys=entries["key"].copy(),
                stamps=stamps,
                layout=namespace.layout,
            ),
            functools.partial(self._batch_written, batch),
        )
        use.batches, use.last = use.batches + 1, checksum_of(head)
        use.next_granule = int(places[-1]) + use.slot_granules

    def _batch_written(self, batch: _Batch, outcome: Outcome) -> None:
        """Batches count in their order: after a crash none is found behind one that is missing."""
        batch.outcome, use = outcome, batch.use
        flights = self._flights[use]
        while flights and (known := flights[0].outcome) is not None:
            self._settle(flights.popleft(), known)
        if not flights:
            del self._flights[use]
            self._write_ended(use)

    def _settle(self, batch: _Batch, outcome: Outcome) -> None:
        namespace, use, ids, births = batch.namespace, batch.use, batch.ids, batch.births
        entries = batch.entries
        shelf, volume = self._shelf, self._shelf.places.volumes[use.volume]
        del self.leased[batch.number]
        same = (shelf.blocks.birth[ids] == births) & (shelf.blocks.state[ids] == BlockState.LIVE)
        self._queued[ids[same]] = _NOT_QUEUED
        shelf.free(shelf.blocks.release(ids))
        if outcome.error:
            use.torn = True
            self.stop(volume, f"a write failed: {outcome.error}")
            return
        if outcome.bad.any():
            use.torn = True
            self.let_go(use)
            self._drop_corrupted(ids[same & outcome.bad])
            same &= ~outcome.bad
        if use.torn:
            self._queue(namespace, ids[same], urgent=True)
            return
        use.written = int(entries["granule"][-1]) + use.slot_granules
        use.entries.append(entries)
        shelf.places.settle(
            ids[same], use, entries["granule"][same].copy(), entries["stamp"][same].copy()
        )
        gone = entries["granule"][~same].tolist()
        volume.forget([(use.segment, use.sequence, place) for place in gone])
        self.written.blocks += len(ids)
        payload = len(ids) * namespace.slot_bytes
        self.written.payload_bytes += payload
        self.written.nbytes += payload + head_granules(len(ids)) * limits.GRANULE_BYTES

    def _drop_corrupted(self, ids: IdArray) -> None:
        """What is in memory is not what was put: nobody may have it."""
        self._shelf.counters.corrupted += len(ids)
        self._shelf.policy.forget(ids)
        self._shelf.forget(ids, c.ExplainStatus.CORRUPTED)

    # -- segments ----------------------------------------------------------------------

    def _use_for(self, queue: _Queue) -> Use | None:
        """One that can be written now; None where one has to be waited for."""
        namespace = queue.namespace
        uses = self._open.setdefault(namespace.lineage, [])
        for use in uses:
            if self._takes(use):
                return use
        if not uses or self._is_much(queue):
            self._open_another(queue)
        return None

    def _is_much(self, queue: _Queue) -> bool:
        """Whether another segment is worth it."""
        return queue.count * queue.namespace.slot_bytes >= limits.NVME_WRITE_BYTES

    def _open_another(self, queue: _Queue, *, ahead: bool = False) -> None:
        """Begins a segment for the queue's lineage, unless enough of them go on for a while.
        ahead: before anything waits for it."""
        namespace, uses = queue.namespace, self._open.setdefault(queue.namespace.lineage, [])
        if sum(not use.ends for use in uses) >= self._streams or len(uses) >= 2 * self._streams:
            queue.goes_on = False
            return
        granules = namespace.slot_bytes // limits.GRANULE_BYTES
        volumes = [v for v in self._shelf.places.writable() if v.free and v.holds(granules)]
        if not volumes:
            (self.needed_ahead if ahead else self.needed).add(granules)
            return
        volume = max(volumes, key=lambda v: len(v.free) / v.geometry.n_segments)
        use = volume.begin(namespace.lineage, granules)
        use.writing = True
        uses.append(use)
        self._shelf.places.open(use)
        header = pack_segment_header(
            SegmentHeader(
                volume_id=volume.id,
                segment=use.segment,
                sequence=use.sequence,
                run=self._run,
                slot_granules=granules,
                name=namespace.name,
                layout=namespace.layout.encode(),
            )
        )
        use.header = use.last = checksum_of(header)
        # Synced, because what follows overwrites blocks that an older header still tells of.
        offset = volume.offset(use, 0)
        self._desk.emit(
            lambda number: WriteRaw(
                number=number, volume=volume.number, writes=((offset, header),), syncs_after=True
            ),
            functools.partial(self._opened, use),
        )
        self.written.nbytes += header.size

    @property
    def _streams(self) -> int:
        """Segments that one lineage is written to at a time: what lies in one place of a disk is
        read fastest, and all disks are to be busy."""
        return max(1, len(self._shelf.places.writable()))

    def _opened(self, use: Use, outcome: Outcome) -> None:
        volume = self._shelf.places.volumes[use.volume]
        if use.state is UseState.OPENING:
            use.state = UseState.OPEN
        self._write_ended(use)
        if outcome.error:
            self.stop(volume, f"a write failed: {outcome.error}")
        else:
            volume.opened(use)

    def _write_ended(self, use: Use) -> None:
        use.writing = False
        volume = self._shelf.places.volumes[use.volume]
        if use.state is UseState.OPEN and (use.torn or volume.health is not Health.OK):
            use.state = UseState.WHOLE

    def take_over(self, use: Use) -> None:
        """A use from before the start: it goes on where nothing of its lineage is open."""
        if use.state is UseState.OPEN:
            uses = self._open.setdefault(use.lineage, [])
            if len(uses) >= self._streams:
                use.state = UseState.WHOLE  # without a footer; the next start finds its heads again
            else:
                uses.append(use)

    def let_go(self, use: Use) -> None:
        """The use ends: nothing more is written to it."""
        uses = self._open.get(use.lineage, [])
        if use in uses:
            uses.remove(use)

    def forget(self, lineage: int) -> None:
        """The namespace was dropped: its queue is void, and the next block opens a segment."""
        queue = self._queues.pop(lineage, None)
        if queue:
            self._empty(queue)
        self._open.pop(lineage, None)

    def _close(self, use: Use, volume: Volume) -> None:
        use.state, use.writing = UseState.CLOSING, True
        self.let_go(use)
        footer = pack_footer(
            Footer(
                segment=use.segment,
                sequence=use.sequence,
                batches=use.batches,
                header=use.header,
                last=use.last,
            ),
            np.concatenate(use.entries),
        )
        offset = volume.offset(use, volume.geometry.footer_granule(use.slot_granules))
        self._desk.emit(
            lambda number: WriteRaw(
                number=number, volume=volume.number, writes=((offset, footer),), syncs_before=True
            ),
            functools.partial(self._closed, use),
        )
        self.written.nbytes += footer.size

    def _closed(self, use: Use, outcome: Outcome) -> None:
        use.entries = []
        if use.state is UseState.CLOSING:
            use.state = UseState.WHOLE
        self._write_ended(use)
        if outcome.error:
            self.stop(self._shelf.places.volumes[use.volume], f"a sync failed: {outcome.error}")
        else:
            use.synced = use.next_granule

    def stop(self, volume: Volume, why: str) -> None:
        """Nothing is written to the volume any more: a sync that failed says nothing of what it
        lost, and one that succeeds afterwards nothing either."""
        if volume.health is Health.OK:
            volume.health, volume.why = Health.DEGRADED, why
        for use in volume.uses.values():
            self.let_go(use)
            if use.state is UseState.OPEN and not use.writing:
                use.state = UseState.WHOLE

    # -- durability --------------------------------------------------------------------

    def sync(self) -> None:
        """Where it is wanted: one sync for all that was written up to now and is not synced."""
        if not self.sync_wanted:
            return
        pending = False
        for volume in self._shelf.places.writable():
            upto = {
                use: use.written
                for use in volume.uses.values()
                if use.written > use.synced and use.live
            }
            pending |= bool(upto) or any(use.writing for use in volume.uses.values())
            if upto and volume.number not in self._syncing:
                self._syncing.add(volume.number)
                self._desk.emit(
                    functools.partial(_sync_of, volume.number),
                    functools.partial(self._synced, volume, upto),
                )
        self.sync_wanted = pending

    def _synced(self, volume: Volume, upto: dict[Use, int], outcome: Outcome) -> None:
        self._syncing.discard(volume.number)
        if outcome.error:
            self.stop(volume, f"a sync failed: {outcome.error}")
            return
        for use, granule in upto.items():
            use.synced = max(use.synced, granule)


def _sync_of(volume: int, number: int) -> Sync:
    return Sync(number=number, volume=volume)


def _distinct(ids: IdArray) -> IdArray:
    """Each once, in the order of their first places."""
    _, first = np.unique(ids, return_index=True)
    found: IdArray = ids if len(first) == len(ids) else ids[np.sort(first)]
    return found
