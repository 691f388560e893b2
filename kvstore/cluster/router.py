"""A client's part of a cluster: whom it asks for which blocks, and whom next when that one fails.

A read goes to the best member for each segment, and at once to the next one where that fails, is
suspected or is slow. A miss is believed only when every member that may have the block has said so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.cluster import messages as m
from kvstore.cluster.members import Member, MemberState, View, decode_view
from kvstore.cluster.pieces import growing
from kvstore.cluster.placement import (
    NONCE_BYTES,
    PUT_ID_BYTES,
    SPARE,
    Ranking,
    new_put_id,
    nonce_of,
)
from kvstore.cluster.site import Health
from kvstore.cluster.world import Attachment, Task, World
from kvstore.errors import (
    DeadlineExceeded,
    InvalidArgument,
    KVStoreError,
    ResourceExhausted,
    StaleNamespace,
    Unavailable,
)
from kvstore.layout import Layout
from kvstore.session.parts import ALL_CELLS
from kvstore.transfer.base import TransferFailed

_NO_NODE = "no node of the cluster answers"
_RENEWALS = 16  # pieces of one get that may be asked for anew after this side failed
_GONE = (Unavailable, DeadlineExceeded)
_EPOCH_SHIFT = 32  # where a generation of a namespace has the epoch in which it began
_OVER = -1  # the landing ring of sessions that are not to be used any more
_BEHIND_MS = 25.0  # between two questions to a member that goes by an earlier view
_ROOM_MS = 2.0  # between two looks at whether there is room in the landing ring


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterPolicy:
    """Times in milliseconds. hedge_ms: how long a get may take before another replica is asked as
    well, beside what its bytes and those asked for before them take at `hedge_bytes_per_ms`.
    grace_ms: beyond a get's time, how long its end is waited for, in the background."""

    call_ms: float = 1000.0
    hedge_ms: float = 40.0
    hedge_bytes_per_ms: float = 256 * 1024.0
    grace_ms: float = 10_000.0
    suspect_after: int = 1
    ping_ms: float = 250.0
    ping_timeout_ms: float = 250.0
    in_flight: int = 8
    piece_bytes: int = 8 << 20
    least_piece_bytes: int = 2 << 20
    hot_segments: int = 4096


class ClientMemory(Protocol):
    """The memory of a client that nodes read from and write to."""

    @property
    def kind(self) -> str:
        """Of its transfer agent."""

    @property
    def generation(self) -> int:
        """Changes when the ring, and with it the agent, was made anew."""

    @property
    def ring_bytes(self) -> int:
        """Of the landing ring, of which gets may count on half."""

    def describe(self) -> bytes:
        """See `Agent.describe`."""

    def take(self, blocks: int, nbytes: int) -> c.U64 | None:
        """Room in the landing ring for so many blocks: addresses, uint64 (n,); None for none."""

    def give(self, addresses: c.U64) -> None:
        """Nobody writes there any more."""

    def lose(self, addresses: c.U64) -> None:
        """Somebody may still write there: nobody uses it again before the ring is made anew."""


# Told of rows (of the get) that have landed at addresses, with their headers: which are sound.
Accept = Callable[[npt.NDArray[np.intp], c.U64, c.U8], Awaitable[npt.NDArray[np.bool_]]]
# Takes over a part of the ring with sound blocks, to give it back later; False where it does not.
Keep = Callable[[c.U64], bool]


@dataclass(slots=True, eq=False)
class ClusterSpace:
    """A namespace of a cluster. numbers: by member, what it is called there, and in which life."""

    name: str
    layout: Layout
    key: bytes = field(repr=False)
    generation: int
    numbers: dict[str, tuple[int, int]] = field(default_factory=dict)


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


@dataclass(slots=True)
class RouterCounters:
    """What has happened since the start."""

    hedged: int = 0
    failed_over: int = 0
    corrupted: int = 0
    lost_landings: int = 0
    views: int = 0


class Router:
    """Finds, gets and puts blocks. seeds: addresses of some nodes, of which one must answer."""

    def __init__(
        self,
        world: World,
        memory: ClientMemory,
        seeds: Sequence[str],
        policy: RouterPolicy | None = None,
    ) -> None:
        """`InvalidArgument` without seeds."""
        if not seeds:
            raise InvalidArgument("seeds", "the address of one node at least, please")
        self._world, self._memory, self._seeds = world, memory, list(seeds)
        self.policy = policy or RouterPolicy()
        self.health = Health(self.policy.suspect_after)
        self.counters = RouterCounters()
        self.view: View | None = None
        self._ranking = Ranking(View(epoch=0, replicas=1, members=()))
        self._sessions: dict[str, tuple[int, Attachment]] = {}
        self._attaching: dict[str, Task[int]] = {}
        self._preparing: set[str] = set()
        self._hot: dict[int, int] = {}

    # -- members -----------------------------------------------------------------------

    @property
    def epoch(self) -> int:
        """Of the view that this client goes by, 0 before the first."""
        return self.view.epoch if self.view else 0

    async def refresh(self) -> View:
        """The view of the first node that answers. `Unavailable`."""
        known = [member.address for member in self.view.members] if self.view else []
        why = "they have no members' list yet"
        for address in dict.fromkeys((*known, *self._seeds)):
            try:
                answer = await self._world.call(address, m.AskView(), self.policy.call_ms)
            except _GONE as error:
                why = str(error)
                continue
            if self._learn(answer.view) and self.view and self.view.members:
                return self.view
        if self.view is None or not self.view.members:
            raise Unavailable(f"{_NO_NODE}: tried {', '.join(self._seeds)}; {why}")
        return self.view

    def _learn(self, encoded: bytes) -> bool:
        view = decode_view(encoded)
        if self.view is None or view.epoch > self.view.epoch:
            self.view, self._ranking = view, Ranking(view)
            self.counters.views += 1
        return True

    async def _present(self) -> View:
        return self.view if self.view is not None and self.view.members else await self.refresh()

    async def run(self) -> None:
        """For ever: asks members that are suspected whether they are back."""
        while True:
            await self._world.sleep(self.policy.ping_ms)
            if self.view is None:
                continue
            away = [member for member in self.view.members if self.health.suspects(member.name)]
            tasks = [self._world.spawn(self._ping(member)) for member in away]
            await self._world.wait_all(tasks, 2 * self.policy.ping_timeout_ms)

    async def _ping(self, member: Member) -> None:
        assert self.view
        try:
            ping = m.Ping(epoch=self.view.epoch)
            pong = await self._world.call(member.address, ping, self.policy.ping_timeout_ms)
        except KVStoreError:
            return
        if pong.name == member.name and pong.serving:
            self.health.answered(member.name)

    async def is_there(self, member: Member) -> bool:
        """Whether a member answers at all."""
        try:
            await self.call(member, m.Ping(epoch=self.epoch), self.policy.call_ms)
        except _GONE:
            return False
        except KVStoreError:
            return True
        return True

    async def call(self, member: Member, message: Any, timeout_ms: float) -> Any:
        """`World.call` to a member; learns from how it goes whether to avoid it."""
        try:
            answer = await self._world.call(member.address, message, timeout_ms)
        except _GONE:
            self.health.failed(member.name)
            raise
        except m.WrongEpoch as error:
            if error.view:
                self._learn(error.view)
            raise
        self.health.answered(member.name)
        epoch = getattr(answer, "epoch", 0)
        if self.view and epoch > self.view.epoch:
            try:
                newer = await self._world.call(member.address, m.AskView(), self.policy.call_ms)
                self._learn(newer.view)
            except KVStoreError:
                pass
        return answer

    # -- namespaces and sessions -------------------------------------------------------

    async def open(self, name: str, layout: Layout) -> ClusterSpace:
        """The namespace, opened at one member; at others when they are asked. `Unavailable`,
        `InvalidArgument`."""
        view = await self._present()
        error: KVStoreError = Unavailable(_NO_NODE)
        for member in self._by_health(view.members):
            space = ClusterSpace(name=name, layout=layout, key=b"", generation=0)
            try:
                opened = await self._open_at(member, space)
            except InvalidArgument:
                raise
            except KVStoreError as other:
                error = other
                continue
            space.key, space.generation = opened.key, opened.generation
            return space
        raise error

    async def _open_at(self, member: Member, space: ClusterSpace) -> m.Opened:
        message = m.Open(name=space.name, layout=space.layout.encode())
        opened: m.Opened = await self.call(member, message, self.policy.call_ms)
        if space.key and opened.key != space.key:
            raise InvalidArgument(
                "secret", f"{member.name} has another cluster secret than the other nodes"
            )
        space.numbers[member.name] = (opened.namespace, opened.instance)
        return opened

    async def _number(self, member: Member, space: ClusterSpace) -> tuple[int, int]:
        known = space.numbers.get(member.name)
        if known is None:
            await self._open_at(member, space)
            known = space.numbers[member.name]
        return known

    async def _asked(
        self,
        member: Member,
        space: ClusterSpace,
        make: Callable[[int, int], Any],
        timeout_ms: float,
    ) -> Any:
        """A call about a namespace, which is opened again where the member restarted."""
        try:
            return await self.call(member, make(*await self._number(member, space)), timeout_ms)
        except StaleNamespace:
            space.numbers.pop(member.name, None)
            return await self.call(member, make(*await self._number(member, space)), timeout_ms)

    async def _read(
        self,
        member: Member,
        space: ClusterSpace,
        make: Callable[[int, int], Any],
        *,
        timeout_ms: float,
        patience_ms: float,
    ) -> Any:
        """`_asked`, for so long again and again where the member has not learnt of this client's
        view yet: it will in a moment, and what it has may be nowhere else."""
        end_ms = self._world.now_ms() + patience_ms
        while True:
            try:
                return await self._asked(member, space, make, timeout_ms)
            except m.WrongEpoch:
                if self._world.now_ms() + _BEHIND_MS >= end_ms:
                    raise
            await self._world.sleep(_BEHIND_MS)

    async def _session(self, member: Member) -> int:
        """The number of this client's session at a member, begun where there is none."""
        generation = self._memory.generation
        known = self._sessions.get(member.name)
        if known and known[0] == generation and not known[1].lost:
            return known[1].welcomed.session
        task = self._attaching.get(member.name)
        if task is None or task.done:
            task = self._attaching[member.name] = self._world.spawn(self._attach(member))
        await self._world.wait([task], self.policy.call_ms)
        if not task.done:
            raise DeadlineExceeded(f"{member.name} began no session in time")
        number = task.result()
        made = self._sessions.get(member.name)
        if made is None or made[0] != generation:  # it was begun for an earlier ring
            raise TransferFailed(f"the session at {member.name} is of another landing ring")
        return number

    def _leave(self, member: Member, session: int) -> None:
        """The next call begins another session: the member moves no more bytes by this one."""
        known = self._sessions.get(member.name)
        if known and known[1].welcomed.session == session:
            self._sessions[member.name] = (_OVER, known[1])

    def _prepare(self, member: Member, space: ClusterSpace) -> None:
        """Begins a session with who is asked next if somebody fails: it takes too long for then."""
        known, name = self._sessions.get(member.name), member.name
        ready = known and known[0] == self._memory.generation and not known[1].lost
        if ready or name in self._preparing or self.health.suspects(name):
            return
        self._preparing.add(name)

        async def work() -> None:
            try:
                await self._session(member)
                await self._number(member, space)
            except KVStoreError:
                return
            finally:
                self._preparing.discard(name)

        self._world.spawn(work())

    async def _attach(self, member: Member) -> int:
        old = self._sessions.pop(member.name, None)
        if old:
            await old[1].close()
        generation = self._memory.generation
        hello = m.Hello(
            version=m.MESSAGES_VERSION,
            name="",
            kind=self._memory.kind,
            agent=self._memory.describe(),
            epoch=self.view.epoch if self.view else 0,
        )
        try:
            made = await self._world.attach(member.address, hello, self.policy.call_ms)
        except _GONE:
            self.health.failed(member.name)
            raise
        self._sessions[member.name] = (generation, made)
        return made.welcomed.session

    async def close(self) -> None:
        """Ends all sessions."""
        for _generation, attachment in self._sessions.values():
            await attachment.close()
        self._sessions.clear()

    # -- who is asked ------------------------------------------------------------------

    def _by_health(self, members: Iterable[Member]) -> list[Member]:
        """Those that answer first; those that are out never."""
        known = [member for member in members if member.state != MemberState.OUT]
        return sorted(known, key=lambda member: self.health.suspects(member.name))

    def _readers(self, places: c.U64) -> dict[int, list[Member]]:
        """By place, who may have its blocks, the best first."""
        assert self.view
        members, unique = self.view.members, np.unique(places)
        extra = max((self._hot.get(int(p), 0) for p in unique.tolist()), default=0)
        most = self._ranking.copies + SPARE + extra
        rows = self._ranking.targets(unique, most=most).tolist()
        if not self.view.settled:
            earlier = self._ranking.earlier(unique).tolist()
            rows = [[*a, *(n for n in b if n not in a)] for a, b in zip(rows, earlier, strict=True)]
        found = {}
        orders: dict[tuple[int, ...], list[Member]] = {}
        for place, row in zip(unique.tolist(), rows, strict=True):
            if tuple(row) not in orders:
                orders[tuple(row)] = self._by_health(members[n] for n in row)
            order = orders[tuple(row)]
            hot = self._hot.get(place, 0)
            if hot:  # all of its copies share the load
                copies = self._ranking.copies + hot
                head = order[:copies]
                self._world.random.shuffle(head)
                order = self._by_health((*head, *order[copies:]))
            found[place] = order
        return found

    def _targets(self, places: Sequence[int]) -> list[list[Member]]:
        """For each place whom new blocks of it are put to, the best first."""
        assert self.view
        members = self.view.members
        ranked = self._ranking.targets(np.array(places, np.uint64)).tolist()
        orders: dict[tuple[int, ...], list[Member]] = {}  # few, where there are many places
        for row in ranked:
            if tuple(row) not in orders:
                orders[tuple(row)] = self._by_health(members[n] for n in row)
        return [orders[tuple(row)] for row in ranked]

    # -- match -------------------------------------------------------------------------

    async def match(
        self, space: ClusterSpace, chain: c.U8, places: c.U64, timeout_ms: float
    ) -> c.U8:
        """The tiers of the longest stored leading part of a chain: uint8 (count,)."""
        await self._present()
        world, end_ms = self._world, self._world.now_ms() + timeout_ms
        readers = self._readers(places)
        left = [list(readers[place]) for place in places.tolist()]
        tiers, heard = np.zeros(len(chain), np.uint8), np.zeros(len(chain), bool)
        rows, count = [row for row in range(len(chain)) if left[row]], 0
        asked: list[tuple[Member, Task[None]]] = []
        slow: set[str] = set()

        async def look(member: Member, of: list[int]) -> None:
            seen = await self._look(space, np.ascontiguousarray(chain[of]), member, end_ms)
            tiers[of] = np.where(tiers[of], tiers[of], seen.tiers)
            heard[of] = True

        while rows or asked:
            by_member: dict[str, tuple[Member, list[int]]] = {}
            for row in rows:
                member = left[row].pop(0)
                by_member.setdefault(member.name, (member, []))[1].append(row)
            asked += [(each, world.spawn(look(each, of))) for each, of in by_member.values()]
            # Who takes long is waited for, but not alone.
            until_ms = min(end_ms, world.now_ms() + self.policy.hedge_ms)
            running = [task for _, task in asked]
            while running and world.now_ms() < until_ms:
                await world.wait(running, until_ms - world.now_ms())
                running = [task for task in running if not task.done]
            for entry in [entry for entry in asked if entry[1].done]:
                asked.remove(entry)
                _swallow(entry[1])
            count = len(tiers) if tiers.all() else int(tiers.argmin())
            if count == len(chain) or world.now_ms() >= end_ms:
                break
            # What nobody has answered for is worth asking for elsewhere; of what is not there, only
            # what ends the leading part, with its segment.
            ends = (np.arange(len(chain)) >= count) & (places == places[count])
            open_rows = np.flatnonzero((tiers == 0) & (~heard | ends)).tolist()
            rows = [row for row in open_rows if left[row]]
            slow = {member.name for member, _ in asked}
        for member, task in asked:
            task.cancel()
            if member.name in slow:  # others were faster
                self.health.failed(member.name)
        return tiers[:count].copy()

    async def _look(
        self, space: ClusterSpace, hashes: c.U8, member: Member, end_ms: float
    ) -> m.Seen:
        left_ms = max(min(self.policy.call_ms, end_ms - self._world.now_ms()), 1.0)
        seen: m.Seen = await self._read(
            member,
            space,
            lambda number, instance: m.Look(
                epoch=self.epoch, namespace=number, instance=instance, hashes=hashes
            ),
            timeout_ms=left_ms,
            patience_ms=left_ms,
        )
        return seen

    # -- get ---------------------------------------------------------------------------

    async def get(
        self,
        space: ClusterSpace,
        chain: c.U8,
        places: c.U64,
        *,
        cells: c.U32,
        nbytes: int,
        accept: Accept,
        keep: Keep | None = None,
        timeout_ms: float,
    ) -> c.U8:
        """Gets blocks, in whatever order they come; the tier of each, 0 for a miss: uint8 (n,).

        nbytes: of the cells of one block. accept: copies a block from where it landed to where it
        is wanted, and says whether the copy is sound; only then it counts. keep: for blocks that
        are wanted where they landed.
        """
        await self._present()
        get = _Get(self, space, chain, places, cells=cells, nbytes=nbytes, accept=accept, keep=keep)
        return await get.run(self._world.now_ms() + timeout_ms)

    # -- put ---------------------------------------------------------------------------

    async def put(self, space: ClusterSpace, puts: Puts, timeout_ms: float) -> PutOutcome:
        """Puts blocks, several members at once. What fails is NO_SPACE or FAILED."""
        await self._present()
        return await _Put(self, space, puts).run(self._world.now_ms() + timeout_ms)

    # -- forgetting, advice, explanations ----------------------------------------------

    async def drop(self, space: ClusterSpace, hashes: c.U8, timeout_ms: float) -> int:
        """Drops blocks wherever they may be; how many copies the fullest node had. Best effort: a
        member that is away keeps what it has, and brings it back. `Unavailable` for none."""
        view = await self._present()
        forget = m.Forget(
            name=space.name,
            layout=space.layout.encode(),
            hashes=hashes,
            all_of_it=0,
            generation=0,
        )
        answers = await self._everywhere(view, forget, timeout_ms)
        found = [answer.blocks for answer in answers if answer is not None]
        if not found:
            raise Unavailable(_NO_NODE)
        return int(max(found))

    async def drop_namespace(self, space: ClusterSpace, timeout_ms: float) -> int:
        """Forgets a namespace at every member. `Unavailable` unless all of them have done it: then
        it may be forgotten in part, and is to be dropped again."""
        view = await self.refresh()
        members = self._by_health(view.members)
        opened = [(await self._open_at(member, space)).generation for member in members]
        if not opened:
            raise Unavailable(_NO_NODE)
        # Above all of earlier epochs, also of those that no member of this one was there to see.
        generation = max(max(opened) + 1, view.epoch << _EPOCH_SHIFT)
        forget = m.Forget(
            name=space.name,
            layout=space.layout.encode(),
            hashes=np.empty((0, 32), np.uint8),
            all_of_it=1,
            generation=generation,
        )
        answers = await self._everywhere(view, forget, timeout_ms)
        if any(answer is None for answer in answers) or self.view is not view:
            raise Unavailable("not all members have forgotten the namespace: drop it again")
        space.generation = generation
        space.numbers.clear()
        return int(max(answer.blocks for answer in answers))

    async def _everywhere(self, view: View, message: Any, timeout_ms: float) -> list[Any]:
        """The answer of each member that is not out, None where it gave none."""
        members = [member for member in view.members if member.state != MemberState.OUT]
        tasks = [self._world.spawn(self.call(member, message, timeout_ms)) for member in members]
        await self._world.wait_all(tasks, timeout_ms)
        return [_answer(task) for task in tasks]

    async def advise(
        self, space: ClusterSpace, hashes: c.U8, *, kind: int, for_ms: int, timeout_ms: float
    ) -> int:
        """A hint to every member; how many of the blocks are stored at some of them."""
        view = await self._present()
        stored = np.zeros(len(hashes), bool)

        async def tell(member: Member) -> None:
            await self._asked(
                member,
                space,
                lambda number, instance: m.Advise(
                    namespace=number, instance=instance, kind=kind, for_ms=for_ms, hashes=hashes
                ),
                timeout_ms,
            )
            seen: m.Seen = await self._asked(
                member,
                space,
                lambda number, instance: m.Look(
                    epoch=self.epoch, namespace=number, instance=instance, hashes=hashes
                ),
                timeout_ms,
            )
            stored[seen.tiers > 0] = True

        tasks = [self._world.spawn(tell(member)) for member in self._by_health(view.members)]
        await self._world.wait_all(tasks, timeout_ms)
        for task in tasks:
            _swallow(task)
        return int(np.count_nonzero(np.unique(hashes[stored], axis=0).any(axis=1)))

    async def explain(
        self, space: ClusterSpace, hashes: c.U8, timeout_ms: float
    ) -> dict[str, c.Explained]:
        """What each member that answers says."""
        view, said = await self._present(), {}
        for member in self._by_health(view.members):
            try:
                said[member.name] = await self._asked(
                    member,
                    space,
                    lambda number, instance: m.Ask(
                        namespace=number, instance=instance, hashes=hashes
                    ),
                    timeout_ms,
                )
            except _GONE:
                continue
        return said


@dataclass(slots=True, eq=False)
class _Piece:
    """Blocks that one member is asked for. ring: the generation of the memory that `addresses`
    are of. asked: whether the member may have heard of them, and by which session."""

    member: Member
    rows: npt.NDArray[np.intp]
    addresses: c.U64
    ring: int
    hedge_at_ms: float
    asked: bool = False
    hedged: bool = False
    session: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class _Flight:
    """A piece, and the call that it is asked for by."""

    piece: _Piece
    task: Task[m.Got]


class _Get:
    """One get under way: pieces in flight, and which members each block may still be asked of."""

    def __init__(
        self,
        router: Router,
        space: ClusterSpace,
        chain: c.U8,
        places: c.U64,
        *,
        cells: c.U32,
        nbytes: int,
        accept: Accept,
        keep: Keep | None,
    ) -> None:
        self._router, self._space, self._chain, self._places = router, space, chain, places
        self._cells, self._nbytes, self._accept, self._keep = cells, nbytes, accept, keep
        readers = router._readers(places)
        self._left = [list(readers[place]) for place in places.tolist()]
        self._tiers = np.zeros(len(chain), np.uint8)
        self._running: list[_Flight] = []
        self._flying = np.zeros(len(chain), np.int64)  # pieces that ask for each block
        self._again = _RENEWALS

    async def run(self, end_ms: float) -> c.U8:
        """See `Router.get`."""
        world, policy = self._router._world, self._router.policy
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
                    self._router.health.failed(flight.piece.member.name)
                world.spawn(self._outlive(flight, policy.grace_ms))
        return self._tiers

    def _hedge(self) -> None:
        """What takes long may be asked of the next member as well."""
        now = self._router._world.now_ms()
        for flight in self._running:
            piece = flight.piece
            if not piece.hedged and now >= piece.hedge_at_ms:
                piece.hedged = True
                self._flying[piece.rows] -= 1
                self._router.counters.hedged += 1

    def _start(self, end_ms: float) -> bool:
        """Asks the next member for every block that nobody is asked for; whether some are not,
        because there is no room in the ring."""
        router = self._router
        by_member: dict[str, tuple[Member, list[int]]] = {}
        for row in np.flatnonzero((self._tiers == 0) & (self._flying == 0)).tolist():
            if self._left[row]:
                member = self._left[row][0]
                by_member.setdefault(member.name, (member, []))[1].append(row)
        policy = router.policy
        most = max(1, min(policy.piece_bytes, router._memory.ring_bytes // 4) // self._nbytes)
        least = max(1, policy.least_piece_bytes // self._nbytes)
        for member, rows in by_member.values():
            first = 0
            for size in reversed(growing(len(rows), least=least, most=most)):
                if len(self._running) >= 4 * policy.in_flight:
                    return False
                chosen = np.array(rows[first : first + size], np.intp)
                first += size
                addresses = router._memory.take(len(chosen), self._nbytes)
                while addresses is None and len(chosen) > 1 and not self._running:
                    # What is lost of the ring, or held, may leave room for fewer, and for long.
                    chosen = chosen[: len(chosen) // 2]
                    addresses = router._memory.take(len(chosen), self._nbytes)
                if addresses is None:
                    return True  # when another piece has landed there is room again
                for row in chosen.tolist():
                    self._left[row].pop(0)
                self._flying[chosen] += 1
                hedge_at_ms = router._world.now_ms() + self._patience_ms(len(chosen))
                ring = router._memory.generation
                piece = _Piece(member, chosen, addresses, ring, hedge_at_ms)
                task = router._world.spawn(self._ask(piece, end_ms))
                self._running.append(_Flight(piece, task))
                after = [self._left[row][0] for row in chosen.tolist() if self._left[row]]
                for each in {member.name: member for member in after}.values():
                    router._prepare(each, self._space)
        return False

    def _patience_ms(self, blocks: int) -> float:
        """How long another piece may take before somebody else is asked too."""
        policy = self._router.policy
        ahead = sum(len(flight.piece.rows) for flight in self._running)
        return policy.hedge_ms + (ahead + blocks) * self._nbytes / policy.hedge_bytes_per_ms

    async def _ask(self, piece: _Piece, end_ms: float) -> m.Got:
        router, member = self._router, piece.member
        session = await router._session(member)
        await router._number(member, self._space)
        if router._memory.generation != piece.ring:  # the session is of a later ring
            raise TransferFailed("the landing ring was made anew meanwhile")
        wait_ms = max(end_ms - router._world.now_ms(), 1.0)
        piece.asked, piece.session = True, session
        got: m.Got = await router._read(
            member,
            self._space,
            lambda number, instance: m.Get(
                epoch=router.epoch,
                session=session,
                namespace=number,
                instance=instance,
                hashes=np.ascontiguousarray(self._chain[piece.rows]),
                addresses=piece.addresses,
                cells=self._cells,
                wait_ms=int(wait_ms),
            ),
            timeout_ms=wait_ms + router.policy.grace_ms,
            patience_ms=wait_ms,
        )
        return got

    async def _land(self, flight: _Flight) -> None:
        router, piece = self._router, flight.piece
        if not piece.hedged:
            self._flying[piece.rows] -= 1
        try:
            got = flight.task.result()
        except KVStoreError as error:
            self._failed(piece, error)
            return
        came = np.flatnonzero(got.tiers[: len(piece.rows)])
        came = came[self._tiers[piece.rows[came]] == 0]
        kept = False
        if len(came):
            sound = await self._accept(piece.rows[came], piece.addresses[came], got.headers[came])
            good = came[sound]
            self._tiers[piece.rows[good]] = got.tiers[good]
            for row in good.tolist():
                if got.hot[row] and len(router._hot) < router.policy.hot_segments:
                    router._hot[int(self._places[piece.rows[row]])] = int(got.hot[row])
            if not sound.all():
                router.counters.corrupted += int(np.count_nonzero(~sound))
                self._doubt(piece.member, piece.rows[came[~sound]])
            kept = self._keep is not None and bool(len(good)) and self._keep(piece.addresses)
        if not kept:
            router._memory.give(piece.addresses)

    def _failed(self, piece: _Piece, error: KVStoreError) -> None:
        """The next member is asked; whether this one still writes is not known, unless it said."""
        router = self._router
        router.counters.failed_over += 1
        if piece.ring != router._memory.generation and self._again > 0:
            # It was this side's ring that failed: the member is as good as before.
            self._again -= 1
            for row in piece.rows.tolist():
                self._left[row].insert(0, piece.member)
        elif piece.asked and isinstance(error, TransferFailed):
            router._leave(piece.member, piece.session)
            if self._again > 0:  # once more, after all others, by another session
                self._again -= 1
                for row in piece.rows.tolist():
                    self._left[row].append(piece.member)
        if piece.asked and isinstance(error, _GONE):
            router._leave(piece.member, piece.session)
            router.counters.lost_landings += len(piece.rows)
            router._memory.lose(piece.addresses)
        else:
            router._memory.give(piece.addresses)

    def _doubt(self, member: Member, rows: npt.NDArray[np.intp]) -> None:
        router = self._router
        hashes = np.ascontiguousarray(self._chain[rows])

        async def tell() -> None:
            with contextlib.suppress(KVStoreError):
                await router._asked(
                    member,
                    self._space,
                    lambda number, instance: m.Doubt(
                        namespace=number, instance=instance, hashes=hashes
                    ),
                    router.policy.call_ms,
                )

        router._world.spawn(tell())

    async def _outlive(self, flight: _Flight, grace_ms: float) -> None:
        """A piece that nobody waits for any more: its part of the ring comes back with its end."""
        router, piece = self._router, flight.piece
        await router._world.wait([flight.task], grace_ms)
        try:
            if not flight.task.done:
                raise DeadlineExceeded("no end in sight")
            flight.task.result()
        except KVStoreError as error:
            self._failed(piece, error)
            return
        router._memory.give(piece.addresses)


@dataclass(frozen=True, slots=True, eq=False)
class _Batch:
    """Blocks of some segments that one member is asked to store."""

    member: Member
    segments: list[npt.NDArray[np.intp]]
    task: Task[None]


class _Put:
    """One put under way: segments that nobody has stored yet, and whom each was tried at.

    A segment goes to the best member that is not suspected, and to the next ones for what that one
    could not; segments of one member go together. Where it is of parts, the others' go likewise,
    so a member that is behind is waited for at first: who went to another one would miss them.
    """

    def __init__(self, router: Router, space: ClusterSpace, puts: Puts) -> None:
        self._router, self._space, self._puts = router, space, puts
        n = len(puts.hashes)
        self._outcome = PutOutcome(
            status=np.full(n, m.PutStatus.FAILED, np.uint8),
            copies=np.zeros(n, np.uint8),
            persisted=np.zeros(n, np.uint8),
        )
        edges = np.flatnonzero(np.diff(puts.places)) + 1
        self._left = [rows for rows in np.split(np.arange(n), edges) if len(rows)]
        self._tried: dict[int, set[str]] = {}  # by the segment's first row
        self._waited: set[int] = set()  # segments that found no room once, while others had it
        self._probes: dict[str, Task[bool]] = {}  # of members that take long
        # How often a member is asked again that goes by an earlier view.
        self._waits = int(router.policy.call_ms / _BEHIND_MS) if len(puts.cells) else 0
        self._put_ids = np.empty((n, PUT_ID_BYTES), np.uint8)
        for rows in self._left:
            random = router._world.random
            nonce = nonce_of(puts.agreed) if puts.agreed else random.randbytes(NONCE_BYTES)
            put_id = new_put_id(nonce, int(puts.places[rows[0]]))
            self._put_ids[rows] = np.frombuffer(put_id, np.uint8)
        self._parents = np.zeros((n, limits.KEY_BYTES), np.uint8)
        self._positions = np.full(n, 0xFFFFFFFF, np.uint32)
        if puts.position >= 0:
            self._parents[1:] = puts.hashes[:-1]
            if puts.parent:
                self._parents[0] = np.frombuffer(puts.parent, np.uint8)
            self._positions = (puts.position + np.arange(n)).astype(np.uint32)

    async def run(self, end_ms: float) -> PutOutcome:
        """See `Router.put`."""
        world = self._router._world
        running: list[_Batch] = []
        while True:
            self._start(running, end_ms)
            left_ms = end_ms - world.now_ms()
            if not running or left_ms <= 0:
                break
            look_ms = self._router.policy.ping_ms
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
                self._router.counters.failed_over += 1
                self._go_on(batch, tried=True)
            elif name not in self._probes:
                probing = self._router.is_there(batch.member)
                self._probes[name] = self._router._world.spawn(probing)

    def _start(self, running: list[_Batch], end_ms: float) -> None:
        router = self._router
        most = max(1, router.policy.piece_bytes // self._space.layout.block_bytes)
        targets = router._targets([int(self._puts.places[rows[0]]) for rows in self._left])
        filling: dict[str, tuple[Member, list[npt.NDArray[np.intp]]]] = {}
        sizes: dict[str, int] = {}
        batches: list[tuple[Member, list[npt.NDArray[np.intp]]]] = []
        later = []
        for rows, order in zip(self._left, targets, strict=True):
            if running and int(rows[0]) in self._waited:
                later.append(rows)
                continue
            tried = self._tried.get(int(rows[0]), set())
            member = next((each for each in order if each.name not in tried), None)
            if member is None:
                continue  # nobody is left: it stays FAILED
            if member.name not in filling:
                if len(running) + len(batches) >= router.policy.in_flight:
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
            task = router._world.spawn(self._put_at(member, segments, end_ms))
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
            self._router.counters.failed_over += 1
            lags = True
        else:
            full = self._outcome.status == m.PutStatus.NO_SPACE
            # A part is not put twice to one member: its cells would be in the way of themselves.
            for rows in [] if alone or len(self._puts.cells) else batch.segments:
                if full[rows].any() and int(rows[0]) not in self._waited:
                    self._waited.add(int(rows[0]))
                    self._left.append(rows)
            return
        self._go_on(batch, tried=lags)

    def _go_on(self, batch: _Batch, *, tried: bool) -> None:
        """A batch is to be stored anew. tried: elsewhere."""
        for rows in batch.segments:
            if tried:
                self._tried.setdefault(int(rows[0]), set()).add(batch.member.name)
            self._left.append(rows)

    async def _put_at(
        self, member: Member, segments: list[npt.NDArray[np.intp]], end_ms: float
    ) -> None:
        router, puts = self._router, self._puts
        assert router.view
        epoch, rows = router.view.epoch, np.concatenate(segments)
        session = await router._session(member)
        left_ms = max(end_ms - router._world.now_ms(), 1.0)
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
            stored: m.Stored = await router._asked(member, self._space, message, left_ms)
        except m.WrongEpoch as error:
            if self._waits and not error.view:
                await router._world.sleep(_BEHIND_MS)
            raise
        except TransferFailed:
            router._leave(member, session)
            raise
        outcome = self._outcome
        outcome.status[rows], outcome.copies[rows] = stored.status, stored.copies
        outcome.persisted[rows] = stored.persisted


def _swallow(task: Task[Any]) -> None:
    """What a member did not do is a miss; what the caller did wrong is an error."""
    if not task.done:
        return
    try:
        task.result()
    except (InvalidArgument, ResourceExhausted):
        raise
    except KVStoreError:
        return


def _answer(task: Task[Any]) -> Any:
    try:
        return task.result() if task.done else None
    except KVStoreError:
        return None
