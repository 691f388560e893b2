"""The store's vocabulary: every command and result, as frozen values with one handler each.

The same-host channel and gRPC only translate to and from these. Arrays are numpy, C-contiguous;
`hashes` is always (n, 32) uint8, and per-block results are in the order of `hashes`.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]
U32 = npt.NDArray[np.uint32]
U64 = npt.NDArray[np.uint64]
NO_SLOT = 0xFFFFFFFF


class ReserveStatus(enum.IntEnum):
    """What became of one key of a `Reserve`."""

    GRANTED = 0  # write the slot, then seal it
    EXISTS = 1  # already stored: nothing to do
    IN_PROGRESS = 2  # another put id is writing this key
    NO_SPACE = 3  # pool, index or a limit is full: not stored, retry later


class SealStatus(enum.IntEnum):
    """What became of one key of a `Seal`."""

    STORED = 0  # all cells are in: the block can be found
    WAITING = 1  # other ranks still owe cells
    DROPPED = 2  # the put was aborted, or was never granted to this connection


class CommitStatus(enum.IntEnum):
    """What became of one key of a `Commit`; all but STORED leave its slot in the stock."""

    STORED = 0
    EXISTS = 1  # already stored: nothing to do
    IN_PROGRESS = 2  # ranks are writing this key together
    NO_SPACE = 3  # the index is full, or no slot was named: not stored


class ExplainStatus(enum.IntEnum):
    """Why a key can or cannot be found."""

    STORED = 0
    NEVER_STORED = 1
    NOT_SEALED = 2
    EVICTED = 3
    DROPPED = 4
    EXPIRED = 5
    OTHER_LAYOUT = 6  # this namespace's name holds the key under another layout
    CORRUPTED = 7  # its bytes on NVMe were not what was stored, or could not be read


class HintKind(enum.IntEnum):
    """What a caller knows of the future of blocks."""

    SESSION_ENDS = 1  # nobody will come back: evict these first
    NEXT_TURN_BY = 2  # read again within `for_ms`: keep them while others can go, then first out
    PIN_UNTIL = 3  # never evict for `for_ms`; bounded by limits.MAX_PINNED_SHARE of the pool


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenNamespace:
    """Opens (or creates) the namespace of `name` and `layout` (`Layout.encode()`)."""

    name: str
    layout: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class NamespaceOpened:
    """`namespace` is the id in every record; `key` is the secret that keys its chains."""

    namespace: int
    key: bytes
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserve:
    """Asks for slots for `hashes` under one 16-byte `put_id`.

    `cells` lists the cells that this connection will write (uint32, empty: all of them).
    `parent` is the 32-byte key before the first hash (empty: unknown or none), `position` the
    first block's index in its chain, -1 where the caller does not know it. `ttl_ms` after the
    seal the block is forgotten; 0: never.
    """

    namespace: int
    put_id: bytes
    hashes: U8
    cells: U32
    parent: bytes = b""
    position: int = -1
    ttl_ms: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reserved:
    """`status` holds `ReserveStatus` (uint8); `granules` counts where GRANTED."""

    status: U8
    granules: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Seal:
    """Says that the cells are written; `checksums` is (n, len(cells)) xxh3-64."""

    namespace: int
    put_id: bytes
    hashes: U8
    checksums: U64


@dataclass(frozen=True, slots=True, kw_only=True)
class Sealed:
    """`status` holds `SealStatus` (uint8)."""

    status: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Asks for `blocks` empty slots that fit blocks of the namespace, for the sender's stock."""

    namespace: int
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Granted:
    """The first granules of the slots, maybe of fewer than were asked for."""

    granules: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Commit:
    """Says that whole blocks are written in slots of the sender's stock: a put in one command.

    `granules` has a slot for each hash, `NO_SLOT` for one that is stored already as far as the
    sender knows. `put_id` is 16 bytes for all of them, or 16 for each. `checksums` is (n, cells)
    xxh3-64; `parent`, `position`, `ttl_ms` as in `Reserve`.
    `more`: how many slots the sender would like to hold ahead for blocks of this namespace.
    """

    namespace: int
    put_id: bytes
    hashes: U8
    granules: U32
    checksums: U64
    parent: bytes = b""
    position: int = -1
    ttl_ms: int = 0
    more: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """`status` holds `CommitStatus` (uint8); `granules` of the slots that were added."""

    status: U8
    granules: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Adopt:
    """Says that the sender has posted blocks on its board; answered by `Granted`.

    `more`: how many slots the sender would like to hold ahead for blocks of this namespace.
    """

    namespace: int
    more: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveBack:
    """Slots of the sender's stock that it will not write."""

    granules: U32


@dataclass(frozen=True, slots=True, kw_only=True)
class Abort:
    """Gives up one put of `hashes`: the blocks are dropped for all ranks."""

    namespace: int
    put_id: bytes
    hashes: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """Pins the leading stored run of `hashes` until `Release` or the holder's death."""

    namespace: int
    hashes: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Leased:
    """Where the leased blocks lie; the arrays cover the leading run only. `left_ms` is the time
    until they expire, at least 1, 0 for ever."""

    lease: int
    granules: U32
    generations: U64
    left_ms: U64


@dataclass(frozen=True, slots=True, kw_only=True)
class Fetch:
    """Asks for those of `hashes`, in chain order, that are on a slower tier to come into memory.

    Answered by the `Count` of leading ones that are there: as soon as there are more than at
    first, or no more will come, or after `wait_ms`; the others go on coming. 0: at once.
    """

    namespace: int
    hashes: U8
    wait_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Persist:
    """Asks for `hashes` to be made durable; answered when they are, or after `wait_ms`."""

    namespace: int
    hashes: U8
    wait_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Persisted:
    """`durable` (uint8): 1 for each block that survives a power cut."""

    durable: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Ends one lease of this connection."""

    lease: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Touch:
    """Reads that made no call, in chain order, and the look-ups they came from; of the hits,
    `cold_hits` were on NVMe."""

    granules: U32
    generations: U64
    lookups: int
    hits: int
    cold_hits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Forgets `hashes`; with no hash at all, the whole namespace (its generation moves on)."""

    namespace: int
    hashes: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Hint:
    """Tells what will happen to the stored ones of `hashes`; `kind` is a `HintKind`.

    `for_ms` is a duration from now, 0 for SESSION_ENDS. Answered by the `Count` of blocks found.
    """

    namespace: int
    kind: int
    for_ms: int
    hashes: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Explain:
    """Asks why each of `hashes` can or cannot be found."""

    namespace: int
    hashes: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """`status` holds `ExplainStatus` (uint8), `tiers` the tier of the stored ones.

    `when_ms` is the Unix time in ms at which a block was evicted, dropped or expired, else 0.
    """

    status: U8
    tiers: U8
    when_ms: U64


@dataclass(frozen=True, slots=True, kw_only=True)
class Stat:
    """Asks for the counters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Counters since the start, and gauges; bytes and blocks.

    `used_bytes`: of slots of blocks and of puts under way; `ahead_bytes`: of empty slots that
    clients hold ahead. `nvme_health`: the worst volume's `kvstore.nvme.volume.Health`, 3 without
    any; `nvme_ready`: 1 once all is found that lies there. `nvme_blocks`: with a place there, in
    memory or not; `nvme_written_bytes`: all that was written, of which `nvme_payload_bytes` in
    slots; `nvme_again_blocks`: written a second time, because their segment made room.
    """

    blocks: int
    pending_blocks: int
    quarantined_blocks: int
    leased_blocks: int
    pinned_blocks: int
    used_bytes: int
    ahead_bytes: int
    total_bytes: int
    lookups: int
    hits: int
    stored: int
    evicted: int
    dropped: int
    expired: int
    refused: int
    connections: int
    cold_hits: int
    nvme_blocks: int
    nvme_used_bytes: int
    nvme_total_bytes: int
    nvme_health: int
    nvme_ready: int
    nvme_queued_bytes: int
    nvme_written_blocks: int
    nvme_written_bytes: int
    nvme_payload_bytes: int
    nvme_again_blocks: int
    nvme_refused_blocks: int
    nvme_scrubbed_blocks: int
    promoted: int
    demoted: int
    corrupted: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scan:
    """Asks for the blocks among the `most` block ids from `first` on (at most `MAX_KEYS_PER_CALL`):
    from 0 on, page by page, it names every block that was there all the time."""

    first: int
    most: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Scanned:
    """`following` is the next page's `first`, 0 after the last. `put_ids` is uint8 (n, 16),
    `namespaces` the blocks' namespace ids.
    """

    following: int
    namespaces: U32
    hashes: U8
    put_ids: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Describe:
    """Asks what this store is and which namespaces it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """The store's make-up. `names` are the namespaces' names and `layouts` their encoded layouts,
    one a line each, in the order of the arrays `ids`, `blocks` and `generations`."""

    version: str
    instance: int
    policy: str
    max_blocks: int
    index_capacity: int
    started_ms: int
    names: str
    layouts: str
    ids: U32
    blocks: U64
    generations: U64


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How many blocks a command changed."""

    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """An error on the wire: `code` names the class in `errors`, `field` its argument."""

    code: int
    field: str
    message: str
    retry_after_ms: int


Command = (
    OpenNamespace
    | Reserve
    | Seal
    | Grant
    | Adopt
    | Commit
    | GiveBack
    | Abort
    | Lease
    | Fetch
    | Persist
    | Release
    | Touch
    | Drop
    | Hint
    | Explain
    | Scan
    | Stat
    | Describe
)
Result = (
    NamespaceOpened
    | Reserved
    | Sealed
    | Granted
    | Committed
    | Leased
    | Persisted
    | Explained
    | Scanned
    | Stats
    | Description
    | Count
    | Failed
)
