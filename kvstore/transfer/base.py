"""What moves blocks between hosts: agents, each other's memory, reads and writes in pieces.

One side is passive: it registers memory and hands its agent's description over the control channel.
The other side connects to that description, and reads and writes. A server is always the active
side towards a client, and a replica towards the node it pulls from; so nobody can write to a
server's pool, and a client's landing ring is written by the servers it asked alone.

All calls block and may be made from several threads; they belong on worker threads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore.errors import InvalidArgument, KVStoreError

Bytes1D = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
HOST = -1  # in place of a GPU's number
# Told how many leading pieces have arrived, more each time.
Arrived = Callable[[int], None]


class TransferFailed(KVStoreError):  # noqa: N818 - it did
    """Raised when bytes did not arrive: the other side is gone, or refused. What has arrived of
    them means nothing; whether more may yet arrive is said by `Remote.close` alone."""

    code = 11


@dataclass(frozen=True, slots=True, eq=False)
class DeviceBytes:
    """Bytes in a GPU's memory, 1-D: what an array of uint8 is on the host.

    address: as a pointer of CUDA. device: the GPU's number, as CUDA counts in this process. owner:
    what keeps the memory. Whoever speaks CUDA's array interface (torch, CuPy, Numba) takes it as
    an array without a copy, as `torch.as_tensor(block, device=f"cuda:{block.device}")` does.
    """

    address: int
    nbytes: int
    device: int
    owner: object

    def cut(self, at: int, nbytes: int) -> DeviceBytes:
        """Some of it; `InvalidArgument` for what lies outside."""
        if not 0 <= at <= at + nbytes <= self.nbytes:
            raise InvalidArgument("at", f"{nbytes} bytes at {at} of {self.nbytes}")
        return DeviceBytes(self.address + at, nbytes, self.device, self.owner)

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        """Version 3 of that interface; writable."""
        data = (self.address, False)
        return {"shape": (self.nbytes,), "typestr": "|u1", "data": data, "version": 3}


Memory = Bytes1D | DeviceBytes


@dataclass(frozen=True, slots=True, eq=False)
class Pieces:
    """What goes where, in bytes: three arrays (n,) uint64 of equal length.

    local and remote are addresses in the two processes; neighbours are best merged before. On each
    side all lie in the host's memory, or all in that of one GPU.
    """

    local: U64
    remote: U64
    nbytes: U64

    def rows(self, first: int, end: int) -> Pieces:
        """Some of them."""
        return Pieces(self.local[first:end], self.remote[first:end], self.nbytes[first:end])

    @property
    def total(self) -> int:
        """All bytes."""
        return int(self.nbytes.sum())


class Remote(Protocol):
    """The registered memory of another process."""

    @property
    def kind(self) -> str:
        """The transport's name in settings, never auto."""

    def read(self, pieces: Pieces, timeout_s: float, arrived: Arrived | None = None) -> None:
        """Copies from the other process to this one; all has arrived when it returns.

        arrived: may be called on this thread while later pieces are on their way, so that what is
        to be done with the first ones need not wait for the last. What it takes is time that the
        transfer has less; what it raises ends this call as a failed transfer does.

        `InvalidArgument` for pieces that lie outside of the memory registered here.
        `TransferFailed`; `DeadlineExceeded` after `timeout_s`, when bytes may still arrive in
        local memory until `close` has returned. After either the remote may be of no more use, and
        is best closed.
        """

    def write(self, pieces: Pieces, timeout_s: float) -> None:
        """Copies from this process to the other one, which can see all of it when this returns.

        `TransferFailed`; `DeadlineExceeded` after `timeout_s`, when local memory may still be read
        until `close` has returned.
        """

    def close(self) -> None:
        """Ends the connection. When it returns no byte of an earlier call moves any more, neither
        into local memory nor out of it; calls that other threads are in have failed. What had left
        before may yet land in the other process: only its own `Agent.close` ends that. Safe to call
        twice. `TransferFailed` where that cannot be had: then the memory stays in use."""


class Agent(Protocol):
    """This process, as others reach it, and as it reaches others."""

    @property
    def kind(self) -> str:
        """The transport's name in settings: shm, nixl, ucxx, grpc or auto."""

    def register(self, memory: Memory) -> None:
        """Lets connected processes read and write this memory (uint8, contiguous; a GPU's with nixl
        only), for as long as the agent lives; it is kept alive and must not be unmapped before
        `close`. Only before `describe` and `connect`. `InvalidArgument` for memory that is none of
        that, or registered already; `TransferFailed` where the transport cannot."""

    def describe(self) -> bytes:
        """What another process needs to reach this agent's registered memory; at most
        `limits.MAX_AGENT_BYTES`. It goes over the authenticated control channel only."""

    def connect(self, description: bytes, timeout_s: float) -> Remote:
        """Reaches another agent of the same kind. `TransferFailed` where nobody is there,
        `ProtocolError` for a description that is none, `DeadlineExceeded`."""

    def close(self) -> None:
        """Ends the agent, and closes its remotes. When it returns no byte lands in registered
        memory any more, whoever sent it: this is what revokes a landing ring.

        Memory that was shared for writing by `shm` is the exception: whoever has mapped it can
        write to it until they notice. So it must hold nothing else from then on, as `LandingRing`
        has it: each agent has a memfd of its own, made for it and given back after it. All that may
        still be looked at there are blocks that landed whole and are viewed, and no writer has
        their addresses: those of an unfinished one are not given out again."""
