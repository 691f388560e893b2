"""Hit rates of the store's policies on a public trace: `python -m benchmarks.replay TRACE`.

The requests go block by block through the real `Store`, at several sizes of the pool, for every
policy, with and without hints of which sessions are over. Beside it the same accesses go through
the policies alone, without chains, and through libCacheSim, where it can be installed: there both
must find the same blocks. TRACE: JSON lines with `hash_ids`, as in Mooncake's FAST 25 release,
plain or packed with xz.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.replay_policies import Hits, alone, simulated
from benchmarks.replay_store import MODEL, Found, replay, whole_slabs
from benchmarks.replay_trace import Chain, attainable, foreseen, over, read_trace

SHARES = (0.01, 0.05, 0.10, 0.25)
POLICIES = ("lru", "arc", "s3fifo")
HINT_ACCURACY = 0.8
# How they begin where both find the same: S3-FIFO's ways to fill an empty pool differ.
COMPARED = (("lru", False), ("s3fifo", True), ("s3fifo", False))


@dataclass(frozen=True, slots=True)
class StoreRow:
    """What the store found with one policy, in pools of several sizes."""

    policy: str
    hinted: bool
    found: list[Found]


@dataclass(frozen=True, slots=True)
class Report:
    """Everything measured. `sizes` in blocks; `foreseen` and all hits for each of them."""

    trace: str
    requests: int
    lookups: int
    unique: int
    block_bytes: int
    sizes: list[int]
    attainable: int
    foreseen: list[int]
    store: list[StoreRow]
    alone: list[Hits]
    simulated: list[Hits]
    missing: str


def measure(name: str, requests: list[Chain], *, seed: int, processes: int) -> Report:
    """Runs everything, in so many processes."""
    accesses = np.concatenate(requests)
    unique = len(np.unique(accesses))
    sizes = list(dict.fromkeys(whole_slabs(int(share * unique)) for share in SHARES))
    nobody = np.zeros(len(requests), np.bool_)
    wrong = np.random.default_rng(seed).random(len(requests)) > HINT_ACCURACY
    told = {False: nobody, True: over(requests) ^ wrong}
    kinds = [(policy, hinted) for policy in POLICIES for hinted in told]
    with ProcessPoolExecutor(processes) as pool:
        peer = pool.submit(simulated, sizes, accesses)
        lone = [
            [pool.submit(alone, policy, size, accesses, full=full) for size in sizes]
            for policy, full in COMPARED
        ]
        stores = [
            [pool.submit(replay, size, policy, requests, told[hinted]) for size in sizes]
            for policy, hinted in kinds
        ]
        bounds = [pool.submit(foreseen, accesses, size) for size in sizes]
        peers, missing = _peers(peer)
        return Report(
            trace=name,
            requests=len(requests),
            lookups=len(accesses),
            unique=unique,
            block_bytes=MODEL.block_bytes,
            sizes=sizes,
            attainable=attainable(requests),
            foreseen=[bound.result() for bound in bounds],
            store=[
                StoreRow(policy, hinted, [run.result() for run in runs])
                for (policy, hinted), runs in zip(kinds, stores, strict=True)
            ],
            alone=[
                Hits(policy, full, [run.result() for run in runs])
                for (policy, full), runs in zip(COMPARED, lone, strict=True)
            ],
            simulated=peers,
            missing=missing,
        )


def _peers(peer: Future[list[Hits]]) -> tuple[list[Hits], str]:
    """What the simulator found, or why there is none."""
    try:
        return peer.result(), ""
    except RuntimeError as error:
        return [], str(error)


def tables(report: Report) -> Iterator[str]:
    """Lines of Markdown: the store, then the policies alone beside the simulator's."""
    tib = report.block_bytes / (1 << 40)
    heads = [f"{size / report.unique:.1%} ({size:,} blocks)" for size in report.sizes]
    yield (
        f"{report.requests:,} requests look up {report.lookups:,} blocks, {report.unique:,} of them"
        f" unique. A store without end finds {report.attainable / report.lookups:.3f} of them."
    )
    yield f"Bytes: of blocks of {report.block_bytes >> 20} MiB ({MODEL.model}).\n"
    yield from _head("the store: hit rate (TiB put, TiB read)", heads)
    for row in report.store:
        cells = [
            f"{found.hits / report.lookups:.3f} ({found.put * tib:.1f}, {found.hits * tib:.1f})"
            for found in row.found
        ]
        label = f"{row.policy}, hints {HINT_ACCURACY:.0%} right" if row.hinted else row.policy
        yield _line(label, cells)
    yield _line("who knew the future", [f"{n / report.lookups:.3f}" for n in report.foreseen])
    yield ""
    yield from _head("policies alone, block by block: hits", heads)
    for ours in report.alone:
        yield from _compared(report, ours)
    if report.missing:
        yield f"\nlibCacheSim is missing: {report.missing}"


def _compared(report: Report, ours: Hits) -> Iterator[str]:
    """A policy alone, what chains change, and what the simulator does."""
    label = f"{ours.policy}, from {'full' if ours.full else 'empty'}"
    yield _line(label, [f"{n:,}" for n in ours.hits])
    if not ours.full:
        store = next(r for r in report.store if r.policy == ours.policy and not r.hinted)
        more = [found.hits - n for found, n in zip(store.found, ours.hits, strict=True)]
        yield _line("- the store, leading runs: more by", [f"{n:+,}" for n in more])
    for peer in report.simulated:
        if (peer.policy, peer.full) == (ours.policy, ours.full):
            more = [n - m for n, m in zip(peer.hits, ours.hits, strict=True)]
            yield _line("- libCacheSim: more by", [f"{n:+,}" for n in more])


def _head(title: str, columns: list[str]) -> Iterator[str]:
    yield _line(title, columns)
    yield "|---" * (len(columns) + 1) + "|"


def _line(label: str, cells: list[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def plot(report: Report, path: Path) -> None:
    """Hit rate by the pool's size: a line for each policy, dashed with hints."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), constrained_layout=True)
    shares = [size / report.unique * 100 for size in report.sizes]
    for row in report.store:
        rates = [found.hits / report.lookups for found in row.found]
        style, colour = ("--" if row.hinted else "-"), f"C{POLICIES.index(row.policy)}"
        label = f"{row.policy}, hints {HINT_ACCURACY:.0%} right" if row.hinted else row.policy
        axis.plot(shares, rates, style, color=colour, marker="o", label=label)
    known = [n / report.lookups for n in report.foreseen]
    axis.plot(shares, known, color="grey", marker=".", label="who knew the future")
    axis.axhline(report.attainable / report.lookups, color="black", lw=0.8, ls=":")
    axis.set_xscale("log")
    axis.set_xticks(shares, [f"{share:.1f}" for share in shares])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("pool, % of the unique blocks")
    axis.set_ylabel("hit rate, of all blocks looked up")
    axis.set_title(f"{report.trace}; dotted: a store without end", fontsize="medium")
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, help="only so many, from the first on")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--plot", type=Path, help="also draw hit rates by size to this file")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=0, help="of the hints that are wrong")
    options = parser.parse_args()
    requests = read_trace(options.trace, options.requests)
    name = options.trace.name.split(".")[0]
    report = measure(name, requests, seed=options.seed, processes=options.processes)
    print("\n".join(tables(report)))
    if options.json:
        values: dict[str, Any] = dataclasses.asdict(report)
        options.json.write_text(json.dumps(values, indent=1))
    if options.plot:
        plot(report, options.plot)


if __name__ == "__main__":
    main()
