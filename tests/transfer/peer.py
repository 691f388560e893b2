"""The other process of a transfer: `python -m transfer.peer ROLE KIND BYTES`, told what to do by
lines; each of its answers is a line of JSON.

passive: has memory that others reach. active: reaches memory of this test's and writes to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from transfer.pipes import SocketPipe

from kvstore.errors import KVStoreError
from kvstore.memory import Arena
from kvstore.transfer.apart import export
from kvstore.transfer.base import Agent, Pieces, TransferFailed
from kvstore.transfer.stream import StreamAgent

PORT = struct.Struct("<H")
TIMEOUT_S = 10.0


def pattern(nbytes: int, seed: int) -> np.ndarray:
    """Bytes that every process knows."""
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def reach(body: bytes, timeout_s: float) -> SocketPipe:
    """Connects to the listener of a `StreamAgent` that `agent` made."""
    (port,) = PORT.unpack_from(body)
    try:
        return SocketPipe(socket.create_connection(("127.0.0.1", port), timeout_s))
    except OSError as error:
        raise TransferFailed(f"nobody is there: {error}") from None


@contextlib.contextmanager
def agent(kind: str, name: str) -> Iterator[Agent]:
    """An agent that is reached over loopback; closed at the end."""
    with contextlib.ExitStack() as stack:
        made: Agent
        if kind == "shm":
            from kvstore.transfer.shm import ShmAgent

            made = ShmAgent()
        elif kind == "nixl":
            from kvstore.transfer.nixl import NixlAgent

            made = NixlAgent(name, over_tcp=True)
        elif kind == "ucxx":
            from kvstore.transfer.ucxx import UcxxAgent

            made = UcxxAgent(name, host="127.0.0.1")
        else:
            made = stack.enter_context(_stream(name))
        stack.callback(made.close)
        yield made


@contextlib.contextmanager
def _stream(name: str) -> Iterator[StreamAgent]:
    listener = socket.create_server(("127.0.0.1", 0))
    made = StreamAgent(name, reach, where=PORT.pack(listener.getsockname()[1]))

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                pipe = SocketPipe(listener.accept()[0])
                try:
                    made.serve(pipe)
                except KVStoreError:
                    pipe.close()

    thread = threading.Thread(target=accept, name="kvstore-accept", daemon=True)
    thread.start()
    try:
        yield made
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def everything(local: np.ndarray, remote: int) -> Pieces:
    """A pair of memories in pieces that cannot be merged."""
    size = 1 << 20
    at = np.arange(0, local.nbytes, size, dtype=np.uint64)[::-1]
    return Pieces(
        at + np.uint64(local.ctypes.data),
        at + np.uint64(remote),
        np.full(len(at), size, np.uint64),
    )


class Peer:
    """The test's end of such a process."""

    def __init__(self, role: str, kind: str, nbytes: int) -> None:
        self.kind, self.nbytes = kind, nbytes
        tests = Path(__file__).parents[1]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "transfer.peer", role, kind, str(nbytes)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{tests}:{tests.parent}"},
        )
        self.hello: dict[str, Any] = self.answer()

    @property
    def description(self) -> bytes:
        """Of its agent."""
        return bytes.fromhex(self.hello["description"])

    @property
    def address(self) -> int:
        """Of its memory."""
        return int(self.hello["address"])

    def answer(self) -> dict[str, Any]:
        """Its next line; `EOFError` where it has ended."""
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(b"{"):
                return dict(json.loads(line))
        raise EOFError(f"the peer ended: {self.process.wait()}")

    def ask(self, *words: str) -> dict[str, Any]:
        """Tells it something, and returns what it says."""
        self.tell(*words)
        return self.answer()

    def tell(self, *words: str) -> None:
        """Tells it something."""
        assert self.process.stdin
        self.process.stdin.write(" ".join(words).encode() + b"\n")
        self.process.stdin.flush()

    def stop(self) -> None:
        """Stops it where it is; returns when it is stopped."""
        self.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.process.pid, os.WSTOPPED)

    def go_on(self) -> None:
        """Lets it go on."""
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """Kills it."""
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        """Lets nothing be left of it."""
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@contextlib.contextmanager
def peer(role: str, kind: str, nbytes: int) -> Iterator[Peer]:
    """A process for the length of a `with`."""
    made = Peer(role, kind, nbytes)
    try:
        yield made
    finally:
        made.close()


def say(**what: object) -> None:
    print(json.dumps(what), flush=True)


def passive(own: Agent, arena: Arena) -> None:
    memory = arena.array
    memory[:] = pattern(memory.nbytes, 1)
    export(own, memory, arena.fd)
    say(description=own.describe().hex(), address=memory.ctypes.data)
    for line in sys.stdin:
        if line.startswith("close"):
            own.close()
        say(hash=xxhash.xxh3_64_intdigest(memory.data))


def active(own: Agent, arena: Arena) -> None:
    memory = arena.array
    export(own, memory, arena.fd)
    say()
    description, remote = sys.stdin.readline().split()
    connection = own.connect(bytes.fromhex(description), TIMEOUT_S)
    pieces = everything(memory, int(remote))
    try:
        for value in range(1, 1 << 30):
            memory[:] = value % 251
            connection.write(pieces, TIMEOUT_S / 2)
            say(written=value)
    except KVStoreError as error:
        connection.close()
        say(failed=type(error).__name__)


def main() -> None:
    role, kind, nbytes = sys.argv[1:]
    arena = Arena.create(role, int(nbytes))
    with agent(kind, role) as own:
        {"passive": passive, "active": active}[role](own, arena)


if __name__ == "__main__":
    main()
