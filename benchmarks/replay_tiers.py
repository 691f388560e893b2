"""A trace through the real `Store` with NVMe behind a small pool: hits by tier.

No block's bytes move: what the store wants done on its disk is said to be done at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from benchmarks.replay_store import Client
from benchmarks.replay_trace import Chain, keys_of
from kvstore import commands as c
from kvstore.nvme.format import LOG_RECORD, VOLUME_ID_BYTES, Geometry
from kvstore.nvme.ops import CheckBlocks, Op, Outcome, ReadBlocks, WriteBlocks
from kvstore.nvme.recovery import Log, Survey
from kvstore.nvme.volume import Volume
from kvstore.store import Deferred, NvmePolicy

_STEP_MS = 1000  # between two requests: what waits to be written is written before the next
_SEGMENT_GRANULES = 1024


@dataclass(frozen=True, slots=True)
class TieredHits:
    """What became of the look-ups; they are the sum of both hits and misses.

    reinserted: blocks that were written a second time. amplification: bytes written for each byte
    of blocks that was.
    """

    policy: str
    admission: str
    lookups: int
    dram_hits: int
    nvme_hits: int
    misses: int
    written: int
    reinserted: int
    amplification: float


def replay_tiers(
    dram_blocks: int, nvme_blocks: int, policy: str, requests: Sequence[Chain], *, every: bool
) -> TieredHits:
    """All requests through a new store with room for so many blocks in memory and on NVMe."""
    volume = Volume(0, 0, _geometry(nvme_blocks), bytes(VOLUME_ID_BYTES))
    client = _TieredClient(dram_blocks, policy, volume, NvmePolicy(every=every))
    keys = keys_of(requests)
    for chain in requests:
        hashes = keys[chain]
        n = client.read(hashes)
        if n < len(hashes):
            client.put(hashes, n)
    stats = client.store.stats()
    return TieredHits(
        policy=policy,
        admission="every" if every else "read",
        lookups=client.lookups,
        dram_hits=client.hits - client.cold_hits,
        nvme_hits=client.cold_hits,
        misses=client.misses,
        written=stats.nvme_written_blocks,
        reinserted=stats.nvme_again_blocks,
        amplification=stats.nvme_written_bytes / max(1, stats.nvme_payload_bytes),
    )


def _geometry(blocks: int) -> Geometry:
    """A volume that holds about so many blocks of one granule each."""
    segment = Geometry(segment_granules=_SEGMENT_GRANULES, n_segments=1)
    return Geometry(
        segment_granules=_SEGMENT_GRANULES, n_segments=max(4, round(blocks / segment.slots(1)))
    )


class _TieredClient(Client):
    """Reads what is on NVMe as a session does: by `Fetch`, again and again."""

    def __init__(self, blocks: int, policy: str, volume: Volume, nvme: NvmePolicy) -> None:
        super().__init__(
            blocks, policy, volumes=[volume], nvme=nvme, more_rows=2 * _capacity(volume)
        )
        self.lookups = self.cold_hits = self.misses = 0
        self._now_ms = 0
        nothing = Log(half=0, epoch=0, next_number=0, next_epoch=1, records=np.empty(0, LOG_RECORD))
        self.store.nvme.found(0, Survey(uses=(), log=nothing))
        self.store.nvme.recovered(0)
        self._settle()

    def read(self, hashes: npt.NDArray[np.uint8]) -> int:
        """See `Client.read`; what comes from NVMe is counted as that."""
        self._now_ms += _STEP_MS
        self.store.tick(self._now_ms)
        self._settle()
        done, cold = 0, 0
        while done < len(hashes):
            found = self._match(hashes[done:])
            in_memory = found.granules != c.NO_SLOT
            warm = found.count if in_memory.all() else int(in_memory.argmin())
            self._touch(found, warm)
            done += warm
            if done == len(hashes) or warm == found.count:
                break
            fetched = self._fetch(hashes[done:])
            if not fetched:
                break
            cold += fetched
        self.lookups += len(hashes)
        self.hits += done
        self.cold_hits += min(cold, done)
        self.misses += len(hashes) - done
        return done

    def _fetch(self, hashes: npt.NDArray[np.uint8]) -> int:
        """How many leading ones came, which were all on NVMe but for some that were there."""
        tiers = self._match(hashes)
        before = tiers.granules == c.NO_SLOT
        self._call(c.Fetch(namespace=self._namespace, hashes=hashes, wait_ms=1000))
        self._settle()
        now = self._match(hashes).granules != c.NO_SLOT
        leading = len(now) if now.all() else int(now.argmin())
        return int(np.count_nonzero(before[:leading]))

    def _call(self, command: c.Command) -> c.Result | Deferred:
        result = super()._call(command)
        self._settle()
        return result

    def _settle(self) -> None:
        while ops := self.store.nvme.take_ops():
            for op in ops:
                self.store.hear(_done(op), self._now_ms)
        self.store.nvme.tickets.take()


def _capacity(volume: Volume) -> int:
    return volume.geometry.n_segments * volume.geometry.slots(1)


def _done(op: Op) -> Outcome:
    n = len(op.stamps) if isinstance(op, ReadBlocks | WriteBlocks | CheckBlocks) else 0
    return Outcome(op.number, bad=np.zeros(n, np.bool_))
