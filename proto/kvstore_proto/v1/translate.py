"""The store's values to and from messages of version 1. Nothing is called or decided here.

What a peer sent is checked on the way: `InvalidArgument` names the field of a bad request,
`ProtocolError` stands for an answer that means nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import TypeVar

import numpy as np

from kvstore import commands, limits
from kvstore.commands import ExplainStatus, HintKind
from kvstore.errors import InvalidArgument, KVStoreError, ProtocolError
from kvstore.keys import as_hashes
from kvstore.layout import Layout
from kvstore.session.base import (
    TIERS,
    BlockReport,
    Hint,
    Matched,
    MissReason,
    NamespaceHandle,
    NamespaceInfo,
    PutResult,
    StoreInfo,
    Tier,
)
from kvstore.session.parts import Part
from kvstore.session.requests import checked_part, hint_ms
from kvstore_proto.v1 import kvstore_pb2 as pb

CHUNK_BYTES = 1 << 20
MAX_MESSAGE_BYTES = 5 << 20  # room for 1,024 namespaces with their layouts, the largest answer
MESSAGE_OPTIONS = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
)

TIER_TO_WIRE = {Tier.DRAM: pb.TIER_DRAM, Tier.NVME: pb.TIER_NVME, Tier.HBM: pb.TIER_HBM}
REASON_TO_WIRE = {
    MissReason.NOT_STORED: pb.MISS_REASON_NOT_STORED,
    MissReason.OVERWRITTEN: pb.MISS_REASON_OVERWRITTEN,
    MissReason.CORRUPTED: pb.MISS_REASON_CORRUPTED,
    MissReason.UNAVAILABLE: pb.MISS_REASON_UNAVAILABLE,
}
HINT_TO_WIRE = {
    HintKind.SESSION_ENDS: pb.HINT_KIND_SESSION_ENDS,
    HintKind.NEXT_TURN_BY: pb.HINT_KIND_NEXT_TURN_BY,
    HintKind.PIN_UNTIL: pb.HINT_KIND_PIN_UNTIL,
}
STATUS_TO_WIRE = {
    ExplainStatus.STORED: pb.EXPLAIN_STATUS_STORED,
    ExplainStatus.NEVER_STORED: pb.EXPLAIN_STATUS_NEVER_STORED,
    ExplainStatus.NOT_SEALED: pb.EXPLAIN_STATUS_NOT_SEALED,
    ExplainStatus.EVICTED: pb.EXPLAIN_STATUS_EVICTED,
    ExplainStatus.DROPPED: pb.EXPLAIN_STATUS_DROPPED,
    ExplainStatus.EXPIRED: pb.EXPLAIN_STATUS_EXPIRED,
    ExplainStatus.OTHER_LAYOUT: pb.EXPLAIN_STATUS_OTHER_LAYOUT,
    ExplainStatus.CORRUPTED: pb.EXPLAIN_STATUS_CORRUPTED,
}
_TIER_OF: dict[int, Tier] = {number: tier for tier, number in TIER_TO_WIRE.items()}
_REASON_OF: dict[int, MissReason] = {number: reason for reason, number in REASON_TO_WIRE.items()}
_HINT_OF: dict[int, HintKind] = {number: kind for kind, number in HINT_TO_WIRE.items()}
_STATUS_OF: dict[int, ExplainStatus] = {number: kind for kind, number in STATUS_TO_WIRE.items()}

_COUNTERS = tuple(field.name for field in dataclasses.fields(commands.Stats))

V = TypeVar("V")


# -- what requests carry -------------------------------------------------------------------


def keys_of(data: bytes) -> commands.U8:
    """Packed keys as (n, 32) uint8, read-only; `InvalidArgument` unless 1 <= n <= 65,536."""
    if not data:
        raise InvalidArgument("keys", f"1 to {limits.MAX_KEYS_PER_CALL} keys a call")
    return as_hashes(data)


def layout_of(data: bytes) -> Layout:
    """The layout of a request; `InvalidArgument` for bytes that are none."""
    try:
        return Layout.decode(data)
    except ProtocolError as error:
        raise InvalidArgument("layout", str(error)) from None


def part_of_cells(layout: Layout, cells: Iterable[int]) -> Part:
    """The part of a layout that `cells` name, none for all; `LayoutMismatch` for other cells."""
    return checked_part(layout, cells)


def namespace_to_wire(namespace: NamespaceHandle) -> pb.NamespaceId:
    """The name of an open namespace on the wire."""
    return pb.NamespaceId(number=namespace.id, instance=namespace.instance)


def hint_to_wire(hint: Hint | None) -> pb.BlockHint | None:
    """A hint's message; `InvalidArgument` for a kind or a time that is none."""
    if hint is None:
        return None
    kind = HINT_TO_WIRE.get(hint.kind)
    if kind is None:
        raise InvalidArgument("hint.kind", f"{hint.kind!r} is no kind of hint")
    return pb.BlockHint(kind=kind, for_ms=hint_ms(hint))


def hint_of(message: pb.BlockHint) -> Hint:
    """The hint of a request; `InvalidArgument` for a kind that is not known."""
    kind = _HINT_OF.get(message.kind)
    if kind is None:
        raise InvalidArgument("hint.kind", f"{message.kind} is no kind of hint")
    return Hint(kind=kind, for_s=message.for_ms / 1e3)


_TIER_CODES = bytes(TIERS)

# -- what answers carry --------------------------------------------------------------------


def matched_to_wire(matched: Matched) -> pb.MatchResponse:
    """A match's message."""
    return pb.MatchResponse(count=matched.count, tiers=matched.tier_codes.tobytes())


def matched_of(message: pb.MatchResponse, asked: int) -> Matched:
    """The match of `asked` keys; `ProtocolError` where count and tiers do not fit."""
    codes = message.tiers
    if not message.count == len(codes) <= asked or codes.translate(None, _TIER_CODES):
        raise ProtocolError(f"a match of {asked} keys says {message.count} and {len(codes)} tiers")
    return Matched(message.count, np.frombuffer(codes, np.uint8))


def tier_of(number: int) -> Tier:
    """The tier of an answer; `ProtocolError` for one that is not known."""
    return _known(_TIER_OF, number, "tier")


def reason_of(number: int) -> MissReason:
    """The reason for a miss; `ProtocolError` for one that is not known."""
    return _known(_REASON_OF, number, "reason")


def put_to_wire(result: PutResult) -> pb.PutResponse:
    """A put's message."""
    return pb.PutResponse(
        stored=result.stored,
        existed=result.existed,
        waiting=result.waiting,
        not_stored=result.not_stored,
        retry_after_ms=result.retry_after_ms,
        persisted=result.persisted,
    )


def put_of(message: pb.PutResponse, asked: int) -> PutResult:
    """The result of a put of `asked` keys; `ProtocolError` where the counts do not add up."""
    total = message.stored + message.existed + message.waiting + message.not_stored
    if total != asked:
        raise ProtocolError(f"a put of {asked} blocks says what became of {total}")
    return PutResult(
        stored=message.stored,
        existed=message.existed,
        waiting=message.waiting,
        not_stored=message.not_stored,
        retry_after_ms=message.retry_after_ms,
        persisted=message.persisted,
    )


def reports_to_wire(reports: Iterable[BlockReport]) -> pb.ExplainResponse:
    """An explanation's message."""
    message = pb.ExplainResponse()
    for report in reports:
        message.statuses.append(STATUS_TO_WIRE[report.status])
        message.tiers.append(TIER_TO_WIRE[report.tier] if report.tier else pb.TIER_UNSPECIFIED)
        message.when_ms.append(round((report.when or 0) * 1e3))
    return message


def reports_of(message: pb.ExplainResponse, asked: int) -> list[BlockReport]:
    """The explanation of `asked` keys; `ProtocolError` for columns of other lengths."""
    if not len(message.statuses) == len(message.tiers) == len(message.when_ms) == asked:
        raise ProtocolError(f"an explanation of {asked} keys has columns of other lengths")
    rows = zip(message.statuses, message.tiers, message.when_ms, strict=True)
    return [
        BlockReport(
            status=_known(_STATUS_OF, status, "status"),
            tier=tier_of(tier) if tier else None,
            when=when / 1e3 if when else None,
        )
        for status, tier, when in rows
    ]


def stats_to_wire(stats: commands.Stats) -> pb.StatsResponse:
    """The counters' message, whose fields have the counters' names."""
    return pb.StatsResponse(**{name: getattr(stats, name) for name in _COUNTERS})


def stats_of(message: pb.StatsResponse) -> commands.Stats:
    """The counters; those that the peer does not know are 0."""
    return commands.Stats(**{name: getattr(message, name) for name in _COUNTERS})


def info_to_wire(info: StoreInfo) -> pb.InfoResponse:
    """A store's message."""
    return pb.InfoResponse(
        version=info.version,
        instance=info.instance,
        policy=info.policy,
        max_blocks=info.max_blocks,
        index_capacity=info.index_capacity,
        started_ms=round(info.started * 1e3),
        namespaces=map(_namespace_info_to_wire, info.namespaces),
    )


def info_of(message: pb.InfoResponse) -> StoreInfo:
    """What a store is; `ProtocolError` for namespaces without a layout."""
    return StoreInfo(
        version=message.version,
        instance=message.instance,
        policy=message.policy,
        max_blocks=message.max_blocks,
        index_capacity=message.index_capacity,
        started=message.started_ms / 1e3,
        namespaces=tuple(map(_namespace_info_of, message.namespaces)),
    )


def handle_of(message: pb.OpenNamespaceResponse, name: str, layout: Layout) -> NamespaceHandle:
    """The namespace that was opened; `ProtocolError` for a key of another length."""
    if len(message.key) != limits.KEY_BYTES:
        raise ProtocolError(f"the key of a namespace has {len(message.key)} bytes")
    return NamespaceHandle(
        id=message.namespace.number,
        name=name,
        layout=layout,
        generation=message.generation,
        key=message.key,
        instance=message.namespace.instance,
    )


# -- inside --------------------------------------------------------------------------------


def _known(values: Mapping[int, V], number: int, field: str) -> V:
    if number not in values:
        raise ProtocolError(f"{field}: {number} is not known")
    return values[number]


def _namespace_info_to_wire(info: NamespaceInfo) -> pb.NamespaceInfo:
    return pb.NamespaceInfo(
        number=info.id,
        name=info.name,
        blocks=info.blocks,
        layout=info.layout.encode(),
        generation=info.generation,
    )


def _namespace_info_of(message: pb.NamespaceInfo) -> NamespaceInfo:
    try:
        layout = Layout.decode(message.layout)
    except KVStoreError as error:
        raise ProtocolError(f"the layout of namespace {message.number}: {error}") from None
    return NamespaceInfo(
        id=message.number,
        name=message.name,
        blocks=message.blocks,
        layout=layout,
        generation=message.generation,
    )
