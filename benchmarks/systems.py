"""The systems of a run: their environments, their servers and their client processes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import json
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "benchmarks"


class JobError(RuntimeError):
    """A worker could not do what it was asked."""


def environment_for(requirements: Sequence[str]) -> Path:
    """The Python environment with these packages; made and cached at first use.

    A peer's packages never enter the project's environment. RuntimeError where pip fails.
    """
    if not requirements:
        return Path(sys.prefix)
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:12]
    folder = CACHE / f"environment-{digest}"
    if not (folder / "ready").exists():
        venv.create(folder, with_pip=True, clear=True)
        command: list[str | Path] = [folder / "bin/pip", "install", "-q", *requirements]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pip: {done.stderr.strip().splitlines()[-1]}")
        (folder / "ready").touch()
    return folder


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
        )
        self._log, self._module = log, module
        self._say(info)
        self._hear()

    def begin(self, job: str, **arguments: Any) -> None:
        """Hands a job over; `finish` waits for it."""
        self._say({"job": job, **arguments})

    def finish(self) -> dict[str, Any]:
        """The answer; `JobError` for a failure."""
        answer = self._hear()
        if "error" in answer:
            raise JobError(f"{self._module}: {answer['error']}")
        return answer

    def run(self, job: str, **arguments: Any) -> dict[str, Any]:
        """A job and its answer."""
        self.begin(job, **arguments)
        return self.finish()

    def close(self) -> None:
        """Ends the process."""
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
        raise JobError(f"the client died: {self._log.read_text(errors='replace')[-300:]}")


@dataclass(slots=True)
class System:
    """A system that runs: its name and its client processes."""

    name: str
    module: str
    workers: list[Worker] = field(default_factory=list)


@contextlib.contextmanager
def running(module_name: str, folder: Path, *, pool_bytes: int, clients: int) -> Iterator[System]:
    """Servers and clients of one system; RuntimeError where it cannot be had here."""
    module = importlib.import_module(module_name)
    environment = environment_for(module.REQUIREMENTS)
    folder = folder / module_name.rsplit(".", 1)[-1]
    folder.mkdir()
    with contextlib.ExitStack() as stack:
        info = stack.enter_context(module.start(folder, environment, pool_bytes))
        system = System(module.NAME, module_name)
        for i in range(clients):
            worker = Worker(module_name, environment, info, folder / f"client-{i}.log")
            stack.callback(worker.close)
            system.workers.append(worker)
        yield system
