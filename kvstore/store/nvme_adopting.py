"""How what a volume held before a restart comes into the store again."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.index.format import NVME_TIER
from kvstore.nvme.format import WHOLE_USE
from kvstore.nvme.recovery import RecoveredSegment, Survey, highest_sequence
from kvstore.nvme.volume import Health, Use, UseState
from kvstore.store.blocks import NO_GRANULE, IdArray
from kvstore.store.deadlines import Due
from kvstore.store.desk import Desk
from kvstore.store.forgetting import ForgetLog
from kvstore.store.namespaces import Namespace
from kvstore.store.nvme_leaving import NO_IDS
from kvstore.store.places import Copy
from kvstore.store.shelf import Shelf
from kvstore.store.unwanted import Lineage, Unwanted
from kvstore.store.writing import Writer


class Adopter:
    """Takes in what volumes tell, until each has told all.

    logs: where a volume's goes once it is known.
    """

    def __init__(
        self, shelf: Shelf, desk: Desk, writer: Writer, logs: dict[int, ForgetLog]
    ) -> None:
        self._shelf, self._desk, self._writer, self._logs = shelf, desk, writer, logs
        self._to_recover = len(shelf.places.volumes)
        self._surveys: dict[int, Survey] = {}
        self._unwanted = Unwanted()

    @property
    def busy(self) -> bool:
        """Whether some of what was there before may still come in."""
        return self._to_recover > 0

    def drop(self, namespace: Namespace, hashes: c.U8) -> None:
        """These keys do not come in any more."""
        if self._to_recover:
            self._unwanted.add(_whose(namespace), hashes)

    def drop_namespace(self, namespace: Namespace) -> None:
        """None of its blocks comes in any more."""
        if self._to_recover:
            self._unwanted.add_all(_whose(namespace))

    def found(self, number: int, survey: Survey) -> None:
        """What is known of a volume before its segments are read."""
        volume = self._shelf.places.volumes[number]
        volume.next_sequence = highest_sequence(survey) + 1
        records = survey.log.records
        columns = (records[name].tolist() for name in ("segment", "sequence", "granule"))
        volume.found(
            [(use.header.segment, use.header.sequence) for use in survey.uses],
            [problem.segment for problem in survey.problems],
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
        if self._unwanted.has_all(_whose(namespace)):
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
            written=segment.next_granule,
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
        unwanted = self._unwanted.among(_whose(namespace), keys)
        self._forget_entries(use, entries[unwanted])
        entries, keys = entries[~unwanted], keys[~unwanted]
        if len(keys):
            known = shelf.catalog.find(namespace.id, keys)
            twice = known >= 0
            until_ms = shelf.deadlines.times[Due.EXPIRY][known[twice]]
            serve = (until_ms == entries["expires_ms"][twice]).tolist()
            rows = zip(np.flatnonzero(twice).tolist(), known[twice].tolist(), serve, strict=True)
            for i, block, serves in rows:
                copy = Copy(namespace.id, use, entries[i : i + 1].copy(), serves)
                shelf.places.add_copy(block, copy)
            entries, keys = entries[~twice], keys[~twice]
        n = min(len(entries), shelf.blocks.n_free)
        self._forget_entries(use, entries[n:])
        entries, keys = entries[:n], keys[:n]
        if not n:
            return NO_IDS
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

    def show_heirs(self) -> None:
        """What is there in another place goes on by itself; the one that lives longest first."""
        shelf = self._shelf
        while heirs := shelf.places.heirs:
            shelf.places.heirs = []
            heirs.sort(key=lambda copy: (copy.expires_ms > 0, -copy.expires_ms))
            for copy in heirs:
                if shelf.namespaces.known(copy.namespace):
                    self._show(shelf.namespaces.get(copy.namespace), copy.use, copy.entry)

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

    def recovered(self, number: int, error: str) -> None:
        """See `NvmeTier.recovered`."""
        volume = self._shelf.places.volumes[number]
        self._to_recover -= 1
        if error:
            volume.health, volume.why = Health.OFF, error
        elif survey := self._surveys.pop(number, None):
            for problem in survey.problems:
                # Of an unknown use nobody knows the sequence, but it is below all that come.
                unknown = volume.next_sequence - 1
                volume.leave_unread(problem.segment, problem.sequence or unknown)
            if any(problem.sequence is None for problem in survey.problems):
                volume.set_floor()
                self._logs[number].want(volume.floor_at)
        if not self._to_recover:
            self._unwanted = Unwanted()


def _whose(namespace: Namespace) -> Lineage:
    """By name: a namespace without blocks may be closed meanwhile, and get another number."""
    return namespace.name, namespace.layout.encode()


def _last_of_each(keys: c.U8) -> npt.NDArray[np.bool_]:
    """Which of the keys (n, 32) do not come again: bool (n,)."""
    rows = keys[::-1].copy().view(f"V{limits.KEY_BYTES}").ravel()
    last = np.zeros(len(keys), np.bool_)
    last[len(keys) - 1 - np.unique(rows, return_index=True)[1]] = True
    return last


def _keys_of(entries: npt.NDArray[np.void]) -> c.U8:
    """Their keys: (n, 32)."""
    return np.ascontiguousarray(entries["key"]).view(np.uint8).reshape(-1, limits.KEY_BYTES)
