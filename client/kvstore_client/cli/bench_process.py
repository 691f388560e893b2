"""The processes that are the clients of `kvstore bench`, and what is said to them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import TextIO

from kvstore.errors import Unavailable

_CLIENT_MODULE = "kvstore_client.cli.bench_client"
_END_S = 10.0


class Process:
    """One client's process; see `bench_client.serve`."""

    def __init__(self, target: str, timeout_s: float) -> None:
        # A file, since nobody reads a pipe of errors while the client works.
        self._errors: TextIO = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by close()
        try:
            self._process = subprocess.Popen(
                # -P: nothing is imported from the folder where the command was started.
                [sys.executable, "-P", "-m", _CLIENT_MODULE, target, str(timeout_s)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                # Ctrl-C reaches this process alone, which then ends its clients.
                process_group=0,
            )
        except BaseException:
            self._errors.close()
            raise

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def ask(self, request: object) -> None:
        """Sends one request; `answer` raises where the client is gone."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def answer(self) -> str:
        """Waits for it, a JSON object. Raises `Unavailable` with the client's last words."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return line
        self._process.wait(_END_S)
        self._errors.seek(0)
        words = self._errors.read().splitlines()[-1:] or [f"exit {self._process.returncode}"]
        raise Unavailable(f"a client of the benchmark ended: {words[0]}")

    def close(self) -> None:
        """Ends the process and closes the pipes; safe to call twice."""
        self._process.terminate()
        self._process.wait(_END_S)
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


@contextlib.contextmanager
def processes(target: str, timeout_s: float, count: int) -> Iterator[list[Process]]:
    """`count` clients' processes, gone at the end of the `with`."""
    with contextlib.ExitStack() as stack:
        started = []
        for _ in range(count):
            started.append(Process(target, timeout_s))
            stack.callback(started[-1].close)
        yield started
