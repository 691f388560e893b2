"""An etcd of one process: leases that run out, compare-and-swap, watches; and a client of it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cluster.sim.loop import Dead, Future, Loop, Process, SimTask, Timer
from cluster.sim.network import Network

from kvstore.cluster.members import (
    Member,
    View,
    decode_member,
    decode_view,
    encode_member,
    encode_view,
)
from kvstore.errors import DeadlineExceeded, InvalidArgument, KVStoreError, Unavailable

T = TypeVar("T")
LEASE_MS = 3000.0
RENEW_MS = 1000.0
ASK_MS = 1500.0  # how long a call waits for its answer


@dataclass(slots=True)
class Lease:
    """A registration that ends by itself unless it is renewed."""

    member: bytes
    timer: Timer

    @property
    def name(self) -> str:
        """Of the member."""
        return decode_member(self.member).name


class Coordinator:
    """What is agreed. It keeps all of it on its disk, so that a crash of it is a pause."""

    def __init__(self, loop: Loop, process: Process) -> None:
        self.loop, self.process = loop, process
        self.leases: dict[int, Lease] = {}
        self.view: bytes | None = None
        self.history: list[View] = []
        self.advanced: Callable[[], None] = lambda: None  # called when there is another view
        self.granted: Callable[[str], None] = lambda _name: None  # called when a host registers
        self._watchers: list[Future[None]] = []
        self._numbers = 0

    @property
    def epoch(self) -> int:
        """Of the agreed view, 0 before the first."""
        return self.history[-1].epoch if self.history else 0

    # Each of these runs at one moment.

    def grant(self, member: bytes) -> int:
        """A new lease; `InvalidArgument` where another run has the name."""
        wanted = decode_member(member)
        for number, lease in list(self.leases.items()):
            held = decode_member(lease.member)
            if held.name == wanted.name:
                if held.run != wanted.run:
                    raise InvalidArgument("name", f"{wanted.name} is registered by another process")
                self.expire(number)
        self._numbers += 1
        number = self._numbers
        self.leases[number] = Lease(member, self._timer(number))
        self.granted(wanted.name)
        self._tell()
        return number

    def renew(self, number: int) -> bool:
        """Whether the lease was still there."""
        lease = self.leases.get(number)
        if lease is not None:
            lease.timer.cancel()
            lease.timer = self._timer(number)
        return lease is not None

    def expire(self, number: int) -> None:
        """The lease is over."""
        lease = self.leases.pop(number, None)
        if lease is not None:
            lease.timer.cancel()
            self._tell()

    def swap(self, data: bytes) -> bool:
        """Compare-and-swap of the view by its epoch."""
        view = decode_view(data)
        now = decode_view(self.view).epoch if self.view is not None else 0
        if view.epoch != now + 1:
            return False
        self.view = data
        self.history.append(view)
        self.loop.say(f"etcd: {data.decode()}")
        self.advanced()
        self._tell()
        return True

    def watch(self) -> Future[None]:
        """Done at the next change."""
        future: Future[None] = Future()
        self._watchers.append(future)
        return future

    def _timer(self, number: int) -> Timer:
        return self.loop.after(LEASE_MS, lambda: self.expire(number), self.process)

    def _tell(self) -> None:
        watchers, self._watchers = self._watchers, []
        for watcher in watchers:
            watcher.set(None)


class SimCoordination:
    """See `kvstore.cluster.coordination.Coordination`; what one process asks the coordinator."""

    def __init__(
        self, coordinator: Coordinator, network: Network, process: Process, rng: random.Random
    ) -> None:
        self._server, self._network, self._process = coordinator, network, process
        self._loop, self._rng = network.loop, rng
        self._lease = 0
        self._member = b""
        self._renewing: SimTask[None] | None = None

    async def _ask(self, work: Callable[[], T]) -> T:
        """Has something done there, in time; what is late may be done all the same."""
        if not self._process.alive:
            raise Dead(self._process.name)
        network, server = self._network, self._server.process
        answer: Future[T] = Future()
        error = DeadlineExceeded("etcd did not answer in time")
        if not network.passes(self._process, server) and self._rng.random() < 0.3:
            unreachable = Unavailable("etcd cannot be reached")
            self._loop.after(5.0, lambda: answer.fail(unreachable), self._process)
        timer = self._loop.after(ASK_MS, lambda: answer.fail(error), self._process)

        def back(give: Callable[[], None]) -> None:
            if network.passes(server, self._process):
                self._loop.after(network.delay(server, self._process), give, self._process)

        def arrive() -> None:
            if not network.passes(self._process, server):
                return
            try:
                result = work()
            except KVStoreError as problem:
                failure = problem
                back(lambda: answer.fail(failure))
            else:
                back(lambda: answer.set(result))

        self._loop.after(network.delay(self._process, server), arrive, server)
        try:
            return await answer
        finally:
            timer.cancel()

    async def register(self, member: Member) -> None:
        """See `Coordination.register`."""
        self._member = encode_member(member)
        self._lease = await self._ask(lambda: self._server.grant(self._member))
        if self._renewing is None:
            self._renewing = SimTask(self._process, self._renew())

    async def _renew(self) -> None:
        while True:
            await self._loop.sleep(RENEW_MS, self._process)
            try:
                if not await self._ask(lambda: self._server.renew(self._lease)):
                    self._lease = await self._ask(lambda: self._server.grant(self._member))
            except KVStoreError:
                continue

    async def registered(self) -> Sequence[Member]:
        """See `Coordination.registered`."""
        found = await self._ask(lambda: [lease.member for lease in self._server.leases.values()])
        return [decode_member(member) for member in found]

    async def view(self) -> View | None:
        """See `Coordination.view`."""
        data = await self._ask(lambda: self._server.view)
        return decode_view(data) if data is not None else None

    async def advance(self, view: View) -> bool:
        """See `Coordination.advance`."""
        data = encode_view(view)
        return await self._ask(lambda: self._server.swap(data))

    async def changed(self, timeout_s: float) -> None:
        """See `Coordination.changed`. Where etcd is out of reach no news come, and no error."""
        woken: Future[None] = Future()
        timer = self._loop.after(timeout_s * 1e3, lambda: woken.set(None), self._process)

        def look() -> None:
            watch = self._server.watch()
            watch.when_done(tell)

        def tell() -> None:
            server = self._server.process
            if self._network.passes(server, self._process):
                delay = self._network.delay(server, self._process)
                self._loop.after(delay, lambda: woken.set(None), self._process)

        server = self._server.process
        if self._network.passes(self._process, server):
            self._loop.after(self._network.delay(self._process, server), look, server)
        try:
            await woken
        finally:
            timer.cancel()

    async def close(self) -> None:
        """See `Coordination.close`."""
        if self._renewing is not None:
            self._renewing.cancel()
            self._renewing = None
        if self._lease:
            lease, self._lease = self._lease, 0
            await self._ask(lambda: self._server.expire(lease))
