"""Blocks on their way in: reserved and not yet sealed, and who is writing which cells of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.commands import U32, U64
from kvstore.layout import Layout
from kvstore.store.blocks import IdArray

PutKey = tuple[int, bytes, bytes]  # namespace, hash, put id


@dataclass(frozen=True, slots=True, eq=False)
class GrantedBlocks:
    """Where the bytes of granted blocks belong, for whoever copies for their writer.

    cells: uint32, empty for all. payloads: one for each hash, None where it is not granted.
    """

    layout: Layout
    cells: U32
    payloads: list[npt.NDArray[np.uint8] | None]


@dataclass(slots=True, eq=False)
class Pending:
    """One block of one put. `missing`: mask of the cells that nobody has sealed yet."""

    namespace: int
    key: bytes
    put_id: bytes
    block: int
    granule: int
    slot_bytes: int
    parent: bytes
    position: int
    ttl_ms: int
    missing: int
    checksums: U64 | None = None
    writers: dict[int, int] = field(default_factory=dict)  # connection -> mask of its cells
    dropped: bool = False

    def arrive(self, mask: int, checksums: U64, n_cells: int) -> None:
        """The cells of `mask` are in; checksums: theirs, in order."""
        self.missing &= ~mask
        if len(checksums) == n_cells:
            self.checksums = checksums
            return
        if self.checksums is None:
            self.checksums = np.zeros(n_cells, np.uint64)
        self.checksums[bits(mask)] = checksums

    def may_join(self, put_id: bytes, connection: int, mask: int) -> bool:
        """Whether it is that put, none of these cells is sealed or being written, and nobody behind
        that connection writes others: a seal says whose cells it is about, and an abort whose put,
        by the connection alone."""
        written = 0
        for cells in self.writers.values():
            written |= cells
        free = not mask & written and mask & self.missing == mask
        return put_id == self.put_id and connection not in self.writers and free


@dataclass(slots=True, eq=False)
class Connection:
    """What one client holds. `put_bytes`: of slots of puts that it has begun; `stock`: block ids of
    slots without a key, by granule, `stock_bytes` of them. `board`: the number of its board."""

    puts: dict[PutKey, Pending] = field(default_factory=dict)
    leases: dict[int, npt.NDArray[np.uint32]] = field(default_factory=dict)
    leased_blocks: int = 0
    put_bytes: int = 0
    stock: dict[int, int] = field(default_factory=dict)
    stock_bytes: int = 0
    board: int | None = None

    @property
    def granted_bytes(self) -> int:
        """Of slots that it may write."""
        return self.put_bytes + self.stock_bytes

    @property
    def holds_nothing(self) -> bool:
        """Whether no memory depends on this client."""
        return not self.puts and not self.leases and not self.stock


class Puts:
    """All pending blocks, by key. A dropped one is no longer found, but its slot is its writers'
    until the last of them has let go: it is in quarantine.

    One that nobody writes to while cells are missing waits for ranks that have yet to reserve
    theirs; it belongs to no connection, so the store gives it a deadline.
    """

    def __init__(self) -> None:
        self._by_key: dict[tuple[int, bytes], Pending] = {}
        self.quarantined = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def __iter__(self) -> Iterator[Pending]:
        return iter(self._by_key.values())

    def find(self, namespace: int, key: bytes) -> Pending | None:
        """The put of that key under way."""
        return self._by_key.get((namespace, key))

    def begin(self, begun: Iterable[Pending]) -> None:
        """New puts of keys that have none."""
        self._by_key.update({(pending.namespace, pending.key): pending for pending in begun})

    def finish(self, complete: Iterable[Pending]) -> None:
        """All cells are in."""
        for pending in complete:
            del self._by_key[pending.namespace, pending.key]

    def join(self, pending: Pending, number: int, who: Connection, mask: int) -> None:
        """A connection will write these cells."""
        if number not in pending.writers:
            who.put_bytes += pending.slot_bytes
        pending.writers[number] = pending.writers.get(number, 0) | mask
        who.puts[pending.namespace, pending.key, pending.put_id] = pending

    def drop(self, pending: Pending) -> bool:
        """Nobody will find it; True: nor is anybody writing to it, so that the slot is free."""
        pending.dropped = True
        del self._by_key[pending.namespace, pending.key]
        self.quarantined += bool(pending.writers)
        return not pending.writers

    def of_blocks(self, ids: IdArray) -> list[Pending]:
        """The puts of these block ids."""
        wanted = set(ids.tolist())
        return [pending for pending in self if pending.block in wanted]

    def leave(self, pending: Pending, number: int, who: Connection) -> bool:
        """The connection will not write to the slot any more; True: nor will anybody, and the put
        was dropped, so that the slot is free."""
        del pending.writers[number]
        del who.puts[pending.namespace, pending.key, pending.put_id]
        who.put_bytes -= pending.slot_bytes
        if not pending.dropped or pending.writers:
            return False
        self.quarantined -= 1
        return True


def bits(mask: int) -> list[int]:
    """The numbers of the bits that are set, ascending."""
    return [i for i in range(mask.bit_length()) if mask >> i & 1]
