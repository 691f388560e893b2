"""Redis 7 with a client written for it: pipelined commands, answers received in place."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.client import Bytes1D, Keys
from benchmarks.processes import free_port, server, wait_for_port

NAME = "Redis, hand-written client"
REQUIREMENTS: tuple[str, ...] = ("numpy",)


@contextlib.contextmanager
def start(folder: Path, environment: Path, pool_bytes: int) -> Iterator[dict[str, Any]]:
    """A redis-server on a unix socket, without persistence."""
    del environment  # it is the distribution's
    binary, port = shutil.which("redis-server"), free_port()
    if binary is None:
        raise RuntimeError("redis-server is not installed")
    path, log = folder / "redis.sock", folder / "redis.log"
    options = ["--port", str(port), "--bind", "127.0.0.1", "--unixsocket", str(path), "--save", ""]
    options += ["--appendonly", "no", "--maxmemory", str(2 * pool_bytes)]
    with server([binary, *options], log=log) as process:
        wait_for_port(port, process, log)
        version = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True)
        yield {"path": str(path), "version": version.stdout.split()[2].removeprefix("v=")}


class Client:
    """One connection. Values are received straight into the targets."""

    def __init__(self, info: dict[str, Any]) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.connect(info["path"])
        self._reader = self._sock.makefile("rb", buffering=64 << 10)

    def buffers(self, n: int, nbytes: int) -> list[Bytes1D]:
        return list(np.zeros((n, nbytes), np.uint8))

    def put(self, keys: Keys, sources: Sequence[Bytes1D]) -> int:
        done = 0
        for key, source in zip(keys, sources, strict=True):
            head = b"*3\r\n$3\r\nSET\r\n$32\r\n%b\r\n$%d\r\n" % (key, source.nbytes)
            self._send([head, source.data, b"\r\n"])
            # A deep pipeline of large values would fill both socket buffers and stop both sides.
            done += self._reader.readline() == b"+OK\r\n"
        return done

    def get(self, keys: Keys, targets: Sequence[Bytes1D]) -> int:
        self._send([_command(b"GET", [key]) for key in keys])
        done = 0
        for target in targets:
            head = self._reader.readline()
            if head == b"$-1\r\n":
                continue
            view = memoryview(target)  # type: ignore[arg-type]
            got = 0
            while got < len(view):
                got += self._reader.readinto1(view[got:])  # type: ignore[attr-defined]
            self._reader.read(2)
            done += 1
        return done

    def exists(self, keys: Keys) -> int:
        self._send([_command(b"EXISTS", keys)])
        return int(self._reader.readline()[1:])

    def drop(self, keys: Keys) -> None:
        self._send([_command(b"DEL", keys)])
        self._reader.readline()

    def close(self) -> None:
        self._sock.close()

    def _send(self, parts: list[Any]) -> None:
        for at in range(0, len(parts), 512):  # IOV_MAX is 1,024
            chunk = parts[at : at + 512]
            total = sum(memoryview(part).nbytes for part in chunk)
            sent = self._sock.sendmsg(chunk)
            if sent < total:
                self._sock.sendall(b"".join(chunk)[sent:])


def _command(name: bytes, keys: Keys) -> bytes:
    words = b"".join(b"$32\r\n%b\r\n" % key for key in keys)
    return b"*%d\r\n$%d\r\n%b\r\n" % (len(keys) + 1, len(name), name) + words
