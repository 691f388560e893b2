"""What a user asks of a store, and how it is done over shared memory."""

from typing import TYPE_CHECKING

from kvstore.later import later

if TYPE_CHECKING:
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
else:
    __getattr__ = later(
        __name__,
        {
            "kvstore.session.base": (
                "NOTHING_MATCHED",
                "BlockReport",
                "Hint",
                "Hit",
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
            ),
            "kvstore.session.channel": ("ChannelSession",),
            "kvstore.session.local": ("LocalSession",),
        },
    )

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
