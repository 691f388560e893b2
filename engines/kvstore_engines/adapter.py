"""The engine's `BlockStore` on a real store: a client of the daemon, or the embedded one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore import Hint, HintKind, Hit, Layout, Session, Tier, hash_chain
from kvstore_engines.store_port import MISS, GetResult

# Slowest last: what a run of hits took is what its slowest block took.
SPEED_ORDER = (Tier.HBM, Tier.DRAM, Tier.NVME)


class SessionStore:
    """Blocks of one layout, or those of their cells that hold `heads`, in a namespace.

    heads: the key/value heads of this rank, None for all. Raises what `Session.open_namespace`
    and `Layout.cells_of` raise.
    """

    def __init__(
        self, session: Session, name: str, layout: Layout, heads: range | None = None
    ) -> None:
        self._session = session
        self._cells = layout.cells_of(heads=heads)
        self._namespace = session.open_namespace(name, layout)

    def chain(self, token_ids: Sequence[int], parent: bytes = b"") -> NDArray[np.uint8]:
        """See `BlockStore.chain`; the hashes are keyed by the namespace's secret."""
        namespace = self._namespace
        return hash_chain(
            token_ids,
            block_tokens=namespace.layout.block_tokens,
            key=namespace.key,
            parent=parent or None,
        )

    def get_into(
        self, hashes: NDArray[np.uint8], destinations: Sequence[NDArray[np.uint8]]
    ) -> GetResult:
        """See `BlockStore.get_into`."""
        answers = self._session.get_into(self._namespace, hashes, destinations, cells=self._cells)
        tiers = [answer.tier for answer in answers if isinstance(answer, Hit)]
        return GetResult(len(tiers), str(max(tiers, key=SPEED_ORDER.index))) if tiers else MISS

    def put(
        self,
        hashes: NDArray[np.uint8],
        sources: Sequence[NDArray[np.uint8]],
        *,
        put_id: bytes,
        parent: bytes = b"",
        position: int = 0,
    ) -> int:
        """See `BlockStore.put`; blocks that other ranks still owe cells of count too."""
        put = self._session.put(
            self._namespace,
            hashes,
            sources,
            put_id=put_id,
            cells=self._cells,
            parent=parent,
            position=position,
        )
        return put.stored + put.waiting

    def hint_session_ends(self, hashes: NDArray[np.uint8]) -> None:
        """See `EndsSessions.hint_session_ends`: the store evicts these blocks first."""
        self._session.hint(self._namespace, hashes, Hint(kind=HintKind.SESSION_ENDS))
