"""A real etcd for tests: found or fetched, started on loopback, ended by pid, nothing left behind.

`etcd` on the PATH is taken where there is one. Otherwise Debian's package (Ubuntu's likewise) is
fetched and unpacked under `.cache/etcd`, which needs neither root nor the system's package lists.
"""

from __future__ import annotations

import fcntl
import os
import random
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

CACHE = Path(__file__).parents[2] / ".cache" / "etcd"
_FETCH_S = 120.0
_END_S = 10.0
_STARTS = 5
_READY = "ready to serve client requests"
# Below the ports that the system hands out: while etcd is stopped, nobody gets its port by chance,
# not even a client that tries to reach it, whose own end may be any port of those.
_PORTS = range(20_000, 32_000)
# An election takes a tenth of a second instead of one, and leases of one second are allowed.
_QUICK = ("--heartbeat-interval", "10", "--election-timeout", "100")


def find_etcd() -> Path:
    """The program; RuntimeError says what to do where it is not there and cannot be fetched."""
    found = shutil.which("etcd")
    if found:
        return Path(found)
    program = CACHE / "usr" / "bin" / "etcd"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests may run in several processes
        if not program.exists():
            _fetch(program)
    return program


def _fetch(program: Path) -> None:
    folder = CACHE / "package"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        try:
            _run(["apt-get", "download", "etcd-server"], folder)
        except RuntimeError:  # no lists of packages, as in a new container: fetch some of our own
            apt = ["apt-get", *_own_lists(folder / "apt")]
            _run([*apt, "update"], folder)
            _run([*apt, "download", "etcd-server"], folder)
        (package,) = folder.glob("etcd-server_*.deb")
        _run(["dpkg-deb", "-x", str(package), "unpacked"], folder)
        program.parent.mkdir(parents=True, exist_ok=True)
        (folder / "unpacked" / "usr" / "bin" / "etcd").rename(program)
    except (RuntimeError, OSError, ValueError) as error:
        raise RuntimeError(f"tests need etcd: install etcd-server ({error})") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _own_lists(folder: Path) -> list[str]:
    """Options with which apt-get keeps its lists in a folder, so that it needs no root."""
    for part in ("state/lists/partial", "cache/archives/partial"):
        (folder / part).mkdir(parents=True)
    options = {
        "Dir::State": folder / "state",
        "Dir::State::status": "/var/lib/dpkg/status",
        "Dir::Cache": folder / "cache",
        # As root apt-get turns into a user of its own, who may not write here.
        "APT::Sandbox::User": "root",
    }
    return [word for name, value in options.items() for word in ("-o", f"{name}={value}")]


def _run(command: Sequence[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, timeout=_FETCH_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{command[0]} took longer than {_FETCH_S:.0f} s") from None
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def free_port() -> int:
    """A loopback port that nobody has, nor is given unless it asks for it."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")


class Etcd:
    """One etcd of one member, stopped at first. Its data stays in the folder between starts.

    flags: beside those that are always there. scheme: `https` needs flags with certificates.
    """

    def __init__(self, folder: Path, *flags: str, scheme: str = "http") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._program = find_etcd()
        self.folder, self._flags, self._scheme = folder, flags, scheme
        self._process: subprocess.Popen[str] | None = None
        self._drain: threading.Thread | None = None
        self.log: list[str] = []
        self.port = 0
        self._peer_port = 0

    @property
    def endpoint(self) -> str:
        """Where clients reach it, also while it is stopped."""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def start(self) -> Etcd:
        """Returns once it serves. The first start chooses the ports, which then stay."""
        for _ in range(1 if self.port else _STARTS):
            self.port = self.port or free_port()
            self._peer_port = self._peer_port or free_port()
            if self._try_start():
                return self
            shutil.rmtree(self.folder / "data", ignore_errors=True)
            self.port = self._peer_port = 0  # somebody may have been quicker at the port
        raise RuntimeError("etcd did not start: " + "\n".join(self.log[-20:]))

    def stop(self) -> None:
        """Ends it as an operator does."""
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        """Ends it as a crash does, also while it is paused."""
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """Stops the process where it stands: connections stay open, nothing is answered."""
        assert self._process
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Ends a `pause`."""
        assert self._process
        self._process.send_signal(signal.SIGCONT)

    def _command(self) -> list[str]:
        peer = f"http://127.0.0.1:{self._peer_port}"
        return [
            *(str(self._program), "--name", "only", "--data-dir", "data"),
            *("--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"only={peer}", *_QUICK, *self._flags),
        ]

    def _try_start(self) -> bool:
        assert self._process is None, "it runs"
        self._process = subprocess.Popen(
            self._command(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=_clean_environment(),
        )
        ready = threading.Event()
        self._drain = threading.Thread(target=self._read_log, args=(self._process, ready))
        self._drain.start()
        ready.wait(_END_S)
        if any(_READY in line for line in self.log):
            return True
        self.kill()
        return False

    def _read_log(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        assert process.stderr is not None
        self.log = []
        for line in process.stderr:
            self.log.append(line.rstrip("\n"))
            if _READY in line:
                ready.set()
        ready.set()  # or it has ended

    def _end(self, number: int) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(_END_S)
        if self._drain:
            self._drain.join(_END_S)
        assert process.stderr is not None
        process.stderr.close()


def _clean_environment() -> Mapping[str, str]:
    """Settings of whoever runs the tests must not change what the tests see."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}


@contextmanager
def running_etcd(folder: Path, *flags: str, scheme: str = "http") -> Iterator[Etcd]:
    """An etcd that serves, for the length of a `with`."""
    server = Etcd(folder, *flags, scheme=scheme)
    try:
        yield server.start()
    finally:
        server.kill()


@pytest.fixture(scope="session")
def shared_etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Etcd]:
    """One etcd for all tests that leave it as it is, each with a cluster name of its own."""
    with running_etcd(tmp_path_factory.mktemp("etcd")) as server:
        yield server


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    """An etcd of the test's own, which it may stop, pause and kill."""
    with running_etcd(tmp_path / "etcd") as server:
        yield server
