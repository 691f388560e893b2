"""What a store decides over. Whoever makes it shares it with the store's clients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvstore.index.boards import Boards


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreMemory:
    """The memory of one trust domain.

    pool: uint8, a multiple of a granule. generations: uint64, one a granule. new_index: makes
    zeroed memory (uint8) of so many bytes for the next index; the one before will soon be retired,
    and readers ask for the new one. Where it raises OSError, the one before stays in use. boards:
    where clients that write slots post blocks, None where there are no such clients.
    """

    pool: npt.NDArray[np.uint8]
    generations: npt.NDArray[np.uint64]
    new_index: Callable[[int], npt.NDArray[np.uint8]]
    boards: Boards | None = None
