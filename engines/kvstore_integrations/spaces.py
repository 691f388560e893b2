"""The namespaces of one engine process, opened in the background as tenants turn up."""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import monotonic
from typing import Protocol

from kvstore import Layout, NamespaceHandle
from kvstore.errors import InvalidArgument, KVStoreError
from kvstore_integrations.identity import Identity
from kvstore_integrations.settings import ConfigurationError

_RETRY_S, _MOST_RETRY_S = 1.0, 30.0  # after a namespace could not be opened; doubled each time
_MOST_KEPT = 1024  # tenants; a store has no more namespaces either
log = logging.getLogger(__name__)


class Opener(Protocol):
    """What this needs of a client."""

    def open_namespace(
        self, name: str, layout: Layout, *, timeout_s: float | None = None
    ) -> NamespaceHandle: ...


@dataclass(slots=True)
class _Opening:
    """A namespace: being opened, open, or to be opened again `wait_s` after it was seen to fail."""

    future: Future[NamespaceHandle]
    wait_s: float = _RETRY_S
    retry_at_s: float = 0.0


class Spaces:
    """The tenants' namespaces of one kind of block. Calls are made by one thread.

    identity, block_bytes, block_tokens: of all of them. `ConfigurationError` for sizes that no
    store takes.
    """

    def __init__(
        self, client: Opener, identity: Identity, *, block_bytes: int, block_tokens: int
    ) -> None:
        self._client, self._identity = client, identity
        try:
            self._layout = identity.layout(block_bytes=block_bytes, block_tokens=block_tokens)
        except InvalidArgument as error:
            raise ConfigurationError(
                f"blocks of {block_tokens} tokens take {block_bytes} bytes, which the store does "
                f"not: {error}. Choose other blocks in the engine's configuration."
            ) from error
        self._by_tenant: dict[str, _Opening] = {}
        self._opener = ThreadPoolExecutor(1, "kvstore-open")

    def open_now(self, tenant: str) -> NamespaceHandle:
        """Opens the tenant's namespace, waiting for it. Errors: those of the client, and
        `ConfigurationError` where the store can never hold such blocks."""
        opening = self._begin(tenant)
        try:
            return opening.future.result()
        except InvalidArgument as error:
            raise ConfigurationError(
                f"the store takes no blocks of {self._layout.block_bytes} bytes: {error}. Give it "
                "more memory (`kvstore-server --dram`), or choose smaller blocks in the engine's "
                "configuration."
            ) from error

    def get(self, tenant: str) -> NamespaceHandle | None:
        """The tenant's namespace, if it is open; else it is opened in the background. Never waits.

        A store that is away or full costs a line in the log, and is asked again later.
        """
        opening = self._by_tenant.get(tenant) or self._begin(tenant)
        if not opening.future.done():
            return None
        error = opening.future.exception()
        if error is None:
            return opening.future.result()
        if not isinstance(error, KVStoreError):
            raise error
        now = monotonic()
        if not opening.retry_at_s:
            log.warning("no blocks for tenant %s, its namespace does not open: %s", tenant, error)
            opening.retry_at_s = now + opening.wait_s
        elif now >= opening.retry_at_s:
            self._begin(tenant).wait_s = min(2 * opening.wait_s, _MOST_RETRY_S)
        return None

    def is_opening(self, tenant: str) -> bool:
        """Whether `get` may have it soon."""
        opening = self._by_tenant.get(tenant)
        return opening is not None and not opening.future.done()

    def close(self) -> None:
        """Ends the thread."""
        self._opener.shutdown(wait=True, cancel_futures=True)

    def _begin(self, tenant: str) -> _Opening:
        if len(self._by_tenant) >= _MOST_KEPT:
            self._by_tenant.clear()
        name = self._identity.namespace(tenant)
        opening = _Opening(self._opener.submit(self._client.open_namespace, name, self._layout))
        self._by_tenant[tenant] = opening
        return opening
