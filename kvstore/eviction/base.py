"""What an eviction policy is, and the policies by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from kvstore.errors import InvalidArgument
from kvstore.eviction.arc import Arc
from kvstore.eviction.lru import Lru
from kvstore.eviction.order import Evictable, IdArray, U64Array
from kvstore.eviction.s3fifo import S3Fifo


class EvictionPolicy(Protocol):
    """Says which blocks go first. Ids are slots of the index: uint32, below `max_blocks`.

    Batches come in chain order, head first; a policy ages a chain's tail before its head, since
    a tail without its head is never found. Ids that a policy does not hold are ignored by
    `touch`, `demote` and `forget`. Not thread-safe; every call modifies only the policy.
    """

    def admit(self, ids: IdArray, fingerprints: U64Array) -> None:
        """New blocks (uint32 [n]) with fingerprints of their keys (uint64 [n])."""

    def touch(self, ids: IdArray) -> None:
        """Blocks were read (uint32 [n])."""

    def demote(self, ids: IdArray) -> None:
        """Their session ended (uint32 [n]): evict them first, unless they are read again."""

    def forget(self, ids: IdArray) -> None:
        """Blocks are gone for another reason (uint32 [n])."""

    def victims(self, n: int, evictable: Evictable) -> IdArray:
        """Up to `n` coldest ids (uint32 [<=n]) for which `evictable` holds, removed from here.

        `evictable` takes candidates in the order in which they would go; it may count on it that
        the first of those for which it holds go, and no other.

        Looks at 8 * n + 1024 entries at most; those skipped stay, behind the others.
        """

    def spare(self, ids: IdArray) -> None:
        """Victims (uint32 [n], coldest first) stay after all, and go before all others."""

    def __len__(self) -> int: ...

    def check(self) -> None:
        """AssertionError unless the invariants hold."""


_POLICIES: dict[str, Callable[[int], EvictionPolicy]] = {"lru": Lru, "s3fifo": S3Fifo, "arc": Arc}


def make_policy(name: str, max_blocks: int) -> EvictionPolicy:
    """The policy `name` for ids below `max_blocks`. InvalidArgument for an unknown name."""
    if name not in _POLICIES:
        known = ", ".join(sorted(_POLICIES))
        raise InvalidArgument("policy", f"unknown eviction policy {name!r}; known: {known}")
    if max_blocks <= 0:
        raise InvalidArgument("max_blocks", f"must be positive, got {max_blocks}")
    return _POLICIES[name](max_blocks)
