"""Which blocks go when a tier is full."""

from kvstore.eviction.base import EvictionPolicy, make_policy

__all__ = ["EvictionPolicy", "make_policy"]
