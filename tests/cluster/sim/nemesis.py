"""What goes wrong, when, and for how long: all of it from the seed, and all of it ends."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from cluster.sim.cluster import Host, SimCluster
from cluster.sim.loop import Process, Timer
from cluster.sim.network import FAIR, Weather
from cluster.sim.transfers import Carriage

Fault = Callable[["Nemesis"], str]


@dataclass(slots=True)
class Trouble:
    """How much of what there is. mean_ms: between two faults. kinds: how often each, of all.
    deaths: hosts that may lose their memory until the next quiet time."""

    mean_ms: float = 1500.0
    kinds: dict[str, float] = field(default_factory=dict)
    weather: Weather = FAIR
    carriage: Carriage = field(default_factory=Carriage)
    deaths: int = 1


def some_trouble(rng: random.Random, *, replicas: int, changes: bool) -> Trouble:
    """A swarm of faults: in each run some kinds, in others other ones. changes: whether hosts may
    come and go for good."""
    kinds = {name: rng.uniform(0.2, 1.0) for name in _FAULTS if rng.random() < 0.5}
    if not changes:
        kinds.pop("another host", None)
        kinds.pop("drain", None)
    weather = Weather(
        delay_ms=math.exp(rng.uniform(math.log(0.1), math.log(20.0))),
        loss=rng.choice((0.0, 0.0, 0.02, 0.1)),
        twice=rng.choice((0.0, 0.0, 0.05, 0.2)),
        clog=rng.choice((0.0, 0.0, 0.01)),
        clog_ms=rng.choice((50.0, 500.0, 3000.0)),
    )
    carriage = Carriage(
        chunk_ms=math.exp(rng.uniform(math.log(0.05), math.log(5.0))),
        flips=rng.choice((0.0, 0.0, 0.02)),
        hardware=rng.random() < 0.5,
        fails_to_close=rng.choice((0.0, 0.0, 0.2)),
    )
    return Trouble(
        mean_ms=math.exp(rng.uniform(math.log(300.0), math.log(4000.0))),
        kinds=kinds,
        weather=weather,
        carriage=carriage,
        deaths=rng.choice((0, replicas - 1, replicas - 1, replicas - 1, 9)),
    )


class Nemesis:
    """Makes trouble between `start` and `stop`."""

    def __init__(
        self,
        cluster: SimCluster,
        trouble: Trouble,
        rng: random.Random,
        *,
        others: Callable[[], list[Process]],
        died: Callable[[], None],
    ) -> None:
        """others: processes of clients. died: told of each host that lost its memory."""
        self.cluster, self.trouble, self.rng = cluster, trouble, rng
        self.loop = cluster.loop
        self.others, self.died = others, died
        self.faults: dict[str, int] = {}
        self._left = 0
        self._timers: list[Timer] = []
        self.on = False

    def start(self) -> None:
        """From now on."""
        self.on, self._left = True, self.trouble.deaths
        self.cluster.network.weather = self.trouble.weather
        self.cluster.fabric.carriage = self.trouble.carriage
        self._next()

    def stop(self) -> None:
        """All is well again: what is down comes back, and what is paused goes on."""
        self.on = False
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        network, fabric = self.cluster.network, self.cluster.fabric
        fabric.interrupt = None
        self.cluster.coordinator.granted = lambda _name: None
        network.heal()
        fabric.carriage = replace(fabric.carriage, flips=0.0, fails_to_close=0.0, chunk_ms=0.2)
        for process in (self.cluster.etcd, *self.others()):
            if process.paused:
                process.resume()
        for host in self.cluster.hosts.values():
            host.store.full = False
            host.resume()
            host.restart()

    def later(self, ms: float, action: Callable[[], None]) -> None:
        """The end of a fault."""
        self._timers.append(self.loop.after(ms, action))

    def pause(self, process: Process, ms: float) -> None:
        """Stops a process for a while."""
        process.pause()

        def end() -> None:
            if process.paused:
                process.resume()

        self.later(ms, end)

    def some_ms(self, least: float, most: float) -> float:
        """Mostly short, at times long."""
        return math.exp(self.rng.uniform(math.log(least), math.log(most)))

    def _next(self) -> None:
        self.later(self.rng.expovariate(1.0 / self.trouble.mean_ms), self._strike)

    def _strike(self) -> None:
        if not self.on:
            return
        if self.trouble.kinds:
            names = list(self.trouble.kinds)
            name = self.rng.choices(names, [self.trouble.kinds[n] for n in names])[0]
            said = _FAULTS[name](self)
            if said:
                self.faults[name] = self.faults.get(name, 0) + 1
                self.loop.say(f"nemesis: {name}: {said}")
        self._next()

    # -- what there is -------------------------------------------------------------------

    def processes(self) -> list[Process]:
        """All that run, and are not paused."""
        cluster = self.cluster
        found = [cluster.etcd, *self.others()]
        for host in cluster.hosts.values():
            found += [host.store.process, host.world.process]
        return [process for process in found if process.alive and not process.paused]

    def names(self) -> list[str]:
        """Of all ends of the network."""
        return [*self.cluster.hosts, "etcd", *(process.name for process in self.others())]

    def a_host(self) -> Host | None:
        """One that runs."""
        alive = self.cluster.alive()
        return self.rng.choice(alive) if alive else None

    def may_die(self) -> bool:
        """Whether one more host may lose its memory."""
        self._left -= 1
        return self._left >= 0


def _partition(nemesis: Nemesis) -> str:
    names = nemesis.names()
    nemesis.rng.shuffle(names)
    cut = nemesis.rng.choice((1, 1, nemesis.rng.randrange(1, len(names))))
    one, other = sorted(names[:cut]), sorted(names[cut:])
    both = nemesis.rng.random() < 0.6
    if nemesis.rng.random() < 0.5:
        one, other = other, one
    # Often as long as it takes until a member is left out.
    ms = nemesis.some_ms(*nemesis.rng.choice(((50.0, 20_000.0), (4000.0, 15_000.0))))
    _block(nemesis, one, other, both=both, ms=ms)
    return f"{one} {'<->' if both else '->'} {other} for {ms:.0f} ms"


def _one_link(nemesis: Nemesis) -> str:
    one, other = nemesis.rng.sample(nemesis.names(), 2)
    both, ms = nemesis.rng.random() < 0.5, nemesis.some_ms(50.0, 20_000.0)
    _block(nemesis, [one], [other], both=both, ms=ms)
    return f"{one} {'<->' if both else '->'} {other} for {ms:.0f} ms"


def _block(nemesis: Nemesis, one: list[str], other: list[str], *, both: bool, ms: float) -> None:
    network = nemesis.cluster.network
    network.block(one, other, both=both)

    def end() -> None:
        for a in one:
            for b in other:
                network.unblock(a, b)
                if both:
                    network.unblock(b, a)

    nemesis.later(ms, end)


def _exile(nemesis: Nemesis) -> str:
    """A host sees clients alone, most often for so long that it is left out."""
    host = nemesis.a_host()
    if host is None:
        return ""
    rest = [name for name in nemesis.cluster.hosts if name != host.name]
    etcd_ms = nemesis.some_ms(2000.0, 12_000.0)
    ms = etcd_ms * nemesis.rng.uniform(0.5, 1.8)
    _block(nemesis, [host.name], rest, both=True, ms=ms)
    _block(nemesis, [host.name], ["etcd"], both=True, ms=etcd_ms)
    return f"{host.name} for {ms:.0f} ms, from etcd for {etcd_ms:.0f} ms"


def _handover(nemesis: Nemesis) -> str:
    """One host alone sees clients and etcd, and then all others do."""
    host = nemesis.a_host()
    if host is None:
        return ""
    rest = [name for name in nemesis.cluster.hosts if name != host.name]
    alone_ms, away_ms = nemesis.some_ms(4000.0, 10_000.0), nemesis.some_ms(4000.0, 15_000.0)
    _block(nemesis, rest, [host.name, "etcd"], both=True, ms=alone_ms)

    def end() -> None:
        _block(nemesis, [host.name], [*rest, "etcd"], both=True, ms=away_ms)

    nemesis.later(alone_ms, end)
    return f"{host.name} alone for {alone_ms:.0f} ms, the others for {away_ms:.0f} ms"


def _pause(nemesis: Nemesis) -> str:
    running = nemesis.processes()
    if not running:
        return ""
    process = nemesis.rng.choice(running)
    ms = nemesis.some_ms(20.0, 15_000.0)
    nemesis.pause(process, ms)
    return f"{process.name} for {ms:.0f} ms"


def _death(nemesis: Nemesis) -> str:
    host = nemesis.a_host()
    if host is None or not nemesis.may_die():
        return ""
    cut, ms = nemesis.rng.random() < 0.5, nemesis.some_ms(50.0, 20_000.0)
    host.kill(power_cut=cut)
    nemesis.died()
    nemesis.later(ms, host.restart)
    return f"{host.name} for {ms:.0f} ms"


def _death_of_a_node(nemesis: Nemesis) -> str:
    host = nemesis.a_host()
    if host is None:
        return ""
    ms = nemesis.some_ms(50.0, 20_000.0)
    host.kill_node()
    nemesis.later(ms, host.restart)
    return f"{host.name}, but not its store, for {ms:.0f} ms"


def _stall(nemesis: Nemesis) -> str:
    """Whoever moves bytes next stops in the middle of it."""
    ms = nemesis.some_ms(20.0, 15_000.0)

    def strike(source: Process, _target: Process) -> None:
        if nemesis.on and not source.paused:
            nemesis.pause(source, ms)

    nemesis.cluster.fabric.interrupt = strike
    return f"the next transfer for {ms:.0f} ms"


def _cut(nemesis: Nemesis) -> str:
    """The next bytes that move find no way in the middle of it."""
    ms = nemesis.some_ms(20.0, 15_000.0)

    def strike(source: Process, target: Process) -> None:
        if nemesis.on:
            _block(nemesis, [source.name], [target.name], both=True, ms=ms)

    nemesis.cluster.fabric.interrupt = strike
    return f"the next transfer for {ms:.0f} ms"


def _faint(nemesis: Nemesis) -> str:
    """Whoever registers next stops before it hears of that."""
    ms, coordinator = nemesis.some_ms(50.0, 3000.0), nemesis.cluster.coordinator

    def strike(name: str) -> None:
        coordinator.granted = lambda _name: None
        process = nemesis.cluster.hosts[name].world.process
        if process.alive and not process.paused:
            nemesis.pause(process, ms)

    coordinator.granted = strike
    return f"who registers next, for {ms:.0f} ms"


def _hang_up(nemesis: Nemesis) -> str:
    attached = nemesis.cluster.network.attached()
    if not attached:
        return ""
    source, target = nemesis.rng.choice(attached)
    nemesis.cluster.network.hang_up(source, target)
    return f"{source} at {target}"


def _death_of_a_client(nemesis: Nemesis) -> str:
    alive = [process for process in nemesis.others() if process.alive]
    if not alive:
        return ""
    process = nemesis.rng.choice(alive)
    process.kill()
    return process.name


def _no_room(nemesis: Nemesis) -> str:
    """A store whose blocks are all in use takes no more for a while."""
    host = nemesis.a_host()
    if host is None:
        return ""
    store, ms = host.store, nemesis.some_ms(50.0, 5000.0)
    store.full = True

    def end() -> None:
        store.full = False

    nemesis.later(ms, end)
    return f"{host.name} for {ms:.0f} ms"


def _drain(nemesis: Nemesis) -> str:
    """An administrator takes a member's blocks away, and often lets it have some again."""
    host = nemesis.a_host()
    members = host.node.site.view.members if host is not None else ()
    if host is None or not members:
        return ""
    name, back = nemesis.rng.choice(members).name, nemesis.rng.random() < 0.7
    host.change(name, joins=False)

    def end() -> None:
        other = nemesis.a_host()
        if other is not None:
            other.change(name, joins=True)

    if back:
        nemesis.later(nemesis.some_ms(50.0, 15_000.0), end)
    return f"{name}, asked of {host.name}"


def _another_host(nemesis: Nemesis) -> str:
    if len(nemesis.cluster.hosts) >= nemesis.cluster.setting.nodes + 2:
        return ""
    return nemesis.cluster.add_host().name


_FAULTS: dict[str, Fault] = {
    "partition": _partition,
    "one link": _one_link,
    "exile": _exile,
    "handover": _handover,
    "pause": _pause,
    "faint": _faint,
    "stall": _stall,
    "cut": _cut,
    "death": _death,
    "death of a node": _death_of_a_node,
    "death of a client": _death_of_a_client,
    "hang-up": _hang_up,
    "no room": _no_room,
    "drain": _drain,
    "another host": _another_host,
}
