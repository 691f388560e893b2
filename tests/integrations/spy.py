"""A client that notes its calls."""

from __future__ import annotations

from typing import Any

from kvstore_client import KVStoreClient


class Spy:
    """Hands all calls on. calls: (name, args, kwargs) of each."""

    def __init__(self, client: KVStoreClient) -> None:
        self.client = client
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.client, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append((name, args, kwargs))
            return method(*args, **kwargs)

        return call

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """Arguments of the calls of one method."""
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]

    def count(self, name: str) -> int:
        """How often it was called."""
        return len(self.of(name))
