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


@pytest.mark.parametrize("has_nixl", [True, False], ids=["as the node", "without NIXL"])
def test_a_client_moves_blocks_by_what_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_nixl: bool
) -> None:
    with nodes(tmp_path, 1, "--transfer", "auto", replicas=1) as running:
        if not has_nixl:
            only = [Availability("grpc", True, "")]
            monkeypatch.setattr(apart, "available", lambda: only)
        sizes = {"arena_bytes": 4 << 20, "ring_bytes": 8 << 20}
        with running.client(transfer="auto", **sizes) as session:
            agent = session._ring._life.agent
            assert isinstance(agent, EitherAgent)
            assert (len(agent.agents) == 1) or has_nixl
            space, data = session.open_namespace("auto", LAYOUT), blocks(4, 1)
            assert session.put(space, chain(4, 1), list(data), position=0).stored == 4
            room = np.zeros_like(data)
            got = session.get_into(space, chain(4, 1), list(room))
            assert all(isinstance(each, Hit) for each in got)
            assert np.array_equal(room, data)
