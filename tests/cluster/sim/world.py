"""One simulated process: its clock, its tasks, its memory, and the way to the others."""

from __future__ import annotations

import random
from collections.abc import Coroutine, Sequence
from typing import Any, TypeVar

from cluster.sim.loop import Dead, Loop, Process, SimTask, wait
from cluster.sim.network import Network, SimAttachment
from cluster.sim.transfers import Fabric, SimAgent, Space

from kvstore.cluster.messages import Hello

T = TypeVar("T")


class SimWorld:
    """See `kvstore.cluster.world.World`."""

    def __init__(
        self,
        network: Network,
        fabric: Fabric,
        name: str,
        *,
        number: int,
        rng: random.Random,
    ) -> None:
        """number: differs for each process of a run; it decides where its memory lies."""
        self.loop: Loop = network.loop
        self.network, self.fabric = network, fabric
        self.process = Process(self.loop, name)
        self.space = Space(number)
        self.random = random.Random(rng.getrandbits(64))
        self._ahead_ms = rng.uniform(0.0, 1e7)  # each process counts from another moment
        network.join(self.process)

    @property
    def name(self) -> str:
        return self.process.name

    def now_ms(self) -> float:
        """See `World.now_ms`."""
        return self.loop.now + self._ahead_ms

    async def sleep(self, ms: float) -> None:
        """See `World.sleep`."""
        await self.loop.sleep(ms, self.process)

    def spawn(self, work: Coroutine[Any, Any, T]) -> SimTask[T]:
        """See `World.spawn`."""
        return SimTask(self.process, work)

    async def wait(self, tasks: Sequence[SimTask[Any]], timeout_ms: float) -> None:
        """See `World.wait`."""
        if not self.process.alive:
            raise Dead(self.process.name)
        await wait(self.loop, self.process, tasks, timeout_ms)

    async def wait_all(self, tasks: Sequence[SimTask[Any]], timeout_ms: float) -> None:
        """See `World.wait_all`."""
        end_ms = self.loop.now + timeout_ms
        while not all(task.done for task in tasks) and self.loop.now < end_ms:
            await self.wait(tasks, end_ms - self.loop.now)
        for task in tasks:
            if not task.done:
                task.cancel()

    async def call(self, address: str, message: Any, timeout_ms: float) -> Any:
        """See `World.call`."""
        return await self.network.call(self.process, address, message, timeout_ms)

    async def attach(self, address: str, hello: Hello, timeout_ms: float) -> SimAttachment:
        """See `World.attach`."""
        return await self.network.attach(self.process, address, hello, timeout_ms)

    def agent(self) -> SimAgent:
        """A new transfer agent of this process."""
        return SimAgent(self.fabric, self.process, self.space)
