"""The gateway's life beside the core, on a loop of the test's own; a daemon's start and end."""

from __future__ import annotations

import contextlib
import gc
import heapq
import itertools
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from daemon import Daemon, daemon
from kvstore import __version__
from kvstore.errors import InvalidArgument
from kvstore.host import CgroupMemory, Host, HugePageCounts
from kvstore_server.serve import SocketFile, _Daemon, banner, check_pool_fits, gateway_command
from kvstore_server.settings import Settings
from kvstore_server.supervisor import (
    BackOff,
    Gateway,
    GatewayReady,
    Patience,
    parse_ready,
)

DEADLINE_S = 30.0
READY = GatewayReady(grpc_socket="/g.sock", grpc_port=7)

# A gateway of the supervisor's contract: says that it is ready, ends on SIGTERM or with the core.
GOOD = """
import json, os, select, signal, sys
ready, lifeline = int(sys.argv[-3]), int(sys.argv[-1])
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
os.write(ready, b'{"grpc_socket": "/g.sock", ')
os.write(ready, b'"grpc_port": 7}\\n')
os.close(ready)
select.select([lifeline], [], [])
os._exit(0)
"""
DEAF = GOOD.replace("lambda *_: os._exit(0)", "signal.SIG_IGN")
MUTE = GOOD.replace("os.write", "(lambda *_: None)")
# Dies, but leaves behind a process that keeps its pipe of readiness open, silently.
HEIR = MUTE.replace("os.close(ready)", "os.fork() and os._exit(3)")
DEAD = "raise SystemExit(3)"


class TestLoop:
    """The core's loop, as far as the supervisor uses it."""

    __test__ = False

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self.watched: set[int] = set()
        self.delays_s: list[float] = []

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        self._selector.register(fd, selectors.EVENT_READ, callback)
        self.watched.add(fd)

    def unwatch(self, fd: int) -> None:
        self._selector.unregister(fd)
        self.watched.remove(fd)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        self.delays_s.append(delay_s)
        due_s = time.monotonic() + delay_s
        heapq.heappush(self._timers, (due_s, next(self._order), callback))

    def run_until(self, condition: Callable[[], object]) -> None:
        end_s = time.monotonic() + DEADLINE_S
        while not condition():
            assert time.monotonic() < end_s, "the deadline is over"
            due_s = self._timers[0][0] if self._timers else end_s
            for key, _ in self._selector.select(max(0.0, min(due_s, end_s) - time.monotonic())):
                key.data()
            while self._timers and self._timers[0][0] <= time.monotonic():
                heapq.heappop(self._timers)[2]()

    def close(self) -> None:
        self._selector.close()


class Bench:
    """One supervised gateway, and all that it reported."""

    def __init__(self, loop: TestLoop, script: str, patience: Patience) -> None:
        self.loop = loop
        self.outcomes: list[GatewayReady | None] = []
        self.stopped: list[bool] = []
        self.gateway = Gateway(
            loop,
            [sys.executable, "-c", script],
            on_outcome=self.outcomes.append,
            patience=patience,
        )
        self.gateway.start()

    def run_until_outcomes(self, count: int) -> None:
        self.loop.run_until(lambda: len(self.outcomes) >= count)

    def drain(self) -> None:
        self.gateway.drain(lambda: self.stopped.append(True))
        self.loop.run_until(lambda: self.stopped)

    @property
    def pid(self) -> int:
        assert self.gateway._child is not None
        return self.gateway._child.process.pid


QUICK = Patience(back_off=BackOff(first_s=0.01, limit_s=0.04), ready_s=20.0, drain_s=20.0)


@pytest.fixture
def start() -> Iterator[Callable[..., Bench]]:
    """Makes benches; ends their processes, and checks that no descriptor is left."""
    gc.collect()  # other tests' memory may go meanwhile, and its descriptors with it
    before = set(os.listdir("/proc/self/fd"))
    loop = TestLoop()
    made: list[Bench] = []

    def make(script: str, patience: Patience = QUICK) -> Bench:
        made.append(Bench(loop, script, patience))
        return made[-1]

    yield make
    for bench in made:
        bench.gateway.close()
    loop.close()
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_back_off_doubles_to_its_limit_and_starts_over() -> None:
    back_off, delays, delay = BackOff(), [], None
    for _ in range(9):
        delay = back_off.delay_s(delay, lived_s=1.0)
        delays.append(delay)
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10.0, 10.0]
    assert back_off.delay_s(10.0, lived_s=59.9) == 10.0
    assert back_off.delay_s(10.0, lived_s=60.0) == 0.1


@pytest.mark.parametrize(
    "line", [b"", b"ready\n", b"[]\n", b"{}\n", b"null\n", b"\xff\n", b'{"grpc_port": 1}\n']
)
def test_only_a_gateways_own_words_are_ready(line: bytes) -> None:
    assert parse_ready(line) is None


def test_a_line_of_readiness() -> None:
    line = json.dumps({"grpc_socket": "/g.sock", "grpc_port": None}).encode()
    assert parse_ready(line) == GatewayReady(grpc_socket="/g.sock", grpc_port=None)


def test_a_gateway_is_ready_and_drains(start: Callable[..., Bench]) -> None:
    bench = start(GOOD)
    bench.run_until_outcomes(1)
    bench.drain()
    assert bench.outcomes == [READY]
    assert bench.loop.watched == set()


def test_a_killed_gateway_is_started_again(start: Callable[..., Bench]) -> None:
    bench = start(GOOD)
    bench.run_until_outcomes(1)
    first = bench.pid
    os.kill(first, signal.SIGKILL)
    bench.run_until_outcomes(3)
    assert bench.outcomes == [READY, None, READY]
    assert bench.pid != first


def test_a_gateway_that_cannot_live_is_tried_ever_more_rarely(start: Callable[..., Bench]) -> None:
    bench = start(DEAD)
    bench.run_until_outcomes(5)
    assert bench.outcomes == [None] * 5
    waits = [delay for delay in bench.loop.delays_s if delay != QUICK.ready_s]
    assert waits == [0.01, 0.02, 0.04, 0.04, 0.04]
    bench.drain()  # also between two lives


def test_a_program_that_is_not_there_is_an_outcome_not_a_crash(tmp_path: Path) -> None:
    loop, outcomes = TestLoop(), []
    command = [str(tmp_path / "none")]
    gateway = Gateway(loop, command, on_outcome=outcomes.append, patience=QUICK)
    gateway.start()
    loop.run_until(lambda: len(outcomes) == 3)
    gateway.close()
    loop.close()


def test_a_gateway_that_does_not_get_ready_is_replaced(start: Callable[..., Bench]) -> None:
    bench = start(MUTE, Patience(back_off=QUICK.back_off, ready_s=0.1, drain_s=20.0))
    bench.run_until_outcomes(2)
    assert bench.outcomes == [None, None]


def test_a_gateway_deaf_to_sigterm_is_killed(start: Callable[..., Bench]) -> None:
    bench = start(DEAF, Patience(back_off=QUICK.back_off, ready_s=20.0, drain_s=0.1))
    bench.run_until_outcomes(1)
    bench.drain()
    assert bench.stopped == [True]


def test_a_dead_gateways_pipe_is_let_go_though_another_holds_it(
    start: Callable[..., Bench],
) -> None:
    bench = start(HEIR)
    bench.run_until_outcomes(3)
    bench.drain()
    assert bench.outcomes == [None] * 3
    assert bench.loop.watched == set()


def test_no_start_after_a_drain(start: Callable[..., Bench]) -> None:
    bench = start(DEAD)
    bench.run_until_outcomes(1)
    bench.drain()
    bench.gateway.start()
    assert bench.loop.watched == set()


def environment(*folders: str) -> dict[str, str]:
    """This process's own, with its search path, for a Python process beside it."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*folders, *sys.path])}


CORE = """
import sys
from kvstore_server.logs import configure_logging
from test_supervisor import GOOD, Bench, QUICK, TestLoop
configure_logging("text", "error")
bench = Bench(TestLoop(), GOOD, QUICK)
bench.run_until_outcomes(1)
print(bench.pid, flush=True)
sys.stdin.read()
"""


def test_a_gateway_ends_with_its_core_however_that_ends() -> None:
    folder = Path(__file__).parent
    core = subprocess.Popen(
        [sys.executable, "-c", CORE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment(str(folder), str(folder.parent)),
    )
    with core:
        assert core.stdout is not None
        pidfd = os.pidfd_open(int(core.stdout.readline()))
        try:
            core.kill()
            with selectors.DefaultSelector() as selector:
                selector.register(pidfd, selectors.EVENT_READ)
                assert selector.select(DEADLINE_S), "the gateway outlived its core"
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.close(pidfd)


def settings(**values: object) -> Settings:
    return Settings.model_validate({"socket": "/r/k.sock", "data_dir": "/d", **values})


def test_the_gateways_command_line() -> None:
    command = gateway_command(settings(grpc_port=0), Path("/d/grpc.token"))
    assert command[1:4] == ["-P", "-m", "kvstore_server.gateway"]
    pairs = dict(zip(command[4::2], command[5::2], strict=True))
    assert pairs == {
        "--channel": "/r/k.sock",
        "--token-file": "/d/grpc.token",
        "--grpc-socket": "/r/k.grpc.sock",
        "--grpc-port": "0",
    }
    assert "--grpc-port" not in gateway_command(settings(), Path("/d/grpc.token"))


def test_the_banner_tells_what_runs() -> None:
    lines = banner(settings(dram="8MiB", tenants=2, max_blocks=1000), READY, ["  more"])
    assert lines[0] == f"kvstore-server {__version__}"
    assert lines[-1].startswith("  ready")
    text = "\n".join(lines)
    for words in ("unix:///r/k.sock", "unix:///g.sock", "127.0.0.1:7", "8 MiB in 2 pools", "/d"):
        assert words in text
    assert "at most 1,000 a pool" in text
    assert "lru eviction" in text
    assert "  grpc      off" in banner(settings(grpc=False), None)
    assert any("down" in line for line in banner(settings(), None))


def host(*, available: int, limit: int | None = None, huge: int = 0) -> Host:
    groups = [CgroupMemory(folder=Path("/cg"), limit_bytes=n, used_bytes=0) for n in [limit] if n]
    return Host(
        kernel="6",
        memory_total_bytes=1 << 40,
        memory_available_bytes=available,
        cgroups=tuple(groups),
        shm_bytes=None,
        memlock_bytes=None,
        huge_pages=HugePageCounts(total=huge, free=huge, page_bytes=2 << 20),
        shmem_thp=None,
        numa_nodes=(0,),
    )


def test_a_pool_must_fit_the_machine_and_the_cgroup() -> None:
    wanted = settings(dram="8MiB")
    check_pool_fits(wanted, host(available=8 << 20))
    with pytest.raises(InvalidArgument, match=r"dram: .*8 MiB .*4 MiB .*MemAvailable"):
        check_pool_fits(wanted, host(available=4 << 20))
    with pytest.raises(InvalidArgument, match=r"2 MiB .*memory cgroup /cg"):
        check_pool_fits(wanted, host(available=4 << 20, limit=2 << 20))


def test_reserved_huge_pages_are_room_of_their_own() -> None:
    check_pool_fits(settings(dram="8MiB"), host(available=0, huge=4))
    with pytest.raises(InvalidArgument):
        check_pool_fits(settings(dram="8MiB", huge_pages="off"), host(available=0, huge=4))


def bound(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


def test_only_our_own_socket_file_is_removed(tmp_path: Path) -> None:
    path, successor = tmp_path / "k.sock", tmp_path / "successor"
    bound(path)
    ours = SocketFile(path)
    ours.remove()  # never seen, so not ours
    ours.see()
    bound(successor)
    successor.rename(path)
    ours.remove()
    assert path.exists()
    ours.see()
    ours.remove()
    assert not path.exists()


def test_what_is_no_socket_is_never_removed(tmp_path: Path) -> None:
    path = tmp_path / "k.sock"
    path.touch()
    file = SocketFile(path)
    file.see()
    file.remove()
    assert path.exists()


def test_a_drain_turns_clients_away_before_it_waits(tmp_path: Path) -> None:
    path, stops = tmp_path / "k.sock", []
    bound(path)
    channel = SocketFile(path)
    channel.see()
    loop = SimpleNamespace(stop=lambda: stops.append(path.exists()), unwatch=lambda _: None)
    signals = SimpleNamespace(fd=-1)
    _Daemon(settings(grpc=False, socket=path), None, loop, channel, signals).drain()
    assert stops == [False]


def test_a_daemon_starts_without_flags_and_drains(tmp_path: Path) -> None:
    env = {"KVSTORE_DRAM": "32MiB", "KVSTORE_LOG_FORMAT": "json"}
    with daemon(tmp_path, env=env) as running:
        assert running.banner[0] == f"kvstore-server {__version__}"
        assert any("32 MiB" in line for line in running.banner)
        assert running.socket.is_socket()
        running.terminate()
    assert [json.loads(line)["event"] for line in running.log] == ["drains"]


def test_a_daemon_serves_while_its_gateway_fails(tmp_path: Path) -> None:
    # A folder where the gateway wants its socket: it can never serve, the channel can.
    blocked = tmp_path / "kvstore.grpc.sock"
    blocked.mkdir()
    process = Daemon(tmp_path, "--dram", "32MiB", grpc=True)
    try:
        process.wait_ready()
        assert any("down" in line for line in process.banner)
        assert process.kill(signal.SIGTERM) == 0
    finally:
        process.end()
    assert not process.socket.exists()
    assert blocked.is_dir()


def test_a_gateway_is_beside_the_daemon_and_leaves_nothing(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "32MiB", "--grpc-port", "0", grpc=True) as running:
        line = next(line for line in running.banner if line.startswith("  grpc"))
        assert f"unix://{running.grpc_socket}" in line
        assert "127.0.0.1:" in line
        assert running.grpc_socket.is_socket()
        assert running.grpc_socket.stat().st_mode & 0o077 == 0


def test_a_daemon_killed_outright_takes_its_gateway_with_it(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "32MiB", grpc=True) as running:
        running.kill(signal.SIGKILL)
    # The gateway writes to the daemon's standard error too, so its end of file is both ends.
    assert running._drain is not None
    assert not running._drain.is_alive()


def test_a_second_signal_ends_at_once_but_a_doubled_one_is_one() -> None:
    script = (
        "import os, signal\n"
        "from kvstore_server.serve import EndingSignals\n"
        "times_s = [5.0, 5.1, 9.0]\n"
        "signals = EndingSignals(now_s=lambda: times_s.pop(0))\n"
        "for number in (signal.SIGTERM, signal.SIGINT):\n"
        "    os.kill(os.getpid(), number)\n"
        "print(os.read(signals.fd, 9), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
        "print('still here', flush=True)\n"
    )
    command = [sys.executable, "-c", script]
    done = subprocess.run(
        command, capture_output=True, env=environment(), timeout=DEADLINE_S, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGTERM, b"b'x'\n")
