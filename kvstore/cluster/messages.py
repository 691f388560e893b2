"""What nodes and clients of a cluster say to each other: frozen values, in frames of `records`.

Between a client and a node, and between two nodes, it is the same service: who asks is told by the
token that the connection carries. `hashes` is always uint8 (n, 32), and answers are in their order.
Every message that changes something carries the epoch that its sender goes by.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

import numpy as np

from kvstore import commands
from kvstore.channel.records import Codec
from kvstore.commands import U8, U32, U64
from kvstore.errors import KVStoreError

MESSAGES_VERSION = 3


class WrongEpoch(KVStoreError):  # noqa: N818
    """Raised where sender and receiver go by different views. `view` is the receiver's, encoded,
    if it is the later one; else empty, and the receiver is to learn the sender's (`Learn`)."""

    code = 12

    def __init__(self, view: bytes) -> None:
        super().__init__("the cluster's view has changed" if view else "a later view is needed")
        self.view = view


class PutStatus(enum.IntEnum):
    """What became of one block of a put or a pull at one node."""

    STORED = 0
    EXISTS = 1  # under this put id, or under another one: either way it can be read
    NO_SPACE = 2
    FAILED = 3  # its bytes did not arrive, or not as they were announced
    BUSY = 4  # another put of the same key is under way there
    WAITING = 5  # these cells are there, and others' have yet to come


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Begins a session with a node: its life is that of the connection which carries it.

    name: of the node that asks, empty for a client. kind: of its transfer agent, and how to reach
    that (`Agent.describe`), empty where it has none to offer.
    """

    version: int
    name: str
    kind: str
    agent: bytes
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcomed:
    """session: names the sender in later messages. kind and agent: the node's own, for other
    nodes; empty for clients. run: differs in each life of the node."""

    version: int
    session: int
    name: str
    run: int
    kind: str
    agent: bytes
    view: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Asks how the node is; says which epoch the sender has seen."""

    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pong:
    """serving: 1 once the node answers for its blocks. settled: the last epoch for which it has
    brought all of its blocks to where they belong, -1 for none."""

    name: str
    run: int
    epoch: int
    serving: int
    settled: int
    used_bytes: int
    total_bytes: int
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Learn:
    """Tells a later view; answered by a `Pong`."""

    view: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class AskView:
    """Asks for the view; answered by a `Learn`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Opens a namespace by name and layout at one node; answered by `Opened`."""

    name: str
    layout: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """`namespace` is this node's number, good while `instance` is; `key` keys the chains and is
    the same at all nodes. generation: grows whenever the whole cluster forgets the
    namespace."""

    namespace: int
    instance: int
    key: bytes
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Asks which of the blocks are stored at the node; answered by `Seen`. `WrongEpoch` where the
    node goes by an earlier view than `epoch`, and may have missed what was forgotten since."""

    epoch: int
    namespace: int
    instance: int
    hashes: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """tiers: the tier code of each, 0 for one that is not there. epoch: of the node."""

    tiers: U8
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Get:
    """Asks the node to write blocks into the sender's memory, at `addresses` (uint64 (n,)).
    epoch: as in `Look`.

    cells: ascending, only those of each block; empty for all. heads: 1 where each block's header is
    to land right in front of it as well, so that the sender can tell what has landed before it is
    answered. wait_ms: how long the node may take; it answers once no byte of the call moves any
    more, however long that takes.
    """

    epoch: int
    session: int
    namespace: int
    instance: int
    hashes: U8
    addresses: U64
    cells: U32
    heads: int
    wait_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Got:
    """tiers: where each block was that has been written, 0 for one that has not. headers: of the
    blocks, uint8 (n, header bytes), zeros for those that are not there. hot: uint8 (n,),
    how many more copies than R the block's segment has."""

    tiers: U8
    headers: U8
    hot: U8
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """Asks the node to read blocks from the sender's memory, to store them, and to see to R copies;
    answered by `Stored`.

    put_ids: (n, 16). checksums: (n, cells), of what is to arrive. parents: (n, 32), zeros where
    unknown. positions: uint32, 2**32 - 1 where unknown. ttl_ms: as in `Commit`. copies: how many
    to wait for. wait_ms: as in `Get`. cells: ascending, those alone are put, one after another at
    each address; others put the rest of these blocks under the same put ids. Empty for all.
    """

    session: int
    epoch: int
    namespace: int
    instance: int
    put_ids: U8
    hashes: U8
    addresses: U64
    checksums: U64
    parents: U8
    positions: U32
    ttl_ms: int
    copies: int
    wait_ms: int
    persist: int
    cells: U32 = field(default_factory=lambda: np.empty(0, np.uint32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """status: `PutStatus` at the node itself. copies: at how many distinct nodes each block is, all
    of which stored it at `epoch`, which none of them had left. persisted: 1 where all of those
    have synced it."""

    status: U8
    copies: U8
    persisted: U8
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pull:
    """A node that has blocks asks another one to read them from its pool; answered by `Pulled`.

    name and layout: of the namespace. source: the sender's name. put_ids: (n, 16). parents:
    (n, 32), zeros where unknown. positions: uint32, 2**32 - 1 where unknown. ttl_ms: uint64, from
    now, 0 for ever.
    """

    source: str
    epoch: int
    name: str
    layout: bytes
    generation: int
    put_ids: U8
    hashes: U8
    addresses: U64
    checksums: U64
    parents: U8
    positions: U32
    ttl_ms: U64
    wait_ms: int
    persist: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Pulled:
    """status: `PutStatus` of each. persisted: 1 where it is synced. epoch: the node's when the last
    block was stored."""

    status: U8
    persisted: U8
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Compare:
    """Anti-entropy: digests (uint64, `DIGESTS` of them) over (key, put id) of the blocks of a
    namespace that sender and receiver should both have; answered by `Compared`."""

    source: str
    epoch: int
    name: str
    layout: bytes
    generation: int
    digests: U64


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """differ: uint8 (DIGESTS,), 1 where the receiver's blocks are not the same ones."""

    differ: U8
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """Tells which blocks the sender has; answered by `Wanted`."""

    source: str
    epoch: int
    name: str
    layout: bytes
    generation: int
    hashes: U8
    put_ids: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """wants: uint8 (n,), 1 for each block that the node lacks and has room for."""

    wants: U8
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forget:
    """Drops blocks at one node; answered by a `Count`. With `all_of_it` the whole namespace, whose
    cluster-wide generation becomes at least `generation`."""

    name: str
    layout: bytes
    hashes: U8
    all_of_it: int
    generation: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AskGenerations:
    """Asks for what was forgotten as a whole; answered by `Generations`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generations:
    """names and layouts: one a line each (layouts as in `Description`); numbers: their cluster-wide
    generations. serving: as in `Pong`. since, through: the epochs of which all are known; what was
    forgotten before, or after, may be missing."""

    names: str
    layouts: str
    numbers: U64
    serving: int
    since: int
    through: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Doubt:
    """Tells that blocks did not arrive as their headers say: the node looks at them again and
    drops what is damaged; answered by a `Count` of those."""

    namespace: int
    instance: int
    hashes: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Advise:
    """A `commands.Hint` for blocks at the node; answered by a `Count`."""

    namespace: int
    instance: int
    kind: int
    for_ms: int
    hashes: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Why each key can or cannot be found at the node; answered by `commands.Explained`."""

    namespace: int
    instance: int
    hashes: U8


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """Asks that a member gives its blocks away and leaves; answered by a `Learn` of the view."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """Asks that a member that was drained takes blocks again; answered likewise."""

    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AskStatus:
    """Asks for the node's counters; answered by a `Status`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """What the node has seen and done. names and values: counters and gauges, one a line each and
    in the same order. suspects: names of members that do not answer it, one a line."""

    pong: bytes
    view: bytes
    suspects: str
    names: str
    values: U64


# The numbers are part of the format: append, never reorder.
CODEC = Codec(
    dict(
        enumerate(
            (
                Hello,
                Welcomed,
                Ping,
                Pong,
                Learn,
                AskView,
                Open,
                Opened,
                Look,
                Seen,
                Get,
                Got,
                Put,
                Stored,
                Pull,
                Pulled,
                Compare,
                Compared,
                Offer,
                Wanted,
                Forget,
                AskGenerations,
                Generations,
                Doubt,
                Advise,
                Ask,
                Drain,
                AskStatus,
                Status,
                commands.Count,
                commands.Explained,
                commands.Failed,
                commands.Stat,
                commands.Stats,
                commands.Describe,
                commands.Description,
                Join,
            ),
            start=1,
        )
    ),
    version=MESSAGES_VERSION,
    dimensions={"hashes": 2, "checksums": 2, "put_ids": 2, "parents": 2, "headers": 2},
    what="message between nodes",
)
