"""What growth costs, from thousands to millions of blocks: `python -m benchmarks.growth`.

Look-ups of the index alone and through a client, puts, memory, and how long a start takes.
Sizes take turns within each round, so that a machine that drifts hurts all alike. Every look-up
takes other keys, and every answer is checked.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import growth_index, growth_store

Document = dict[str, Any]
_CLIENT_BLOCKS = [10_000, 100_000, 1_000_000]
_KEYS = tuple(growth_index.LOOKS)
_SLOWDOWN_BASE = 10_000
_MOST_SLOWDOWN = 3.0
# Keys of a look-up, entries of the index, keys a second at least.
_RATES = ((8192, 10_000, 20e6), (8192, 1_000_000, 8e6), (1, 10_000, 0.3e6))


def targets(document: Document) -> list[dict[str, Any]]:
    """What the index is to reach, beside what it did, as far as those sizes were measured."""
    rates = {
        (count, row["entries"]): look["rate"]
        for row in document["index"]
        for count, look in row["looks"].items()
    }
    base, largest = _SLOWDOWN_BASE, max(row["entries"] for row in document["index"])
    rows = [
        {
            "what": f"{_keys(count)}: times slower among {largest:,} than among {base:,}",
            "target": f"<= {_MOST_SLOWDOWN:g}",
            "measured": rates[count, base] / rates[count, largest],
            "met": rates[count, base] <= _MOST_SLOWDOWN * rates[count, largest],
        }
        for count in _KEYS
        if (count, base) in rates
    ]
    rows += [
        {
            "what": f"{_keys(count)} among {entries:,}: M keys/s",
            "target": f">= {least / 1e6:g}",
            "measured": rates[count, entries] / 1e6,
            "met": rates[count, entries] >= least,
        }
        for count, entries, least in _RATES
        if (count, entries) in rates
    ]
    return rows


def table(document: Document) -> str:
    """Markdown: targets, the index alone, the store through a client, and starts."""
    lines = ["| index alone: target | at | measured | |", "|---|---|---|---|"]
    for row in document["targets"]:
        verdict = "met" if row["met"] else "missed"
        lines.append(_line(row["what"], (row["target"], f"{row['measured']:.2f}", verdict)))
    rows = document["index"]
    lines += ["", *_head("index alone: M keys/s (p50 us, p99 us)", [r["entries"] for r in rows])]
    for count in _KEYS:
        lines.append(_line(_keys(count), (_rate(row["looks"][count]) for row in rows)))
    lines.append(_line("insert, M/s", (f"{row['insert_rate'] / 1e6:.2f}" for row in rows)))
    lines.append(_line("rows in use", (f"{row['load']:.0%}" for row in rows)))
    lines.append(_line("bytes an entry", (f"{row['bytes_per_entry']:.0f}" for row in rows)))
    rows = document["store"]
    lines += ["", *_head("client of a daemon, blocks stored", [row["blocks"] for row in rows])]
    names = [(call["op"], call["count"]) for call in rows[0]["calls"]]
    calls = [{(call["op"], call["count"]): call for call in row["calls"]} for row in rows]
    for op, count in names:
        match = op == "match"
        title = f"match {_keys(count)}: M keys/s" if match else f"{op} x{count}: p50 us, p99 us"
        cell = _rate if match else _times
        lines.append(_line(title, (cell(found[op, count]) for found in calls)))
    filling = [row["filling"] for row in rows]
    lines.append(_line("filling, thousand blocks/s", (f"{f['rate'] / 1e3:.0f}" for f in filling)))
    longest = (f"{f['longest_put_ms']:.0f}" for f in filling)
    lines.append(_line("longest put of 2,000 while filling, ms", longest))
    beside = (f"{row['beside_pool_bytes'] / 1e6:.0f}" for row in rows)
    lines.append(_line("daemon beside its pool, MB", beside))
    each = (f"{row['bytes_per_block']:.0f}" for row in rows)
    lines.append(_line("of it by blocks, bytes each", each))
    lines += ["", "| start, pool of 1 GiB, to the first block put and got | median s | longest s |"]
    lines.append("|---|---|---|")
    for row in document["start"]:
        lines.append(_line(row["kind"], (f"{row['median_s']:.3f}", f"{row['longest_s']:.3f}")))
    return "\n".join(lines)


def _keys(count: int) -> str:
    return f"{count:,} key{'s' if count > 1 else ''}"


def _head(title: str, sizes: list[int]) -> list[str]:
    return [_line(title, (f"{size:,}" for size in sizes)), "|---" * (len(sizes) + 1) + "|"]


def _line(title: str, cells: Iterable[str]) -> str:
    return f"| {title} | " + " | ".join(cells) + " |"


def _rate(look: dict[str, float]) -> str:
    return f"{look['rate'] / 1e6:.2f} ({look['p50_us']:,.1f}, {look['p99_us']:,.1f})"


def _times(call: dict[str, float]) -> str:
    return f"{call['p50_us']:,.0f}, {call['p99_us']:,.0f}"


def plot(document: Document, path: Path) -> None:
    """Match rates and put latencies against the number of blocks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (rates, puts) = plt.subplots(1, 2, figsize=(12, 6), constrained_layout=True)
    for i, count in enumerate(_KEYS):
        alone = [(row["entries"], row["looks"][count]["rate"] / 1e6) for row in document["index"]]
        client = _of(document, "match", count, "rate", 1e-6)
        rates.loglog(*zip(*alone, strict=True), f"C{i}o-", label=f"{_keys(count)}, index alone")
        rates.loglog(*zip(*client, strict=True), f"C{i}s--", label=f"{_keys(count)}, client")
    rates.set_ylabel("match, M keys/s")
    for i, op in enumerate(("put", "put while full")):
        for count, mark in zip(growth_store.PUTS, "os", strict=True):
            for name, line in (("p50", "-"), ("p99", ":")):
                values = _of(document, op, count, f"{name}_us", 1.0)
                label = f"{op} x{count}, {name}"
                puts.loglog(*zip(*values, strict=True), f"C{i}{mark}{line}", label=label)
    puts.set_ylabel("put, us")
    for axis in (rates, puts):
        axis.set_xlabel("blocks")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small", ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))
    figure.savefig(path, dpi=110)


def _of(
    document: Document, op: str, count: int, field: str, factor: float
) -> list[tuple[int, float]]:
    return [
        (row["blocks"], call[field] * factor)
        for row in document["store"]
        for call in row["calls"]
        if (call["op"], call["count"]) == (op, count)
    ]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--plot", type=Path, help="also draw them into this file")
    parser.add_argument("--blocks", type=int, nargs="+", default=_CLIENT_BLOCKS)
    parser.add_argument("--index", type=int, default=10_000_000, help="most entries, index alone")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    sizes = sorted({*options.blocks, options.index})
    if sizes[0] < max(_KEYS):
        parser.error(f"look-ups take {max(_KEYS):,} keys: at least so many blocks")
    document: Document = {"machine": {"processor": platform.processor() or platform.machine()}}
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as name:
        _say("starting daemons")
        document["start"] = growth_store.measure_start(Path(name), options.rounds)
        _say("the index alone")
        document["index"] = growth_index.measure(sizes, options.rounds)
        _say("filling daemons")
        document["store"] = growth_store.measure(options.blocks, Path(name), options.rounds)
    document["targets"] = targets(document)
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))
    if options.plot:
        plot(document, options.plot)
    print(table(document))


if __name__ == "__main__":
    main()
