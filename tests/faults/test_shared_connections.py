"""Puts of cells that share a connection take no slot from each other."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults.test_connections import WAIT_S, connected
from faults.workers import hashes
from store_rig import LAYOUT

from daemon import Daemon, daemon
from kvstore import Hit
from kvstore import commands as c
from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore.session import link as link_module
from kvstore.session.channel import ChannelSession
from kvstore.session.link import copy_all_in

X = b"x" * 16
NBYTES = LAYOUT.block_bytes


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Daemon]:
    with daemon(tmp_path, "--dram", "4MiB") as running:
        yield running


def cell_bytes(cells: tuple[int, ...]) -> int:
    bounds = LAYOUT.cell_bounds
    return sum(int(bounds[i + 1] - bounds[i]) for i in cells)


def others_blocks(other: ChannelSession, name: str, seed: int) -> tuple[Any, Any, Any]:
    """Blocks that take whatever slot was given up last."""
    namespace = other.open_namespace(name, LAYOUT)
    chain = hashes(40, seed=seed)
    blocks = [np.full(NBYTES, 7, np.uint8) for _ in range(40)]
    for i in range(40):
        assert other.put(namespace, chain[i : i + 1], blocks[:1], ttl_s=3600.0).stored == 1
    return namespace, chain, blocks


def check_others(other: ChannelSession, namespace: Any, chain: Any, blocks: Any) -> None:
    for i in range(len(chain)):
        target = [np.zeros(NBYTES, np.uint8)]
        if isinstance(other.get_into(namespace, chain[i : i + 1], target)[0], Hit):
            np.testing.assert_array_equal(target[0], blocks[i])


def test_an_abort_that_is_on_its_way_takes_nothing_from_the_next_try(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ChannelSession(str(direct.socket)) as other, connected(direct) as session:
        namespace = session.open_namespace("retry", LAYOUT)
        cells = (0,)
        source = [np.full(cell_bytes(cells), 1, np.uint8)]
        popped, go, gone = threading.Event(), threading.Event(), threading.Event()
        real = session._call

        def call(command: Any, *rest: Any) -> Any:
            if isinstance(command, c.Abort) and not popped.is_set():
                popped.set()
                go.wait(WAIT_S)
                try:
                    return real(command, *rest)
                finally:
                    gone.set()
            return real(command, *rest)

        monkeypatch.setattr(session, "_call", call)

        def late(*_: Any, **__: Any) -> Any:
            raise DeadlineExceeded("not copied in time")

        monkeypatch.setattr(link_module, "copy_all_in", late)
        with pytest.raises(DeadlineExceeded):
            session.put(namespace, hashes(1), source, put_id=X, cells=cells)
        assert popped.wait(WAIT_S)  # the watching thread is about to send it
        theirs: list[Any] = []

        def slow(*a: Any, **rest: Any) -> Any:
            go.set()
            gone.wait(WAIT_S)
            theirs.extend(others_blocks(other, "others of a retry", 10))
            return copy_all_in(*a, **rest)

        monkeypatch.setattr(link_module, "copy_all_in", slow)
        with contextlib.suppress(KVStoreError):
            session.put(namespace, hashes(1), source, put_id=X, cells=cells)
        go.set()
        if theirs:  # else it was refused, and wrote nothing
            check_others(other, *theirs)


def test_ranks_that_share_a_connection_take_no_slot_from_each_other(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert LAYOUT.n_cells >= 2
    with ChannelSession(str(direct.socket)) as other, connected(direct) as session:
        namespace = session.open_namespace("ranks", LAYOUT)
        theirs: list[Any] = []

        def slow(*a: Any, **rest: Any) -> Any:
            """While this rank copies, another one fails."""
            monkeypatch.setattr(link_module, "copy_all_in", copy_all_in)
            with contextlib.suppress(KVStoreError):
                source = [np.full(cell_bytes((0,)), 1, np.uint8)]
                session.put(namespace, hashes(1, seed=1), source, put_id=X, cells=(0,))
            session.stats()  # what it gives back has gone
            theirs.extend(others_blocks(other, "others of ranks", 11))
            return copy_all_in(*a, **rest)

        monkeypatch.setattr(link_module, "copy_all_in", slow)
        source = [np.full(cell_bytes((1,)), 2, np.uint8)]
        with contextlib.suppress(KVStoreError):
            session.put(namespace, hashes(1, seed=1), source, put_id=X, cells=(1,))
        if theirs:
            check_others(other, *theirs)
