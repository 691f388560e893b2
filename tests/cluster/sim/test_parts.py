"""The simulation's own parts do what a real network, memory and etcd may do."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from cluster.sim.coordinator import LEASE_MS, Coordinator, SimCoordination
from cluster.sim.loop import Cancelled, Future, Loop, Process, SimTask
from cluster.sim.network import Network, Weather
from cluster.sim.stores import SimNodeStore, SimStore, new_disk
from cluster.sim.transfers import Carriage, Fabric, SimAgent, SimRemote
from cluster.sim.world import SimWorld
from nvme.sim_disk import SimDisk

from kvstore import commands as c
from kvstore.cluster.members import Member, View
from kvstore.cluster.messages import Hello, Ping, Pong, Welcomed, WrongEpoch
from kvstore.errors import DeadlineExceeded, InvalidArgument, Unavailable
from kvstore.layout import Layout
from kvstore.transfer.base import Pieces, TransferFailed

LAYOUT = Layout.opaque(model="sim", block_bytes=3000, block_tokens=16)


class Rig:
    """A loop with everything in it and two processes, `a` and `b`."""

    def __init__(self, seed: int = 1) -> None:
        self.rng = random.Random(seed)
        self.loop = Loop()
        self.network = Network(self.loop, self.rng)
        self.fabric = Fabric(self.loop, self.network, self.rng)
        self.a, self.b = self.world("a"), self.world("b")
        self.served: list[Any] = []

    def world(self, name: str) -> SimWorld:
        number = self.fabric._numbers = self.fabric._numbers + 1
        return SimWorld(self.network, self.fabric, name, number=number, rng=self.rng)

    def serve(self, handler: Callable[[Any], Awaitable[Any]]) -> None:
        async def handle(_source: Process, message: Any) -> Any:
            self.served.append(message)
            return await handler(message)

        self.network.listen("b:1", self.b.process, handle, lambda _session: None)

    def ping(self, timeout_ms: float = 1000.0) -> SimTask[Any]:
        return self.a.spawn(self.a.call("b:1", Ping(epoch=7), timeout_ms))

    def run(self, work: Any) -> Any:
        return self.loop.run_until_done(self.a.spawn(work), 60_000.0)


@pytest.fixture
def rig() -> Rig:
    return Rig()


async def pong(message: Any) -> Pong:
    return Pong(
        name="b",
        run=1,
        epoch=message.epoch,
        serving=1,
        settled=0,
        used_bytes=0,
        total_bytes=0,
        blocks=0,
    )


# -- tasks ---------------------------------------------------------------------------------


def test_wait_ends_with_the_next_task_that_is_done(rig: Rig) -> None:
    async def work() -> list[float]:
        tasks = [rig.a.spawn(rig.a.sleep(ms)) for ms in (5, 10, 50)]
        times = []
        for _ in range(3):
            await rig.a.wait(tasks, 20.0)
            times.append(rig.loop.now)
        await rig.a.wait(tasks, 1e6)
        await rig.a.wait(tasks, 1e6)  # all are done: at once
        return [*times, rig.loop.now]

    assert rig.run(work()) == [5.0, 10.0, 30.0, 50.0]


def test_a_cancelled_task_cleans_up_and_nobody_hears_of_it(rig: Rig) -> None:
    seen = []

    async def work() -> None:
        try:
            await rig.a.sleep(1e6)
        finally:
            await rig.a.sleep(3.0)
            seen.append(rig.loop.now)

    task = rig.a.spawn(work())
    rig.loop.run_until(10.0)
    task.cancel()
    rig.loop.run_until(20.0)
    assert seen == [13.0]
    assert task.done
    with pytest.raises(Cancelled):
        task.result()


def test_a_dead_process_cleans_nothing_up(rig: Rig) -> None:
    seen = []

    async def work() -> None:
        try:
            await rig.a.sleep(1e6)
        finally:
            seen.append("way out")
            await rig.a.sleep(3.0)
            seen.append("never")

    rig.a.spawn(work())
    rig.loop.run_until(10.0)
    rig.a.process.kill()
    rig.loop.run_until(1e5)
    assert seen == ["way out"]


def test_a_paused_process_does_all_of_it_later(rig: Rig) -> None:
    times = []

    async def work() -> None:
        for _ in range(3):
            await rig.a.sleep(10.0)
            times.append(rig.loop.now)

    rig.a.spawn(work())
    rig.loop.run_until(15.0)
    rig.a.process.pause()
    rig.loop.run_until(100.0)
    rig.a.process.resume()
    rig.loop.run_until_idle()
    assert times == [10.0, 100.0, 110.0]


def test_an_error_that_nobody_asks_for_fails_the_run(rig: Rig) -> None:
    async def work() -> None:
        raise Unavailable("so it is")

    rig.a.spawn(work())
    with pytest.raises(AssertionError, match="nobody asked"):
        rig.loop.run_until(1e6)


def test_a_bug_fails_the_run_at_once(rig: Rig) -> None:
    async def work() -> None:
        raise KeyError("bug")

    rig.a.spawn(work())
    with pytest.raises(KeyError):
        rig.loop.run_until(1.0)


# -- messages ------------------------------------------------------------------------------


def test_a_call_is_answered_by_a_copy(rig: Rig) -> None:
    rig.serve(pong)
    answer = rig.loop.run_until_done(rig.ping(), 100.0)
    assert answer.epoch == 7
    assert rig.served == [Ping(epoch=7)]


def test_errors_travel(rig: Rig) -> None:
    async def refuse(_message: Any) -> Pong:
        raise WrongEpoch(b"later view")

    rig.serve(refuse)
    with pytest.raises(WrongEpoch) as raised:
        rig.loop.run_until_done(rig.ping(), 100.0)
    assert raised.value.view == b"later view"


def test_nobody_there_is_unavailable(rig: Rig) -> None:
    with pytest.raises(Unavailable):
        rig.loop.run_until_done(rig.ping(), 100.0)


def test_what_is_lost_times_out(rig: Rig) -> None:
    rig.serve(pong)
    rig.network.weather = Weather(refuses=0.0)
    rig.network.block(["b"], ["a"], both=False)
    with pytest.raises(DeadlineExceeded):
        rig.loop.run_until_done(rig.ping(200.0), 300.0)
    assert len(rig.served) == 1  # it was carried out all the same


def test_a_paused_process_answers_late_or_not_at_all(rig: Rig) -> None:
    rig.serve(pong)
    task = rig.ping(1000.0)
    rig.b.process.pause()
    rig.loop.run_until(500.0)
    assert not rig.served
    rig.b.process.resume()
    assert rig.loop.run_until_done(task, 100.0).epoch == 7


def test_a_message_may_be_carried_out_twice(rig: Rig) -> None:
    rig.serve(pong)
    rig.network.weather = Weather(twice=1.0)
    assert rig.loop.run_until_done(rig.ping(), 100.0).epoch == 7
    rig.loop.run_until_idle()
    assert len(rig.served) == 2


def test_a_call_fails_when_its_server_dies(rig: Rig) -> None:
    async def never(message: Any) -> Pong:
        await rig.b.sleep(1e6)
        return await pong(message)

    rig.serve(never)
    task = rig.ping(1e5)
    rig.loop.run_until(50.0)
    rig.b.process.kill()
    with pytest.raises(Unavailable):
        rig.loop.run_until_done(task, 100.0)


HELLO = Hello(version=1, name="a", kind="", agent=b"", epoch=0)


async def welcome(_source: Process, _message: Any) -> Welcomed:
    return Welcomed(version=1, session=5, name="b", run=1, kind="", agent=b"", view=b"")


@pytest.mark.parametrize("fault", ["caller", "server", "silence", "close"])
def test_a_session_ends_with_either_end(rig: Rig, fault: str) -> None:
    closed: list[int] = []
    rig.network.listen("b:1", rig.b.process, welcome, closed.append)
    attached = rig.run(rig.a.attach("b:1", HELLO, 1000.0))
    assert attached.welcomed.session == 5
    assert not attached.lost
    match fault:
        case "caller":
            rig.a.process.kill()
        case "server":
            rig.b.process.kill()
        case "silence":
            rig.network.block(["a"], ["b"])
        case _:
            rig.run(attached.close())
    rig.loop.run_until(rig.loop.now + 100_000.0)
    assert attached.lost or fault == "caller"
    assert closed == ([5] if fault != "server" else [])


def test_a_session_that_nobody_heard_of_ends(rig: Rig) -> None:
    closed: list[int] = []
    rig.network.listen("b:1", rig.b.process, welcome, closed.append)
    rig.network.block(["b"], ["a"], both=False)
    with pytest.raises(DeadlineExceeded):
        rig.run(rig.a.attach("b:1", HELLO, 1000.0))
    rig.loop.run_until(rig.loop.now + 1000.0)
    assert closed == [5]


# -- memory --------------------------------------------------------------------------------


class Pair:
    """A's memory, and B's, which A has connected to."""

    def __init__(self, rig: Rig, nbytes: int = 10_000) -> None:
        self.rig = rig
        self.mine, self.theirs = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)
        self.local, self.remote = rig.a.space.add(self.mine), rig.b.space.add(self.theirs)
        self.agent, self.other = rig.a.agent(), rig.b.agent()
        self.other.register(self.theirs)
        self.to: SimRemote = rig.run(self.agent.connect("sim", self.other.describe(), 1000.0))
        self.pieces = Pieces(
            local=np.array([self.local], np.uint64),
            remote=np.array([self.remote], np.uint64),
            nbytes=np.array([nbytes], np.uint64),
        )


def run_in(agent: SimAgent, work: Any) -> Any:
    loop = agent.fabric.loop
    return loop.run_until_done(SimTask(agent.process, work), 60_000.0)


def test_bytes_arrive_in_steps(rig: Rig) -> None:
    pair = Pair(rig)
    task = rig.a.spawn(pair.to.write(pair.pieces, 1000.0))
    while not pair.theirs.any():
        rig.loop.step()
    assert not pair.theirs.all()
    rig.loop.run_until_done(task, 100.0)
    assert pair.theirs.all()


def test_a_read_brings_what_is_there(rig: Rig) -> None:
    pair = Pair(rig)
    pair.theirs[:] = 7
    rig.run(pair.to.read(pair.pieces, 1000.0))
    assert (pair.mine == 7).all()


def test_a_write_goes_on_after_its_deadline_until_it_is_closed(rig: Rig) -> None:
    pair = Pair(rig)
    with pytest.raises(DeadlineExceeded):
        rig.run(pair.to.write(pair.pieces, 0.5))
    before = int(pair.theirs.sum())
    rig.loop.run_until(rig.loop.now + 0.5)
    assert before < pair.theirs.sum() < 10_000
    rig.run(pair.to.close())
    after = int(pair.theirs.sum())
    rig.loop.run_until(rig.loop.now + 1000.0)
    assert pair.theirs.sum() == after


def test_a_paused_writer_writes_late(rig: Rig) -> None:
    pair = Pair(rig)
    rig.a.spawn(pair.to.write(pair.pieces, 1000.0))
    rig.loop.run_until(rig.loop.now + 0.5)
    rig.a.process.pause()
    rig.loop.run_until(rig.loop.now + 500.0)
    assert not pair.theirs.all()
    rig.a.process.resume()
    rig.loop.run_until(rig.loop.now + 500.0)
    assert pair.theirs.all()


def test_a_late_write_does_not_land_in_memory_that_was_revoked(rig: Rig) -> None:
    pair = Pair(rig)
    task = rig.a.spawn(pair.to.write(pair.pieces, 1000.0))
    rig.loop.run_until(rig.loop.now + 0.5)
    rig.a.process.pause()
    run_in(pair.other, pair.other.close())
    before = int(pair.theirs.sum())
    rig.a.process.resume()
    with pytest.raises(TransferFailed):
        rig.loop.run_until_done(task, 10_000.0)
    assert pair.theirs.sum() == before


@pytest.mark.parametrize("fault", ["death", "partition"])
def test_a_transfer_fails_where_the_other_side_is_out_of_reach(rig: Rig, fault: str) -> None:
    pair = Pair(rig)
    task = rig.a.spawn(pair.to.write(pair.pieces, 1e5))
    rig.loop.run_until(rig.loop.now + 0.5)
    if fault == "death":
        rig.b.process.kill()
    else:
        rig.network.block(["a"], ["b"])
    with pytest.raises(TransferFailed):
        rig.loop.run_until_done(task, 50_000.0)
    assert not pair.theirs.all()


def test_bits_flip_on_the_way(rig: Rig) -> None:
    pair = Pair(rig)
    rig.fabric.carriage = Carriage(flips=1.0)
    rig.run(pair.to.write(pair.pieces, 1000.0))
    assert (pair.theirs != 1).sum() == rig.fabric.flipped == 7


def test_memory_that_was_not_registered_is_a_bug(rig: Rig) -> None:
    pair = Pair(rig)
    other = np.zeros(10, np.uint8)
    remote = rig.b.space.add(other)
    pieces = Pieces(
        local=np.array([pair.local], np.uint64),
        remote=np.array([remote], np.uint64),
        nbytes=np.array([10], np.uint64),
    )
    rig.a.spawn(pair.to.write(pieces, 100.0))
    with pytest.raises(AssertionError, match="registered"):
        rig.loop.run_until(1e4)


# -- stores --------------------------------------------------------------------------------


def test_a_command_is_carried_out_though_its_caller_died(rig: Rig) -> None:
    host = SimStore(rig.loop, "a", instance=3, slots=64, rng=rig.rng)
    store = SimNodeStore(host, rig.a.process, rig.a.space, rig.rng)
    opened = rig.run(store.command(c.OpenNamespace(name="n", layout=LAYOUT.encode()), 1000.0))
    rig.a.spawn(store.command(c.Grant(namespace=opened.namespace, blocks=4), 1000.0))
    rig.loop.run_until(rig.loop.now)
    rig.a.process.kill()
    rig.loop.run_until(rig.loop.now + 0.2)
    assert host.store.stats().ahead_bytes > 0  # until its process is seen to be gone
    rig.loop.run_until(rig.loop.now + 100.0)
    assert host.store.stats().ahead_bytes == 0  # given back, as the process has gone


def test_a_store_that_dies_is_unavailable(rig: Rig) -> None:
    host = SimStore(rig.loop, "a", instance=3, slots=64, rng=rig.rng)
    store = SimNodeStore(host, rig.a.process, rig.a.space, rig.rng)
    task = rig.a.spawn(store.command(c.Stat(), 1000.0))
    host.process.kill()
    with pytest.raises(Unavailable):
        rig.loop.run_until_done(task, 100.0)


@pytest.mark.parametrize("power_cut", [False, True])
def test_a_disk_keeps_what_was_persisted(rig: Rig, power_cut: bool) -> None:
    disk: SimDisk | None = new_disk(1)
    host = SimStore(rig.loop, "a", instance=3, slots=64, rng=rig.rng, disk=disk)
    store = SimNodeStore(host, rig.a.process, rig.a.space, rig.rng)
    rig.loop.run_until(1000.0)
    opened = rig.run(store.command(c.OpenNamespace(name="n", layout=LAYOUT.encode()), 1000.0))
    space = opened.namespace
    granted = rig.run(store.command(c.Grant(namespace=space, blocks=1), 1000.0))
    host.view_of(LAYOUT, granted.granules[0])[1][:] = 7
    hashes = np.full((1, 32), 9, np.uint8)
    commit = c.Commit(
        namespace=space,
        put_id=b"p" * 16,
        hashes=hashes,
        granules=granted.granules,
        checksums=rig.run(store.sums(LAYOUT, granted.granules)),
    )
    rig.run(store.command(commit, 1000.0))
    persist = c.Persist(namespace=space, hashes=hashes, wait_ms=500)
    assert rig.run(store.command(persist, 1000.0)).durable.all()

    host.process.kill()
    disk = host.disk_after(power_cut=power_cut)
    again = SimStore(rig.loop, "a", instance=4, slots=64, rng=rig.rng, disk=disk)
    store = SimNodeStore(again, rig.a.process, rig.a.space, rig.rng)
    opened = rig.run(store.command(c.OpenNamespace(name="n", layout=LAYOUT.encode()), 1000.0))
    rig.loop.run_until(rig.loop.now + 1000.0)
    fetch = c.Fetch(namespace=opened.namespace, hashes=hashes, wait_ms=500)
    assert rig.run(store.command(fetch, 1000.0)).blocks == 1
    leased = rig.run(store.command(c.Lease(namespace=opened.namespace, hashes=hashes), 1000.0))
    assert (again.view_of(LAYOUT, leased.granules[0])[1] == 7).all()


# -- coordinator ---------------------------------------------------------------------------


class Etcd:
    def __init__(self, rig: Rig) -> None:
        self.process = Process(rig.loop, "etcd")
        self.server = Coordinator(rig.loop, self.process)
        self.a, self.b = (
            SimCoordination(self.server, rig.network, world.process, rig.rng)
            for world in (rig.a, rig.b)
        )


def member(name: str, run: int = 1) -> Member:
    return Member(name=name, address=f"{name}:1", run=run)


def test_a_registration_lives_as_long_as_its_process(rig: Rig) -> None:
    etcd = Etcd(rig)
    rig.run(etcd.a.register(member("a")))
    rig.loop.run_until(rig.loop.now + 10 * LEASE_MS)
    assert rig.run(etcd.a.registered()) == [member("a")]
    with pytest.raises(InvalidArgument):
        rig.run(etcd.b.register(member("a", run=2)))
    rig.a.process.kill()
    rig.loop.run_until(rig.loop.now + 2 * LEASE_MS)
    assert not etcd.server.leases


def test_a_registration_that_ran_out_comes_back(rig: Rig) -> None:
    etcd = Etcd(rig)
    rig.run(etcd.a.register(member("a")))
    rig.network.block(["a"], ["etcd"])
    rig.loop.run_until(rig.loop.now + 3 * LEASE_MS)
    assert not etcd.server.leases
    rig.network.heal()
    rig.loop.run_until(rig.loop.now + LEASE_MS)
    assert len(etcd.server.leases) == 1


def test_one_of_two_advances(rig: Rig) -> None:
    etcd = Etcd(rig)
    views = [View(epoch=1, replicas=1, members=(member(name),)) for name in "ab"]
    tasks = [
        world.spawn(who.advance(view))
        for world, who, view in zip((rig.a, rig.b), (etcd.a, etcd.b), views, strict=True)
    ]
    assert sorted(rig.loop.run_until_done(task, 1000.0) for task in tasks) == [False, True]
    assert rig.run(etcd.a.view()) in views


def test_a_change_is_told_and_time_ends_the_wait(rig: Rig) -> None:
    etcd = Etcd(rig)
    began = rig.loop.now
    rig.run(etcd.a.changed(2.0))
    assert rig.loop.now == began + 2000.0
    task = rig.a.spawn(etcd.a.changed(60.0))
    rig.loop.run_until(rig.loop.now + 10.0)
    rig.b.spawn(etcd.b.register(member("b")))
    rig.loop.run_until_done(task, 100.0)


def test_etcd_out_of_reach_is_an_error_in_time(rig: Rig) -> None:
    etcd = Etcd(rig)
    rig.network.block(["a"], ["etcd"])
    with pytest.raises((DeadlineExceeded, Unavailable)):
        rig.run(etcd.a.view())


def test_equal_seeds_are_equal_runs() -> None:
    def digest(seed: int) -> int:
        rig = Rig(seed)
        rig.network.weather = Weather(loss=0.2, twice=0.2, clog=0.1)
        rig.serve(pong)

        async def work() -> None:
            for number in range(50):
                answer = await rig.a.call("b:1", Ping(epoch=number), 1e6)
                rig.loop.say(str(answer))

        future: Future[None] = Future()
        rig.a.spawn(work())
        rig.loop.after(1e4, lambda: future.set(None))
        rig.loop.run_until(1e4)
        return rig.loop.digest

    assert digest(5) == digest(5)
    assert digest(5) != digest(6)
