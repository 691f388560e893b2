"""Errors to and from statuses of gRPC: a code for everybody, the exact error for ourselves."""

from __future__ import annotations

import dataclasses
from typing import NoReturn, cast

import grpc

from kvstore import errors, limits
from kvstore.channel import wire
from kvstore.commands import Failed
from kvstore.errors import KVStoreError
from kvstore.store import failed

ERROR_KEY = "kvstore-error-bin"
_MAX_TEXT_CHARACTERS = 512  # a peer may refuse all of the metadata where it is over 8 KiB

_CODES: dict[type[KVStoreError], grpc.StatusCode] = {
    errors.InvalidArgument: grpc.StatusCode.INVALID_ARGUMENT,
    errors.LayoutMismatch: grpc.StatusCode.INVALID_ARGUMENT,
    errors.ResourceExhausted: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.StaleNamespace: grpc.StatusCode.FAILED_PRECONDITION,
    errors.PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Corrupted: grpc.StatusCode.DATA_LOSS,
}
_CLASSES: dict[grpc.StatusCode, type[KVStoreError]] = {
    grpc.StatusCode.CANCELLED: errors.Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: errors.StaleNamespace,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDenied,
    grpc.StatusCode.UNAUTHENTICATED: errors.PermissionDenied,
    grpc.StatusCode.UNIMPLEMENTED: errors.ProtocolError,
    grpc.StatusCode.DATA_LOSS: errors.Corrupted,
}


def abort(
    context: grpc.ServicerContext, error: KVStoreError, code: grpc.StatusCode | None = None
) -> NoReturn:
    """Ends a call with an error. code: where the error's own says too little."""
    context.set_trailing_metadata(((ERROR_KEY, _encode(error)),))
    code = code or _CODES.get(type(error), grpc.StatusCode.INTERNAL)
    context.abort(code, str(error)[:_MAX_TEXT_CHARACTERS])


def error_of(failure: grpc.RpcError, *, peer: str = "its address") -> KVStoreError:
    """The error that a failed call stands for, exact where a gateway of ours has answered.

    peer: whom the call was for, to be named where nobody has answered.
    """
    # Failures of calls are the calls themselves, but no type says so.
    call = cast(grpc.Call, failure)
    for key, value in call.trailing_metadata() or ():
        if key == ERROR_KEY and isinstance(value, bytes):
            return _decode(value)
    return _by_code(call.code(), call.details() or "", peer)


def _encode(error: KVStoreError) -> bytes:
    record = failed(error)
    short = record.message[:_MAX_TEXT_CHARACTERS]
    return wire.encode(dataclasses.replace(record, message=short))


def _decode(data: bytes) -> KVStoreError:
    try:
        if len(data) < wire.FRAME.size:
            raise errors.ProtocolError(f"an error of {len(data)} bytes")
        record = wire.decode(data[: wire.FRAME.size], data[wire.FRAME.size :])
        if not isinstance(record, Failed):
            raise errors.ProtocolError(f"an error that is a {type(record).__name__}")
        wire.raise_if_failed(record)
    except KVStoreError as error:
        return error
    raise AssertionError("a Failed record is always raised")


def _by_code(code: grpc.StatusCode, text: str, peer: str) -> KVStoreError:
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.Unavailable(f"no store answers at {peer}: {_cause(text)}")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return errors.DeadlineExceeded(f"no answer from {peer} within the call's time")
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        return errors.InvalidArgument("request", text)
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return errors.ResourceExhausted(text, retry_after_ms=limits.RETRY_AFTER_MS)
    return _CLASSES.get(code, KVStoreError)(text)


def _cause(text: str) -> str:
    """gRPC names the address up to three times before it says what is wrong with it."""
    return text.rpartition(": ")[2] if text.startswith("failed to connect") else text
