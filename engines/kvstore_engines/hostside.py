"""The bytes of pages as a store on the host takes and gives them: 1-D uint8 rows, a page each."""

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

Row: TypeAlias = NDArray[np.uint8]


class HostViews:
    """Pages that are in host memory: (pages, bytes) uint8 on the CPU. Nothing is copied."""

    def __init__(self, pages: torch.Tensor) -> None:
        self._pages: Row = pages.numpy()

    def rows_to_fill(self, pages: Sequence[int]) -> list[Row]:
        """See `PagePool.rows_to_fill`."""
        return self.rows_of(pages)

    def filled(self, pages: Sequence[int]) -> None:
        """See `PagePool.filled`."""

    def rows_of(self, pages: Sequence[int]) -> list[Row]:
        """See `PagePool.rows_of`."""
        return [self._pages[page] for page in pages]


class StagedRows:
    """Pages in a GPU's memory, (pages, bytes) uint8, and pinned host memory that they pass through.

    A page is a block of the store already, so what is left to do is one gather and one copy.
    """

    def __init__(self, pages: torch.Tensor) -> None:
        self._pages = pages
        self._host = self._pinned(0)

    def rows_to_fill(self, pages: Sequence[int]) -> list[Row]:
        """See `PagePool.rows_to_fill`."""
        self._make_room(len(pages))
        return list(self._host[: len(pages)].numpy())

    def filled(self, pages: Sequence[int]) -> None:
        """See `PagePool.filled`; the pages are written in the current stream's order."""
        arrived = self._host[: len(pages)].to(self._pages.device, non_blocking=True)
        self._pages.index_copy_(0, self._numbers(pages), arrived)
        torch.cuda.current_stream(self._pages.device).synchronize()  # the rows may be used again

    def rows_of(self, pages: Sequence[int]) -> list[Row]:
        """See `PagePool.rows_of`; waits for what the current stream writes to the pages."""
        self._make_room(len(pages))
        rows = self._host[: len(pages)]
        rows.copy_(self._pages.index_select(0, self._numbers(pages)))
        return list(rows.numpy())

    def _numbers(self, pages: Sequence[int]) -> torch.Tensor:
        return torch.tensor(pages, dtype=torch.int64, device=self._pages.device)

    def _make_room(self, rows: int) -> None:
        if rows > len(self._host):
            self._host = self._pinned(max(rows, 2 * len(self._host)))

    def _pinned(self, rows: int) -> torch.Tensor:
        return torch.empty((rows, self._pages.shape[1]), dtype=torch.uint8, pin_memory=True)
