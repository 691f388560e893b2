"""The store: one synchronous, deterministic class that decides everything on one host."""

from typing import TYPE_CHECKING

from kvstore.later import later

if TYPE_CHECKING:
    from kvstore.store.memory import StoreMemory
    from kvstore.store.nvme import NvmePolicy
    from kvstore.store.puts import GrantedBlocks
    from kvstore.store.store import Store, failed
    from kvstore.store.tickets import Deferred
else:
    __getattr__ = later(
        __name__,
        {
            "kvstore.store.memory": ("StoreMemory",),
            "kvstore.store.nvme": ("NvmePolicy",),
            "kvstore.store.puts": ("GrantedBlocks",),
            "kvstore.store.store": (
                "Store",
                "failed",
            ),
            "kvstore.store.tickets": ("Deferred",),
        },
    )

__all__ = ["Deferred", "GrantedBlocks", "NvmePolicy", "Store", "StoreMemory", "failed"]
