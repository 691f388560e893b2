"""Where blocks belong: weighted rendezvous hashing of their segments over the members.

A segment is a run of consecutive blocks of one chain, at most `SEGMENT_TOKENS` tokens of them,
named by the key of its first block. All blocks of a segment have one *place*, 64 bits of that
name; a block without a chain is a segment of its own. The score of a member for a place is
`weight / -ln(u)` with u uniform from a hash of both (Thaler and Ravishankar 1998; the weights as in
Schindelhauer and Schomaker 2005), so a member that comes or goes moves only what it gains or loses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.ma  # np.unique loads it, which the first get should not wait for
import numpy.typing as npt
import xxhash
from numba import types

from kvstore.cluster.members import MemberState, View
from kvstore.compiled import compiled

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
Ranks = npt.NDArray[np.int16]

SEGMENT_TOKENS = 512
SPARE = 1  # ranks behind the R best that may stand in for one of them
OVERLOAD = 1.25  # times the mean load: above it a member's blocks go to the next rank
PUT_ID_BYTES = 16
_PLACE_BYTES = 8
_PLACED = b"\xc1\x05"  # how put ids begin whose blocks a cluster placed
NONCE_BYTES = 8 - len(_PLACED)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # of splitmix64


def segment_blocks(block_tokens: int) -> int:
    """How many blocks of so many tokens a segment has, at least one."""
    return max(1, SEGMENT_TOKENS // block_tokens)


def place_of(key: bytes) -> int:
    """The place of the segment that begins with the block of this 32-byte key."""
    return xxhash.xxh3_64_intdigest(key)


def places_of(chain: U8, *, position: int, segment: int, first_place: int | None = None) -> U64:
    """The place of each of n consecutive blocks, uint64 (n,).

    chain: uint8 (n, 32). position: of the first one in its chain, negative where there is none:
    then each block stands alone. segment: blocks of one. first_place: of the segment that the
    first block is in, where that began earlier; unknown, the first block stands for its beginning.
    """
    n = len(chain)
    if position < 0:
        return np.array([place_of(key.tobytes()) for key in chain], np.uint64)
    first = position // segment
    numbers = (position + np.arange(n)) // segment - first
    heads = np.maximum(np.arange(numbers[-1] + 1 if n else 0) * segment - position % segment, 0)
    names = [place_of(chain[at].tobytes()) for at in heads.tolist()]
    if names and position % segment and first_place is not None:
        names[0] = first_place
    return np.array(names, np.uint64)[numbers] if n else np.empty(0, np.uint64)


def new_put_id(nonce: bytes, place: int) -> bytes:
    """A put id of blocks of one place: it names the attempt, and tells every node that stores it
    where the blocks belong. nonce: `NONCE_BYTES`, new for each attempt."""
    return _PLACED + nonce + place.to_bytes(_PLACE_BYTES, "little")


def nonce_of(put_id: bytes) -> bytes:
    """The nonce of a put that several clients make together, of the put id that they agreed on:
    the same at all of them."""
    return xxhash.xxh3_64_digest(put_id)[:NONCE_BYTES]


def places_of_put_ids(put_ids: U8) -> tuple[U64, npt.NDArray[np.bool_]]:
    """The places that put ids (n, 16) carry, uint64 (n,), and which of them do, bool (n,): others
    are of blocks that some client put into one node's store, for itself alone."""
    places = np.ascontiguousarray(put_ids[:, -_PLACE_BYTES:]).view("<u8").ravel()
    placed = (put_ids[:, : len(_PLACED)] == np.frombuffer(_PLACED, np.uint8)).all(axis=1)
    return places.astype(np.uint64), placed


class _Allowed:
    """Members of a view that are in one of these states: numbers int16 (n,), seeds uint64 (n,),
    weights float64 (n,)."""

    def __init__(self, view: View, states: Sequence[MemberState]) -> None:
        numbers = [n for n, member in enumerate(view.members) if member.state in states]
        some = [view.members[n] for n in numbers]
        seeds = [xxhash.xxh3_64_intdigest(member.name.encode()) for member in some]
        self.numbers = np.array(numbers, np.int16)
        self.seeds = np.array(seeds, np.uint64)
        self.weights = np.array([member.weight for member in some], np.float64)


class Ranking:
    """Who comes first for a place, in one view.

    `targets` rank the members that new blocks go to (up or joining); `earlier` those that older
    blocks may still be with (up or draining).
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.copies = view.replicas
        up, joining, draining = MemberState.UP, MemberState.JOINING, MemberState.DRAINING
        self._new = _Allowed(view, (up, joining))
        self._old = _Allowed(view, (up, draining))

    def targets(self, places: U64, *, most: int | None = None) -> Ranks:
        """The members' numbers in the order in which blocks of these places prefer them.

        int16 (n, k), k = `most` or R + SPARE, fewer where there are fewer members.
        """
        return self._ranked(places, self._new, most)

    def earlier(self, places: U64) -> Ranks:
        """As `targets`, of the members that older blocks may be with."""
        return self._ranked(places, self._old, None)

    def readers(self, place: int, extra: int = 0) -> list[int]:
        """Every member that may hold blocks of a place, the likeliest first. extra: how many more
        copies it has, because it is hot."""
        at = np.array([place], np.uint64)
        most = self.copies + SPARE + extra
        found: list[int] = self.targets(at, most=most)[0].tolist()
        if not self.view.settled:
            found += [n for n in self.earlier(at)[0].tolist() if n not in found]
        return found

    def _ranked(self, places: U64, allowed: _Allowed, most: int | None) -> Ranks:
        k = min(most or self.copies + SPARE, len(allowed.numbers))
        ranked = np.empty((len(places), max(k, 0)), np.int16)
        if ranked.size:
            _rank(places, allowed.seeds, allowed.weights, allowed.numbers, ranked)
        return ranked


def _rank_each(places, seeds, weights, numbers, ranked):  # type: ignore[no-untyped-def] # compiled
    """Fills ranked (n, k) with the k best of all numbers for each place; of equals the first."""
    k = ranked.shape[1]
    best = np.empty(k, np.float64)
    for row in range(len(places)):
        found = 0
        for member in range(len(numbers)):
            mixed = places[row] ^ seeds[member]
            mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
            mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
            mixed ^= mixed >> np.uint64(31)
            uniform = (np.float64(mixed >> np.uint64(11)) + 0.5) * 2.0**-53
            score = weights[member] / -math.log(uniform)
            if found == k and score <= best[k - 1]:
                continue
            at = min(found, k - 1)
            while at and best[at - 1] < score:
                best[at] = best[at - 1]
                ranked[row, at] = ranked[row, at - 1]
                at -= 1
            best[at] = score
            ranked[row, at] = numbers[member]
            found = min(found + 1, k)


_I16, _F64 = types.int16, types.float64
# A get ranks first of all, when nothing of it is in the processor's caches: one call of a small
# loop is a quarter of a millisecond less there than a dozen of numpy's.
_rank = compiled(
    types.void(
        types.Array(types.uint64, 1, "A", readonly=True),
        types.uint64[::1],
        _F64[::1],
        _I16[::1],
        _I16[:, ::1],
    ),
    _rank_each,
)


def overloaded(used: Sequence[int], weights: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which members hold more than `OVERLOAD` times their share of all bytes; bool (n,)."""
    share = np.asarray(weights, np.float64)
    loads = np.asarray(used, np.float64)
    fair = loads.sum() * share / share.sum() if len(share) else loads
    above: npt.NDArray[np.bool_] = loads > OVERLOAD * np.maximum(fair, 1.0)
    return above
