"""Ours beside the peers and the machine's limits: `python -m benchmarks.peers`.

Systems take turns within each round, after the limits of the same move, so that a machine that
drifts hurts all alike. Every byte of every get is compared. A peer that cannot be had here, or that
fails, is reported as missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import limits, report
from benchmarks.report import COPIES, Results, Round, Span
from benchmarks.systems import JobError, System, running

OURS = {
    "direct": "benchmarks.adapters.kvstore_daemon",
    "copy-in": "benchmarks.adapters.kvstore_copy_in",
    "embedded": "benchmarks.adapters.kvstore_embedded",
    "grpc": "benchmarks.adapters.kvstore_grpc",
}
PEERS = {
    "mooncake": "benchmarks.adapters.mooncake",
    "mooncake-tcp": "benchmarks.adapters.mooncake_tcp",
    "lmcache": "benchmarks.adapters.lmcache",
    "redis": "benchmarks.adapters.redis",
}
LIMITS = {"nixl": "benchmarks.adapters.nixl"}  # no store, so it is measured as a limit
ADAPTERS = {**OURS, **PEERS, **LIMITS}
# The largest move is 1 GiB at once; a few systems begin to evict at four fifths of their pool.
POOL_BYTES = 3 << 29
_HEAD_START_S = 0.003  # until then all clients are asleep
LOADED_BLOCKS = 10_000
LOADED_BYTES = 3840  # with our header one granule


@dataclass(frozen=True)
class Move:
    """Puts and gets of one shape."""

    nbytes: int
    batch: int
    clients: int

    @property
    def name(self) -> str:
        """As the tables show it."""
        size = f"{self.nbytes >> 10} KiB" if self.nbytes < 1 << 20 else f"{self.nbytes >> 20} MiB"
        return f"{size} x{self.batch}" + (f", {self.clients} clients" if self.clients > 1 else "")

    @property
    def total_bytes(self) -> int:
        """Bytes of all clients' batches."""
        return self.nbytes * self.batch * self.clients

    @property
    def repeats(self) -> int:
        """Puts and gets in a round, fewer of those that take long."""
        return min(20, -(-(384 << 20) // self.total_bytes))


def moves(clients: Sequence[int]) -> list[Move]:
    """Small to large, one and 64 at a time."""
    return [
        Move(nbytes, batch, n)
        for n in clients
        for nbytes in (256 << 10, 1 << 20, 4 << 20)
        for batch in (1, 64)
    ]


class Harness:
    """The systems that run, and what was measured of them."""

    def __init__(self, systems: list[System], results: Results, rounds: int) -> None:
        self._systems = systems
        self._results = results
        self._rounds = rounds

    def measure_looks(self) -> None:
        """Look-ups of present keys among `LOADED_BLOCKS`."""
        stores = [system for system in self._systems if system.module not in LIMITS.values()]
        loaded = {"seed": "look", "n": LOADED_BLOCKS}
        for system in stores:
            with self._dropping(system, "look-ups"):
                system.workers[0].run("load", nbytes=LOADED_BYTES, batch=500, **loaded)
        for count in (1, 64, 1024, 8192):
            key = (f"{count} keys", "match")
            job = {**loaded, "count": count, "repeats": min(20, 40_960 // count)}
            for turn in range(self._rounds + 1):  # the first warms up
                for system in self._running(stores):
                    with self._dropping(system, key[0]):
                        answer = system.workers[0].run("look", **job)
                        if turn:
                            made = Round.of([answer["look"]], count)
                            self._results.systems[key][system.name].append(made)
        for system in self._running(stores):
            with self._dropping(system, "look-ups"):
                system.workers[0].run("unload", batch=500, **loaded)

    def measure_moves(self, shapes: Sequence[Move]) -> None:
        """Puts and gets: the limits and then all systems in turn, in each round, for each shape."""
        for shape in shapes:
            _say(f"moving {shape.name}")
            memcpy = limits.Memcpy(shape.nbytes, shape.batch * shape.clients)
            for turn in range(self._rounds + 1):
                self._measure_limits(shape, memcpy, keep=turn > 0)
                for system in self._running(self._systems):
                    if len(system.workers) < shape.clients:
                        continue
                    with self._dropping(system, shape.name), system.turn():
                        spans = _together(system, shape, f"{shape.name}/{turn}")
                        for op in ("put", "get") if turn else ():
                            made = Round.of(spans[op], shape.nbytes * shape.batch)
                            self._place(system)[shape.name, op][system.name].append(made)

    def _measure_limits(self, shape: Move, memcpy: limits.Memcpy, *, keep: bool) -> None:
        for op in ("put", "get"):
            for threads, name in enumerate(COPIES, 1):
                made = Round.of([memcpy.spans(op, threads, shape.repeats)], memcpy.nbytes)
                if keep:
                    self._results.limits[shape.name, op][name].append(made)
        if keep and shape.batch > 1:
            for name, rate in limits.machine_rates(Path.cwd()).items():
                self._results.machine[name].append(rate)

    def _place(self, system: System) -> Any:
        limit = system.module in LIMITS.values()
        return self._results.limits if limit else self._results.systems

    def _running(self, systems: list[System]) -> list[System]:
        return [system for system in systems if system.name not in self._results.missing]

    @contextlib.contextmanager
    def _dropping(self, system: System, work: str) -> Iterator[None]:
        """A system that fails takes no further part: its clients may wait for one another."""
        try:
            yield
        except JobError as error:
            self._results.missing[system.name] = f"from {work} on: {error}"
            _say(f"failed: {system.name}: {error}")


def _together(system: System, shape: Move, seed: str) -> dict[str, list[list[Span]]]:
    """One job in all clients, each put and each get begun by all at once."""
    workers = system.workers[: shape.clients]
    meet = len(workers) > 1
    job = {"nbytes": shape.nbytes, "batch": shape.batch, "repeats": shape.repeats, "meet": meet}
    for i, worker in enumerate(workers):
        worker.begin("move", seed=f"{seed}/{i}", **job)
    for _ in range(2 * (shape.repeats + 1) if meet else 0):
        for worker in workers:
            worker.finish()
        at = time.monotonic() + _HEAD_START_S
        for worker in workers:
            worker.go(at)
    answers = [worker.finish() for worker in workers]
    return {op: [answer[op] for answer in answers] for op in ("put", "get")}


@contextlib.contextmanager
def all_running(
    names: Sequence[str], folder: Path, clients: int, results: Results
) -> Iterator[list[System]]:
    """Every system that can be had, each idle but in its turn."""
    with contextlib.ExitStack() as stack:
        systems = []
        for name in names:
            _say(f"starting {name}")
            attempt = running(ADAPTERS[name], folder, pool_bytes=POOL_BYTES, clients=clients)
            try:
                systems.append(stack.enter_context(attempt))
            except (RuntimeError, OSError) as error:
                results.missing[name] = str(error)
                _say(f"missing: {name}: {error}")
        yield systems


def fitting(shapes: Sequence[Move], results: Results) -> list[Move]:
    """Those for which there is memory beside the pools: buffers to put from and to get into."""
    # Two systems keep their clients' buffers, one at a time has others', and memcpy has its own.
    left = limits.available_bytes() - 2 * limits.MOST_BYTES
    fit = [shape for shape in shapes if 6 * shape.total_bytes <= left]
    for shape in shapes:
        if shape not in fit:
            results.missing[shape.name] = "the machine has too little memory left"
    return fit


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--table", type=Path, help="also write the table to this file")
    parser.add_argument("--plot", type=Path, help="also draw them into this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--systems", nargs="*", choices=ADAPTERS, default=list(ADAPTERS))
    options = parser.parse_args()
    results = Results()
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as name:
        folder, clients = Path(name), max(options.clients)
        with all_running(options.systems, folder, clients, results) as systems:
            harness = Harness(systems, results, options.rounds)
            _say("looking up")
            harness.measure_looks()
            harness.measure_moves(fitting(moves(options.clients), results))
    by_module = {system.module: system.name for system in systems}
    ours = by_module.get(OURS["direct"], "")
    peers = [by_module[module] for module in PEERS.values() if module in by_module]
    document = {
        "machine": limits.facts(),
        "versions": {system.name: system.version for system in systems},
        "rounds": options.rounds,
        "ours": ours,
        "missing": results.missing,
        "limits": {name: statistics.median(rates) for name, rates in results.machine.items()},
        "limit_rounds": results.machine,
        "move_limits": results.limit_rows(),
        "results": results.rows(ours, peers),
    }
    if options.json:
        options.json.write_text(json.dumps(document))
    if options.plot:
        report.plot(document, options.plot)
    table = report.table(document)
    if options.table:
        options.table.write_text(table + "\n")
    print(table)
    own = {*OURS, *(by_module.get(module, "") for module in OURS.values())}
    sys.exit(not own.isdisjoint(results.missing))  # a peer may be missing, ours must not


if __name__ == "__main__":
    main()
