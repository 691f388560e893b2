"""`KVStoreClient`: everything that a user asks of a store, whatever way the bytes take."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from kvstore import commands
from kvstore.layout import Layout
from kvstore.session import (
    BlockReport,
    Hint,
    Hit,
    Matched,
    Miss,
    NamespaceHandle,
    PutResult,
    StoreInfo,
    View,
)
from kvstore.session.base import Bytes1D, Hashes
from kvstore_client.targets import connect, default_target


class KVStoreClient:
    """A client of the store at `target`; implements `kvstore.Session`, thread-safe.

    target: `unix:///path/to/kvstore.sock` (shared memory; gRPC where that cannot be had),
    `grpc+unix:///path/to/kvstore.grpc.sock`, `grpc://127.0.0.1:port`, or some nodes of a cluster,
    `cluster://host:port,host:port[?OPTIONS]` (see `parse_target`); none: the daemon of this user.
    timeout_s: the deadline of every call that names none. token: for TCP, and for a cluster, whose
    token may also be in the environment (see `cluster.access`). verify_reads: check the checksums
    at each `get_into` too (shared memory only: over gRPC it changes nothing, and what comes from
    a cluster is always checked). lazy: return at once, and find nothing until the store answers.
    `data_path` tells which way the blocks travel. Raises `InvalidArgument` for a target of another
    form and, unless lazy, `Unavailable` or `DeadlineExceeded` where no store answers, and
    `PermissionDenied`.
    """

    def __init__(
        self,
        target: str | None = None,
        *,
        timeout_s: float = 5.0,
        token: str | None = None,
        verify_reads: bool = False,
        lazy: bool = False,
    ) -> None:
        self.target = target or default_target()
        self._session, self.data_path = connect(
            self.target, timeout_s=timeout_s, token=token, verify_reads=verify_reads, lazy=lazy
        )

    def __repr__(self) -> str:
        return f"KVStoreClient({self.target!r}, data_path={self.data_path.value!r})"

    def open_namespace(
        self, name: str, layout: Layout, *, timeout_s: float | None = None
    ) -> NamespaceHandle:
        """Opens the namespace of `name` and `layout`, creating it where it is new."""
        return self._session.open_namespace(name, layout, timeout_s=timeout_s)

    def match(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        *,
        hint: Hint | None = None,
        prefetch: bool = False,
        timeout_s: float | None = None,
    ) -> Matched:
        """The longest stored leading part of the chain; nothing where the store is away.

        prefetch: begin to bring what is on NVMe into memory.
        """
        return self._session.match(
            namespace, hashes, hint=hint, prefetch=prefetch, timeout_s=timeout_s
        )

    def get_into(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        destinations: Sequence[Bytes1D],
        *,
        cells: Iterable[int] = (),
        timeout_s: float | None = None,
    ) -> list[Hit | Miss]:
        """Copies each block's bytes into its destination (uint8, 1-D, `block_bytes` long).

        cells: the part to copy; a destination then holds those cells' bytes, one after another.
        Stops at the first miss: blocks behind it are of no use to a prefix. A destination
        counts only where the result says `Hit`. A store that is away is a miss.
        """
        return self._session.get_into(
            namespace, hashes, destinations, cells=cells, timeout_s=timeout_s
        )

    def view(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> View:
        """Holds the leading stored run of the chain and shows its bytes; no copy on one host."""
        return self._session.view(namespace, hashes, timeout_s=timeout_s)

    def buffers(self, n: int, nbytes: int) -> View:
        """n writable uint8 arrays of so many bytes, to put from. A cluster's nodes read them where
        they lie, without a copy here; elsewhere they are ordinary memory. They must stay as they
        are until the put has returned. `ResourceExhausted` where the memory that nodes read has no
        room for them."""
        return self._session.buffers(n, nbytes)

    def put(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        sources: Sequence[Bytes1D],
        *,
        put_id: bytes | None = None,
        cells: Iterable[int] = (),
        parent: bytes = b"",
        position: int = -1,
        ttl_s: float | None = None,
        hint: Hint | None = None,
        persist: bool = False,
        timeout_s: float | None = None,
    ) -> PutResult:
        """Stores blocks, or one rank's cells of them, in order.

        sources: uint8, 1-D, the concatenated bytes of `cells` (none: the whole block). All
        ranks of one put share `put_id` (16 bytes). parent: the 32-byte hash before the first
        (empty: unknown or none); position: the first block's index in its chain (-1: unknown).
        Blocks that are there already, or for which there is no room, are counted, not raised;
        a store that is away or full stores nothing. persist: wait, until the deadline at most,
        for the blocks to be synced on NVMe; the result says how many are. A cluster takes whole
        blocks only, and says how many of them are at as many nodes as the put waited for.
        """
        return self._session.put(
            namespace,
            hashes,
            sources,
            put_id=put_id,
            cells=cells,
            parent=parent,
            position=position,
            ttl_s=ttl_s,
            hint=hint,
            persist=persist,
            timeout_s=timeout_s,
        )

    def drop(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> int:
        """Forgets the blocks; returns how many there were."""
        return self._session.drop(namespace, hashes, timeout_s=timeout_s)

    def drop_namespace(self, namespace: NamespaceHandle, *, timeout_s: float | None = None) -> int:
        """Forgets all blocks of the namespace and moves its generation on."""
        return self._session.drop_namespace(namespace, timeout_s=timeout_s)

    def hint(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        hint: Hint,
        *,
        timeout_s: float | None = None,
    ) -> int:
        """Tells what will happen to the stored ones of the blocks; returns how many there are."""
        return self._session.hint(namespace, hashes, hint, timeout_s=timeout_s)

    def explain(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> list[BlockReport]:
        """Why each block of the chain can or cannot be found."""
        return self._session.explain(namespace, hashes, timeout_s=timeout_s)

    def stats(self, *, timeout_s: float | None = None) -> commands.Stats:
        """The store's counters."""
        return self._session.stats(timeout_s=timeout_s)

    def info(self, *, timeout_s: float | None = None) -> StoreInfo:
        """What the store is, and its namespaces."""
        return self._session.info(timeout_s=timeout_s)

    def close(self) -> None:
        """Ends the session; safe to call twice."""
        self._session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()
