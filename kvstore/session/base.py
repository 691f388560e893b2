"""What a user of the store can ask for: `Session`, its typed results, and the port below it.

Three things implement `Session`: the embedded `KVStore`, a client over shared memory, and a
client over gRPC. One conformance suite runs against all of them.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

from kvstore import commands
from kvstore.commands import ExplainStatus, HintKind
from kvstore.layout import Layout

Bytes1D = npt.NDArray[np.uint8]
Hashes = Sequence[bytes] | bytes | npt.NDArray[np.uint8]


class Tier(enum.StrEnum):
    """Where a block was found."""

    HBM = "hbm"
    DRAM = "dram"
    NVME = "nvme"


# The numbers of the tiers in index rows and on the wire: append, never reorder.
TIERS = {1: Tier.DRAM, 2: Tier.NVME, 3: Tier.HBM}
NVME_CODE = 2


class MissReason(enum.StrEnum):
    """Why a block was not got."""

    NOT_STORED = "not stored"
    OVERWRITTEN = "evicted while it was read"
    CORRUPTED = "its bytes fail their checksum"
    UNAVAILABLE = "store unavailable"


@dataclass(frozen=True, slots=True)
class Hit:
    """The block's bytes are in the destination."""

    tier: Tier


@dataclass(frozen=True, slots=True)
class Miss:
    """The destination's bytes mean nothing."""

    reason: MissReason


@dataclass(frozen=True, slots=True, eq=False)
class Matched:
    """The longest stored leading part of a chain: `count` blocks, and the tier of each.

    `tier_codes` is uint8 (count,), keys of `TIERS`.
    """

    count: int
    tier_codes: npt.NDArray[np.uint8]

    @property
    def tiers(self) -> list[Tier]:
        """The tier of each matched block."""
        return [TIERS[code] for code in self.tier_codes.tolist()]


NOTHING_MATCHED = Matched(0, np.empty(0, np.uint8))


@dataclass(frozen=True, slots=True, kw_only=True)
class PutResult:
    """How many blocks of a put are stored now, were there before, wait for ranks, or are not.

    `persisted`: of those that are there, how many survive a power cut, where the put asked for it.
    `replicated`: how many of them are at as many nodes as the put waited for, in a cluster.
    `retry_after_ms` is not 0 where trying the blocks that are not stored again may help.
    """

    stored: int
    existed: int
    waiting: int
    not_stored: int
    retry_after_ms: int = 0
    persisted: int = 0
    replicated: int = 0

    def __add__(self, other: PutResult) -> PutResult:
        """What became of the blocks of two puts."""
        return PutResult(
            stored=self.stored + other.stored,
            existed=self.existed + other.existed,
            waiting=self.waiting + other.waiting,
            not_stored=self.not_stored + other.not_stored,
            retry_after_ms=max(self.retry_after_ms, other.retry_after_ms),
            persisted=self.persisted + other.persisted,
            replicated=self.replicated + other.replicated,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """What the caller knows of the future of blocks; `for_s` seconds from now (see `HintKind`)."""

    kind: HintKind
    for_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockReport:
    """Why one block can or cannot be found.

    tier: where it is, if it is stored. when: Unix time in seconds at which it was evicted,
    dropped or expired, if it was.
    """

    status: ExplainStatus
    tier: Tier | None = None
    when: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceInfo:
    """One namespace of a store."""

    id: int
    name: str
    blocks: int
    layout: Layout
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What a store is. `started` is a Unix time in seconds."""

    version: str
    instance: int
    policy: str
    max_blocks: int
    index_capacity: int
    started: float
    namespaces: tuple[NamespaceInfo, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceHandle:
    """An open namespace: its id, the secret that keys its chains (not shown), its layout.

    It stays good when the store restarts or the namespace is dropped: sessions then open the
    namespace again by name and layout. `instance` is the store's that gave the id.
    """

    id: int
    name: str
    layout: Layout
    generation: int
    key: bytes = field(repr=False)
    instance: int = 0


class View(Protocol):
    """Blocks that stay as they are while it is held: read-only uint8 arrays. Release it soon."""

    blocks: list[Bytes1D]

    def release(self) -> None:
        """Ends the hold; the arrays must not be used afterwards. Safe to call twice."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None: ...


class Session(Protocol):
    """Everything a user asks of a store.

    `hashes` is (n, 32) uint8, or n 32-byte strings, in chain order; at most
    `limits.MAX_KEYS_PER_CALL`, at least one. `timeout_s` is a call's deadline, None the session's
    own. All calls raise `InvalidArgument` (with nothing changed) for bad input; those that do not
    say otherwise also raise `Unavailable` and `DeadlineExceeded`.
    """

    def open_namespace(
        self, name: str, layout: Layout, *, timeout_s: float | None = None
    ) -> NamespaceHandle:
        """Opens the namespace of `name` and `layout`, creating it where it is new."""

    def match(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        *,
        hint: Hint | None = None,
        prefetch: bool = False,
        timeout_s: float | None = None,
    ) -> Matched:
        """The longest stored leading part of the chain; nothing where the store is away.

        prefetch: begin to bring what is on NVMe into memory.
        """

    def get_into(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        destinations: Sequence[Bytes1D],
        *,
        cells: Iterable[int] = (),
        timeout_s: float | None = None,
    ) -> list[Hit | Miss]:
        """Copies each block's bytes into its destination (uint8, 1-D, `block_bytes` long).

        cells: the part to copy; a destination then holds those cells' bytes, one after another.
        Stops at the first miss: blocks behind it are of no use to a prefix. A destination
        counts only where the result says `Hit`. A store that is away is a miss.
        """

    def view(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> View:
        """Holds the leading stored run of the chain and shows its bytes; no copy on one host."""

    def buffers(self, n: int, nbytes: int) -> View:
        """n writable uint8 arrays of so many bytes, to put from. A cluster's nodes read them where
        they lie, without a copy here; elsewhere they are ordinary memory. They must stay as they
        are until the put has returned. `ResourceExhausted` where the memory that nodes read has no
        room for them."""

    def put(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        sources: Sequence[Bytes1D],
        *,
        put_id: bytes | None = None,
        cells: Iterable[int] = (),
        parent: bytes = b"",
        position: int = -1,
        ttl_s: float | None = None,
        hint: Hint | None = None,
        persist: bool = False,
        timeout_s: float | None = None,
    ) -> PutResult:
        """Stores blocks, or one rank's cells of them, in order.

        sources: uint8, 1-D, the concatenated bytes of `cells` (none: the whole block). All
        ranks of one put share `put_id` (16 bytes). parent: the 32-byte hash before the first
        (empty: unknown or none); position: the first block's index in its chain (-1: unknown).
        Blocks that are there already, or for which there is no room, are counted, not raised;
        a store that is away or full stores nothing. persist: wait, until the deadline at most,
        for the blocks to be synced on NVMe; the result says how many are.
        """

    def drop(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> int:
        """Forgets the blocks; returns how many there were."""

    def drop_namespace(self, namespace: NamespaceHandle, *, timeout_s: float | None = None) -> int:
        """Forgets all blocks of the namespace and moves its generation on."""

    def hint(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        hint: Hint,
        *,
        timeout_s: float | None = None,
    ) -> int:
        """Tells what will happen to the stored ones of the blocks; returns how many there are."""

    def explain(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> list[BlockReport]:
        """Why each block of the chain can or cannot be found."""

    def stats(self, *, timeout_s: float | None = None) -> commands.Stats:
        """The store's counters."""

    def info(self, *, timeout_s: float | None = None) -> StoreInfo:
        """What the store is, and its namespaces."""

    def close(self) -> None:
        """Ends the session; safe to call twice."""
