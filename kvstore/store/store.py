"""One trust domain's blocks: every command has its one handler here.

The store owns the index, the slots, the pending puts, the leases and the eviction order. It is
told the time, never asks for it, and never touches a socket. A million blocks are rows of arrays;
only what is in flight (pending puts, leases, deadlines) is an object.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.block import pack_many
from kvstore.errors import (
    InvalidArgument,
    KVStoreError,
    LayoutMismatch,
    PermissionDenied,
    ResourceExhausted,
)
from kvstore.eviction import make_policy
from kvstore.store.blocks import NO_BLOCK, Blocks, BlockState, IdArray
from kvstore.store.catalog import Catalog
from kvstore.store.deadlines import Deadlines, Due
from kvstore.store.memory import StoreMemory
from kvstore.store.namespaces import Namespace, Namespaces
from kvstore.store.puts import Connection, GrantedBlocks, Pending, Puts, bits
from kvstore.store.room import Room

DRAM_TIER = 1
PUT_ID_BYTES = 16
_NO_PARENT = bytes(limits.KEY_BYTES)
NO_PARENT = bytes(limits.KEY_BYTES)  # what a header says where no parent is known


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
    ) -> None:
        """`InvalidArgument` for a pool, policy, secret or number of blocks out of range."""
        self._memory = memory
        self._now_ms = self._started_ms = now_ms
        self._instance_id, self._version, self._policy_name = instance_id, version, policy
        self._policy = make_policy(policy, max_blocks)
        self._blocks = Blocks(max_blocks, memory.generations.size)
        self._deadlines = Deadlines(max_blocks)
        self._room = Room(memory.pool.size, self._blocks, self._policy, self._deadlines)
        self._catalog = Catalog(memory.new_index, instance_id=instance_id, max_blocks=max_blocks)
        self._namespaces = Namespaces(secret)
        self._puts = Puts()
        self._connections: dict[int, Connection] = {}
        self._next_connection = self._next_lease = 1
        self._pinned_bytes = 0
        self._lookups = self._hits = self._stored = 0
        self._evicted = self._dropped = self._expired = self._refused = 0

    # -- time --------------------------------------------------------------------------

    @property
    def next_due_ms(self) -> int | None:
        """When `tick` has something to do; None: as long as no command comes, never."""
        return self._deadlines.next_ms

    def tick(self, now_ms: int) -> None:
        """Does what is due by now: blocks expire, pins end, and turns that never came are over."""
        self._now_ms = max(self._now_ms, now_ms)
        for kind, ids in self._deadlines.take(self._now_ms):
            match kind:
                case Due.EXPIRY:
                    self._expired += len(ids)
                    self._policy.forget(ids)
                    self._forget(ids, c.ExplainStatus.EXPIRED)
                case Due.PIN:
                    self._pinned_bytes -= self._slot_bytes(ids)
                case Due.TURN:
                    self._policy.demote(ids)
                case Due.PARTS:
                    self._drop_puts(self._puts.of_blocks(ids))

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
        self._connections[number] = Connection()
        return number

    def disconnect(self, connection: int) -> bool:
        """The connection closed while its process may live: what it holds goes to quarantine.

        Returns True when nothing is held, and the connection is forgotten at once.
        """
        who = self._connections[connection]
        self._drop_puts(who.puts.values())
        if who.holds_nothing:
            del self._connections[connection]
        return who.holds_nothing

    def holder_died(self, connection: int) -> None:
        """The process behind the connection is gone: everything it held is given back."""
        who = self._connections.pop(connection, None)
        if who is None:
            return
        held = list(who.puts.values())
        self._drop_puts(held)
        self._let_go(held, connection, who)
        for ids in who.leases.values():
            self._free(self._blocks.release(ids))

    # -- the one handler ---------------------------------------------------------------

    def handle(self, connection: int, command: c.Command, now_ms: int) -> c.Result:
        """Carries out one command for `connection`; raises a `KVStoreError` on bad input.

        What is due by `now_ms` must have been done by `tick`.
        """
        self._now_ms = max(self._now_ms, now_ms)
        who = self._connections[connection]
        match command:
            case c.OpenNamespace():
                return self._open(command)
            case c.Reserve():
                return self._reserve(connection, who, command)
            case c.Seal():
                return self._seal(connection, who, command)
            case c.Abort():
                return self._abort(connection, who, command)
            case c.Lease():
                return self._lease(who, command)
            case c.Release():
                return self._release(who, command)
            case c.Touch():
                return self._touch(command)
            case c.Drop():
                return self._drop(command)
            case c.Hint():
                return self._hint(command)
            case c.Explain():
                return self._explain(command)
            case c.Stat():
                return self.stats()
            case c.Describe():
                return self._describe()

    def stats(self) -> c.Stats:
        """The counters as they are now."""
        return c.Stats(
            blocks=self._catalog.entries,
            pending_blocks=len(self._puts),
            quarantined_blocks=self._puts.quarantined,
            leased_blocks=int(np.count_nonzero(self._blocks.leases)),
            pinned_blocks=int(np.count_nonzero(self._deadlines.times[Due.PIN])),
            used_bytes=self._room.slabs.used_bytes,
            total_bytes=self._room.slabs.total_bytes,
            lookups=self._lookups,
            hits=self._hits,
            stored=self._stored,
            evicted=self._evicted,
            dropped=self._dropped,
            expired=self._expired,
            refused=self._refused,
            connections=len(self._connections),
        )

    def _describe(self) -> c.Description:
        spaces = list(self._namespaces)
        return c.Description(
            version=self._version,
            instance=self._instance_id,
            policy=self._policy_name,
            max_blocks=self._blocks.state.size,
            index_capacity=self._catalog.capacity,
            started_ms=self._started_ms,
            names="\n".join(space.name for space in spaces),
            layouts="\n".join(space.layout.encode().decode() for space in spaces),
            ids=np.array([space.id for space in spaces], np.uint32),
            blocks=np.array([space.blocks for space in spaces], np.uint64),
            generations=np.array([space.generation for space in spaces], np.uint64),
        )

    # -- namespaces --------------------------------------------------------------------

    def _open(self, command: c.OpenNamespace) -> c.NamespaceOpened:
        pool_bytes = self._room.slabs.total_bytes
        opened = self._namespaces.open(command.name, command.layout, pool_bytes)
        if opened is None and self._namespaces.close_unused({p.namespace for p in self._puts}):
            self._catalog.forget_namespaces()
            opened = self._namespaces.open(command.name, command.layout, pool_bytes)
        if opened is None:
            raise ResourceExhausted(
                f"{limits.MAX_NAMESPACES} namespaces hold blocks",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        return c.NamespaceOpened(namespace=opened.id, key=opened.key, generation=opened.generation)

    # -- put ---------------------------------------------------------------------------

    def _reserve(self, number: int, who: Connection, command: c.Reserve) -> c.Reserved:
        namespace = self._namespaces.get(command.namespace)
        _check_reserve(command)
        mask = _cell_mask(command.cells, namespace.layout.n_cells)
        found = self._catalog.find(command.namespace, command.hashes)
        stored = found[found >= 0].astype(np.uint32)
        self._policy.touch(stored)
        status = np.where(found >= 0, c.ReserveStatus.EXISTS, c.ReserveStatus.IN_PROGRESS)
        granules = np.zeros(len(status), np.uint32)
        keys = [row.tobytes() for row in command.hashes]
        wanted: dict[bytes, int] = {}
        for i in np.flatnonzero(found < 0).tolist():
            wanted.setdefault(keys[i], i)  # a key that comes twice is written once
        fresh, granted = self._sort(number, who, command, mask, wanted)
        status[fresh] = c.ReserveStatus.NO_SPACE
        # They are in use, so room for the others must not come from them.
        with self._blocks.kept(np.concatenate((stored, self._parent_of(command)))):
            granted += self._begin(namespace, command, fresh, keys, who)
        for i, pending in granted:
            self._puts.join(pending, number, who, mask)
            status[i], granules[i] = c.ReserveStatus.GRANTED, pending.granule
        self._deadlines.clear(Due.PARTS, np.array([p.block for _, p in granted], np.uint32))
        no_space = status == c.ReserveStatus.NO_SPACE
        self._refused += int(no_space.sum())
        if no_space.all():
            raise ResourceExhausted(
                "no room: the pool is full of blocks in use, or this client has too many reserved",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        return c.Reserved(status=status.astype(np.uint8), granules=granules)

    def _sort(
        self, number: int, who: Connection, command: c.Reserve, mask: int, wanted: dict[bytes, int]
    ) -> tuple[list[int], list[tuple[int, Pending]]]:
        """Of the keys that are not stored: the numbers of those that nobody is putting, and what
        this connection may join. The others are another put's, or an earlier one's of ours that
        was dropped and not let go."""
        fresh: list[int] = []
        joined: list[tuple[int, Pending]] = []
        for key, i in wanted.items():
            ours = who.puts.get((command.namespace, key, command.put_id))
            pending = self._puts.find(command.namespace, key)
            if ours and ours.dropped:
                continue
            if pending is None:
                fresh.append(i)
            elif pending.may_join(command.put_id, number, mask):
                joined.append((i, pending))
        return fresh, joined

    def _parent_of(self, command: c.Reserve) -> IdArray:
        """The stored block before the command's first, if there is one."""
        if command.position < 0 or not command.parent:
            return np.empty(0, np.uint32)
        parent = np.frombuffer(command.parent, np.uint8).reshape(1, -1)
        found = self._catalog.find(command.namespace, parent)
        return found[found >= 0].astype(np.uint32)

    def _begin(
        self,
        namespace: Namespace,
        command: c.Reserve,
        fresh: list[int],
        keys: list[bytes],
        who: Connection,
    ) -> list[tuple[int, Pending]]:
        """Slots for as many of the keys numbered `fresh`, in order, as there is room for."""
        most = int(self._room.slabs.total_bytes * limits.MAX_GRANTED_SHARE) - who.granted_bytes
        n = min(
            len(fresh),
            limits.MAX_PENDING_BLOCKS - len(self._puts),
            max(1, most // namespace.slot_bytes) if most > 0 else 0,
        )
        if n <= 0:
            return []
        granules = self._room.allocate(namespace.slot_bytes, n, evict=self._evict)
        ids = self._blocks.take(granules, namespace.id)
        self._memory.generations[granules] += np.uint64(1)  # odd: being written
        everything = (1 << namespace.layout.n_cells) - 1
        begun = [
            Pending(
                namespace=namespace.id,
                key=keys[i],
                put_id=command.put_id,
                block=block,
                granule=granule,
                slot_bytes=namespace.slot_bytes,
                parent=_parent(command, keys, i),
                position=command.position + i if command.position >= 0 else -1,
                ttl_ms=command.ttl_ms,
                missing=everything,
            )
            for i, block, granule in zip(fresh, ids.tolist(), granules.tolist(), strict=False)
        ]
        self._puts.begin(begun)
        return list(zip(fresh, begun, strict=False))

    def granted(
        self, connection: int, namespace: int, put_id: bytes, hashes: c.U8
    ) -> GrantedBlocks:
        """Where the bytes of these blocks go, which `connection` has reserved and not sealed.

        `LayoutMismatch` where it has reserved different cells of them.
        """
        space = self._namespaces.get(namespace)
        _check_hashes(hashes)
        who = self._connections[connection]
        held = [who.puts.get((namespace, row.tobytes(), put_id)) for row in hashes]
        masks = {pending.writers[connection] for pending in held if pending}
        if len(masks) > 1:
            raise LayoutMismatch("hashes", "expected blocks of which the same cells were reserved")
        mask = masks.pop() if masks else 0
        whole = mask == (1 << space.layout.n_cells) - 1
        start, size = space.header_bytes, space.layout.block_bytes
        at = [p.granule * limits.GRANULE_BYTES + start if p else -1 for p in held]
        return GrantedBlocks(
            layout=space.layout,
            cells=np.array([] if whole else bits(mask), np.uint32),
            payloads=[self._memory.pool[a : a + size] if a >= 0 else None for a in at],
        )

    def _seal(self, number: int, who: Connection, command: c.Seal) -> c.Sealed:
        _check_put(command.put_id, command.hashes)
        held = _held(who, command)
        if not self._namespaces.known(command.namespace):
            self._let_go([p for p in held if p], number, who)
        namespace = self._namespaces.get(command.namespace)
        n = len(command.hashes)
        if command.checksums.ndim != 2 or len(command.checksums) != n:
            raise InvalidArgument("checksums", f"expected ({n}, cells), one row for each hash")
        if any(p and command.checksums.shape[1] != p.writers[number].bit_count() for p in held):
            raise LayoutMismatch("checksums", "expected one for each cell that was reserved")
        status = np.full(n, c.SealStatus.DROPPED, np.uint8)
        complete: dict[int, Pending] = {}
        over: list[Pending] = []
        for i, pending in enumerate(held):
            if pending is None or number not in pending.writers:
                continue
            if pending.dropped:
                over.append(pending)
                continue
            pending.arrive(pending.writers[number], command.checksums[i], namespace.layout.n_cells)
            self._puts.leave(pending, number, who)
            status[i] = c.SealStatus.WAITING
            if not pending.missing:
                complete[i] = pending
        self._let_go(over, number, who)
        if complete:
            shown = self._publish(namespace, list(complete.values()))
            status[list(complete)] = np.where(shown, c.SealStatus.STORED, c.SealStatus.DROPPED)
        self._await_parts([p for p in held if p and not p.dropped and p.missing and not p.writers])
        return c.Sealed(status=status)

    def _await_parts(self, waiting: list[Pending]) -> None:
        """No connection holds these any more: unless others take them up in time, they go."""
        ids = np.unique(np.array([p.block for p in waiting], np.uint32))
        self._deadlines.set(Due.PARTS, ids, self._now_ms + limits.MAX_PARTS_WAIT_MS)

    def _publish(self, namespace: Namespace, complete: list[Pending]) -> npt.NDArray[np.bool_]:
        """Writes the headers, then makes the blocks visible: never the other way round.

        Returns which of them found a place in the index: bool (n,).
        """
        self._puts.finish(complete)
        granules = np.array([p.granule for p in complete], np.uint32)
        hashes = np.frombuffer(b"".join(p.key for p in complete), np.uint8).reshape(-1, 32)
        self._write_headers(namespace, complete, hashes, granules)
        self._lose(self._catalog.make_room(len(complete)))
        ids = np.array([p.block for p in complete], np.uint32)
        self._memory.generations[granules] += np.uint64(1)  # even: stable
        shown = self._catalog.insert(
            hashes,
            namespace=namespace.id,
            length=namespace.layout.block_bytes,
            tier=DRAM_TIER,
            ids=ids,
            granules=granules,
            generations=self._memory.generations[granules],
        )
        self._dropped += int((~shown).sum())
        self._free(ids[~shown])  # the probe bound was reached: blocks not stored, legally
        ids = ids[shown]
        self._blocks.appear(ids)
        namespace.blocks += len(ids)
        visible = [p for p, ok in zip(complete, shown.tolist(), strict=True) if ok]
        self._link(namespace, visible, ids)
        self._policy.admit(ids, hashes[shown, :8].copy().view(np.uint64).ravel())
        self._stored += len(ids)
        for ttl_ms in {p.ttl_ms for p in visible if p.ttl_ms}:
            mortal = np.array([p.block for p in visible if p.ttl_ms == ttl_ms], np.uint32)
            self._deadlines.set(Due.EXPIRY, mortal, self._now_ms + ttl_ms)
        return shown

    def _link(self, namespace: Namespace, complete: list[Pending], ids: IdArray) -> None:
        """Counts each block as its parent's child, so that chains are evicted from the tail.

        A parent comes before its child: else blocks could hold each other (or one itself) in the
        store for ever, where a caller's own keys make no true chain.
        """
        order = {p.key: n for n, p in enumerate(complete)}
        chained = [
            (p, i)
            for n, (p, i) in enumerate(zip(complete, ids, strict=True))
            if p.parent and order.get(p.parent, -1) < n
        ]
        if not chained:
            return
        parents = np.frombuffer(b"".join(p.parent for p, _ in chained), np.uint8).reshape(-1, 32)
        found = self._catalog.find(namespace.id, parents)
        known = found >= 0
        children = np.array([i for _, i in chained], np.uint32)
        self._blocks.link(children[known], found[known].astype(np.uint32))

    def _write_headers(
        self, namespace: Namespace, complete: list[Pending], hashes: c.U8, granules: c.U32
    ) -> None:
        parents = b"".join(p.parent or _NO_PARENT for p in complete)
        headers = pack_many(
            namespace=namespace.id,
            keys=hashes,
            put_ids=[p.put_id for p in complete],
            length=namespace.layout.block_bytes,
            checksums=np.array([p.checksums for p in complete], np.uint64),
            parents=np.frombuffer(parents, np.uint8).reshape(-1, limits.KEY_BYTES),
            positions=np.array([p.position for p in complete], np.int32),
        )
        rows = self._memory.pool[: self._room.slabs.total_bytes].reshape(-1, limits.GRANULE_BYTES)
        rows[granules, : headers.shape[1]] = headers

    def _abort(self, number: int, who: Connection, command: c.Abort) -> c.Count:
        _check_put(command.put_id, command.hashes)
        held = [pending for pending in _held(who, command) if pending]
        self._drop_puts(held)
        self._let_go(held, number, who)
        return c.Count(blocks=len(held))

    def _drop_puts(self, puts: Iterable[Pending]) -> None:
        """They are over; a slot comes back when nobody writes to it any more."""
        over: list[int] = []
        for pending in puts:
            if not pending.dropped:
                self._dropped += 1
                over += [pending.block] if self._puts.drop(pending) else []
        ids = np.array(over, np.uint32)
        self._deadlines.clear(Due.PARTS, ids)
        self._free(ids)

    def _let_go(self, puts: Iterable[Pending], number: int, who: Connection) -> None:
        """The connection has stopped writing to these dropped blocks."""
        over = [p.block for p in puts if number in p.writers and self._puts.leave(p, number, who)]
        self._free(np.array(over, np.uint32))

    # -- room --------------------------------------------------------------------------

    def _evict(self, ids: IdArray) -> None:
        self._evicted += len(ids)
        self._forget(ids, c.ExplainStatus.EVICTED)

    def _lose(self, ids: IdArray) -> None:
        """The index has no place for these any more."""
        if len(ids):
            self._policy.forget(ids)
            self._evicted += len(ids)
            self._vanish(ids)

    def _forget(self, ids: IdArray, why: c.ExplainStatus) -> None:
        """Takes live blocks, which the policy has forgotten, out of the index and frees them."""
        owners = self._blocks.namespace[ids]
        for number in np.unique(owners).tolist():
            mine = ids[(owners == number) & (self._blocks.state[ids] == BlockState.LIVE)]
            lineage = self._namespaces.get(number).lineage
            self._lose(self._catalog.remove(mine, lineage, why, self._now_ms))
            self._vanish(mine)

    def _vanish(self, ids: IdArray) -> None:
        """Live blocks are out of the index: their slots come back once nobody leases them."""
        pinned = ids[self._deadlines.has(Due.PIN, ids)]
        self._pinned_bytes -= self._slot_bytes(pinned)
        for kind in Due:
            self._deadlines.clear(kind, ids)
        for number, count in zip(
            *np.unique(self._blocks.namespace[ids], return_counts=True), strict=True
        ):
            self._namespaces.get(int(number)).blocks -= int(count)
        self._free(self._blocks.vanish(ids))

    def _free(self, ids: IdArray) -> None:
        """Nobody writes these slots, and no lease is on them."""
        granules = self._blocks.granule[ids]
        # The next even number: a reader in mid-copy sees that its slot was given up.
        self._memory.generations[granules] = (
            self._memory.generations[granules] | np.uint64(1)
        ) + np.uint64(1)
        self._room.slabs.free(granules)
        self._blocks.give_back(ids)

    def _slot_bytes(self, ids: IdArray) -> int:
        """Bytes of the pool that these blocks take."""
        slabs = self._room.slabs
        sizes = slabs.slot_sizes(slabs.slabs_of(self._blocks.granule[ids]))
        return int(sizes.sum()) * limits.GRANULE_BYTES

    # -- get ---------------------------------------------------------------------------

    def _lease(self, who: Connection, command: c.Lease) -> c.Leased:
        self._namespaces.get(command.namespace)
        _check_hashes(command.hashes)
        ids = self._catalog.find(command.namespace, command.hashes)
        missing = np.flatnonzero(ids < 0)
        run = (ids[: missing[0]] if len(missing) else ids).astype(np.uint32)
        if who.leased_blocks + len(run) > limits.MAX_LEASED_BLOCKS_PER_CONNECTION:
            raise ResourceExhausted(
                f"a connection may lease {limits.MAX_LEASED_BLOCKS_PER_CONNECTION} blocks",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        self._lookups += len(ids)
        self._hits += len(run)
        lease = 0  # of nothing: there is nothing to release
        if len(run):
            lease = self._next_lease
            self._next_lease += 1
            who.leases[lease] = run
            who.leased_blocks += len(run)
            self._blocks.lease(run)
            self._read(run)
        granules = self._blocks.granule[run]
        return c.Leased(
            lease=lease, granules=granules, generations=self._memory.generations[granules]
        )

    def _release(self, who: Connection, command: c.Release) -> c.Count:
        ids = who.leases.pop(command.lease, None)
        if ids is None:
            raise PermissionDenied(f"lease {command.lease} is not held by this connection")
        who.leased_blocks -= len(ids)
        self._free(self._blocks.release(ids))
        return c.Count(blocks=len(ids))

    def _touch(self, command: c.Touch) -> c.Count:
        if len(command.granules) != len(command.generations):
            raise InvalidArgument("generations", "expected one for each granule")
        if not 0 <= command.hits <= command.lookups <= limits.MAX_LOOKUPS_PER_TOUCH:
            most = limits.MAX_LOOKUPS_PER_TOUCH
            raise InvalidArgument("hits", f"expected 0 to lookups, and at most {most} of those")
        inside = command.granules < self._memory.generations.size
        granules, generations = command.granules[inside], command.generations[inside]
        current = self._memory.generations[granules] == generations
        ids = self._blocks.at(granules[current])
        ids = ids[ids != NO_BLOCK]
        self._read(ids)
        self._lookups += command.lookups
        self._hits += command.hits
        return c.Count(blocks=len(ids))

    def _read(self, ids: IdArray) -> None:
        """Live blocks were read: the turn that somebody expected has come."""
        self._policy.touch(ids)
        self._deadlines.clear(Due.TURN, ids)

    # -- hints -------------------------------------------------------------------------

    def _hint(self, command: c.Hint) -> c.Count:
        self._namespaces.get(command.namespace)
        _check_hashes(command.hashes)
        if command.kind not in list(c.HintKind):
            raise InvalidArgument("kind", f"no hint is numbered {command.kind}")
        if not 0 <= command.for_ms <= limits.MAX_HINT_MS:
            raise InvalidArgument("for_ms", f"0 to {limits.MAX_HINT_MS} ms, please")
        found = self._catalog.find(command.namespace, command.hashes)
        ids = found[found >= 0].astype(np.uint32)
        _, first = np.unique(ids, return_index=True)
        ids = ids[np.sort(first)]  # in chain order still
        match c.HintKind(command.kind):
            case c.HintKind.SESSION_ENDS:
                self._deadlines.clear(Due.TURN, ids)
                self._policy.demote(ids)
            case c.HintKind.NEXT_TURN_BY:
                self._deadlines.set(Due.TURN, ids, self._now_ms + command.for_ms)
            case c.HintKind.PIN_UNTIL:
                self._pin(ids, command.for_ms)
        return c.Count(blocks=len(ids))

    def _pin(self, ids: IdArray, for_ms: int) -> None:
        if for_ms == 0:
            self._pinned_bytes -= self._slot_bytes(ids[self._deadlines.has(Due.PIN, ids)])
            self._deadlines.clear(Due.PIN, ids)
            return
        more = self._slot_bytes(ids[~self._deadlines.has(Due.PIN, ids)])
        most = int(self._room.slabs.total_bytes * limits.MAX_PINNED_SHARE)
        if self._pinned_bytes + more > most:
            raise ResourceExhausted(
                f"{self._pinned_bytes} of at most {most} bytes are pinned, {more} more are asked",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        self._pinned_bytes += more
        self._deadlines.set(Due.PIN, ids, self._now_ms + for_ms)

    # -- forgetting and explaining -----------------------------------------------------

    def _drop(self, command: c.Drop) -> c.Count:
        namespace = self._namespaces.get(command.namespace)
        if not len(command.hashes):
            return self._drop_namespace(namespace)
        _check_hashes(command.hashes)
        found = np.unique(self._catalog.find(command.namespace, command.hashes))
        return self._drop_blocks(found[found >= 0].astype(np.uint32))

    def _drop_namespace(self, namespace: Namespace) -> c.Count:
        self._drop_puts([p for p in self._puts if p.namespace == namespace.id])
        count = self._drop_blocks(self._blocks.live_in(namespace.id))
        self._namespaces.move_on(namespace)
        self._catalog.forget_namespaces()
        return count

    def _drop_blocks(self, ids: IdArray) -> c.Count:
        self._policy.forget(ids)
        self._forget(ids, c.ExplainStatus.DROPPED)
        self._dropped += len(ids)
        return c.Count(blocks=len(ids))

    def _explain(self, command: c.Explain) -> c.Explained:
        namespace = self._namespaces.get(command.namespace)
        _check_hashes(command.hashes)
        status, when_ms = self._catalog.recall(command.hashes, namespace.lineage)
        unknown = status == 0
        status[unknown] = c.ExplainStatus.NEVER_STORED
        for other in self._namespaces:
            if other.name == namespace.name and other is not namespace:
                elsewhere = self._catalog.find(other.id, command.hashes) >= 0
                status[unknown & elsewhere] = c.ExplainStatus.OTHER_LAYOUT
        pending = [self._puts.find(namespace.id, h.tobytes()) is not None for h in command.hashes]
        status[pending] = c.ExplainStatus.NOT_SEALED
        stored = self._catalog.find(namespace.id, command.hashes) >= 0
        status[stored] = c.ExplainStatus.STORED
        when_ms[stored | pending] = 0
        tiers = np.where(stored, DRAM_TIER, 0).astype(np.uint8)
        return c.Explained(status=status, tiers=tiers, when_ms=when_ms)

    # -- invariants --------------------------------------------------------------------

    def check(self) -> None:
        """Walks every invariant; an AssertionError is a bug of ours."""
        self._room.slabs.check()
        self._catalog.check()
        self._policy.check()
        self._blocks.check()
        self._deadlines.check()
        blocks = self._blocks
        live = np.flatnonzero(blocks.state == BlockState.LIVE)
        assert len(live) == self._catalog.entries == len(self._policy)
        held = {p for who in self._connections.values() for p in who.puts.values()}
        held |= set(self._puts)
        assert len(held) - len(self._puts) == self._puts.quarantined
        assert blocks.count(BlockState.PENDING) == len(held)
        taken = np.flatnonzero(blocks.state != BlockState.FREE)
        slots = blocks.granule[taken]
        assert len(np.unique(slots)) == len(slots), "one slot, two owners"
        used = sum(self._room.slabs.class_of(int(g)) for g in slots)
        assert used == self._room.slabs.used_bytes, "in use plus free is not the total"
        assert (self._memory.generations[blocks.granule[live]] % 2 == 0).all()
        leases = np.zeros_like(blocks.leases)
        for who in self._connections.values():
            assert who.leased_blocks == sum(len(ids) for ids in who.leases.values())
            assert who.granted_bytes == sum(p.slot_bytes for p in who.puts.values())
            for ids in who.leases.values():
                np.add.at(leases, ids, 1)
        assert (leases == blocks.leases).all()
        pinned = np.flatnonzero(self._deadlines.times[Due.PIN]).astype(np.uint32)
        assert (blocks.state[pinned] == BlockState.LIVE).all()
        assert self._slot_bytes(pinned) == self._pinned_bytes
        waiting = np.flatnonzero(self._deadlines.times[Due.PARTS]).tolist()
        alone = sorted(p.block for p in self._puts if not p.writers)
        assert waiting == alone, "a put that nobody writes must be over some day"
        for space in self._namespaces:
            assert space.blocks == len(blocks.live_in(space.id))


def _held(who: Connection, command: c.Seal | c.Abort) -> list[Pending | None]:
    """What the connection has reserved of the command's blocks."""
    keys = ((command.namespace, row.tobytes(), command.put_id) for row in command.hashes)
    return [who.puts.get(key) for key in keys]


def _check_hashes(hashes: c.U8) -> None:
    if hashes.ndim != 2 or hashes.shape[1] != limits.KEY_BYTES or hashes.dtype != np.uint8:
        raise InvalidArgument("hashes", "expected (n, 32) uint8")
    if not 0 < len(hashes) <= limits.MAX_KEYS_PER_CALL:
        raise InvalidArgument("hashes", f"1 to {limits.MAX_KEYS_PER_CALL} keys a call")


def _check_put(put_id: bytes, hashes: c.U8) -> None:
    if len(put_id) != PUT_ID_BYTES:
        raise InvalidArgument("put_id", f"expected {PUT_ID_BYTES} bytes, got {len(put_id)}")
    _check_hashes(hashes)


def _check_reserve(command: c.Reserve) -> None:
    _check_put(command.put_id, command.hashes)
    if len(command.parent) not in (0, limits.KEY_BYTES):
        raise InvalidArgument("parent", f"expected {limits.KEY_BYTES} bytes or none")
    if not -1 <= command.position <= limits.MAX_POSITION - len(command.hashes):
        raise InvalidArgument("position", f"-1 to {limits.MAX_POSITION}, please")
    if not 0 <= command.ttl_ms <= limits.MAX_TTL_MS:
        raise InvalidArgument("ttl_ms", f"0 to {limits.MAX_TTL_MS} ms, please")


def _parent(command: c.Reserve, keys: list[bytes], i: int) -> bytes:
    """The key before the i-th in its chain; empty where there is none or it is not known."""
    if command.position < 0:
        return b""
    parent = keys[i - 1] if i else command.parent
    return b"" if parent == NO_PARENT else parent


def _cell_mask(cells: c.U32, n_cells: int) -> int:
    if not len(cells):
        return (1 << n_cells) - 1
    if int(cells.max()) >= n_cells or len(np.unique(cells)) != len(cells):
        raise LayoutMismatch("cells", f"expected distinct cells below {n_cells}")
    return sum(1 << cell for cell in cells.tolist())


def failed(error: KVStoreError) -> c.Failed:
    """The wire form of an error."""
    return c.Failed(
        code=error.code,
        field=getattr(error, "field", ""),
        message=getattr(error, "message", str(error)),
        retry_after_ms=getattr(error, "retry_after_ms", 0),
    )
