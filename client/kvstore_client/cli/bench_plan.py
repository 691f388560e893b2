"""What `kvstore bench` will do, and whether the store has room for it. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from kvstore import limits
from kvstore.block import header_bytes
from kvstore.commands import Stats
from kvstore.errors import InvalidArgument
from kvstore.layout import Layout
from kvstore.sizes import format_size, parse_size

NAMESPACE = "kvstore-bench"  # one name: a store keeps the names of dropped namespaces
DEFAULT_SIZES = "256KiB,1MiB,4MiB"
DEFAULT_BATCHES = "1,64"
DEFAULT_CLIENTS = "1,4"
MAX_CLIENTS = 64
WORKING_SET_BYTES = 256 << 20  # of all clients together: beyond most caches
_USABLE_SHARE = 0.75  # slabs of several slot sizes leave some of a pool unused
_BLOCK_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One combination. size_bytes: of a block; batch: blocks a call; clients: processes."""

    size_bytes: int
    batch: int
    clients: int

    @property
    def least_bytes(self) -> int:
        """Pool bytes for one batch of every client."""
        return self.clients * self.batch * slot_bytes(self.size_bytes)

    def blocks_per_client(self, free_bytes: int, free_blocks: int) -> int:
        """A multiple of `batch`: the working set, or what of it finds room; at least one batch."""
        nbytes = min(WORKING_SET_BYTES, int(_USABLE_SHARE * free_bytes))
        by_bytes = nbytes // self.least_bytes
        by_blocks = free_blocks // (self.clients * self.batch)
        by_call = limits.MAX_KEYS_PER_CALL // self.batch
        return self.batch * max(1, min(by_bytes, by_blocks, by_call))

    def __str__(self) -> str:
        return (
            f"blocks of {format_size(self.size_bytes)}, {self.batch:,} a call,"
            f" {self.clients} client{'' if self.clients == 1 else 's'}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The combinations to run, and those of the defaults for which there is no room."""

    cases: tuple[Case, ...]
    left_out: tuple[Case, ...]


def slot_bytes(size_bytes: int) -> int:
    """Bytes of the pool that one block of `size_bytes` takes."""
    granules = -(-(size_bytes + header_bytes(1)) // limits.GRANULE_BYTES)
    return granules * limits.GRANULE_BYTES


def layout_of(size_bytes: int) -> Layout:
    """The layout of blocks of that size: bytes without a meaning. Raises `InvalidArgument`."""
    return Layout.opaque(model=NAMESPACE, block_bytes=size_bytes, block_tokens=_BLOCK_TOKENS)


def parse_grid(sizes: str | None, batches: str | None, clients: str | None) -> list[Case]:
    """All combinations of comma-separated values, None for the defaults. `InvalidArgument`."""
    combinations = itertools.product(
        _sizes(sizes or DEFAULT_SIZES),
        _counts("batch", batches or DEFAULT_BATCHES, limits.MAX_KEYS_PER_CALL),
        _counts("clients", clients or DEFAULT_CLIENTS, MAX_CLIENTS),
    )
    return [Case(size_bytes=size, batch=batch, clients=n) for size, batch, n in combinations]


def fit(cases: Sequence[Case], stats: Stats, max_blocks: int, *, force: bool, chosen: bool) -> Grid:
    """The cases for which there is room.

    chosen: the user named the combinations, so one that does not fit is `InvalidArgument`; of
    the defaults it is left out. force: blocks of others may be evicted.
    """
    fitting = [case for case in cases if _fits(case, stats, max_blocks, force=force)]
    left_out = [case for case in cases if case not in fitting]
    if left_out and (chosen or not fitting):
        raise InvalidArgument("size", _no_room(left_out[0], stats, force=force))
    return Grid(cases=tuple(fitting), left_out=tuple(left_out))


def _fits(case: Case, stats: Stats, max_blocks: int, *, force: bool) -> bool:
    taken_bytes, taken_blocks = (0, 0) if force else (stats.used_bytes, stats.blocks)
    room_bytes = _USABLE_SHARE * (stats.total_bytes - taken_bytes)
    blocks = case.batch * case.clients
    return case.least_bytes <= room_bytes and blocks <= max_blocks - taken_blocks


def _no_room(case: Case, stats: Stats, *, force: bool) -> str:
    free = format_size(stats.total_bytes - stats.used_bytes)
    advice = "make it smaller" if force else "make it smaller, or evict others' blocks by --force"
    return (
        f"{case}: {format_size(case.least_bytes)} are over {_USABLE_SHARE:.0%} of the pool's room"
        f" or its most blocks ({format_size(stats.total_bytes)}, {free} free): {advice}"
    )


def _sizes(text: str) -> list[int]:
    try:
        sizes = [parse_size(word) for word in text.split(",")]
    except ValueError as error:
        raise InvalidArgument("size", str(error)) from None
    for size in sizes:
        if not 0 < size <= limits.MAX_BLOCK_BYTES:
            most = format_size(limits.MAX_BLOCK_BYTES)
            raise InvalidArgument("size", f"{size} bytes are no block of at most {most}")
    return sorted(set(sizes))


def _counts(field: str, text: str, most: int) -> list[int]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and 0 < int(word) <= most for word in words):
        raise InvalidArgument(field, f"{text!r} are no numbers from 1 to {most}, with commas")
    return sorted({int(word) for word in words})
