"""Long histories of a real cluster: random faults one after another, under load."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cluster.etcd_rig import Etcd
from cluster.load import Load
from cluster.nodes import ETCD, LAYOUT, Nodes, all_well, blocks, chain, eventually, nodes
from cluster.proxies import CLIENT
from cluster.test_nodes import assert_quiet, assert_whole, states, until_all_up

from kvstore.cluster import messages as m
from kvstore_client.cluster.session import ClusterSession

SPACE = "history"
CYCLES = 60
SETTLE_S = 60.0
# The longest that one get may take; the goal of 100 ms is for a machine with nothing else to do.
GET_S = 4.0


class Nemesis:
    """Strikes once a cycle, by a seed; each fault is over when its method returns."""

    def __init__(self, running: Nodes, etcd: Etcd, load: Load, seed: int) -> None:
        self.running, self.etcd, self.load = running, etcd, load
        self.random = random.Random(seed)
        self._still = threading.Event()  # never set
        self.faults: list[tuple[Callable[[], str], int]] = [
            (self.kill, 5),
            (self.kill_and_wait_for_the_others, 2),
            (self.kill_the_process_beside_the_core, 2),
            (self.pause, 5),
            (self.cut_off, 5),
            (self.etcd_away, 3),
            (self.fill, 1),
            (self.drain, 1),
        ]

    def strike(self) -> str:
        """One fault; what it was."""
        kinds, weights = zip(*self.faults, strict=True)
        (fault,) = self.random.choices(kinds, weights)
        return fault()

    def _last(self, least_s: float, most_s: float) -> None:
        self._still.wait(self.random.uniform(least_s, most_s))
        self.load.check()

    def _name(self) -> str:
        return self.random.choice(self.running.names)

    def kill(self) -> str:
        name = self._name()
        self.running.kill(name)
        self._last(0.0, 2.0)
        self.running.start([name])
        return f"kill {name}"

    def kill_and_wait_for_the_others(self) -> str:
        name = self._name()
        self.running.kill(name)
        copies = lambda: self.running.fewest_copies(SPACE, self.load.keys())  # noqa: E731
        eventually(lambda: copies() >= 2, SETTLE_S, "two copies among the rest")
        self.running.start([name])
        return f"kill {name}, repaired before it came back"

    def kill_the_process_beside_the_core(self) -> str:
        name = self._name()
        self.running.kill_node_process(name)
        self._last(0.0, 1.0)
        return f"kill the node process of {name}"

    def pause(self) -> str:
        name, part = self._name(), self.random.choice(("both", "node", "core"))
        # Longer than a lease now and then.
        for_s = self.random.choice((0.1, 0.5, 2.0, 9.0))
        self.running.pause(name, part)
        self._last(for_s, for_s)
        self.running.resume(name)
        return f"pause {name} ({part}) for {for_s} s"

    def cut_off(self) -> str:
        name = self._name()
        others = [each for each in self.running.names if each != name]
        sides = ([*others, CLIENT], others, [CLIENT], others[:1], [ETCD])
        away = self.random.choice(sides)
        assert self.running.proxies
        self.running.proxies.isolate(name, others=away)
        self._last(0.2, 6.0)
        self.running.proxies.heal()
        return f"cut {name} off from {', '.join(away)}"

    def etcd_away(self) -> str:
        hard = self.random.random() < 0.5
        self.etcd.kill() if hard else self.etcd.pause()
        self._last(0.5, 8.0)
        dead = self._name() if self.random.random() < 0.3 else ""
        if dead:
            self.running.kill(dead)
            self._last(0.2, 1.0)
        self.etcd.start() if hard else self.etcd.resume()
        if dead:
            self.running.start([dead])
        return f"etcd {'killed' if hard else 'paused'}{', and ' + dead + ' killed' if dead else ''}"

    def fill(self) -> str:
        """More than all memory holds, then a namespace that is dropped."""
        with self.load.pressure(), self.running.client(transfer="grpc") as session:
            space = session.open_namespace("fill", LAYOUT)
            for seed in range(8):
                data = blocks(256, seed)
                for first in range(0, 256, 64):
                    keys = chain(64, self.random.randrange(1 << 30))
                    session.put(space, keys, list(data[first : first + 64]), position=0)
            eventually(lambda: session.drop_namespace(space) > 0, SETTLE_S, "the fill is dropped")
        return "fill"

    def drain(self) -> str:
        name = self._name()
        with self.running.client(transfer="grpc") as session:
            session.change(m.Drain(name=name))
            eventually(lambda: states(session)[name] == "out", SETTLE_S, f"{name} out")
            self.running.kill(name)
            self._last(0.1, 0.5)
            self.running.start([name])
        return f"drain {name}, kill it"


def settle(running: Nodes, session: ClusterSession, load: Load) -> None:
    """All are members again and serve, and all that is due is at two nodes."""
    for name in running.names:
        if states(session).get(name) == "out":
            session.change(m.Join(name=name))
    eventually(lambda: set(states(session)) == set(running.names), SETTLE_S, "all are members")
    until_all_up(session)
    eventually(lambda: all_well(session), SETTLE_S, "all serve")
    eventually(
        lambda: running.fewest_copies(SPACE, load.keys()) >= 2, SETTLE_S, "two copies of each"
    )
    load.drop_again()
    load.wait_for(gets=3, puts=1, timeout_s=SETTLE_S)


@pytest.mark.long
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", [1])
def test_what_was_acknowledged_stays_readable_through_many_faults(
    tmp_path: Path, etcd: Etcd, seed: int
) -> None:
    flags = ("--transfer", "grpc")
    longest: list[tuple[float, str]] = []
    with (
        nodes(tmp_path, 3, *flags, etcd=etcd.endpoint, proxied=True) as running,
        running.client(transfer="grpc", arena_bytes=1 << 20, ring_bytes=1 << 20) as session,
    ):
        until_all_up(session)
        with Load(running, SPACE, seed=seed, most=40, forget=False) as load:
            nemesis = Nemesis(running, etcd, load, seed)
            for cycle in range(CYCLES):
                load.wait_for(puts=1, gets=5)
                at_s = time.monotonic()
                what = nemesis.strike()
                longest.append((load.longest_get_s(at_s), what))
                put_s = load.longest_put_s(at_s)
                settle(running, session, load)
                stats = session.stats()
                print(f"{cycle:3} {what}: longest get {1e3 * longest[-1][0]:.0f} ms,", end=" ")
                print(f"put {1e3 * put_s:.0f} ms, settled after", end=" ")
                print(f"{time.monotonic() - at_s:.1f} s, {stats.blocks} blocks")
            print(load.words())
        due = load.due()
        assert_quiet(running)
        space = session.open_namespace(SPACE, LAYOUT)
        for seed_of_chain in due:
            keys, data = (
                chain(load.blocks_each, seed_of_chain),
                blocks(load.blocks_each, seed_of_chain),
            )
            assert_whole(session, space, keys, data)
    took = np.array([s for s, _ in longest]) * 1e3
    print("longest get of each fault, ms:", np.percentile(took, [50, 90, 99, 100]).round())
    assert took.max() < 1e3 * GET_S, max(longest)
