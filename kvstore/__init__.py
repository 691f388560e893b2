"""kvstore: a tiered store for the KV cache of LLM inference."""

from typing import TYPE_CHECKING

from kvstore.__about__ import __version__
from kvstore.later import later

if TYPE_CHECKING:
    from kvstore.commands import ExplainStatus, HintKind
    from kvstore.embedded import KVStore
    from kvstore.keys import HashScheme, hash_chain
    from kvstore.layout import Attention, Layout
    from kvstore.session import (
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
else:
    __getattr__ = later(
        __name__,
        {
            "kvstore.commands": (
                "ExplainStatus",
                "HintKind",
            ),
            "kvstore.embedded": ("KVStore",),
            "kvstore.keys": (
                "HashScheme",
                "hash_chain",
            ),
            "kvstore.layout": (
                "Attention",
                "Layout",
            ),
            "kvstore.session": (
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
        },
    )

__all__ = [
    "Attention",
    "BlockReport",
    "ExplainStatus",
    "HashScheme",
    "Hint",
    "HintKind",
    "Hit",
    "KVStore",
    "Layout",
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
    "__version__",
    "hash_chain",
]
