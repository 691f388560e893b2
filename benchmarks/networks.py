"""Networks of their own: hosts in namespaces, joined by a bridge whose ports can fail.

Whoever makes a `Network` must run in namespaces made for it, see `run_alone`: with that process all
of it is gone, whatever happened, and nothing of it was ever in the machine's own network.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_COMMAND_S = 10.0
_PAUSE_S = 0.02
_ALONE = ("unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc")
_TOOLS = ("unshare", "ip", "bridge")
_TRY = "ip link add br0 type bridge && ip link add v0 type veth peer name v1"
BUCKET = "burst 2mb latency 100ms"  # of what is shaped
_NOWHERE = "02:00:00:00:00:ff"  # the address of no host


def alone() -> list[str]:
    """The beginning of a command that runs in network and process namespaces of its own."""
    return [*_ALONE, *([] if os.geteuid() == 0 else ["--map-root-user"])]


def why_not() -> str:
    """Why there can be no such network on this machine; empty where there can."""
    missing = [tool for tool in _TOOLS if not shutil.which(tool)]
    if missing:
        return f"no {', '.join(missing)} on this machine"
    tried = subprocess.run(
        [*alone(), "sh", "-c", _TRY],
        capture_output=True,
        text=True,
        timeout=_COMMAND_S,
        check=False,
    )
    return f"no network namespaces here: {tried.stderr.strip()}" if tried.returncode else ""


def run_alone(arguments: Sequence[str], timeout_s: float) -> str:
    """Runs Python with arguments in namespaces of its own; what it wrote to standard output.
    AssertionError with all that it said where it failed; then, too, all its processes are gone."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [*alone(), sys.executable, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        try:
            said, errors = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()  # and with it, by the kernel, whatever is in its namespaces
            said, errors = process.communicate()
            raise AssertionError(f"not within {timeout_s} s: {said}\n{errors}") from None
    assert process.returncode == 0, f"{said}\n{errors}"
    return said


class Network:
    """Hosts by name, each with an address and a link of its own to one bridge, as this process has:
    it is a host too."""

    def __init__(self, names: Sequence[str]) -> None:
        self.addresses = {name: f"10.77.0.{i}" for i, name in enumerate(names, 1)}
        self._spaces: dict[str, int] = {}
        _run("ip link set lo up")
        _run("ip link add br0 type bridge forward_delay 0")
        _run("ip link set br0 up")
        # UCX uses no address of a bridge itself.
        _run("ip link add to-here type veth peer name eth0")
        _run("ip link set to-here master br0 up")
        _run("ip address add 10.77.0.254/24 dev eth0")
        _run("ip link set eth0 up")
        for name in names:
            self._add(name)

    def _add(self, name: str) -> None:
        here = _own_space()
        try:
            _checked(_libc.unshare(_NEW_NETWORK))
            self._spaces[name] = _own_space()
        finally:
            _checked(_libc.setns(here, _NEW_NETWORK))
            os.close(here)
        space = f"/proc/{os.getpid()}/fd/{self._spaces[name]}"
        _run(f"ip link add to-{name} type veth peer name eth0 netns {space}")
        _run(f"ip link set to-{name} master br0 up")
        with self.inside(name):
            _run("ip link set lo up")
            _run(f"ip address add {self.addresses[name]}/24 dev eth0")
            _run("ip link set eth0 up")

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """What this thread starts meanwhile, and its new sockets, are at that host."""
        here = _own_space()
        try:
            _checked(_libc.setns(self._spaces[name], _NEW_NETWORK))
            yield
        finally:
            _checked(_libc.setns(here, _NEW_NETWORK))
            os.close(here)

    # -- faults ------------------------------------------------------------------------

    def shape(self, name: str, rate: str) -> None:
        """What a host sends goes no faster than that, such as 2gbit."""
        with self.inside(name):
            _run(f"tc qdisc add dev eth0 root tbf rate {rate} {BUCKET}")

    def down(self, name: str) -> None:
        """A host's link is down, as where its cable was pulled."""
        _run(f"ip link set to-{name} down")

    def silent(self, name: str) -> None:
        """The bridge takes nothing from a host and gives it nothing; its link stays up."""
        _run(f"bridge link set dev to-{name} state 0")

    def lose(self, source: str, target: str) -> None:
        """What one host sends to another one goes nowhere; the way back is as it was."""
        with self.inside(source):
            where = f"{self.addresses[target]} lladdr {_NOWHERE} dev eth0 nud permanent"
            _run(f"ip neighbour replace {where}")

    def heal(self) -> None:
        """Ends all of these."""
        for name in self.addresses:
            _run(f"ip link set to-{name} up")
            # A link that is just coming up has no state to be set yet, and forwards by itself then.
            _run(f"bridge link set dev to-{name} state 3", again_while="Network is down")
            with self.inside(name):
                _run("ip neighbour flush dev eth0 nud permanent")

    def close(self) -> None:
        """The hosts go as soon as no process is at them any more."""
        for space in self._spaces.values():
            os.close(space)
        self._spaces.clear()


_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _own_space() -> int:
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _run(command: str, *, again_while: str = "nothing of the kind") -> None:
    """again_while: what the command says where it may just be too early."""
    end_s, pace = time.monotonic() + _COMMAND_S, threading.Event()
    while True:
        done = subprocess.run(
            command.split(), capture_output=True, text=True, timeout=_COMMAND_S, check=False
        )
        if again_while not in done.stderr or time.monotonic() >= end_s:
            break
        pace.wait(_PAUSE_S)
    assert done.returncode == 0, f"{command}: {done.stderr.strip()}"
