"""Messages between processes: late, lost, twice, in another order, or not at all.

Every message goes through the codec, so nothing is shared by reference. A call that gets no answer
raises `DeadlineExceeded` at its caller, whatever became of it: handlers run to their end.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.sim.loop import Dead, Future, Loop, Process, SimTask, Timer

from kvstore.cluster.messages import CODEC, Hello, Welcomed
from kvstore.errors import DeadlineExceeded, KVStoreError, Unavailable

Handler = Callable[[Process, Any], Awaitable[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What a network is like. delay_ms: the median of one way; spread: of its logarithm. loss and
    twice: of a message, by chance. clog: chance that a link is slow for a while, `clog_ms` more.
    refuses: chance that a
    partition is noticed, so that a call fails with `Unavailable`."""

    delay_ms: float = 0.3
    spread: float = 0.5
    loss: float = 0.0
    twice: float = 0.0
    clog: float = 0.0
    clog_ms: float = 300.0
    refuses: float = 0.3


FAIR = Weather()
# A session begins once for a connection; and who asks for bytes to be written to its memory gives
# that to others once it is answered, so the transport must not carry out such a call twice.
_ONCE = ("Hello", "Get")


class SimAttachment:
    """See `kvstore.cluster.world.Attachment`. It ends with either process, when it is closed, or
    when a silent network was given up; each end learns that in its own time."""

    def __init__(
        self, network: Network, source: Process, server: Server, welcomed: Welcomed
    ) -> None:
        self.network, self.source, self.server = network, source, server
        self.welcomed = welcomed
        self.lost = False

    def hang_up(self) -> None:
        """It is over; both ends learn it in a while."""
        network = self.network
        if self not in network.attachments:
            return
        del network.attachments[self]
        there = network.delay(self.source, self.server.process)
        network.loop.after(there, self._end_there, self.server.process)
        network.loop.after(network.delay(self.server.process, self.source), self._end_here)

    def _end_there(self) -> None:
        self.server.closed(self.welcomed.session)

    def _end_here(self) -> None:
        self.lost = True

    async def close(self) -> None:
        """See `Attachment.close`."""
        self.lost = True
        self.hang_up()


@dataclass(slots=True, eq=False)
class Server:
    """What listens at an address. handler: answers a message of a process. closed: told the session
    of an attachment that has ended."""

    process: Process
    handler: Handler
    closed: Callable[[int], None]


class Network:
    """All links. Hosts are known by the names of their processes."""

    def __init__(self, loop: Loop, rng: random.Random) -> None:
        self.loop, self.rng = loop, rng
        self.weather = FAIR
        self.sent = self.lost = self.doubled = 0
        self.attachments: dict[SimAttachment, None] = {}
        self._servers: dict[str, Server] = {}
        self._blocked: set[tuple[str, str]] = set()
        self._clogged: dict[tuple[str, str], float] = {}

    # -- who is there --------------------------------------------------------------------

    def listen(
        self, address: str, process: Process, handler: Handler, closed: Callable[[int], None]
    ) -> None:
        """Serves an address until the process dies."""
        self._servers[address] = Server(process, handler, closed)

    def join(self, process: Process) -> None:
        """A process that may call."""
        process.at_death.append(lambda: self._gone(process))

    def _gone(self, process: Process) -> None:
        for attachment in list(self.attachments):
            if process in (attachment.source, attachment.server.process):
                attachment.hang_up()

    def server_at(self, address: str) -> Server | None:
        """Who listens there."""
        server = self._servers.get(address)
        return server if server is not None and server.process.alive else None

    # -- faults --------------------------------------------------------------------------

    def block(self, sources: Sequence[str], targets: Sequence[str], *, both: bool = True) -> None:
        """Nothing gets from any of these hosts to any of those, and maybe not back."""
        for source in sources:
            for target in targets:
                if source != target:
                    self._blocked.add((source, target))
                    if both:
                        self._blocked.add((target, source))
                    notice_ms = self.rng.uniform(500.0, 40_000.0)
                    self.loop.after(notice_ms, lambda s=source, t=target: self._notice(s, t))

    def _notice(self, source: str, target: str) -> None:
        """A silent connection is given up in the end, by its server."""
        if (source, target) in self._blocked:
            self.hang_up(source, target)
            self.hang_up(target, source)

    def unblock(self, source: str, target: str) -> None:
        """Ends one partition."""
        self._blocked.discard((source, target))

    def heal(self) -> None:
        """Everything gets through, as on a fair day."""
        self._blocked.clear()
        self._clogged.clear()
        self.weather = FAIR

    def hang_up(self, source: str, target: str) -> None:
        """Ends a connection though both its ends live, as a proxy or a firewall may."""
        for attachment in list(self.attachments):
            if (attachment.source.name, attachment.server.process.name) == (source, target):
                attachment.hang_up()

    def attached(self) -> list[tuple[str, str]]:
        """Attachments that there are, by name."""
        return [(a.source.name, a.server.process.name) for a in self.attachments]

    @property
    def blocked(self) -> list[tuple[str, str]]:
        return sorted(self._blocked)

    def passes(self, source: Process, target: Process) -> bool:
        """Whether anything gets from one process to the other now."""
        return (source.name, target.name) not in self._blocked

    def delay(self, source: Process, target: Process) -> float:
        """How long one message takes now, in milliseconds."""
        weather, link = self.weather, (source.name, target.name)
        if self.rng.random() < weather.clog:
            self._clogged[link] = self.loop.now + self.rng.uniform(10.0, 2000.0)
        ms = weather.delay_ms * math.exp(self.rng.gauss(0.0, weather.spread))
        if self._clogged.get(link, 0.0) > self.loop.now:
            ms += self.rng.uniform(0.0, weather.clog_ms)
        return ms

    # -- calls ---------------------------------------------------------------------------

    async def call(self, source: Process, address: str, message: Any, timeout_ms: float) -> Any:
        """See `World.call`."""
        return await self._call(_Call(self, source, address, message), timeout_ms)

    async def attach(
        self, source: Process, address: str, hello: Hello, timeout_ms: float
    ) -> SimAttachment:
        """See `World.attach`."""
        call = _Call(self, source, address, hello)
        accepted = False
        try:
            await self._call(call, timeout_ms)
            accepted = True
        finally:
            call.accepted = accepted
            if not accepted:
                call.hang_up()
        attachment = call.attachments[0]
        if attachment not in self.attachments:
            attachment.lost = True
        return attachment

    async def _call(self, call: _Call, timeout_ms: float) -> Any:
        if not call.source.alive:
            raise Dead(call.source.name)
        call.begin(timeout_ms)
        try:
            return await call.answer
        finally:
            call.end()


class _Call:
    """One call, from the side of its caller."""

    def __init__(self, network: Network, source: Process, address: str, message: Any) -> None:
        self.network, self.source, self.address = network, source, address
        self.frame, self.name = CODEC.encode(message), type(message).__name__
        self.answer: Future[Any] = Future()
        self.attachments: list[SimAttachment] = []
        self.accepted: bool | None = None
        self._timer: Timer | None = None

    def begin(self, timeout_ms: float) -> None:
        """Sends it, maybe twice."""
        network = self.network
        network.sent += 1
        self._timer = network.loop.after(max(timeout_ms, 0.0), self._time_out, self.source)
        server = network.server_at(self.address)
        if server is None:
            self._refuse(network.weather.delay_ms)
            return
        twice = self.name not in _ONCE and network.rng.random() < network.weather.twice
        network.doubled += twice
        for _ in range(1 + twice):
            if not self._is_lost(self.source, server.process):
                network.loop.after(network.delay(self.source, server.process), self._arrive)
            elif network.rng.random() < network.weather.refuses:
                self._refuse(network.rng.uniform(1.0, 50.0))

    def _time_out(self) -> None:
        self.answer.fail(DeadlineExceeded(f"{self.address} did not answer {self.name} in time"))

    def _refuse(self, delay: float) -> None:
        error = Unavailable(f"nobody answers at {self.address}")
        self.network.loop.after(delay, lambda: self.answer.fail(error), self.source)

    def _is_lost(self, source: Process, target: Process) -> bool:
        network = self.network
        lost = not network.passes(source, target) or network.rng.random() < network.weather.loss
        network.lost += lost
        return lost

    def _arrive(self) -> None:
        """At whoever is at the address now."""
        server = self.network.server_at(self.address)
        if server is None:
            self._refuse(self.network.weather.delay_ms)
        elif self.network.passes(self.source, server.process):
            self.network.loop.after(0.0, lambda: self._handle(server), server.process)
        else:
            self.network.lost += 1

    def _handle(self, server: Server) -> None:
        if not self.source.alive:
            return
        message = CODEC.decode_frame(self.frame)
        SimTask(server.process, self._serve(server, message))
        server.process.at_death.append(self._server_died)

    def _server_died(self) -> None:
        self._refuse(self.network.weather.delay_ms)

    async def _serve(self, server: Server, message: Any) -> None:
        process = server.process
        try:
            try:
                answer = CODEC.decode_frame(
                    CODEC.encode(await server.handler(self.source, message))
                )
                give = functools.partial(self.answer.set, answer)
                if isinstance(answer, Welcomed):
                    self._attach(server, answer)
            except KVStoreError as problem:
                give = functools.partial(self.answer.fail, _copied(problem))
        finally:
            if process.alive:
                process.at_death.remove(self._server_died)
        if not self._is_lost(process, self.source):
            self.network.loop.after(self.network.delay(process, self.source), give, self.source)

    def _attach(self, server: Server, welcomed: Welcomed) -> None:
        attachment = SimAttachment(self.network, self.source, server, welcomed)
        self.network.attachments[attachment] = None
        self.attachments.append(attachment)
        if self.accepted is False or not self.source.alive:
            attachment.hang_up()

    def hang_up(self) -> None:
        """Nobody has heard that a session began."""
        for attachment in self.attachments:
            attachment.hang_up()

    def end(self) -> None:
        """The caller has its answer, or does not wait any more."""
        if self._timer is not None:
            self._timer.cancel()


def _copied(error: KVStoreError) -> KVStoreError:
    """As it comes out at the other end."""
    copied = type(error).__new__(type(error))
    copied.args = error.args
    copied.__dict__.update(error.__dict__)
    return copied
