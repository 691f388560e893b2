"""One put of a client: which member is asked to store which blocks, and who instead of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain, pairwise

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.cluster import messages as m
from kvstore.cluster.contacts import BEHIND_MS, ClusterSpace, Contacts
from kvstore.cluster.members import Member
from kvstore.cluster.placement import NONCE_BYTES, PUT_ID_BYTES, new_put_id, nonce_of
from kvstore.cluster.world import Task
from kvstore.errors import InvalidArgument, KVStoreError, ResourceExhausted
from kvstore.session.parts import ALL_CELLS
from kvstore.transfer.base import TransferFailed


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Puts:
    """n blocks to be put, at addresses in the client's registered memory, each with its place.

    cells: of a part of each block, which all who put the blocks have agreed on a put id for; empty
    for whole blocks, whose put ids are new ones.
    """

    hashes: c.U8
    addresses: c.U64
    checksums: c.U64
    places: c.U64
    parent: bytes
    position: int
    ttl_ms: int
    copies: int
    persist: bool
    cells: c.U32 = field(default_factory=lambda: ALL_CELLS)
    agreed: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PutOutcome:
    """status: `PutStatus` at the node that was asked. copies: at how many nodes each block is."""

    status: c.U8
    copies: c.U8
    persisted: c.U8


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Blocks of some segments that one member is asked to store."""

    member: Member
    segments: list[range]
    task: Task[None]


class Put:
    """One put under way: segments that nobody has stored yet, and whom each was tried at.

    A segment goes to the best member that is not suspected, and to the next ones for what that one
    could not; segments of one member go together. Where it is of parts, the others' go likewise,
    so a member that is behind is waited for at first: who went to another one would miss them.
    """

    def __init__(self, contacts: Contacts, space: ClusterSpace, puts: Puts) -> None:
        self._contacts, self._space, self._puts = contacts, space, puts
        n = len(puts.hashes)
        self._outcome = PutOutcome(
            status=np.full(n, m.PutStatus.FAILED, np.uint8),
            copies=np.zeros(n, np.uint8),
            persisted=np.zeros(n, np.uint8),
        )
        edges = (np.flatnonzero(np.diff(puts.places)) + 1).tolist()
        # Plain ranges, because small blocks may be segments of their own, and arrays take long.
        self._left = [range(first, end) for first, end in pairwise([0, *edges, n])] if n else []
        self._places: list[int] = puts.places.tolist()
        self._tried: dict[int, set[str]] = {}  # by the segment's first row
        self._waited: set[int] = set()  # segments that found no room once, while others had it
        self._probes: dict[str, Task[bool]] = {}  # of members that take long
        # How often a member is asked again that goes by an earlier view.
        self._waits = int(contacts.policy.call_ms / BEHIND_MS) if len(puts.cells) else 0
        ids = b"".join(self._new_put_id(rows) * len(rows) for rows in self._left)
        self._put_ids = np.frombuffer(ids, np.uint8).reshape(n, PUT_ID_BYTES)
        self._parents = np.zeros((n, limits.KEY_BYTES), np.uint8)
        self._positions = np.full(n, 0xFFFFFFFF, np.uint32)
        if puts.position >= 0:
            self._parents[1:] = puts.hashes[:-1]
            if puts.parent:
                self._parents[0] = np.frombuffer(puts.parent, np.uint8)
            self._positions = (puts.position + np.arange(n)).astype(np.uint32)

    def _new_put_id(self, rows: range) -> bytes:
        agreed, random = self._puts.agreed, self._contacts.world.random
        nonce = nonce_of(agreed) if agreed else random.randbytes(NONCE_BYTES)
        return new_put_id(nonce, self._places[rows.start])

    async def run(self, end_ms: float) -> PutOutcome:
        """See `Router.put`."""
        world = self._contacts.world
        running: list[_Batch] = []
        while True:
            self._start(running, end_ms)
            left_ms = end_ms - world.now_ms()
            if not running or left_ms <= 0:
                break
            look_ms = self._contacts.policy.ping_ms
            await world.wait([batch.task for batch in running], min(left_ms, look_ms))
            done = [batch for batch in running if batch.task.done]
            for batch in done:
                running.remove(batch)
                self._settle(batch, alone=not running)
            if not done:
                self._leave_the_dead(running)
        for batch in running:
            batch.task.cancel()
        return self._outcome

    def _leave_the_dead(self, running: list[_Batch]) -> None:
        """Asks members that take long whether they are there; what was for one that is not goes to
        the next one."""
        dead = {name for name, probe in self._probes.items() if probe.done and not probe.result()}
        self._probes = {name: probe for name, probe in self._probes.items() if not probe.done}
        for batch in list(running):
            name = batch.member.name
            if name in dead:
                running.remove(batch)
                batch.task.cancel()
                self._contacts.counters.failed_over += 1
                self._go_on(batch, tried=True)
            elif name not in self._probes:
                probing = self._contacts.is_there(batch.member)
                self._probes[name] = self._contacts.world.spawn(probing)

    def _start(self, running: list[_Batch], end_ms: float) -> None:
        contacts = self._contacts
        most = max(1, contacts.policy.piece_bytes // self._space.layout.block_bytes)
        targets = contacts.targets([self._places[rows.start] for rows in self._left])
        filling: dict[str, tuple[Member, list[range]]] = {}
        sizes: dict[str, int] = {}
        batches: list[tuple[Member, list[range]]] = []
        later = []
        for rows, order in zip(self._left, targets, strict=True):
            if running and rows.start in self._waited:
                later.append(rows)
                continue
            tried = self._tried.get(rows.start)
            left = [each for each in order if each.name not in tried] if tried else order
            if not left:
                continue  # nobody is left: it stays FAILED
            member = left[0]
            if member.name not in filling:
                if len(running) + len(batches) >= contacts.policy.in_flight:
                    later.append(rows)
                    continue
                filling[member.name], sizes[member.name] = (member, []), 0
                batches.append(filling[member.name])
            _, segments = filling[member.name]
            segments.append(rows)
            sizes[member.name] += len(rows)
            if sizes[member.name] >= most:
                del filling[member.name]
        self._left = later
        for member, segments in batches:
            task = contacts.world.spawn(self._put_at(member, segments, end_ms))
            running.append(_Batch(member, segments, task))

    def _settle(self, batch: _Batch, *, alone: bool) -> None:
        """What a member did not take is tried at the next one. alone: whether nothing else of this
        put was under way: else what found no room gets it when that is over, once more."""
        lags = False
        try:
            batch.task.result()
        except m.WrongEpoch as error:
            lags = not error.view  # it will learn; else the view is a later one by now
            if lags and self._waits:
                self._waits -= 1
                lags = False
        except (InvalidArgument, ResourceExhausted):
            raise
        except KVStoreError:
            self._contacts.counters.failed_over += 1
            lags = True
        else:
            full = self._outcome.status == m.PutStatus.NO_SPACE
            # A part is not put twice to one member: its cells would be in the way of themselves.
            for rows in [] if alone or len(self._puts.cells) else batch.segments:
                if full[rows.start : rows.stop].any() and rows.start not in self._waited:
                    self._waited.add(rows.start)
                    self._left.append(rows)
            return
        self._go_on(batch, tried=lags)

    def _go_on(self, batch: _Batch, *, tried: bool) -> None:
        """A batch is to be stored anew. tried: elsewhere."""
        for rows in batch.segments:
            if tried:
                self._tried.setdefault(rows.start, set()).add(batch.member.name)
            self._left.append(rows)

    async def _put_at(self, member: Member, segments: list[range], end_ms: float) -> None:
        contacts, puts = self._contacts, self._puts
        assert contacts.view
        epoch, rows = contacts.view.epoch, np.array(list(chain.from_iterable(segments)), np.intp)
        session = await contacts.session(member)
        left_ms = max(end_ms - contacts.world.now_ms(), 1.0)
        wait_ms = int(max(left_ms - 20.0, 1.0))
        hashes = np.ascontiguousarray(puts.hashes[rows])

        def message(number: int, instance: int) -> m.Put:
            return m.Put(
                session=session,
                epoch=epoch,
                namespace=number,
                instance=instance,
                put_ids=self._put_ids[rows],
                hashes=hashes,
                addresses=puts.addresses[rows],
                checksums=puts.checksums[rows],
                parents=self._parents[rows],
                positions=self._positions[rows],
                ttl_ms=puts.ttl_ms,
                copies=puts.copies,
                wait_ms=wait_ms,
                persist=int(puts.persist),
                cells=puts.cells,
            )

        try:
            stored: m.Stored = await contacts.asked(member, self._space, message, left_ms)
        except m.WrongEpoch as error:
            if self._waits and not error.view:
                await contacts.world.sleep(BEHIND_MS)
            raise
        except TransferFailed:
            contacts.leave(member, session)
            raise
        outcome = self._outcome
        outcome.status[rows], outcome.copies[rows] = stored.status, stored.copies
        outcome.persisted[rows] = stored.persisted
