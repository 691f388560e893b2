"""What the cluster's coroutines stand on: time, messages, tasks, one node's store, and transfers.

The daemon implements it over an event loop, gRPC and NIXL; a simulation over a heap of events under
a seed. Coroutines await only what is offered here, so both run the same code.
"""

from __future__ import annotations

import random
from collections.abc import Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol, TypeVar

from kvstore import commands as c
from kvstore.cluster.messages import Hello, Welcomed
from kvstore.layout import Layout
from kvstore.session.parts import ALL_CELLS
from kvstore.transfer.base import Arrived, Pieces

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)


class Task(Protocol[T_co]):
    """A coroutine that runs by itself."""

    @property
    def done(self) -> bool:
        """Whether it has ended."""

    def result(self) -> T_co:
        """What it returned, once it is done; raises what it raised."""

    def cancel(self) -> None:
        """Ends it where it waits; nobody asks for its result any more."""


class World(Protocol):
    """Time, tasks and messages of one process."""

    @property
    def random(self) -> random.Random:
        """Where all that is random comes from."""

    def now_ms(self) -> float:
        """Monotonic time, in milliseconds from some moment."""

    async def sleep(self, ms: float) -> None:
        """Waits."""

    def spawn(self, work: Coroutine[Any, Any, T]) -> Task[T]:
        """Runs a coroutine beside the caller."""

    async def wait(self, tasks: Sequence[Task[Any]], timeout_ms: float) -> None:
        """Until one of these that was not done is done, or all are, or for so long."""

    async def wait_all(self, tasks: Sequence[Task[Any]], timeout_ms: float) -> None:
        """Until all of these are done, or for so long; what is not done by then is cancelled."""

    async def call(self, address: str, message: Any, timeout_ms: float) -> Any:
        """Sends a message of `messages` to the node at an address, and returns its answer.

        Raises what the node raised; `Unavailable` where nobody is there, `DeadlineExceeded` where
        no answer came in time: then the message may have been carried out, or may yet be.
        """

    async def attach(self, address: str, hello: Hello, timeout_ms: float) -> Attachment:
        """Begins a session with the node at an address. Raises as `call`."""


class Attachment(Protocol):
    """A connection to a node that carries a session."""

    @property
    def welcomed(self) -> Welcomed:
        """What the node said."""

    @property
    def lost(self) -> bool:
        """Whether it is over; it does not come back."""

    async def close(self) -> None:
        """Ends it: the node forgets the session."""


class Memory(Protocol):
    """The memory of another process that a node is connected to, see `transfer.base.Remote`."""

    async def read(self, pieces: Pieces, timeout_ms: float, arrived: Arrived | None = None) -> None:
        """`Remote.read`, on a thread that may block; `arrived` is called there."""

    async def write(self, pieces: Pieces, timeout_ms: float) -> None:
        """`Remote.write`, likewise."""

    async def close(self) -> None:
        """`Remote.close`, likewise."""


class Transfers(Protocol):
    """A node's transfer agent, with its pool registered, see `transfer.base.Agent`."""

    @property
    def kind(self) -> str:
        """Of the agent."""

    def describe(self) -> bytes:
        """For other nodes, which read from the pool."""

    async def connect(self, kind: str, agent: bytes, timeout_ms: float) -> Memory:
        """Reaches another process's agent; `InvalidArgument` for one of another kind."""


class Ledger(Protocol):
    """The little that a node must remember when its process has died."""

    def load(self) -> bytes:
        """What was saved last; empty where nothing was."""

    def save(self, data: bytes) -> None:
        """Durable when this returns. Raises OSError."""


class Seat(Protocol):
    """A connection to a node's store that one put has for itself: where several put cells of one
    block, the store tells them apart by their connections."""

    async def command(self, command: c.Command, timeout_ms: float) -> Any:
        """As `NodeStore.command`."""

    async def lose(self) -> None:
        """Ends the connection, because what was reserved by it may still be written to: these
        slots are nobody's until this process ends."""


class NodeStore(Protocol):
    """One node's own store, and its pool as it is mapped in the node's process."""

    @property
    def instance(self) -> int:
        """Differs in each life of the store."""

    async def command(self, command: c.Command, timeout_ms: float) -> Any:
        """Carries out one command, as a client that writes the pool itself. Raises as `Link.call`;
        `Unavailable` once the store has gone, after which nothing works any more."""

    def seat(self, timeout_ms: float) -> AbstractAsyncContextManager[Seat]:
        """Has a `Seat` meanwhile; `DeadlineExceeded` where others have all of them for so long.
        Who leaves it holds nothing by it any more."""

    def look(self, namespace: int, hashes: c.U8) -> c.U8:
        """The tier code of each of the blocks, 0 for one that is not stored: uint8 (n,). Reads the
        index alone: blocks are not read by it in the sense of eviction."""

    def addresses(self, layout: Layout, granules: c.U32) -> c.U64:
        """Where the payloads in these slots lie in this process: uint64 (n,)."""

    def headers(self, layout: Layout, granules: c.U32) -> c.U8:
        """The headers in front of them, of leased blocks: uint8 (n, header bytes), a copy."""

    def sums_here(self, layout: Layout, granules: c.U32) -> c.U64:
        """The checksums of what lies in these slots now: uint64 (n, cells). On the caller's thread,
        which may be any."""

    async def sums(self, layout: Layout, granules: c.U32, cells: c.U32 = ALL_CELLS) -> c.U64:
        """The checksums of all or some cells of what lies in these slots now: uint64 (n, cells).
        May run on another thread."""
