"""Calls that are broken off, and what they held."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from faults.test_connections import BLOCK_BYTES, LAYOUT, WAIT_S, connected, until
from faults.workers import content, hashes

from daemon import Daemon, daemon
from kvstore import Hit, limits
from kvstore.errors import DeadlineExceeded, KVStoreError
from kvstore.session.channel import ChannelSession
from kvstore.session.control import Deadline


@pytest.fixture(scope="module")
def direct(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with daemon(tmp_path_factory.mktemp("direct"), "--dram", "4MiB") as running:
        yield running


def test_slots_of_a_commit_whose_answer_came_too_late_are_not_written_again(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    n = 1
    first = [content(key, 1, BLOCK_BYTES) for key in range(n)]
    others = [content(100 + key, 2, BLOCK_BYTES) for key in range(n)]
    with ChannelSession(str(direct.socket)) as watching, connected(direct) as session:
        namespace = session.open_namespace("late answer", LAYOUT)
        seen = watching.open_namespace("late answer", LAYOUT)
        for seed in range(3):  # so that there are slots, and small puts make no call
            assert session.put(namespace, hashes(n, seed=seed), first).stored == n
        port = session._link._port
        session._link.take_answers(WAIT_S)

        def late(*_: Any) -> None:
            """The answer is there, but this side has given up."""
            until(lambda: watching.match(seen, chain).count == n)
            raise TimeoutError

        chain = hashes(n, seed=77)
        with monkeypatch.context() as patch:
            patch.setattr(port, "_receive", late)
            with pytest.raises(DeadlineExceeded):  # a time to live takes a call
                session.put(namespace, chain, first, ttl_s=3600.0)
        found = [np.zeros(BLOCK_BYTES, np.uint8) for _ in range(n)]
        assert all(isinstance(hit, Hit) for hit in watching.get_into(seen, chain, found))
        np.testing.assert_array_equal(found, first)
        # The thread that watches has not closed the session yet.
        with contextlib.suppress(KVStoreError):
            session.put(namespace, hashes(n, seed=78), others)
        if all(isinstance(hit, Hit) for hit in watching.get_into(seen, chain, found)):
            np.testing.assert_array_equal(found, first)


def test_a_view_that_is_released_while_the_connection_is_busy_lets_go(direct: Daemon) -> None:
    with connected(direct) as session:
        namespace = session.open_namespace("busy", LAYOUT)
        chain = hashes(1, seed=5)
        assert session.put(namespace, chain, [content(5, 1, BLOCK_BYTES)]).stored == 1
        view = session.view(namespace, chain)
        assert session.stats().leased_blocks == 1
        session._timeout_s = 0.05
        with session._link._port._lock:  # as another thread's call that waits for a disk has it
            view.release()
        session._timeout_s = WAIT_S
        until(lambda: session.stats().leased_blocks == 0)


def test_slots_that_could_not_be_given_back_are_not_lost(
    direct: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with connected(direct) as session:
        writer = session._writer
        namespace = session.open_namespace("given back", LAYOUT)
        assert session.put(namespace, hashes(1, seed=6), [content(6, 1, BLOCK_BYTES)]).stored == 1
        session._link.take_answers(WAIT_S)
        before = session.stats().ahead_bytes
        held = len(writer.stock)
        assert held
        for _ in range(20):
            writer.stock.take(1000, 1)  # puts of another size
        with pytest.raises(DeadlineExceeded):
            writer._give_unused_back(Deadline(1e-9))  # nothing was sent
        assert not session._link.closed
        assert session.stats().ahead_bytes == before
        assert len(writer.stock) == held


def test_a_block_of_another_namespace_is_not_served_where_loads_are_reordered(
    direct: Daemon,
) -> None:
    """As on a processor that shows a reader a slot's old generation beside its new bytes: only
    what the slot says can tell then."""
    with ChannelSession(str(direct.socket), verify_reads=True) as session:
        link = session._connection._link  # type: ignore[union-attr]
        mine, theirs = (session.open_namespace(name, LAYOUT) for name in ("mine", "theirs"))
        key, other = hashes(1, seed=8), content(9, 1, BLOCK_BYTES)
        assert session.put(mine, key, [content(8, 1, BLOCK_BYTES)]).stored == 1
        assert session.put(theirs, key, [other]).stored == 1
        memory = link.memory(WAIT_S)
        a = int(memory.index.match(mine.id, key).granules[0])
        b = int(memory.index.match(theirs.id, key).granules[0])
        pool, at, from_ = memory.pool, a * limits.GRANULE_BYTES, b * limits.GRANULE_BYTES
        slot_bytes = limits.GRANULE_BYTES
        pool[at : at + slot_bytes] = pool[from_ : from_ + slot_bytes]
        target = [np.zeros(BLOCK_BYTES, np.uint8)]
        got = session.get_into(mine, key, target)
        assert not isinstance(got[0], Hit), (target[0] == other).all()
