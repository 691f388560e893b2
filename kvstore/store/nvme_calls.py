"""Calls to the NVMe tier that are answered once blocks are read, written or forgotten for good."""

from __future__ import annotations

from collections import deque

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.nvme.volume import Health
from kvstore.store.blocks import BlockState, IdArray
from kvstore.store.checks import check_hashes
from kvstore.store.fetching import Fetcher
from kvstore.store.namespaces import Namespace
from kvstore.store.nvme_adopting import Adopter
from kvstore.store.nvme_leaving import Leaving
from kvstore.store.shelf import Shelf
from kvstore.store.tickets import Deferred, Tickets
from kvstore.store.writing import Writer


class Calls:
    """Has done what calls need, and says when they are answered; and reads ahead of need."""

    def __init__(
        self,
        shelf: Shelf,
        tickets: Tickets,
        *,
        writer: Writer,
        fetcher: Fetcher,
        leaving: Leaving,
        adopter: Adopter,
    ) -> None:
        self._shelf, self._tickets = shelf, tickets
        self._writer, self._fetcher = writer, fetcher
        self._leaving, self._adopter = leaving, adopter
        # The oldest is forgotten: it is advice, and more would be another queue without end.
        self._ahead: deque[tuple[Namespace, IdArray, npt.NDArray[np.uint32]]] = deque(
            maxlen=limits.MAX_PREFETCHES
        )

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

        return self._tickets.ask(
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
        awaited = np.arange(0)  # which of them was the last to be written, when this last looked

        def poll(last: bool) -> c.Persisted | None:
            nonlocal awaited
            still = shelf.blocks.birth[ids[awaited]] == births[awaited]
            if not last and (still & self._writer.waits(ids[awaited])).any():
                return None
            alive = (shelf.blocks.birth[ids] == births) & shelf.blocks.in_index(ids)
            durable = alive & shelf.places.durable(ids)
            open_ = alive & ~durable
            # Such a block may have lost its place to others since it was written.
            self._writer.wish(ids[open_], urgent=True)
            hope = (self._writer.waits(ids) | self._may_be_synced(ids)) & bool(
                shelf.places.writable()
            )
            comes = open_ & hope
            if comes.any() and not last:
                awaited = np.flatnonzero(comes & self._writer.waits(ids))[-1:]
                # One sync for all of them: when the last is written.
                self._writer.sync_wanted |= not len(awaited)
                return None
            answer = np.zeros(len(command.hashes), np.uint8)
            answer[known] = durable
            return c.Persisted(durable=answer)

        return self._tickets.ask(
            connection, poll, due_ms=shelf.now_ms + command.wait_ms, now_ms=shelf.now_ms
        )

    def _may_be_synced(self, ids: IdArray) -> npt.NDArray[np.bool_]:
        places = self._shelf.places
        result = places.there(ids)
        if len(places.writable()) == len(places.volumes):
            return result
        for use, mine in places.by_use(ids[result]):
            if places.volumes[use.volume].health is not Health.OK:
                result[np.isin(ids, mine)] = False
        return result

    def bring(self, namespace: Namespace, ids: IdArray) -> None:
        """Blocks, in chain order, will be read soon."""
        cold = ids[self._shelf.blocks.state[ids] == BlockState.COLD]
        if len(cold):
            self._ahead.append((namespace, ids, self._shelf.blocks.birth[ids].copy()))
            self.bring_ahead()

    def bring_ahead(self) -> None:
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
            if self._adopter.busy or batches & self._writer.leased.keys():
                return None
            if upto is None:
                for volume in volumes:
                    volume.forget_unread()
                upto = {number: volumes[number].n_forgotten for number in self._leaving.logs}
                for number, log in self._leaving.logs.items():
                    log.want(upto[number])
                self._leaving.write_logs()
            settled = all(log.settled(upto[number]) for number, log in self._leaving.logs.items())
            return count if settled else None

        return self._tickets.ask(connection, poll, due_ms=due_ms, now_ms=self._shelf.now_ms)


def _check(command: c.Fetch | c.Persist) -> None:
    check_hashes(command.hashes)
    if not 0 <= command.wait_ms <= limits.MAX_DEADLINE_MS:
        raise InvalidArgument("wait_ms", f"0 to {limits.MAX_DEADLINE_MS} ms, please")
