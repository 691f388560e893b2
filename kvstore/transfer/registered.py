"""Memory that an agent has registered: what lies in it, and where; and pieces, fewer and larger."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from kvstore import limits
from kvstore.errors import InvalidArgument, ResourceExhausted
from kvstore.transfer.base import HOST, U64, DeviceBytes, Memory, Pieces

_PORTION_BYTES = 2 << 20
_LAST_BYTES = 1 << 20
_WORTH_CUTTING = 4 << 20


class Region(NamedTuple):
    """A range of addresses. device: the GPU whose memory it is, or `HOST`."""

    address: int
    nbytes: int
    device: int = HOST


class Regions:
    """Ranges of addresses that do not overlap. A GPU's addresses are none of the host's."""

    def __init__(self, ranges: Iterable[Region]) -> None:
        """`InvalidArgument` where they overlap."""
        self.ranges = sorted(ranges)
        table = np.array([each[:2] for each in self.ranges], np.uint64).reshape(-1, 2)
        self._starts, self._ends = table[:, 0].copy(), table[:, 0] + table[:, 1]
        self._devices = np.array([each.device for each in self.ranges], np.int64)
        devices = {each.device for each in self.ranges}
        self._only = devices.pop() if len(devices) == 1 else None
        if (self._starts[1:] < self._ends[:-1]).any() or (self._ends < self._starts).any():
            raise InvalidArgument("memory", "overlaps with registered memory")

    def find(self, addresses: U64, nbytes: U64) -> U64 | None:
        """In which region each piece lies; None unless each lies within one."""
        # Here, since a passive side in a process of its own finds nothing and needs no Numba.
        from kvstore.transfer.finding import find

        found = np.empty(len(addresses), np.uint64)
        return found if find(self._starts, self._ends, addresses, nbytes, found) else None

    def device_of(self, found: U64) -> int | None:
        """The GPU in whose memory regions that `find` named lie, or `HOST`; None for several."""
        if self._only is not None:
            return self._only if len(found) else None
        devices = self._devices[found.astype(np.intp)]
        return int(devices[0]) if len(devices) and (devices == devices[0]).all() else None


class Registered:
    """The memories of one agent, by address. devices: whether GPUs' are among them. Not locked."""

    def __init__(self, *, devices: bool = False) -> None:
        self._devices = devices
        self._memories: list[Memory] = []
        self.regions = Regions(())

    def add(self, memory: Memory) -> None:
        """Keeps the memory; `InvalidArgument`, `ResourceExhausted`."""
        region = self._region(memory)
        if len(self._memories) == limits.MAX_AGENT_REGIONS:
            message = f"an agent registers at most {limits.MAX_AGENT_REGIONS} memories"
            raise ResourceExhausted(message, retry_after_ms=limits.RETRY_AFTER_MS)
        self.regions = Regions([*self.regions.ranges, region])
        self._memories.append(memory)
        self._memories.sort(key=lambda each: self._region(each).address)

    def _region(self, memory: Memory) -> Region:
        if isinstance(memory, DeviceBytes):
            if not self._devices:
                raise InvalidArgument("memory", "is a GPU's, which nixl alone reaches")
            if memory.nbytes < 1 or memory.device < 0:
                raise InvalidArgument("memory", "must be a GPU's, and not empty")
            return Region(memory.address, memory.nbytes, memory.device)
        if memory.dtype != np.uint8 or memory.ndim != 1 or not memory.flags.c_contiguous:
            raise InvalidArgument("memory", "must be uint8, 1-D and contiguous")
        if not memory.nbytes or not memory.flags.writeable:
            raise InvalidArgument("memory", "must be writable, and not empty")
        return Region(memory.ctypes.data, memory.nbytes)

    def views(self, addresses: U64, nbytes: U64) -> list[memoryview] | None:
        """The pieces' bytes themselves, on the host; None unless all of them are registered."""
        found = self.regions.find(addresses, nbytes)
        if found is None:
            return None
        views = []
        for which, address, size in zip(
            found.tolist(), addresses.tolist(), nbytes.tolist(), strict=True
        ):
            memory, offset = self._memories[which], address - self.regions.ranges[which].address
            assert isinstance(memory, np.ndarray), "a GPU's memory has no bytes here"
            views.append(memory[offset : offset + size].data)
        return views


def checked(pieces: Pieces) -> Pieces:
    """The pieces, less empty ones; `InvalidArgument` for anything but arrays (n,) of uint64."""
    columns = (pieces.local, pieces.remote, pieces.nbytes)
    for name, column in zip(("local", "remote", "nbytes"), columns, strict=True):
        if column.dtype != np.uint64 or column.shape != (len(pieces.local),):
            raise InvalidArgument(f"pieces.{name}", "must be uint64, (n,), as long as the others")
    some = pieces.nbytes != 0
    return pieces if some.all() else Pieces(*(column[some] for column in columns))


def merged(pieces: Pieces) -> Pieces:
    """The same bytes in fewer pieces: neighbours on both sides become one."""
    if len(pieces.nbytes) < 2:
        return pieces
    begins = np.ones(len(pieces.nbytes), np.bool_)
    begins[1:] = (pieces.local[:-1] + pieces.nbytes[:-1] != pieces.local[1:]) | (
        pieces.remote[:-1] + pieces.nbytes[:-1] != pieces.remote[1:]
    )
    firsts = np.flatnonzero(begins)
    if len(firsts) == len(begins):
        return pieces
    return Pieces(
        pieces.local[firsts], pieces.remote[firsts], np.add.reduceat(pieces.nbytes, firsts)
    )


def portions(nbytes: U64) -> list[int]:
    """Where to cut pieces of these sizes, so that work on the first ones can go on beside the
    transfer of the others: the end of each portion, ascending. The last one is a small one, since
    nothing is beside the work on that."""
    ends = np.cumsum(nbytes)
    total = int(ends[-1])
    if total < _WORTH_CUTTING:
        return [len(nbytes)]
    marks = [*range(_PORTION_BYTES, total - _LAST_BYTES, _PORTION_BYTES), total - _LAST_BYTES]
    cuts = np.searchsorted(ends, np.array(marks, np.uint64), "right")
    return sorted({*cuts.tolist(), len(nbytes)} - {0})
