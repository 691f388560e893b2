"""A real etcd on loopback, for the cluster's demo and for tests: found or fetched, started, ended.

`etcd` on the PATH is taken where there is one. Otherwise Debian's package (Ubuntu's likewise) is
fetched and unpacked, which needs neither root nor the system's package lists.
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
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

from kvstore_engines.smollm2 import Progress, default_cache

_FETCH_S = 120.0
_END_S = 10.0
_STARTS = 5
_READY = "ready to serve client requests"
# Below the ports that the system hands out: while etcd is stopped, nobody gets its port by chance,
# not even a client that tries to reach it, whose own end may be any port of those.
_PORTS = range(20_000, 32_000)
# An election takes a tenth of a second instead of one, and leases of one second are allowed.
_QUICK = ("--heartbeat-interval", "10", "--election-timeout", "100")


class EtcdUnavailableError(RuntimeError):
    """etcd cannot be had or does not start; the message says why, and what would help."""


def find_etcd(cache: Path | None = None, progress: Progress | None = None) -> Path:
    """The program: the one on the PATH, else the one in `cache`, which is fetched once.

    progress is told what takes long, before it begins. Raises EtcdUnavailableError.
    """
    found = shutil.which("etcd")
    if found:
        return Path(found)
    cache = (cache or default_cache() / "etcd").absolute()
    program = cache / "usr" / "bin" / "etcd"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # others may want it at the same time
        if not program.exists():
            if progress:
                progress("fetching the distribution's package etcd-server, 20 MB")
            _fetch(program, cache / "package")
    return program


def _fetch(program: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        try:
            _run(["apt-get", "download", "etcd-server"], folder)
        except EtcdUnavailableError:  # no lists of packages, as in a new container: some of our own
            apt = ["apt-get", *_own_lists(folder / "apt")]
            _run([*apt, "update"], folder)
            _run([*apt, "download", "etcd-server"], folder)
        (package,) = folder.glob("etcd-server_*.deb")
        _run(["dpkg-deb", "-x", str(package), "unpacked"], folder)
        program.parent.mkdir(parents=True, exist_ok=True)
        (folder / "unpacked" / "usr" / "bin" / "etcd").rename(program)
    except (RuntimeError, OSError, ValueError) as error:
        raise EtcdUnavailableError(f"etcd is needed: install etcd-server ({error})") from None
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
        raise EtcdUnavailableError(f"{command[0]} took longer than {_FETCH_S:.0f} s") from None
    if done.returncode:
        raise EtcdUnavailableError(f"{' '.join(command)}: {done.stderr.strip()[-500:]}")


def free_port() -> int:
    """A loopback port that nobody has, nor is given unless it asks for it."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise EtcdUnavailableError("no free port")


class EtcdServer:
    """One etcd of one member, stopped at first. Its data stays in the folder between starts.

    program: see `find_etcd`. flags: beside those that are always there. scheme: `https` needs
    flags with certificates.
    """

    def __init__(self, program: Path, folder: Path, *flags: str, scheme: str = "http") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._program = program
        self.folder, self._flags, self._scheme = folder, flags, scheme
        self.process: subprocess.Popen[str] | None = None
        self._drain: threading.Thread | None = None
        self.log: list[str] = []
        self.port = 0
        self._peer_port = 0

    @property
    def endpoint(self) -> str:
        """Where clients reach it, also while it is stopped."""
        return f"{self._scheme}://127.0.0.1:{self.port}"

    def start(self) -> Self:
        """Returns once it serves. The first start chooses the ports, which then stay.

        Raises EtcdUnavailableError.
        """
        for _ in range(1 if self.port else _STARTS):
            self.port = self.port or free_port()
            self._peer_port = self._peer_port or free_port()
            if self._try_start():
                return self
            shutil.rmtree(self.folder / "data", ignore_errors=True)
            self.port = self._peer_port = 0  # somebody may have been quicker at the port
        raise EtcdUnavailableError("etcd did not start: " + "\n".join(self.log[-20:]))

    def stop(self, number: int = signal.SIGTERM) -> None:
        """Ends it as an operator does, or by another signal. Safe to call twice."""
        process, self.process = self.process, None
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

    def _command(self) -> list[str]:
        peer = f"http://127.0.0.1:{self._peer_port}"
        return [
            *(str(self._program), "--name", "only", "--data-dir", "data"),
            *("--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", f"only={peer}", *_QUICK, *self._flags),
        ]

    def _try_start(self) -> bool:
        assert self.process is None, "it runs"
        self.process = subprocess.Popen(
            self._command(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=_clean_environment(),
        )
        ready = threading.Event()
        self._drain = threading.Thread(target=self._read_log, args=(self.process, ready))
        self._drain.start()
        ready.wait(_END_S)
        if any(_READY in line for line in self.log):
            return True
        self.stop(signal.SIGKILL)
        return False

    def _read_log(self, process: subprocess.Popen[str], ready: threading.Event) -> None:
        assert process.stderr is not None
        self.log = []
        for line in process.stderr:
            self.log.append(line.rstrip("\n"))
            if _READY in line:
                ready.set()
        ready.set()  # or it has ended


def _clean_environment() -> Mapping[str, str]:
    """Settings of whoever starts it must not change what it does."""
    return {name: value for name, value in os.environ.items() if not name.startswith("ETCD_")}
