"""Keeps the processes beside the core alive (gateway, node): starts, restarts and ends them.

Runs on the core's loop and never blocks it: a death is seen through a pidfd, readiness through a
pipe, waiting is the loop's timer. When to restart is decided by `BackOff`, which knows no clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import structlog

from kvstore_server.turns import as_usual

_MAX_READY_BYTES = 4096
_STDERR_FD = 2

R = TypeVar("R")

log = structlog.get_logger()


class Loop(Protocol):
    """What the supervisor needs of the core's loop; all calls come from the loop's thread."""

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Calls back whenever the descriptor is readable."""

    def unwatch(self, fd: int) -> None:
        """Ends a `watch`; the descriptor is still open."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        """Calls back once; cannot be cancelled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BackOff:
    """How long to wait before a restart: doubling, until a process has lived long enough."""

    first_s: float = 0.1
    limit_s: float = 10.0
    reset_after_s: float = 60.0

    def delay_s(self, previous_s: float | None, lived_s: float) -> float:
        """The wait after a process that lived `lived_s` and had itself been waited for."""
        if previous_s is None or lived_s >= self.reset_after_s:
            return self.first_s
        return min(2 * previous_s, self.limit_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """The bounds of what the supervisor waits for."""

    back_off: BackOff = BackOff()
    ready_s: float = 30.0  # from the start to readiness, then it is killed and tried again
    drain_s: float = 10.0  # from SIGTERM to SIGKILL


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayReady:
    """Where a gateway serves; `grpc_port` is None where it has no TCP."""

    grpc_socket: str
    grpc_port: int | None


def parse_ready(line: bytes) -> GatewayReady | None:
    """The line of JSON that a gateway writes when it serves; None for anything else."""
    try:
        found = json.loads(line)
        port = found.get("grpc_port")
        return GatewayReady(grpc_socket=found["grpc_socket"], grpc_port=port)
    except (ValueError, KeyError, AttributeError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeReady:
    """Which member of a cluster a node process is, and where others reach it."""

    name: str
    address: str


def parse_node_ready(line: bytes) -> NodeReady | None:
    """The line of JSON that a node writes when it serves; None for anything else."""
    try:
        found = json.loads(line)
        return NodeReady(name=found["name"], address=found["address"])
    except (ValueError, KeyError, TypeError):
        return None


class _Child:
    """One gateway process: its pidfd, and the pipe on which it says that it is ready."""

    def __init__(self, command: Sequence[str], lifeline_fd: int, started_s: float) -> None:
        self.started_s = started_s
        self.said = b""
        self.ready = False
        self.heard_out = False
        self.ready_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        try:
            self.process = _spawn(command, write_fd, lifeline_fd)
            self.pidfd = _open_pidfd(self.process)
        except BaseException:
            os.close(self.ready_fd)
            raise
        finally:
            os.close(write_fd)  # from here on only the child can keep the pipe open

    def signal(self, number: int) -> None:
        """Sends a signal; by pidfd, so that it can never hit a later process of the same id."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> int:
        """Waits for the process, which has died or was killed, and gives the descriptors back."""
        status = self.process.wait()
        os.close(self.pidfd)
        os.close(self.ready_fd)
        return status


def _open_pidfd(process: subprocess.Popen[bytes]) -> int:
    try:
        return os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        process.wait()
        raise


def _spawn(command: Sequence[str], ready_fd: int, lifeline_fd: int) -> subprocess.Popen[bytes]:
    pipes = ["--ready-fd", str(ready_fd), "--lifeline-fd", str(lifeline_fd)]
    with as_usual():
        return subprocess.Popen(
            [*command, *pipes],
            pass_fds=(ready_fd, lifeline_fd),
            stdin=subprocess.DEVNULL,
            stdout=_STDERR_FD,  # standard output is the banner's alone
            # A Ctrl-C in the terminal goes to a whole process group; the gateway is to end in its
            # turn, when the core has stopped taking clients.
            process_group=0,
        )


class Supervisor(Generic[R]):
    """Supervises one process. `command` is its command line without the two pipes' flags, `what`
    its name in the log, `parse` what reads the line that it writes when it serves.

    `on_outcome` hears of each start that led to something: where it serves, or None when it died
    or was not ready in time. Nothing is raised for a process that fails; it is tried again.
    """

    def __init__(
        self,
        loop: Loop,
        command: Sequence[str],
        *,
        what: str,
        parse: Callable[[bytes], R | None],
        on_outcome: Callable[[R | None], None],
        patience: Patience = Patience(),
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._loop, self._command, self._on_outcome = loop, command, on_outcome
        self._what, self._parse = what, parse
        self._patience, self._now_s = patience, now_s
        # Only this process holds the write end, so its death, however sudden, is an end of file.
        self._lifeline_read, self._lifeline_write = os.pipe2(os.O_CLOEXEC)
        self._child: _Child | None = None
        self._delay_s: float | None = None
        self._on_stopped: Callable[[], None] | None = None

    def start(self) -> None:
        """Starts the process, unless the supervisor is draining."""
        if self._on_stopped:
            return
        try:
            child = _Child(self._command, self._lifeline_read, self._now_s())
        except OSError as error:
            log.error(f"{self._what} cannot be started", reason=str(error))
            self._restart_later(0.0)
            return
        self._child = child
        self._loop.watch(child.pidfd, lambda: self._died(child))
        self._loop.watch(child.ready_fd, lambda: self._heard(child))
        self._loop.call_later(self._patience.ready_s, lambda: self._check_ready(child))

    def drain(self, on_stopped: Callable[[], None]) -> None:
        """Ends the process with SIGTERM, or SIGKILL if that takes too long; then calls back."""
        self._on_stopped = on_stopped
        child = self._child
        if child is None:
            on_stopped()
            return
        child.signal(signal.SIGTERM)
        self._loop.call_later(self._patience.drain_s, lambda: self._kill(child, "drain"))

    def close(self) -> None:
        """Kills what still runs and gives everything back; the loop may have ended."""
        if self._child:
            self._child.signal(signal.SIGKILL)
            self._child.reap()
            self._child = None
        os.close(self._lifeline_read)
        os.close(self._lifeline_write)

    def _heard(self, child: _Child) -> None:
        if child is not self._child:
            return  # its death was handled in the same turn of the loop
        data = os.read(child.ready_fd, _MAX_READY_BYTES)
        child.said += data
        if data and b"\n" not in child.said and len(child.said) < _MAX_READY_BYTES:
            return
        child.heard_out = True
        self._loop.unwatch(child.ready_fd)
        ready = self._parse(child.said)
        # A pipe that closes without a word is left to the pidfd, or to the bound on readiness.
        if ready and not self._on_stopped:
            child.ready = True
            log.info(f"{self._what} ready", at=str(ready))
            self._on_outcome(ready)

    def _check_ready(self, child: _Child) -> None:
        if not child.ready:
            self._kill(child, "start")

    def _kill(self, child: _Child, phase: str) -> None:
        """Kills a process that overran its time, if it is still the present one."""
        if child is self._child:
            log.warning(
                f"{self._what} killed: it took too long", phase=phase, pid=child.process.pid
            )
            child.signal(signal.SIGKILL)

    def _died(self, child: _Child) -> None:
        self._loop.unwatch(child.pidfd)
        if not child.heard_out:
            self._loop.unwatch(child.ready_fd)
        self._child = None
        status = child.reap()
        if self._on_stopped:
            self._on_stopped()
            return
        log.warning(f"{self._what} died", status=status, pid=child.process.pid)
        self._restart_later(self._now_s() - child.started_s)

    def _restart_later(self, lived_s: float) -> None:
        self._delay_s = self._patience.back_off.delay_s(self._delay_s, lived_s)
        log.info(f"{self._what} restarts", delay_s=self._delay_s)
        self._loop.call_later(self._delay_s, self.start)
        self._on_outcome(None)


class Gateway(Supervisor[GatewayReady]):
    """Supervises the gateway."""

    def __init__(
        self,
        loop: Loop,
        command: Sequence[str],
        *,
        on_outcome: Callable[[GatewayReady | None], None],
        patience: Patience = Patience(),
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(
            loop,
            command,
            what="gateway",
            parse=parse_ready,
            on_outcome=on_outcome,
            patience=patience,
            now_s=now_s,
        )


class NodeProcess(Supervisor[NodeReady]):
    """Supervises the node process."""

    def __init__(
        self,
        loop: Loop,
        command: Sequence[str],
        *,
        on_outcome: Callable[[NodeReady | None], None],
    ) -> None:
        super().__init__(loop, command, what="node", parse=parse_node_ready, on_outcome=on_outcome)
