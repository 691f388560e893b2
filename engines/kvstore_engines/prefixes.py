"""The engine's dealings with a block store: prefixes taken, blocks offered, sessions ended.

A store that fails costs the engine a miss and a line in the log, never a request.
"""

import logging
import secrets

import numpy as np

from kvstore.errors import Unavailable
from kvstore_engines.paged import PagePool
from kvstore_engines.parallel import Parallel
from kvstore_engines.sequence import Sequence
from kvstore_engines.store_port import MISS, BlockStore, EndsSessions, GetResult
from kvstore_kernels.ranges import GET, PUT, span

log = logging.getLogger(__name__)
PUT_ID_BYTES = 16


class Prefixes:
    """One rank's share of the blocks of sequences whose pages lie in `pool`.

    writes: whether this rank puts; where all ranks hold the same bytes, one of them is enough.
    Whether a call reaches the collective calls in it depends only on what all ranks know alike;
    nothing that can fail on one rank alone comes between.
    """

    def __init__(
        self,
        store: BlockStore | None,
        pool: PagePool,
        block_tokens: int,
        parallel: Parallel,
        *,
        writes: bool = True,
    ) -> None:
        self._writes = writes
        self._store = store
        self._pool = pool
        self._block_tokens = block_tokens
        self._parallel = parallel

    def fetch(self, sequence: Sequence) -> GetResult:
        """Fills the prompt's leading pages with as many blocks as every rank could get.

        One prompt token always stays uncomputed: its forward pass yields the first new token.
        """
        blocks = (sequence.prompt_tokens - 1) // self._block_tokens
        if self._store is None or not blocks:
            return MISS
        found = self._get(self._store, sequence, blocks)
        n_hit = self._parallel.agree_min(found.n_hit)
        return GetResult(n_hit, found.tier) if n_hit else MISS

    def offer(self, sequence: Sequence) -> None:
        """Puts the blocks completed since the last offer; a failure leaves them not stored."""
        first, last = sequence.offered_blocks, sequence.computed // self._block_tokens
        if self._store is None or first == last:
            return
        sequence.offered_blocks = last
        put_id = self._parallel.broadcast_bytes(secrets.token_bytes(PUT_ID_BYTES))
        if not self._writes:
            return
        try:
            sequence.stored_blocks += self._put(self._store, sequence, first, last, put_id)
        except Exception as error:
            _warn("put failed, blocks are not stored", error)

    def end(self, sequence: Sequence) -> None:
        """Tells the store, once for all ranks, that the sequence's session is over."""
        store: object = self._store
        if self._parallel.rank or not sequence.offered_blocks:
            return
        if not isinstance(store, EndsSessions):
            return
        try:
            store.hint_session_ends(sequence.chain[: sequence.offered_blocks])
        except Exception as error:
            _warn("hint failed, the store does not know of a session's end", error)

    @span(GET)
    def _get(self, store: BlockStore, sequence: Sequence, blocks: int) -> GetResult:
        try:
            self._extend_chain(store, sequence, blocks)
            pages = sequence.pages[:blocks]
            found = store.get_into(sequence.chain[:blocks], self._pool.rows_to_fill(pages))
            self._pool.filled(pages[: found.n_hit])
        except Exception as error:
            _warn("get failed, prefix is computed instead", error)
            return MISS
        return found if 0 < found.n_hit <= blocks else MISS

    @span(PUT)
    def _put(
        self, store: BlockStore, sequence: Sequence, first: int, last: int, put_id: bytes
    ) -> int:
        self._extend_chain(store, sequence, last)
        return store.put(
            sequence.chain[first:last],
            self._pool.rows_of(sequence.pages[first:last]),
            put_id=put_id,
            parent=sequence.chain[first - 1].tobytes() if first else b"",
            position=first,
        )

    def _extend_chain(self, store: BlockStore, sequence: Sequence, blocks: int) -> None:
        """Hashes the blocks that the chain lacks up to `blocks`, and none twice."""
        known = len(sequence.chain)
        if known >= blocks:
            return
        size = self._block_tokens
        fresh = sequence.token_ids[known * size : blocks * size]
        parent = sequence.chain[-1].tobytes() if known else b""
        sequence.chain = np.concatenate((sequence.chain, store.chain(fresh, parent)))


def _warn(what: str, error: Exception) -> None:
    # That a store is away needs no trace; anything else is somebody's bug.
    log.warning("%s: %s", what, error, exc_info=not isinstance(error, Unavailable))
