"""One run: clients at work, faults, then peace, in which everything must come right again."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from cluster.sim.client import SimClient
from cluster.sim.cluster import Host, SimCluster
from cluster.sim.history import SPACES, Name, Promise, Truth, key
from cluster.sim.loop import Process, SimTask
from cluster.sim.nemesis import Nemesis
from cluster.sim.plans import PLANS

from kvstore import commands as c
from kvstore.cluster.members import MemberState, View, decode_view
from kvstore.cluster.placement import Ranking, places_of_put_ids
from kvstore.errors import KVStoreError
from kvstore.layout import Layout

CHAINS, BLOCKS = 3, 10  # of each space
PEACE_MS = 90_000.0  # within which all must be well again
LOOK_MS = 250.0
_WHOLE = 1 << 20


@dataclass(frozen=True, slots=True)
class Kept:
    """A block in one node's store."""

    put_id: bytes
    place: int


@dataclass(slots=True)
class Tally:
    """What a run amounted to."""

    puts: int = 0
    gets: int = 0
    hits: int = 0
    acknowledged: int = 0
    promised: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    events: int = 0
    digest: int = 0
    simulated_ms: float = 0.0

    def add(self, other: Tally) -> None:
        """Another run's as well."""
        for name in ("puts", "gets", "hits", "acknowledged", "promised", "events"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for fault, n in other.faults.items():
            self.faults[fault] = self.faults.get(fault, 0) + n
        self.digest ^= other.digest
        self.simulated_ms += other.simulated_ms


class Simulation:
    """A run of one seed."""

    def __init__(self, seed: int, plan: str) -> None:
        """plan: the name of one of `PLANS`."""
        self.rng = random.Random(seed)
        self.plan, trouble = PLANS[plan](random.Random(self.rng.getrandbits(64)))
        self.truth, self.tally = Truth(), Tally()
        self.cluster = SimCluster(self.plan.setting, self.rng)
        self.truth.present_epoch = lambda: self.cluster.coordinator.epoch
        self.truth.hosts = lambda: set(self.cluster.hosts)
        if self.plan.curious:
            self.cluster.coordinator.advanced = self._be_curious
        self.loop = self.cluster.loop
        self.clients: list[SimClient] = []
        self._views: dict[int, View] = {}
        self._epochs: dict[str, int] = {}
        self._since: dict[str, int] = {}
        self.nemesis = Nemesis(
            self.cluster,
            trouble,
            random.Random(self.rng.getrandbits(64)),
            others=self._processes,
            died=self.truth.death,
        )
        self.loop.say(f"{self.plan} {self.nemesis.trouble}")

    def _processes(self) -> list[Process]:
        return [client.process for client in self.clients if client.process.alive]

    # -- the run -------------------------------------------------------------------------

    def run(self) -> Tally:
        """All of it. AssertionError where something is not as it must be."""
        self._settle("at first")
        for number in range(self.plan.rounds):
            self._trouble()
            self._end_trouble(f"after round {number}")
            self._settle(f"after round {number}")
        for client in self.clients:
            client.process.kill()
        self.loop.run_until(self.loop.now + 15_000.0)
        self._check_nothing_is_held()
        self.loop.check_failures(all_of_them=True)
        tally = self.tally
        tally.faults, tally.events = self.nemesis.faults, self.loop.events
        tally.hits, tally.acknowledged = self.truth.hits, self.truth.acknowledged
        tally.puts, tally.digest = len(self.truth.written), self.loop.digest
        tally.simulated_ms = self.loop.now
        return tally

    def close(self) -> None:
        """Every process ends."""
        cluster = self.cluster
        for host in cluster.hosts.values():
            host.gone = True
            host.kill()
        for process in (cluster.etcd, *self._processes()):
            process.kill()

    def _trouble(self) -> None:
        end = self.loop.now + self.plan.round_ms
        self.nemesis.start()
        for client in self.clients:
            if client.process.alive:  # it has lived through the round before
                client.world.spawn(self._work(client, end))
        while self.loop.now < end:
            self.clients = [client for client in self.clients if client.process.alive]
            while len(self.clients) < self.plan.clients:
                client = self._new_client()
                client.world.spawn(self._work(client, end))
            self.loop.run_until(min(self.loop.now + 200.0, end))
            self._look()

    def _end_trouble(self, when: str) -> None:
        """As soon as all hosts serve, what they have can be read."""
        self.nemesis.stop()
        # What was paused does what was due meanwhile: a node that its store has not answered in
        # time learns that only now.
        self.loop.run_until(self.loop.now)
        self._look()
        self._wait(when, self._what_is_absent)
        self._read_all(self._within_reach())

    def _new_client(self) -> SimClient:
        cluster = self.cluster
        number = cluster.new_number()
        client = SimClient(
            cluster.network,
            cluster.fabric,
            f"c{number}",
            number=number,
            rng=self.rng,
            seeds=[host.address for host in cluster.hosts.values()],
            truth=self.truth,
            slots=self.plan.ring_slots,
            policy=self.plan.router,
        )
        self.clients.append(client)
        return client

    async def _work(self, client: SimClient, end: float) -> None:
        """What a client does: now and then two things at once."""
        rng = random.Random(client.world.random.getrandbits(64))
        running: list[SimTask[Any]] = []
        while self.loop.now < end:
            running.append(client.world.spawn(self._one_thing(client, rng)))
            if len(running) > 2 or rng.random() < 0.6:
                await client.world.wait_all(running, 60_000.0)
                for task in running:
                    task.result()
                running.clear()
            await client.world.sleep(math.exp(rng.uniform(0.0, math.log(800.0))))

    async def _one_thing(self, client: SimClient, rng: random.Random) -> None:
        space, chain = rng.randrange(len(SPACES)), rng.randrange(CHAINS)
        if rng.random() < 0.05:
            chain = CHAINS
        first = rng.randrange(BLOCKS)
        n = rng.randint(1, BLOCKS - first)
        what = rng.random()
        if what < self.plan.drops:
            if await client.drop(space):
                self._look_for_ghosts(space)
        elif what < self.plan.drops + self.plan.key_drops:
            await self._drop_keys(client, space, chain % CHAINS, first, n)
        elif what < self.plan.drops + self.plan.key_drops + self.plan.parts:
            await self._put_parts(client, rng, chain % CHAINS, first, n)
        elif what < 0.45:
            chain %= CHAINS
            copies = rng.choice((1, self.plan.setting.replicas, self.plan.setting.replicas))
            persist = self.plan.setting.nvme and rng.random() < 0.2
            ttl_ms = 0
            if rng.random() < 0.05:  # in a chain of their own, so that no block has both
                chain, ttl_ms = CHAINS, rng.choice((500, 20_000))
            await client.put(space, chain, first, n, copies=copies, persist=persist, ttl_ms=ttl_ms)
            # While copies of them are on their way; once it is quiet, what is there is to stay.
            if rng.random() < 3 * self.plan.key_drops and self.nemesis.on:
                await self._drop_keys(client, space, chain, first, n)
        elif what < 0.9:
            self.tally.gets += 1
            n = min(n, self.plan.ring_slots)
            await client.get(space, chain, first, n, cells=rng.random() < 0.3)
        else:
            await client.match(space, chain, BLOCKS)

    async def _drop_keys(
        self, client: SimClient, space: int, chain: int, first: int, n: int
    ) -> None:
        if await client.drop_keys(space, chain, first, n):
            self._look_for_ghosts(space)

    async def _put_parts(
        self, client: SimClient, rng: random.Random, chain: int, first: int, n: int
    ) -> None:
        """Two ranks put a cell each, the second one later, or never."""
        space, agreed = 0, rng.randbytes(16)
        n = min(n, self.plan.ring_slots)
        mates = [other for other in self.clients if other.process.alive]
        mate, copies = rng.choice(mates), rng.choice((1, self.plan.setting.replicas))
        cells = [0, 1]
        rng.shuffle(cells)
        numbers = [
            self.truth.begin_put((space, chain, first + i), self.loop.now, cells=cells)
            for i in range(n)
        ]
        tasks: list[SimTask[None]] = []

        def begin(rank: SimClient, cell: int) -> None:
            put = rank.put_part(space, chain, first, numbers, cell, agreed=agreed, copies=copies)
            tasks.append(rank.world.spawn(put))

        begin(client, cells[0])
        await client.world.sleep(rng.choice((0.0, 0.0, rng.uniform(0.0, 500.0))))
        if rng.random() < 0.75 and mate.process.alive:
            begin(mate, cells[1])
        await client.world.wait_all(tasks, 60_000.0)

    def _look_for_ghosts(self, space: int) -> None:
        """All clients read what should be gone, from whomever they can reach."""
        for client in self.clients:
            if client.process.alive:
                client.world.spawn(self._read_space(client, space))

    def _be_curious(self) -> None:
        """All clients go by the next view as soon as they can, and read everything."""
        for client in self.clients if self.nemesis.on else ():
            if client.process.alive:
                client.world.spawn(self._read_anew(client))

    async def _read_anew(self, client: SimClient) -> None:
        await client.world.sleep(client.world.random.uniform(1.0, 100.0))
        try:
            await client.router.refresh()
        except KVStoreError:
            return
        for space in range(len(SPACES)):
            await self._read_space(client, space)

    async def _read_space(self, client: SimClient, space: int) -> None:
        n = min(self.plan.ring_slots, BLOCKS)
        for chain in range(CHAINS):
            for first in range(0, BLOCKS - n + 1, n):
                await client.get(space, chain, first, n)

    # -- looking into the stores ---------------------------------------------------------

    def kept(self, host: Host) -> dict[tuple[int, bytes], Kept]:
        """The blocks in one store, by space and key."""
        store, found = host.store.store, {}
        described = store._describe()
        names = described.names.split("\n")
        layouts = described.layouts.split("\n")
        spaces = {
            int(number): next(
                i
                for i, (known, layout) in enumerate(SPACES)
                if known == name and layout == Layout.decode(encoded.encode())
            )
            for number, name, encoded in zip(described.ids.tolist(), names, layouts, strict=False)
        }
        scanned = store._scan(c.Scan(first=0, most=_WHOLE >> 5))
        assert not scanned.following
        places, placed = places_of_put_ids(scanned.put_ids)
        assert placed.all()
        rows = zip(
            scanned.namespaces.tolist(),
            scanned.hashes,
            scanned.put_ids,
            places.tolist(),
            strict=True,
        )
        for number, hashed, put_id, place in rows:
            found[spaces[number], hashed.tobytes()] = Kept(put_id.tobytes(), place)
        return found

    def _stores(self) -> Iterator[Host]:
        return (host for host in self.cluster.hosts.values() if host.store.process.alive)

    def _look(self) -> None:
        """What holds at any time: nothing is lost, and no node goes back to an earlier view, nor
        by another one than all others of its epoch."""
        for host in self.cluster.alive():
            site = host.node.site
            if site.since != self._since.get(host.name, site.since):
                self.truth.death()  # it knows that it missed something, and has forgotten all
            self._since[host.name] = site.since
            view = site.view
            if view.epoch:
                assert self._views.setdefault(view.epoch, view) == view, "two views of one epoch"
                last = self._epochs.get(host.name, 0)
                assert view.epoch >= last, f"{host.name} went back to {view.epoch} from {last}"
                self._epochs[host.name] = view.epoch
        self._look_for_lost()

    def _look_for_lost(self) -> None:
        """No promised block is gone from all stores that live."""
        if self.plan.tight or not self.truth.promises:
            return
        there: set[tuple[int, bytes]] = set()
        for host in self._stores():
            there.update(self.kept(host))
        for name, promise in self.truth.promises.items():
            if (name[0], key(name)) not in there:
                raise AssertionError(f"{name} was promised ({promise}), and is nowhere")

    # -- peace ---------------------------------------------------------------------------

    def _wait(self, when: str, what_is_amiss: Callable[[], str]) -> None:
        """Until nothing is amiss, which must not take long."""
        end = self.loop.now + PEACE_MS
        while trouble := what_is_amiss():
            assert self.loop.now < end, f"{when}: {trouble}"
            self.loop.run_until(self.loop.now + LOOK_MS)
            self._look()

    def _settle(self, when: str) -> None:
        """Waits until all is well, then reads everything."""
        self._wait(when, self._what_is_amiss)
        self.cluster.check()
        self._read_all(self.truth.promises)
        self._renew_promises()
        old = next((client for client in self.clients if client.process.alive), None)
        if old is not None:  # who was there all the time has recovered as well
            self._read_all(self.truth.promises, old)

    def _what_is_absent(self) -> str:
        """Why not all hosts serve under one view, empty where they do."""
        data = self.cluster.coordinator.view
        if data is None:
            return "there is no view"
        view = decode_view(data)
        registered = {lease.name for lease in self.cluster.coordinator.leases.values()}
        for host in self.cluster.hosts.values():
            site = host.node.site
            if host.name not in registered:
                return f"{host.name} is not registered"
            if not host.alive:
                return f"{host.name} is down"
            if host.lost_store:
                return f"{host.name} has lost its store, and is about to end"
            if site.view != view:
                return f"{host.name} goes by epoch {site.view.epoch}, not {view.epoch}"
            member = view.find(host.name)
            if member is None or member.run != site.me.run or not site.serving:
                return f"{host.name} is {member}, serving {site.serving}"
        return ""

    def _what_is_amiss(self) -> str:
        """Why the cluster is not settled, empty where it is."""
        absent = self._what_is_absent()
        if absent:
            return absent
        view = next(iter(self.cluster.hosts.values())).node.site.view
        for host in self.cluster.hosts.values():
            site = host.node.site
            if site.role not in (MemberState.UP, MemberState.OUT):
                return f"{host.name} is {site.role}"
            if site.role == MemberState.UP and site.settled != view.epoch:
                return f"{host.name} has settled epoch {site.settled}, not {view.epoch}"
        return self._what_is_not_placed(view) or self._what_is_held()

    def _what_is_not_placed(self, view: View) -> str:
        """Every block is at all of its targets, the same one of its key. Where it does not belong
        another one of a later put id may be left, until there is no room for it."""
        if self.plan.tight:
            return ""
        ranking = Ranking(view)
        kept = {host.name: self.kept(host) for host in self._stores()}
        for holder, blocks in kept.items():
            member = view.find(holder)
            if member is None or member.state == MemberState.OUT:
                continue  # what it has left is nobody's
            places = np.array([block.place for block in blocks.values()], np.uint64)
            ranked = ranking.targets(places, most=view.replicas).tolist()
            for (at, block), numbers in zip(blocks.items(), ranked, strict=True):
                targets = [view.members[number].name for number in numbers]
                for target in targets:
                    there = kept[target].get(at)
                    is_worse = there is not None and there.put_id > block.put_id
                    if (
                        there is None
                        or is_worse
                        or (holder in targets and there.put_id != block.put_id)
                    ):
                        what = "lacks" if there is None else "has another put of"
                        return (
                            f"{target} {what} {at[1][:4].hex()}, which {holder} has"
                            f" (of {targets}): {there}, {block}"
                        )
        return ""

    def _what_is_held(self) -> str:
        """Nothing is pinned, pending or kept ahead once nobody works."""
        if any(
            not task.done
            for client in self.clients
            for task in client.process.tasks
            if task.name != "Contacts.run"
        ):
            return "clients are at work"
        for host in self._stores():
            stats, held = host.store.store.stats(), host.node.site.counters.lost_slots
            if stats.leased_blocks or stats.pending_blocks or stats.quarantined_blocks > held:
                return f"{host.name} holds {stats}"
            if stats.ahead_bytes > held * 4096:
                return f"{host.name} holds {stats.ahead_bytes} bytes ahead"
        return ""

    def _check_nothing_is_held(self) -> None:
        trouble = self._what_is_held()
        assert not trouble, trouble
        for host in self._stores():
            nodes = len(self.cluster.hosts) - 1
            assert host.node.sessions <= nodes, f"{host.name} keeps {host.node.sessions} sessions"

    def _within_reach(self) -> set[Name]:
        """Promised blocks that some node has of which readers would ask."""
        view = next(iter(self.cluster.hosts.values())).node.site.view
        ranking = Ranking(view)
        there: set[tuple[int, bytes]] = set()
        for host in self._stores():
            for at, block in self.kept(host).items():
                names = [view.members[number].name for number in ranking.readers(block.place)]
                if host.name in names:
                    there.add(at)
        return {name for name in self.truth.promises if (name[0], key(name)) in there}

    def _read_all(self, wanted: Collection[Name], old: SimClient | None = None) -> None:
        """Through a client that has just come, or an old one: what is wanted is read, and nothing
        is wrong."""
        client, view = old or self._new_client(), self.cluster.coordinator.view

        async def work() -> None:
            await client.router.refresh()  # it may not have heard of the last changes
            for space in range(len(SPACES)):
                for chain in range(CHAINS + 1):
                    for first in range(0, BLOCKS, self.plan.ring_slots):
                        n = min(self.plan.ring_slots, BLOCKS - first)
                        found = await client.get(space, chain, first, n)
                        if self.cluster.coordinator.view == view:
                            self._compare(space, chain, first, found, wanted)

        self.loop.run_until_done(client.world.spawn(work()), 120_000.0)
        if not old:
            client.process.kill()
            self.clients.remove(client)

    def _compare(
        self,
        space: int,
        chain: int,
        first: int,
        found: list[int | None],
        wanted: Collection[Name],
    ) -> None:
        if self.plan.tight:
            return
        for i, number in enumerate(found):
            name = (space, chain, first + i)
            assert number is not None or name not in wanted, (
                f"{name} was promised ({self.truth.promises[name]}), and is not to be had"
            )

    def _renew_promises(self) -> None:
        """All is at R nodes again, so that as many deaths as before are survived."""
        self.truth.settled()
        up = [h for h in self._stores() if h.node.site.role == MemberState.UP]
        copies = min(self.plan.setting.replicas, len(up))
        for name, promise in list(self.truth.promises.items()):
            self.truth.promises[name] = Promise(copies, self.loop.now)
            self.tally.promised += 1
            del promise


def run_seed(seed: int, plan: str = "ordinary") -> Tally:
    """A run; where it fails, the error tells how to run it again, and what happened last."""
    simulation = Simulation(seed, plan)
    try:
        return simulation.run()
    except Exception as error:
        lines = "\n".join(list(simulation.loop.journal)[-40:])
        again = (
            f"SIM_PLAN={plan} SIM_SEEDS={seed}:1 pytest tests/cluster/sim -k clusters_under_faults"
        )
        raise AssertionError(f"seed {seed}: {error!r}\n{lines}\nagain: {again}") from error
    finally:
        simulation.close()
