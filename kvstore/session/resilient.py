"""A session that outlives the store's deaths: misses instead of waits, and a new connection.

An engine's step must never stall on its cache: match, get and put answer at once while the store
is away. Everything else is asked again until its deadline.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Protocol, Self, TypeVar

import tenacity

from kvstore import commands as c
from kvstore.errors import (
    DeadlineExceeded,
    KVStoreError,
    ProtocolError,
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
    Session,
    StoreInfo,
    View,
)
from kvstore.session.buffers import HeldBlocks, own_buffers
from kvstore.session.control import Deadline
from kvstore.session.fork import ForkGuard
from kvstore.session.requests import (
    checked_chain,
    checked_get,
    checked_put,
    checked_timeout,
    hint_ms,
)

R = TypeVar("R")
# What a match, get or put answers with misses: the store is gone, slow, full (also of namespaces,
# when one has to be opened again) or not in its senses, or this process has no room to map it.
_AWAY = (
    Unavailable,
    DeadlineExceeded,
    ResourceExhausted,
    StaleNamespace,
    ProtocolError,
    OSError,
)

log = logging.getLogger(__name__)


class Connection(Session, Protocol):
    """A session that ends with its connection."""

    def watch(self) -> bool:
        """Returns when the connection is over; whether the store is to blame for it."""

    def shut(self) -> None:
        """Ends the connection, and with it `watch`; `close` follows."""


class ResilientSession:
    """A `Session` over one connection after another, kept up by a thread of its own."""

    def __init__(
        self, connect: Callable[[float], Connection], *, timeout_s: float, lazy: bool = False
    ) -> None:
        """connect: makes a connection within so many seconds, or raises.

        timeout_s: the deadline of calls that name none. lazy: leave the first connection to the
        thread as well, instead of making it here and raising what `connect` raises.
        """
        Deadline(timeout_s)
        self._connect, self._timeout_s = connect, timeout_s
        self._ended = threading.Event()
        self._changed = threading.Condition()
        self._why: Exception = Unavailable("the store has not answered yet")
        self._connection = None if lazy else connect(timeout_s)
        self._guard = ForkGuard(self._forget)
        self._keeper = threading.Thread(
            target=self._keep, args=(self._connection,), name="kvstore-keeper", daemon=True
        )
        self._keeper.start()

    # -- never waits for a store that is away ------------------------------------------

    def match(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        *,
        hint: Hint | None = None,
        prefetch: bool = False,
        timeout_s: float | None = None,
    ) -> Matched:
        """See `Session.match`."""
        try:
            return self._now().match(
                namespace, hashes, hint=hint, prefetch=prefetch, timeout_s=timeout_s
            )
        except _AWAY:
            self._check_time(timeout_s)
            checked_chain(hashes)
            if hint:
                hint_ms(hint)
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
        """See `Session.get_into`."""
        cells = tuple(cells)
        try:
            return self._now().get_into(
                namespace, hashes, destinations, cells=cells, timeout_s=timeout_s
            )
        except _AWAY:
            self._check_time(timeout_s)
            request = checked_get(namespace, hashes, destinations, cells)
            return [Miss(MissReason.UNAVAILABLE)] * len(request.chain)

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
        """See `Session.put`."""
        cells = tuple(cells)
        try:
            return self._now().put(
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
        except _AWAY as error:
            self._check_time(timeout_s)
            request = checked_put(
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
            return PutResult(
                stored=0,
                existed=0,
                waiting=0,
                not_stored=len(request.chain),
                retry_after_ms=getattr(error, "retry_after_ms", 0),
            )

    # -- asked until its deadline ------------------------------------------------------

    def open_namespace(
        self, name: str, layout: Layout, *, timeout_s: float | None = None
    ) -> NamespaceHandle:
        """See `Session.open_namespace`."""
        return self._lasting(
            timeout_s, lambda now, left_s: now.open_namespace(name, layout, timeout_s=left_s)
        )

    def view(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> View:
        """See `Session.view`."""
        return self._lasting(
            timeout_s, lambda now, left_s: now.view(namespace, hashes, timeout_s=left_s)
        )

    def buffers(self, n: int, nbytes: int) -> HeldBlocks:
        """See `Session.buffers`."""
        return own_buffers(n, nbytes)

    def drop(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> int:
        """See `Session.drop`."""
        return self._lasting(
            timeout_s, lambda now, left_s: now.drop(namespace, hashes, timeout_s=left_s)
        )

    def drop_namespace(self, namespace: NamespaceHandle, *, timeout_s: float | None = None) -> int:
        """See `Session.drop_namespace`."""
        return self._lasting(
            timeout_s, lambda now, left_s: now.drop_namespace(namespace, timeout_s=left_s)
        )

    def hint(
        self,
        namespace: NamespaceHandle,
        hashes: Hashes,
        hint: Hint,
        *,
        timeout_s: float | None = None,
    ) -> int:
        """See `Session.hint`."""
        return self._lasting(
            timeout_s, lambda now, left_s: now.hint(namespace, hashes, hint, timeout_s=left_s)
        )

    def explain(
        self, namespace: NamespaceHandle, hashes: Hashes, *, timeout_s: float | None = None
    ) -> list[BlockReport]:
        """See `Session.explain`."""
        return self._lasting(
            timeout_s, lambda now, left_s: now.explain(namespace, hashes, timeout_s=left_s)
        )

    def stats(self, *, timeout_s: float | None = None) -> c.Stats:
        """See `Session.stats`."""
        return self._lasting(timeout_s, lambda now, left_s: now.stats(timeout_s=left_s))

    def info(self, *, timeout_s: float | None = None) -> StoreInfo:
        """See `Session.info`."""
        return self._lasting(timeout_s, lambda now, left_s: now.info(timeout_s=left_s))

    def close(self) -> None:
        """See `Session.close`."""
        if self._guard.forked:
            return  # the thread and the memory are the parent's
        self._ended.set()
        with self._changed:
            connection = self._connection
            self._changed.notify_all()
        if connection:
            connection.shut()
        self._keeper.join()

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

    def _check_time(self, timeout_s: float | None) -> None:
        """What is wrong is told also where it makes no difference, because the store is away."""
        if timeout_s is not None:
            checked_timeout(timeout_s)

    def _now(self) -> Connection:
        """The connection, if there is one at this moment."""
        self._guard.check()
        connection = self._connection
        if connection is None:
            raise Unavailable(str(self._why))
        return connection

    def _lasting(self, timeout_s: float | None, ask: Callable[[Connection, float], R]) -> R:
        """Asks, and asks again over a new connection where one was lost, until the deadline."""
        deadline = Deadline(self._timeout_s if timeout_s is None else timeout_s)

        def attempt() -> R:
            connection = self._connected(deadline)
            try:
                return ask(connection, max(deadline.left_s, 1e-3))
            except Unavailable:
                self._lose(connection)
                raise

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            stop=lambda _: self._ended.is_set() or self._guard.forked or deadline.left_s == 0,
            reraise=True,
        )
        return retrying(attempt)

    def _connected(self, deadline: Deadline) -> Connection:
        self._guard.check()
        with self._changed:
            self._changed.wait_for(
                lambda: self._connection or self._ended.is_set(), deadline.left_s
            )
        if self._ended.is_set():
            raise Unavailable("the session is closed")
        return self._now()

    def _lose(self, connection: Connection) -> None:
        with self._changed:
            if self._connection is connection:
                self._connection = None
        connection.shut()

    def _forget(self) -> None:
        """In a forked child, where the lock may be held by a thread that is not there."""
        self._connection = None
        self._changed = threading.Condition()

    def _keep(self, connection: Connection | None) -> None:
        """The thread: watches the connection, and makes the next one.

        It closes each that was made, also one that a caller has lost before it was watched.
        """
        while not self._ended.is_set():
            connection = connection or self._reconnect()
            if connection is None or self._ended.is_set():
                break
            lost = connection.watch()
            self._end(connection)
            connection = None
            if lost and not self._ended.is_set():
                log.warning("lost the store; trying to reach it again")
        if connection:  # made while the session was being closed
            self._end(connection)

    def _end(self, connection: Connection) -> None:
        self._lose(connection)
        connection.close()

    def _reconnect(self) -> Connection | None:
        """The next connection, for callers too; None when the session is closed."""
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(self._note),
            wait=tenacity.wait_random_exponential(multiplier=0.02, max=1.0),
            sleep=tenacity.sleep_using_event(self._ended),
            stop=tenacity.stop_when_event_set(self._ended),
        )
        try:
            connection = retrying(self._connect, self._timeout_s)
        except tenacity.RetryError:
            return None
        with self._changed:
            self._connection = connection
            self._changed.notify_all()
        log.info("reached the store")
        return connection

    def _note(self, error: BaseException) -> bool:
        """Keeps why the store is away; every such reason may pass, so the answer is to go on."""
        if not isinstance(error, KVStoreError | OSError):
            return False
        self._why = Unavailable(str(error))
        return True
