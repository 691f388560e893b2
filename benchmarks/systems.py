"""The systems of a run: their environments, their servers and their client processes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "benchmarks"
_JOB_S = 120.0


class JobError(RuntimeError):
    """A worker could not do what it was asked."""


def environment_for(requirements: Sequence[str], without_dependencies: Sequence[str] = ()) -> Path:
    """The Python environment with these packages; made and cached at first use.

    Of those `without_dependencies` only the packages themselves are installed, after the others. A
    peer's packages never enter the project's environment. RuntimeError where pip fails.
    """
    if not requirements:
        return Path(sys.prefix)
    words = [*requirements, *(f"{name} --no-deps" for name in without_dependencies)]
    digest = hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]
    folder = CACHE / f"environment-{digest}"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        _install(folder, requirements)
        if without_dependencies:
            _install(folder, ["--no-deps", *without_dependencies])
        (folder / "ready").touch()
    return folder


def _install(environment: Path, arguments: Sequence[str]) -> None:
    command: list[str | Path] = [environment / "bin/pip", "install", "-q", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip: {done.stderr.strip()[-300:]}")


class Worker:
    """One client process, driven line by line."""

    def __init__(self, module: str, environment: Path, info: dict[str, Any], log: Path) -> None:
        self._output = log.open("wb")
        self._process = subprocess.Popen(
            [environment / "bin/python", "-m", "benchmarks.worker", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._output,
            text=True,
            cwd=ROOT,
            process_group=0,  # so that it can be stopped with the processes that it starts
        )
        self._log, self._module = log, module
        self._say(info)
        self._hear()

    def begin(self, job: str, **arguments: Any) -> None:
        """Hands a job over; `finish` waits for it."""
        self._say({"job": job, **arguments})

    def go(self, at: float) -> None:
        """Lets a job that waits for the other clients go on at a time of the monotonic clock."""
        self._say({"at": at})

    def finish(self) -> dict[str, Any]:
        """What comes next from a job: its answer, or that it waits for the other clients.

        `JobError` for a failure, or for a client that said nothing for long and was ended.
        """
        watch = threading.Timer(_JOB_S, self._process.kill)
        watch.start()
        try:
            answer = self._hear()
        finally:
            watch.cancel()
        if "error" in answer:
            raise JobError(f"{self._module}: {answer['error']}")
        return answer

    def run(self, job: str, **arguments: Any) -> dict[str, Any]:
        """A job and its answer."""
        self.begin(job, **arguments)
        return self.finish()

    def stop(self) -> None:
        """Lets neither the process nor its children run until `resume`."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Ends a `stop`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGCONT)

    def close(self) -> None:
        """Ends the process."""
        self.resume()  # its children end by themselves, for which they have to run
        self._process.kill()
        self._process.communicate()
        self._output.close()

    def _say(self, message: dict[str, Any]) -> None:
        assert self._process.stdin
        print(json.dumps(message), file=self._process.stdin, flush=True)

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout
        # Peers' libraries print to standard output too.
        for line in self._process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise JobError(f"a client ended: {self._log.read_text(errors='replace')[-300:]}")


@dataclass(slots=True)
class System:
    """A system that runs: its name, module and version, and its client processes.

    spins: whether they would take the processors from the others when it is not their turn.
    """

    name: str
    module: str
    version: str
    spins: bool
    workers: list[Worker] = field(default_factory=list)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """The time in which its clients may run."""
        for worker in self.workers if self.spins else ():
            worker.resume()
        try:
            yield
        finally:
            self.rest()

    def rest(self) -> None:
        """Keeps clients that spin from running until the next `turn`."""
        for worker in self.workers if self.spins else ():
            with contextlib.suppress(ProcessLookupError):
                worker.stop()


@contextlib.contextmanager
def running(module_name: str, folder: Path, *, pool_bytes: int, clients: int) -> Iterator[System]:
    """Servers and clients of one system; RuntimeError where it cannot be had here."""
    module = importlib.import_module(module_name)
    without_dependencies = getattr(module, "WITHOUT_DEPENDENCIES", ())
    environment = environment_for(module.REQUIREMENTS, without_dependencies)
    folder = folder / module_name.rsplit(".", 1)[-1]
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        info = stack.enter_context(module.start(folder, environment, pool_bytes))
        spins = getattr(module, "SPINS", False)
        system = System(module.NAME, module_name, info["version"], spins)
        for i in range(clients if getattr(module, "SHARED", True) else 1):
            worker = Worker(module_name, environment, info, folder / f"client-{i}.log")
            stack.callback(worker.close)
            system.workers.append(worker)
        system.rest()
        yield system
