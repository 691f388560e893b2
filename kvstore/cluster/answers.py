"""Errors on the wire between nodes: `Failed` for all, and back again."""

from __future__ import annotations

from typing import Any

from kvstore import commands
from kvstore.channel import wire
from kvstore.cluster.messages import WrongEpoch
from kvstore.errors import KVStoreError
from kvstore.transfer.base import TransferFailed


def failed(error: KVStoreError) -> commands.Failed:
    """The wire form of an error."""
    message = getattr(error, "message", str(error))
    return commands.Failed(
        code=error.code,
        field=getattr(error, "field", ""),
        message=error.view.decode() if isinstance(error, WrongEpoch) else message,
        retry_after_ms=getattr(error, "retry_after_ms", 0),
    )


def raise_if_failed(answer: Any) -> Any:
    """Turns a `Failed` back into the error it stands for."""
    if isinstance(answer, commands.Failed):
        if answer.code == WrongEpoch.code:
            raise WrongEpoch(answer.message.encode())
        if answer.code == TransferFailed.code:
            raise TransferFailed(answer.message)
    return wire.raise_if_failed(answer)
