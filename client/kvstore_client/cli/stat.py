"""`kvstore stat`: the store's counters, one line an interval, as vmstat shows a machine's."""

from __future__ import annotations

import dataclasses
import itertools
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

from kvstore.commands import Stats
from kvstore.errors import InvalidArgument
from kvstore.session.base import Session
from kvstore.sizes import format_size
from kvstore_client.cli.output import Json

HEADER = (
    f"{'blocks':>9} {'used':>10} {'total':>10} {'hit%':>6} {'puts':>9} {'evicted':>9}"
    f" {'leased':>8} {'clients':>8}"
)
NVME_HEADER = f" {'nvme':>9} {'nvme used':>10} {'from%':>6} {'came':>9} {'went':>9} {'health':>8}"
LINES_PER_HEADER = 20
_HEALTH = ("ok", "degraded", "off")
_NO_NVME = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The gauges now and what the counters counted over the last `interval_s` seconds."""

    time: float
    interval_s: float | None  # None: since the store started
    stats: Stats
    lookups: int
    hits: int
    puts: int
    evicted: int
    cold_hits: int
    promoted: int
    demoted: int

    @property
    def has_nvme(self) -> bool:
        """Whether the store has, or should have, an NVMe tier."""
        return self.stats.nvme_health != _NO_NVME

    @property
    def header(self) -> str:
        """What stands above `as_text`."""
        return HEADER + (NVME_HEADER if self.has_nvme else "")

    @property
    def hit_rate(self) -> float | None:
        """Hits per block looked up; None where none was."""
        return self.hits / self.lookups if self.lookups else None

    def as_json(self) -> Json:
        """One JSON line; `since_start` holds the counters themselves."""
        return {
            "time": self.time,
            "interval_s": self.interval_s,
            "lookups": self.lookups,
            "hits": self.hits,
            "hit_rate": self.hit_rate,
            "puts": self.puts,
            "evicted": self.evicted,
            "cold_hits": self.cold_hits,
            "promoted": self.promoted,
            "demoted": self.demoted,
            "since_start": dataclasses.asdict(self.stats),
        }

    def as_text(self) -> str:
        """One line under `header`; `from%`: the share of hits that were on NVMe only."""
        stats, rate = self.stats, self.hit_rate
        hit = "-" if rate is None else f"{100 * rate:.1f}"
        return (
            f"{stats.blocks:9} {format_size(stats.used_bytes):>10}"
            f" {format_size(stats.total_bytes):>10} {hit:>6} {self.puts:9} {self.evicted:9}"
            f" {stats.leased_blocks:8} {stats.connections:8}" + self._nvme_text()
        )

    def _nvme_text(self) -> str:
        if not self.has_nvme:
            return ""
        stats = self.stats
        share = f"{100 * self.cold_hits / self.hits:.1f}" if self.hits else "-"
        health = _HEALTH[stats.nvme_health] if stats.nvme_health < len(_HEALTH) else "?"
        return (
            f" {stats.nvme_blocks:9} {format_size(stats.nvme_used_bytes):>10} {share:>6}"
            f" {self.promoted:9} {self.demoted:9} {health:>8}"
        )


def sample(stats: Stats, before: Stats | None, *, now: float, interval_s: float | None) -> Sample:
    """What happened between two readings; a store that started anew counts from its start."""
    if before is not None and _restarted(stats, before):
        before, interval_s = None, None
    return Sample(
        time=now,
        interval_s=interval_s,
        stats=stats,
        lookups=stats.lookups - (before.lookups if before else 0),
        hits=stats.hits - (before.hits if before else 0),
        puts=stats.stored - (before.stored if before else 0),
        evicted=stats.evicted - (before.evicted if before else 0),
        cold_hits=stats.cold_hits - (before.cold_hits if before else 0),
        promoted=stats.promoted - (before.promoted if before else 0),
        demoted=stats.demoted - (before.demoted if before else 0),
    )


def watch(
    session: Session, *, interval_s: float, count: int | None, stop: threading.Event
) -> Iterator[Sample]:
    """A sample now and one every `interval_s` seconds, `count` in all or until `stop` is set.

    Raises `InvalidArgument` before the first.
    """
    if not 0 < interval_s <= threading.TIMEOUT_MAX:
        raise InvalidArgument("interval", "must be over 0 seconds")
    before, last = None, None
    due = time.monotonic()
    for _ in itertools.count() if count is None else range(count):
        if stop.wait(max(0.0, due - time.monotonic())):
            return
        stats, now = session.stats(), time.monotonic()
        yield sample(stats, before, now=time.time(), interval_s=last and now - last)
        before, last = stats, now
        # Lines keep to their times however long a call takes, but missed ones are not made up for.
        due = max(due + interval_s, now)


def _restarted(stats: Stats, before: Stats) -> bool:
    names = ("lookups", "hits", "stored", "evicted")
    return any(getattr(stats, name) < getattr(before, name) for name in names)
