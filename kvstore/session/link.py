"""What a session over mapped memory stands on: the memory, the calls, and how bytes get in."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore import limits
from kvstore.errors import DeadlineExceeded
from kvstore.index.reader import IndexReader
from kvstore.layout import Layout
from kvstore.session.base import Bytes1D
from kvstore.session.copies import groups_of, in_parallel
from kvstore.session.parts import Part, payload_offset
from kvstore.session.posting import Board
from kvstore.session.single import Single


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """A store's memory as this process sees it.

    pool: uint8, writable for those who write slots, in this process at `pool_address`. generations:
    uint64, one a granule. instance: the store's; another one's namespace ids mean nothing here.
    board: where blocks are posted, None where puts show theirs by a call. singles: for puts of one
    block, by the id of their namespace's handle.
    """

    pool: Bytes1D
    generations: npt.NDArray[np.uint64]
    index: IndexReader
    instance: int
    board: Board | None = None
    pool_address: int = field(init=False)
    singles: dict[int, Single] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        address: int = self.pool.__array_interface__["data"][0]
        object.__setattr__(self, "pool_address", address)

    def payload(self, layout: Layout, granule: int) -> Bytes1D:
        """The bytes of the block in the slot at `granule`."""
        start = granule * limits.GRANULE_BYTES + payload_offset(layout)
        return self.pool[start : start + layout.block_bytes]

    def slot_addresses(self, granules: npt.NDArray[np.integer]) -> c.U64:
        """Where the slots at `granules` (n,), that is their headers, lie here: uint64 (n,)."""
        first = np.uint64(self.pool_address)
        return granules.astype(np.uint64) * np.uint64(limits.GRANULE_BYTES) + first

    def payload_addresses(self, layout: Layout, granules: npt.NDArray[np.integer]) -> c.U64:
        """Where the payloads of these slots lie: uint64 (n,)."""
        return self.slot_addresses(granules) + np.uint64(payload_offset(layout))


@dataclass(frozen=True, slots=True, eq=False)
class Granted:
    """Blocks whose slots were granted to this connection, to be filled and sealed."""

    namespace: int
    layout: Layout
    put_id: bytes
    hashes: c.U8
    granules: c.U32
    part: Part


class Link(Protocol):
    """One connection to one store: calls, memory, and a way for bytes into granted slots."""

    @property
    def writes_pool(self) -> bool:
        """Whether this process may write slots itself."""

    def call(self, command: c.Command, timeout_s: float) -> c.Result:
        """One command; a `KVStoreError` (never a `Failed`) where the store refused."""

    def cast(
        self, command: c.Command, timeout_s: float, then: Callable[[object], None] | None = None
    ) -> None:
        """A command whose outcome nobody waits for: the store works on it meanwhile, and has done
        it before it begins with the next call. then: told of the result some time."""

    def take_answers(self, timeout_s: float) -> None:
        """Reads what came of casts: of all of them, or with no time what has come by now."""

    def memory(self, timeout_s: float) -> Memory:
        """The memory now, with an index in use; `Unavailable` once the store is gone."""

    @property
    def ready(self) -> Memory | None:
        """The memory, where `memory` would only return it."""

    @property
    def closed(self) -> bool:
        """Whether the connection is over. It is after each call that was sent and not answered."""

    def fill(self, granted: Granted, sources: c.U64, timeout_s: float) -> c.U8:
        """Moves the parts at these addresses into the slots and seals them.

        Returns the `SealStatus` of each (uint8).
        """

    def close(self) -> None:
        """Ends the connection and unmaps; safe to call twice."""


def fill_directly(
    link: Link, memory: Memory, granted: Granted, sources: c.U64, timeout_s: float
) -> c.U8:
    """`Link.fill` for a writer that may write the pool itself."""
    end_s = time.monotonic() + timeout_s
    seal = c.Seal(
        namespace=granted.namespace,
        put_id=granted.put_id,
        hashes=granted.hashes,
        checksums=copy_all_in(
            memory,
            granted.layout,
            granted.part,
            sources=sources,
            slots=granted.granules,
            end_s=end_s,
        ),
    )
    sealed = link.call(seal, max(0.0, end_s - time.monotonic()))
    assert isinstance(sealed, c.Sealed)
    return sealed.status


def copy_all_in(
    memory: Memory,
    layout: Layout,
    part: Part,
    *,
    sources: c.U64,
    slots: npt.NDArray[np.integer],
    end_s: float,
    alone: bool = False,
) -> c.U64:
    """Copies parts of blocks from addresses (sources) to slots (their first granules, (n,)).

    Returns the checksums (n, cells) of what was stored. alone: as `in_parallel` has it.

    `DeadlineExceeded` where that is not done by `end_s` of `time.monotonic`.
    """
    n = len(sources)
    targets = memory.payload_addresses(layout, slots)
    sums = np.empty((n, len(part.cell_runs)), np.uint64)

    def copy(first: int, end: int) -> None:
        sums[first:end] = part.copy_in(sources[first:end], targets[first:end])

    groups = groups_of(n, part.nbytes)
    done = in_parallel(copy, groups, part.nbytes * n, end_s, alone=alone)
    if done < len(groups):
        raise DeadlineExceeded(f"{groups[done][0]} of {n} blocks were copied in time")
    return sums
