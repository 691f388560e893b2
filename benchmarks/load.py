"""The channel while gRPC is busy: `python -m benchmarks.load [--json FILE]`.

One client on shared memory puts, gets and matches, while other processes do the same over gRPC:
none, some at a bounded rate, or as fast as they can. Its own calls keep coming at one pace. A bare
round trip is made at a round's start, and again when a put has left the daemon something to do.
What a process that only echoes would take in the daemon's place is measured beside it: more than
that is ours, the rest is the machine's, where more wants to run than it has processors.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.daemon import daemon
from benchmarks.samples import random_keys, summary
from kvstore import Hit, Layout, Session, commands
from kvstore.channel.paths import grpc_socket
from kvstore.channel.port import ChannelPort
from kvstore_client import KVStoreClient

TARGET_P99_US = 1000.0
BLOCK_BYTES = 256 << 10
MATCHED_KEYS = 64
_POOL_BYTES = 1 << 30
_TIMEOUT_S = 30.0
_WARM_S = 1.0
_SMALL = bytes(64)
_TICKS = os.sysconf("SC_CLK_TCK")
_LAYOUT = Layout.opaque(model="load", block_bytes=BLOCK_BYTES, block_tokens=16)
_NOTHING_READ = commands.Touch(
    granules=np.empty(0, np.uint32),
    generations=np.empty(0, np.uint64),
    lookups=0,
    hits=0,
    cold_hits=0,
)
Document = dict[str, Any]


class Caller:
    """Puts, gets and matches of one client, each checked; what it put it drops again."""

    def __init__(self, session: Session, seed: int) -> None:
        self._session, self._rng = session, np.random.default_rng(seed)
        self._space = session.open_namespace("load", _LAYOUT)
        self._source = self._rng.integers(0, 256, BLOCK_BYTES, np.uint8)
        self._target = np.zeros(BLOCK_BYTES, np.uint8)
        self._chain = random_keys(self._rng, MATCHED_KEYS)
        self._session.put(self._space, self._chain, [self._source] * MATCHED_KEYS)
        self.calls: dict[str, Callable[[], bool]] = {
            "put": self._put,
            "get": self._get,
            "match": self._match,
        }
        self.renew()

    def renew(self) -> None:
        """The next put is of a new block."""
        self._keys = random_keys(self._rng, 1)
        self._target.fill(0)

    def drop(self) -> None:
        """Makes room; AssertionError where the get did not bring what was put."""
        if not np.array_equal(self._source, self._target):
            raise AssertionError("a get returned other bytes than were put")
        self._session.drop(self._space, self._keys)

    def _put(self) -> bool:
        return self._session.put(self._space, self._keys, [self._source]).stored == 1

    def _get(self) -> bool:
        answers = self._session.get_into(self._space, self._keys, [self._target])
        return isinstance(answers[0], Hit)

    def _match(self) -> bool:
        return self._session.match(self._space, self._chain).count == MATCHED_KEYS


def _round(caller: Caller, period_s: float, due: float) -> float:
    """Waits until a round is due; returns when the next one is."""
    wait_s = due - time.monotonic()
    if wait_s > 0:
        time.sleep(wait_s)
    caller.renew()
    # Who is late does not make up for it: that would be a burst.
    return max(due, time.monotonic() - period_s) + period_s


def load(target: str, seed: int, period_s: float, ended: Event, done: Synchronized[int]) -> None:
    """A process that makes rounds of calls over gRPC, one every `period_s`, counted in `done`."""
    with KVStoreClient(target, timeout_s=_TIMEOUT_S) as client:
        caller, due = Caller(client, seed), time.monotonic()
        while not ended.is_set():
            due = _round(caller, period_s, due)
            if not all(call() for call in caller.calls.values()):
                raise AssertionError("a call over gRPC failed")
            caller.drop()
            with done.get_lock():
                done.value += 1


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process had of the processors since it began, seconds."""

    ran_s: float
    waited_s: dict[int, float]  # by thread: ready to run, but not run

    @classmethod
    def of(cls, pid: int) -> Usage:
        """From /proc."""
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        waited_s = {}
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended since
                words = (thread / "schedstat").read_text().split()
                waited_s[int(thread.name)] = int(words[1]) / 1e9
        return cls((int(fields[11]) + int(fields[12])) / _TICKS, waited_s)

    def waited_since(self, earlier: Usage) -> float:
        """Seconds, of the threads that there still are."""
        before = earlier.waited_s
        return sum(now_s - before.get(thread, 0.0) for thread, now_s in self.waited_s.items())


def machine_s() -> tuple[float, float]:
    """Seconds that all processes together have run, and that the host took from this machine."""
    words = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, words)
    return (user + nice + system + irq + softirq) / _TICKS, steal / _TICKS


class Echo:
    """A process that sends back what it gets over a unix socket, and does nothing else."""

    def __init__(self) -> None:
        self._near, far = socket.socketpair()
        self._process = multiprocessing.get_context("spawn").Process(target=_echo, args=(far,))
        self._process.start()
        far.close()
        self.call()  # it runs

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid or 0

    def call(self) -> bool:
        """One round trip."""
        self._near.send(_SMALL)
        return self._near.recv(len(_SMALL)) == _SMALL

    def close(self) -> None:
        """Ends the process."""
        self._near.close()
        self._process.join()


def _echo(end: socket.socket) -> None:
    while received := end.recv(len(_SMALL)):
        end.send(received)


class Loaders:
    """Processes that load the gateway, for the length of a `with`."""

    def __init__(self, n: int, target: str, period_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._ended = context.Event()
        self._done = [context.Value("q") for _ in range(n)]
        self._processes = [
            context.Process(target=load, args=(target, i + 1, period_s, self._ended, done))
            for i, done in enumerate(self._done)
        ]

    @property
    def pids(self) -> dict[str, int]:
        """By name."""
        return {f"loader {i}": process.pid or 0 for i, process in enumerate(self._processes, 1)}

    @property
    def rounds(self) -> int:
        """How many all of them have made."""
        return sum(done.value for done in self._done)

    def __enter__(self) -> Loaders:
        for process in self._processes:
            process.start()
        while not all(done.value for done in self._done):
            if any(process.exitcode is not None for process in self._processes):
                raise RuntimeError("a loader ended")
            time.sleep(0.05)
        time.sleep(_WARM_S)
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for process in self._processes:
            process.join()


def measure(
    calls: dict[str, Callable[[], bool]],
    caller: Caller,
    pids: dict[str, int],
    loaders: Loaders,
    *,
    rounds: int,
    period_s: float,
) -> Document:
    """Rounds of the channel's calls under one load; `caller` makes some of `calls`."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    before = {name: Usage.of(pid) for name, pid in pids.items()}
    machine_before, stolen_before = machine_s()
    made, due = loaders.rounds, time.monotonic()
    begin = due
    for _ in range(rounds):
        due = _round(caller, period_s, due)
        for name, call in calls.items():
            start = time.perf_counter()
            good = call()
            seconds[name].append(time.perf_counter() - start)
            if not good:
                raise AssertionError(f"{name} failed")
        caller.drop()
    lasted = time.monotonic() - begin
    after = {name: Usage.of(pid) for name, pid in pids.items()}
    ran_s = {name: used.ran_s - before[name].ran_s for name, used in after.items()}
    machine, stolen = machine_s()
    others_s = machine - machine_before - sum(ran_s.values())
    return {
        "calls": {name: summary(times) for name, times in seconds.items()},
        "loader_rounds_per_s": (loaders.rounds - made) / lasted,
        "rounds_per_s": rounds / lasted,
        "cores": {name: ran / lasted for name, ran in ran_s.items()},
        "waiting": {name: used.waited_since(before[name]) / lasted for name, used in after.items()},
        "others_cores": max(0.0, others_s) / lasted,
        "stolen_cores": (stolen - stolen_before) / lasted,
    }


def measure_all(folder: Path, options: argparse.Namespace) -> Document:
    """Each load in turn, on one daemon."""
    n = options.loaders
    loads = {
        "no load": (0, 0.0),
        f"{n} loaders, {options.rate:g} rounds/s each": (n, 1 / options.rate),
        f"{n} loaders, unbounded": (n, 0.0),
    }
    found: Document = {}
    with contextlib.ExitStack() as stack:
        running = stack.enter_context(daemon(folder / "daemon", _POOL_BYTES))
        client = stack.enter_context(running.connect())
        gateway = f"grpc+unix://{grpc_socket(running.socket)}"
        with KVStoreClient(gateway, lazy=True) as remote:
            remote.info(timeout_s=_TIMEOUT_S)
        port = stack.enter_context(contextlib.closing(ChannelPort(str(running.socket), _TIMEOUT_S)))
        echo = stack.enter_context(contextlib.closing(Echo()))

        def bare() -> bool:
            return isinstance(port.call(_NOTHING_READ, _TIMEOUT_S), commands.Count)

        caller = Caller(client, seed=0)
        calls = {"bare round trip": bare, **caller.calls}
        calls |= {"round trip behind a put": bare, "echo process": echo.call}
        pids = {"channel client": os.getpid(), "daemon's core": running.pid}
        pids |= {"gateway": running.gateway_pid(), "echo process": echo.pid}
        for name, (processes, period_s) in loads.items():
            with Loaders(processes, gateway, period_s) as loaders:
                found[name] = measure(
                    calls,
                    caller,
                    pids | loaders.pids,
                    loaders,
                    rounds=options.rounds,
                    period_s=1 / options.pace,
                )
    return found


def table(document: Document) -> str:
    """Markdown: the calls by load, then who had the processors."""
    loads = document["loads"]
    head = f"| p50, p99, p99.9 us (p99 target: {TARGET_P99_US:,.0f}) | "
    lines = [head + " | ".join(loads) + " |", "|---" * (len(loads) + 1) + "|"]
    for name in next(iter(loads.values()))["calls"]:
        cells = [_cell(found["calls"][name]) for found in loads.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for title, key in (("this client", "rounds_per_s"), ("loaders", "loader_rounds_per_s")):
        cells = [f"{found[key]:,.0f}" for found in loads.values()]
        lines.append(f"| {title}, rounds/s | " + " | ".join(cells) + " |")
    head = "| processors used, and waited for by threads that could run | "
    lines += ["", head + " | ".join(loads) + " |", "|---" * (len(loads) + 1) + "|"]
    for name in list(loads.values())[-1]["cores"]:
        cells = [
            f"{found['cores'][name]:.2f}, {found['waiting'][name]:.2f}"
            if name in found["cores"]
            else "-"
            for found in loads.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    for title, key in (("anything else", "others_cores"), ("taken by the host", "stolen_cores")):
        cells = [f"{found[key]:.2f}" for found in loads.values()]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(call: dict[str, float]) -> str:
    text = f"{call['p50_us']:,.0f}, {call['p99_us']:,.0f}, {call['p999_us']:,.0f}"
    return text if call["p99_us"] <= TARGET_P99_US else f"{text} (missed)"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--loaders", type=int, default=2, help="processes that load the gateway")
    parser.add_argument("--rate", type=float, default=20.0, help="rounds/s of a bounded loader")
    parser.add_argument("--rounds", type=int, default=3000, help="of the channel's client")
    parser.add_argument("--pace", type=float, default=200.0, help="its rounds/s")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as name:
        loads = measure_all(Path(name), options)
    document: Document = {
        "loaders": options.loaders,
        "rate": options.rate,
        "pace": options.pace,
        "loads": loads,
    }
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))
    print(table(document))


if __name__ == "__main__":
    main()
