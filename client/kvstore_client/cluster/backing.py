"""What a client's memory for puts and gets is made of: the host's, or a GPU's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Protocol, cast

import numpy as np

from kvstore import commands as c
from kvstore.errors import InvalidArgument, LayoutMismatch
from kvstore.layout import Layout
from kvstore.memory import Arena
from kvstore.session.base import Bytes1D
from kvstore.session.parts import Part
from kvstore.transfer.apart import export
from kvstore.transfer.base import Agent, DeviceBytes
from kvstore.transfer.choose import make_agent
from kvstore.transfer.either import EitherAgent


class DeviceMemory(Protocol):
    """A GPU, for a client that puts blocks from its memory and gets them there: see
    `kvstore_engines.gpu_memory.GpuMemory`."""

    def allocate(self, nbytes: int) -> DeviceBytes:
        """So much of the GPU's memory; it goes with the last reference to what is returned."""

    def checksums(self, addresses: c.U64, cells: c.U64) -> c.U64:
        """XXH3 with 64 bits of cells of blocks that lie in the GPU's memory.

        addresses: (n,), of the blocks. cells: (m, 3), as `Part.cell_words` has them: where a cell
        begins in the block is the second number, how many bytes it has the third. Returns (n, m).
        What was queued on the caller's stream before is done by then. Cells are as `check_cells`
        lets them be.
        """


class Backing(Protocol):
    """Memory that nodes read from and write to, from `address` on."""

    on_device: bool
    address: int

    def show(self, agent: Agent) -> None:
        """Registers it."""

    def block(self, at: int, nbytes: int, *, writable: bool) -> Bytes1D:
        """Some of it, which is a `DeviceBytes` where the memory is a GPU's; that is always
        writable."""

    def sums(self, part: Part, addresses: c.U64) -> c.U64:
        """The checksums of a part's cells, (n, cells), of blocks at addresses (n,)."""

    def close(self) -> None:
        """Gives it back."""


_WORD_BYTES = 8
_LEAST_CELL_BYTES = 241  # up to 240 XXH3 is other functions
MakeBacking = Callable[[int], Backing]


class HostBacking:
    """Memory of the host, which other processes can map."""

    on_device = False

    def __init__(self, nbytes: int) -> None:
        self._memory = Arena.create("landing", nbytes)
        self.address = int(self._memory.array.__array_interface__["data"][0])

    def show(self, agent: Agent) -> None:
        """See `Backing`."""
        export(agent, self._memory.array, self._memory.fd)
        # Taken at once, so that no page is first touched in the middle of a transfer.
        self._memory.populate(threading.Event())

    def block(self, at: int, nbytes: int, *, writable: bool) -> Bytes1D:
        """See `Backing`."""
        found = self._memory.array[at : at + nbytes]
        found.flags.writeable = writable
        return found

    def sums(self, part: Part, addresses: c.U64) -> c.U64:
        """See `Backing`."""
        return part.own_sums(addresses)

    def close(self) -> None:
        """See `Backing`."""
        self._memory.close()


class DeviceBacking:
    """Memory of a GPU, which NIXL reads and writes where it is."""

    on_device = True

    def __init__(self, device: DeviceMemory, nbytes: int) -> None:
        self._device = device
        self._memory: DeviceBytes | None = device.allocate(nbytes)
        self.address = self._memory.address

    def show(self, agent: Agent) -> None:
        """See `Backing`."""
        agent.register(self._own())

    def block(self, at: int, nbytes: int, *, writable: bool) -> Bytes1D:
        """See `Backing`."""
        del writable
        return cast(Bytes1D, self._own().cut(at, nbytes))

    def sums(self, part: Part, addresses: c.U64) -> c.U64:
        """See `Backing`."""
        return self._device.checksums(addresses, part.cell_words)

    def close(self) -> None:
        """See `Backing`."""
        self._memory = None

    def _own(self) -> DeviceBytes:
        assert self._memory, "the memory was given back"
        return self._memory


def agent_of_device(transfer: str, *, over_tcp: bool) -> Agent:
    """The agent of a client whose memory is a GPU's, in this process, since nobody else can have
    that memory. transfer: as nodes have it; `InvalidArgument` unless nixl is of it. over_tcp: see
    `NixlAgent`."""
    if transfer not in ("nixl", "auto"):
        raise InvalidArgument("transfer", f"{transfer!r} does not reach a GPU: use nixl or auto")
    agent = make_agent("nixl", "client", over_tcp=over_tcp)
    return agent if transfer == "nixl" else EitherAgent([agent])


def check_cells(layout: Layout) -> None:
    """`LayoutMismatch` for a layout with cells that a GPU does not hash."""
    sizes = np.diff(layout.cell_bounds)
    if (sizes % _WORD_BYTES).any() or (sizes < _LEAST_CELL_BYTES).any():
        raise LayoutMismatch(
            "layout", "in a GPU's memory, cells have a multiple of 8 bytes, and more than 240"
        )


def addresses_on_device(
    name: str, buffers: Sequence[Bytes1D], n: int, nbytes: int, *, writable: bool
) -> c.U64:
    """What `kvstore.session.addresses.addresses_of` is for arrays, for `DeviceBytes`."""
    del writable
    if len(buffers) != n:
        raise InvalidArgument(name, f"{len(buffers)} buffers for {n} keys")
    found = cast(Sequence[object], buffers)
    blocks = [each for each in found if isinstance(each, DeviceBytes)]
    if len(blocks) < n:
        raise InvalidArgument(name, "must be of this client's buffers, in the GPU's memory")
    if any(block.nbytes != nbytes for block in blocks):
        raise LayoutMismatch(name, f"expected {nbytes} bytes each")
    return np.array([block.address for block in blocks], np.uint64)
