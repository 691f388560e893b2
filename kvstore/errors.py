"""Every exception the project raises, in one tree.

    KVStoreError
    ├── InvalidArgument      the caller's input is wrong; nothing was changed
    │   └── LayoutMismatch   the bytes or parts do not fit the namespace's layout
    ├── ResourceExhausted    a limit or the pool is full; says when to retry
    ├── StaleNamespace       the namespace was forgotten; open it again
    ├── PermissionDenied     this user may not do that
    ├── DeadlineExceeded     the call's time ran out; its outcome is unknown
    ├── Unavailable          the daemon is not there (any more); reconnect later
    ├── ProtocolError        the peer sent bytes that mean nothing
    └── Corrupted            stored bytes do not match their checksums

A missing block is no exception: it is a `Miss`, a value.
"""

from __future__ import annotations


class KVStoreError(Exception):
    """Base of all errors of the project."""

    code = 1


class InvalidArgument(KVStoreError):  # noqa: N818 - the field's own name for it
    """Raised by every public call before it changes anything; `field` names the culprit."""

    code = 2

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field
        self.message = message


class LayoutMismatch(InvalidArgument):
    """Raised when bytes, parts or a stored layout differ from the namespace's layout."""

    code = 3


class ResourceExhausted(KVStoreError):  # noqa: N818
    """Raised when a limit is reached; try again after `retry_after_ms`."""

    code = 4

    def __init__(self, message: str, *, retry_after_ms: int) -> None:
        super().__init__(f"{message} (retry after {retry_after_ms} ms)")
        self.message = message
        self.retry_after_ms = retry_after_ms


class StaleNamespace(KVStoreError):  # noqa: N818
    """Raised for a namespace id whose generation was dropped; open the namespace again."""

    code = 5


class PermissionDenied(KVStoreError):  # noqa: N818
    """Raised when the peer's user id has no right to the call."""

    code = 6


class DeadlineExceeded(KVStoreError):  # noqa: N818
    """Raised by the client when the time given to a call is over."""

    code = 7


class Unavailable(KVStoreError):  # noqa: N818
    """Raised by the client when the daemon cannot be reached or has died."""

    code = 8


class ProtocolError(KVStoreError):
    """Raised when a frame, header or table is not of a known form or version."""

    code = 9


class Corrupted(KVStoreError):  # noqa: N818
    """Raised when stored bytes fail their checksum; the block counts as a miss."""

    code = 10
