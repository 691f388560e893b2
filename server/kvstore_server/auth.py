"""The bearer token that gRPC over TCP asks for. A unix socket needs none: its mode says who may."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Iterator
from typing import NoReturn, TypeVar

import grpc

from kvstore.errors import PermissionDenied
from kvstore_proto.v1 import status

Q = TypeVar("Q")
A = TypeVar("A")
_HEADER = "authorization"


class TokenInterceptor(grpc.ServerInterceptor):
    """Refuses every call, health and reflection included, that does not bear the token."""

    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Q, A] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Q, A] | None:
        """See `grpc.ServerInterceptor`."""
        if self._bears_token(handler_call_details):
            return continuation(handler_call_details)
        # A handler of streams answers before the first message, so that nobody can hold it.
        return grpc.stream_stream_rpc_method_handler(_refuse)

    def _bears_token(self, details: grpc.HandlerCallDetails) -> bool:
        for key, value in details.invocation_metadata or ():
            if key == _HEADER:
                sent = value if isinstance(value, bytes) else value.encode()
                return hmac.compare_digest(sent, self._expected)
        return False


def _refuse(requests: Iterator[object], context: grpc.ServicerContext) -> NoReturn:
    del requests
    error = PermissionDenied("authorization: Bearer <token> is missing or wrong")
    status.abort(context, error, grpc.StatusCode.UNAUTHENTICATED)
