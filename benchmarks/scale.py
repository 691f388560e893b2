"""A cluster of up to 1,000 nodes, as placement makes it: `python -m benchmarks.scale [TRACE]`.

The blocks of a trace are placed as nodes place them, and counted; no node runs, no byte moves.
Balance with and without bounded load, what a node that joins or dies moves beside the least that
could, whom a request has to ask, how long placement takes, and what etcd has to carry. TRACE: as
for `benchmarks.replay`; without one, conversations are made up under a seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.replay_store import MODEL
from benchmarks.replay_trace import BLOCK_TOKENS, Chain, keys_of, read_trace
from kvstore.cluster.members import Member, View, decode_view, encode_member, encode_view
from kvstore.cluster.placement import (
    SPARE,
    U64,
    Ranking,
    Ranks,
    overloaded,
    place_of,
    places_of,
    segment_blocks,
)

Counts = npt.NDArray[np.int64]

NODES = (10, 100, 1000)
COPIES = (1, 2)
SEGMENTS = (512, 2048, 8192)  # tokens; the first is the real one
FILLED = 0.8  # of all pools, once the whole trace is stored
BOUNDED_FROM = 0.5  # of its pool a node holds at least before it counts as overloaded
LEASE_TTL_S = 5
RENEWALS_A_TTL = 3
KEYS_OF_A_MATCH = 8192
_AT_ONCE = 4096  # places that are ranked in one call, to bound memory
_RUNS = 15
_NOTE = """
The trace tells blocks of 512 tokens apart and no shorter ones, so each real segment is one block
here. With shorter blocks a segment that many conversations begin alike holds all that they go on
with to its end; the rows of longer segments show what becomes of balance where that is much."""


@dataclass(frozen=True, slots=True)
class Balance:
    """The fullest node's blocks by those of the mean; `spilled`: copies that the next rank took."""

    copies: int
    segment_tokens: int
    free: float
    bounded: float
    spilled: int


@dataclass(frozen=True, slots=True)
class Movement:
    """Copies that a new view puts where they were not. least: the share that one who joins is to
    have; the copies that the dead one had."""

    copies: int
    joined: int
    joined_least: float
    died: int
    died_least: int


@dataclass(frozen=True, slots=True)
class Asked:
    """Nodes that one request's look-up goes to, and the busiest node's share of all look-ups by the
    mean's."""

    mean: float
    p99: float
    most: int
    busiest: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians for `KEYS_OF_A_MATCH` keys of one chain: their places, then the ranks of all places
    that differ."""

    block_tokens: int
    places: int
    places_us: float
    ranks_us: float


@dataclass(frozen=True, slots=True)
class Etcd:
    """What the cluster keeps there and asks of it, by counting. Renewals write nothing: etcd's
    leader keeps them in memory."""

    keys: int
    renewals_a_second: float
    member_bytes: float
    view_bytes: int
    change_bytes: int  # that all nodes read together after one change of the view
    encode_ms: float
    decode_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """A cluster of so many nodes."""

    nodes: int
    balance: list[Balance]
    movement: list[Movement]
    asked: Asked
    timing: list[Timing]
    etcd: Etcd


@dataclass(frozen=True, slots=True)
class Report:
    """Everything measured."""

    trace: str
    requests: int
    blocks: int
    block_bytes: int
    rows: list[Row]


class Trace:
    """A trace as placement sees it: its blocks in the order in which they first came.

    accessed: which block each look-up is for. ends: where each request's look-ups end.
    """

    def __init__(self, requests: Sequence[Chain]) -> None:
        ids = np.concatenate(requests)
        _, first, found = np.unique(ids, return_index=True, return_inverse=True)
        self._first = np.sort(first)
        self.accessed: Counts = np.argsort(np.argsort(first))[found]
        lengths = [len(chain) for chain in requests]
        self.ends = np.cumsum(lengths)
        self._positions = np.concatenate([np.arange(length) for length in lengths])
        self._ids = ids
        of_id = [place_of(key.tobytes()) for key in keys_of(requests)]
        self._place_of_id = np.array(of_id, np.uint64)

    def __len__(self) -> int:
        return len(self._first)

    def places(self, segment_tokens: int) -> U64:
        """Of each block, in its chain when it first came."""
        segment = segment_tokens // BLOCK_TOKENS
        heads = self._first - self._positions[self._first] % segment
        places: U64 = self._place_of_id[self._ids[heads]]
        return places

    def new_blocks(self) -> Iterator[slice]:
        """Of each request that brings any."""
        known = np.maximum.accumulate(self.accessed) + 1
        before = 0
        for upto in known[self.ends - 1].tolist():
            if upto > before:
                yield slice(before, upto)
                before = upto


def made_up(n: int, seed: int) -> list[Chain]:
    """n requests that go on from each other behind a few common beginnings: as in published traces
    of conversations, most are short and some very long."""
    rng = np.random.default_rng(seed)
    commons, fresh = [], 0
    for _ in range(20):
        length = int(rng.integers(1, 24))
        commons.append(np.arange(fresh, fresh + length))
        fresh += length
    requests: list[Chain] = []
    for _ in range(n):
        if requests and rng.random() < 0.6:
            before = requests[-int(rng.integers(1, min(len(requests), 300) + 1))]
        else:
            before = commons[min(int(rng.zipf(1.5)), len(commons)) - 1]
        more = min(1 + int(rng.lognormal(1.5, 1.1)), 240)
        requests.append(np.concatenate((before, np.arange(fresh, fresh + more))))
        fresh += more
    return requests


def view_of(nodes: int, copies: int) -> View:
    """A cluster of equal nodes, named and addressed as they might be."""
    members = tuple(
        Member(
            name=f"kv-{i:04d}",
            address=f"10.20.{i // 250}.{i % 250 + 1}:7400",
            run=(i * 0x9E3779B97F4A7C15) % (1 << 63),
        )
        for i in range(nodes)
    )
    return View(epoch=1, replicas=copies, members=members)


def ranked(view: View, places: U64, most: int) -> Ranks:
    """As `Ranking.targets`, in parts, since its scores take eight bytes a place and node."""
    ranking = Ranking(view)
    differing, which = np.unique(places, return_inverse=True)
    parts = [differing[i : i + _AT_ONCE] for i in range(0, len(differing), _AT_ONCE)]
    ranks: Ranks = np.concatenate([ranking.targets(part, most=most) for part in parts])[which]
    return ranks


def balance(trace: Trace, ranks: Ranks, nodes: int, copies: int, segment_tokens: int) -> Balance:
    """Stores the trace's blocks in the order in which they come. ranks: (blocks, copies + SPARE)
    or more; loads are as exact as nodes know them that ask each other between two requests."""
    mean = copies * len(ranks) / nodes
    free = np.bincount(ranks[:, :copies].ravel(), minlength=nodes)
    used, spilled = np.zeros(nodes, np.int64), 0
    weights = [1] * nodes
    for new in trace.new_blocks():
        held = used >= BOUNDED_FROM * mean / FILLED
        full = overloaded(used.tolist(), weights) & held
        candidates = ranks[new, : copies + SPARE]
        order = np.argsort(full[candidates], axis=1, kind="stable")[:, :copies]
        spilled += int(np.count_nonzero(order >= copies))
        used += np.bincount(np.take_along_axis(candidates, order, 1).ravel(), minlength=nodes)
    return Balance(
        copies=copies,
        segment_tokens=segment_tokens,
        free=float(free.max() / mean),
        bounded=float(used.max() / mean),
        spilled=spilled,
    )


def movement(before: Ranks, after: Ranks, dead: Ranks, copies: int) -> Movement:
    """before: of n nodes; after: of one more, which has the last number; dead: of the first n
    without the last, whose number is n - 1. (blocks, copies or more) each."""
    blocks, nodes = len(before), int(before.max()) + 1
    return Movement(
        copies=copies,
        joined=_moved(before[:, :copies], after[:, :copies]),
        joined_least=copies * blocks / (nodes + 1),
        died=_moved(before[:, :copies], dead[:, :copies]),
        died_least=int(np.count_nonzero(before[:, :copies] == nodes - 1)),
    )


def _moved(before: Ranks, after: Ranks) -> int:
    """How many of the copies after were at none of the same block's nodes before."""
    stays = (after[:, :, None] == before[:, None, :]).any(axis=2)
    return int(np.count_nonzero(~stays))


def asked(trace: Trace, first: Ranks, nodes: int) -> Asked:
    """first: of each block its first node, int16 (blocks,)."""
    owners = first[trace.accessed]
    counts = [len(set(part.tolist())) for part in np.split(owners, trace.ends[:-1])]
    reads = np.bincount(owners, minlength=nodes)
    return Asked(
        mean=float(np.mean(counts)),
        p99=float(np.percentile(counts, 99)),
        most=max(counts),
        busiest=float(reads.max() / reads.mean()),
    )


def timing(view: View, block_tokens: int) -> Timing:
    """Of one chain of random keys."""
    rng = np.random.default_rng(0)
    chain = rng.integers(256, size=(KEYS_OF_A_MATCH, 32), dtype=np.uint8)
    segment = segment_blocks(block_tokens)
    differing = np.unique(places_of(chain, position=0, segment=segment))
    ranking = Ranking(view)
    return Timing(
        block_tokens=block_tokens,
        places=len(differing),
        places_us=1e6 * _median_s(lambda: places_of(chain, position=0, segment=segment)),
        ranks_us=1e6 * _median_s(lambda: ranking.targets(differing)),
    )


def etcd(view: View) -> Etcd:
    """What the adapter of `kvstore_server.coordination.etcd` keeps there."""
    nodes, encoded = len(view.members), encode_view(view)
    return Etcd(
        keys=nodes + 1,
        renewals_a_second=nodes * RENEWALS_A_TTL / LEASE_TTL_S,
        member_bytes=float(np.mean([len(encode_member(member)) for member in view.members])),
        view_bytes=len(encoded),
        change_bytes=nodes * len(encoded),
        encode_ms=1e3 * _median_s(lambda: encode_view(view)),
        decode_ms=1e3 * _median_s(lambda: decode_view(encoded)),
    )


def _median_s(work: Callable[[], object]) -> float:
    work()
    spans = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        work()
        spans.append(time.perf_counter() - began)
    return float(np.median(spans))


def measure(name: str, requests: list[Chain], sizes: Sequence[int] = NODES) -> Report:
    """Places the trace in a cluster of each size."""
    trace = Trace(requests)
    return Report(
        trace=name,
        requests=len(requests),
        blocks=len(trace),
        block_bytes=MODEL.block_bytes,
        rows=[_row(trace, nodes) for nodes in sizes],
    )


def _row(trace: Trace, nodes: int) -> Row:
    most = max(COPIES)
    view, more, less = (view_of(nodes + i, most) for i in (0, 1, -1))
    ranks = {tokens: ranked(view, trace.places(tokens), most + SPARE) for tokens in SEGMENTS}
    real = ranks[SEGMENTS[0]]
    places = trace.places(SEGMENTS[0])
    joined, died = ranked(more, places, most), ranked(less, places, most)
    return Row(
        nodes=nodes,
        balance=[
            balance(trace, ranks[tokens], nodes, copies, tokens)
            for tokens in SEGMENTS
            for copies in COPIES
        ],
        movement=[movement(real, joined, died, copies) for copies in COPIES],
        asked=asked(trace, real[:, 0], nodes),
        timing=[timing(view, block_tokens) for block_tokens in (16, BLOCK_TOKENS)],
        etcd=etcd(view),
    )


def table(report: Report) -> Iterator[str]:
    """Lines of Markdown, a column for each size."""
    rows = report.rows
    tib = report.blocks * report.block_bytes / (1 << 40)
    yield (
        f"{report.requests:,} requests of {report.trace}: {report.blocks:,} blocks of"
        f" {BLOCK_TOKENS} tokens, {tib:.1f} TiB at {report.block_bytes >> 20} MiB each.\n"
    )
    heads = [f"{row.nodes:,} nodes" for row in rows]
    yield from _balance_table(report, heads)
    yield ""
    yield from _movement_table([row.movement for row in rows], heads)
    yield ""
    yield from _look_up_table(rows, heads)
    yield ""
    yield from _etcd_table([row.etcd for row in rows], heads)


def _balance_table(report: Report, heads: list[str]) -> Iterator[str]:
    title = f"stored blocks: fullest node / mean; all pools {FILLED:.0%} full at the end"
    yield from _head(title, heads)
    for same in zip(*(row.balance for row in report.rows), strict=True):
        copies, tokens = same[0].copies, same[0].segment_tokens
        label = f"segments of {tokens:,} tokens, {_copies(copies)}"
        yield _line(f"{label}, by rank alone", [f"{each.free:.2f}" for each in same])
        shares = [each.spilled / copies / report.blocks for each in same]
        cells = [f"{b.bounded:.2f} ({x:.1%})" for b, x in zip(same, shares, strict=True)]
        yield _line(f"{label}, bounded load (taken by the next rank)", cells)
    yield _NOTE


def _movement_table(found: list[list[Movement]], heads: list[str]) -> Iterator[str]:
    yield from _head("copies moved (times a node's share)", heads)
    for same in zip(*found, strict=True):
        joins = [f"{each.joined:,} ({each.joined / each.joined_least:.2f})" for each in same]
        deaths = [f"{each.died:,} ({each.died / each.died_least:.2f})" for each in same]
        yield _line(f"{_copies(same[0].copies)}, one node joins", joins)
        yield _line(f"{_copies(same[0].copies)}, one node dies", deaths)


def _look_up_table(rows: list[Row], heads: list[str]) -> Iterator[str]:
    yield from _head("a request's look-up", heads)
    asks = [row.asked for row in rows]
    counts = [f"{each.mean:.1f}, {each.p99:.0f}, {each.most}" for each in asks]
    yield _line("nodes asked: mean, p99, most", counts)
    yield _line("look-ups: busiest node / mean", [f"{each.busiest:.2f}" for each in asks])
    for same in zip(*(row.timing for row in rows), strict=True):
        blocks = f"{KEYS_OF_A_MATCH:,} keys of blocks of {same[0].block_tokens} tokens"
        label = f"{blocks} ({same[0].places:,} places): us for places, for ranks"
        yield _line(label, [f"{each.places_us:,.0f}, {each.ranks_us:,.0f}" for each in same])


def _etcd_table(found: list[Etcd], heads: list[str]) -> Iterator[str]:
    yield from _head(f"etcd, leases of {LEASE_TTL_S} s", heads)
    yield _line("keys", [f"{each.keys:,}" for each in found])
    yield _line(
        "renewals a second, which write nothing",
        [f"{each.renewals_a_second:,.0f}" for each in found],
    )
    yield _line("bytes of a registration", [f"{each.member_bytes:.0f}" for each in found])
    yield _line("bytes of the view", [f"{each.view_bytes:,}" for each in found])
    changes = [f"{each.change_bytes / 1e6:,.2f}" for each in found]
    yield _line("MB that all nodes read after one change", changes)
    times = [f"{each.encode_ms:.2f}, {each.decode_ms:.2f}" for each in found]
    yield _line("the view encoded, decoded: ms", times)


def _copies(copies: int) -> str:
    return f"{copies} cop{'ies' if copies > 1 else 'y'}"


def _head(title: str, columns: list[str]) -> Iterator[str]:
    yield _line(title, columns)
    yield "|---" * (len(columns) + 1) + "|"


def _line(label: str, cells: list[str]) -> str:
    return f"| {label} | " + " | ".join(cells) + " |"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("trace", type=Path, nargs="?")
    parser.add_argument("--requests", type=int, help="only so many, from the first on")
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--seed", type=int, default=0, help="of conversations that are made up")
    options = parser.parse_args()
    if options.trace:
        name = options.trace.name.split(".")[0]
        requests = read_trace(options.trace, options.requests)
    else:
        name = f"made-up conversations, seed {options.seed}"
        requests = made_up(options.requests or 12_000, options.seed)
    report = measure(name, requests)
    print("\n".join(table(report)))
    if options.json:
        values: dict[str, Any] = dataclasses.asdict(report)
        options.json.write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    main()
