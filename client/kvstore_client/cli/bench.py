"""`kvstore bench`: what this host's store does for several clients, in its own namespace.

Starts the clients, tells them all to begin a phase, puts together what they measured, and drops
the namespace at the end, however that comes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvstore.errors import ResourceExhausted, Unavailable
from kvstore.session.base import Session
from kvstore.sizes import format_size
from kvstore_client.cli.bench_client import PHASES, Measured, Plan, parse_measured
from kvstore_client.cli.bench_plan import NAMESPACE, Case, Grid, layout_of
from kvstore_client.cli.bench_process import Process, processes
from kvstore_client.cli.output import Json, print_json

HEADER = (
    f"{'phase':<6} {'size':>10} {'batch':>6} {'clients':>7} {'calls':>8} {'p50 us':>10}"
    f" {'p99 us':>10} {'p999 us':>10} {'GB/s':>8} {'misses':>7} {'wrong':>6} {'evicted':>8}"
)
_MOVES_BYTES = ("put", "get")
_DROP_AGAIN_S = 0.05
_CLEAN_UP_S = 2.0  # at the end nobody waits long for a store that may be dead


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One phase of one case; latencies are of calls, in us, over all clients.

    gb_per_s: 1e9 bytes a second while in calls, summed over the clients; None where a phase
    moves no bytes.
    """

    case: Case
    phase: str
    calls: int
    p50_us: float
    p99_us: float
    p999_us: float
    gb_per_s: float | None
    blocks: int
    misses: int
    checked: int
    wrong: int
    evicted: int  # of all blocks of the store, during the phase

    def as_json(self) -> Json:
        """One row of the answer."""
        fields = {name: getattr(self, name) for name in self.__slots__ if name != "case"}
        return {**dataclasses.asdict(self.case), **fields}

    def as_text(self) -> str:
        """One line under `HEADER`."""
        rate = "-" if self.gb_per_s is None else f"{self.gb_per_s:.2f}"
        return (
            f"{self.phase:<6} {format_size(self.case.size_bytes):>10} {self.case.batch:6}"
            f" {self.case.clients:7} {self.calls:8} {self.p50_us:10.1f} {self.p99_us:10.1f}"
            f" {self.p999_us:10.1f} {rate:>8} {self.misses:7} {self.wrong:6}"
            f" {self.evicted:8}"
        )


def summarize(case: Case, phase: str, measured: Sequence[Measured], *, evicted: int) -> Row:
    """What the clients of one phase measured, as one row; each made at least one call."""
    latencies_us = np.concatenate([each.latencies_ns for each in measured]) / 1e3
    p50, p99, p999 = np.percentile(latencies_us, (50, 99, 99.9)).tolist()
    rates = [each.blocks * case.size_bytes / sum(each.latencies_ns) for each in measured]
    return Row(
        case=case,
        phase=phase,
        calls=len(latencies_us),
        p50_us=p50,
        p99_us=p99,
        p999_us=p999,
        gb_per_s=sum(rates) if phase in _MOVES_BYTES else None,  # bytes per ns are GB/s
        blocks=sum(each.blocks for each in measured),
        misses=sum(each.misses for each in measured),
        checked=sum(each.checked for each in measured),
        wrong=sum(each.wrong for each in measured),
        evicted=evicted,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """A benchmark that fits; `seed` fixes the bytes and the hashes."""

    target: str
    timeout_s: float
    seconds: float
    seed: int
    grid: Grid


def run(session: Session, bench: Bench) -> Generator[Row, None, None]:
    """The rows as they come. Drops the benchmark's namespaces before, between cases, at the end.

    Raises `Unavailable` where a client ends, and what the session raises.
    """
    sizes = sorted({case.size_bytes for case in bench.grid.cases})
    count = max(case.clients for case in bench.grid.cases)
    with contextlib.ExitStack() as stack:
        stack.callback(_forget_all, session, sizes, bench.timeout_s)
        clients = stack.enter_context(processes(bench.target, bench.timeout_s, count))
        for case in bench.grid.cases:
            forget(session, case.size_bytes, bench.timeout_s)
            plans = _plans(session, bench, case)
            yield from _run_case(session, case, plans, clients[: case.clients])
            forget(session, case.size_bytes, bench.timeout_s)


def show(rows: Iterator[Row], bench: Bench, *, as_json: bool) -> list[Row]:
    """Prints the rows as they come, or all of them at the end as one JSON document."""
    if as_json:
        done = list(rows)
        print_json(_as_json(bench, done))
        return done
    for case in bench.grid.left_out:
        print(f"left out, the pool has no room: {case}")
    print(f"seed {bench.seed}, {bench.seconds} s a phase")
    print(HEADER, flush=True)
    done = []
    for row in rows:
        print(row.as_text(), flush=True)
        done.append(row)
    return done


def _as_json(bench: Bench, rows: Sequence[Row]) -> Json:
    return {
        "target": bench.target,
        "seed": bench.seed,
        "seconds": bench.seconds,
        "rows": [row.as_json() for row in rows],
        "left_out": [dataclasses.asdict(case) for case in bench.grid.left_out],
    }


def _forget_all(session: Session, sizes: Sequence[int], timeout_s: float) -> None:
    """Drops what the benchmark has put, unless the store is gone, and all of it with it."""
    with contextlib.suppress(Unavailable):
        for size in sizes:
            forget(session, size, min(timeout_s, _CLEAN_UP_S))


def forget(session: Session, size_bytes: int, timeout_s: float) -> None:
    """Drops the blocks of that size, also those a client that has just died still held a while."""
    namespace = session.open_namespace(NAMESPACE, layout_of(size_bytes), timeout_s=timeout_s)
    end, pause = time.monotonic() + timeout_s, threading.Event()
    while True:
        try:
            session.drop_namespace(namespace, timeout_s=timeout_s)
            return
        except ResourceExhausted:
            if time.monotonic() >= end:
                raise
            pause.wait(_DROP_AGAIN_S)


def _plans(session: Session, bench: Bench, case: Case) -> list[Plan]:
    """Each client's plan; clients read what their neighbour put."""
    stats, info = session.stats(), session.info()
    blocks = case.blocks_per_client(
        stats.total_bytes - stats.used_bytes, info.max_blocks - stats.blocks
    )
    return [
        Plan(
            seed=bench.seed,
            client=client,
            reads_from=(client + 1) % case.clients,
            size_bytes=case.size_bytes,
            batch=case.batch,
            blocks=blocks,
            seconds=bench.seconds,
        )
        for client in range(case.clients)
    ]


def _run_case(
    session: Session, case: Case, plans: Sequence[Plan], clients: Sequence[Process]
) -> Iterator[Row]:
    for client, plan in zip(clients, plans, strict=True):
        client.ask(dataclasses.asdict(plan))
    for client in clients:
        client.answer()
    for phase in PHASES:
        before = session.stats().evicted
        for client in clients:
            client.ask(phase)
        measured = [parse_measured(client.answer()) for client in clients]
        yield summarize(case, phase, measured, evicted=session.stats().evicted - before)
