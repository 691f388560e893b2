"""Which segments blocks are of: told from the chains that a client has seen lately."""

from __future__ import annotations

import threading
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from kvstore import commands as c
from kvstore.cluster.placement import place_of, places_of, segment_blocks
from kvstore.layout import Layout
from kvstore.session.requests import PutRequest

_CHAINS = 64  # whose segments are remembered for later calls


@dataclass(frozen=True, slots=True, eq=False)
class _Known:
    """Chains, the latest last. words: the first 8 bytes of all of their keys, so that one pass over
    one array finds a key in any of them; ends: where each chain's end."""

    chains: tuple[c.U8, ...]
    words: c.U64
    ends: tuple[int, ...]


@dataclass(slots=True, eq=False)
class _Latest:
    """The latest chain from its beginning, and the places of its blocks. known: whether it is among
    the chains that are remembered."""

    chain: c.U8
    segment: int
    places: c.U64
    known: bool


class Chains:
    """The latest chains from their beginnings; thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known = _Known((), np.empty(0, np.uint64), ())
        self._latest: _Latest | None = None

    def places(self, layout: Layout, chain: c.U8) -> c.U64:
        """Of a chain from its beginning, or of one that a match or put has shown before: uint64
        (n,)."""
        segment = segment_blocks(layout.block_tokens)
        latest = self._latest  # most often that which has just been put, or matched
        if latest and latest.segment == segment and np.array_equal(latest.chain, chain):
            if not latest.known:
                self._add(chain)
                latest.known = True
            return latest.places
        known = self._with(chain[0].tobytes())
        if known is not None:
            at, earlier = known
            if at:
                head = earlier[at // segment * segment].tobytes()
                return places_of(chain, position=at, segment=segment, first_place=place_of(head))
        self._add(chain)
        places = places_of(chain, position=0, segment=segment)
        return self._noted(chain, segment, places, known=True)

    def places_of_put(self, put: PutRequest) -> c.U64:
        """Of blocks that are to be put: uint64 (n,)."""
        segment = segment_blocks(put.namespace.layout.block_tokens)
        if put.position <= 0 or put.position % segment == 0:
            places = places_of(put.chain, position=put.position, segment=segment)
            if put.position == 0:
                self._noted(put.chain, segment, places, known=False)
            return places
        known = self._with(put.parent) if put.parent else None
        first_place = None
        if known is not None and known[0] == put.position - 1:
            head = known[1][put.position // segment * segment]
            first_place = place_of(head.tobytes())
        return places_of(put.chain, position=put.position, segment=segment, first_place=first_place)

    def _noted(self, chain: c.U8, segment: int, places: c.U64, *, known: bool) -> c.U64:
        places.setflags(write=False)
        self._latest = _Latest(chain.copy(), segment, places, known)
        return places

    def remember(self, put: PutRequest) -> None:
        """So that what follows in the chain finds its segment."""
        if put.position == 0:
            self._add(put.chain)
            latest = self._latest
            if latest and np.array_equal(latest.chain, put.chain):
                latest.known = True
        elif put.position > 0 and put.parent:
            known = self._with(put.parent)
            if known is not None and known[0] == put.position - 1:
                self._add(np.concatenate((known[1][: put.position], put.chain)))

    def _with(self, key: bytes) -> tuple[int, c.U8] | None:
        """The position of a key in the latest chain that has it, and that chain."""
        known = self._known
        found = np.flatnonzero(known.words == np.frombuffer(key, np.uint64, 1)[0])
        for at in reversed(found.tolist()):
            which = bisect_right(known.ends, at)
            chain = known.chains[which]
            row = at - (known.ends[which] - len(chain))
            if chain[row].tobytes() == key:
                return row, chain
        return None

    def _add(self, chain: c.U8) -> None:
        words = np.ascontiguousarray(chain[:, :8]).view(np.uint64)[:, 0]
        with self._lock:
            known = self._known
            over = 0 if len(known.chains) < _CHAINS else known.ends[0]
            chains = (*known.chains, chain)[-_CHAINS:]
            self._known = _Known(
                chains=chains,
                words=np.concatenate((known.words[over:], words)),
                ends=tuple(accumulate(len(each) for each in chains)),
            )
