"""Nodes and clients that transfer by whatever both have, or by what they are told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from cluster.nodes import LAYOUT, blocks, chain, nodes

from kvstore import Hit
from kvstore.transfer import apart
from kvstore.transfer.choose import Availability, available
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


@pytest.mark.parametrize("kind", ["nixl", "ucxx"])
def test_clients_one_after_another_put_with_copies_and_get(tmp_path: Path, kind: str) -> None:
    if kind not in {each.kind for each in available() if each.usable}:
        pytest.skip(f"{kind} cannot be used here")
    sizes = {"arena_bytes": 4 << 20, "ring_bytes": 8 << 20}
    with nodes(tmp_path, 2, "--transfer", kind) as running:
        for turn in range(3):
            with running.client(transfer=kind, **sizes) as session:
                space = session.open_namespace("told", LAYOUT)
                for seed in range(2 * turn, 2 * turn + 2):  # both nodes take puts first
                    done = session.put(space, chain(4, seed), list(blocks(4, seed)), position=0)
                    assert (done.stored, done.replicated) == (4, 4)
                for seed in range(2 * turn + 2):
                    room = np.zeros_like(blocks(4, seed))
                    got = session.get_into(space, chain(4, seed), list(room))
                    assert all(isinstance(each, Hit) for each in got)
                    np.testing.assert_array_equal(room, blocks(4, seed))
