"""The NVMe tier of a store: what is written, read back, given up, found again after a restart."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.nvme.format import WHOLE_USE
from kvstore.nvme.ops import Op, Outcome
from kvstore.nvme.recovery import RecoveredSegment, Survey, highest_sequence
from kvstore.nvme.volume import Health, Use, UseState, Volume
from kvstore.store.blocks import NO_GRANULE, BlockState, IdArray
from kvstore.store.checks import check_hashes
from kvstore.store.deadlines import Due
from kvstore.store.desk import Desk
from kvstore.store.fetching import Fetcher
from kvstore.store.forgetting import Ending, ForgetLog
from kvstore.store.namespaces import Namespace
from kvstore.store.shelf import NVME_TIER, Shelf
from kvstore.store.tickets import Deferred, Tickets
from kvstore.store.unwanted import Unwanted
from kvstore.store.writing import Writer

_NO_HEALTH = 3
_NO_IDS = np.empty(0, np.uint32)


@dataclass(frozen=True, slots=True, kw_only=True)
class NvmePolicy:
    """What is written to NVMe, and how much of the disks that may take.

    every: all blocks that are stored, not only those that were read again. bytes_per_s: for blocks
    that nobody waits for; 0: all there is. scrub_bytes_per_s: for looking at what lies there; 0:
    none. broken: whether a volume is meant to be there that cannot be used.
    """

    every: bool = False
    bytes_per_s: int = 0
    scrub_bytes_per_s: int = 0
    broken: bool = False


class NvmeTier:
    """Decides; the operations that it gives out are carried out by others.

    Until `recovered`, what was there before may still come in, and nothing is written.
    """

    def __init__(self, shelf: Shelf, policy: NvmePolicy, *, run: int) -> None:
        self._shelf, self._policy = shelf, policy
        self._desk, self.tickets = Desk(), Tickets()
        self._writer = Writer(shelf, self._desk, bytes_per_s=policy.bytes_per_s, run=run)
        self._fetcher = Fetcher(shelf, self._desk)
        self._logs: dict[int, ForgetLog] = {}
        self._again: dict[Use, IdArray] = {}  # of uses that make room: what is kept
        self._to_recover = len(shelf.places.volumes)
        self._surveys: dict[int, Survey] = {}
        self._unwanted = Unwanted()
        # The oldest is forgotten: it is advice, and more would be another queue without end.
        self._ahead: deque[tuple[Namespace, IdArray, npt.NDArray[np.uint32]]] = deque(
            maxlen=limits.MAX_PREFETCHES
        )
        self._scrub_use: Use | None = None
        self._scrub_left = _NO_IDS
        self._scrub_at_ms = shelf.now_ms

    # -- what others carry out ---------------------------------------------------------

    def take_ops(self) -> list[Op]:
        """What is to be done now."""
        return self._desk.take()

    def hear(self, outcome: Outcome) -> None:
        """What came of an operation."""
        self._desk.hear(outcome)
        self.pump()

    @property
    def volumes(self) -> tuple[Volume, ...]:
        """Their books."""
        return self._shelf.places.volumes

    @property
    def under_way(self) -> int:
        """Operations that are not over."""
        return self._desk.under_way

    @property
    def next_due_ms(self) -> int | None:
        """When `pump` has something to do, if nothing else happens."""
        times = [self.tickets.next_due_ms]
        if not self._to_recover:
            times += [self._writer.next_due_ms, self._scrub_due_ms()]
        return min((t for t in times if t is not None), default=None)

    def pump(self) -> None:
        """Does all that can be done now."""
        places = self._shelf.places
        if places.wishes:
            wishes, places.wishes = places.wishes, []
            self._writer.wish(np.concatenate(wishes))
        if not self._to_recover:
            self._writer.pump()
            if self._writer.needed:
                self._make_room()
        self._settle_uses()
        if not self._to_recover:
            self._write_logs()
            self._scrub()
        self.tickets.look(self._shelf.now_ms)
        if not self._to_recover:
            self._writer.sync()  # of what those who wait have found written
        if self._ahead:
            self._bring_ahead()

    def _write_logs(self) -> None:
        for number, log in self._logs.items():
            if ends := log.pump():
                self._end_for_log(self._shelf.places.volumes[number], ends)
                log.pump()

    def flush(self) -> None:
        """Everything that waits to be written is written at once."""
        self._writer.flush()
        self.pump()

    # -- calls -------------------------------------------------------------------------

    def fetch(self, connection: int, command: c.Fetch) -> c.Result | Deferred:
        """See `commands.Fetch`."""
        shelf = self._shelf
        namespace = shelf.namespaces.get(command.namespace)
        _check(command)
        found = shelf.catalog.find(command.namespace, command.hashes)
        missing = np.flatnonzero(found < 0)
        ids = (found[: missing[0]] if len(missing) else found).astype(np.uint32)
        births = shelf.blocks.birth[ids].copy()
        first = self._in_memory(ids, births)

        if not command.wait_ms:
            self.bring(namespace, ids)
            return c.Count(blocks=first)

        def poll(last: bool) -> c.Count | None:
            count = self._in_memory(ids, births)
            comes = self._bring(namespace, ids, births, count)
            return c.Count(blocks=count) if count > first or last or not comes else None

        return self.tickets.ask(
            connection, poll, due_ms=shelf.now_ms + command.wait_ms, now_ms=shelf.now_ms
        )

    def _in_memory(self, ids: IdArray, births: npt.NDArray[np.uint32]) -> int:
        """How many leading ones are."""
        blocks = self._shelf.blocks
        there = (blocks.birth[ids] == births) & (blocks.state[ids] == BlockState.LIVE)
        return len(ids) if there.all() else int(there.argmin())

    def _bring(
        self, namespace: Namespace, ids: IdArray, births: npt.NDArray[np.uint32], count: int
    ) -> bool:
        """Has more of them read, as there is room; whether the first that is missing may come."""
        blocks = self._shelf.blocks
        gone = np.flatnonzero(blocks.birth[ids] != births)
        rest = ids[count : gone[0] if len(gone) else None]
        if not len(rest):
            return False
        cold = np.unique(rest[blocks.state[rest] == BlockState.COLD], return_index=True)[1]
        cold_ids = rest[blocks.state[rest] == BlockState.COLD][np.sort(cold)]
        if len(cold_ids):
            live = ids[:count]
            self._fetcher.fetch(namespace, cold_ids, keep=live)
        state = blocks.state[rest[0]]
        # One that is cold still waits for room, which others' reads that end may leave.
        waits = state == BlockState.COLD and self._fetcher.bytes_coming > 0
        return bool(state in (BlockState.COMING, BlockState.LIVE) or waits)

    def persist(self, connection: int, command: c.Persist) -> c.Result | Deferred:
        """See `commands.Persist`."""
        shelf = self._shelf
        shelf.namespaces.get(command.namespace)
        _check(command)
        found = shelf.catalog.find(command.namespace, command.hashes)
        known = np.flatnonzero(found >= 0)
        ids = found[known].astype(np.uint32)
        births = shelf.blocks.birth[ids].copy()
        self._writer.wish(ids, urgent=True)

        def poll(last: bool) -> c.Persisted | None:
            alive = (shelf.blocks.birth[ids] == births) & shelf.blocks.in_index(ids)
            durable = alive & shelf.places.durable(ids)
            open_ = alive & ~durable
            # Such a block may have lost its place to others since it was written.
            self._writer.wish(ids[open_], urgent=True)
            hope = (self._writer.waits(ids) | self._may_be_synced(ids)) & bool(
                shelf.places.writable()
            )
            comes = ids[open_ & hope]
            if len(comes) and not last:
                # One sync for all of them: when the last is written.
                self._writer.sync_wanted |= not self._writer.waits(comes).any()
                return None
            answer = np.zeros(len(command.hashes), np.uint8)
            answer[known] = durable
            return c.Persisted(durable=answer)

        return self.tickets.ask(
            connection, poll, due_ms=shelf.now_ms + command.wait_ms, now_ms=shelf.now_ms
        )

    def _may_be_synced(self, ids: IdArray) -> npt.NDArray[np.bool_]:
        places = self._shelf.places
        result = places.there(ids)
        for use, mine in places.by_use(ids[result]):
            if places.volumes[use.volume].health is not Health.OK:
                result[np.isin(ids, mine)] = False
        return result

    def bring(self, namespace: Namespace, ids: IdArray) -> None:
        """Blocks, in chain order, will be read soon."""
        cold = ids[self._shelf.blocks.state[ids] == BlockState.COLD]
        if len(cold):
            self._ahead.append((namespace, ids, self._shelf.blocks.birth[ids].copy()))
            self._bring_ahead()

    def _bring_ahead(self) -> None:
        """Goes on with what was asked for ahead of need, as there is room for it."""
        blocks = self._shelf.blocks
        while self._ahead:
            namespace, ids, births = self._ahead[0]
            ids = ids[blocks.birth[ids] == births]
            _, first = np.unique(ids, return_index=True)
            ids = ids[np.sort(first)]
            cold = ids[blocks.state[ids] == BlockState.COLD]
            begun = self._fetcher.fetch(namespace, cold, keep=self._shelf.live(ids))
            if begun < len(cold):
                if not self._fetcher.bytes_coming:
                    self._ahead.popleft()  # there is no room, and none will come by itself
                break
            self._ahead.popleft()

    def forgotten(self, connection: int, count: c.Count) -> c.Result | Deferred:
        """The answer to a drop: it waits until a restart cannot bring the blocks back."""
        volumes = self._shelf.places.volumes
        due_ms = self._shelf.now_ms + limits.MAX_FORGET_MS
        batches = set(self._writer.leased)  # that may have dropped blocks in them
        upto: dict[int, int] | None = None

        def poll(last: bool) -> c.Count | None:
            nonlocal upto
            if last:
                return count
            if self._to_recover or batches & self._writer.leased.keys():
                return None
            if upto is None:
                for volume in volumes:
                    volume.forget_unread()
                upto = {number: volumes[number].n_forgotten for number in self._logs}
                self._write_logs()
            settled = all(log.settled(upto[number]) for number, log in self._logs.items())
            return count if settled else None

        return self.tickets.ask(connection, poll, due_ms=due_ms, now_ms=self._shelf.now_ms)

    def drop(self, namespace: Namespace, hashes: c.U8) -> None:
        """These keys are dropped: what a volume has of them and did not tell yet as well."""
        if self._to_recover:
            self._unwanted.add(namespace.lineage, hashes)

    def drop_namespace(self, namespace: Namespace) -> None:
        """All of its segments are over; before its blocks are forgotten one by one."""
        places = self._shelf.places
        for volume in places.volumes:
            for use in list(volume.uses.values()):
                if use.lineage == namespace.lineage:
                    volume.forget([(use.segment, use.sequence, WHOLE_USE)])
                    places.leave(places.in_use(use), forgotten=False)
                    self._leave(use, _NO_IDS)
        self._writer.forget(namespace.lineage)
        if self._to_recover:
            self._unwanted.add_all(namespace.lineage)

    # -- segments that make room -------------------------------------------------------

    def _make_room(self) -> None:
        """The oldest segment gives its place; what of it was read goes on elsewhere."""
        if self._again:
            return
        needed = self._writer.needed
        volumes = [v for v in self._shelf.places.writable() if any(map(v.holds, needed))]
        oldest = [use for volume in volumes if (use := volume.oldest())]
        if oldest:
            self._leave_with_care(min(oldest, key=lambda use: use.sequence))

    def _end_for_log(self, volume: Volume, ends: set[Ending]) -> None:
        """Uses of which the log would have to say too much end, so that one record is enough."""
        for segment, sequence in ends:
            use = volume.uses.get(segment)
            if use is None or use.sequence != sequence:
                volume.forget([(segment, sequence, WHOLE_USE)])
            elif use not in self._again:
                self._leave_with_care(use)
        self._settle_uses()

    def _leave_with_care(self, use: Use) -> None:
        """What of the use was read is brought into memory, to be written again elsewhere."""
        shelf = self._shelf
        ids = shelf.places.in_use(use)
        most = -(-len(ids) // limits.NVME_AGAIN_SHARE)
        chosen = ids[shelf.places.reread(ids)][:most]
        self._leave(use, chosen)
        cold = chosen[shelf.blocks.state[chosen] == BlockState.COLD]
        if len(cold):
            namespace = shelf.namespaces.get(int(shelf.blocks.namespace[cold[0]]))
            self._fetcher.fetch(namespace, cold)

    def _leave(self, use: Use, chosen: IdArray) -> None:
        self._writer.let_go(use)
        use.state = UseState.LEAVING
        self._again[use] = chosen

    def _settle_uses(self) -> None:
        """Ends the uses that nobody reads or writes any more, and gives up volumes that fail."""
        freed = False
        for volume in self._shelf.places.volumes:
            if volume.health is Health.OFF:
                for use in [u for u in volume.uses.values() if u not in self._again]:
                    self._leave(use, _NO_IDS)
        for use in self._shelf.places.take_emptied():
            if use.state is UseState.WHOLE and use not in self._again:
                self._leave(use, _NO_IDS)
        for use, chosen in list(self._again.items()):
            if not use.reads and not use.writing:
                del self._again[use]
                self._end(use, chosen)
                freed = True
        if freed and not self._to_recover:
            self._writer.pump()

    def _end(self, use: Use, chosen: IdArray) -> None:
        shelf = self._shelf
        ids = shelf.places.in_use(use)
        live = shelf.blocks.state[ids] == BlockState.LIVE
        again = ids[live & np.isin(ids, chosen)]
        shelf.lose_cold(ids[~live], forgotten=False)
        shelf.places.leave(ids[live], forgotten=False)
        shelf.places.close(use)
        shelf.places.volumes[use.volume].end(use)
        if len(again):
            self._writer.wish(again, again=True)

    # -- scrubbing ---------------------------------------------------------------------

    def _scrub_due_ms(self) -> int | None:
        if not self._policy.scrub_bytes_per_s:
            return None
        if self._fetcher.scrubs or self._fetcher.bytes_coming:
            return None  # one at a time, and reads that somebody waits for come first
        return self._scrub_at_ms if any(v.uses for v in self._shelf.places.volumes) else None

    def _scrub(self) -> None:
        """Looks at some blocks, segment after segment, as its share of the disks allows."""
        shelf = self._shelf
        due_ms = self._scrub_due_ms()
        if due_ms is None or shelf.now_ms < due_ms:
            return
        if not len(self._scrub_left):
            self._scrub_use = self._next_to_scrub()
            if self._scrub_use is None:
                self._scrub_at_ms = shelf.now_ms + 60_000
                return
            self._scrub_left = shelf.places.in_use(self._scrub_use)
        use = self._scrub_use
        assert use is not None
        mine = np.isin(self._scrub_left, shelf.places.in_use(use))
        left = self._scrub_left[mine]
        size = use.slot_granules * limits.GRANULE_BYTES
        n = max(1, limits.NVME_READ_BYTES // size)
        some, self._scrub_left = left[:n], left[n:]
        self._scrub_at_ms = shelf.now_ms + max(
            limits.NVME_SCRUB_MS, len(some) * size * 1000 // self._policy.scrub_bytes_per_s
        )
        if len(some) and use.state is UseState.WHOLE:
            namespace = shelf.namespaces.get(int(shelf.blocks.namespace[some[0]]))
            self._fetcher.scrub(namespace, shelf.places.volumes[use.volume], some)

    def _next_to_scrub(self) -> Use | None:
        """The whole segment behind the last one, in the order of their use; then the first."""
        last = self._scrub_use.sequence if self._scrub_use else 0
        uses = [
            use
            for volume in self._shelf.places.volumes
            if volume.health is not Health.OFF
            for use in volume.uses.values()
            if use.state is UseState.WHOLE
        ]
        behind = [use for use in uses if use.sequence > last]
        return min(behind or uses, key=lambda use: use.sequence, default=None)

    # -- after a restart ---------------------------------------------------------------

    def found(self, number: int, survey: Survey) -> None:
        """What is known of a volume before its segments are read."""
        volume = self._shelf.places.volumes[number]
        volume.next_sequence = highest_sequence(survey) + 1
        records = survey.log.records
        columns = (records[name].tolist() for name in ("segment", "sequence", "granule"))
        volume.found(
            [(use.header.segment, use.header.sequence) for use in survey.uses],
            zip(*columns, strict=True),
        )
        self._surveys[number] = survey
        self._logs[number] = ForgetLog(
            volume,
            self._desk,
            half=survey.log.half,
            next_epoch=survey.log.next_epoch,
            on_error=self._writer.stop,
        )

    def adopt(self, number: int, segment: RecoveredSegment) -> int:
        """Shows what a segment holds; returns how many blocks. Newer segments come first."""
        shelf = self._shelf
        volume = shelf.places.volumes[number]
        if segment.segment not in volume.free or volume.health is Health.OFF:
            return 0
        try:
            namespace = self._namespace_of(segment)
        except InvalidArgument:  # blocks that this pool cannot hold, so that none is ever dropped
            return 0
        if namespace is None:
            volume.leave_unread(segment.segment, segment.sequence)
            return 0
        if self._unwanted.has_all(namespace.lineage):
            volume.forget([(segment.segment, segment.sequence, WHOLE_USE)])
            return 0
        volume.free.remove(segment.segment)
        use = Use(
            number,
            segment.segment,
            segment.sequence,
            namespace.lineage,
            segment.slot_granules,
            state=UseState.WHOLE if segment.whole else UseState.OPEN,
            next_granule=segment.next_granule,
            batches=segment.batches,
            header=segment.header,
            last=segment.last,
            synced=segment.next_granule,  # what is read after a disk was opened is durable
        )
        volume.uses[segment.segment] = use
        shelf.places.open(use)
        # Of a key that was put anew before its first block was found, the later one comes first.
        last = _last_of_each(_keys_of(segment.entries))
        ids = self._show(namespace, use, segment.entries[last])
        self._show(namespace, use, segment.entries[~last])
        if not segment.whole:
            use.entries = [segment.entries]
            self._writer.take_over(use)
        return len(ids)

    def _namespace_of(self, segment: RecoveredSegment) -> Namespace | None:
        """None where there is no place for one more, or its slots have another size now."""
        shelf = self._shelf
        total = shelf.room.slabs.total_bytes
        namespace = shelf.namespaces.open(segment.name, segment.layout, total)
        if namespace and namespace.slot_bytes != segment.slot_granules * limits.GRANULE_BYTES:
            return None
        return namespace

    def _show(self, namespace: Namespace, use: Use, entries: npt.NDArray[np.void]) -> IdArray:
        shelf = self._shelf
        expires = entries["expires_ms"]
        entries = entries[(expires == 0) | (expires > shelf.now_ms)]
        keys = _keys_of(entries)
        unwanted = self._unwanted.among(namespace.lineage, keys)
        self._forget_entries(use, entries[unwanted])
        entries, keys = entries[~unwanted], keys[~unwanted]
        if len(keys):
            known = shelf.catalog.find(namespace.id, keys)
            twice = known >= 0
            ids = known[twice].astype(np.uint32)
            shelf.places.add_copies(
                ids,
                use,
                entries["granule"][twice],
                entries["stamp"][twice],
                serve=shelf.deadlines.times[Due.EXPIRY][ids] == entries["expires_ms"][twice],
            )
            entries, keys = entries[~twice], keys[~twice]
        n = min(len(entries), shelf.blocks.n_free)
        self._forget_entries(use, entries[n:])
        entries, keys = entries[:n], keys[:n]
        if not n:
            return _NO_IDS
        ids = shelf.blocks.take_without_slots(n)
        shelf.lose(shelf.catalog.make_room(n))
        shown = shelf.catalog.insert(
            keys,
            namespace=namespace.id,
            length=namespace.layout.block_bytes,
            tier=NVME_TIER,
            ids=ids,
            granules=np.full(n, NO_GRANULE, np.uint32),
            generations=np.zeros(n, np.uint64),
        )
        shelf.blocks.give_back(ids[~shown])
        self._forget_entries(use, entries[~shown])
        ids, keys, entries = ids[shown], keys[shown], entries[shown]
        shelf.blocks.appear_cold(ids, namespace.id)
        shelf.blocks.put_id[ids] = entries["put_id"]
        namespace.blocks += len(ids)
        shelf.places.settle(ids, use, entries["granule"].copy(), entries["stamp"].copy())
        self._link(namespace, ids, entries)
        for each in np.unique(entries["expires_ms"]).tolist():
            if each:
                shelf.deadlines.set(Due.EXPIRY, ids[entries["expires_ms"] == each], each)
        return ids

    def _forget_entries(self, use: Use, entries: npt.NDArray[np.void]) -> None:
        """They are not shown, and must not be in the next life either."""
        granules = entries["granule"].tolist()
        volume = self._shelf.places.volumes[use.volume]
        volume.forget([(use.segment, use.sequence, granule) for granule in granules])

    def _link(self, namespace: Namespace, ids: IdArray, entries: npt.NDArray[np.void]) -> None:
        parents = np.ascontiguousarray(entries["parent"]).view(np.uint8)
        parents = parents.reshape(-1, limits.KEY_BYTES)
        some = np.flatnonzero(parents.any(axis=1))
        if len(some):
            found = self._shelf.catalog.find(namespace.id, parents[some])
            known = (found >= 0) & (found != ids[some])
            self._shelf.blocks.link_cold(ids[some[known]], found[known].astype(np.uint32))

    def recovered(self, number: int, error: str = "") -> None:
        """A volume has told all that it holds. error: why it could not; it is not used then."""
        volume = self._shelf.places.volumes[number]
        self._to_recover -= 1
        if error:
            volume.health, volume.why = Health.OFF, error
        elif survey := self._surveys.pop(number, None):
            for problem in survey.problems:
                # Of an unknown use nobody knows the sequence, but it is below all that come.
                unknown = volume.next_sequence - 1
                volume.leave_unread(problem.segment, problem.sequence or unknown)
        if not self._to_recover:
            self._unwanted = Unwanted()
        self.pump()

    # -- counters ----------------------------------------------------------------------

    @property
    def health(self) -> int:
        """The worst volume's, 3 without any."""
        if self._policy.broken:
            return int(Health.OFF)
        return max((int(v.health) for v in self._shelf.places.volumes), default=_NO_HEALTH)

    def gauges(self) -> dict[str, int]:
        """The tier's part of `commands.Stats`."""
        volumes: Sequence[Volume] = self._shelf.places.volumes
        written = self._writer.written
        uses = [use for volume in volumes for use in volume.uses.values()]
        return {
            "nvme_blocks": sum(use.live for use in uses),
            "nvme_used_bytes": sum(
                use.live * use.slot_granules * limits.GRANULE_BYTES for use in uses
            ),
            "nvme_total_bytes": sum(volume.geometry.nbytes for volume in volumes),
            "nvme_health": self.health,
            "nvme_ready": int(not self._to_recover),
            "nvme_queued_bytes": self._writer.queued_bytes,
            "nvme_written_blocks": written.blocks,
            "nvme_written_bytes": written.nbytes,
            "nvme_payload_bytes": written.payload_bytes,
            "nvme_again_blocks": written.again,
            "nvme_refused_blocks": written.refused,
            "nvme_scrubbed_blocks": self._fetcher.scrubbed_blocks,
        }

    def leases(self) -> npt.NDArray[np.uint32]:
        """How many of each block's leases are the tier's own; for `check`."""
        counts = np.zeros_like(self._shelf.blocks.leases)
        for ids in (self._writer.leased, self._fetcher.leased):
            for some in ids.values():
                np.add.at(counts, some, 1)
        return counts


def _last_of_each(keys: c.U8) -> npt.NDArray[np.bool_]:
    """Which of the keys (n, 32) do not come again: bool (n,)."""
    rows = keys[::-1].copy().view(f"V{limits.KEY_BYTES}").ravel()
    last = np.zeros(len(keys), np.bool_)
    last[len(keys) - 1 - np.unique(rows, return_index=True)[1]] = True
    return last


def _keys_of(entries: npt.NDArray[np.void]) -> c.U8:
    """Their keys: (n, 32)."""
    return np.ascontiguousarray(entries["key"]).view(np.uint8).reshape(-1, limits.KEY_BYTES)


def _check(command: c.Fetch | c.Persist) -> None:
    check_hashes(command.hashes)
    if not 0 <= command.wait_ms <= limits.MAX_DEADLINE_MS:
        raise InvalidArgument("wait_ms", f"0 to {limits.MAX_DEADLINE_MS} ms, please")
