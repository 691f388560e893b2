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
    """Pinned memory, its address, and as an array; a copy from it is torch's to look after."""

    def __init__(self, nbytes: int) -> None:
        self.memory = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        self.nbytes, self.address, self.array = nbytes, self.memory.data_ptr(), self.memory.numpy()


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

    def __init__(self, runs: torch.Tensor, ahead: PinnedAhead, *, known: bool) -> None:
        """runs: (blocks, runs per block), contiguous, on the CPU or the GPU. known: that they
        exist, or that nobody asks."""
        self.given = self.runs = runs
        self.blocks, per_block = runs.shape
        self.known = known
        self._row_bytes = per_block * runs.element_size()
        self._ahead = ahead
        self._pinned: _Pinned | None = None
        self._address = runs.data_ptr()

    def behind(self, done: int) -> RunNumbers:
        """Without the first ones."""
        return RunNumbers(self.runs[done:], self._ahead, known=self.known)

    def pinned(self) -> _Pinned:
        """Of numbers on the CPU, the copy that kernels can read across the link."""
        if self._pinned is None:
            nbytes = self.blocks * self._row_bytes
            self._pinned = self._ahead.take(nbytes)
            ctypes.memmove(self._pinned.address, self._address, nbytes)
            self._address = self._pinned.address
        return self._pinned

    def largest(self) -> int:
        """Of numbers on the CPU; those below 0 count as larger than all others."""
        numbers = self.pinned().array[: self.blocks * self._row_bytes]
        return int(_largest(numbers.view(UNSIGNED[self.given.dtype])))

    def bring(self, lane: torch.cuda.Stream, *, reading: torch.cuda.Stream) -> None:
        """Copies them to the GPU, on that lane. reading: of the kernels that read them."""
        if self.runs.is_cpu:
            numbers = self.pinned().memory[: self.blocks * self._row_bytes].view(self.runs.dtype)
            with torch.cuda.stream(lane):
                self.runs = numbers.view(self.runs.shape).to(lane.device, non_blocking=True)
            self._address = self.runs.data_ptr()
        self.runs.record_stream(reading)

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

    def behind(self, done: int) -> HostRows:
        """Without the first ones."""
        if self.offsets is None:
            return HostRows(self.host[done:], None, self.nbytes)
        return HostRows(self.host, self.offsets[done:], self.nbytes)

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
