"""The engine's `BlockStore` on a real store: a client of the daemon, or the embedded one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore import Hit, Layout, hash_chain
from kvstore.session import LocalSession
from kvstore_engines.store_port import GetResult


class SessionStore:
    """Blocks of one layout, in the namespace `name` of `session`."""

    def __init__(self, session: LocalSession, name: str, layout: Layout) -> None:
        self._session = session
        self._namespace = session.open_namespace(name, layout)

    def chain(self, token_ids: Sequence[int]) -> NDArray[np.uint8]:
        """Keyed hashes of the full blocks, (n, 32) uint8."""
        namespace = self._namespace
        return hash_chain(token_ids, block_tokens=namespace.layout.block_tokens, key=namespace.key)

    def get_into(
        self, hashes: NDArray[np.uint8], destinations: Sequence[NDArray[np.uint8]]
    ) -> GetResult:
        """Fills the leading destinations that are stored."""
        hits = [
            answer
            for answer in self._session.get_into(self._namespace, hashes, destinations)
            if isinstance(answer, Hit)
        ]
        return GetResult(len(hits), str(hits[-1].tier) if hits else None)

    def put(self, hashes: NDArray[np.uint8], sources: Sequence[NDArray[np.uint8]]) -> int:
        """Stores what is missing; returns how many blocks are new."""
        return self._session.put(self._namespace, hashes, sources).stored
