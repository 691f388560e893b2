"""A real daemon for tests: started on a socket of its own, ended by pid, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from kvstore import Session
from kvstore.channel.paths import grpc_socket
from kvstore.errors import DeadlineExceeded, Unavailable

_END_S = 30.0
# An engine's environment has no daemon in it: its tests are told where there is one.
_PYTHON = os.environ.get("SERVER_PYTHON", sys.executable)


class Daemon:
    """One `kvstore-server` process.

    flags go to it as they are. grpc: whether it has a gateway, which takes longer to start.
    env: variables beside this process's own, less its settings of a daemon. The settings file is
    `server.toml` in the folder, empty unless the test has written one.
    """

    def __init__(
        self,
        folder: Path,
        *flags: str,
        env: Mapping[str, str] | None = None,
        grpc: bool = False,
    ) -> None:
        self.socket = folder / "kvstore.sock"
        self.grpc_socket = grpc_socket(self.socket)
        self.data_dir = folder / "data"
        self.target = f"unix://{self.socket}"
        self.banner: list[str] = []
        self.log: list[str] = []  # its lines on standard error, once it was ready
        self._drain: threading.Thread | None = None
        config = folder / "server.toml"
        config.touch()
        command = [_PYTHON, "-m", "kvstore_server.cli", "--socket", str(self.socket)]
        command += ["--data-dir", str(self.data_dir), *([] if grpc else ["--no-grpc"])]
        self.process = subprocess.Popen(
            [*command, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**_clean_environment(), "KVSTORE_CONFIG": str(config), **(env or {})},
        )

    def wait_ready(self) -> Daemon:
        """Reads the banner to its last line, which is printed once clients are served."""
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        for line in self.process.stdout:
            self.banner.append(line.rstrip("\n"))
            if line.startswith("  ready"):
                # A pipe that nobody reads would stop a daemon that logs much.
                self._drain = threading.Thread(target=self._read_log)
                self._drain.start()
                return self
        raise RuntimeError(f"the daemon did not start: {self.process.stderr.read()}")

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Sends a signal and waits for the end; returns the exit status."""
        os.kill(self.process.pid, number)
        return self.process.wait(_END_S)

    def terminate(self) -> None:
        """Ends the process as an operator does, and asserts that it leaves nothing."""
        assert self.kill(signal.SIGTERM) == 0, self.log
        assert not self.socket.exists()
        assert not self.grpc_socket.exists()

    def end(self) -> None:
        """Ends the process at once if it still runs, and closes the pipes."""
        if self.process.poll() is None:
            self.kill()
        # The end of the log is also the end of the gateway, which writes to the same pipe.
        if self._drain:
            self._drain.join(_END_S)
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()

    def _read_log(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip("\n"))


@contextlib.contextmanager
def daemon(
    folder: Path, *flags: str, env: Mapping[str, str] | None = None, grpc: bool = False
) -> Iterator[Daemon]:
    """A daemon that serves, for the length of a `with`; ended by SIGTERM unless it has ended."""
    process = Daemon(folder, *flags, env=env, grpc=grpc)
    try:
        yield process.wait_ready()
        if process.process.poll() is None:
            process.terminate()
    finally:
        process.end()


def notice_end(session: Session) -> None:
    """Has a session notice that its daemon was killed; until it does, it reads its memory."""
    try:
        session.info(timeout_s=0.05)
    except (Unavailable, DeadlineExceeded):
        return
    raise AssertionError("a killed daemon answers")


def _clean_environment() -> dict[str, str]:
    """Settings of whoever runs the tests must not change what the tests see."""
    return {name: value for name, value in os.environ.items() if not name.startswith("KVSTORE_")}
