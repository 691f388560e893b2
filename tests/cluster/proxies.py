"""TCP forwarders in front of nodes, which can cut any two sides off from each other.

Who connects is told by the process at the other end of its socket. A connection that is cut stays
open and is silent, as with a network that loses all packets; what was sent meanwhile arrives when
it is healed.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping
from typing import Any, TypeVar

CLIENT = "client"  # whoever is no node
_CHUNK = 1 << 16
_CALL_S = 10.0
T = TypeVar("T")


class Proxies:
    """One forwarder a node, on ports of their own. pids: which process is which node now."""

    def __init__(self, pids: Callable[[], Mapping[int, str]], targets: Mapping[str, int]) -> None:
        self._pids, self._targets = pids, targets
        self._cut: set[tuple[str, str]] = set()
        self._loop = asyncio.new_event_loop()
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxies")
        self._thread.start()
        self._servers: list[asyncio.Server] = []
        self.ports = {name: self._run(self._serve(name)) for name in targets}

    def isolate(self, name: str, *, others: Iterable[str]) -> None:
        """Nothing passes between a node and these (`CLIENT` for all clients), either way."""
        pairs = {pair for other in others for pair in ((name, other), (other, name))}
        self._run(self._set(self._cut | pairs))

    def heal(self) -> None:
        """All is let through again."""
        self._run(self._set(set()))

    def close(self) -> None:
        """Ends all connections."""
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(_CALL_S)

    # -- on the loop -------------------------------------------------------------------

    async def _set(self, cut: set[tuple[str, str]]) -> None:
        self._cut = cut
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, name: str) -> int:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = self._loop.create_task(self._forward(name, reader, writer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        server = await asyncio.start_server(connected, "127.0.0.1", 0)
        self._servers.append(server)
        port: int = server.sockets[0].getsockname()[1]
        return port

    async def _forward(
        self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        source = self._who(writer.get_extra_info("peername")[1], self.ports[target])
        with contextlib.closing(writer), contextlib.suppress(OSError):
            await self._open(source, target)
            back, forth = await asyncio.open_connection("127.0.0.1", self._targets[target])
            with contextlib.closing(forth):
                ways = (self._pump(reader, forth, source, target),)
                ways += (self._pump(back, writer, target, source),)
                tasks = [self._loop.create_task(way) for way in ways]
                try:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in tasks:
                        task.cancel()
                    await asyncio.gather(*tasks, return_exceptions=True)

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        source: str,
        target: str,
    ) -> None:
        while data := await reader.read(_CHUNK):
            await self._open(source, target)
            writer.write(data)
            await writer.drain()

    async def _open(self, source: str, target: str) -> None:
        """Waits while these two are cut off from each other."""
        while (source, target) in self._cut:
            await self._changed.wait()

    def _who(self, port: int, to: int) -> str:
        inode = _inode(port, to)
        for pid, name in self._pids().items():
            with contextlib.suppress(OSError):
                for fd in os.listdir(f"/proc/{pid}/fd"):
                    with contextlib.suppress(OSError):
                        if os.readlink(f"/proc/{pid}/fd/{fd}") == f"socket:[{inode}]":
                            return name
        return CLIENT


def _inode(port: int, to: int) -> str:
    """Of the socket at the client's end of a connection on loopback."""
    wanted = re.compile(rf"\s*\d+: 0100007F:{port:04X} 0100007F:{to:04X} ")
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as file:
            for line in file:
                if wanted.match(line) or _mapped(line, port, to):
                    return line.split()[9]
    return ""


def _mapped(line: str, port: int, to: int) -> bool:
    """The same for IPv4 addresses in a socket of IPv6, which gRPC makes."""
    words = line.split()
    return (
        len(words[1]) == 37
        and words[1].endswith(f"0100007F:{port:04X}")
        and (words[2].endswith(f"0100007F:{to:04X}"))
    )
