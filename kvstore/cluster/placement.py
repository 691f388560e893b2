"""Where blocks belong: weighted rendezvous hashing of their segments over the members.

A segment is a run of consecutive blocks of one chain, at most `SEGMENT_TOKENS` tokens of them,
named by the key of its first block. All blocks of a segment have one *place*, 64 bits of that
name; a block without a chain is a segment of its own. The score of a member for a place is
`weight / -ln(u)` with u uniform from a hash of both (Thaler and Ravishankar 1998; the weights as in
Schindelhauer and Schomaker 2005), so a member that comes or goes moves only what it gains or loses.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.ma  # np.unique loads it, which the first get should not wait for
import numpy.typing as npt
import xxhash

from kvstore.cluster.members import MemberState, View

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


class Ranking:
    """Who comes first for a place, in one view.

    `targets` rank the members that new blocks go to (up or joining); `earlier` those that older
    blocks may still be with (up or draining).
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.copies = view.replicas
        seeds = [xxhash.xxh3_64_intdigest(member.name.encode()) for member in view.members]
        self._seeds = np.array(seeds, np.uint64)
        self._weights = np.array([member.weight for member in view.members], np.float64)
        states = [member.state for member in view.members]
        up, joining, draining = MemberState.UP, MemberState.JOINING, MemberState.DRAINING
        self._new = np.array([s in (up, joining) for s in states], bool)
        self._old = np.array([s in (up, draining) for s in states], bool)

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

    def _ranked(self, places: U64, allowed: npt.NDArray[np.bool_], most: int | None) -> Ranks:
        numbers = np.flatnonzero(allowed)
        k = min(most or self.copies + SPARE, len(numbers))
        if k <= 0 or not len(places):
            return np.empty((len(places), max(k, 0)), np.int16)
        scores = self._scores(places, numbers)
        if k < len(numbers):
            best = np.argpartition(-scores, k - 1, axis=1)[:, :k]
        else:
            best = np.broadcast_to(np.arange(k), (len(places), k))
        order = np.argsort(-np.take_along_axis(scores, best, axis=1), axis=1, kind="stable")
        ranked: Ranks = numbers[np.take_along_axis(best, order, axis=1)].astype(np.int16)
        return ranked

    def _scores(self, places: U64, numbers: npt.NDArray[np.intp]) -> npt.NDArray[np.float64]:
        mixed = places[:, None] ^ self._seeds[numbers][None, :]
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
        mixed ^= mixed >> np.uint64(31)
        uniform = ((mixed >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
        scores: npt.NDArray[np.float64] = self._weights[numbers] / -np.log(uniform)
        return scores


def overloaded(used: Sequence[int], weights: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which members hold more than `OVERLOAD` times their share of all bytes; bool (n,)."""
    share = np.asarray(weights, np.float64)
    loads = np.asarray(used, np.float64)
    fair = loads.sum() * share / share.sum() if len(share) else loads
    above: npt.NDArray[np.bool_] = loads > OVERLOAD * np.maximum(fair, 1.0)
    return above
