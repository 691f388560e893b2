"""An agent whose passive side is a process of its own, with nothing in it but the shared memory.

A library that others write into this process's memory by can abort it (NIXL over TCP does, where a
peer disappears at the wrong moment), and may let them write where nobody registered anything. So
the memory is a memfd, and who registers it is a child that has only that. Its death is noticed, and
another one takes its place; to end it is to revoke the registration, for certain: no byte lands
once it has been waited for.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # until `settle`

import argparse
import base64
import contextlib
import ctypes
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from kvstore.errors import DeadlineExceeded, Unavailable
from kvstore.lasting import settle
from kvstore.transfer.base import Agent, Bytes1D, Memory, Remote, TransferFailed
from kvstore.transfer.choose import AUTO, available, make_agent
from kvstore.transfer.stream import Pipes, no_pipes

_START_S = 20.0
_TRIES = 5
_MAP_FIXED_NOREPLACE = 0x100000
MakeAgent = Callable[[str], Agent]


class ApartAgent:
    """See `kvstore.transfer.base.Agent`; `share` takes the place of `register`.

    kind: of the agents in the child and here. name: unique among those that reach each other. make:
    makes the agent that is active, in this process. on_death: told, on another thread, when the
    child has died by itself; then `describe` starts another one.
    """

    def __init__(self, kind: str, name: str, make: MakeAgent) -> None:
        self.kind, self._name, self._make = kind, name, make
        self._lock = threading.RLock()
        self._child: subprocess.Popen[bytes] | None = None
        self._watch: threading.Thread | None = None
        self._fd, self._memory = -1, np.empty(0, np.uint8)
        self._description = b""
        self._active: Agent | None = None
        self._closed = False
        self.on_death: Callable[[], None] | None = None

    def share(self, fd: int, memory: Bytes1D, *, writable: bool = True) -> None:
        """Lets connected processes read and write a memfd, which is mapped here as `memory`. The
        descriptor and the mapping stay the caller's, and outlive the agent. writable: of no use
        here, as NIXL registers no memory for reading alone."""
        del writable
        self._fd, self._memory = fd, memory

    def register(self, memory: Memory) -> None:
        """Never: only memory that another process can map is of use here."""
        del memory
        raise TransferFailed("an agent apart takes shared memory only")

    def describe(self) -> bytes:
        """See `Agent`; starts the child where none lives."""
        with self._lock:
            if self._closed:
                raise TransferFailed("this agent is closed")
            if self._child is None or self._child.poll() is not None:
                self._start()
            return self._description

    def connect(self, description: bytes, timeout_s: float) -> Remote:
        """See `Agent`."""
        with self._lock:
            if self._closed:
                raise TransferFailed("this agent is closed")
            if self._active is None:
                self._active = self._make(self._name)
                self._active.register(self._memory)
            active = self._active
        return active.connect(description, timeout_s)

    def close(self) -> None:
        """See `Agent`."""
        with self._lock:
            self._closed = True
            child, self._child = self._child, None
            active, self._active = self._active, None
        if child:
            child.kill()
            child.wait()
            self._give_back(child)
        if active:
            active.close()

    def _start(self) -> None:
        for _ in range(_TRIES):  # seldom another one: where the child has something at that address
            said = self._try()
            if said:
                self._description = base64.b64decode(said["description"])
                return
        raise Unavailable("the transfer process cannot map the memory where it is mapped here")

    def _try(self) -> dict[str, str]:
        """Starts a child; what it says, nothing where it cannot have the address."""
        address = int(self._memory.__array_interface__["data"][0])
        command = [sys.executable, "-P", "-m", "kvstore.transfer.apart", "--kind", self.kind]
        command += ["--name", self._name, "--fd", str(self._fd)]
        command += ["--nbytes", str(self._memory.size), "--address", str(address)]
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,  # its end tells the child that this process is gone
            stdout=subprocess.PIPE,
            pass_fds=(self._fd,),
            process_group=0,
        )
        said: dict[str, str] = {}
        try:
            said = _first_line(child, time.monotonic() + _START_S)
        finally:
            if not said:
                child.kill()
                child.wait()
                self._give_back(child)
        if said:
            self._child = child
            self._watch = threading.Thread(
                target=self._wait, args=(child,), name="kvstore-apart", daemon=True
            )
            self._watch.start()
        return said

    def _wait(self, child: subprocess.Popen[bytes]) -> None:
        child.wait()
        with self._lock:
            alone = self._child is not child
            if not alone:
                self._child = None
        if alone:
            return  # it was ended here
        self._give_back(child)
        if self.on_death:
            self.on_death()

    def _give_back(self, child: subprocess.Popen[bytes]) -> None:
        for pipe in (child.stdin, child.stdout):
            if pipe:
                with contextlib.suppress(OSError):
                    pipe.close()


@runtime_checkable
class Shares(Protocol):
    """An agent that takes shared memory."""

    def share(self, fd: int, memory: Bytes1D, *, writable: bool = True) -> None:
        """See `ApartAgent.share` and `ShmAgent.share`."""


@runtime_checkable
class Mortal(Protocol):
    """An agent part of which is in a process that may die by itself."""

    on_death: Callable[[], None] | None


def make_safe_agent(kind: str, name: str, pipes: Pipes = no_pipes, *, host: str = "") -> Agent:
    """The agent of a kind that a process may have which must not die of it: see `make_agent`. Of
    kind auto it has all kinds of `AUTO` that are usable here."""
    if kind == "auto":
        from kvstore.transfer.either import EitherAgent

        here = [each.kind for each in available() if each.usable and each.kind in AUTO]
        return EitherAgent([make_safe_agent(each, name, pipes) for each in here])
    if kind != "nixl":
        return make_agent(kind, name, pipes, host=host)

    def active(name: str) -> Agent:
        return make_agent(kind, name, over_tcp=True)

    return ApartAgent(kind, name, active)


def export(agent: Agent, memory: Bytes1D, fd: int, *, writable: bool = True) -> None:
    """Registers a memfd that is mapped here with an agent of any sort. writable: whether others may
    write to it; where it is not, agents that can refuse that do."""
    if isinstance(agent, Shares):
        agent.share(fd, memory, writable=writable)
    else:
        agent.register(memory)


def _first_line(child: subprocess.Popen[bytes], end_s: float) -> dict[str, str]:
    """What the child says once it serves. `Unavailable`, `DeadlineExceeded`."""
    assert child.stdout
    said: list[bytes] = []
    reader = threading.Thread(
        target=lambda: said.append(child.stdout.readline() if child.stdout else b""),
        name="kvstore-apart-start",
        daemon=True,
    )
    reader.start()
    reader.join(max(0.0, end_s - time.monotonic()))
    if reader.is_alive():
        raise DeadlineExceeded("the transfer process does not start")
    try:
        found: dict[str, str] = json.loads(said[0])
    except ValueError:
        raise Unavailable("the transfer process ended at its start: see its last words") from None
    if "error" in found:
        raise Unavailable(found["error"])
    return found


def _serve(options: argparse.Namespace) -> int:
    memory = _mapped(options.fd, options.nbytes, options.address)
    if memory is None:
        print(json.dumps({}), flush=True)
        return 1
    try:
        agent = make_agent(options.kind, options.name, over_tcp=True)
        agent.register(memory)
        description = agent.describe()
    except Exception as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 1
    print(json.dumps({"description": base64.b64encode(description).decode()}), flush=True)
    sys.stdin.buffer.read()  # to its end, which is that of the process that shares the memory
    os._exit(0)  # whatever the library thinks of it


def _mapped(fd: int, nbytes: int, address: int) -> Bytes1D | None:
    """A memfd, mapped at an address of another process's, so that one address means the same bytes
    in both; None where something is there."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    flags = mmap.MAP_SHARED | _MAP_FIXED_NOREPLACE
    there = libc.mmap(
        ctypes.c_void_p(address),
        ctypes.c_size_t(nbytes),
        mmap.PROT_READ | mmap.PROT_WRITE,
        flags,
        fd,
        ctypes.c_long(0),
    )
    if there != address:
        return None
    mapped = (ctypes.c_uint8 * nbytes).from_address(address)
    memory: Bytes1D = np.ctypeslib.as_array(mapped)
    return memory


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the child."""
    settle()
    parser = argparse.ArgumentParser(prog="kvstore-transfer", description=__doc__)
    parser.add_argument("--kind", required=True, help="of the agent")
    parser.add_argument("--name", required=True, help="of the agent")
    parser.add_argument("--fd", type=int, required=True, help="of the memfd")
    parser.add_argument("--nbytes", type=int, required=True, help="its size")
    parser.add_argument("--address", type=int, required=True, help="where to map it")
    return _serve(parser.parse_args(arguments))


if __name__ == "__main__":
    sys.exit(main())
