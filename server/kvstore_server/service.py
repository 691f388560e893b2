"""The service `kvstore.v1.KVStore`: translates calls to those of a session, and bounds them."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator

import grpc

from kvstore import limits
from kvstore.errors import (
    DeadlineExceeded,
    InvalidArgument,
    KVStoreError,
    ResourceExhausted,
    StaleNamespace,
    Unavailable,
)
from kvstore.session.base import NamespaceHandle, PutResult, Session
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1 import status
from kvstore_proto.v1 import translate as t
from kvstore_proto.v1.kvstore_pb2_grpc import KVStoreServicer
from kvstore_server import transfers

TIMEOUT_S = 5.0  # of a call that names no deadline
MAX_STREAMS = 8  # gets and puts at once: each has a buffer and holds a worker
MAX_LOOKING = 4  # streams of look-ups at once: each holds a worker
_MAX_TIMEOUT_S = limits.MAX_DEADLINE_MS / 1e3
_FOR_EVER_S = 1e15  # gRPC tells of no deadline as of one that nobody will live to see
_CLOCK_SLACK_S = 1.0  # deadlines are rounded on the wire


class OpenNamespaces:
    """The namespaces that clients know by their ids; the one not used for longest goes first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._handles: OrderedDict[tuple[int, int], NamespaceHandle] = OrderedDict()

    def add(self, handle: NamespaceHandle) -> None:
        """Makes a namespace known."""
        key = (handle.instance, handle.id)
        with self._lock:
            self._handles[key] = handle
            self._handles.move_to_end(key)
            if len(self._handles) > limits.MAX_NAMESPACES:
                self._handles.popitem(last=False)

    def find(self, wanted: pb.NamespaceId) -> NamespaceHandle:
        """The namespace of an id; `StaleNamespace` where nobody opened it here, or long ago."""
        key = (wanted.instance, wanted.number)
        with self._lock:
            handle = self._handles.get(key)
            if handle is None:
                raise StaleNamespace(f"namespace {wanted.number} is not open here: open it (again)")
            self._handles.move_to_end(key)
            return handle


class Streams:
    """Bounds how many calls of a kind run at once."""

    def __init__(self, what: str, limit: int) -> None:
        """what: they are, for the error."""
        self._what, self._limit = what, limit
        self._lock = threading.Lock()
        self._running: set[grpc.ServicerContext] = set()

    @contextlib.contextmanager
    def one(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Holds one of them; `ResourceExhausted` where all are taken."""
        with self._lock:
            if len(self._running) >= self._limit:
                raise ResourceExhausted(
                    f"too many {self._what} at once", retry_after_ms=limits.RETRY_AFTER_MS
                )
            self._running.add(context)
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(context)

    def end(self) -> None:
        """Cancels those that run."""
        with self._lock:
            running = list(self._running)
        for context in running:
            context.cancel()


class KVStoreService(KVStoreServicer):
    """Answers every call of the protocol out of one session.

    on_trouble: told when the store is away; must not block. max_streams: gets and puts at once.
    """

    def __init__(
        self,
        session: Session,
        *,
        on_trouble: Callable[[], None] = lambda: None,
        max_streams: int = MAX_STREAMS,
    ) -> None:
        self._session = session
        self._on_trouble = on_trouble
        self._namespaces = OpenNamespaces()
        self._streams = Streams("gets and puts", max_streams)
        self._looking = Streams("streams of look-ups", MAX_LOOKING)
        # All ranks that come this way are one writer to the store, which takes one put of a
        # block's cells at a time from each writer.
        self._partial_put = threading.Lock()

    def OpenNamespace(  # noqa: N802 - the protocol's name
        self, request: pb.OpenNamespaceRequest, context: grpc.ServicerContext
    ) -> pb.OpenNamespaceResponse:
        """Opens a namespace and keeps its handle for the calls that will name it."""
        with self._answering(context):
            layout = t.layout_of(request.layout)
            opened = self._session.open_namespace(request.name, layout, timeout_s=_left_s(context))
            self._namespaces.add(opened)
            return pb.OpenNamespaceResponse(
                namespace=t.namespace_to_wire(opened), generation=opened.generation, key=opened.key
            )

    def Match(  # noqa: N802
        self, request: pb.MatchRequest, context: grpc.ServicerContext
    ) -> pb.MatchResponse:
        """Finds the longest stored leading part."""
        with self._answering(context):
            return self._matched(request, _left_s(context))

    def Matches(  # noqa: N802
        self, request_iterator: Iterator[pb.MatchRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.MatchResponse]:
        """Looks up again and again."""
        with self._answering(context), self._looking.one(context):
            _bounded(context)
            for request in request_iterator:
                yield self._matched(request, min(_left_s(context), TIMEOUT_S))

    def Get(  # noqa: N802
        self, request: pb.GetRequest, context: grpc.ServicerContext
    ) -> Iterator[pb.GetResponse]:
        """Sends blocks."""
        with self._answering(context), self._streams.one(context):
            namespace = self._namespaces.find(request.namespace)
            left_s = functools.partial(_left_s, _bounded(context))
            yield from transfers.get(self._session, namespace, request, left_s)

    def Put(  # noqa: N802
        self, request_iterator: Iterator[pb.PutRequest], context: grpc.ServicerContext
    ) -> pb.PutResponse:
        """Takes blocks."""
        with self._answering(context), self._streams.one(context):
            _bounded(context)
            header = transfers.header_of(request_iterator)
            namespace = self._namespaces.find(header.namespace)
            put = transfers.Put.of(header, namespace)
            turn = self._partial_put if put.cells else contextlib.nullcontext()
            total = PutResult(stored=0, existed=0, waiting=0, not_stored=0)
            for first, rows in transfers.batches(request_iterator, put):
                with turn:
                    result = put.store(self._session, namespace, first, rows, _left_s(context))
                total += result
            return t.put_to_wire(total)

    def Drop(  # noqa: N802
        self, request: pb.DropRequest, context: grpc.ServicerContext
    ) -> pb.DropResponse:
        """Forgets blocks."""
        with self._answering(context):
            namespace = self._namespaces.find(request.namespace)
            keys = t.keys_of(request.keys)
            blocks = self._session.drop(namespace, keys, timeout_s=_left_s(context))
            return pb.DropResponse(blocks=blocks)

    def DropNamespace(  # noqa: N802
        self, request: pb.DropNamespaceRequest, context: grpc.ServicerContext
    ) -> pb.DropNamespaceResponse:
        """Forgets all blocks of a namespace."""
        with self._answering(context):
            namespace = self._namespaces.find(request.namespace)
            blocks = self._session.drop_namespace(namespace, timeout_s=_left_s(context))
            return pb.DropNamespaceResponse(blocks=blocks)

    def Hint(  # noqa: N802
        self, request: pb.HintRequest, context: grpc.ServicerContext
    ) -> pb.HintResponse:
        """Passes a hint on."""
        with self._answering(context):
            namespace = self._namespaces.find(request.namespace)
            keys, hint = t.keys_of(request.keys), t.hint_of(request.hint)
            blocks = self._session.hint(namespace, keys, hint, timeout_s=_left_s(context))
            return pb.HintResponse(blocks=blocks)

    def Explain(  # noqa: N802
        self, request: pb.ExplainRequest, context: grpc.ServicerContext
    ) -> pb.ExplainResponse:
        """Says why blocks are there or not."""
        with self._answering(context):
            namespace = self._namespaces.find(request.namespace)
            keys = t.keys_of(request.keys)
            return t.reports_to_wire(
                self._session.explain(namespace, keys, timeout_s=_left_s(context))
            )

    def Stats(  # noqa: N802
        self, request: pb.StatsRequest, context: grpc.ServicerContext
    ) -> pb.StatsResponse:
        """The counters."""
        del request
        with self._answering(context):
            return t.stats_to_wire(self._session.stats(timeout_s=_left_s(context)))

    def Info(  # noqa: N802
        self, request: pb.InfoRequest, context: grpc.ServicerContext
    ) -> pb.InfoResponse:
        """What the store is."""
        del request
        with self._answering(context):
            return t.info_to_wire(self._session.info(timeout_s=_left_s(context)))

    def end_looking(self) -> None:
        """Ends the streams of look-ups, which would else last as long as their clients like."""
        self._looking.end()

    def _matched(self, request: pb.MatchRequest, timeout_s: float) -> pb.MatchResponse:
        namespace = self._namespaces.find(request.namespace)
        hint = t.hint_of(request.hint) if request.HasField("hint") else None
        matched = self._session.match(
            namespace,
            t.keys_of(request.keys),
            hint=hint,
            prefetch=request.prefetch,
            timeout_s=timeout_s,
        )
        return t.matched_to_wire(matched)

    @contextlib.contextmanager
    def _answering(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Ends the call with the status of whatever error comes out of it."""
        try:
            yield
        except KVStoreError as error:
            if isinstance(error, Unavailable):
                self._on_trouble()
            status.abort(context, error)


def _bounded(context: grpc.ServicerContext) -> grpc.ServicerContext:
    """The call, if it has a deadline of its own; else `InvalidArgument`."""
    if context.time_remaining() > _FOR_EVER_S:
        raise InvalidArgument("deadline", "gets, puts and streams of look-ups need one")
    return context


def _left_s(context: grpc.ServicerContext) -> float:
    """Seconds until the call's deadline, the server's own where it has none."""
    left_s = context.time_remaining()
    if left_s > _FOR_EVER_S:
        return TIMEOUT_S
    if left_s > _MAX_TIMEOUT_S + _CLOCK_SLACK_S:
        raise InvalidArgument("deadline", f"must be at most {_MAX_TIMEOUT_S:.0f} s away")
    if left_s <= 0:
        raise DeadlineExceeded("the call's deadline is over")
    return min(left_s, _MAX_TIMEOUT_S)
