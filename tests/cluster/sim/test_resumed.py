"""A run is judged by what hosts can do once they go on: not while one of them is about to end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from cluster.sim.cluster import Host
from cluster.sim.simulation import PEACE_MS, Simulation

_NAME = (1, 0, 0)  # space, chain, position
_STEP_MS = 0.01
_ANSWER_MS = 1.0


@pytest.fixture
def simulation() -> Iterator[Simulation]:
    made = Simulation(1, "halting")
    made._settle("at first")
    yield made
    made.close()


def _put(simulation: Simulation) -> Host:
    """Puts one block for one copy; the host that has it."""
    client = simulation._new_client()
    put = client.put(*_NAME, 1, copies=1)
    assert simulation.loop.run_until_done(client.world.spawn(put), 10_000.0) == 1
    return next(host for host in simulation._stores() if simulation.kept(host))


def _pause_in_the_middle_of_a_command(
    simulation: Simulation, host: Host, *, answered: bool = False
) -> None:
    """The store of a host stops, or goes on where the node is to be answered, and the node, which
    waits for an answer, stops beyond the time that this may take; it stays registered."""
    if not answered:
        host.store.process.pause()
    while not host.node.site.store._main._waiting:  # type: ignore[attr-defined]
        simulation.loop.run_until(simulation.loop.now + _STEP_MS)
    host.world.process.pause()
    simulation.loop.run_until(simulation.loop.now + host.node.site.policy.call_ms + _STEP_MS)


def test_what_a_node_has_that_ends_as_it_goes_on_is_read_once_it_is_back(
    simulation: Simulation,
) -> None:
    simulation.nemesis.trouble.kinds = {}
    simulation.nemesis.start()
    host = _put(simulation)
    before = host.world.process
    _pause_in_the_middle_of_a_command(simulation, host)
    assert not simulation._what_is_absent()  # as far as anybody can tell yet
    assert simulation._within_reach() == {_NAME}
    simulation._end_trouble("afterwards")
    assert not before.alive
    assert host.alive
    simulation._settle("afterwards")


def test_a_host_whose_node_is_about_to_end_does_not_serve(simulation: Simulation) -> None:
    host = next(iter(simulation.cluster.hosts.values()))
    _pause_in_the_middle_of_a_command(simulation, host)
    host.resume()
    simulation.loop.run_until(simulation.loop.now)
    assert host.alive
    assert "lost its store" in simulation._what_is_absent()
    simulation._wait("once it is back", simulation._what_is_absent)
    assert host.alive
    assert not host.lost_store


@pytest.mark.parametrize("in_time", [True, False])
def test_a_node_whose_store_answered_while_it_stood_still_lives(
    simulation: Simulation, in_time: bool
) -> None:
    """In time, or at least before the node goes on."""
    host = next(iter(simulation.cluster.hosts.values()))
    process = host.world.process
    _pause_in_the_middle_of_a_command(simulation, host, answered=in_time)
    if not in_time:
        host.store.process.resume()
        simulation.loop.run_until(simulation.loop.now + _ANSWER_MS)
    host.resume()
    simulation.loop.run_until(simulation.loop.now + PEACE_MS)
    assert process.alive
