"""What a transfer is told: the numbers of its runs, and its rows on the host, as addresses."""

from __future__ import annotations

import ctypes
import functools

import numpy as np
import torch

from kvstore_kernels.cuda_runtime import Numbers

UNSIGNED = {torch.int32: np.uint32, torch.int64: np.uint64}
_largest = np.maximum.reduce  # `max` is a third slower


class _Pinned:
    """Pinned memory and its address."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.nbytes, self.address = nbytes, self.memory.data_ptr()


class PinnedAhead:
    """Pinned memory that is there before it is needed: to get it takes longer than to fill it."""

    def __init__(self) -> None:
        self._next: _Pinned | None = None
        self._nbytes = 4096

    def take(self, nbytes: int) -> _Pinned:
        """At least as many."""
        taken, self._next = self._next, None
        if taken is None or taken.nbytes < nbytes:
            self._nbytes = max(nbytes, self._nbytes)
            taken = _Pinned(self._nbytes)
        return taken

    def refill(self) -> None:
        """For the next time."""
        if self._next is None:
            self._next = _Pinned(self._nbytes)


class RunNumbers:
    """The numbers of a transfer's runs, and where kernels read them."""

    def __init__(self, runs: torch.Tensor, ahead: PinnedAhead) -> None:
        """runs: (blocks, runs per block), contiguous, on the CPU or the GPU."""
        self.given = runs
        self.blocks, per_block = runs.shape
        self._row_bytes = per_block * runs.element_size()
        self.nbytes = self.blocks * self._row_bytes
        self._ahead = ahead
        self._address = runs.data_ptr()

    @functools.cached_property
    def pinned(self) -> _Pinned:
        """Of numbers on the CPU, a copy that the caller does not have, and kernels can read."""
        pinned = self._ahead.take(self.nbytes)
        ctypes.memmove(pinned.address, self.given.data_ptr(), self.nbytes)
        return pinned

    def largest(self) -> int:
        """Of numbers on the CPU; those below 0 count as larger than all others."""
        numbers = self.given.numpy().view(UNSIGNED[self.given.dtype])
        return int(_largest(numbers, axis=None))

    def are_at(self, address: int) -> None:
        """Says where kernels find them from now on."""
        self._address = address

    def address(self, block: int) -> int:
        """Of a block's numbers."""
        return self._address + block * self._row_bytes


class HostRows:
    """Where rows are on the host."""

    def __init__(self, host: torch.Tensor, offsets: torch.Tensor | None, nbytes: int) -> None:
        """nbytes: of each row. The others as for `Transfers.to_host`.

        dense: whether each row begins where the one before it ends.
        """
        self.host, self.offsets, self.nbytes = host, offsets, nbytes
        self._origin, self._distance = host.data_ptr(), host.stride(0)
        if offsets is None:
            self.dense = self._distance == nbytes or len(host) == 1
        else:
            self.dense = bool((np.diff(offsets.numpy()) == nbytes).all())

    def start(self, row: int) -> int:
        """Where one begins."""
        offset = row * self._distance if self.offsets is None else int(self.offsets[row])
        return self._origin + offset

    @functools.cached_property
    def starts(self) -> Numbers:
        """Where each begins, (rows,)."""
        if self.offsets is None:
            return self._origin + np.arange(len(self.host), dtype=np.int64) * self._distance
        return self._origin + self.offsets.numpy()
