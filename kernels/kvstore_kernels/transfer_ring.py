"""What of a transfer happens when: buffers in turns, and what waits for what.

It knows of streams only what streams promise (`Lane`, `Mark`), and is tested without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from kvstore_kernels.cuda_runtime import Numbers

GROWTH = 4  # of turns, whose copies thus take longer than the host to give the next


class Mark(Protocol):
    """A moment in a lane's work; a torch.cuda.Event is one."""

    def query(self) -> bool:
        """Whether the moment is past."""

    def synchronize(self) -> None:
        """Returns when it is."""


class Lane(Protocol):
    """Work that is done in the order in which it is given; a torch.cuda.Stream is one."""

    def wait_event(self, event: Any) -> None:
        """What is given from now on begins after that mark, of any lane."""

    def record_event(self) -> Any:
        """The mark behind all that was given so far."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One use of a buffer: blocks [first, end) of a transfer pass through it.

    number: of the turn among all of its ring.
    """

    number: int
    buffer: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class Passed:
    """When all blocks before `end` have been read where they were, and are where they go."""

    end: int
    read: Mark
    arrived: Mark


class Ring:
    """Whose turn it is among some buffers, and from when on each may be filled again.

    Transfers follow each other through it; one begins while the last is still under way.
    """

    def __init__(self, buffers: int) -> None:
        """buffers: at least 1; with 1 nothing overlaps."""
        self._free: list[Mark | None] = [None] * buffers
        self._turns = 0

    def turns(self, sizes: Iterable[int]) -> Iterable[Turn]:
        """The turns of the next transfer, of so many blocks each."""
        first = 0
        for size in sizes:
            number, self._turns = self._turns, self._turns + 1
            yield Turn(number, number % len(self._free), first, first + size)
            first += size

    def free(self, buffer: int) -> Mark | None:
        """The moment from which on it may be filled; None for now."""
        return self._free[buffer]

    def free_from(self, buffer: int, mark: Mark) -> None:
        """Says when what is now put into it will have been taken out."""
        self._free[buffer] = mark


def turn_sizes(blocks: int, room: int, small: int, growth: int = GROWTH) -> list[int]:
    """Of turns, of which the first has at most `small` blocks, the next ones up to `growth` times
    as many each until there is no room for more; the last has what is left."""
    sizes, size = [], min(small, room)
    while blocks:
        sizes.append(min(size, blocks))
        blocks -= sizes[-1]
        size = min(growth * size, room)
    return sizes


def pass_through(
    ring: Ring,
    turns: Iterable[Turn],
    *,
    filling: Lane,
    draining: Lane,
    fill: Callable[[Turn], None],
    drain: Callable[[Turn], None],
) -> list[Passed]:
    """Gives lanes the work of all turns, and waits for none of it.

    fill gives the filling lane what puts a turn's blocks into its buffer, drain gives the draining
    lane what takes them out. Raises what they raise; even then no later transfer fills a buffer
    before it is free.
    """
    passed = []
    for turn in turns:
        free = ring.free(turn.buffer)
        if free is not None:
            filling.wait_event(free)
        fill(turn)
        filled = filling.record_event()
        draining.wait_event(filled)
        try:
            drain(turn)
        finally:
            drained = draining.record_event()
            ring.free_from(turn.buffer, drained)
        passed.append(Passed(turn.end, filled, drained))
    return passed


def copies_of(there: Numbers, here: Numbers, nbytes: int) -> tuple[Numbers, Numbers, Numbers]:
    """The copies that move rows: their addresses on either side, and their sizes, (n,) each.

    there, here: (rows,) int64 addresses, at least one. Rows of `nbytes` that follow each other
    closely on both sides are one copy.
    """
    dense = (np.diff(there) == nbytes) & (np.diff(here) == nbytes)
    firsts = np.concatenate([[0], np.flatnonzero(~dense) + 1])
    counts = np.diff(np.append(firsts, len(there)))
    return there[firsts], here[firsts], counts * nbytes


class Transfer:
    """Blocks under way, in their order. It holds on to the memory that they need."""

    def __init__(self, passed: Sequence[Passed], keeps: object) -> None:
        self._passed, self._keeps = passed, keeps
        self._through = 0  # turns that are known to be

    @property
    def blocks(self) -> int:
        """How many they are."""
        return self._passed[-1].end if self._passed else 0

    def arrived(self) -> int:
        """How many leading blocks are safe to read where they go, without waiting."""
        while self._through < len(self._passed) and self._passed[self._through].arrived.query():
            self._through += 1
        return self._passed[self._through - 1].end if self._through else 0

    def wait(self, blocks: int | None = None) -> None:
        """Returns when so many leading blocks (None: all) are safe to read where they go."""
        wanted = self.blocks if blocks is None else blocks
        turns = sum(passed.end < wanted for passed in self._passed) + 1 if wanted else 0
        for passed in self._passed[:turns][-1:]:
            passed.arrived.synchronize()

    def wait_source(self) -> None:
        """Returns when all blocks have been read, so that their source may be written again."""
        for passed in self._passed[-1:]:
            passed.read.synchronize()

    def follow(self, lane: Lane) -> None:
        """What the lane is given from now on begins when all blocks are where they go."""
        for passed in self._passed[-1:]:
            lane.wait_event(passed.arrived)

    def follow_source(self, lane: Lane) -> None:
        """What the lane is given from now on begins when all blocks have been read."""
        for passed in self._passed[-1:]:
            lane.wait_event(passed.read)
