"""A real daemon for tests: started on a socket of its own, ended by pid, nothing left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


class Daemon:
    """One `kvstore-server` process."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.socket = folder / "kvstore.sock"
        self.target = f"unix://{self.socket}"
        command = [sys.executable, "-m", "kvstore_server.cli", "--socket", str(self.socket)]
        self.process = subprocess.Popen(
            [*command, "--data-dir", str(folder / "data"), *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> Daemon:
        """Reads the banner to its last line, which is printed once clients are served."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("  blocks"):
                return self
        assert self.process.stderr is not None
        raise RuntimeError(f"the daemon did not start: {self.process.stderr.read()}")

    def kill(self, number: int = signal.SIGKILL) -> int:
        """Sends a signal and waits for the end; returns the exit status."""
        os.kill(self.process.pid, number)
        return self.process.wait(20)

    def end(self) -> None:
        """Ends the process if it runs, and closes the pipes."""
        if self.process.poll() is None:
            self.kill()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()


@contextlib.contextmanager
def daemon(folder: Path, *flags: str) -> Iterator[Daemon]:
    """A daemon that serves, for the length of a `with`."""
    process = Daemon(folder, *flags)
    try:
        yield process.wait_ready()
    finally:
        process.end()
