"""The store: one synchronous, deterministic class that decides everything on one host.

It owns the index, the slots, the pending puts, the leases and the eviction order of one trust
domain. It is told the time, never asks for it, and never touches a socket. A million blocks are
rows of arrays here, not objects; only what is in flight (pending puts, leases) is an object.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.block import BlockHeader, header_bytes, pack
from kvstore.errors import (
    InvalidArgument,
    KVStoreError,
    LayoutMismatch,
    PermissionDenied,
    ResourceExhausted,
    StaleNamespace,
)
from kvstore.eviction import make_policy
from kvstore.index.format import capacity_for
from kvstore.index.table import IndexTable
from kvstore.keys import namespace_key
from kvstore.layout import Layout
from kvstore.tiers.slab import SlabAllocator

DRAM_TIER = 1
_NO_BLOCK = np.uint32(0xFFFFFFFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreMemory:
    """The memory that a store decides over, shared with its clients by whoever made it.

    pool: uint8, a multiple of a granule. generations: uint64, one a granule.
    index: uint8, `index_bytes(capacity_for(max_blocks))` long.
    """

    pool: npt.NDArray[np.uint8]
    generations: npt.NDArray[np.uint64]
    index: npt.NDArray[np.uint8]


@dataclass(slots=True)
class _Namespace:
    name: str
    layout: Layout
    key: bytes
    generation: int
    header_bytes: int
    slot_bytes: int


@dataclass(slots=True, eq=False)
class _Pending:
    """One block on its way in: reserved, not yet sealed."""

    namespace: int
    key: bytes
    put_id: bytes
    granule: int
    parent: bytes
    position: int
    missing: int  # bit mask of the cells not yet sealed
    checksums: npt.NDArray[np.uint64]
    writers: dict[int, int] = field(default_factory=dict)  # connection -> mask of its cells
    dropped: bool = False


@dataclass(slots=True)
class _Connection:
    pending: set[_Pending] = field(default_factory=set)
    leases: dict[int, npt.NDArray[np.uint32]] = field(default_factory=dict)
    leased_blocks: int = 0
    closed: bool = False  # closed, but the process lives: what it holds is in quarantine


class Store:
    """One trust domain's blocks. Every public method leaves `check()` true."""

    def __init__(
        self,
        memory: StoreMemory,
        *,
        secret: bytes,
        instance_id: int,
        max_blocks: int,
        policy: str = "lru",
    ) -> None:
        self._memory = memory
        self._secret = secret
        self._slabs = SlabAllocator(memory.pool.size)
        self._index = IndexTable.create(
            memory.index,
            capacity_for(max_blocks),
            instance_id.to_bytes(8, "little"),
            max_blocks=max_blocks,
        )
        self._policy = make_policy(policy, max_blocks)
        self._namespaces: dict[int, _Namespace] = {}
        self._next_namespace = 1
        self._pending: dict[tuple[int, bytes], _Pending] = {}
        self._connections: dict[int, _Connection] = {}
        self._next_lease = 1
        self._next_connection = 1
        self._granule = np.zeros(max_blocks, np.uint32)
        self._namespace_of = np.zeros(max_blocks, np.uint32)
        self._parent = np.full(max_blocks, -1, np.int64)
        self._children = np.zeros(max_blocks, np.uint32)
        self._pins = np.zeros(max_blocks, np.uint32)
        self._live = np.zeros(max_blocks, np.bool_)
        self._block_at = np.full(memory.generations.size, _NO_BLOCK, np.uint32)
        self._free_ids = list(range(max_blocks - 1, -1, -1))
        self._quarantined = 0
        self._lookups = self._hits = self._stored = self._evicted = self._dropped = 0

    # -- connections -------------------------------------------------------------------

    def connect(self) -> int:
        """Registers a client and returns its id; `ResourceExhausted` past the limit."""
        if len(self._connections) >= limits.MAX_CONNECTIONS:
            raise ResourceExhausted(
                f"{limits.MAX_CONNECTIONS} clients are connected",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        connection = self._next_connection
        self._next_connection += 1
        self._connections[connection] = _Connection()
        return connection

    def disconnect(self, connection: int) -> bool:
        """The connection closed while its process may live: what it holds goes to quarantine.

        Returns True when nothing is held, and the connection is forgotten at once.
        """
        state = self._connections[connection]
        state.closed = True
        for pending in list(state.pending):
            self._drop_pending(pending)
        if not state.pending and not state.leases:
            del self._connections[connection]
            return True
        return False

    def holder_died(self, connection: int) -> None:
        """The process behind the connection is gone: everything it held is given back."""
        state = self._connections.pop(connection, None)
        if state is None:
            return
        for pending in list(state.pending):
            self._drop_pending(pending)
            self._leave(pending, connection, state)
        for ids in state.leases.values():
            self._unpin(ids)

    # -- the one handler ---------------------------------------------------------------

    def handle(self, connection: int, command: c.Command) -> c.Result:
        """Carries out one command for `connection`; raises a `KVStoreError` on bad input."""
        state = self._connections[connection]
        match command:
            case c.OpenNamespace():
                return self._open(command)
            case c.Reserve():
                return self._reserve(connection, state, command)
            case c.Seal():
                return self._seal(connection, state, command)
            case c.Abort():
                return self._abort(connection, state, command)
            case c.Lease():
                return self._lease(state, command)
            case c.Release():
                return self._release(state, command)
            case c.Touch():
                return self._touch(command)
            case c.Drop():
                return self._drop(command)
            case c.Explain():
                return self._explain(command)
            case c.Stat():
                return self.stats()

    def stats(self) -> c.Stats:
        """The counters as they are now."""
        return c.Stats(
            blocks=self._index.entries,
            pending_blocks=len(self._pending),
            quarantined_blocks=self._quarantined,
            leased_blocks=int(np.count_nonzero(self._pins)),
            used_bytes=self._slabs.used_bytes,
            total_bytes=self._slabs.total_bytes,
            lookups=self._lookups,
            hits=self._hits,
            stored=self._stored,
            evicted=self._evicted,
            dropped=self._dropped,
            connections=len(self._connections),
        )

    # -- namespaces --------------------------------------------------------------------

    def _open(self, command: c.OpenNamespace) -> c.NamespaceOpened:
        if not 0 < len(command.name.encode()) <= limits.MAX_NAMESPACE_NAME_BYTES:
            raise InvalidArgument("name", f"1 to {limits.MAX_NAMESPACE_NAME_BYTES} bytes, please")
        layout = Layout.decode(command.layout)
        for number, known in self._namespaces.items():
            if known.name == command.name and known.layout == layout:
                return c.NamespaceOpened(
                    namespace=number, key=known.key, generation=known.generation
                )
        return self._create_namespace(command.name, layout, generation=0)

    def _create_namespace(self, name: str, layout: Layout, *, generation: int) -> c.NamespaceOpened:
        if len(self._namespaces) >= limits.MAX_NAMESPACES:
            raise ResourceExhausted(
                f"{limits.MAX_NAMESPACES} namespaces are open",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        head = header_bytes(layout.n_cells)
        slot = head + layout.block_bytes
        if slot > self._slabs.total_bytes:
            raise InvalidArgument(
                "layout", f"a block takes {slot} bytes, the pool has {self._slabs.total_bytes}"
            )
        number = self._next_namespace
        self._next_namespace += 1
        key = namespace_key(self._secret, layout_fingerprint=layout.fingerprint(), name=name)
        self._namespaces[number] = _Namespace(name, layout, key, generation, head, slot)
        return c.NamespaceOpened(namespace=number, key=key, generation=generation)

    def _namespace(self, number: int) -> _Namespace:
        namespace = self._namespaces.get(number)
        if namespace is None:
            raise StaleNamespace(f"namespace {number} was dropped or never opened: open it again")
        return namespace

    # -- put ---------------------------------------------------------------------------

    def _reserve(self, connection: int, state: _Connection, command: c.Reserve) -> c.Reserved:
        namespace = self._namespace(command.namespace)
        _check_put(command.put_id, command.hashes)
        mask = _cell_mask(command.cells, namespace.layout.n_cells)
        n = len(command.hashes)
        status = np.full(n, c.ReserveStatus.NO_SPACE, np.uint8)
        granules = np.zeros(n, np.uint32)
        known = self._index.find(command.namespace, command.hashes) >= 0
        status[known] = c.ReserveStatus.EXISTS
        keys = [row.tobytes() for row in command.hashes]
        fresh: list[int] = []
        for i in np.flatnonzero(~known).tolist():
            pending = self._pending.get((command.namespace, keys[i]))
            if pending is None:
                fresh.append(i)
            elif pending.put_id == command.put_id and not self._taken(pending, connection, mask):
                self._join(pending, connection, state, mask)
                status[i], granules[i] = c.ReserveStatus.GRANTED, pending.granule
            else:
                status[i] = c.ReserveStatus.IN_PROGRESS
        room = limits.MAX_PENDING_BLOCKS - len(self._pending)
        for i, granule in zip(
            fresh, self._allocate(namespace, min(len(fresh), room)), strict=False
        ):
            if (command.namespace, keys[i]) in self._pending:  # one key twice in a batch
                self._slabs.free(np.array([granule], np.uint32))
                status[i] = c.ReserveStatus.IN_PROGRESS
                continue
            pending = self._begin(namespace, command, i, keys, int(granule))
            self._join(pending, connection, state, mask)
            status[i], granules[i] = c.ReserveStatus.GRANTED, granule
        return c.Reserved(status=status, granules=granules)

    def _begin(
        self, namespace: _Namespace, command: c.Reserve, i: int, keys: list[bytes], granule: int
    ) -> _Pending:
        chained = command.position >= 0
        pending = _Pending(
            namespace=command.namespace,
            key=keys[i],
            put_id=command.put_id,
            granule=granule,
            parent=(keys[i - 1] if i else command.parent) if chained else b"",
            position=command.position + i if chained else -1,
            missing=(1 << namespace.layout.n_cells) - 1,
            checksums=np.zeros(namespace.layout.n_cells, np.uint64),
        )
        self._pending[command.namespace, keys[i]] = pending
        self._memory.generations[granule] += np.uint64(1)  # odd: being written
        return pending

    @staticmethod
    def _taken(pending: _Pending, connection: int, mask: int) -> bool:
        """Whether these cells were sealed already, or are another connection's to write."""
        others = 0
        for writer, cells in pending.writers.items():
            others |= cells if writer != connection else 0
        return bool(mask & others) or mask & pending.missing != mask

    @staticmethod
    def _join(pending: _Pending, connection: int, state: _Connection, mask: int) -> None:
        pending.writers[connection] = pending.writers.get(connection, 0) | mask
        state.pending.add(pending)

    def _seal(self, connection: int, state: _Connection, command: c.Seal) -> c.Sealed:
        namespace = self._namespace(command.namespace)
        _check_put(command.put_id, command.hashes)
        n = len(command.hashes)
        if command.checksums.ndim != 2 or len(command.checksums) != n:
            raise InvalidArgument("checksums", f"expected ({n}, cells), one row for each hash")
        mine = [self._mine(connection, command, row.tobytes()) for row in command.hashes]
        for pending in mine:
            if pending and command.checksums.shape[1] != pending.writers[connection].bit_count():
                raise LayoutMismatch("checksums", "expected one for each cell that was reserved")
        status = np.full(n, c.SealStatus.DROPPED, np.uint8)
        complete: list[_Pending] = []
        for i, pending in enumerate(mine):
            if pending is None or pending.writers.get(connection) is None:
                continue
            mask = pending.writers[connection]
            pending.checksums[_bits(mask)] = command.checksums[i]
            pending.missing &= ~mask
            self._leave(pending, connection, state)
            status[i] = c.SealStatus.WAITING if pending.missing else c.SealStatus.STORED
            if not pending.missing:
                complete.append(pending)
        if complete:
            self._publish(command.namespace, namespace, complete)
        return c.Sealed(status=status)

    def _mine(self, connection: int, command: c.Seal | c.Abort, key: bytes) -> _Pending | None:
        pending = self._pending.get((command.namespace, key))
        if pending is None or pending.put_id != command.put_id:
            return None
        return pending if connection in pending.writers else None

    def _publish(self, number: int, namespace: _Namespace, complete: list[_Pending]) -> None:
        """Writes the headers, then makes the blocks visible: never the other way round."""
        for pending in complete:
            del self._pending[pending.namespace, pending.key]
            self._write_header(namespace, pending)
        granules = np.array([p.granule for p in complete], np.uint32)
        hashes = np.frombuffer(b"".join(p.key for p in complete), np.uint8).reshape(-1, 32)
        ids = np.array([self._free_ids.pop() for _ in complete], np.uint32)
        self._memory.generations[granules] += np.uint64(1)  # even: stable
        inserted = self._index.insert(
            hashes,
            namespace=number,
            lengths=np.full(len(ids), namespace.layout.block_bytes, np.uint32),
            granules=granules,
            block_ids=ids,
            generations=self._memory.generations[granules],
            tier=DRAM_TIER,
        )
        self._free_ids.extend(int(i) for i in ids[~inserted])
        if not inserted.all():  # the probe bound was reached: a block not stored, legally
            self._slabs.free(granules[~inserted])
        self._remember(number, ids[inserted], granules[inserted])
        self._link([p for p, ok in zip(complete, inserted, strict=True) if ok], ids[inserted])
        self._policy.admit(ids[inserted], hashes[inserted, :8].copy().view(np.uint64).ravel())
        self._stored += int(inserted.sum())

    def _remember(
        self, number: int, ids: npt.NDArray[np.uint32], granules: npt.NDArray[np.uint32]
    ) -> None:
        self._granule[ids] = granules
        self._block_at[granules] = ids
        self._namespace_of[ids] = number
        self._parent[ids] = -1
        self._children[ids] = 0
        self._live[ids] = True

    def _link(self, complete: list[_Pending], ids: npt.NDArray[np.uint32]) -> None:
        """Counts each block as its parent's child, so that chains are evicted from the tail."""
        chained = [(p, i) for p, i in zip(complete, ids, strict=True) if p.parent]
        if not chained:
            return
        parents = np.frombuffer(b"".join(p.parent for p, _ in chained), np.uint8).reshape(-1, 32)
        found = self._index.find(chained[0][0].namespace, parents)
        children = np.array([i for _, i in chained], np.uint32)
        known = found >= 0
        self._parent[children[known]] = found[known]
        np.add.at(self._children, found[known], 1)

    def _write_header(self, namespace: _Namespace, pending: _Pending) -> None:
        start = pending.granule * limits.GRANULE_BYTES
        header = pack(
            BlockHeader(
                namespace=pending.namespace,
                key=pending.key,
                put_id=pending.put_id,
                length=namespace.layout.block_bytes,
                checksums=pending.checksums,
                parent=pending.parent or None,
                position=None if pending.position < 0 else pending.position,
            )
        )
        self._memory.pool[start : start + len(header)] = np.frombuffer(header, np.uint8)

    def _abort(self, connection: int, state: _Connection, command: c.Abort) -> c.Count:
        self._namespace(command.namespace)
        _check_put(command.put_id, command.hashes)
        count = 0
        for row in command.hashes:
            pending = self._mine(connection, command, row.tobytes())
            if pending is not None:
                self._drop_pending(pending)
                self._leave(pending, connection, state)
                count += 1
        return c.Count(blocks=count)

    def _drop_pending(self, pending: _Pending) -> None:
        """The put is over; its slot comes back when the last writer let go of it."""
        if pending.dropped:
            return
        pending.dropped = True
        del self._pending[pending.namespace, pending.key]
        self._quarantined += 1
        self._dropped += 1

    def _leave(self, pending: _Pending, connection: int, state: _Connection) -> None:
        """`connection` will not write to the slot any more: it sealed, aborted or died."""
        del pending.writers[connection]
        state.pending.discard(pending)
        if pending.dropped and not pending.writers:
            self._memory.generations[pending.granule] += np.uint64(1)
            self._slabs.free(np.array([pending.granule], np.uint32))
            self._quarantined -= 1

    # -- room --------------------------------------------------------------------------

    def _allocate(self, namespace: _Namespace, n: int) -> npt.NDArray[np.uint32]:
        """Up to `n` slots, evicting what the policy gives up; never a leased block."""
        n = min(n, len(self._free_ids) + self._index.entries)
        granules = self._slabs.alloc(namespace.slot_bytes, n)
        while len(granules) < n or len(self._free_ids) < n:
            short = max(n - len(granules), n - len(self._free_ids))
            victims = self._policy.victims(short, self._evictable)
            if not len(victims):
                break
            self._evict(self._with_slabs(victims, namespace))
            more = self._slabs.alloc(namespace.slot_bytes, n - len(granules))
            granules = np.concatenate([granules, more])
        usable = max(0, len(self._free_ids) - len(self._pending))
        if len(granules) > usable:
            self._slabs.free(granules[usable:])
        return granules[:usable]

    def _evictable(self, ids: npt.NDArray[np.uint32]) -> npt.NDArray[np.bool_]:
        free: npt.NDArray[np.bool_] = (self._pins[ids] == 0) & (self._children[ids] == 0)
        return free

    def _with_slabs(
        self, victims: npt.NDArray[np.uint32], namespace: _Namespace
    ) -> npt.NDArray[np.uint32]:
        """Adds the slab mates of victims of another size, so that whole slabs change class."""
        wanted = self._slabs.slot_granules(namespace.slot_bytes) * limits.GRANULE_BYTES
        extra = [victims]
        for block in victims:
            granule = int(self._granule[block])
            if self._slabs.class_of(granule) == wanted:
                continue
            mates = self._block_at[self._slabs.slab_slots(granule)]
            mates = mates[mates != _NO_BLOCK]
            extra.append(mates[self._pins[mates] == 0])
        if len(extra) == 1:
            return victims
        everyone = np.unique(np.concatenate(extra))
        self._policy.forget(np.setdiff1d(everyone, victims))
        return everyone

    def _evict(self, ids: npt.NDArray[np.uint32]) -> None:
        self._forget_blocks(ids)
        self._evicted += len(ids)

    def _forget_blocks(self, ids: npt.NDArray[np.uint32]) -> None:
        """Takes the blocks out of the index first, then marks and frees their slots."""
        self._index.delete(ids)
        granules = self._granule[ids]
        # Still even, but another number: a reader in mid-copy sees that its slot was given up.
        self._memory.generations[granules] += np.uint64(2)
        self._block_at[granules] = _NO_BLOCK
        parents = self._parent[ids]
        parents = parents[parents >= 0]
        np.subtract.at(self._children, parents, 1)
        if self._children[ids].any():  # orphans: found by key still, but no longer as a chain
            self._parent[np.isin(self._parent, ids)] = -1
        self._parent[ids] = -1
        self._children[ids] = 0
        self._live[ids] = False
        self._slabs.free(granules)
        self._free_ids.extend(ids.tolist())

    # -- get ---------------------------------------------------------------------------

    def _lease(self, state: _Connection, command: c.Lease) -> c.Leased:
        self._namespace(command.namespace)
        _check_hashes(command.hashes)
        ids = self._index.find(command.namespace, command.hashes)
        missing = np.flatnonzero(ids < 0)
        run = ids[: missing[0]] if len(missing) else ids
        if state.leased_blocks + len(run) > limits.MAX_LEASED_BLOCKS_PER_CONNECTION:
            raise ResourceExhausted(
                f"a connection may lease {limits.MAX_LEASED_BLOCKS_PER_CONNECTION} blocks",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        blocks = run.astype(np.uint32)
        np.add.at(self._pins, blocks, 1)
        lease = self._next_lease
        self._next_lease += 1
        state.leases[lease] = blocks
        state.leased_blocks += len(blocks)
        granules = self._granule[blocks]
        return c.Leased(
            lease=lease, granules=granules, generations=self._memory.generations[granules]
        )

    def _release(self, state: _Connection, command: c.Release) -> c.Count:
        ids = state.leases.pop(command.lease, None)
        if ids is None:
            raise PermissionDenied(f"lease {command.lease} is not held by this connection")
        state.leased_blocks -= len(ids)
        self._unpin(ids)
        return c.Count(blocks=len(ids))

    def _unpin(self, ids: npt.NDArray[np.uint32]) -> None:
        np.subtract.at(self._pins, ids, 1)

    def _touch(self, command: c.Touch) -> c.Count:
        if len(command.granules) != len(command.generations):
            raise InvalidArgument("generations", "expected one for each granule")
        inside = command.granules < self._block_at.size
        granules, generations = command.granules[inside], command.generations[inside]
        current = self._memory.generations[granules] == generations
        ids = self._block_at[granules[current]]
        ids = ids[ids != _NO_BLOCK]
        if len(ids):
            self._policy.touch(ids)
        self._lookups += max(0, command.lookups)
        self._hits += max(0, command.hits)
        return c.Count(blocks=len(ids))

    # -- forgetting and explaining -----------------------------------------------------

    def _drop(self, command: c.Drop) -> c.Count:
        namespace = self._namespace(command.namespace)
        if len(command.hashes):
            _check_hashes(command.hashes)
            found = np.unique(self._index.find(command.namespace, command.hashes))
            ids = found[found >= 0].astype(np.uint32)
        else:
            ids = np.flatnonzero(self._live & (self._namespace_of == command.namespace)).astype(
                np.uint32
            )
        if len(command.hashes) == 0 and self._pins[ids].any():
            raise ResourceExhausted(
                "blocks of the namespace are leased", retry_after_ms=limits.RETRY_AFTER_MS
            )
        ids = ids[self._pins[ids] == 0]
        self._policy.forget(ids)
        self._forget_blocks(ids)
        self._dropped += len(ids)
        if len(command.hashes) == 0:
            self._move_on(command.namespace, namespace)
        return c.Count(blocks=len(ids))

    def _move_on(self, number: int, namespace: _Namespace) -> None:
        for pending in [p for p in self._pending.values() if p.namespace == number]:
            self._drop_pending(pending)
        del self._namespaces[number]
        self._create_namespace(
            namespace.name, namespace.layout, generation=namespace.generation + 1
        )
        self._index.bump_namespace_epoch()

    def _explain(self, command: c.Explain) -> c.Explained:
        self._namespace(command.namespace)
        _check_hashes(command.hashes)
        stored = self._index.find(command.namespace, command.hashes) >= 0
        status = np.full(len(stored), c.ExplainStatus.NEVER_STORED, np.uint8)
        for i, row in enumerate(command.hashes):
            if (command.namespace, row.tobytes()) in self._pending:
                status[i] = c.ExplainStatus.NOT_SEALED
        status[stored] = c.ExplainStatus.STORED
        return c.Explained(status=status)

    # -- invariants --------------------------------------------------------------------

    def check(self) -> None:
        """Walks every invariant; an AssertionError is a bug of ours."""
        self._slabs.check()
        self._index.check()
        self._policy.check()
        live = np.flatnonzero(self._live)
        assert len(live) == self._index.entries == len(self._policy)
        assert len(live) + len(self._free_ids) == self._live.size
        held = {p for s in self._connections.values() for p in s.pending}
        assert held >= set(self._pending.values())
        assert len(held) - len(self._pending) == self._quarantined
        slots = sorted([*self._granule[live].tolist(), *(p.granule for p in held)])
        assert len(slots) == len(set(slots)), "one slot, two owners"
        used = sum(self._slabs.class_of(int(g)) for g in slots)
        assert used == self._slabs.used_bytes, "in use plus free is not the total"
        assert (self._memory.generations[self._granule[live]] % 2 == 0).all()
        pins = np.zeros_like(self._pins)
        for state in self._connections.values():
            for ids in state.leases.values():
                np.add.at(pins, ids, 1)
        assert (pins == self._pins).all()


def _check_hashes(hashes: c.U8) -> None:
    if hashes.ndim != 2 or hashes.shape[1] != limits.KEY_BYTES or hashes.dtype != np.uint8:
        raise InvalidArgument("hashes", "expected (n, 32) uint8")
    if not 0 < len(hashes) <= limits.MAX_KEYS_PER_CALL:
        raise InvalidArgument("hashes", f"1 to {limits.MAX_KEYS_PER_CALL} keys a call")


def _check_put(put_id: bytes, hashes: c.U8) -> None:
    if len(put_id) != 16:
        raise InvalidArgument("put_id", f"expected 16 bytes, got {len(put_id)}")
    _check_hashes(hashes)


def _cell_mask(cells: c.U32, n_cells: int) -> int:
    if not len(cells):
        return (1 << n_cells) - 1
    if int(cells.max()) >= n_cells or len(np.unique(cells)) != len(cells):
        raise LayoutMismatch("cells", f"expected distinct cells below {n_cells}")
    return sum(1 << int(cell) for cell in cells)


def _bits(mask: int) -> list[int]:
    return [i for i in range(mask.bit_length()) if mask >> i & 1]


def failed(error: KVStoreError) -> c.Failed:
    """The wire form of an error."""
    return c.Failed(
        code=error.code,
        field=getattr(error, "field", ""),
        message=getattr(error, "message", str(error)),
        retry_after_ms=getattr(error, "retry_after_ms", 0),
    )
