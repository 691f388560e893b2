"""Tensor parallelism as the engine sees it: which heads are mine, and how ranks agree.

Every rank runs the same requests in the same order and makes the same collective calls.
"""

import itertools
from typing import Protocol

import torch

from kvstore.errors import InvalidArgument


class Parallel(Protocol):
    """One rank among `size`; each collective call is made by all of them."""

    @property
    def rank(self) -> int:
        """0 <= rank < size."""

    @property
    def size(self) -> int:
        """How many ranks there are."""

    def kv_heads(self, total: int) -> range:
        """This rank's share of `total` key/value heads; InvalidArgument if the split misfits."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, of x's shape and dtype, the same bits on every rank.

        x may be overwritten.
        """

    def broadcast_bytes(self, data: bytes) -> bytes:
        """Rank 0's `data`; it must have the same length everywhere."""

    def agree_min(self, value: int) -> int:
        """The least of all ranks' values."""


class SingleRank:
    """All heads in one process: nothing to agree on."""

    rank = 0
    size = 1

    def kv_heads(self, total: int) -> range:
        """See `Parallel.kv_heads`."""
        return range(total)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """See `Parallel.all_reduce`."""
        return x

    def broadcast_bytes(self, data: bytes) -> bytes:
        """See `Parallel.broadcast_bytes`."""
        return data

    def agree_min(self, value: int) -> int:
        """See `Parallel.agree_min`."""
        return value


def share_of_heads(split: tuple[int, ...], rank: int, total: int) -> range:
    """The heads of `rank` where rank i holds `split[i]` of `total`, neighbours together.

    Raises InvalidArgument unless every rank has a head and the split adds up.
    """
    if not split or min(split) < 1:
        raise InvalidArgument("split", f"{split} leaves a rank without a head")
    if sum(split) != total:
        raise InvalidArgument("split", f"{split} does not add up to the model's {total} heads")
    ends = list(itertools.accumulate(split))
    return range(ends[rank] - split[rank], ends[rank])


def even_share(total: int, rank: int, size: int) -> range:
    """A contiguous share of `total` that differs by at most one among ranks."""
    return range(total * rank // size, total * (rank + 1) // size)
