"""What the parts of one node share: its view, its namespaces, who answers it, counters."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from kvstore import commands as c
from kvstore.cluster.members import Member, MemberState, View, decode_view, encode_view
from kvstore.cluster.messages import WrongEpoch
from kvstore.cluster.moves import Moves
from kvstore.cluster.placement import OVERLOAD, SPARE, Ranking
from kvstore.cluster.world import Ledger, NodeStore, World
from kvstore.errors import ProtocolError, StaleNamespace, Unavailable
from kvstore.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class NodePolicy:
    """How a node behaves; times in milliseconds.

    repair_bytes_per_ms: what bringing blocks to where they belong may take. compare_ms: between two
    rounds of anti-entropy where nothing has changed. hot_reads: reads of a segment within `hot_ms`
    that make it hot; hot_copies: how many more copies it gets then.
    """

    call_ms: float = 2000.0
    transfer_ms: float = 10_000.0
    ping_ms: float = 500.0
    ping_timeout_ms: float = 400.0
    pings: int = 8
    suspect_after: int = 2
    watch_s: float = 1.0
    learn_ms: float = 10_000.0
    repair_bytes_per_ms: float = 256 * 1024.0
    repair_batch_bytes: int = 16 << 20
    compare_ms: float = 30_000.0
    retry_ms: float = 500.0
    hot_reads: int = 200
    hot_ms: float = 10_000.0
    hot_copies: int = 1
    most_hot: int = 4096
    most_background: int = 1024


@dataclass(slots=True)
class Counters:
    """What has happened since the node's start."""

    puts: int = 0
    gets: int = 0
    pulled_blocks: int = 0
    pulled_bytes: int = 0
    pushed_blocks: int = 0
    pushed_bytes: int = 0
    sent_blocks: int = 0
    sent_bytes: int = 0
    taken_blocks: int = 0
    taken_bytes: int = 0
    corrupted: int = 0
    refused_epoch: int = 0
    failed_transfers: int = 0
    repaired_blocks: int = 0
    compared_rounds: int = 0
    replaced: int = 0
    lost_slots: int = 0
    hot_segments: int = 0
    epochs: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A namespace as this node's store knows it."""

    number: int
    instance: int
    name: str
    layout: Layout
    key: bytes = field(repr=False)

    @property
    def mark(self) -> tuple[str, str]:
        """The same at all nodes, and after restarts."""
        return mark_of(self.name, self.layout.encode())


def mark_of(name: str, layout: bytes) -> tuple[str, str]:
    """What a namespace is called where its generation is kept: name and layout (ASCII)."""
    return name, layout.decode()


class Health:
    """Who answers. A member that failed twice in a row is suspected, and avoided until it answers a
    ping: so a dead one costs the first few calls a timeout, and nobody after them."""

    def __init__(self, suspect_after: int) -> None:
        self._suspect_after = suspect_after
        self._failures: dict[str, int] = {}

    def failed(self, name: str, *, at_once: bool = False) -> None:
        """A call to it failed. at_once: for certain, since nobody was there."""
        more = self._suspect_after if at_once else 1
        self._failures[name] = self._failures.get(name, 0) + more

    def answered(self, name: str) -> bool:
        """It is there; True where it had been suspected."""
        return self._failures.pop(name, 0) >= self._suspect_after

    def suspects(self, name: str) -> bool:
        """Whether to avoid it."""
        return self._failures.get(name, 0) >= self._suspect_after

    def keep(self, names: Iterable[str]) -> None:
        """Forgets all others."""
        known = set(names)
        self._failures = {name: n for name, n in self._failures.items() if name in known}

    @property
    def names(self) -> list[str]:
        """Whom it suspects."""
        return sorted(name for name in self._failures if self.suspects(name))


class Site:
    """The node's own facts, durable (epoch, what was forgotten) and not."""

    def __init__(
        self,
        world: World,
        store: NodeStore,
        ledger: Ledger,
        *,
        me: Member,
        replicas: int,
        policy: NodePolicy,
    ) -> None:
        """`ProtocolError` for a ledger of another format."""
        self.world, self.store, self.policy = world, store, policy
        self.me, self.replicas = me, replicas
        self.counters, self.health = Counters(), Health(policy.suspect_after)
        self.serving = False
        self.settled = -1
        self.loads: dict[str, tuple[int, int]] = {}  # by name: bytes used, of how many
        self.settled_at: dict[str, int] = {}
        self.missed: set[str] = set()  # who was suspected, and is back
        self.moves = Moves(world)
        self._ledger = ledger
        self._spaces: dict[int, Space] = {}
        self._by_mark: dict[tuple[str, str], Space] = {}
        self._forgets = 0
        # learnt: since when (`Member.joined`) it has been a member that knows what was forgotten.
        # since, through: the first and the last epoch of which it knows all that was.
        self.seen_epoch, self.learnt, self.since, self.through, self.forgotten = _read(
            ledger.load()
        )
        self.view = View(epoch=0, replicas=replicas, members=())
        self.ranking = Ranking(self.view)

    # -- epochs ------------------------------------------------------------------------

    def adopt(self, view: View) -> bool:
        """Goes by a later view from now on, and remembers its epoch first; False for another."""
        if view.epoch <= self.view.epoch or view.epoch < self.seen_epoch:
            return False
        member = view.find(self.me.name)
        if member and member.joined == self.learnt and member.state != MemberState.OUT:
            self.through = view.epoch
        if view.epoch > self.seen_epoch:
            self.seen_epoch = view.epoch
            self.save()
        if member is None or member.joined != self.learnt:
            self.serving = False  # it was no member for a while, and missed what was forgotten
        self.view, self.ranking = view, Ranking(view)
        self.health.keep(member.name for member in view.members)
        self.counters.epochs += 1
        return True

    def fence(self, epoch: int) -> None:
        """`WrongEpoch` unless the sender goes by this node's view."""
        if epoch == self.view.epoch:
            return
        self.counters.refused_epoch += 1
        raise WrongEpoch(encode_view(self.view) if epoch < self.view.epoch else b"")

    def check_reader(self, epoch: int) -> None:
        """`WrongEpoch` where the sender goes by a later view: this node may have been left out of
        it, and have missed what was forgotten then. Readers under earlier views are answered."""
        if epoch > self.view.epoch:
            self.counters.refused_epoch += 1
            raise WrongEpoch(b"")

    def learn(self, encoded: bytes) -> bool:
        """Adopts a view that somebody sent, if it is a later one."""
        return bool(encoded) and self.adopt(decode_view(encoded))

    def check_serving(self) -> None:
        """`Unavailable` until the node has learnt what was forgotten while it was away."""
        if not self.serving:
            raise Unavailable(f"{self.me.name} is still learning what was forgotten")

    def save(self) -> None:
        """Writes epoch and generations down. Raises OSError."""
        forgotten = [[name, layout, n] for (name, layout), n in self.forgotten.items()]
        fields = {
            "version": 1,
            "epoch": self.seen_epoch,
            "learnt": self.learnt,
            "since": self.since,
            "through": self.through,
            "forgotten": forgotten,
        }
        self._ledger.save(json.dumps(fields, sort_keys=True).encode())

    @property
    def role(self) -> MemberState | None:
        """What this node is in the view; None where it is no member."""
        member = self.view.find(self.me.name)
        return member.state if member else None

    # -- members -----------------------------------------------------------------------

    def others(self) -> list[Member]:
        """All other members that are not out."""
        out, me = MemberState.OUT, self.me.name
        return [m for m in self.view.members if m.name != me and m.state != out]

    def ranked(self, places: c.U64, extra: int = 0) -> list[tuple[int, ...]]:
        """For each place the numbers of the members that new blocks of it may go to, the best
        first; `extra` more where it is hot."""
        most = self.ranking.copies + SPARE + extra
        return [tuple(row) for row in self.ranking.targets(places, most=most).tolist()]

    def partners_of(self, ranked: Sequence[int]) -> list[Member]:
        """All of those but this node, those that fail or are full last."""
        members = [self.view.members[n] for n in ranked]
        others = [m for m in members if m.name != self.me.name]
        return sorted(others, key=lambda m: (self.health.suspects(m.name), self.is_full(m)))

    def is_full(self, member: Member) -> bool:
        """Whether it holds much more than its share, so that the next one in the ranking is to
        take new blocks."""
        used, total = self.loads.get(member.name, (0, 1))
        if 2 * used < total or len(self.loads) < 2:
            return False
        weights = {m.name: m.weight for m in self.view.members}
        known = {name: load for name, (load, _) in self.loads.items() if name in weights}
        fair = sum(known.values()) / max(1, sum(weights[name] for name in known))
        return used > OVERLOAD * fair * member.weight

    # -- namespaces --------------------------------------------------------------------

    async def open(self, name: str, layout: bytes) -> Space:
        """The namespace in this node's store, made where it is new. `InvalidArgument`."""
        known = self._by_mark.get(mark_of(name, layout))
        if known is not None and known.instance == self.store.instance:
            return known
        command = c.OpenNamespace(name=name, layout=layout)
        forgets = -1
        while forgets != self._forgets:  # else the number may be of what was forgotten meanwhile
            forgets = self._forgets
            opened: c.NamespaceOpened = await self.store.command(command, self.policy.call_ms)
        space = Space(
            number=opened.namespace,
            instance=self.store.instance,
            name=name,
            layout=Layout.decode(layout),
            key=opened.key,
        )
        self._spaces[space.number] = self._by_mark[space.mark] = space
        return space

    def space(self, number: int, instance: int) -> Space:
        """A namespace that was opened here; `StaleNamespace` for another life's number."""
        found = self._spaces.get(number)
        if found is None or instance != self.store.instance:
            raise StaleNamespace(f"namespace {number} is not open at {self.me.name}: open it again")
        return found

    def forget_space(self, space: Space) -> None:
        """Its number means nothing any more."""
        self._forgets += 1
        self._spaces.pop(space.number, None)
        self._by_mark.pop(space.mark, None)

    def generation(self, mark: tuple[str, str]) -> int:
        """How often the cluster forgot all of a namespace, as far as this node knows."""
        return self.forgotten.get(mark, 0)


def _read(data: bytes) -> tuple[int, int, int, int, dict[tuple[str, str], int]]:
    if not data:
        return 0, -1, 0, -1, {}
    try:
        fields = json.loads(data)
        if fields["version"] != 1:
            raise ProtocolError(f"a ledger of version {fields['version']}; this release knows 1")
        forgotten = {(str(name), str(lay)): int(n) for name, lay, n in fields["forgotten"]}
        learnt = int(fields["learnt"])
        since, through = int(fields.get("since", 0)), int(fields.get("through", learnt))
        return int(fields["epoch"]), learnt, since, through, forgotten
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProtocolError(f"malformed ledger: {error}") from None
