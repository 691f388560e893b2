"""Whom a client reaches: the members by its view, how they are, and its sessions with them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from kvstore import commands as c
from kvstore.cluster import messages as m
from kvstore.cluster.members import Member, MemberState, View, decode_view
from kvstore.cluster.placement import SPARE, Ranking
from kvstore.cluster.site import Health
from kvstore.cluster.world import Attachment, Task, World
from kvstore.errors import (
    DeadlineExceeded,
    InvalidArgument,
    KVStoreError,
    StaleNamespace,
    Unavailable,
)
from kvstore.layout import Layout
from kvstore.transfer.base import TransferFailed

NO_NODE = "no node of the cluster answers"
GONE = (Unavailable, DeadlineExceeded)
_OVER = -1  # the landing ring of sessions that are not to be used any more
BEHIND_MS = 25.0  # between two questions to a member that goes by an earlier view


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
    piece_bytes: int = 16 << 20
    least_piece_bytes: int = 4 << 20
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


@dataclass(slots=True, eq=False)
class ClusterSpace:
    """A namespace of a cluster. numbers: by member, what it is called there, and in which life."""

    name: str
    layout: Layout
    key: bytes = field(repr=False)
    generation: int
    numbers: dict[str, tuple[int, int]] = field(default_factory=dict)


@dataclass(slots=True)
class RouterCounters:
    """What has happened since the start."""

    hedged: int = 0
    failed_over: int = 0
    corrupted: int = 0
    lost_landings: int = 0
    views: int = 0


class Contacts:
    """Asks members, and learns from how it goes. seeds: addresses of some nodes, one of which must
    answer."""

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
        self.world, self.memory, self._seeds = world, memory, list(seeds)
        self.policy = policy or RouterPolicy()
        self.health = Health(self.policy.suspect_after)
        self.counters = RouterCounters()
        self.view: View | None = None
        self.ranking = Ranking(View(epoch=0, replicas=1, members=()))
        self._sessions: dict[str, tuple[int, Attachment]] = {}
        self._attaching: dict[str, Task[int | KVStoreError]] = {}
        self._preparing: set[str] = set()
        self.hot: dict[int, int] = {}

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
                answer = await self.world.call(address, m.AskView(), self.policy.call_ms)
            except GONE as error:
                why = str(error)
                continue
            self._learn(answer.view)
            if self.view and self.view.members:
                return self.view
        if self.view is None or not self.view.members:
            raise Unavailable(f"{NO_NODE}: tried {', '.join(self._seeds)}; {why}")
        return self.view

    def _learn(self, encoded: bytes) -> None:
        view = decode_view(encoded)
        if self.view is None or view.epoch > self.view.epoch:
            self.view, self.ranking = view, Ranking(view)
            self.counters.views += 1

    async def present(self) -> View:
        """The view that is known, or the first one. `Unavailable`."""
        return self.view if self.view is not None and self.view.members else await self.refresh()

    async def run(self) -> None:
        """For ever: asks members that are suspected whether they are back."""
        while True:
            await self.world.sleep(self.policy.ping_ms)
            if self.view is None:
                continue
            away = [member for member in self.view.members if self.health.suspects(member.name)]
            tasks = [self.world.spawn(self._ping(member)) for member in away]
            await self.world.wait_all(tasks, 2 * self.policy.ping_timeout_ms)

    async def _ping(self, member: Member) -> None:
        assert self.view
        try:
            ping = m.Ping(epoch=self.view.epoch)
            pong = await self.world.call(member.address, ping, self.policy.ping_timeout_ms)
        except KVStoreError:
            return
        if pong.name == member.name and pong.serving:
            self.health.answered(member.name)

    async def is_there(self, member: Member) -> bool:
        """Whether a member answers at all."""
        try:
            await self.call(member, m.Ping(epoch=self.epoch), self.policy.call_ms)
        except GONE:
            return False
        except KVStoreError:
            return True
        return True

    async def call(self, member: Member, message: Any, timeout_ms: float) -> Any:
        """`World.call` to a member; learns from how it goes whether to avoid it."""
        try:
            answer = await self.world.call(member.address, message, timeout_ms)
        except GONE:
            self.health.failed(member.name)
            raise
        except m.WrongEpoch as error:
            if error.view:
                self._learn(error.view)
            raise
        self.health.answered(member.name)
        epoch = getattr(answer, "epoch", 0)
        if self.view and epoch > self.view.epoch:
            with contextlib.suppress(KVStoreError):
                newer = await self.world.call(member.address, m.AskView(), self.policy.call_ms)
                self._learn(newer.view)
        return answer

    # -- namespaces and sessions -------------------------------------------------------

    async def open(self, name: str, layout: Layout) -> ClusterSpace:
        """The namespace, opened at one member; at others when they are asked. `Unavailable`,
        `InvalidArgument`."""
        view = await self.present()
        error: KVStoreError = Unavailable(NO_NODE)
        for member in self.by_health(view.members):
            space = ClusterSpace(name=name, layout=layout, key=b"", generation=0)
            try:
                opened = await self.open_at(member, space)
            except InvalidArgument:
                raise
            except KVStoreError as other:
                error = other
                continue
            space.key, space.generation = opened.key, opened.generation
            return space
        raise error

    async def open_at(self, member: Member, space: ClusterSpace) -> m.Opened:
        """Opens a namespace at a member, and keeps its number there. Raises as `call`, and
        `InvalidArgument` for a member of another secret."""
        message = m.Open(name=space.name, layout=space.layout.encode())
        opened: m.Opened = await self.call(member, message, self.policy.call_ms)
        if space.key and opened.key != space.key:
            raise InvalidArgument(
                "secret", f"{member.name} has another cluster secret than the other nodes"
            )
        space.numbers[member.name] = (opened.namespace, opened.instance)
        return opened

    async def number(self, member: Member, space: ClusterSpace) -> tuple[int, int]:
        """A namespace's number at a member, and the life of the member that it is good in."""
        known = space.numbers.get(member.name)
        if known is None:
            await self.open_at(member, space)
            known = space.numbers[member.name]
        return known

    async def asked(
        self,
        member: Member,
        space: ClusterSpace,
        make: Callable[[int, int], Any],
        timeout_ms: float,
    ) -> Any:
        """A call about a namespace, which is opened again where the member restarted."""
        try:
            return await self.call(member, make(*await self.number(member, space)), timeout_ms)
        except StaleNamespace:
            space.numbers.pop(member.name, None)
            return await self.call(member, make(*await self.number(member, space)), timeout_ms)

    async def read(
        self,
        member: Member,
        space: ClusterSpace,
        make: Callable[[int, int], Any],
        *,
        timeout_ms: float,
        patience_ms: float,
    ) -> Any:
        """`asked`, for so long again and again where the member has not learnt of this client's
        view yet: it will in a moment, and what it has may be nowhere else."""
        end_ms = self.world.now_ms() + patience_ms
        while True:
            try:
                return await self.asked(member, space, make, timeout_ms)
            except m.WrongEpoch:
                if self.world.now_ms() + BEHIND_MS >= end_ms:
                    raise
            await self.world.sleep(BEHIND_MS)

    async def session(self, member: Member) -> int:
        """The number of this client's session at a member, begun where there is none."""
        generation = self.memory.generation
        known = self._sessions.get(member.name)
        if known and known[0] == generation and not known[1].lost:
            return known[1].welcomed.session
        task = self._attaching.get(member.name)
        if task is None or task.done:
            task = self._attaching[member.name] = self.world.spawn(self._attach(member))
        await self.world.wait([task], self.policy.call_ms)
        if not task.done:
            raise DeadlineExceeded(f"{member.name} began no session in time")
        number = task.result()
        if isinstance(number, KVStoreError):
            raise number
        made = self._sessions.get(member.name)
        if made is None or made[0] != generation:  # it was begun for an earlier ring
            raise TransferFailed(f"the session at {member.name} is of another landing ring")
        return number

    def leave(self, member: Member, session: int) -> None:
        """The next call begins another session: the member moves no more bytes by this one."""
        known = self._sessions.get(member.name)
        if known and known[1].welcomed.session == session:
            self._sessions[member.name] = (_OVER, known[1])

    def prepare(self, member: Member, space: ClusterSpace) -> None:
        """Begins a session with who is asked next if somebody fails: it takes too long for then."""
        known, name = self._sessions.get(member.name), member.name
        ready = known and known[0] == self.memory.generation and not known[1].lost
        if ready or name in self._preparing or self.health.suspects(name):
            return
        self._preparing.add(name)

        async def work() -> None:
            try:
                await self.session(member)
                await self.number(member, space)
            except KVStoreError:
                return
            finally:
                self._preparing.discard(name)

        self.world.spawn(work())

    async def _attach(self, member: Member) -> int | KVStoreError:
        """The session's number, or why there is none: whoever asked may have given up."""
        old = self._sessions.pop(member.name, None)
        if old:
            await old[1].close()
        generation = self.memory.generation
        hello = m.Hello(
            version=m.MESSAGES_VERSION,
            name="",
            kind=self.memory.kind,
            agent=self.memory.describe(),
            epoch=self.view.epoch if self.view else 0,
        )
        try:
            made = await self.world.attach(member.address, hello, self.policy.call_ms)
        except KVStoreError as error:
            if isinstance(error, GONE):
                self.health.failed(member.name)
            return error
        self._sessions[member.name] = (generation, made)
        return made.welcomed.session

    async def close(self) -> None:
        """Ends all sessions."""
        while self._sessions:  # one that was on its way may come meanwhile
            _name, (_generation, attachment) = self._sessions.popitem()
            await attachment.close()

    # -- who is asked ------------------------------------------------------------------

    def by_health(self, members: Iterable[Member]) -> list[Member]:
        """Those that answer first; those that are out never."""
        known = [member for member in members if member.state != MemberState.OUT]
        return sorted(known, key=lambda member: self.health.suspects(member.name))

    def readers(self, places: c.U64) -> dict[int, list[Member]]:
        """By place, who may have its blocks, the best first."""
        assert self.view
        members, unique = self.view.members, list(dict.fromkeys(places.tolist()))
        if len(unique) < len(places):
            places = np.array(unique, np.uint64)
        extra = max((self.hot.get(place, 0) for place in unique), default=0) if self.hot else 0
        most = self.ranking.copies + SPARE + extra
        rows = self.ranking.targets(places, most=most).tolist()
        if not self.view.settled:
            earlier = self.ranking.earlier(places).tolist()
            rows = [[*a, *(n for n in b if n not in a)] for a, b in zip(rows, earlier, strict=True)]
        found = {}
        orders: dict[tuple[int, ...], list[Member]] = {}
        for place, row in zip(unique, map(tuple, rows), strict=True):
            order = orders.get(row)
            if order is None:
                order = orders[row] = self.by_health(members[n] for n in row)
            if self.hot and (hot := self.hot.get(place, 0)):  # all of its copies share the load
                copies = self.ranking.copies + hot
                head = order[:copies]
                self.world.random.shuffle(head)
                order = self.by_health((*head, *order[copies:]))
            found[place] = order
        return found

    def targets(self, places: Sequence[int]) -> list[list[Member]]:
        """For each place whom new blocks of it are put to, the best first."""
        assert self.view
        members = self.view.members
        ranked = self.ranking.targets(np.array(places, np.uint64)).tolist()
        orders: dict[tuple[int, ...], list[Member]] = {}  # few, where there are many places
        for row in ranked:
            if tuple(row) not in orders:
                orders[tuple(row)] = self.by_health(members[n] for n in row)
        return [orders[tuple(row)] for row in ranked]
