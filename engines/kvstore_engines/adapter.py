"""The engine's `BlockStore` on a real store: a client of the daemon, or the embedded one."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from kvstore import Hint, HintKind, Hit, Layout, NamespaceHandle, Session, Tier, hash_chain
from kvstore.errors import DeadlineExceeded, Unavailable
from kvstore_engines.store_port import MISS, GetResult

# Slowest last: what a run of hits took is what its slowest block took.
SPEED_ORDER = (Tier.HBM, Tier.DRAM, Tier.NVME)
# Some calls wait for a store that is away; in an engine's step they may take so long, so often.
BRIEF_S = 0.05
RETRY_S = 1.0


class SessionStore:
    """Blocks of one layout, or those of their cells that hold `heads`, in a namespace.

    heads: the key/value heads of this rank, None for all. Where the store is away the namespace
    is opened later; until then the calls raise Unavailable. Raises what `Layout.cells_of` and,
    but for a store that is away, `Session.open_namespace` raise.
    """

    def __init__(
        self, session: Session, name: str, layout: Layout, heads: range | None = None
    ) -> None:
        self._session = session
        self._name, self._layout = name, layout
        self._cells = layout.cells_of(heads=heads)
        self._namespace: NamespaceHandle | None = None
        self._next_try_s = 0.0
        with contextlib.suppress(Unavailable):
            self._opened(timeout_s=None)

    def chain(self, token_ids: Sequence[int], parent: bytes = b"") -> NDArray[np.uint8]:
        """See `BlockStore.chain`; the hashes are keyed by the namespace's secret."""
        return hash_chain(
            token_ids,
            block_tokens=self._layout.block_tokens,
            key=self._opened().key,
            parent=parent or None,
        )

    def get_into(
        self, hashes: NDArray[np.uint8], destinations: Sequence[NDArray[np.uint8]]
    ) -> GetResult:
        """See `BlockStore.get_into`."""
        answers = self._session.get_into(self._opened(), hashes, destinations, cells=self._cells)
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
            self._opened(),
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
        hint = Hint(kind=HintKind.SESSION_ENDS)
        self._session.hint(self._opened(), hashes, hint, timeout_s=BRIEF_S)

    def _opened(self, timeout_s: float | None = BRIEF_S) -> NamespaceHandle:
        """The namespace; Unavailable where it cannot be opened now, mostly without trying."""
        if self._namespace is None:
            if time.monotonic() < self._next_try_s:
                raise Unavailable(f"namespace {self._name!r} could not be opened a moment ago")
            try:
                self._namespace = self._session.open_namespace(
                    self._name, self._layout, timeout_s=timeout_s
                )
            except (Unavailable, DeadlineExceeded) as error:
                self._next_try_s = time.monotonic() + RETRY_S
                raise Unavailable(f"namespace {self._name!r} is not open: {error}") from error
        return self._namespace
