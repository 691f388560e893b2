"""Results as a table and as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Document = dict[str, Any]


def table(document: Document) -> str:
    """Markdown: the limits, then one table for each kind of work, systems as columns."""
    lines = ["| limit of this machine | GB/s |", "|---|---|"]
    lines += [f"| {name} | {rate / 1e9:.2f} |" for name, rate in document["limits"].items()]
    for op in ("put", "get", "match"):
        lines += ["", *_one(document, op)]
    lines += [f"\nmissing: {name}: {why}" for name, why in document["missing"].items()]
    return "\n".join(lines)


def _one(document: Document, op: str) -> list[str]:
    rows = [row for row in document["results"] if row["op"] == op]
    systems = list(dict.fromkeys(row["system"] for row in rows))
    works = list(dict.fromkeys(row["work"] for row in rows))
    cells = {(row["work"], row["system"]): _cell(row, op, document) for row in rows}
    unit = "M keys/s" if op == "match" else "GB/s, % of memcpy with 2 threads"
    lines = [f"| {op}: {unit} (p50 us, p99 us) | " + " | ".join(systems) + " |"]
    lines.append("|---" * (len(systems) + 1) + "|")
    for work in works:
        columns = [cells.get((work, system), "-") for system in systems]
        lines.append(f"| {work} | " + " | ".join(columns) + " |")
    return lines


def _cell(row: dict[str, Any], op: str, document: Document) -> str:
    times = f"({row['p50_us']:,.0f}, {row['p99_us']:,.0f})"
    if op == "match":
        return f"{row['rate'] / 1e6:.3f} {times}"
    share = row["rate"] / document["limits"]["memcpy, 2 threads"]
    return f"{row['rate'] / 1e9:.2f}, {share:.0%} {times}"


def plot(document: Document, path: Path) -> None:
    """Bars: GB/s of puts and gets, with the machine's copy rate as a line."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(11, 8), sharex=True, constrained_layout=True)
    for axis, op in zip(axes, ("put", "get"), strict=True):
        rows = [row for row in document["results"] if row["op"] == op]
        systems = list(dict.fromkeys(row["system"] for row in rows))
        works = list(dict.fromkeys(row["work"] for row in rows))
        width = 0.8 / len(systems)
        for i, system in enumerate(systems):
            mine = {row["work"]: row["rate"] / 1e9 for row in rows if row["system"] == system}
            at = [x + (i - len(systems) / 2 + 0.5) * width for x in range(len(works))]
            axis.bar(at, [mine.get(work, 0) for work in works], width, label=system)
        axis.axhline(document["limits"]["memcpy, 2 threads"] / 1e9, color="black", lw=0.8, ls=":")
        axis.set_ylabel(f"{op}, GB/s")
        axis.set_xticks(range(len(works)), works, rotation=20, ha="right")
    axes[0].legend(fontsize="small", ncols=2, title="dotted: memcpy with two threads")
    figure.savefig(path, dpi=110)
