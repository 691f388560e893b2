"""Calls over one gRPC channel: deadlines, the token, typed errors, and when to ask again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import grpc
import tenacity

from kvstore.errors import InvalidArgument, Unavailable
from kvstore.session.control import Deadline
from kvstore.session.fork import ForkGuard
from kvstore_proto.v1.kvstore_pb2_grpc import KVStoreStub
from kvstore_proto.v1.status import error_of
from kvstore_proto.v1.translate import MESSAGE_OPTIONS

Q = TypeVar("Q")
A = TypeVar("A")
Metadata = tuple[tuple[str, str], ...]

_OPTIONS = (
    *MESSAGE_OPTIONS,
    # A store on this host is not reached through a proxy, whatever the environment says.
    ("grpc.enable_http_proxy", 0),
    # gRPC's own pauses grow to two minutes; a restarted gateway is to be found within a second.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # Sessions share no connection: closing one must not be felt by another.
    ("grpc.use_local_subchannel_pool", 1),
)


class Rpc:
    """One channel to one gateway, and how calls are made over it; thread-safe."""

    def __init__(self, address: str, *, token: str | None) -> None:
        """`InvalidArgument` for a token that no header can carry. Connects with the first call."""
        self.metadata, self.address = _metadata(token), address
        self._ended = threading.Event()
        self._guard = ForkGuard()
        self._channel = grpc.insecure_channel(address, options=_OPTIONS)
        self._stub = KVStoreStub(self._channel)

    @property
    def stub(self) -> KVStoreStub:
        """The calls; errors of `check`."""
        self.check()
        return self._stub

    @property
    def forked(self) -> bool:
        """Whether this is a child of the process that made this."""
        return self._guard.forked

    def check(self) -> None:
        """`Unavailable` once closed, and in a child of the process that made this."""
        self._guard.check()
        if self._ended.is_set():
            raise Unavailable("the session is closed")

    @contextlib.contextmanager
    def typed_errors(self) -> Iterator[None]:
        """Raises the error that a failed call stands for in its place."""
        try:
            yield
        except grpc.RpcError as failure:
            raise error_of(failure, peer=self.address) from None
        except ValueError:
            # What gRPC raises for a channel that another thread closed just now.
            if not self._ended.is_set():
                raise
            raise Unavailable("the session is closed") from None

    def call(
        self,
        method: Callable[[KVStoreStub], grpc.UnaryUnaryMultiCallable[Q, A]],
        request: Q,
        left_s: float,
    ) -> A:
        """One call, which fails at once where the gateway is away."""
        with self.typed_errors():
            ask = method(self.stub)
            return ask(request, timeout=max(left_s, 1e-3), metadata=self.metadata)

    def lasting(
        self,
        method: Callable[[KVStoreStub], grpc.UnaryUnaryMultiCallable[Q, A]],
        request: Q,
        deadline: Deadline,
    ) -> A:
        """Calls until the store answers or the deadline is over."""
        pause = tenacity.wait_random_exponential(multiplier=0.02, max=0.5)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Unavailable),
            wait=lambda state: min(pause(state), deadline.left_s),
            sleep=tenacity.sleep_using_event(self._ended),
            stop=lambda _: self._ended.is_set() or self._guard.forked or deadline.left_s == 0,
            reraise=True,
        )
        return retrying(lambda: self.call(method, request, deadline.left_s))

    def close(self) -> None:
        """Ends the channel and the calls under way; safe to call twice."""
        if self._guard.forked:
            return  # the connection and its threads are the parent's
        self._ended.set()
        self._channel.close()


def _metadata(token: str | None) -> Metadata:
    if token is None:
        return ()
    if not (token and token.isascii() and token.isprintable()):
        raise InvalidArgument("token", "must be printable ASCII, and not empty")
    return (("authorization", f"Bearer {token}"),)
