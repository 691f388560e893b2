"""The store: one synchronous, deterministic class that decides everything on one host."""

from kvstore.store.memory import StoreMemory
from kvstore.store.nvme import NvmePolicy
from kvstore.store.puts import GrantedBlocks
from kvstore.store.store import Store, failed
from kvstore.store.tickets import Deferred

__all__ = ["Deferred", "GrantedBlocks", "NvmePolicy", "Store", "StoreMemory", "failed"]
