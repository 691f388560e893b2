"""Arrays of blocks that a user holds for a while."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np

from kvstore.errors import InvalidArgument
from kvstore.session.base import Bytes1D


class HeldBlocks:
    """Implements `View`; who holds something in a store for the arrays derives from this."""

    def __init__(self, blocks: list[Bytes1D]) -> None:
        self.blocks = blocks

    def release(self) -> None:
        """See `View.release`."""
        self.blocks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.release()


def own_buffers(n: int, nbytes: int) -> HeldBlocks:
    """See `Session.buffers`, where any memory is as good."""
    check_buffers(n, nbytes)
    return HeldBlocks(list(np.empty((n, nbytes), np.uint8)))


def check_buffers(n: int, nbytes: int) -> None:
    """`InvalidArgument` for none."""
    if n < 1 or nbytes < 1:
        raise InvalidArgument("nbytes", "one array of one byte at least, please")
