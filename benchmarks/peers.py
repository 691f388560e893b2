"""Ours beside the peers and the machine's limits: `python -m benchmarks.peers [--json]`.

Systems take turns within each round, so that a machine that drifts hurts all alike. Every byte of
every get is compared. A peer that cannot be had here is reported as missing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import limits, report
from benchmarks.systems import System, running

ADAPTERS = {
    "embedded": "benchmarks.adapters.kvstore_embedded",
    "direct": "benchmarks.adapters.kvstore_daemon",
    "copy-in": "benchmarks.adapters.kvstore_copy_in",
    "grpc": "benchmarks.adapters.kvstore_grpc",
    "mooncake": "benchmarks.adapters.mooncake",
    "mooncake-tcp": "benchmarks.adapters.mooncake_tcp",
    "redis": "benchmarks.adapters.redis",
}
POOL_BYTES = 1 << 30
LOADED_BLOCKS = 10_000
LOADED_BYTES = 3840  # with our header one granule


@dataclass(frozen=True, slots=True)
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


def moves(clients: Sequence[int]) -> list[Move]:
    """Small to large, one and 64 at a time; several clients share what one would move."""
    shapes = [
        Move(nbytes, batch, n)
        for n in clients
        for nbytes in (256 << 10, 1 << 20, 4 << 20)
        for batch in (1, 64)
    ]
    return [shape for shape in shapes if shape.nbytes * shape.batch * shape.clients <= POOL_BYTES]


class Results:
    """What was measured: seconds a call, and bytes a second over all clients of a round."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(dict)
        self.rates: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(dict)
        self.missing: dict[str, str] = {}

    def add(
        self, key: tuple[str, str], system: str, spans: list[list[tuple[float, float]]], amount: int
    ) -> None:
        """spans: for each client its (begin, end) times; amount: bytes or keys of one span."""
        seconds = self.seconds[key].setdefault(system, [])
        rates = self.rates[key].setdefault(system, [])
        for together in zip(*spans, strict=True):
            seconds += [end - begin for begin, end in together]
            first = min(begin for begin, _ in together)
            last = max(end for _, end in together)
            rates.append(amount * len(together) / (last - first))

    def summary(self) -> list[dict[str, Any]]:
        """One row for each work and system."""
        rows = []
        for key, systems in self.rates.items():
            for system, rates in systems.items():
                seconds = sorted(self.seconds[key][system])
                rows.append(
                    {
                        "work": key[0],
                        "op": key[1],
                        "system": system,
                        "rate": statistics.median(rates),
                        "p50_us": 1e6 * statistics.median(seconds),
                        "p99_us": 1e6 * seconds[min(len(seconds) - 1, int(0.99 * len(seconds)))],
                    }
                )
        return rows


def measure_moves(results: Results, systems: list[System], shapes: list[Move], rounds: int) -> None:
    """All systems in turn, in each round, for each shape."""
    for shape in shapes:
        repeats = 20 if shape.batch == 1 else 2
        for turn in range(rounds + 1):  # the first warms up
            for system in systems:
                spans = _together(system, shape, f"{shape.name}/{turn}", repeats)
                for op in ("put", "get") if turn else ():
                    results.add(
                        (shape.name, op), system.name, spans[op], shape.nbytes * shape.batch
                    )


def _together(system: System, shape: Move, seed: str, repeats: int) -> dict[str, list[Any]]:
    """One job in all clients at once."""
    workers = system.workers[: shape.clients]
    job = {"nbytes": shape.nbytes, "batch": shape.batch, "repeats": repeats}
    for i, worker in enumerate(workers):
        worker.begin("move", seed=f"{seed}/{i}", **job)
    answers = [worker.finish() for worker in workers]
    return {op: [answer[op] for answer in answers] for op in ("put", "get")}


def measure_looks(results: Results, systems: list[System], rounds: int) -> None:
    """Look-ups of present keys, in random order, among `LOADED_BLOCKS`."""
    for system in systems:
        system.workers[0].run("load", seed="look", nbytes=LOADED_BYTES, n=LOADED_BLOCKS, batch=500)
    for count in (1, 64, 1024, 8192):
        for turn in range(rounds + 1):
            for system in systems:
                answer = system.workers[0].run(
                    "look", seed="look", n=LOADED_BLOCKS, count=count, repeats=20
                )
                if turn:
                    key = (f"{count} keys", "match")
                    results.add(key, system.name, [answer["look"]], count)
    for system in systems:
        system.workers[0].run("unload", seed="look", n=LOADED_BLOCKS, batch=500)


def measure_limits(folder: Path) -> dict[str, float]:
    """The machine's limits, bytes a second."""
    memcpy = limits.Memcpy()
    write, read = limits.disk_rates(folder)
    return {
        "memcpy, 1 thread": limits.medians(lambda: memcpy.rate(1)),
        "memcpy, 2 threads": limits.medians(lambda: memcpy.rate(2)),
        "loopback TCP": limits.medians(limits.tcp_rate),
        "unix socket": limits.medians(limits.unix_rate),
        "O_DIRECT write": write,
        "O_DIRECT read": read,
    }


@contextlib.contextmanager
def all_running(
    names: list[str], folder: Path, clients: int, results: Results
) -> Iterator[list[System]]:
    """Every system that can be had, each idle but in its turn."""
    with contextlib.ExitStack() as stack:
        systems = []
        for name in names:
            _say(f"starting {name}")
            attempt = running(ADAPTERS[name], folder, pool_bytes=POOL_BYTES, clients=clients)
            try:
                systems.append(stack.enter_context(attempt))
            except (RuntimeError, OSError, StopIteration) as error:
                results.missing[name] = str(error)
                _say(f"missing: {name}: {error}")
        yield systems


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--plot", type=Path, help="also draw them into this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, nargs="*", default=[1, 4])
    parser.add_argument("--systems", nargs="*", choices=ADAPTERS, default=list(ADAPTERS))
    options = parser.parse_args()
    results = Results()
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as name:
        folder = Path(name)
        with all_running(options.systems, folder, max(options.clients), results) as systems:
            _say("looking up")
            measure_looks(results, systems, options.rounds)
            _say("moving blocks")
            measure_moves(results, systems, moves(options.clients), options.rounds)
        _say("measuring the limits")
        machine = measure_limits(Path.cwd())
    document = {
        "machine": {"processor": platform.processor() or platform.machine()},
        "limits": machine,
        "missing": results.missing,
        "results": results.summary(),
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))
    if options.plot:
        report.plot(document, options.plot)
    print(report.table(document))


if __name__ == "__main__":
    main()
