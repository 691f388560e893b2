"""One trust domain's blocks: every command has its one handler here.

The store owns the index, the slots, the pending puts, the leases and the eviction order. It is
told the time, never asks for it, and never touches a socket. A million blocks are rows of arrays;
only what is in flight (pending puts, leases, deadlines) is an object.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.errors import (
    InvalidArgument,
    KVStoreError,
    PermissionDenied,
    ResourceExhausted,
)
from kvstore.index.format import DRAM_TIER, NVME_TIER
from kvstore.nvme.ops import Outcome
from kvstore.nvme.volume import Volume
from kvstore.store.adoption import Adoption
from kvstore.store.blocks import NO_BLOCK, BlockState
from kvstore.store.checks import check_hashes
from kvstore.store.deadlines import Due
from kvstore.store.intake import Intake
from kvstore.store.memory import StoreMemory
from kvstore.store.namespaces import Namespace
from kvstore.store.nvme import NvmePolicy, NvmeTier
from kvstore.store.puts import Connection, GrantedBlocks
from kvstore.store.shelf import Shelf
from kvstore.store.stock import Stock
from kvstore.store.tickets import Deferred

_PLAIN = NvmePolicy()


class Store:
    """Every public method leaves `check()` true. Times are Unix milliseconds, never going back."""

    def __init__(
        self,
        memory: StoreMemory,
        *,
        secret: bytes,
        instance_id: int,
        max_blocks: int,
        policy: str = "lru",
        now_ms: int,
        version: str = "",
        volumes: Sequence[Volume] = (),
        nvme: NvmePolicy = _PLAIN,
    ) -> None:
        """`InvalidArgument` for a pool, policy, secret or number of blocks out of range.

        volumes: of the NVMe tier, each of which somebody tells `recovered` of.
        """
        self._started_ms = now_ms
        self._instance_id, self._version, self._policy_name = instance_id, version, policy
        self._shelf = Shelf(
            memory,
            secret=secret,
            instance_id=instance_id,
            max_blocks=max_blocks,
            policy=policy,
            now_ms=now_ms,
            volumes=volumes,
            every=nvme.every,
        )
        self.nvme = NvmeTier(self._shelf, nvme, run=instance_id)
        self._intake = Intake(self._shelf)
        self._stock = Stock(self._shelf, self._intake.puts)
        self._adoption = Adoption(self._shelf, self._stock, memory.boards)
        self._connections: dict[int, Connection] = {}
        self._next_connection = self._next_lease = 1

    # -- time --------------------------------------------------------------------------

    @property
    def next_due_ms(self) -> int | None:
        """When `tick` has something to do; None: as long as no command comes, never."""
        times = (self._shelf.deadlines.next_ms, self.nvme.next_due_ms)
        return min((t for t in times if t is not None), default=None)

    def tick(self, now_ms: int) -> None:
        """Does what is due by now: blocks expire, pins end, and turns that never came are over."""
        self._shelf.now_ms = max(self._shelf.now_ms, now_ms)
        for kind, ids in self._shelf.deadlines.take(self._shelf.now_ms):
            match kind:
                case Due.EXPIRY:
                    self._shelf.counters.expired += len(ids)
                    self._shelf.policy.forget(ids)
                    self._shelf.forget(ids, c.ExplainStatus.EXPIRED)
                case Due.PIN:
                    self._shelf.pinned_bytes -= self._shelf.slot_bytes(ids)
                case Due.TURN:
                    self._shelf.policy.demote(ids)
                case Due.PARTS:
                    self._intake.drop(self._intake.puts.of_blocks(ids))
        self.nvme.pump()

    def hear(self, outcome: Outcome, now_ms: int) -> None:
        """What came of an operation that `nvme` gave out."""
        self._shelf.now_ms = max(self._shelf.now_ms, now_ms)
        self.nvme.hear(outcome)

    # -- connections -------------------------------------------------------------------

    def connect(self) -> int:
        """Registers a client and returns its id; `ResourceExhausted` past the limit."""
        if len(self._connections) >= limits.MAX_CONNECTIONS:
            raise ResourceExhausted(
                f"{limits.MAX_CONNECTIONS} clients are connected",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        number = self._next_connection
        self._next_connection += 1
        self._connections[number] = Connection(board=self._adoption.open_board())
        return number

    def board_of(self, connection: int) -> int | None:
        """The number of the board that the client may post to."""
        return self._connections[connection].board

    def disconnect(self, connection: int, *, writes: bool = True) -> bool:
        """The connection closed while its process may live: what it holds goes to quarantine.

        writes: whether that process can write the pool; else its slots come back now. Returns
        True when nothing is held, and the connection is forgotten at once.
        """
        self.adopt()
        who = self._connections[connection]
        self._adoption.close_board(who)
        self.nvme.tickets.forget(connection)
        held = list(who.puts.values())
        self._intake.drop(held)
        if not writes:
            self._intake.let_go(held, connection, who)
            self._stock.take_all(who)
        if who.holds_nothing:
            self._adoption.free_board(who)
            del self._connections[connection]
        if self._shelf.places.volumes:
            self.nvme.pump()
        return who.holds_nothing

    def holder_died(self, connection: int) -> None:
        """The process behind the connection is gone: everything it held is given back."""
        self.adopt()
        who = self._connections.pop(connection, None)
        if who is None:
            return
        self._adoption.close_board(who)
        self._adoption.free_board(who)
        held = list(who.puts.values())
        self._intake.drop(held)
        self._intake.let_go(held, connection, who)
        self._stock.take_all(who)
        for ids in who.leases.values():
            self._shelf.free(self._shelf.blocks.release(ids))

    # -- the one handler ---------------------------------------------------------------

    def handle(self, connection: int, command: c.Command, now_ms: int) -> c.Result | Deferred:
        """Carries out one command for `connection`; raises a `KVStoreError` on bad input.

        What is due by `now_ms` must have been done by `tick`. `Deferred`: the answer will be among
        `nvme.tickets`; until then the connection sends no other command.
        """
        self._shelf.now_ms = max(self._shelf.now_ms, now_ms)
        who = self._connections[connection]
        self.adopt()
        result = _HANDLERS[type(command)](self, connection, who, command)
        if self._shelf.places.volumes:
            self.nvme.pump()
        return result

    def adopt(self) -> None:
        """Takes over what clients have posted by now, so that whatever follows knows of it."""
        self._adoption.adopt(self._connections.values())

    def make_room(self) -> None:
        """Does what can wait until answers are out: the evictions for slots that are likely to be
        asked for next."""
        self._stock.make_room()
        if self._shelf.places.volumes:
            self.nvme.pump()

    def stats(self) -> c.Stats:
        """The counters as they are now."""
        return c.Stats(
            blocks=self._shelf.catalog.entries,
            pending_blocks=len(self._intake.puts),
            quarantined_blocks=self._intake.puts.quarantined,
            leased_blocks=int(np.count_nonzero(self._shelf.blocks.leases)),
            pinned_blocks=int(np.count_nonzero(self._shelf.deadlines.times[Due.PIN])),
            used_bytes=self._shelf.room.slabs.used_bytes
            - self._stock.nbytes
            - self._shelf.ready_bytes,
            ahead_bytes=self._stock.nbytes,
            total_bytes=self._shelf.room.slabs.total_bytes,
            lookups=self._shelf.counters.lookups,
            hits=self._shelf.counters.hits,
            stored=self._shelf.counters.stored,
            evicted=self._shelf.counters.evicted,
            dropped=self._shelf.counters.dropped,
            expired=self._shelf.counters.expired,
            refused=self._shelf.counters.refused,
            connections=len(self._connections),
            cold_hits=self._shelf.counters.cold_hits,
            promoted=self._shelf.counters.promoted,
            demoted=self._shelf.counters.demoted,
            corrupted=self._shelf.counters.corrupted,
            **self.nvme.gauges(),
        )

    def _describe(self) -> c.Description:
        spaces = list(self._shelf.namespaces)
        return c.Description(
            version=self._version,
            instance=self._instance_id,
            policy=self._policy_name,
            max_blocks=self._shelf.blocks.state.size,
            index_capacity=self._shelf.catalog.capacity,
            started_ms=self._started_ms,
            names="\n".join(space.name for space in spaces),
            layouts="\n".join(space.layout.encode().decode() for space in spaces),
            ids=np.array([space.id for space in spaces], np.uint32),
            blocks=np.array([space.blocks for space in spaces], np.uint64),
            generations=np.array([space.generation for space in spaces], np.uint64),
        )

    def granted(
        self, connection: int, namespace: int, put_id: bytes, hashes: c.U8
    ) -> GrantedBlocks:
        """Where the bytes of these blocks go, which `connection` has reserved and not sealed.

        `LayoutMismatch` where it has reserved different cells of them.
        """
        who = self._connections[connection]
        return self._intake.granted(connection, who, namespace, put_id, hashes)

    # -- namespaces --------------------------------------------------------------------

    def _open(self, command: c.OpenNamespace) -> c.NamespaceOpened:
        self.nvme.show_heirs()
        pool_bytes = self._shelf.room.slabs.total_bytes
        opened = self._shelf.namespaces.open(command.name, command.layout, pool_bytes)
        if opened is None and self._shelf.namespaces.close_unused(
            {p.namespace for p in self._intake.puts}
        ):
            self._shelf.catalog.forget_namespaces()
            opened = self._shelf.namespaces.open(command.name, command.layout, pool_bytes)
        if opened is None:
            raise ResourceExhausted(
                f"{limits.MAX_NAMESPACES} namespaces hold blocks",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        return c.NamespaceOpened(namespace=opened.id, key=opened.key, generation=opened.generation)

    # -- get ---------------------------------------------------------------------------

    def _lease(self, who: Connection, command: c.Lease) -> c.Leased:
        self._shelf.namespaces.get(command.namespace)
        check_hashes(command.hashes)
        ids = self._shelf.catalog.find(command.namespace, command.hashes)
        live = self._shelf.blocks.state[np.maximum(ids, 0)] == BlockState.LIVE
        missing = np.flatnonzero((ids < 0) | ~live)
        run = (ids[: missing[0]] if len(missing) else ids).astype(np.uint32)
        if who.leased_blocks + len(run) > limits.MAX_LEASED_BLOCKS_PER_CONNECTION:
            raise ResourceExhausted(
                f"a connection may lease {limits.MAX_LEASED_BLOCKS_PER_CONNECTION} blocks",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        self._shelf.counters.lookups += len(ids)
        self._shelf.counters.hits += len(run)
        lease = 0  # of nothing: there is nothing to release
        if len(run):
            lease = self._next_lease
            self._next_lease += 1
            who.leases[lease] = run
            who.leased_blocks += len(run)
            self._shelf.blocks.lease(run)
            self._shelf.read(run)
        granules = self._shelf.blocks.granule[run]
        expires_ms = self._shelf.deadlines.times[Due.EXPIRY][run]
        left_ms = np.maximum(expires_ms - self._shelf.now_ms, 1)
        return c.Leased(
            lease=lease,
            granules=granules,
            generations=self._shelf.memory.generations[granules],
            left_ms=np.where(expires_ms, left_ms, 0).astype(np.uint64),
        )

    def _release(self, who: Connection, command: c.Release) -> c.Count:
        ids = who.leases.pop(command.lease, None)
        if ids is None:
            raise PermissionDenied(f"lease {command.lease} is not held by this connection")
        who.leased_blocks -= len(ids)
        self._shelf.free(self._shelf.blocks.release(ids))
        return c.Count(blocks=len(ids))

    def _touch(self, command: c.Touch) -> c.Count:
        if len(command.granules) != len(command.generations):
            raise InvalidArgument("generations", "expected one for each granule")
        if not 0 <= command.hits <= command.lookups <= limits.MAX_LOOKUPS_PER_TOUCH:
            most = limits.MAX_LOOKUPS_PER_TOUCH
            raise InvalidArgument("hits", f"expected 0 to lookups, and at most {most} of those")
        if not 0 <= command.cold_hits <= command.hits:
            raise InvalidArgument("cold_hits", "expected 0 to hits")
        self._shelf.counters.lookups += command.lookups
        self._shelf.counters.hits += command.hits
        self._shelf.counters.cold_hits += command.cold_hits
        if not len(command.granules):  # of look-ups that found nothing
            return c.Count(blocks=0)
        inside = command.granules < self._shelf.memory.generations.size
        granules, generations = command.granules[inside], command.generations[inside]
        current = self._shelf.memory.generations[granules] == generations
        ids = self._shelf.blocks.at(granules[current])
        ids = ids[ids != NO_BLOCK]
        self._shelf.read(ids)
        return c.Count(blocks=len(ids))

    # -- hints -------------------------------------------------------------------------

    def _hint(self, command: c.Hint) -> c.Count:
        namespace = self._shelf.namespaces.get(command.namespace)
        check_hashes(command.hashes)
        if command.kind not in list(c.HintKind):
            raise InvalidArgument("kind", f"no hint is numbered {command.kind}")
        if not 0 <= command.for_ms <= limits.MAX_HINT_MS:
            raise InvalidArgument("for_ms", f"0 to {limits.MAX_HINT_MS} ms, please")
        found = self._shelf.catalog.find(command.namespace, command.hashes)
        ids = found[found >= 0].astype(np.uint32)
        _, first = np.unique(ids, return_index=True)
        ids = ids[np.sort(first)]  # in chain order still
        match c.HintKind(command.kind):
            case c.HintKind.SESSION_ENDS:
                self._shelf.deadlines.clear(Due.TURN, ids)
                self._shelf.policy.demote(ids)
            case c.HintKind.NEXT_TURN_BY:
                live = self._shelf.live(ids)
                self._shelf.deadlines.set(Due.TURN, live, self._shelf.now_ms + command.for_ms)
                self.nvme.bring(namespace, ids)
            case c.HintKind.PIN_UNTIL:
                self._shelf.pin(self._shelf.live(ids), command.for_ms)
                if command.for_ms:
                    self.nvme.bring(namespace, ids)
        return c.Count(blocks=len(ids))

    # -- forgetting and explaining -----------------------------------------------------

    def _drop(self, connection: int, command: c.Drop) -> c.Result | Deferred:
        namespace = self._shelf.namespaces.get(command.namespace)
        if len(command.hashes):
            check_hashes(command.hashes)
            self.nvme.drop(namespace, command.hashes)
            found = np.unique(self._shelf.catalog.find(command.namespace, command.hashes))
            count = self._shelf.drop(found[found >= 0].astype(np.uint32))
        else:
            count = self._drop_namespace(namespace)
        return self.nvme.forgotten(connection, count) if self._shelf.places.volumes else count

    def _drop_namespace(self, namespace: Namespace) -> c.Count:
        self._intake.drop([p for p in self._intake.puts if p.namespace == namespace.id])
        self.nvme.drop_namespace(namespace)
        count = self._shelf.drop(self._shelf.blocks.live_in(namespace.id))
        self._shelf.namespaces.move_on(namespace)
        self._shelf.catalog.forget_namespaces()
        return count

    def _explain(self, command: c.Explain) -> c.Explained:
        namespace = self._shelf.namespaces.get(command.namespace)
        check_hashes(command.hashes)
        status, when_ms = self._shelf.catalog.recall(command.hashes, namespace.lineage)
        unknown = np.flatnonzero(status == 0)
        status[unknown] = c.ExplainStatus.NEVER_STORED
        others = (o for o in self._shelf.namespaces if o.name == namespace.name)
        for other in itertools.islice(others, limits.MAX_LAYOUTS_EXPLAINED):
            if other is not namespace and len(unknown):
                elsewhere = self._shelf.catalog.find(other.id, command.hashes[unknown]) >= 0
                status[unknown[elsewhere]] = c.ExplainStatus.OTHER_LAYOUT
                unknown = unknown[~elsewhere]
        pending = [
            self._intake.puts.find(namespace.id, h.tobytes()) is not None for h in command.hashes
        ]
        status[pending] = c.ExplainStatus.NOT_SEALED
        ids = self._shelf.catalog.find(namespace.id, command.hashes)
        stored = ids >= 0
        status[stored] = c.ExplainStatus.STORED
        when_ms[stored | pending] = 0
        live = self._shelf.blocks.state[np.maximum(ids, 0)] == BlockState.LIVE
        tiers = np.where(stored, np.where(live, DRAM_TIER, NVME_TIER), 0).astype(np.uint8)
        return c.Explained(status=status, tiers=tiers, when_ms=when_ms)

    def _scan(self, command: c.Scan) -> c.Scanned:
        most = limits.MAX_KEYS_PER_CALL
        if not 0 < command.most <= most:
            raise InvalidArgument("most", f"1 to {most}, please")
        if not 0 <= command.first < self._shelf.blocks.state.size:
            raise InvalidArgument("first", "is where no page begins")
        ids, following = self._shelf.blocks.page(command.first, command.most)
        words = self._shelf.catalog.words_of(ids)
        hashes = words.view(np.uint8).reshape(len(ids), limits.KEY_BYTES)
        return c.Scanned(
            following=following,
            namespaces=self._shelf.blocks.namespace[ids],
            hashes=hashes,
            put_ids=self._shelf.blocks.put_id[ids],
        )

    # -- invariants --------------------------------------------------------------------

    def check(self) -> None:
        """Walks every invariant; an AssertionError is a bug of ours."""
        self._shelf.room.slabs.check()
        self._shelf.catalog.check()
        self._shelf.policy.check()
        self._shelf.blocks.check()
        self._shelf.deadlines.check()
        blocks = self._shelf.blocks
        live = np.flatnonzero(blocks.state == BlockState.LIVE)
        known = np.flatnonzero(blocks.in_index(np.arange(blocks.state.size, dtype=np.uint32)))
        assert len(live) == len(self._shelf.policy)
        assert len(known) == self._shelf.catalog.entries
        self._shelf.places.check(known.astype(np.uint32))
        held = {p for who in self._connections.values() for p in who.puts.values()}
        held |= set(self._intake.puts)
        assert len(held) - len(self._intake.puts) == self._intake.puts.quarantined
        stock = [slot for who in self._connections.values() for slot in who.stock.items()]
        ready = self._shelf.ready
        stock += zip(ready.granules.tolist(), ready.ids.tolist(), strict=True)
        assert blocks.count(BlockState.PENDING) == len(held) + len(stock)
        assert all(blocks.granule[block] == granule for granule, block in stock)
        assert self._stock.nbytes == sum(who.stock_bytes for who in self._connections.values())
        taken = np.flatnonzero(~np.isin(blocks.state, (BlockState.FREE, BlockState.COLD)))
        slots = blocks.granule[taken]
        assert len(np.unique(slots)) == len(slots), "one slot, two owners"
        used = sum(self._shelf.room.slabs.class_of(int(g)) for g in slots)
        assert used == self._shelf.room.slabs.used_bytes, "in use plus free is not the total"
        assert (self._shelf.memory.generations[blocks.granule[live]] % 2 == 0).all()
        leases = np.zeros_like(blocks.leases)
        for who in self._connections.values():
            assert who.leased_blocks == sum(len(ids) for ids in who.leases.values())
            assert who.put_bytes == sum(p.slot_bytes for p in who.puts.values())
            assert who.stock_bytes == sum(map(self._shelf.room.slabs.class_of, who.stock))
            for ids in who.leases.values():
                np.add.at(leases, ids, 1)
        assert (leases + self.nvme.leases() == blocks.leases).all()
        pinned = np.flatnonzero(self._shelf.deadlines.times[Due.PIN]).astype(np.uint32)
        assert (blocks.state[pinned] == BlockState.LIVE).all()
        assert self._shelf.slot_bytes(pinned) == self._shelf.pinned_bytes
        waiting = np.flatnonzero(self._shelf.deadlines.times[Due.PARTS]).tolist()
        alone = sorted(p.block for p in self._intake.puts if not p.writers)
        assert waiting == alone, "a put that nobody writes must be over some day"
        for space in self._shelf.namespaces:
            assert space.blocks == len(blocks.live_in(space.id))


# By the command's type, which is found at once; a table of the class, because one of each store's
# own methods would hold the store, and with it its memory, until the next collection.
_HANDLERS: dict[type, Callable[[Store, int, Connection, Any], c.Result | Deferred]] = {
    c.OpenNamespace: lambda store, _number, _who, command: store._open(command),
    c.Reserve: lambda store, number, who, command: store._intake.reserve(number, who, command),
    c.Seal: lambda store, number, who, command: store._intake.seal(number, who, command),
    c.Abort: lambda store, number, who, command: store._intake.abort(number, who, command),
    c.Grant: lambda store, _number, who, command: store._stock.grant(who, command),
    c.Commit: lambda store, _number, who, command: store._stock.commit(who, command),
    c.Adopt: lambda store, _number, who, command: store._stock.ask_ahead(who, command),
    c.GiveBack: lambda store, _number, who, command: store._stock.give_back(who, command),
    c.Lease: lambda store, _number, who, command: store._lease(who, command),
    c.Fetch: lambda store, number, _who, command: store.nvme.fetch(number, command),
    c.Persist: lambda store, number, _who, command: store.nvme.persist(number, command),
    c.Release: lambda store, _number, who, command: store._release(who, command),
    c.Touch: lambda store, _number, _who, command: store._touch(command),
    c.Drop: lambda store, number, _who, command: store._drop(number, command),
    c.Hint: lambda store, _number, _who, command: store._hint(command),
    c.Explain: lambda store, _number, _who, command: store._explain(command),
    c.Scan: lambda store, _number, _who, command: store._scan(command),
    c.Stat: lambda store, _number, _who, _command: store.stats(),
    c.Describe: lambda store, _number, _who, _command: store._describe(),
}


def failed(error: KVStoreError) -> c.Failed:
    """The wire form of an error."""
    return c.Failed(
        code=error.code,
        field=getattr(error, "field", ""),
        message=getattr(error, "message", str(error)),
        retry_after_ms=getattr(error, "retry_after_ms", 0),
    )
