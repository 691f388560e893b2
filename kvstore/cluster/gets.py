"""One get of a client: whom it asks for which blocks, and whom next when that one fails."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore.cluster import messages as m
from kvstore.cluster.contacts import GONE, ClusterSpace, Contacts
from kvstore.cluster.members import Member
from kvstore.cluster.sizes import with_a_tail
from kvstore.cluster.world import Task
from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore.transfer.base import TransferFailed

_RENEWALS = 16  # pieces of one get that may be asked for anew after this side failed
_ROOM_MS = 2.0  # between two looks at whether there is room in the landing ring

# Told of rows (of the get) that have landed at addresses, with their headers: which are sound.
Accept = Callable[[npt.NDArray[np.intp], c.U64, c.U8], Awaitable[npt.NDArray[np.bool_]]]


class Keep(Protocol):
    """Takes over parts of the ring that have sound blocks, to give them back later."""

    def __call__(self, addresses: c.U64, *, lost: bool = False) -> bool:
        """False where it does not. lost: somebody may still write there, so that the part must not
        be given back, but be lost then (`ClientMemory`)."""


class Watch(Protocol):
    """Looks at blocks while they land, on another thread: those that it has found sound are not
    accepted a second time. head: how many bytes of each block's header land in front of it."""

    @property
    def head(self) -> int:
        """In bytes."""

    def expect(
        self, rows: npt.NDArray[np.intp], addresses: c.U64, sound: npt.NDArray[np.bool_]
    ) -> None:
        """Rows of the get will land at addresses, or some of them; each is True in `sound` (n,)
        from when it has landed whole, and as it was put. Told before anybody can write there."""

    def forget(self, addresses: c.U64) -> None:
        """Nobody looks there any more when this returns."""


@dataclass(slots=True, eq=False)
class _Piece:
    """Blocks that one member is asked for. part: of the ring, as it was taken; ring: the generation
    of that memory. asked: whether the member may have heard of them, and by which session. sound:
    those that a watch has seen land, which nobody else writes."""

    member: Member
    rows: npt.NDArray[np.intp]
    addresses: c.U64
    part: c.U64
    ring: int
    hedge_at_ms: float
    asked: bool = False
    hedged: bool = False
    session: int = 0
    sound: npt.NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        self.sound = np.zeros(len(self.rows), bool)


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A piece, and the call that it is asked for by."""

    piece: _Piece
    task: Task[m.Got]


class Get:
    """One get under way: pieces in flight, and which members each block may still be asked of."""

    def __init__(
        self,
        contacts: Contacts,
        space: ClusterSpace,
        chain: c.U8,
        places: c.U64,
        *,
        cells: c.U32,
        nbytes: int,
        accept: Accept,
        keep: Keep | None,
        watch: Watch | None,
        leading: bool,
    ) -> None:
        self._contacts, self._space, self._chain, self._places = contacts, space, chain, places
        self._cells, self._nbytes, self._accept, self._keep = cells, nbytes, accept, keep
        self._watch, self._leading = watch, leading
        self._head = watch.head if watch else 0
        readers = contacts.readers(places)
        self._left = [list(readers[place]) for place in places.tolist()]
        self._tiers = np.zeros(len(chain), np.uint8)
        self._running: list[_Flight] = []
        self._flying = np.zeros(len(chain), np.int64)  # pieces that ask for each block
        self._again = _RENEWALS

    async def run(self, end_ms: float) -> c.U8:
        """See `Router.get`."""
        world, policy = self._contacts.world, self._contacts.policy
        try:
            while world.now_ms() < end_ms:
                lacks_room = self._start(end_ms)
                if self._tiers.all() or not (self._running or lacks_room):
                    break
                if not self._running:  # other gets have all of the ring
                    await world.sleep(_ROOM_MS)
                    continue
                hedges = [f.piece.hedge_at_ms for f in self._running if not f.piece.hedged]
                until = min([end_ms, *hedges])
                left_ms = max(until - world.now_ms(), 0.0)
                await world.wait([flight.task for flight in self._running], left_ms)
                for flight in [f for f in self._running if f.task.done]:
                    self._running.remove(flight)
                    await self._land(flight)
                self._hedge()
        finally:
            for flight in self._running:
                if flight.piece.hedged:  # who was asked later has answered first, or nobody has
                    self._contacts.health.failed(flight.piece.member.name)
                world.spawn(self._outlive(flight, policy.grace_ms))
        return self._tiers

    def _hedge(self) -> None:
        """What takes long may be asked of the next member as well."""
        now = self._contacts.world.now_ms()
        for flight in self._running:
            piece = flight.piece
            if not piece.hedged and now >= piece.hedge_at_ms:
                piece.hedged = True
                self._flying[piece.rows] -= 1
                self._contacts.counters.hedged += 1

    def _start(self, end_ms: float) -> bool:
        """Asks the next member for every block that nobody is asked for; whether some are not,
        because there is no room in the ring."""
        contacts = self._contacts
        by_member: dict[str, tuple[Member, list[int]]] = {}
        before: Member | None = None  # most often all are asked of one
        for row in np.flatnonzero((self._tiers == 0) & (self._flying == 0)).tolist():
            left = self._left[row]
            if left:
                if left[0] is not before:
                    before = left[0]
                    rows_of = by_member.setdefault(before.name, (before, []))[1]
                rows_of.append(row)
            elif self._leading:
                break  # nobody has it, so nobody wants those behind it
        policy = contacts.policy
        most = max(1, min(policy.piece_bytes, contacts.memory.ring_bytes // 4) // self._nbytes)
        tail = max(1, policy.least_piece_bytes // self._nbytes)
        for member, rows in by_member.values():
            first = 0
            for size in with_a_tail(len(rows), tail=tail, most=most):
                if len(self._running) >= 4 * policy.in_flight:
                    return False
                chosen = np.array(rows[first : first + size], np.intp)
                first += size
                part = contacts.memory.take(len(chosen), self._head + self._nbytes)
                while part is None and len(chosen) > 1 and not self._running:
                    # What is lost of the ring, or held, may leave room for fewer, and for long.
                    chosen = chosen[: len(chosen) // 2]
                    part = contacts.memory.take(len(chosen), self._head + self._nbytes)
                if part is None:
                    return True  # when another piece has landed there is room again
                addresses = part + np.uint64(self._head)
                for row in chosen.tolist():
                    self._left[row].pop(0)
                self._flying[chosen] += 1
                hedge_at_ms = contacts.world.now_ms() + self._patience_ms(len(chosen))
                ring = contacts.memory.generation
                piece = _Piece(member, chosen, addresses, part, ring, hedge_at_ms)
                if self._watch:
                    self._watch.expect(chosen, addresses, piece.sound)
                task = contacts.world.spawn(self._ask(piece, end_ms))
                self._running.append(_Flight(piece, task))
                after = [self._left[row][0] for row in chosen.tolist() if self._left[row]]
                for each in {member.name: member for member in after}.values():
                    contacts.prepare(each, self._space)
        return False

    def _patience_ms(self, blocks: int) -> float:
        """How long another piece may take before somebody else is asked too."""
        policy = self._contacts.policy
        ahead = sum(len(flight.piece.rows) for flight in self._running)
        return policy.hedge_ms + (ahead + blocks) * self._nbytes / policy.hedge_bytes_per_ms

    async def _ask(self, piece: _Piece, end_ms: float) -> m.Got:
        contacts, member = self._contacts, piece.member
        session = await contacts.session(member)
        await contacts.number(member, self._space)
        if contacts.memory.generation != piece.ring:  # the session is of a later ring
            raise TransferFailed("the landing ring was made anew meanwhile")
        wait_ms = max(end_ms - contacts.world.now_ms(), 1.0)
        piece.asked, piece.session = True, session
        got: m.Got = await contacts.read(
            member,
            self._space,
            lambda number, instance: m.Get(
                epoch=contacts.epoch,
                session=session,
                namespace=number,
                instance=instance,
                hashes=np.ascontiguousarray(self._chain[piece.rows]),
                addresses=piece.addresses,
                cells=self._cells,
                heads=int(self._head > 0),
                wait_ms=int(wait_ms),
            ),
            timeout_ms=wait_ms + contacts.policy.grace_ms,
            patience_ms=wait_ms,
        )
        return got

    async def _land(self, flight: _Flight) -> None:
        contacts, piece = self._contacts, flight.piece
        if not piece.hedged:
            self._flying[piece.rows] -= 1
        try:
            got = flight.task.result()
        except KVStoreError as error:
            self._failed(piece, error)
            return
        self._forget(piece)
        came = np.flatnonzero(got.tiers[: len(piece.rows)])
        came = came[self._tiers[piece.rows[came]] == 0]
        if len(came):
            sound = piece.sound[came]
            new = came[~sound]
            if len(new):
                sound[~sound] = await self._accept(
                    piece.rows[new], piece.addresses[new], got.headers[new]
                )
            good = came[sound]
            piece.sound[good] = True
            self._tiers[piece.rows[good]] = got.tiers[good]
            for row in good.tolist():
                if got.hot[row] and len(contacts.hot) < contacts.policy.hot_segments:
                    contacts.hot[int(self._places[piece.rows[row]])] = int(got.hot[row])
            if not sound.all():
                contacts.counters.corrupted += int(np.count_nonzero(~sound))
                self._doubt(piece.member, piece.rows[came[~sound]])
        self._leave(piece)

    def _forget(self, piece: _Piece) -> None:
        """What has landed of a piece by now is known, and nobody else looks at it any more."""
        if self._watch:
            self._watch.forget(piece.addresses)

    def _leave(self, piece: _Piece, *, lost: bool = False) -> None:
        """A piece is over. Blocks of it may be shown where they landed. lost: somebody may still
        write there."""
        memory = self._contacts.memory
        if self._keep is not None and piece.sound.any() and self._keep(piece.part, lost=lost):
            return
        if lost:
            memory.lose(piece.part)
        else:
            memory.give(piece.part)

    def _failed(self, piece: _Piece, error: KVStoreError) -> None:
        """The next member is asked; whether this one still writes is not known, unless it said."""
        contacts = self._contacts
        self._forget(piece)
        contacts.counters.failed_over += 1
        if piece.ring != contacts.memory.generation and self._again > 0:
            # It was this side's ring that failed: the member is as good as before.
            self._again -= 1
            for row in piece.rows.tolist():
                self._left[row].insert(0, piece.member)
        elif piece.asked and isinstance(error, TransferFailed):
            contacts.leave(piece.member, piece.session)
            if self._again > 0:  # once more, after all others, by another session
                self._again -= 1
                for row in piece.rows.tolist():
                    self._left[row].append(piece.member)
        if piece.asked and isinstance(error, GONE):
            contacts.leave(piece.member, piece.session)
            contacts.counters.lost_landings += len(piece.rows)
            self._leave(piece, lost=True)
        else:
            self._leave(piece)

    def _doubt(self, member: Member, rows: npt.NDArray[np.intp]) -> None:
        contacts = self._contacts
        hashes = np.ascontiguousarray(self._chain[rows])

        async def tell() -> None:
            with contextlib.suppress(KVStoreError):
                await contacts.asked(
                    member,
                    self._space,
                    lambda number, instance: m.Doubt(
                        namespace=number, instance=instance, hashes=hashes
                    ),
                    contacts.policy.call_ms,
                )

        contacts.world.spawn(tell())

    async def _outlive(self, flight: _Flight, grace_ms: float) -> None:
        """A piece that nobody waits for any more: its part of the ring comes back with its end."""
        contacts, piece = self._contacts, flight.piece
        await contacts.world.wait([flight.task], grace_ms)
        try:
            if not flight.task.done:
                flight.task.cancel()
                raise DeadlineExceeded("no end in sight")
            flight.task.result()
        except KVStoreError as error:
            self._failed(piece, error)
            return
        self._forget(piece)
        self._leave(piece)
