"""Segments that are read much get more copies, and lose them again."""

from __future__ import annotations

import numpy as np

from kvstore.cluster.copies import Held, groups, hold_for_copies, push
from kvstore.cluster.members import Member
from kvstore.cluster.site import Site, Space
from kvstore.errors import KVStoreError


class Heat:
    """Counts reads of segments in windows of `hot_ms`; at most `most_hot` segments are known.

    A hot segment has `hot_copies` more copies, on the next members of its ranking, as long as it
    stays hot; then those are like any block that does not belong where it is.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._reads: dict[int, int] = {}
        self._hot: dict[int, int] = {}  # by place: windows for which it stays hot
        self._due: dict[int, tuple[Space, list[bytes]]] = {}

    def read(self, held: Held) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
        """Blocks were read; how many more copies each one's segment has, uint8 (n,)."""
        site, extra = self._site, self._site.policy.hot_copies
        answer = np.zeros(len(held.hashes), np.uint8)
        for rows in groups(held.places):
            place = int(held.places[rows[0]])
            if place not in self._reads and len(self._reads) >= site.policy.most_hot:
                continue
            self._reads[place] = self._reads.get(place, 0) + 1
            if place in self._hot:
                answer[rows] = extra
            elif self._reads[place] >= site.policy.hot_reads and place not in self._due:
                keys = [held.hashes[row].tobytes() for row in rows.tolist()]
                self._due[place] = (held.space, keys)
        return answer

    async def run(self) -> None:
        """For ever: spreads what has become hot, and forgets what no longer is."""
        site = self._site
        step_ms = site.policy.hot_ms / 10
        left_ms = site.policy.hot_ms
        while True:
            await site.world.sleep(step_ms)
            left_ms -= step_ms
            due, self._due = self._due, {}
            for place, (space, keys) in due.items():
                if await self._spread(place, space, keys):
                    self._hot[place] = 2
            if left_ms <= 0:
                left_ms = site.policy.hot_ms
                self._cool()
            site.counters.hot_segments = len(self._hot)

    def _cool(self) -> None:
        again = {p for p, n in self._reads.items() if n >= self._site.policy.hot_reads}
        self._hot = {p: 2 if p in again else n - 1 for p, n in self._hot.items()}
        self._hot = {p: n for p, n in self._hot.items() if n > 0}
        self._reads.clear()

    async def _spread(self, place: int, space: Space, keys: list[bytes]) -> bool:
        """Whether the segment is on more members than it has to be."""
        site, view = self._site, self._site.view
        copies = view.replicas + site.policy.hot_copies
        (ranked,) = site.ranked(np.array([place], np.uint64), site.policy.hot_copies)
        others = site.partners_of(ranked)
        chosen: list[Member] = others[: copies - 1]
        hashes = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), -1)
        done = 0
        try:
            async with hold_for_copies(site, space, hashes, site.policy.call_ms) as held:
                if not len(held.hashes):
                    return False
                for member in chosen:
                    await push(site, held, member, view=view, timeout_ms=site.policy.transfer_ms)
                    done += 1
        except KVStoreError:
            return False
        return done == copies - 1
