"""Each round has load: who lives through one goes on in the next."""

from __future__ import annotations

from cluster.sim.simulation import Simulation


def test_clients_that_live_through_a_round_work_in_the_next() -> None:
    simulation = Simulation(1, "halting")
    simulation.nemesis.trouble.kinds = {}
    simulation._settle("at first")
    try:
        simulation._trouble()
        clients, puts = list(simulation.clients), len(simulation.truth.written)
        simulation._settle("in between")
        simulation._trouble()
        assert clients
        assert simulation.clients == clients
        assert len(simulation.truth.written) > puts
    finally:
        simulation.close()
