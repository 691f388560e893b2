"""What a store asks of its disks: values that worker threads carry out, and what came of each.

The store decides; whoever carries an operation out touches the disk and the slots that it names,
and nothing else. Until its outcome is told to the store, those slots belong to the operation.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from kvstore.layout import Layout

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WriteRaw:
    """Writes bytes that are none of the pool's, each at its offset, in order.

    syncs_before, syncs_after: whether everything written so far is synced first, and these last.
    """

    number: int
    volume: int
    writes: tuple[tuple[int, U8], ...]
    syncs_before: bool = False
    syncs_after: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class WriteBlocks:
    """Writes a head, and behind it the slots at `granules` of the pool, one after another.

    Nothing is written where a slot is not what `keys` (n, 32) and `stamps` say: its checksums are
    looked at before it leaves memory.
    """

    number: int
    volume: int
    offset: int
    head: U8
    granules: U32
    slot_granules: int
    keys: U8
    stamps: U64
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """Slots that lie one after another on disk, from `offset` on; `count` of them."""

    offset: int
    count: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ReadBlocks:
    """Reads runs of slots into the slots at `granules` of the pool, in that order, and checks them.

    namespace: the number that their headers get, so that they are as if they had been put now.
    """

    number: int
    volume: int
    runs: tuple[Run, ...]
    granules: U32
    slot_granules: int
    keys: U8
    stamps: U64
    layout: Layout
    namespace: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CheckBlocks:
    """Reads slots from disk and checks them; what they hold is not kept."""

    number: int
    volume: int
    runs: tuple[Run, ...]
    slot_granules: int
    keys: U8
    stamps: U64
    layout: Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """Makes durable what was written before."""

    number: int
    volume: int


Op = WriteRaw | WriteBlocks | ReadBlocks | CheckBlocks | Sync
_NONE: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)


@dataclass(frozen=True, slots=True, eq=False)
class Outcome:
    """What came of an operation. error: the system's, empty where there was none. bad: bool (n,),
    which of its blocks are not what they should be (after a write: nothing was written)."""

    number: int
    error: str = ""
    bad: npt.NDArray[np.bool_] = field(default_factory=lambda: _NONE)
