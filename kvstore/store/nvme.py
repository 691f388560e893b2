"""The NVMe tier of a store: what is written, read back, given up, found again after a restart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.nvme.format import WHOLE_USE
from kvstore.nvme.ops import Op, Outcome
from kvstore.nvme.recovery import RecoveredSegment, Survey
from kvstore.nvme.volume import Health, Volume
from kvstore.store.blocks import IdArray
from kvstore.store.desk import Desk
from kvstore.store.fetching import Fetcher
from kvstore.store.namespaces import Namespace
from kvstore.store.nvme_adopting import Adopter
from kvstore.store.nvme_calls import Calls
from kvstore.store.nvme_leaving import NO_IDS, Leaving
from kvstore.store.nvme_scrubbing import Scrubber
from kvstore.store.shelf import Shelf
from kvstore.store.tickets import Deferred, Tickets
from kvstore.store.writing import Writer

_NO_HEALTH = 3


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
        self._scrubber = Scrubber(shelf, self._fetcher, bytes_per_s=policy.scrub_bytes_per_s)
        self._leaving = Leaving(shelf, self._writer, self._fetcher)
        self._adopter = Adopter(shelf, self._desk, self._writer, self._leaving.logs)
        self._calls = Calls(
            shelf,
            self.tickets,
            writer=self._writer,
            fetcher=self._fetcher,
            leaving=self._leaving,
            adopter=self._adopter,
        )

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
        if self._may_write:
            times += [self._writer.next_due_ms, self._scrubber.due_ms]
        return min((t for t in times if t is not None), default=None)

    @property
    def _may_write(self) -> bool:
        """Whether all is found, and the logs say what they must before a segment is used."""
        return not self._adopter.busy and self._leaving.floors_said

    def pump(self) -> None:
        """Does all that can be done now."""
        places, ready = self._shelf.places, self._may_write
        if places.wishes:
            wishes, places.wishes = places.wishes, []
            self._writer.wish(np.concatenate(wishes))
        if ready:
            self._writer.pump()
            if self._writer.needed or self._writer.needed_ahead:
                self._leaving.make_room()
        if self._leaving.settle() and ready:
            self._writer.pump()
        self._adopter.show_heirs()
        if not self._adopter.busy:
            self._leaving.write_logs()
        if ready:
            self._scrubber.look()
        self.tickets.look(self._shelf.now_ms)
        if ready:
            self._writer.sync()  # of what those who wait have found written
        self._calls.bring_ahead()
        self._adopter.show_heirs()  # of what made room for reads just now

    def flush(self) -> None:
        """Everything that waits to be written is written at once."""
        self._writer.flush()
        self.pump()

    # -- calls -------------------------------------------------------------------------

    def fetch(self, connection: int, command: c.Fetch) -> c.Result | Deferred:
        """See `commands.Fetch`."""
        return self._calls.fetch(connection, command)

    def persist(self, connection: int, command: c.Persist) -> c.Result | Deferred:
        """See `commands.Persist`."""
        return self._calls.persist(connection, command)

    def forgotten(self, connection: int, count: c.Count) -> c.Result | Deferred:
        """The answer to a drop: it waits until a restart cannot bring the blocks back."""
        return self._calls.forgotten(connection, count)

    def bring(self, namespace: Namespace, ids: IdArray) -> None:
        """Blocks, in chain order, will be read soon."""
        self._calls.bring(namespace, ids)

    def drop(self, namespace: Namespace, hashes: c.U8) -> None:
        """These keys are about to be dropped: what a volume has of them and did not tell yet as
        well, and what was just to be shown in the place of others."""
        self._adopter.show_heirs()
        self._adopter.drop(namespace, hashes)

    def show_heirs(self) -> None:
        """Namespaces are about to be closed that have no blocks: some may be just to be shown."""
        self._adopter.show_heirs()

    def drop_namespace(self, namespace: Namespace) -> None:
        """All of its segments are over; before its blocks are forgotten one by one."""
        self._adopter.show_heirs()
        places = self._shelf.places
        for volume in places.volumes:
            for use in list(volume.uses.values()):
                if use.lineage == namespace.lineage:
                    volume.forget([(use.segment, use.sequence, WHOLE_USE)])
                    places.leave(places.in_use(use), forgotten=False)
                    self._leaving.leave(use, NO_IDS)
        self._writer.forget(namespace.lineage)
        self._adopter.drop_namespace(namespace)

    # -- after a restart ---------------------------------------------------------------

    def found(self, number: int, survey: Survey) -> None:
        """What is known of a volume before its segments are read."""
        self._adopter.found(number, survey)

    def adopt(self, number: int, segment: RecoveredSegment) -> int:
        """Shows what a segment holds; returns how many blocks. Newer segments come first."""
        return self._adopter.adopt(number, segment)

    def recovered(self, number: int, error: str = "") -> None:
        """A volume has told all that it holds. error: why it could not; it is not used then."""
        self._adopter.recovered(number, error)
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
            "nvme_ready": int(not self._adopter.busy),
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
