"""Which segments blocks are of: told from the chains that a client has seen lately."""

from __future__ import annotations

from collections import deque

import numpy as np

from kvstore import commands as c
from kvstore.cluster.placement import place_of, places_of, segment_blocks
from kvstore.layout import Layout
from kvstore.session.requests import PutRequest

_CHAINS = 64  # whose segments are remembered for later calls


class Chains:
    """The latest chains from their beginnings; thread-safe."""

    def __init__(self) -> None:
        self._chains: deque[c.U8] = deque(maxlen=_CHAINS)

    def places(self, layout: Layout, chain: c.U8) -> c.U64:
        """Of a chain from its beginning, or of one that a match or put has shown before: uint64
        (n,)."""
        segment = segment_blocks(layout.block_tokens)
        known = self._with(chain[0].tobytes())
        if known is not None:
            at, earlier = known
            if at:
                head = earlier[at // segment * segment].tobytes()
                return places_of(chain, position=at, segment=segment, first_place=place_of(head))
        self._chains.append(chain)
        return places_of(chain, position=0, segment=segment)

    def places_of_put(self, put: PutRequest) -> c.U64:
        """Of blocks that are to be put: uint64 (n,)."""
        segment = segment_blocks(put.namespace.layout.block_tokens)
        if put.position <= 0 or put.position % segment == 0:
            return places_of(put.chain, position=put.position, segment=segment)
        known = self._with(put.parent) if put.parent else None
        first_place = None
        if known is not None and known[0] == put.position - 1:
            head = known[1][put.position // segment * segment]
            first_place = place_of(head.tobytes())
        return places_of(put.chain, position=put.position, segment=segment, first_place=first_place)

    def remember(self, put: PutRequest) -> None:
        """So that what follows in the chain finds its segment."""
        if put.position == 0:
            self._chains.append(put.chain)
        elif put.position > 0 and put.parent:
            known = self._with(put.parent)
            if known is not None and known[0] == put.position - 1:
                self._chains.append(np.concatenate((known[1][: put.position], put.chain)))

    def _with(self, key: bytes) -> tuple[int, c.U8] | None:
        """The position of a key in the latest chain that has it, and that chain."""
        wanted = np.frombuffer(key, np.uint64)
        for chain in reversed(self._chains.copy()):
            words = np.ascontiguousarray(chain).view(np.uint64).reshape(-1, 4)
            found = np.flatnonzero(words[:, 0] == wanted[0])
            for at in found.tolist():
                if (words[at] == wanted).all():
                    return at, chain
        return None
