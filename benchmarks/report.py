"""Results by round, and what is said of them: as numbers, as a table and as a picture."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_NOTES = (
    "Bold: there the peer is faster. memcpy: with two threads, of the same bytes in the same round."
    " Shares and ratios are medians of the rounds' own."
)

Document = dict[str, Any]
Key = tuple[str, str]  # what is moved or looked up, and by which operation
Span = tuple[float, float]

COPIES = ("memcpy, 1 thread", "memcpy, 2 threads")
_BEST = COPIES[1]


@dataclass(slots=True)
class Round:
    """Calls of one round: seconds of each, and units a second over all clients at once."""

    seconds: list[float] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The round's one number."""
        return statistics.median(self.rates)

    @classmethod
    def of(cls, spans: Sequence[Sequence[Span]], amount: int) -> Round:
        """spans: for each client its (begin, end) times; amount: bytes or keys of one span."""
        made = cls()
        for together in zip(*spans, strict=True):
            made.seconds += [end - begin for begin, end in together]
            first = min(begin for begin, _ in together)
            last = max(end for _, end in together)
            made.rates.append(amount * len(together) / (last - first))
        return made


class Results:
    """What was measured, round by round; ours is compared with each peer within each round."""

    def __init__(self) -> None:
        self.systems: dict[Key, dict[str, list[Round]]] = defaultdict(lambda: defaultdict(list))
        self.limits: dict[Key, dict[str, list[Round]]] = defaultdict(lambda: defaultdict(list))
        self.machine: dict[str, list[float]] = defaultdict(list)
        self.missing: dict[str, str] = {}

    def rows(self, ours: str, peers: Sequence[str]) -> list[dict[str, Any]]:
        """One for each work and system; ours: the system that is compared with the peers."""
        rows = []
        for key, systems in self.systems.items():
            best = [one.rate for one in self.limits[key][_BEST]]
            for name, rounds in systems.items():
                row = _row(key, name, rounds)
                if best:
                    row["share"] = _ratio([one.rate for one in rounds], best)
                if name in peers and ours in systems:
                    mine = [one.rate for one in systems[ours]]
                    row["ours"] = _ratio(mine, [one.rate for one in rounds])
                rows.append(row)
        return rows

    def limit_rows(self) -> list[dict[str, Any]]:
        """One for each move and limit."""
        return [
            _row(key, name, rounds)
            for key, limits in self.limits.items()
            for name, rounds in limits.items()
        ]


def _row(key: Key, name: str, rounds: list[Round]) -> dict[str, Any]:
    seconds = sorted(second for one in rounds for second in one.seconds)
    return {
        "work": key[0],
        "op": key[1],
        "system": name,
        "rate": statistics.median(one.rate for one in rounds),
        "p50_us": 1e6 * statistics.median(seconds),
        "p99_us": 1e6 * seconds[math.ceil(0.99 * len(seconds)) - 1],
        "rounds": [
            {"rate": one.rate, "calls_us": [round(1e6 * second) for second in one.seconds]}
            for one in rounds
        ],
    }


def _ratio(above: list[float], below: list[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(above, below, strict=False))


def table(document: Document) -> str:
    """Markdown: the machine and its limits, then for each operation speeds and ratios."""
    facts = ", ".join(f"{name} {value}" for name, value in document["machine"].items())
    lines = [f"Machine: {facts}. Medians over {document['rounds']} rounds.", ""]
    lines += ["| limit of this machine | GB/s |", "|---|---|"]
    lines += [f"| {name} | {rate / 1e9:.2f} |" for name, rate in document["limits"].items()]
    lines += ["", *_grid("limit of a move, GB/s", document["move_limits"], _limit, by_op=True)]
    for op in ("put", "get", "match"):
        rows = [row for row in document["results"] if row["op"] == op]
        unit = "M keys/s" if op == "match" else "GB/s, % of memcpy"
        lines += ["", *_grid(f"{op}: {unit} (p50 us, p99 us)", rows, _speed)]
        compared = [row for row in rows if "ours" in row]
        head = f"{op}: {document['ours']} is so many times as fast as"
        lines += ["", *_grid(head, compared, _compared)] if compared else []
    lines += ["", _NOTES]
    versions = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    lines += ["", f"Versions: {versions}."]
    lines += [f"\nMissing: {name}: {why}" for name, why in document["missing"].items()]
    return "\n".join(lines)


def _grid(head: str, rows: list[dict[str, Any]], cell: Any, *, by_op: bool = False) -> list[str]:
    """Systems as columns, work as lines."""
    systems = list(dict.fromkeys(row["system"] for row in rows))
    lines = [f"| {head} | " + " | ".join(systems) + " |", "|---" * (len(systems) + 1) + "|"]
    cells: dict[str, dict[str, str]] = defaultdict(dict)
    for row in rows:
        cells[f"{row['op']} {row['work']}" if by_op else row["work"]][row["system"]] = cell(row)
    for work, found in cells.items():
        columns = [found.get(system, "-") for system in systems]
        lines.append(f"| {work} | " + " | ".join(columns) + " |")
    return lines


def _limit(row: dict[str, Any]) -> str:
    return f"{row['rate'] / 1e9:.2f}"


def _speed(row: dict[str, Any]) -> str:
    times = f"({row['p50_us']:,.0f}, {row['p99_us']:,.0f})"
    if "share" not in row:
        return f"{row['rate'] / 1e6:.3f} {times}"
    return f"{row['rate'] / 1e9:.2f}, {row['share']:.0%} {times}"


def _compared(row: dict[str, Any]) -> str:
    return f"{row['ours']:.2f}" if row["ours"] >= 1 else f"**{row['ours']:.2f}**"


def plot(document: Document, path: Path) -> None:
    """Bars: GB/s of puts and gets, one and many blocks at a time, under what memcpy reaches."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(16, 9), sharex="col", constrained_layout=True)
    for line, op in zip(axes, ("put", "get"), strict=True):
        for axis, many in zip(line, (False, True), strict=True):
            rows = [row for row in document["results"] if row["op"] == op]
            _bars(axis, document, [row for row in rows if ("x64" in row["work"]) == many])
        line[0].set_ylabel(f"{op}, GB/s")
    axes[0][0].legend(fontsize="small", ncols=2, title="dotted: memcpy with two threads")
    figure.savefig(path, dpi=100)


def _bars(axis: Any, document: Document, rows: list[dict[str, Any]]) -> None:
    limits = {
        (row["work"], row["op"]): row["rate"]
        for row in document["move_limits"]
        if row["system"] == _BEST
    }
    systems = list(dict.fromkeys(row["system"] for row in document["results"]))
    works = list(dict.fromkeys(row["work"] for row in rows))
    width = 0.8 / max(1, len(systems))
    for i, system in enumerate(systems):
        mine = {row["work"]: row["rate"] / 1e9 for row in rows if row["system"] == system}
        at = [x + (i - len(systems) / 2 + 0.5) * width for x in range(len(works))]
        axis.bar(at, [mine.get(work, 0) for work in works], width, label=system)
    for x, work in enumerate(works):
        limit = limits[work, rows[0]["op"]] / 1e9
        axis.hlines(limit, x - 0.45, x + 0.45, color="black", lw=1.0, ls=":")
    axis.set_xticks(range(len(works)), works, rotation=15, ha="right")
