"""Nodes and clients that transfer by whatever both have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cluster.nodes import LAYOUT, blocks, chain, nodes

from kvstore import Hit
from kvstore.transfer import apart
from kvstore.transfer.choose import Availability
from kvstore.transfer.either import EitherAgent


@pytest.mark.parametrize("only", ["", "shm", "grpc"])
def test_a_client_moves_blocks_by_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: str
) -> None:
    with nodes(tmp_path, 1, "--transfer", "auto", replicas=1) as running:
        if only:
            monkeypatch.setattr(apart, "available", lambda: [Availability(only, True, "")])
        sizes = {"arena_bytes": 4 << 20, "ring_bytes": 8 << 20}
        with running.client(transfer="auto", **sizes) as session:
            agent = session._ring._life.agent
            assert isinstance(agent, EitherAgent)
            assert not only or [each.kind for each in agent.agents] == [only]
            space, data = session.open_namespace("auto", LAYOUT), blocks(4, 1)
            assert session.put(space, chain(4, 1), list(data), position=0).stored == 4
            room = np.zeros_like(data)
            got = session.get_into(space, chain(4, 1), list(room))
            assert all(isinstance(each, Hit) for each in got)
            assert np.array_equal(room, data)
