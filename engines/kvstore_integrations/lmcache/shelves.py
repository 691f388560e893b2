"""The namespaces of one LMCache process, one for each kind of object."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict

from kvstore import NamespaceHandle
from kvstore.errors import KVStoreError
from kvstore_integrations.identity import Identity
from kvstore_integrations.lmcache.names import Kind
from kvstore_integrations.settings import ConfigurationError
from kvstore_integrations.spaces import Opener, Spaces

_MOST_KINDS = 256  # a store has no more than 1024 namespaces, for all
log = logging.getLogger(__name__)


class Shelves:
    """Opens namespaces as kinds turn up, in the background; thread-safe.

    engine: how LMCache runs. identify: the weights that a model's name stands for; it may take its
    time, and raise `ConfigurationError`. facts: what else decides the bytes' meaning, as JSON has
    it. tenant: whose all objects are.
    """

    def __init__(
        self,
        client: Opener,
        engine: str,
        identify: Callable[[str], str],
        facts: Mapping[str, object],
        *,
        tenant: str,
    ) -> None:
        self._client, self._engine, self._tenant = client, engine, tenant
        self._identify, self._facts = identify, dict(facts)
        self._lock = threading.Lock()
        self._opener = ThreadPoolExecutor(1, "kvstore-open")
        self._models: dict[str, str] = {}
        # What each kind was opened for the first time by; None where it can never be.
        self._openings: dict[Kind, Future[Spaces | None]] = {}

    def get(self, kind: Kind, *, wait_s: float) -> NamespaceHandle | None:
        """The kind's namespace, if it is open.

        Waits `wait_s` at most, and only while it is being opened for the first time; where that
        fails it is tried again in the background.
        """
        with self._lock:
            opening = self._openings.get(kind)
            if opening is None and len(self._openings) < _MOST_KINDS:
                opening = self._openings[kind] = self._opener.submit(self._open, kind)
        if opening is None or not (opening.done() or wait([opening], wait_s).done):
            return None
        space = opening.result()
        if space is None:
            return None
        with self._lock:
            return space.get(self._tenant)

    def open_now(self, kind: Kind) -> None:
        """Opens the kind's namespace, waiting for it. Errors: those of the client, and
        `ConfigurationError` where such objects can never be stored."""
        space = self._space(kind)
        try:
            space.open_now(self._tenant)
        except BaseException:
            space.close()
            raise
        done: Future[Spaces | None] = Future()
        done.set_result(space)
        with self._lock:
            self._openings[kind] = done

    def close(self) -> None:
        """Ends the threads."""
        self._opener.shutdown(wait=True, cancel_futures=True)
        for opening in self._openings.values():
            space = None if opening.cancelled() else opening.result()
            if space:
                space.close()

    # -- inside ------------------------------------------------------------------------

    def _open(self, kind: Kind) -> Spaces | None:
        try:
            space = self._space(kind)
        except (ConfigurationError, OSError) as error:
            log.error("%s is not cached: %s", kind.model, error)
            return None
        try:
            space.open_now(self._tenant)
        except (KVStoreError, ConfigurationError) as error:
            log.warning("%s is not cached yet: %s", kind.model, error)
        return space

    def _space(self, kind: Kind) -> Spaces:
        model = self._models.get(kind.model) or self._identify(kind.model)
        self._models[kind.model] = model
        facts = {**self._facts, **asdict(kind)}
        del facts["model"]
        return Spaces(
            self._client,
            Identity(self._engine, model, facts),
            block_bytes=kind.nbytes,
            block_tokens=kind.tokens,
        )
