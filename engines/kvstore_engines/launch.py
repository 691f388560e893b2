"""Worker processes: started, asked and ended; every wait has a deadline. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from kvstore_engines.jobs import Job, Result, WorkerError, read_reply

END_S = 10.0
CHUNK_BYTES = 1 << 16


class WorkerProcess:
    """One `kvstore_engines.worker`; used from one thread. What it logs goes to our stderr."""

    def __init__(self, *flags: str, threads: int | None = None) -> None:
        self._read = bytearray()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kvstore_engines.worker", *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})},
        )

    def send(self, job: Job) -> None:
        """Hands over a job; WorkerError if the process has ended."""
        assert self.process.stdin
        try:
            self.process.stdin.write(job.encode().encode())
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def receive(self, timeout_s: float) -> list[Result]:
        """The results of the job sent last; WorkerError for a failure, an end or no answer."""
        return read_reply(self._read_line(time.monotonic() + timeout_s))

    def end(self) -> None:
        """Ends the process: asked by the end of its input, then killed. Safe to call twice."""
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process.stdout.close()

    def kill(self) -> None:
        """Ends the process at once."""
        self.process.kill()
        self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        # After a failure a rank may be waiting for one that is gone: there is nothing to wait for.
        if kind:
            self.kill()
        self.end()

    def _read_line(self, deadline: float) -> str:
        assert self.process.stdout
        output = self.process.stdout.fileno()
        while b"\n" not in self._read:
            left_s = max(0.0, deadline - time.monotonic())
            if not select.select([output], [], [], left_s)[0]:
                raise WorkerError(f"worker {self.process.pid} gave no answer in time")
            chunk = os.read(output, CHUNK_BYTES)
            if not chunk:
                raise self._death()
            self._read += chunk
        line, _, rest = bytes(self._read).partition(b"\n")
        self._read = bytearray(rest)
        return line.decode()

    def _death(self) -> WorkerError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        return WorkerError(f"worker {self.process.pid} ended: status {self.process.returncode}")


class Workers:
    """The ranks of one engine, or its only process."""

    def __init__(self, ranks: Sequence[WorkerProcess], timeout_s: float) -> None:
        self.ranks = ranks
        self._timeout_s = timeout_s

    def ask(self, job: Job) -> list[list[Result]]:
        """Runs a job on all ranks; each one's results, in the order of the prompts.

        WorkerError if one of them fails: use none of them for anything more.
        """
        for rank in self.ranks:
            rank.send(job)
        return [rank.receive(self._timeout_s) for rank in self.ranks]


@contextlib.contextmanager
def workers(size: int = 1, *, timeout_s: float = 120.0) -> Iterator[Workers]:
    """`size` ranks for the length of a `with`; none of them outlives it, whatever happens.

    timeout_s: how long a job may take, and a rank may wait for the others.
    """
    with (
        tempfile.TemporaryDirectory(prefix="kvstore-ranks-") as folder,
        contextlib.ExitStack() as started,
    ):
        rendezvous = Path(folder) / "rendezvous"
        yield Workers(
            [
                started.enter_context(_start(rank, size, rendezvous, timeout_s))
                for rank in range(size)
            ],
            timeout_s,
        )


def _start(rank: int, size: int, rendezvous: Path, timeout_s: float) -> WorkerProcess:
    if size == 1:
        return WorkerProcess()
    flags = ["--rank", str(rank), "--size", str(size), "--timeout-s", str(timeout_s)]
    flags += ["--rendezvous", str(rendezvous)]
    # Ranks that each take all cores would only get in each other's way.
    return WorkerProcess(*flags, threads=max(1, (os.cpu_count() or 1) // size))
