"""kvstore: a tiered store for the KV cache of LLM inference."""

from kvstore.__about__ import __version__
from kvstore.embedded import KVStore
from kvstore.keys import HashScheme, hash_chain
from kvstore.layout import Attention, Layout
from kvstore.session import Hit, Miss, NamespaceHandle, PutResult, View

__all__ = [
    "Attention",
    "HashScheme",
    "Hit",
    "KVStore",
    "Layout",
    "Miss",
    "NamespaceHandle",
    "PutResult",
    "View",
    "__version__",
    "hash_chain",
]
