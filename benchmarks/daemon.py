"""A daemon of ours, with a folder of its own, for a measurement that looks into its process."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.processes import server
from kvstore.errors import Unavailable
from kvstore_client import KVStoreClient

_START_S = 30.0
_POLL_S = 0.002


@dataclass(frozen=True, slots=True)
class Daemon:
    """A process that was started, and where its clients will find it."""

    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def pid(self) -> int:
        """Of the core."""
        return self.process.pid

    @property
    def socket(self) -> Path:
        """The channel's."""
        return self.folder / "kvstore.sock"

    @property
    def target(self) -> str:
        """For clients on shared memory."""
        return f"unix://{self.socket}"

    def connect(self) -> KVStoreClient:
        """A client, as soon as the daemon takes one; RuntimeError with its log if it dies.

        Asks every few milliseconds, where a lazy client would wait longer from time to time.
        """
        end = time.monotonic() + _START_S
        while self.process.poll() is None and time.monotonic() < end:
            with contextlib.suppress(Unavailable):
                return KVStoreClient(self.target, timeout_s=_START_S)
            time.sleep(_POLL_S)
        log = (self.folder / "log").read_text(errors="replace")
        raise RuntimeError(f"the daemon did not start: {log[-500:]}")

    def gateway_pid(self) -> int:
        """The process that serves gRPC; ValueError where there is not one."""
        (child,) = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return int(child)

    def beside_pool_bytes(self) -> int:
        """Resident memory but for the pool's, other shared memory included."""
        total, counts = 0, True
        for line in Path(f"/proc/{self.pid}/smaps").read_text().splitlines():
            if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
                counts = "memfd:kvstore-pool" not in line
            elif counts and line.startswith("Rss:"):
                total += int(line.split()[1]) << 10
        return total


@contextlib.contextmanager
def daemon(folder: Path, dram: int, *flags: str) -> Iterator[Daemon]:
    """A daemon for the length of a `with`; made in `folder`, which it makes."""
    folder.mkdir()
    config = folder / "server.toml"
    config.touch()
    command: list[str | Path] = [Path(sys.prefix) / "bin/kvstore-server", "--config", config]
    command += ["--socket", folder / "kvstore.sock", "--data-dir", folder / "data"]
    with server([*command, "--dram", str(dram), *flags], log=folder / "log") as process:
        yield Daemon(process, folder)
