"""The store: one synchronous, deterministic class that decides everything on one host."""

from kvstore.store.memory import StoreMemory
from kvstore.store.puts import GrantedBlocks
from kvstore.store.store import Store, failed

__all__ = ["GrantedBlocks", "Store", "StoreMemory", "failed"]
