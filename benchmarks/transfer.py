"""Transfer agents between two processes: `python -m benchmarks.transfer [--json FILE]`.

Each agent, and NIXL by hand with the same UCX transports, reads and writes the same pieces in the
same rounds: with UCX's own segments over TCP, and with the larger ones that ours has. NIXL by hand
with the transports that UCX itself would choose shows what is given up because the other process
could not refuse it (see `kvstore.transfer.nixl`). Beside what moves bytes within one host, memcpy
of the same pieces within one process, on one thread.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

import numpy as np

from kvstore.errors import Unavailable
from kvstore.memory import Arena
from kvstore.transfer import nixl, ucxx
from kvstore.transfer.apart import export
from kvstore.transfer.base import U64, Agent, Bytes1D, Pieces, TransferFailed
from kvstore.transfer.choose import make_agent
from kvstore.transfer.stream import StreamAgent

SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
PIECES = 64
GOAL = 0.95  # of what NIXL by hand does
OURS, RAW, RAW_ANY = "nixl", "NIXL by hand", "NIXL by hand, UCX's choice"
RAW_LARGE = "NIXL by hand, large segments"
_RAW = (RAW, RAW_LARGE, RAW_ANY)
FRAMES = "grpc (frames over a socket)"
SHARED, MEMCPY = "shm", "memcpy"
_LEAST_BYTES = 64 << 20  # of a round's measurement: small pieces are moved several times
_MEMORY_BYTES = PIECES * max(SIZES)
_TIMEOUT_S = 60.0
Document = dict[str, Any]
Move = Callable[[Pieces], None]


class ConnectionPipe:
    """A `FramePipe` over a connection of multiprocessing."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._sending = connection, threading.Lock()

    def start(self, deliver: Callable[[bytes], None], lost: Callable[[], None]) -> None:
        """See `FramePipe`."""

        def receive() -> None:
            with contextlib.suppress(OSError, EOFError):
                while True:
                    deliver(self._connection.recv_bytes())
            lost()

        threading.Thread(target=receive, daemon=True).start()

    def send(self, frame: bytes, timeout_s: float) -> None:
        """See `FramePipe`; nobody here is slow enough for a deadline."""
        del timeout_s
        try:
            with self._sending:
                self._connection.send_bytes(frame)
        except OSError as error:
            raise TransferFailed(str(error)) from None

    def close(self) -> None:
        """See `FramePipe`."""
        self._connection.close()


class RawNixl:
    """NIXL's bindings, without anything around them."""

    def __init__(self, memory: Bytes1D, name: str, *, passive: bool) -> None:
        self._bindings: Any = nixl.load()
        config = self._bindings.nixlAgentConfig()
        config.useProgThread, config.useListenThread = passive, False
        config.syncMode, config.pthrDelay = self._bindings.NIXL_THREAD_SYNC_STRICT, 1000
        self._agent = self._bindings.nixlAgent(f"raw-{os.getpid()}-{name}", config)
        allowed = "all" if name == RAW_ANY else nixl.transports(rdma=nixl.has_rdma())
        with nixl.ucx_environment(allowed):
            if name != RAW_LARGE:
                for setting in ("UCX_TCP_TX_SEG_SIZE", "UCX_TCP_RX_SEG_SIZE"):
                    del os.environ[setting]
            backend = self._agent.createBackend("UCX", {})
        region = [(memory.ctypes.data, memory.nbytes, 0, "")]
        dram = self._bindings.DRAM_SEG
        self._agent.registerMem(self._bindings.nixlRegDList(dram, region), [backend])
        self._peer: Any = None

    def describe(self) -> bytes:
        """Its metadata."""
        return bytes(self._agent.getLocalMD())

    def connect(self, metadata: bytes) -> None:
        """Adds the other agent."""
        self._peer = self._agent.loadRemoteMD(metadata)

    def read(self, pieces: Pieces) -> None:
        """All of them, at once."""
        self._move(self._bindings.NIXL_READ, pieces)

    def write(self, pieces: Pieces) -> None:
        """All of them, at once."""
        self._move(self._bindings.NIXL_WRITE, pieces)

    def _move(self, operation: Any, pieces: Pieces) -> None:
        local, remote = self._list(pieces.local, pieces), self._list(pieces.remote, pieces)
        handle = self._agent.createXferReq(operation, local, remote, self._peer, b"", [])
        state = self._agent.postXferReq(handle, b"")
        while state == self._bindings.NIXL_IN_PROG:
            state = self._agent.getXferStatus(handle)
        self._agent.releaseXferReq(handle)
        if state != self._bindings.NIXL_SUCCESS:
            raise RuntimeError(f"NIXL's transfer failed: {state}")

    def _list(self, addresses: Any, pieces: Pieces) -> Any:
        rows = np.stack((addresses, pieces.nbytes, np.zeros_like(pieces.nbytes)), axis=1)
        return self._bindings.nixlXferDList(self._bindings.DRAM_SEG, rows)


def _agent(name: str, connection: Connection | None = None) -> Agent:
    if name == FRAMES:
        pipes = (lambda _body, _timeout_s: ConnectionPipe(connection)) if connection else None
        return StreamAgent("bench", pipes) if pipes else StreamAgent("bench")
    return make_agent(name, "bench", host="127.0.0.1", over_tcp=True)


def passive(name: str, control: Connection, frames: Connection) -> None:
    """The other process: memory to read from and to write to."""
    arena = Arena.create("bench", _MEMORY_BYTES)
    memory = arena.array
    memory[:] = 1
    if name in _RAW:
        raw = RawNixl(memory, name, passive=True)
        control.send((raw.describe(), memory.ctypes.data))
        control.recv()
        return
    with contextlib.closing(_agent(name)) as agent:
        export(agent, memory, arena.fd)
        if isinstance(agent, StreamAgent):
            agent.serve(ConnectionPipe(frames))
        control.send((agent.describe(), memory.ctypes.data))
        control.recv()


class Way:
    """One agent, connected to one in another process."""

    def __init__(self, name: str, arena: Arena) -> None:
        memory = arena.array
        self._control, far = Pipe()
        frames, far_frames = Pipe()
        self._process = multiprocessing.get_context("spawn").Process(
            target=passive, args=(name, far, far_frames)
        )
        self._process.start()
        far.close()
        far_frames.close()
        description, self.address = self._control.recv()
        self._close: Callable[[], None] = lambda: None
        self.moves: dict[str, Move]
        if name in _RAW:
            raw = RawNixl(memory, name, passive=False)
            raw.connect(description)
            self.moves = {"read": raw.read, "write": raw.write}
            return
        agent = _agent(name, frames)
        self._close = agent.close
        export(agent, memory, arena.fd)
        remote = agent.connect(description, _TIMEOUT_S)
        self.moves = {
            "read": lambda pieces: remote.read(pieces, _TIMEOUT_S),
            "write": lambda pieces: remote.write(pieces, _TIMEOUT_S),
        }

    def close(self) -> None:
        """Ends both sides."""
        self._close()
        with contextlib.suppress(OSError):
            self._control.send(None)
        self._process.join()


class Memcpy:
    """The C library's copies between two memories of this process."""

    def __init__(self, memory: Bytes1D) -> None:
        self._other = np.ones_like(memory)
        self.address = int(self._other.ctypes.data)
        self.moves = {"read": self._read, "write": self._write}

    def _read(self, pieces: Pieces) -> None:
        self._copy(pieces.local, pieces.remote, pieces)

    def _write(self, pieces: Pieces) -> None:
        self._copy(pieces.remote, pieces.local, pieces)

    def _copy(self, targets: U64, sources: U64, pieces: Pieces) -> None:
        rows = zip(targets.tolist(), sources.tolist(), pieces.nbytes.tolist(), strict=True)
        for target, source, nbytes in rows:
            ctypes.memmove(target, source, nbytes)

    def close(self) -> None:
        """Nothing is left."""


def spread(memory: Bytes1D, address: int, nbytes: int) -> Pieces:
    """Pieces of one size, no two of them neighbours on both sides."""
    offsets = np.arange(PIECES, dtype=np.uint64) * np.uint64(nbytes)
    there = np.random.default_rng(0).permutation(offsets)
    return Pieces(
        offsets + np.uint64(memory.ctypes.data),
        there + np.uint64(address),
        np.full(PIECES, nbytes, np.uint64),
    )


def usable() -> Iterator[str]:
    """The ways that there are here."""
    with contextlib.suppress(Unavailable):
        nixl.load()
        yield from (RAW, RAW_LARGE, OURS, RAW_ANY)
    with contextlib.suppress(Unavailable):
        ucxx.load()
        yield "ucxx"
    yield from (FRAMES, SHARED, MEMCPY)


def measure(rounds: int) -> Document:
    """Bytes a second of each way, by operation and size, in each round."""
    found: Document = {}
    with contextlib.ExitStack() as stack:
        arena = stack.enter_context(contextlib.closing(Arena.create("bench", _MEMORY_BYTES)))
        memory = arena.array
        memory[:] = 2
        ways: dict[str, Way | Memcpy] = {}
        for name in usable():
            made = Memcpy(memory) if name == MEMCPY else Way(name, arena)
            ways[name] = stack.enter_context(contextlib.closing(made))
        for turn in range(rounds + 1):
            for op in ("read", "write"):
                for size in SIZES:
                    for name, way in ways.items():
                        rate = _rate(way.moves[op], spread(memory, way.address, size))
                        if turn:  # the first one warms up
                            rates = found.setdefault(op, {}).setdefault(str(size), {})
                            rates.setdefault(name, []).append(rate)
    return found


def _rate(move: Move, pieces: Pieces) -> float:
    times = max(1, _LEAST_BYTES // pieces.total)
    begin = time.perf_counter()
    for _ in range(times):
        move(pieces)
    return times * pieces.total / (time.perf_counter() - begin)


def share(rates: dict[str, list[float]]) -> float | None:
    """Of what NIXL by hand does: the median of the rounds' own."""
    if OURS not in rates:
        return None
    return statistics.median(a / b for a, b in zip(rates[OURS], rates[RAW_LARGE], strict=True))


def table(document: Document) -> str:
    """Markdown: GB/s of each way, and what share of NIXL by hand ours reaches."""
    results = document["results"]
    names = list(next(iter(next(iter(results.values())).values())))
    head = [f"GB/s, {PIECES} pieces", *names, f"{OURS} / {RAW_LARGE} (goal {GOAL})"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for op, sizes in results.items():
        for size, rates in sizes.items():
            cells = [f"{statistics.median(rates[name]) / 1e9:.2f}" for name in names]
            reached = share(rates)
            cells.append("-" if reached is None else f"{reached:.2f}{_judged(reached)}")
            lines.append(f"| {op} {int(size) >> 10} KiB | {' | '.join(cells)} |")
    lines += ["", f"Medians over {document['rounds']} rounds, each of every way in turn."]
    return "\n".join(lines)


def _judged(reached: float) -> str:
    return "" if reached >= GOAL else " (missed)"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    document: Document = {"rounds": options.rounds, "results": measure(options.rounds)}
    if options.json:
        options.json.write_text(json.dumps(document, indent=1))
    print(table(document))


if __name__ == "__main__":
    main()
