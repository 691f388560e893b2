"""Nodes on this host, reached as if they were others: `python -m benchmarks.cluster [--json FILE]`.

Puts and gets of one client at one node, of the caller's own arrays and of registered memory, beside
NIXL by hand between two processes over the same transports in the same rounds: over the loopback
device, where the kernel's copies are what takes time, and over one that is made as slow as a
network's. In the same way what one host needs no network for: a client and its node left to
themselves, and a client on the daemon's own channel. Then a prompt's blocks from three nodes and
from one, on loopback and where each node has a link of its own, and how long single gets take while
nodes that hold one of two copies are killed. Links are made in network namespaces, where the kernel
allows it. Every byte is compared.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.daemon import Daemon, daemon
from benchmarks.networks import BUCKET, Network, alone
from benchmarks.samples import random_keys
from benchmarks.transfer import RAW, RAW_LARGE, Way, spread
from kvstore import Hit, Layout, Session
from kvstore.errors import KVStoreError
from kvstore.memory import Arena
from kvstore_client.cluster.session import ClusterSession
from kvstore_proto.cluster.rpc import client_token

SIZES = (256 << 10, 1 << 20, 4 << 20)
BLOCKS = 64
GOAL = 0.9  # of NIXL by hand
FAILOVER_GOAL_MS = 100.0
PROMPT_BLOCKS, PROMPT_BLOCK_BYTES = 64, 4 << 20  # 32 K tokens of 8 KiB, 512 a block
_POOL_BYTES = 1 << 30
_RING_BYTES = 1 << 30  # views and buffers may hold half of it
_HERE = "127.0.0.1"
LOOPBACK = "loopback"
ONE_HOST, CHANNEL = "one host, auto", "one host, channel"
BESIDE, FAN_OUT = "beside_raw", "fan_out"
_TIMEOUT_S = 30.0
_READY_S = 30.0
Document = dict[str, Any]
Rows = npt.NDArray[np.uint8]


class Nodes:
    """Daemons that are members of one cluster by a static list."""

    def __init__(
        self, folder: Path, n: int, replicas: int, transfer: str, network: Network | None = None
    ) -> None:
        self._folder, self._replicas, self._transfer = folder, replicas, transfer
        self._network = network
        self.ports = dict(zip("abcdefg"[:n], _free_ports(n), strict=True))
        self._secret = secrets.token_bytes(32)
        self._file = folder / "secret"
        self._file.write_bytes(self._secret)
        os.chmod(self._file, 0o600)
        self.daemons: dict[str, Daemon] = {}
        self._stack = contextlib.ExitStack()

    def start(self) -> None:
        """Starts all of them."""
        members = ",".join(f"{name}={address}" for name, address in self._addresses.items())
        for name, address in self._addresses.items():
            flags = ["--no-grpc", "--node-name", name, "--peer-listen", address]
            flags += ["--peer-insecure"] if self._network else []
            flags += ["--members", members, "--replicas", str(self._replicas)]
            flags += ["--cluster-secret", str(self._file), "--transfer", self._transfer]
            at = self._folder / name
            with self._network.inside(name) if self._network else contextlib.nullcontext():
                self.daemons[name] = self._stack.enter_context(daemon(at, _POOL_BYTES, *flags))

    @property
    def _addresses(self) -> dict[str, str]:
        hosts = self._network.addresses if self._network else dict.fromkeys(self.ports, _HERE)
        return {name: f"{hosts[name]}:{port}" for name, port in self.ports.items()}

    def client(self) -> ClusterSession:
        """A client, as soon as all nodes serve."""
        seeds = list(self._addresses.values())
        end = time.monotonic() + _READY_S
        session = ClusterSession(
            seeds,
            token=client_token(self._secret),
            transfer=self._transfer,
            timeout_s=_TIMEOUT_S,
            lazy=True,
            ring_bytes=_RING_BYTES,
        )
        while time.monotonic() < end:
            with contextlib.suppress(KVStoreError):
                if all(session.status(timeout_s=2.0).values()):
                    return session
            time.sleep(0.05)
        session.close()
        raise RuntimeError("the nodes do not serve")

    def close(self) -> None:
        """Ends them."""
        self._stack.close()


@contextlib.contextmanager
def nodes(
    n: int, *, replicas: int, transfer: str, network: Network | None = None
) -> Iterator[tuple[Nodes, ClusterSession]]:
    """Nodes that serve, and a client of theirs."""
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as name:
        running = Nodes(Path(name), n, replicas, transfer, network)
        try:
            running.start()
            with running.client() as session:
                yield running, session
        finally:
            running.close()


def _free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(socket.socket()) for _ in range(n)]
        for sock in socks:
            sock.bind((_HERE, 0))
        return [sock.getsockname()[1] for sock in socks]


class Mover:
    """Puts and gets of blocks of one size; what was put is dropped again."""

    def __init__(self, session: Session, size: int, n: int) -> None:
        layout = Layout.opaque(model="cluster", block_bytes=size, block_tokens=512)
        self._session = session
        self._space = session.open_namespace(f"bench-{size}-{n}", layout)
        self._data = np.random.default_rng(size).integers(0, 256, (n, size), np.uint8)
        self._room = np.zeros_like(self._data)
        self._turn = 0

    def move(self) -> tuple[float, float]:
        """Bytes a second of a put from the caller's arrays, and of a get of the same blocks to
        others."""
        chain = self._next_chain()
        begin = time.perf_counter()
        put = self._session.put(self._space, chain, list(self._data), position=0)
        middle = time.perf_counter()
        got = self._session.get_into(self._space, chain, list(self._room))
        end = time.perf_counter()
        if put.stored != len(chain) or not all(isinstance(each, Hit) for each in got):
            raise RuntimeError(f"not all blocks went there and back: {put}")
        self._compare(self._room)
        self._room[:] = 0
        self._session.drop(self._space, chain)
        return self._data.nbytes / (middle - begin), self._data.nbytes / (end - middle)

    def move_in_place(self) -> tuple[float, float]:
        """Bytes a second of a put from registered memory, and until a view of the blocks is had."""
        chain = self._next_chain()
        with self._session.buffers(*self._data.shape) as buffers:
            for buffer, row in zip(buffers.blocks, self._data, strict=True):
                buffer[:] = row
            begin = time.perf_counter()
            put = self._session.put(self._space, chain, buffers.blocks, position=0)
            took = time.perf_counter() - begin
        if put.stored != len(chain):
            raise RuntimeError(f"not all blocks went there: {put}")
        begin = time.perf_counter()
        with self._session.view(self._space, chain) as view:
            end = time.perf_counter()
            if len(view.blocks) != len(chain):
                raise RuntimeError("not all blocks came back")
            self._compare(np.array(view.blocks))
        self._session.drop(self._space, chain)
        return self._data.nbytes / took, self._data.nbytes / (end - begin)

    def _next_chain(self) -> Rows:
        self._turn += 1
        return random_keys(np.random.default_rng(self._turn), len(self._data))

    def _compare(self, got: Rows) -> None:
        if not np.array_equal(got, self._data):
            raise RuntimeError("wrong bytes")


def beside_raw(rounds: int, transfer: str, *, by_channel: bool = False) -> Document:
    """Ours and NIXL by hand, in interleaved rounds: bytes a second by size and way. by_channel:
    the node's store is reached as its own host's engines do it, and not as a cluster."""
    found: Document = {}
    with contextlib.ExitStack() as stack:
        arena = stack.enter_context(contextlib.closing(Arena.create("bench", BLOCKS * max(SIZES))))
        memory = arena.array
        memory[:] = 1
        running, cluster = stack.enter_context(nodes(1, replicas=1, transfer=transfer))
        session: Session = cluster
        if by_channel:
            session = stack.enter_context(running.daemons["a"].connect())
        plain, large = (
            stack.enter_context(contextlib.closing(Way(name, arena))) for name in (RAW, RAW_LARGE)
        )
        movers = {size: Mover(session, size, BLOCKS) for size in SIZES}
        for turn in range(rounds + 1):
            for size, mover in movers.items():
                rates = dict(zip(("put", "get"), mover.move(), strict=True))
                names = ("put in place", "view")
                rates |= dict(zip(names, mover.move_in_place(), strict=True))
                for name, raw in ((RAW, plain), (RAW_LARGE, large)):
                    pieces = spread(memory, raw.address, size)
                    for op in ("read", "write"):
                        begin = time.perf_counter()
                        raw.moves[op](pieces)
                        rates[f"{name}, {op}"] = pieces.total / (time.perf_counter() - begin)
                if turn:  # the first one warms up
                    for op, rate in rates.items():
                        found.setdefault(str(size), {}).setdefault(op, []).append(rate)
    return found


def fan_out(rounds: int, transfer: str, rate: str = "") -> Document:
    """Bytes a second of a get of one prompt's blocks from one node and from three. rate: of each
    node's own link; without one all are on loopback."""
    found: Document = {}
    with contextlib.ExitStack() as stack:
        network = None
        if rate:
            network = stack.enter_context(contextlib.closing(Network("abc")))
            for host in network.addresses:
                network.shape(host, rate)
        movers: dict[str, Mover] = {}
        for count in (1, 3):
            made = nodes(count, replicas=1, transfer=transfer, network=network)
            _, session = stack.enter_context(made)
            movers[str(count)] = Mover(session, PROMPT_BLOCK_BYTES, PROMPT_BLOCKS)
        for turn in range(rounds + 1):
            for n, mover in movers.items():
                _, get = mover.move()
                if turn:
                    found.setdefault(n, []).append(get)
    return found


def over_links(part: str, rate: str, options: argparse.Namespace) -> Document | None:
    """A part where bytes go over links of that rate, None where the kernel lets there be none."""
    shaped = f"ip link set lo up && tc qdisc add dev lo root tbf rate {rate} {BUCKET}"
    begin = [*alone(), "sh", "-ec", f'{shaped} && exec "$@"', "sh"] if part == BESIDE else alone()
    with tempfile.TemporaryDirectory(prefix="kvstore-bench-") as name:
        file = Path(name) / "results.json"
        run = [*begin, sys.executable, "-m", "benchmarks.cluster", "--json", str(file)]
        run += ["--rounds", str(options.rounds), "--transfer", options.transfer, "--only", part]
        run += ["--node-link", rate]
        try:
            subprocess.run(run, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"no links of {rate} can be made here: {error}", file=sys.stderr)
            return None
        found: Document = json.loads(file.read_text())
        return found


def failover(kills: int, transfer: str) -> Document:
    """For each kill of one of three nodes, how long the longest and all other gets took."""
    worst, usual, missed = [], [], 0
    for kill in range(kills):
        with nodes(3, replicas=2, transfer=transfer) as (running, session):
            times, lost = _gets_around_a_kill(running, session, "abc"[kill % 3])
            at = len(times) // 2
            usual.append(statistics.median(times[:at]))
            worst.append(max(times[at:]))
            missed += lost
    return {"worst_ms": worst, "usual_ms": usual, "failed": missed}


def _gets_around_a_kill(
    running: Nodes, session: ClusterSession, name: str
) -> tuple[list[float], int]:
    """Milliseconds of 100 gets before and 100 after a node is killed, and how many failed."""
    size, n = 256 << 10, 16
    layout = Layout.opaque(model="failover", block_bytes=size, block_tokens=512)
    space = session.open_namespace("failover", layout)
    data = np.random.default_rng(1).integers(0, 256, (n, size), np.uint8)
    chain = random_keys(np.random.default_rng(1), n)
    end = time.monotonic() + _READY_S
    # Nodes that have just started may not all take copies yet.
    while session.put(space, chain, list(data), position=0).replicated != n:
        if time.monotonic() > end:
            raise RuntimeError("the blocks are not replicated")
    room, times, failed = np.zeros_like(data), [], 0
    for turn in range(200):
        if turn == 100:
            os.kill(running.daemons[name].pid, signal.SIGKILL)
        begin = time.perf_counter()
        got = session.get_into(space, chain, list(room))
        times.append(1e3 * (time.perf_counter() - begin))
        sound = all(isinstance(each, Hit) for each in got) and np.array_equal(room, data)
        failed += not sound
        room[:] = 0
    return times, failed


def table(document: Document) -> str:
    """Markdown."""
    lines = [*_beside_lines(document[BESIDE]), *_fan_out_lines(document[FAN_OUT])]
    lines += ["", _failover_line(document["failover"]), ""]
    lines.append(f"Transfer by {document['transfer']}; medians of {document['rounds']} rounds.")
    return "\n".join(lines)


def _beside_lines(found: Document) -> list[str]:
    lines = []
    for ops, raw in ((("put", "put in place"), "read"), (("get", "view"), "write")):
        share = f"{ops[1]} / that"
        head = [f"{BLOCKS} blocks, GB/s", *ops, RAW, share, RAW_LARGE, share]
        lines += ["", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for link, sizes in found.items():
            for size, rates in (sizes or {}).items():
                cells = [f"{link}, {int(size) >> 10} KiB", *(_gb(rates[op]) for op in ops)]
                for name in (RAW, RAW_LARGE):
                    by_hand = rates[f"{name}, {raw}"]
                    cells += [_gb(by_hand), _share(rates[ops[1]], by_hand)]
                lines.append(f"| {' | '.join(cells)} |")
    return lines


def _fan_out_lines(found: Document) -> list[str]:
    nbytes = PROMPT_BLOCKS * PROMPT_BLOCK_BYTES >> 20
    head = f"a prompt of 32 K tokens, {nbytes} MiB, GB/s"
    lines = ["", f"| {head} | from one node | from three | times |", "|---|---|---|---|"]
    for link, rates in found.items():
        if rates:
            one, three = rates["1"], rates["3"]
            ratio = statistics.median(a / b for a, b in zip(three, one, strict=True))
            lines.append(f"| {link} | {_gb(one)} | {_gb(three)} | {ratio:.2f} |")
    return lines


def _failover_line(found: Document) -> str:
    worst = sorted(found["worst_ms"])
    each = ", ".join(f"{ms:.0f}" for ms in worst)
    return (
        f"{len(worst)} kills of one node of three, two copies of each block: {found['failed']}"
        f" gets failed; the longest get after one took {statistics.median(worst):.0f} ms (median)"
        f" and {worst[-1]:.0f} ms at worst ({each}), others"
        f" {statistics.median(found['usual_ms']):.1f} ms{_judged(worst[-1] <= FAILOVER_GOAL_MS)}."
    )


def _share(rates: list[float], of: list[float]) -> str:
    share = statistics.median(a / b for a, b in zip(rates, of, strict=True))
    return f"{share:.2f}{_judged(share >= GOAL)}"


def _gb(rates: list[float]) -> str:
    return f"{statistics.median(rates) / 1e9:.2f}"


def _judged(reached: bool) -> str:
    return "" if reached else " (missed)"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--rounds", type=int, default=5, help="of each measurement")
    parser.add_argument("--kills", type=int, default=6, help="of nodes, each in a new cluster")
    parser.add_argument(
        "--transfer", default="nixl", help="of the parts over links: nixl, ucxx or grpc"
    )
    parser.add_argument("--link", default="10gbit", help="to compare with NIXL over as well")
    parser.add_argument("--node-link", default="2gbit", help="that each of three nodes has")
    parser.add_argument("--only", choices=(BESIDE, FAN_OUT), help="a part, where links are made")
    options = parser.parse_args()
    rounds, transfer = options.rounds, options.transfer
    document: Document
    if options.only:
        whole = options.only == BESIDE
        document = (
            beside_raw(rounds, transfer) if whole else fan_out(rounds, transfer, options.node_link)
        )
    else:
        document = {
            "rounds": rounds,
            "transfer": transfer,
            BESIDE: {
                LOOPBACK: beside_raw(rounds, transfer),
                ONE_HOST: beside_raw(rounds, "auto"),
                CHANNEL: beside_raw(rounds, "auto", by_channel=True),
                options.link: over_links(BESIDE, options.link, options),
            },
            FAN_OUT: {
                LOOPBACK: fan_out(rounds, transfer),
                f"{options.node_link} a node": over_links(FAN_OUT, options.node_link, options),
            },
            "failover": failover(options.kills, transfer),
        }
        print(table(document))
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
