"""Empty slots that clients hold ahead of need, so that a put of whole blocks is one command."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.block import NO_PARENT, PUT_ID_BYTES
from kvstore.errors import (
    InvalidArgument,
    LayoutMismatch,
    PermissionDenied,
    ResourceExhausted,
    StaleNamespace,
)
from kvstore.store.blocks import IdArray
from kvstore.store.checks import check_commit
from kvstore.store.namespaces import Namespace
from kvstore.store.publish import (
    NO_ROW,
    Whole,
    WholeBlock,
    publish,
    publish_one,
    stable,
)
from kvstore.store.puts import Connection, Puts
from kvstore.store.shelf import Shelf

_NOTHING = np.empty(0, np.uint32)
# Plain numbers, because numpy takes long to find out that a member of an enumeration is one.
_STORED, _EXISTS = int(c.CommitStatus.STORED), int(c.CommitStatus.EXISTS)
_IN_PROGRESS, _NO_SPACE = int(c.CommitStatus.IN_PROGRESS), int(c.CommitStatus.NO_SPACE)


class Stock:
    """The slots that connections hold and have named no key for. `who` is what one holds.

    A slot leaves the stock when a block in it was stored, or it is given back, or its holder's
    process dies: until then that process may be writing to it.
    """

    def __init__(self, shelf: Shelf, puts: Puts) -> None:
        self._shelf, self._puts = shelf, puts
        self._next = (0, 0)  # the size and the number of slots that were asked for ahead last
        self._latest: IdArray = _NOTHING  # blocks that the last put stored
        self.nbytes = 0

    def grant(self, who: Connection, command: c.Grant) -> c.Granted:
        """Slots for as many blocks as there is room for; `ResourceExhausted` for none."""
        namespace = self._shelf.namespaces.get(command.namespace)
        if not 0 < command.blocks <= limits.MAX_KEYS_PER_CALL:
            raise InvalidArgument("blocks", f"1 to {limits.MAX_KEYS_PER_CALL}, please")
        most = int(self._shelf.room.slabs.total_bytes * limits.MAX_GRANTED_SHARE)
        room = most - who.granted_bytes
        n = min(command.blocks, max(1, room // namespace.slot_bytes) if room > 0 else 0)
        granules = self._take(who, namespace, n)
        self._shelf.counters.refused += command.blocks - len(granules)
        if not len(granules):
            raise ResourceExhausted(
                "no room: the pool is full of blocks in use, or this client holds too many slots",
                retry_after_ms=limits.RETRY_AFTER_MS,
            )
        return c.Granted(granules=granules)

    def commit(self, who: Connection, command: c.Commit) -> c.Committed:
        """Shows the blocks that the connection has written; those that were there already, or
        that another put is writing, leave their slots in its stock."""
        namespace = self._shelf.namespaces.get(command.namespace)
        check_commit(command, namespace.layout.n_cells)
        self._latest = _NOTHING
        if len(command.granules) == 1:
            status = np.array([self._store_one(who, namespace, command)], np.uint8)
        else:
            status = self._store_many(who, namespace, command)
        more = self._ahead(who, namespace, command.more) if command.more else _NOTHING
        return c.Committed(status=status, granules=more)

    def ask_ahead(self, who: Connection, command: c.Adopt) -> c.Granted:
        """The slots that go with the answer to who has posted."""
        try:
            namespace = self._shelf.namespaces.get(command.namespace)
        except StaleNamespace:  # it hears of that with its next call
            return c.Granted(granules=_NOTHING)
        return c.Granted(granules=self._ahead(who, namespace, command.more))

    def stored(self, ids: IdArray) -> None:
        """What a connection has put last."""
        self._latest = ids

    def make_room(self) -> None:
        """Evicts and takes now what the next put like the last would else wait for, but nothing
        that the last one stored: where all else is in use, who put that may soon want it."""
        (slot_bytes, n), self._next = self._next, (0, 0)
        if not n:
            return
        with self._shelf.kept(self._latest):
            self._shelf.get_ready(slot_bytes, n)

    def give_back(self, who: Connection, command: c.GiveBack) -> c.Count:
        """The connection will not write to these slots of its stock."""
        held = command.granules.tolist()
        if any(granule not in who.stock for granule in held) or len(set(held)) != len(held):
            raise PermissionDenied("a slot is not in this connection's stock, or is named twice")
        self._shelf.free(self.remove(who, held))
        return c.Count(blocks=len(held))

    def take_all(self, who: Connection) -> None:
        """The holder cannot write any more."""
        self._shelf.free(self.remove(who, list(who.stock)))

    # -- inside ------------------------------------------------------------------------

    def _blocks(self, who: Connection, namespace: Namespace, granules: c.U32) -> list[int | None]:
        """The block id of each slot, None where none is named. `PermissionDenied` for a slot that
        is not held, `LayoutMismatch` for one of another size."""
        named = granules.tolist()
        blocks = [who.stock.get(granule) for granule in named]
        missing = blocks.count(None)
        if missing != named.count(c.NO_SLOT):
            raise PermissionDenied("a slot is not in this connection's stock")
        if len(set(named)) < len(named) - max(0, missing - 1):
            raise InvalidArgument("granules", "a slot is named twice")
        held = granules[granules != c.NO_SLOT] if missing else granules
        if (self._sizes(held) * limits.GRANULE_BYTES != namespace.slot_bytes).any():
            raise LayoutMismatch("granules", f"expected slots of {namespace.slot_bytes} bytes")
        return blocks

    def _sizes(self, granules: c.U32) -> npt.NDArray[np.int64]:
        """Granules of each of these slots."""
        slabs = self._shelf.room.slabs
        return slabs.slot_sizes(slabs.slabs_of(granules))

    def _store_one(self, who: Connection, namespace: Namespace, command: c.Commit) -> int:
        """A commit of one block, as most small puts are; returns its `CommitStatus`."""
        granule, key = int(command.granules[0]), command.hashes.tobytes()
        if granule == c.NO_SLOT:
            return self._look_again(namespace, command.hashes)
        block = who.stock.get(granule)
        if block is None:
            raise PermissionDenied("the slot is not in this connection's stock")
        if self._shelf.room.slabs.class_of(granule) != namespace.slot_bytes:
            raise LayoutMismatch("granules", f"expected a slot of {namespace.slot_bytes} bytes")
        if len(self._puts) and self._puts.find(namespace.id, key):
            return _IN_PROGRESS
        chained = command.position >= 0
        whole = WholeBlock(
            key=key,
            put_id=command.put_id,
            block=block,
            granule=granule,
            checksums=command.checksums[0],
            parent=(command.parent or NO_PARENT) if chained else NO_PARENT,
            position=command.position,
            ttl_ms=command.ttl_ms,
        )
        if not publish_one(self._shelf, namespace, whole):
            self._renew(command.granules)
            status = self._look_again(namespace, command.hashes)
            self._shelf.counters.dropped += status == _NO_SPACE
            return status
        del who.stock[granule]
        self._count(who, -namespace.slot_bytes)
        self._latest = np.array([block], np.uint32)
        return _STORED

    def _look_again(self, namespace: Namespace, key: c.U8) -> int:
        """Whether a block (1, 32) that was not stored is there, and read by that."""
        found = self._shelf.catalog.find(namespace.id, key)
        self._shelf.policy.touch(self._shelf.live(found))
        return _EXISTS if found[0] >= 0 else _NO_SPACE

    def _store_many(self, who: Connection, namespace: Namespace, command: c.Commit) -> c.U8:
        """Stores what has a slot and is nobody else's; uint8 (n,) `CommitStatus`."""
        blocks = self._blocks(who, namespace, command.granules)
        status = np.full(len(blocks), _NO_SPACE, np.uint8)
        ours = [i for i, block in enumerate(blocks) if block is not None]
        if len(self._puts):
            for i in ours:
                if self._puts.find(namespace.id, command.hashes[i].tobytes()):
                    status[i] = _IN_PROGRESS
            ours = [i for i in ours if status[i] != _IN_PROGRESS]
        if ours:
            rows = np.array(ours, np.int64)
            self._publish(who, namespace, command, blocks=blocks, ours=rows, status=status)
        unknown = np.flatnonzero(status == _NO_SPACE)
        if len(unknown):
            found = self._shelf.catalog.find(namespace.id, command.hashes[unknown])
            there = found >= 0
            self._shelf.policy.touch(self._shelf.live(found[there]))
            status[unknown[there]] = _EXISTS
            lost = command.granules[unknown[~there]] != c.NO_SLOT
            self._shelf.counters.dropped += int(lost.sum())
        return status

    def _publish(
        self,
        who: Connection,
        namespace: Namespace,
        command: c.Commit,
        *,
        blocks: list[int | None],
        ours: npt.NDArray[np.int64],
        status: c.U8,
    ) -> None:
        """Stores the blocks numbered `ours`, and says in `status` which found a place."""
        n = len(blocks)
        parents, positions = np.zeros_like(command.hashes), np.full(n, -1)
        row_of = np.full(n + 1, NO_ROW, np.int64)  # the last: of what comes before the first
        if command.position >= 0:
            if command.parent:
                parents[0] = np.frombuffer(command.parent, np.uint8)
            parents[1:] = command.hashes[:-1]
            positions = command.position + np.arange(n)
            row_of[ours] = np.arange(len(ours))
        held = blocks if len(ours) == n else [blocks[i] for i in ours.tolist()]
        whole = Whole(
            keys=command.hashes[ours],
            put_ids=_put_ids(command, ours),
            ids=np.array(held, np.uint32),
            granules=command.granules[ours],
            checksums=command.checksums[ours],
            parents=parents[ours],
            positions=positions[ours].astype(np.int32),
            ttl_ms=np.full(len(ours), command.ttl_ms, np.int64),
            before=row_of[ours - 1],
        )
        shown = publish(self._shelf, namespace, whole)
        status[ours[shown]] = _STORED
        self._latest = whole.ids[shown]
        self._renew(whole.granules[~shown])
        self.remove(who, whole.granules[shown].tolist())

    def _ahead(self, who: Connection, namespace: Namespace, n: int) -> c.U32:
        """More slots for later, as long as all that lie idle are a small part of the pool; no block
        that was stored just now goes for them, where all else is in use."""
        total = self._shelf.room.slabs.total_bytes
        own = min(total // limits.AHEAD_SHARE, limits.MAX_AHEAD_BYTES) - who.stock_bytes
        room = min(own, total // limits.ALL_AHEAD_SHARE - self.nbytes)
        n = min(n, max(0, room) // namespace.slot_bytes)
        self._next = (namespace.slot_bytes, n)
        if not n:
            return _NOTHING
        with self._shelf.kept(self._latest):
            return self._take(who, namespace, n)

    def _take(self, who: Connection, namespace: Namespace, n: int) -> c.U32:
        """Up to n more slots of the pool for the connection's stock."""
        if n <= 0:
            return _NOTHING
        slots = self._shelf.take_slots(namespace.slot_bytes, n)
        self._renew(slots.granules)
        who.stock.update(zip(slots.granules.tolist(), slots.ids.tolist(), strict=True))
        self._count(who, namespace.slot_bytes * len(slots.ids))
        return slots.granules

    def _renew(self, granules: c.U32) -> None:
        """Slots that are in a stock, with a generation that nothing was shown with."""
        generations = self._shelf.memory.generations
        generations[granules] = stable(generations[granules])

    def _count(self, who: Connection, more: int) -> None:
        who.stock_bytes += more
        self.nbytes += more

    def remove(self, who: Connection, granules: list[int]) -> IdArray:
        """These slots are no longer in the stock; returns their blocks' ids."""
        blocks = [who.stock.pop(granule) for granule in granules]
        if len(blocks) == 1:
            self._count(who, -self._shelf.room.slabs.class_of(granules[0]))
            return np.array(blocks, np.uint32)
        sizes = self._sizes(np.array(granules, np.uint32))
        self._count(who, -int(sizes.sum()) * limits.GRANULE_BYTES)
        return np.array(blocks, np.uint32)


def _put_ids(command: c.Commit, ours: npt.NDArray[np.int64]) -> bytes:
    """The put id of each of the blocks numbered `ours`, joined."""
    if len(command.put_id) == PUT_ID_BYTES:
        return command.put_id * len(ours)
    return np.frombuffer(command.put_id, np.uint8).reshape(-1, PUT_ID_BYTES)[ours].tobytes()
