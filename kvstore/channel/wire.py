"""Records of the same-host channel: frames of the commands, see `records`. Pure: no sockets."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

from kvstore import commands, errors
from kvstore.channel import records
from kvstore.channel.records import Codec

WIRE_VERSION = 7
FRAME = records.FRAME


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """The daemon's first record, sent with the descriptors of pool, generations and index.

    `writable` is 1 for a client that writes slots itself, 0 for one that stages (copy-in);
    `prefaulted` is 1 where the pool's memory is taken already or soon will be. `board` is the
    number of the client's own board, -1 where it has none; the descriptor of the boards comes last
    if `boards_bytes` is not 0.
    """

    version: int
    instance: int
    writable: int
    prefaulted: int
    pool_bytes: int
    index_bytes: int
    boards_bytes: int
    board: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class MapIndex:
    """Asks for the index that took the place of a retired one."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class IndexMapped:
    """Sent with the descriptor of the index."""

    index_bytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Sent with the descriptor of the client's staging memfd; answered by an empty `Count`."""

    nbytes: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SealStaged:
    """A `Seal` whose bytes lie in the client's staging memory, one block's cells at each offset.

    The daemon copies them to the slots and hashes what arrived; answered by `Sealed`.
    """

    namespace: int
    put_id: bytes
    hashes: commands.U8
    offsets: commands.U64


# The numbers are part of the format: append, never reorder.
_TYPES: dict[int, type] = {
    1: commands.OpenNamespace,
    2: commands.NamespaceOpened,
    3: commands.Reserve,
    4: commands.Reserved,
    5: commands.Seal,
    6: commands.Sealed,
    7: commands.Abort,
    8: commands.Lease,
    9: commands.Leased,
    10: commands.Release,
    11: commands.Touch,
    12: commands.Drop,
    13: commands.Explain,
    14: commands.Explained,
    15: commands.Stat,
    16: commands.Stats,
    17: commands.Count,
    18: commands.Failed,
    19: Welcome,
    20: commands.Hint,
    21: commands.Describe,
    22: commands.Description,
    23: MapIndex,
    24: IndexMapped,
    25: Stage,
    26: SealStaged,
    27: commands.Grant,
    28: commands.Granted,
    29: commands.Commit,
    30: commands.Committed,
    31: commands.GiveBack,
    32: commands.Fetch,
    33: commands.Persist,
    34: commands.Persisted,
    35: commands.Scan,
    36: commands.Scanned,
    37: commands.Adopt,
}
_CODEC = Codec(
    _TYPES,
    version=WIRE_VERSION,
    dimensions={"hashes": 2, "checksums": 2, "put_ids": 2},
    what="channel record",
)
COMMANDS = frozenset(get_args(commands.Command))


encode = _CODEC.encode
body_length = _CODEC.body_length
decode = _CODEC.decode
decode_frame = _CODEC.decode_frame


def raise_if_failed(result: Any) -> Any:
    """Turns a `Failed` record back into the error it stands for."""
    if not isinstance(result, commands.Failed):
        return result
    for kind in (
        errors.StaleNamespace,
        errors.PermissionDenied,
        errors.DeadlineExceeded,
        errors.Unavailable,
        errors.ProtocolError,
        errors.Corrupted,
    ):
        if kind.code == result.code:
            raise kind(result.message)
    if result.code == errors.ResourceExhausted.code:
        raise errors.ResourceExhausted(result.message, retry_after_ms=result.retry_after_ms)
    if result.code == errors.LayoutMismatch.code:
        raise errors.LayoutMismatch(result.field, result.message)
    if result.code == errors.InvalidArgument.code:
        raise errors.InvalidArgument(result.field, result.message)
    raise errors.KVStoreError(result.message)
