"""What the engine needs of a block store; adapters and fakes implement it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GetResult:
    """What a get filled: the first `n_hit` destinations, and the slowest tier that served them."""

    n_hit: int
    tier: str | None


class BlockStore(Protocol):
    """Blocks of KV cache found by the hash of the whole prefix that ends in them."""

    def chain(self, token_ids: Sequence[int]) -> NDArray[np.uint8]:
        """Hashes of the full blocks of `token_ids`, (n, 32) uint8; a partial tail has none."""

    def get_into(
        self, hashes: NDArray[np.uint8], destinations: Sequence[NDArray[np.uint8]]
    ) -> GetResult:
        """Fill destinations (1-D uint8, one block each) with the leading blocks that are held.

        Once it returns or raises, nothing may write to the destinations any more: the engine
        computes the missing blocks into the same memory.
        """

    def put(self, hashes: NDArray[np.uint8], sources: Sequence[NDArray[np.uint8]]) -> int:
        """Store the blocks and say how many were stored; the sources are only read meanwhile."""
