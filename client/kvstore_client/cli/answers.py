"""What `ping`, `info`, `match` and `explain` answer: values, as JSON and as text."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kvstore.commands import ExplainStatus, Stats
from kvstore.layout import Attention, Layout
from kvstore.session.base import (
    BlockReport,
    NamespaceHandle,
    NamespaceInfo,
    Session,
    StoreInfo,
    Tier,
)
from kvstore.sizes import format_size
from kvstore_client.cli import output
from kvstore_client.cli.selection import Hashes2D, Selected, batches

REASONS = {
    ExplainStatus.STORED: "stored",
    ExplainStatus.NEVER_STORED: "never stored, or gone so long that no record is left",
    ExplainStatus.NOT_SEALED: "being written: some of its bytes are still missing",
    ExplainStatus.EVICTED: "evicted: the pool was full",
    ExplainStatus.DROPPED: "dropped by a user",
    ExplainStatus.EXPIRED: "expired: its time to live was over",
    ExplainStatus.OTHER_LAYOUT: "stored in this namespace's name under another layout",
    ExplainStatus.CORRUPTED: "lost: its bytes on NVMe were not what was stored, or unreadable",
}


def round_trips(session: Session, count: int) -> list[float]:
    """Milliseconds of `count` calls that do next to nothing, one after another."""
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        session.stats()
        taken.append((time.perf_counter() - start) * 1e3)
    return taken


def ping_json(target: str, taken_ms: Sequence[float]) -> output.Json:
    """The answer of `ping`."""
    rounded = [round(each, 6) for each in taken_ms]  # the clock counts nanoseconds
    return {
        "target": target,
        "count": len(rounded),
        "min_ms": min(rounded),
        "median_ms": statistics.median(rounded),
        "max_ms": max(rounded),
        "round_trips_ms": rounded,
    }


def ping_text(target: str, taken_ms: Sequence[float]) -> str:
    """The answer of `ping` on one line."""
    low, middle, high = min(taken_ms), statistics.median(taken_ms), max(taken_ms)
    return (
        f"{output.printable(target)}: {output.count(len(taken_ms), 'round trip')},"
        f" min {low:.3f} ms, median {middle:.3f} ms, max {high:.3f} ms"
    )


def layout_text(layout: Layout) -> str:
    """A layout in short: what its blocks hold and how large they are."""
    if layout.attention is Attention.OPAQUE:
        shape = "opaque"
    else:
        shape = f"{layout.attention} {layout.layers}x{layout.kv_heads}x{layout.head_dim}"
        shape += f" {layout.dtype}" + (
            "" if layout.scales == "none" else f" {layout.scales} scales"
        )
    tag = f", tag {layout.tag}" if layout.tag else ""
    return (
        f"{layout.model}{tag}: {shape}, {output.count(layout.block_tokens, 'token')},"
        f" {format_size(layout.block_bytes)}, {output.count(layout.n_cells, 'cell')}"
    )


def info_json(info: StoreInfo, stats: Stats) -> output.Json:
    """The answer of `info`; `layout` is the short form, `fingerprint` names all of it."""
    return {
        "version": info.version,
        "instance": str(info.instance),  # many readers of JSON keep 53 bits of a number
        "policy": info.policy,
        "used_bytes": stats.used_bytes,
        "total_bytes": stats.total_bytes,
        "blocks": stats.blocks,
        "max_blocks": info.max_blocks,
        "index_capacity": info.index_capacity,
        "started": info.started,
        "namespaces": [
            {
                "id": each.id,
                "name": each.name,
                "blocks": each.blocks,
                "generation": each.generation,
                "block_bytes": each.layout.block_bytes,
                "block_tokens": each.layout.block_tokens,
                "layout": layout_text(each.layout),
                "fingerprint": each.layout.fingerprint().hex(),
            }
            for each in _in_order(info)
        ],
    }


def show_info(info: StoreInfo, stats: Stats) -> None:
    """Prints the answer of `info`."""
    used, total = format_size(stats.used_bytes), format_size(stats.total_bytes)
    print(f"version         {output.printable(info.version)}")
    print(f"instance        {info.instance}")
    print(f"started         {output.local_time(info.started)}, {output.age(info.started)}")
    print(f"eviction        {output.printable(info.policy)}")
    print(f"memory          {used} of {total} used")
    print(f"blocks          {stats.blocks:,} of at most {info.max_blocks:,}")
    print(f"index capacity  {info.index_capacity:,}")
    print(f"namespaces      {len(info.namespaces):,}")
    rows = [
        (
            str(each.id),
            each.name,
            f"{each.blocks:,}",
            str(each.generation),
            layout_text(each.layout),
        )
        for each in _in_order(info)
    ]
    if rows:
        print()
        output.show(output.table((">id", "name", ">blocks", ">generation", "layout"), rows))


def _in_order(info: StoreInfo) -> list[NamespaceInfo]:
    """The namespaces by name, and layouts of one name by id: a store has them in no order."""
    return sorted(info.namespaces, key=lambda each: (each.name, each.id))


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchAnswer:
    """How much of a chain is stored, from its start."""

    namespace: NamespaceHandle
    asked: int
    tiers: tuple[Tier, ...]  # of the matched blocks

    @property
    def matched(self) -> int:
        """Blocks of the leading stored run."""
        return len(self.tiers)

    def as_json(self) -> output.Json:
        """The answer of `match`."""
        return {
            "namespace": self.namespace.name,
            "namespace_id": self.namespace.id,
            "blocks": self.asked,
            "matched_blocks": self.matched,
            "matched_tokens": self.matched * self.namespace.layout.block_tokens,
            "tiers": dict(Counter(self.tiers)),
        }

    def as_text(self) -> str:
        """The answer of `match` on one line."""
        tokens = self.matched * self.namespace.layout.block_tokens
        tiers = "".join(f", {count:,} in {tier}" for tier, count in Counter(self.tiers).items())
        asked = output.count(self.asked, "block")
        return f"{self.matched:,} of {asked} ({output.count(tokens, 'token')}){tiers}"


def match(session: Session, selected: Selected) -> MatchAnswer:
    """The longest stored leading part of the selected chain, also where it takes several calls."""
    tiers: list[Tier] = []
    for part in batches(selected.hashes):
        found = session.match(selected.namespace, part)
        tiers.extend(found.tiers)
        if found.count < len(part):
            break
    return MatchAnswer(namespace=selected.namespace, asked=len(selected.hashes), tiers=tuple(tiers))


def drop(session: Session, selected: Selected) -> int:
    """Drops the selected blocks; returns how many there were."""
    return sum(session.drop(selected.namespace, part) for part in batches(selected.hashes))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Neighbours in a chain that share a status and a tier; `first` and `last` are positions.

    when: the Unix times in seconds of the first and the last event, if any is known.
    """

    first: int
    last: int
    status: ExplainStatus
    tier: Tier | None
    when: tuple[float, float] | None

    def as_json(self) -> output.Json:
        """One row of `explain`."""
        return {
            "first": self.first,
            "last": self.last,
            "blocks": self.last - self.first + 1,
            "status": self.status.name.lower(),
            "tier": self.tier,
            "reason": REASONS[self.status],
            "when_first": self.when[0] if self.when else None,
            "when_last": self.when[1] if self.when else None,
        }

    def as_row(self) -> tuple[str, str, str, str, str]:
        """One row of `explain` as text."""
        span = str(self.first) if self.first == self.last else f"{self.first}-{self.last}"
        blocks = str(self.last - self.first + 1)
        return span, blocks, self.tier or "-", REASONS[self.status], _when_text(self.when)


def explain(session: Session, selected: Selected) -> list[Run]:
    """Why each selected block can or cannot be found, in runs."""
    parts: Iterable[Hashes2D] = batches(selected.hashes)
    return runs([each for part in parts for each in session.explain(selected.namespace, part)])


def runs(reports: Sequence[BlockReport]) -> list[Run]:
    """Reports in chain order, put together where neighbours have the same status and tier."""
    found = []
    numbered = enumerate(reports)
    for (status, tier), group in itertools.groupby(
        numbered, key=lambda pair: (pair[1].status, pair[1].tier)
    ):
        members = list(group)
        times = [report.when for _, report in members if report.when is not None]
        when = (min(times), max(times)) if times else None
        first, last = members[0][0], members[-1][0]
        found.append(Run(first=first, last=last, status=status, tier=tier, when=when))
    return found


def show_runs(found: Sequence[Run]) -> None:
    """Prints the answer of `explain`."""
    columns = (">position", ">blocks", "tier", "reason", "when")
    output.show(output.table(columns, [run.as_row() for run in found]))


def _when_text(when: tuple[float, float] | None) -> str:
    if when is None:
        return "-"
    first, last = (output.local_time(each) for each in when)
    return f"{last}, {output.age(when[1])}" + (f" (first: {first})" if first != last else "")
