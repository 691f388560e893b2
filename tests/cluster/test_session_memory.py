"""A client's registered memory: what is put from it and seen in it is not copied here."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from cluster.nodes import LAYOUT, blocks, chain, nodes

from kvstore import Hit, NamespaceHandle
from kvstore.errors import InvalidArgument, ResourceExhausted, Unavailable
from kvstore_client.cluster import landing
from kvstore_client.cluster.memory import RingView
from kvstore_client.cluster.session import ClusterSession

SIZE = LAYOUT.block_bytes
RING_BLOCKS, ARENA_BLOCKS = 32, 8


@pytest.fixture(scope="module", params=["grpc", "nixl"])
def session(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ClusterSession]:
    """A client of one node, with little memory."""
    folder = tmp_path_factory.mktemp("memory")
    with (
        nodes(folder, 1, "--dram", "32MiB", "--transfer", request.param, replicas=1) as running,
        running.client(
            transfer=request.param, arena_bytes=ARENA_BLOCKS * SIZE, ring_bytes=RING_BLOCKS * SIZE
        ) as made,
    ):
        yield made


@pytest.fixture
def space(session: ClusterSession, request: pytest.FixtureRequest) -> NamespaceHandle:
    """Of one test."""
    return session.open_namespace(request.node.name, LAYOUT)


def free_bytes(session: ClusterSession) -> int:
    return session._ring._life.extents.free_bytes


def address_of(block: np.ndarray[Any, Any]) -> int:
    return int(block.__array_interface__["data"][0])


def in_ring(session: ClusterSession, block: np.ndarray[Any, Any]) -> bool:
    return session._ring.registered(np.array([address_of(block)], np.uint64), block.nbytes)


def put(session: ClusterSession, space: NamespaceHandle, n: int, seed: int) -> np.ndarray[Any, Any]:
    data = blocks(n, seed)
    assert session.put(space, chain(n, seed), list(data), position=0).stored == n
    return data


def test_a_view_shows_blocks_where_they_landed_until_it_is_released(
    session: ClusterSession, space: NamespaceHandle
) -> None:
    data, before = put(session, space, 8, 1), free_bytes(session)
    view = session.view(space, chain(8, 1))
    assert all(in_ring(session, block) for block in view.blocks)
    assert np.array_equal(np.array(view.blocks), data)
    with pytest.raises(ValueError, match="read-only"):
        view.blocks[0][0] = 1
    # Whatever is got meanwhile lands elsewhere.
    other = put(session, space, 8, 2)
    room = np.zeros_like(other)
    assert all(isinstance(each, Hit) for each in session.get_into(space, chain(8, 2), list(room)))
    assert np.array_equal(np.array(view.blocks), data)
    assert free_bytes(session) < before
    view.release()
    view.release()
    assert view.blocks == []
    assert free_bytes(session) == before


def test_views_hold_half_of_the_ring_at_most_and_others_are_copies(
    session: ClusterSession, space: NamespaceHandle
) -> None:
    data, before = put(session, space, 8, 3), free_bytes(session)
    views = [session.view(space, chain(8, 3)) for _ in range(4)]
    landed = [sum(in_ring(session, block) for block in view.blocks) for view in views]
    assert landed == [8, 8, 0, 0]
    assert all(np.array_equal(np.array(view.blocks), data) for view in views)
    room = np.zeros_like(data)
    assert all(isinstance(each, Hit) for each in session.get_into(space, chain(8, 3), list(room)))
    for view in views:
        view.release()
    assert free_bytes(session) == before


def test_a_view_of_what_is_not_there_holds_nothing(
    session: ClusterSession, space: NamespaceHandle
) -> None:
    put(session, space, 4, 4)
    before = free_bytes(session)
    with session.view(space, np.concatenate((chain(4, 4), chain(4, 5)))) as view:
        assert len(view.blocks) == 4
    with session.view(space, chain(4, 5)) as view:
        assert view.blocks == []
    assert free_bytes(session) == before
    assert session._ring._held_bytes == 0


def test_a_put_of_buffers_is_read_where_they_lie(
    session: ClusterSession, space: NamespaceHandle
) -> None:
    session._ring.arena[:] = 0
    data = blocks(12, 6)  # more than the arena holds
    with session.buffers(12, SIZE) as buffers:
        assert isinstance(buffers, RingView)
        for buffer, row in zip(buffers.blocks, data, strict=True):
            buffer[:] = row
        assert session.put(space, chain(12, 6), buffers.blocks, position=0).stored == 12
    assert not session._ring.arena.any()
    with session.view(space, chain(12, 6)) as view:
        assert np.array_equal(np.array(view.blocks), data)


def test_a_buffer_that_changes_in_mid_put_is_not_stored(
    session: ClusterSession, space: NamespaceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = session.router.put
    with session.buffers(3, SIZE) as buffers:
        for buffer, row in zip(buffers.blocks, blocks(3, 7), strict=True):
            buffer[:] = row

        def put_later(*arguments: Any) -> Any:
            buffers.blocks[1][100] ^= 1
            return real(*arguments)

        monkeypatch.setattr(session.router, "put", put_later)
        result = session.put(space, chain(3, 7), buffers.blocks, position=0)
    assert (result.stored, result.not_stored) == (2, 1)
    assert session.match(space, chain(3, 7)).count == 1


def test_buffers_beyond_half_of_the_ring_are_refused(session: ClusterSession) -> None:
    before = free_bytes(session)
    with session.buffers(10, SIZE), pytest.raises(ResourceExhausted, match="ring_bytes"):
        session.buffers(10, SIZE)
    with pytest.raises(InvalidArgument, match="one array"):
        session.buffers(0, SIZE)
    assert free_bytes(session) == before
    assert session._ring._held_bytes == 0


def test_a_put_of_more_than_the_arena_goes_in_pieces(
    session: ClusterSession, space: NamespaceHandle
) -> None:
    data = put(session, space, 5 * ARENA_BLOCKS + 3, 8)
    room = np.zeros_like(data)
    got = session.get_into(space, chain(len(data), 8), list(room))
    assert all(isinstance(each, Hit) for each in got)
    assert np.array_equal(room, data)


def test_buffers_and_views_of_an_earlier_ring_stay_good(
    session: ClusterSession, space: NamespaceHandle
) -> None:
    data = put(session, space, 4, 9)
    generation = session._ring.generation
    with session.view(space, chain(4, 9)) as view, session.buffers(4, SIZE) as buffers:
        while session._ring.generation == generation:  # as after transfers without an end
            lost = session._ring.take(4, SIZE)
            assert lost is not None
            session._ring.lose(lost)
        for buffer, row in zip(buffers.blocks, blocks(4, 10), strict=True):
            buffer[:] = row
        assert session.put(space, chain(4, 10), buffers.blocks, position=0).stored == 4
        assert np.array_equal(np.array(view.blocks), data)
        assert session._ring._old
    with session.view(space, chain(4, 10)) as view:
        assert np.array_equal(np.array(view.blocks), blocks(4, 10))
    assert not session._ring._old


def test_a_view_does_not_wait_for_the_answer_once_all_has_landed(
    session: ClusterSession, space: NamespaceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, before = put(session, space, 8, 11), free_bytes(session)
    monkeypatch.setattr(landing, "WORTH_WATCHING", 0)
    answered, real, gets = threading.Event(), session.router.read, list[Future[Any]]()

    async def read_later(*arguments: Any, **options: Any) -> Any:
        answer = await real(*arguments, **options)
        await asyncio.to_thread(answered.wait, 20.0)
        return answer

    begin = session._thread.begin

    def kept(work: Any) -> Any:
        gets.append(begin(work))
        return gets[-1]

    monkeypatch.setattr(session.router, "read", read_later)
    monkeypatch.setattr(session._thread, "begin", kept)
    view, other = (session.view(space, chain(8, 11)) for _ in range(2))
    assert not any(get.done() for get in gets)
    assert all(np.array_equal(np.array(each.blocks), data) for each in (view, other))
    other.release()  # the node may still have that part of the ring
    assert free_bytes(session) < before
    answered.set()
    for get in gets:
        assert get.result(20.0).all()
    assert np.array_equal(np.array(view.blocks), data)
    view.release()
    assert free_bytes(session) == before
    assert session._ring._held_bytes == 0


def test_a_part_of_a_view_whose_node_failed_is_never_used_again(
    session: ClusterSession, space: NamespaceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(session, space, 2, 12)
    monkeypatch.setattr(landing, "WORTH_WATCHING", 0)
    shown, real, gets = threading.Event(), session.router.read, list[Future[Any]]()

    async def fail_later(*arguments: Any, **options: Any) -> Any:
        await real(*arguments, **options)
        await asyncio.to_thread(shown.wait, 20.0)
        raise Unavailable("nobody knows what it does now")

    begin = session._thread.begin

    def kept(work: Any) -> Any:
        gets.append(begin(work))
        return gets[-1]

    monkeypatch.setattr(session.router, "read", fail_later)
    monkeypatch.setattr(session._thread, "begin", kept)
    before, lost = free_bytes(session), session._ring._life.lost_bytes
    view = session.view(space, chain(2, 12))
    shown.set()
    assert not gets[0].result(20.0).any()
    assert np.array_equal(np.array(view.blocks), data)
    view.release()
    assert free_bytes(session) < before
    assert session._ring._life.lost_bytes > lost


def test_where_a_network_card_may_write_once_more_a_view_waits_for_the_answer(
    session: ClusterSession, space: NamespaceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = put(session, space, 2, 13)
    monkeypatch.setattr(landing, "WORTH_WATCHING", 0)
    monkeypatch.setattr(session._getter, "_early", False)
    watched: list[Any] = []
    monkeypatch.setattr(landing.Landings, "follow", lambda *_: watched.append(1))
    with session.view(space, chain(2, 13)) as view:
        assert np.array_equal(np.array(view.blocks), data)
    assert not watched


def test_a_view_that_was_broken_off_is_got_no_further(
    session: ClusterSession, space: NamespaceHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(session, space, 2, 14)
    monkeypatch.setattr(landing, "WORTH_WATCHING", 0)
    real, gets, go_on = session._thread.begin, list[Future[Any]](), asyncio.Event()

    async def never(*_arguments: Any, **_options: Any) -> Any:
        await go_on.wait()

    def kept(work: Any) -> Any:
        gets.append(real(work))
        return gets[-1]

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(session.router, "read", never)
    monkeypatch.setattr(session._thread, "begin", kept)
    monkeypatch.setattr(landing.Landings, "follow", interrupted)
    with pytest.raises(KeyboardInterrupt):
        session.view(space, chain(2, 14))
    assert gets[0].cancelled()
    assert session._ring._held_bytes == 0
