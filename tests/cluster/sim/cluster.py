"""Hosts that live, die and come back: each a store, a node in a process of its own, and a disk."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass, field
from typing import Any

from cluster.sim.coordinator import Coordinator, SimCoordination
from cluster.sim.loop import Loop, Process
from cluster.sim.network import Network
from cluster.sim.stores import SimNodeStore, SimStore, new_disk
from cluster.sim.transfers import Fabric
from cluster.sim.world import SimWorld

from kvstore.cluster.members import Member
from kvstore.cluster.messages import Hello
from kvstore.cluster.node import Node
from kvstore.cluster.site import NodePolicy
from kvstore.errors import KVStoreError

RESTART_MS = 300.0  # from the end of a process by itself to the next one


@dataclass(slots=True)
class SimLedger:
    """See `kvstore.cluster.world.Ledger`; outlives everything."""

    data: bytes = b""

    def load(self) -> bytes:
        """See `Ledger.load`."""
        return self.data

    def save(self, data: bytes) -> None:
        """See `Ledger.save`."""
        self.data = data


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a cluster is made of. slots: of each store. nvme: whether hosts have a disk."""

    nodes: int = 3
    replicas: int = 2
    slots: int = 256
    nvme: bool = False
    check_every: int = 32
    policy: NodePolicy = field(default_factory=NodePolicy)


class Host:
    """One machine. store and node are its present lives, dead or alive."""

    def __init__(self, cluster: SimCluster, name: str) -> None:
        self.cluster, self.name = cluster, name
        self.address = f"{name}:7000"
        self.ledger = SimLedger()
        self.disk = new_disk(cluster.rng.getrandbits(32)) if cluster.setting.nvme else None
        self.gone = False  # for ever
        self._skew_ms = cluster.rng.uniform(-5000.0, 5000.0)
        self.boot_store()
        self.boot_node()

    @property
    def alive(self) -> bool:
        """Whether its store and its node run, or are paused."""
        return self.store.process.alive and self.world.process.alive

    def boot_store(self) -> None:
        """A new life of the store: empty but for its disk."""
        cluster = self.cluster
        self.store = SimStore(
            cluster.loop,
            self.name,
            instance=cluster.new_number(),
            slots=cluster.setting.slots,
            rng=cluster.rng,
            disk=self.disk,
            skew_ms=self._skew_ms,
            check_every=cluster.setting.check_every,
        )

    def boot_node(self) -> None:
        """A new life of the node over the store as it is."""
        cluster, setting = self.cluster, self.cluster.setting
        number = cluster.new_number()
        self.lost_store = False  # then its node is about to end
        world = SimWorld(
            cluster.network,
            cluster.fabric,
            self.name,
            number=number,
            rng=cluster.rng,
        )
        self.world = world
        lost = functools.partial(self._lost_store, world.process)
        store = SimNodeStore(self.store, world.process, world.space, cluster.rng, lost)
        self.agent = world.agent()
        self.agent.register(store.pool)
        self.agent.own_guard = store.use_of
        self.node = Node(
            world,
            store,
            self.agent,
            SimCoordination(cluster.coordinator, cluster.network, world.process, cluster.rng),
            self.ledger,
            me=Member(name=self.name, address=self.address, run=number),
            replicas=setting.replicas,
            policy=setting.policy,
        )
        cluster.network.listen(self.address, world.process, self._handle, self._ended)
        self.running = world.spawn(self._run(self.node, world.process))
        cluster.loop.say(f"{self.name} runs as {number}")

    async def _run(self, node: Node, process: Process) -> None:
        """As the daemon does it: a node that gives up ends its process, and is started again."""
        try:
            await node.run()
            error = "it ended"
        except KVStoreError as problem:
            error = repr(problem)
        loop = self.cluster.loop
        loop.say(f"{self.name} gave up: {error}")
        loop.after(0.0, lambda: self._give_up(process))

    def _lost_store(self, process: Process) -> None:
        """As the daemon does it: a node whose connection to its store is over ends."""
        self.lost_store |= process is self.world.process
        self.cluster.loop.after(1.0, lambda: self._give_up(process))

    def _give_up(self, process: Process) -> None:
        if not process.alive:
            return
        self.cluster.loop.say(f"{process.name} ends")
        process.kill()
        if process is self.world.process and not self.gone:
            self.cluster.loop.after(RESTART_MS, self.restart)

    async def _handle(self, source: Process, message: Any) -> Any:
        is_node = source.name in self.cluster.hosts
        if isinstance(message, Hello):
            return await self.node.hello(message, is_node=is_node)
        return await self.node.handle(message, is_node=is_node)

    def _ended(self, session: int) -> None:
        self.world.spawn(self.node.ended(session))

    def change(self, name: str, *, joins: bool) -> None:
        """An administrator asks this node to drain a member, or to let it join again."""
        membership = self.node.membership

        async def work() -> None:
            try:
                await (membership.join(name) if joins else membership.drain(name))
            except KVStoreError as error:
                self.cluster.loop.say(f"{self.name}: {name} is not changed: {error!r}")

        self.world.spawn(work())

    # -- faults --------------------------------------------------------------------------

    def kill_node(self) -> None:
        """The node's process dies; its store lives."""
        self.world.process.kill()

    def kill(self, *, power_cut: bool = False) -> None:
        """All of it dies, and with it what is in memory."""
        was_alive = self.store.process.alive
        self.store.process.kill()
        self.world.process.kill()
        if was_alive:
            self.disk = self.store.disk_after(power_cut=power_cut)

    def restart(self) -> None:
        """What is dead of it comes back."""
        if self.gone:
            return
        if not self.store.process.alive:
            self.boot_store()
        if not self.world.process.alive:
            self.boot_node()

    def resume(self) -> None:
        """What is paused of it goes on."""
        for process in (self.store.process, self.world.process):
            if process.paused:
                process.resume()


@dataclass(eq=False)
class SimCluster:
    """All hosts, and what they share."""

    setting: Setting
    rng: random.Random
    loop: Loop = field(default_factory=Loop)
    hosts: dict[str, Host] = field(default_factory=dict)
    _number: int = 0

    def __post_init__(self) -> None:
        self.network = Network(self.loop, self.rng)
        self.fabric = Fabric(self.loop, self.network, self.rng)
        self.etcd = Process(self.loop, "etcd")
        self.coordinator = Coordinator(self.loop, self.etcd)
        for _ in range(self.setting.nodes):
            self.add_host()

    def new_number(self) -> int:
        """Never given before."""
        self._number += 1
        return self._number

    def add_host(self) -> Host:
        """Another machine."""
        name = f"n{len(self.hosts)}"
        # Known before it boots: who calls is told by its name.
        self.hosts[name] = host = Host(self, name)
        return host

    def alive(self) -> list[Host]:
        """Hosts that run."""
        return [host for host in self.hosts.values() if host.alive]

    def check(self) -> None:
        """The invariants of every store."""
        for host in self.hosts.values():
            if host.store.process.alive:
                host.store.check()
