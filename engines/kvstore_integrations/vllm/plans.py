"""What the scheduler's side tells the workers to copy, and hears back: values, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from kvstore import Hint, limits


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Blocks of one cache group that follow each other in a chain.

    position: of the first of them in its chain. hashes: 32 bytes each, one after another. parent:
    the hash before them, empty where they begin the chain. blocks: the engine's numbers for them.
    """

    group: int
    position: int
    hashes: bytes
    blocks: tuple[int, ...]
    parent: bytes = b""

    def cut(self, first: int, end: int) -> Part:
        """Blocks [first, end) of it."""
        key = limits.KEY_BYTES
        return Part(
            group=self.group,
            position=self.position + first,
            hashes=self.hashes[key * first : key * end],
            blocks=self.blocks[first:end],
            parent=self.hashes[key * (first - 1) : key * first] if first else self.parent,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Blocks that a request waits for. space: whose they are."""

    request: str
    space: str
    parts: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    """Blocks of a request that are full once the step's forward pass is over."""

    request: str
    space: str
    parts: tuple[Part, ...]
    ttl_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """A request is over, and what will happen to its blocks; chains: hashes by cache group."""

    space: str
    chains: Mapping[int, bytes]
    hint: Hint


@dataclass(frozen=True, slots=True)
class Plan:
    """What a worker has to do in one step. idle: the step computes nothing."""

    loads: Sequence[Load] = ()
    saves: Sequence[Save] = ()
    ends: Sequence[End] = ()
    idle: bool = False


@dataclass(frozen=True, slots=True)
class Dropped:
    """The saves that found no room in a worker: the position of the first block that is missing,
    by request and cache group."""

    first: Mapping[tuple[str, int], int] = field(default_factory=dict)

    def and_of(self, other: Dropped) -> Dropped:
        """What several workers have dropped."""
        first = dict(self.first)
        for key, position in other.first.items():
            first[key] = min(position, first.get(key, position))
        return Dropped(first)
