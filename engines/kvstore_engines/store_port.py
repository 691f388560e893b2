"""What the engine needs of a block store; adapters and fakes implement it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class GetResult:
    """What a get filled: the first `n_hit` destinations, and the slowest tier that served them."""

    n_hit: int
    tier: str | None


MISS = GetResult(0, None)


class BlockStore(Protocol):
    """Blocks of KV cache found by the hash of the whole prefix that ends in them.

    A block here is what one engine process keeps of it: all its bytes, or one rank's cells.
    """

    def chain(self, token_ids: Sequence[int], parent: bytes = b"") -> NDArray[np.uint8]:
        """Hashes of the full blocks of `token_ids`, (n, 32) uint8; a partial tail has none.

        parent: the hash of the block before `token_ids`, empty at the beginning of a sequence.
        """

    def get_into(
        self, hashes: NDArray[np.uint8], destinations: Sequence[NDArray[np.uint8]]
    ) -> GetResult:
        """Fill destinations (1-D uint8, one block each) with the leading blocks that are held.

        Once it returns or raises, nothing may write to the destinations any more: the engine
        computes the missing blocks into the same memory.
        """

    def put(
        self,
        hashes: NDArray[np.uint8],
        sources: Sequence[NDArray[np.uint8]],
        *,
        put_id: bytes,
        parent: bytes = b"",
        position: int = 0,
    ) -> int:
        """Store the blocks; how many of them now hold these bytes. The sources are only read.

        put_id: 16 bytes, the same on all ranks that write parts of these blocks. parent: the
        hash of the block before the first, empty for none. position: the first one's index in
        its chain.
        """


@runtime_checkable
class EndsSessions(Protocol):
    """A store that can be told that nobody will come back for some blocks."""

    def hint_session_ends(self, hashes: NDArray[np.uint8]) -> None:
        """`hashes`, (n, 32) uint8, n >= 1: the blocks of a session that has ended."""
