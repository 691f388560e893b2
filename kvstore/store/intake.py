"""How blocks come into a store: slots granted, cells sealed, headers written, index shown."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.block import NO_PARENT
from kvstore.errors import InvalidArgument, LayoutMismatch, ResourceExhausted
from kvstore.store.blocks import IdArray
from kvstore.store.checks import cell_mask, check_hashes, check_put, check_reserve
from kvstore.store.deadlines import Due
from kvstore.store.namespaces import Namespace
from kvstore.store.publish import NO_ROW, Whole, publish
from kvstore.store.puts import Connection, GrantedBlocks, Pending, Puts, bits
from kvstore.store.shelf import Shelf


class Intake:
    """All puts of a store. `number` is always a connection's id, and `who` what it holds."""

    def __init__(self, shelf: Shelf) -> None:
        self._shelf = shelf
        self.puts = Puts()

    def reserve(self, number: int, who: Connection, command: c.Reserve) -> c.Reserved:
        """Grants slots to those keys that nobody else has or puts."""
        namespace = self._shelf.namespaces.get(command.namespace)
        check_reserve(command)
        mask = cell_mask(command.cells, namespace.layout.n_cells)
        found = self._shelf.catalog.find(command.namespace, command.hashes)
        stored = found[found >= 0].astype(np.uint32)
        self._shelf.policy.touch(self._shelf.live(stored))
        status = np.where(found >= 0, c.ReserveStatus.EXISTS, c.ReserveStatus.IN_PROGRESS)
        granules = np.zeros(len(status), np.uint32)
        keys = [row.tobytes() for row in command.hashes]
        wanted: dict[bytes, int] = {}
        for i in np.flatnonzero(found < 0).tolist():
            wanted.setdefault(keys[i], i)  # a key that comes twice is written once
        fresh, granted = self._sort(number, who, command, mask, wanted)
        status[fresh] = c.ReserveStatus.NO_SPACE
        # They are in use, so room for the others must not come from them.
        with self._shelf.kept(np.concatenate((stored, self._parent_of(command)))):
            granted += self._begin(namespace, command, fresh, keys, who)
        for i, pending in granted:
            self.puts.join(pending, number, who, mask)
            status[i], granules[i] = c.ReserveStatus.GRANTED, pending.granule
        self._shelf.deadlines.clear(Due.PARTS, np.array([p.block for _, p in granted], np.uint32))
        no_space = status == c.ReserveStatus.NO_SPACE
        self._shelf.counters.refused += int(no_space.sum())
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
            pending = self.puts.find(command.namespace, key)
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
        found = self._shelf.catalog.find(command.namespace, parent)
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
        most = (
            int(self._shelf.room.slabs.total_bytes * limits.MAX_GRANTED_SHARE) - who.granted_bytes
        )
        n = min(
            len(fresh),
            limits.MAX_PENDING_BLOCKS - len(self.puts),
            max(1, most // namespace.slot_bytes) if most > 0 else 0,
        )
        if n <= 0:
            return []
        slots = self._shelf.take_slots(namespace.slot_bytes, n)
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
            for i, block, granule in zip(
                fresh, slots.ids.tolist(), slots.granules.tolist(), strict=False
            )
        ]
        self.puts.begin(begun)
        return list(zip(fresh, begun, strict=False))

    def granted(
        self, number: int, who: Connection, namespace: int, put_id: bytes, hashes: c.U8
    ) -> GrantedBlocks:
        """Where the bytes of these blocks go, which the connection has reserved and not sealed.

        `LayoutMismatch` where it has reserved different cells of them.
        """
        space = self._shelf.namespaces.get(namespace)
        check_hashes(hashes)
        held = [who.puts.get((namespace, row.tobytes(), put_id)) for row in hashes]
        masks = {pending.writers[number] for pending in held if pending}
        if len(masks) > 1:
            raise LayoutMismatch("hashes", "expected blocks of which the same cells were reserved")
        mask = masks.pop() if masks else 0
        whole = mask == (1 << space.layout.n_cells) - 1
        start, size = space.header_bytes, space.layout.block_bytes
        at = [p.granule * limits.GRANULE_BYTES + start if p else -1 for p in held]
        return GrantedBlocks(
            layout=space.layout,
            cells=np.array([] if whole else bits(mask), np.uint32),
            payloads=[self._shelf.memory.pool[a : a + size] if a >= 0 else None for a in at],
        )

    def seal(self, number: int, who: Connection, command: c.Seal) -> c.Sealed:
        """Takes the connection's cells as written; what is whole becomes visible."""
        check_put(command.put_id, command.hashes)
        held = _held(who, command)
        if not self._shelf.namespaces.known(command.namespace):
            self.let_go([p for p in held if p], number, who)
        namespace = self._shelf.namespaces.get(command.namespace)
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
            self.puts.leave(pending, number, who)
            status[i] = c.SealStatus.WAITING
            if not pending.missing:
                complete[i] = pending
        self.let_go(over, number, who)
        if complete:
            shown = self._publish(namespace, list(complete.values()))
            status[list(complete)] = np.where(shown, c.SealStatus.STORED, c.SealStatus.DROPPED)
        self._await_parts([p for p in held if p and not p.dropped and p.missing and not p.writers])
        return c.Sealed(status=status)

    def _await_parts(self, waiting: list[Pending]) -> None:
        """No connection holds these any more: unless others take them up in time, they go."""
        ids = np.unique(np.array([p.block for p in waiting], np.uint32))
        self._shelf.deadlines.set(Due.PARTS, ids, self._shelf.now_ms + limits.MAX_PARTS_WAIT_MS)

    def _publish(self, namespace: Namespace, complete: list[Pending]) -> npt.NDArray[np.bool_]:
        """Makes whole blocks visible; bool (n,): which found a place in the index."""
        self.puts.finish(complete)
        rows = {p.key: row for row, p in enumerate(complete)}
        before = [rows.get(p.parent, NO_ROW) for p in complete]
        parents = b"".join(p.parent or NO_PARENT for p in complete)
        whole = Whole(
            keys=np.frombuffer(b"".join(p.key for p in complete), np.uint8).reshape(-1, 32),
            put_ids=b"".join(p.put_id for p in complete),
            ids=np.array([p.block for p in complete], np.uint32),
            granules=np.array([p.granule for p in complete], np.uint32),
            checksums=np.array([p.checksums for p in complete], np.uint64),
            parents=np.frombuffer(parents, np.uint8).reshape(-1, limits.KEY_BYTES),
            positions=np.array([p.position for p in complete], np.int32),
            ttl_ms=np.array([p.ttl_ms for p in complete], np.int64),
            before=np.array([b if b < row else NO_ROW for row, b in enumerate(before)], np.int64),
        )
        shown = publish(self._shelf, namespace, whole)
        self._shelf.counters.dropped += int((~shown).sum())
        self._shelf.free(whole.ids[~shown])  # the probe bound was reached: not stored, legally
        return shown

    def abort(self, number: int, who: Connection, command: c.Abort) -> c.Count:
        """The connection gives its puts up, for all ranks."""
        check_put(command.put_id, command.hashes)
        held = [pending for pending in _held(who, command) if pending]
        self.drop(held)
        self.let_go(held, number, who)
        return c.Count(blocks=len(held))

    def drop(self, puts: Iterable[Pending]) -> None:
        """They are over; a slot comes back when nobody writes to it any more."""
        over: list[int] = []
        for pending in puts:
            if not pending.dropped:
                self._shelf.counters.dropped += 1
                over += [pending.block] if self.puts.drop(pending) else []
        ids = np.array(over, np.uint32)
        self._shelf.deadlines.clear(Due.PARTS, ids)
        self._shelf.free(ids)

    def let_go(self, puts: Iterable[Pending], number: int, who: Connection) -> None:
        """The connection has stopped writing to these dropped blocks."""
        over = [p.block for p in puts if number in p.writers and self.puts.leave(p, number, who)]
        self._shelf.free(np.array(over, np.uint32))


def _held(who: Connection, command: c.Seal | c.Abort) -> list[Pending | None]:
    """What the connection has reserved of the command's blocks."""
    keys = ((command.namespace, row.tobytes(), command.put_id) for row in command.hashes)
    return [who.puts.get(key) for key in keys]


def _parent(command: c.Reserve, keys: list[bytes], i: int) -> bytes:
    """The key before the i-th in its chain; empty where there is none or it is not known."""
    if command.position < 0:
        return b""
    parent = keys[i - 1] if i else command.parent
    return b"" if parent == NO_PARENT else parent
