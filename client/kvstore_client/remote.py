"""A session over gRPC: everything that the public protocol offers, from wherever it is reached."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc
import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.errors import (
    DeadlineExceeded,
    InvalidArgument,
    ResourceExhausted,
    StaleNamespace,
    Unavailable,
)
from kvstore.layout import Layout
from kvstore.session.base import (
    NOTHING_MATCHED,
    BlockReport,
    Bytes1D,
    Hashes,
    Hint,
    Hit,
    Matched,
    Miss,
    MissReason,
    NamespaceHandle,
    PutResult,
    StoreInfo,
)
from kvstore.session.buffers import HeldBlocks, own_buffers
from kvstore.session.control import Deadline
from kvstore.session.requests import checked_chain, checked_get, checked_put
from kvstore_client.looking import LookingStream
from kvstore_client.rpc import Rpc
from kvstore_client.transfer import Arrival, CopiedView, put_requests
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1 import translate as t
from kvstore_proto.v1.kvstore_pb2_grpc import KVStoreStub

R = TypeVar("R")
A = TypeVar("A")
# The requests that name a namespace and are answered by one message.
Q = TypeVar("Q", pb.DropRequest, pb.DropNamespaceRequest, pb.HintRequest, pb.ExplainRequest)
# A store that is away or overloaded costs an engine a miss, quickly.
_AWAY = (Unavailable, DeadlineExceeded, ResourceExhausted)
_ALL_CELLS = np.empty(0, np.uint32)
_PUT_ID_BYTES = 16


class RemoteSession:
    """A `Session` with the gateway of a daemon; thread-safe, and it outlives the deaths of both.

    address: `unix:/path`, or `127.0.0.1:port` with `token`, which travels as it is: have TLS in
    between if it leaves the host. timeout_s: the deadline of calls that name none. lazy: do not
    ask the store here; until it answers, nothing is found. Raises `InvalidArgument`, and, unless
    lazy, `Unavailable`, `DeadlineExceeded`, or `PermissionDenied` for a wrong token.
    """

    def __init__(
        self, address: str, *, token: str | None, timeout_s: float, lazy: bool = False
    ) -> None:
        Deadline(timeout_s)
        self._timeout_s = timeout_s
        self._rpc = Rpc(address, token=token)
        self._looking = LookingStream(self._rpc)
        # What handles mean now whose ids became stale.
        self._ids: dict[tuple[int, int], pb.NamespaceId] = {}
        if not lazy:
            self._greet()

    # -- blocks: a store that is away is a miss ----------------------------------------

    def match(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        *,
        hint: Hint | None = None,
        prefetch: bool = False,
        timeout_s: float | None = None,
    ) -> Matched:
        """See `Session.match`; one call, or a message on a stream that stays open."""
        deadline, chain = self._deadline(timeout_s), checked_chain(hashes)
        request = pb.MatchRequest(
            keys=chain.tobytes(), hint=t.hint_to_wire(hint), prefetch=prefetch
        )

        def ask(now: pb.NamespaceId) -> Matched:
            request.namespace.CopyFrom(now)
            answer = None if hint or prefetch else self._looking.ask(request, deadline.left_s)
            if answer is None:
                answer = self._rpc.call(lambda stub: stub.Match, request, deadline.left_s)
            return t.matched_of(answer, len(chain))

        try:
            return self._inside(namespace, deadline, ask)
        except _AWAY:
            return NOTHING_MATCHED

    def get_into(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        destinations: Sequence[Bytes1D],
        *,
        cells: Iterable[int] = (),
        timeout_s: float | None = None,
    ) -> list[Hit | Miss]:
        """See `Session.get_into`; one call. Blocks that arrived before a failure are hits."""
        deadline = self._deadline(timeout_s)
        get = checked_get(namespace, hashes, destinations, cells)
        arrival = Arrival(len(get.chain), get.part.nbytes, destinations.__getitem__)
        with contextlib.suppress(*_AWAY):  # what nobody said anything of is unavailable
            self._get(namespace, get.chain, get.part.cells, arrival, deadline)
        return arrival.results()

    def view(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> CopiedView:
        """See `Session.view`; the arrays are private, read-only copies, which hold no block."""
        deadline, chain = self._deadline(timeout_s), checked_chain(hashes)
        blocks: list[Bytes1D] = []

        def target(block: int) -> Bytes1D:
            assert block == len(blocks)
            blocks.append(np.empty(namespace.layout.block_bytes, np.uint8))
            return blocks[-1]

        arrival = Arrival(len(chain), namespace.layout.block_bytes, target)
        self._get(namespace, chain, _ALL_CELLS, arrival, deadline)
        if arrival.reason is MissReason.UNAVAILABLE:
            raise Unavailable("the store is away")
        return CopiedView(blocks)

    def buffers(self, n: int, nbytes: int) -> HeldBlocks:
        """See `Session.buffers`."""
        return own_buffers(n, nbytes)

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
        """See `Session.put`; one call."""
        deadline = self._deadline(timeout_s)
        put = checked_put(
            namespace,
            hashes,
            sources,
            put_id=put_id,
            cells=cells,
            parent=parent,
            position=position,
            ttl_s=ttl_s,
            hint=hint,
        )
        header = pb.PutHeader(
            keys=put.chain.tobytes(),
            put_id=put.put_id,
            cells=put.part.cells.tolist(),
            parent=put.parent,
            position=None if position < 0 else position,
            ttl_ms=put.ttl_ms,
            hint=t.hint_to_wire(hint),
            persist=persist,
        )
        try:
            return self._put(namespace, header, sources, deadline)
        except _AWAY as error:
            return _nothing_stored(len(put.chain), error)

    # -- asked until its deadline ------------------------------------------------------

    def open_namespace(
        self, name: str, layout: Layout, *, timeout_s: float | None = None
    ) -> NamespaceHandle:
        """See `Session.open_namespace`."""
        return self._open(name, layout, self._deadline(timeout_s))

    def drop(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> int:
        """See `Session.drop`."""
        request = pb.DropRequest(keys=checked_chain(hashes).tobytes())
        return self._lasting(namespace, request, lambda stub: stub.Drop, timeout_s).blocks

    def drop_namespace(self, namespace: NamespaceHandle, *, timeout_s: float | None = None) -> int:
        """See `Session.drop_namespace`."""
        request = pb.DropNamespaceRequest()
        return self._lasting(namespace, request, lambda stub: stub.DropNamespace, timeout_s).blocks

    def hint(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        hint: Hint,
        *,
        timeout_s: float | None = None,
    ) -> int:
        """See `Session.hint`."""
        request = pb.HintRequest(keys=checked_chain(hashes).tobytes(), hint=t.hint_to_wire(hint))
        return self._lasting(namespace, request, lambda stub: stub.Hint, timeout_s).blocks

    def explain(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> list[BlockReport]:
        """See `Session.explain`."""
        chain = checked_chain(hashes)
        request = pb.ExplainRequest(keys=chain.tobytes())
        answer = self._lasting(namespace, request, lambda stub: stub.Explain, timeout_s)
        return t.reports_of(answer, len(chain))

    def stats(self, *, timeout_s: float | None = None) -> c.Stats:
        """See `Session.stats`."""
        deadline = self._deadline(timeout_s)
        return t.stats_of(self._rpc.lasting(lambda stub: stub.Stats, pb.StatsRequest(), deadline))

    def info(self, *, timeout_s: float | None = None) -> StoreInfo:
        """See `Session.info`."""
        deadline = self._deadline(timeout_s)
        return t.info_of(self._rpc.lasting(lambda stub: stub.Info, pb.InfoRequest(), deadline))

    def close(self) -> None:
        """See `Session.close`; calls of other threads end at once."""
        self._rpc.close()  # first: else a look-up that the other ends is asked again by a call
        self._looking.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    # -- inside ------------------------------------------------------------------------

    def _greet(self) -> None:
        """Asks for something small, so that a store that is away is told of here."""
        try:
            self._rpc.call(lambda stub: stub.Stats, pb.StatsRequest(), self._timeout_s)
        except BaseException:
            self.close()
            raise

    def _deadline(self, timeout_s: float | None) -> Deadline:
        return Deadline(self._timeout_s if timeout_s is None else timeout_s)

    def _open(self, name: str, layout: Layout, deadline: Deadline) -> NamespaceHandle:
        if not isinstance(name, str):  # protobuf would take bytes as well
            raise InvalidArgument("name", f"must be a string, not {type(name).__name__}")
        try:
            request = pb.OpenNamespaceRequest(name=name, layout=layout.encode())
        except ValueError as error:
            raise InvalidArgument("name", f"is no text: {error}") from None
        answer = self._rpc.lasting(lambda stub: stub.OpenNamespace, request, deadline)
        return t.handle_of(answer, name, layout)

    def _inside(
        self, namespace: NamespaceHandle, deadline: Deadline, ask: Callable[[pb.NamespaceId], R]
    ) -> R:
        """Asks in a namespace, and once more where its id is not known (any more)."""
        key = (namespace.instance, namespace.id)
        try:
            return ask(self._ids.get(key) or t.namespace_to_wire(namespace))
        except StaleNamespace:
            now = self._open(namespace.name, namespace.layout, deadline)
        if len(self._ids) >= limits.MAX_NAMESPACES:
            self._ids.clear()  # whoever is forgotten opens its namespace once more
        self._ids[key] = t.namespace_to_wire(now)
        return ask(self._ids[key])

    def _lasting(
        self,
        namespace: NamespaceHandle,
        request: Q,
        method: Callable[[KVStoreStub], grpc.UnaryUnaryMultiCallable[Q, A]],
        timeout_s: float | None,
    ) -> A:
        deadline = self._deadline(timeout_s)

        def ask(now: pb.NamespaceId) -> A:
            request.namespace.CopyFrom(now)
            return self._rpc.lasting(method, request, deadline)

        return self._inside(namespace, deadline, ask)

    def _get(
        self,
        namespace: NamespaceHandle,
        chain: c.U8,
        cells: c.U32,
        arrival: Arrival,
        deadline: Deadline,
    ) -> None:
        request = pb.GetRequest(keys=chain.tobytes(), cells=cells.tolist())

        def ask(now: pb.NamespaceId) -> None:
            request.namespace.CopyFrom(now)
            with self._rpc.typed_errors():
                call = self._rpc.stub.Get(
                    request, timeout=max(deadline.left_s, 1e-3), metadata=self._rpc.metadata
                )
                try:
                    arrival.take(call)
                finally:
                    call.cancel()  # does nothing to a call that is over

        self._inside(namespace, deadline, ask)

    def _put(
        self,
        namespace: NamespaceHandle,
        header: pb.PutHeader,
        sources: Sequence[Bytes1D],
        deadline: Deadline,
    ) -> PutResult:
        def ask(now: pb.NamespaceId) -> PutResult:
            header.namespace.CopyFrom(now)
            with self._rpc.typed_errors():
                answer = self._rpc.stub.Put(
                    put_requests(header, sources),
                    timeout=max(deadline.left_s, 1e-3),
                    metadata=self._rpc.metadata,
                )
            return t.put_of(answer, len(sources))

        return self._inside(namespace, deadline, ask)


def _nothing_stored(n_blocks: int, error: Exception) -> PutResult:
    return PutResult(
        stored=0,
        existed=0,
        waiting=0,
        not_stored=n_blocks,
        retry_after_ms=getattr(error, "retry_after_ms", 0),
    )
