"""What a user asks of a store, and how it is done over shared memory."""

from kvstore.session.base import (
    NOTHING_MATCHED,
    BlockReport,
    Hint,
    Hit,
    Matched,
    Miss,
    MissReason,
    NamespaceHandle,
    NamespaceInfo,
    PutResult,
    Session,
    StoreInfo,
    Tier,
    View,
)
from kvstore.session.channel import ChannelSession
from kvstore.session.local import LocalSession

__all__ = [
    "NOTHING_MATCHED",
    "BlockReport",
    "ChannelSession",
    "Hint",
    "Hit",
    "LocalSession",
    "Matched",
    "Miss",
    "MissReason",
    "NamespaceHandle",
    "NamespaceInfo",
    "PutResult",
    "Session",
    "StoreInfo",
    "Tier",
    "View",
]
