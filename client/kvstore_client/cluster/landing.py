"""Blocks of a get, looked at while they land, on the thread of who asked for them.

Nodes write a block from its header to its end, and one block after another. So what was written
over the mark at a block's end has most likely landed whole, and its header says for certain: bytes
that are not what it says count as not landed, and are looked at again when the node has answered.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from kvstore import commands as c
from kvstore.session.base import Bytes1D
from kvstore_client.cluster.memory import LandingRing, landing_bytes

WORTH_WATCHING = 2 << 20  # fewer bytes have landed by the time that somebody has looked twice
_HEAD_SHARE = 16  # of a block its header may be, to land beside it
_FIRST_NAP_S = 1e-3  # until bytes come at all; each time that none have, twice as long
_LEAST_NAP_S, _MOST_NAP_S, _LONGEST_NAP_S = 3e-4, 2e-3, 2e-2
_AWAKE_S = 2e-3  # in all that one get waits without a nap, where the least is too long
_ONCE_BYTES = 2 << 20  # looked at in one go, while the session's loop may wait for this thread
_TRIES = 8  # of a piece whose blocks were not what their headers say


class Verify(Protocol):
    """Takes rows of the get where they have landed."""

    def __call__(
        self, rows: npt.NDArray[np.intp], addresses: c.U64, headers: c.U8
    ) -> npt.NDArray[np.bool_]:
        """Which of them are as they were put; headers (n, bytes) are copies."""


@dataclass(slots=True, eq=False)
class _Spot:
    """A piece of the get. room: uint8 (n, bytes from one block to the next), where it lands."""

    rows: npt.NDArray[np.intp]
    addresses: c.U64
    sound: npt.NDArray[np.bool_]
    room: Bytes1D
    tries: int = _TRIES


class Landings:
    """Implements `Watch`. n: blocks of the get, of nbytes each. head: bytes of a header."""

    def __init__(
        self, ring: LandingRing, n: int, nbytes: int, *, head: int, verify: Verify
    ) -> None:
        self._ring, self._nbytes, self._verify = ring, nbytes, verify
        self.head = head
        self._mark = np.frombuffer(_MARK, np.uint8)[-nbytes:]
        self._mark_bytes = self._mark.tobytes()
        self._lock = threading.Lock()
        self._spots: dict[int, _Spot] = {}  # by their first address
        self._sound = np.zeros(n, bool)

    @staticmethod
    def worth_it(n: int, nbytes: int, head: int) -> bool:
        """Whether to watch a get of n blocks of nbytes."""
        return n * nbytes >= WORTH_WATCHING and nbytes >= _HEAD_SHARE * head

    @property
    def complete(self) -> bool:
        """Whether every block has been seen to land, as it was put."""
        return bool(self._sound.all())

    def expect(
        self, rows: npt.NDArray[np.intp], addresses: c.U64, sound: npt.NDArray[np.bool_]
    ) -> None:
        """See `Watch.expect`."""
        step = landing_bytes(self.head + self._nbytes)
        first = int(addresses[0])
        room = self._ring.row(first - self.head, step * len(rows)).reshape(len(rows), step)
        end = self.head + self._nbytes
        room[:, : self.head] = 0  # an earlier get's header is none of this one's
        room[:, end - len(self._mark) : end] = self._mark
        with self._lock:
            self._spots[first] = _Spot(rows, addresses, sound, room)

    def forget(self, addresses: c.U64) -> None:
        """See `Watch.forget`."""
        with self._lock:
            self._spots.pop(int(addresses[0]), None)

    def follow(self, over: Callable[[], bool], end_s: float) -> None:
        """Looks until all is `complete`, the get is over, or the time is."""
        begin_s, nap_s, before = time.monotonic(), _FIRST_NAP_S, 0
        awake_s = _AWAKE_S  # is left of it
        while not over() and (now_s := time.monotonic()) < end_s:
            if nap_s > _LEAST_NAP_S or awake_s <= 0.0:
                time.sleep(min(nap_s, end_s - now_s))
            else:
                self._stay_awake(min(awake_s, end_s - now_s))
                awake_s -= time.monotonic() - now_s
            self._look()
            seen = int(np.count_nonzero(self._sound))
            left = len(self._sound) - seen
            if not left:
                return
            if seen > before:  # half of the time that the rest may take, so as to be there early
                took_s = time.monotonic() - begin_s
                nap_s = min(max(took_s * left / seen / 2, _LEAST_NAP_S), _MOST_NAP_S)
            else:
                nap_s = min(2 * nap_s, _LONGEST_NAP_S)
            before = seen

    def _stay_awake(self, most_s: float) -> None:
        """Waits for another block without a nap, for so long at most: at the end of a get there is
        nothing beside which one that is too long would not be seen."""
        end_s = time.monotonic() + most_s
        while self._spots and not self._has_more() and time.monotonic() < end_s:
            time.sleep(0)  # so that others may have the interpreter's lock

    def _has_more(self) -> bool:
        """Whether the next block of some piece has landed."""
        end = self.head + self._nbytes
        with self._lock:
            for spot in self._spots.values():
                at = int(spot.sound.argmin())
                if spot.tries and not spot.sound[at]:
                    mark = spot.room[at, end - len(self._mark_bytes) : end].tobytes()
                    if mark != self._mark_bytes:
                        return True
        return False

    def _look(self) -> None:
        for first in list(self._spots):
            while self._look_at(first):
                pass

    def _look_at(self, first: int) -> bool:
        """Takes some blocks of a piece that have landed; whether there may be more of them."""
        most = max(1, _ONCE_BYTES // self._nbytes)
        with self._lock:
            spot = self._spots.get(first)
            if spot is None or not spot.tries:
                return False
            waiting = np.flatnonzero(~spot.sound)
            end = self.head + self._nbytes
            ends = spot.room[waiting, end - len(self._mark) : end]
            landed = waiting[(ends != self._mark).any(axis=1)]
            came = landed[:most]
            if not len(came):
                return False
            sound = self._verify(
                spot.rows[came], spot.addresses[came], spot.room[came, : self.head]
            )
            spot.tries -= not sound.all()
            spot.sound[came] = sound
            self._sound[spot.rows[came[sound]]] = True
        return bool(sound.all()) and len(landed) > most


# Where a block ends, until it has landed there. Blocks that end so are seen when the node answers.
_MARK = bytes.fromhex("9e3779b97f4a7c15")
