"""Arrays for blocks that are the caller's own."""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np

from kvstore.errors import InvalidArgument
from kvstore.session.base import Bytes1D


class OwnBlocks:
    """Arrays that are the holder's own; implements `View`."""

    def __init__(self, blocks: list[Bytes1D]) -> None:
        self.blocks = blocks

    def release(self) -> None:
        """Lets go of the copies."""
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


def own_buffers(n: int, nbytes: int) -> OwnBlocks:
    """See `Session.buffers`, where any memory is as good."""
    check_buffers(n, nbytes)
    return OwnBlocks(list(np.empty((n, nbytes), np.uint8)))


def check_buffers(n: int, nbytes: int) -> None:
    """`InvalidArgument` for none."""
    if n < 1 or nbytes < 1:
        raise InvalidArgument("nbytes", "one array of one byte at least, please")
