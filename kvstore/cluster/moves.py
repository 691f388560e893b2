"""Which blocks are on their way into a node's store or out of it, so that a drop can wait for them:
a copy that arrives behind it would bring back what was dropped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from kvstore import commands as c
from kvstore.cluster.world import World

_LOOK_MS = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class Move:
    """Blocks of one namespace that are on their way together."""

    mark: tuple[str, str]
    hashes: c.U8


class Moves:
    """Blocks that are held for others, or taken in, at present."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._moves: dict[Move, None] = {}

    @contextmanager
    def of(self, mark: tuple[str, str], hashes: c.U8) -> Iterator[None]:
        """These blocks (n, 32) of a namespace are on their way meanwhile."""
        move = Move(mark, hashes)
        self._moves[move] = None
        try:
            yield
        finally:
            del self._moves[move]

    def under_way(self, mark: tuple[str, str], hashes: c.U8) -> list[Move]:
        """Those that some of these blocks are part of."""
        wanted = _words(hashes)
        return [
            move
            for move in self._moves
            if move.mark == mark and np.isin(_words(move.hashes), wanted).any()
        ]

    async def over(self, moves: list[Move], timeout_ms: float) -> bool:
        """Waits until they have ended; False where that takes longer."""
        left, end_ms = moves, self._world.now_ms() + timeout_ms
        while left := [move for move in left if move in self._moves]:
            if self._world.now_ms() >= end_ms:
                return False
            await self._world.sleep(_LOOK_MS)
        return True


def _words(hashes: c.U8) -> c.U64:
    """A part of each key: others that are the same in it cost a wait, and no more."""
    return np.ascontiguousarray(hashes[:, :8]).view(np.uint64)[:, 0]
