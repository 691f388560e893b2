"""NIXL over UCX between two processes of this host: no store, but what one on it could reach.

A put writes into the other process's registered memory, a get reads from it; keys mean nothing.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.adapters.nixl_target import TARGET_BYTES, agent
from benchmarks.client import Bytes1D, Keys

NAME = "NIXL, UCX"
VERSION = "1.5.1"
SHARED = False
SPINS = True  # its threads in both processes look for work without a pause
# torch is named beside it, so that it is the build that the other environments have.
WITHOUT_DEPENDENCIES: tuple[str, ...] = (f"nixl-cu13=={VERSION}",)
REQUIREMENTS: tuple[str, ...] = ("torch==2.13.0", "numpy")


@contextlib.contextmanager
def start(folder: Path, environment: Path, pool_bytes: int) -> Iterator[dict[str, Any]]:
    """Nothing to start: the client starts the other process."""
    del folder, environment, pool_bytes
    yield {"version": VERSION}


class Client:
    """The process that moves, and the other one's parent."""

    def __init__(self, info: dict[str, Any]) -> None:
        del info
        command = [sys.executable, "-m", "benchmarks.adapters.nixl_target"]
        self._other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._other.stdout
        line = next((line for line in self._other.stdout if line.startswith(b"{")), None)
        if line is None:
            raise RuntimeError("NIXL's other process did not start")
        where = json.loads(line)
        self._agent, self._address = agent("client"), where["address"]
        self._peer = self._agent.add_remote_agent(bytes.fromhex(where["metadata"]))
        self._memory: Bytes1D = np.zeros(0, np.uint8)
        self._registered: Any = None

    def buffers(self, n: int, nbytes: int) -> list[Bytes1D]:
        if self._registered:
            self._agent.deregister_memory(self._registered)
            self._registered = None
        self._memory = np.zeros(n * nbytes, np.uint8)
        if n:
            region = [(self._memory.ctypes.data, self._memory.nbytes, 0, "")]
            self._registered = self._agent.register_memory(region, "DRAM")
        return list(self._memory.reshape(n, nbytes))

    def put(self, keys: Keys, sources: Sequence[Bytes1D]) -> int:
        return self._move("WRITE", keys, sources)

    def get(self, keys: Keys, targets: Sequence[Bytes1D]) -> int:
        return self._move("READ", keys, targets)

    def exists(self, keys: Keys) -> int:
        raise NotImplementedError("there is nothing to look up")

    def drop(self, keys: Keys) -> None:
        """Nothing to do: the next put writes to the same place."""

    def close(self) -> None:
        self._other.communicate()  # at the end of its input it ends

    def _move(self, operation: str, keys: Keys, buffers: Sequence[Bytes1D]) -> int:
        size = buffers[0].nbytes
        if size * len(buffers) > TARGET_BYTES:
            raise ValueError(f"the other process has {TARGET_BYTES >> 20} MiB")
        near = self._pieces([buffer.ctypes.data for buffer in buffers], size)
        far = self._pieces([self._address + i * size for i in range(len(buffers))], size)
        handle = self._agent.initialize_xfer(operation, near, far, self._peer)
        state = self._agent.transfer(handle)
        while state == "PROC":
            state = self._agent.check_xfer_state(handle)
        self._agent.release_xfer_handle(handle)
        return len(keys) if state == "DONE" else 0

    def _pieces(self, addresses: Sequence[int], size: int) -> Any:
        rows = np.array([(address, size, 0) for address in addresses], np.uint64)
        return self._agent.get_xfer_descs(rows, "DRAM")
