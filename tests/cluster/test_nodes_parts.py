"""Real nodes, and ranks that put their cells of the same blocks, each by a client of its own."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from cluster.nodes import Nodes, blocks, chain, eventually, nodes

from kvstore import Attention, Hit, Layout, PutResult, limits
from kvstore.block import cell_checksums
from kvstore.cluster import messages as m
from kvstore.cluster.members import Member
from kvstore.cluster.placement import Ranking, place_of
from kvstore.cluster.puts import Puts
from kvstore.commands import ExplainStatus
from kvstore.errors import LayoutMismatch
from kvstore.session.parts import part_of
from kvstore_client.cluster.session import ClusterSession

# Eight cells: four of heads, each in two of layers, head by head.
LAYOUT = Layout(
    model="parts",
    attention=Attention.GQA,
    layers=4,
    layers_per_cell=2,
    kv_heads=4,
    head_dim=64,
    dtype="float16",
    block_tokens=16,
)
# Two ranks of heads, the second one of which is two of layers: their cells are not neighbours.
RANKS = (
    LAYOUT.cells_of(heads=range(2)),
    LAYOUT.cells_of(heads=range(2, 4), layers=range(2)),
    LAYOUT.cells_of(heads=range(2, 4), layers=range(2, 4)),
)
SMALL: dict[str, Any] = {"transfer": "grpc", "arena_bytes": 4 << 20, "ring_bytes": 4 << 20}
N = 40  # blocks, of two segments
PUT_S = 10.0
DEAD_S = 20.0

Blocks = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """Three nodes of a static list, two copies."""
    with nodes(tmp_path_factory.mktemp("parts"), 3, "--transfer", "grpc") as running:
        yield running


@pytest.fixture(scope="module")
def sessions(three: Nodes) -> Iterator[list[ClusterSession]]:
    """A client for each rank."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(three.client(timeout_s=PUT_S, **SMALL)) for _ in RANKS]


class Rank:
    """One rank, in one namespace."""

    def __init__(self, session: ClusterSession, space: str, cells: tuple[int, ...]) -> None:
        self.session, self.cells = session, cells
        self.space = session.open_namespace(space, LAYOUT)

    def put(self, keys: Blocks, data: Blocks, put_id: bytes, **more: Any) -> PutResult:
        """Puts its cells of blocks, whole ones of which are given."""
        sources = [cut(block, self.cells) for block in data]
        wanted = {"position": 0, "cells": self.cells, **more}
        return self.session.put(self.space, keys, sources, put_id=put_id, **wanted)

    def got(self, keys: Blocks, cells: tuple[int, ...] = ()) -> Blocks:
        """Blocks, or cells of them, all of which are hits."""
        nbytes = len(cut(np.zeros(LAYOUT.block_bytes, np.uint8), cells or range(8)))
        found = np.zeros((len(keys), nbytes), np.uint8)
        got = self.session.get_into(self.space, keys, list(found), cells=cells)
        assert all(isinstance(each, Hit) for each in got), got
        return found

    def count(self, keys: Blocks) -> int:
        return self.session.match(self.space, keys).count

    def statuses(self, keys: Blocks) -> set[ExplainStatus]:
        return {report.status for report in self.session.explain(self.space, keys)}


def cut(block: Blocks, cells: Any) -> Blocks:
    bounds = LAYOUT.cell_bounds
    return np.concatenate([block[bounds[cell] : bounds[cell + 1]] for cell in cells])


def parts_of(data: Blocks, cells: tuple[int, ...]) -> Blocks:
    return np.array([cut(block, cells) for block in data])


def ranks_in(sessions: list[ClusterSession], space: str) -> list[Rank]:
    made = [Rank(s, space, cells) for s, cells in zip(sessions, RANKS, strict=True)]
    assert sorted(cell for rank in made for cell in rank.cells) == list(range(LAYOUT.n_cells))
    return made


def pending(running: Nodes) -> dict[str, int]:
    """How many blocks wait for cells, at each node where some do."""
    alive = [name for name, d in running.daemons.items() if d.process.poll() is None]
    counts = {name: running.local(name).stats().pending_blocks for name in alive}
    return {name: n for name, n in counts.items() if n}


def ranked(session: ClusterSession, keys: Blocks) -> list[Member]:
    """Where blocks of the segment that begins with the first go, the best first."""
    view = session.router.view
    assert view
    place = np.array([place_of(keys[0].tobytes())], np.uint64)
    return [view.members[n] for n in Ranking(view).targets(place)[0].tolist()]


def refusals(session: ClusterSession, name: str) -> int:
    status = session.status()[name]
    assert status
    return dict(zip(status.names.split("\n"), status.values.tolist(), strict=True))["refused_epoch"]


def test_blocks_are_shown_with_the_last_rank_s_cells_and_then_at_two_nodes(
    three: Nodes, sessions: list[ClusterSession]
) -> None:
    ranks = ranks_in(sessions, "in-turn")
    keys, data = chain(N, 1), blocks(N, 1, LAYOUT)
    for rank in ranks[:-1]:
        done = rank.put(keys, data, b"p" * 16)
        assert done == PutResult(stored=0, existed=0, waiting=N, not_stored=0)
        assert rank.count(keys) == 0
        assert rank.statuses(keys) == {ExplainStatus.NOT_SEALED}
        assert sum(pending(three).values()) == N  # each at one node alone
    last = ranks[-1].put(keys, data, b"p" * 16)
    assert last == PutResult(stored=N, existed=0, waiting=0, not_stored=0, replicated=N)
    assert not pending(three)
    holders = three.holders("in-turn", keys, LAYOUT).values()
    assert (sum(here.astype(int) for here in holders) == 2).all()
    for rank in ranks:
        np.testing.assert_array_equal(rank.got(keys), data)
        np.testing.assert_array_equal(rank.got(keys, rank.cells), parts_of(data, rank.cells))
    again = ranks[0].put(keys, data, b"q" * 16)
    assert (again.existed, again.replicated) == (N, N)


def test_ranks_may_put_at_the_same_time(three: Nodes, sessions: list[ClusterSession]) -> None:
    ranks = ranks_in(sessions, "at-once")
    with ThreadPoolExecutor(len(ranks)) as threads:
        for seed in range(10, 16):
            keys, data = chain(N, seed), blocks(N, seed, LAYOUT)
            put_id, begin = bytes([seed]) * 16, threading.Barrier(len(ranks))

            def put(rank: Rank, begin=begin, keys=keys, data=data, put_id=put_id) -> PutResult:
                begin.wait(PUT_S)
                return rank.put(keys, data, put_id)

            done = list(threads.map(put, ranks))
            total = sum(done[1:], done[0])
            # Of each block exactly one rank brings the last cells, and learns of the copies.
            assert (total.stored, total.replicated, total.not_stored) == (N, N, 0)
            assert total.waiting == (len(ranks) - 1) * N
            np.testing.assert_array_equal(ranks[0].got(keys), data)
    assert not pending(three)


def test_cells_of_two_puts_never_make_one_block(
    three: Nodes, sessions: list[ClusterSession]
) -> None:
    ranks = ranks_in(sessions, "mixed")
    keys, mine, theirs = chain(2, 2), blocks(2, 2, LAYOUT), blocks(2, 3, LAYOUT)
    assert ranks[0].put(keys, mine, b"a" * 16).waiting == 2
    assert ranks[1].put(keys, theirs, b"b" * 16).not_stored == 2
    whole = ranks[2].session.put(ranks[2].space, keys, list(theirs), position=0)
    assert whole.stored == 0
    assert [rank.put(keys, mine, b"a" * 16).stored for rank in ranks[1:]] == [0, 2]
    np.testing.assert_array_equal(ranks[0].got(keys), mine)


@pytest.mark.parametrize("how", ["damaged", "unreachable"])
def test_a_part_that_does_not_arrive_well_ends_the_put_for_all_ranks(
    three: Nodes, sessions: list[ClusterSession], how: str
) -> None:
    ranks = ranks_in(sessions, how)
    keys, data = chain(4, 4), blocks(4, 4, LAYOUT)
    assert ranks[0].put(keys, data, b"d" * 16).waiting == 4
    session, cells = ranks[1].session, np.array(ranks[1].cells, np.uint32)
    arena = int(session._ring.arena.__array_interface__["data"][0])
    at = arena if how == "damaged" else 4096
    puts = Puts(
        hashes=keys,
        addresses=np.full(4, at, np.uint64),
        checksums=np.zeros((4, len(cells)), np.uint64),
        places=np.full(4, place_of(keys[0].tobytes()), np.uint64),
        parent=b"",
        position=0,
        ttl_ms=0,
        copies=1,
        persist=False,
        cells=cells,
        agreed=b"d" * 16,
    )
    space = session._space(ranks[1].space, session._deadline(PUT_S))
    outcome = session._run(session.router.put(space, puts, 3000.0), PUT_S)
    assert (outcome.status == m.PutStatus.FAILED).all()
    eventually(lambda: not pending(three), 5.0, "nothing waits for cells")
    for rank in ranks[1:]:
        assert rank.put(keys, data, b"d" * 16).stored == 0
    assert ranks[0].put(keys, data, b"d" * 16).stored == 4
    np.testing.assert_array_equal(ranks[1].got(keys), data)


def test_more_parts_at_once_than_a_node_carries_out_take_turns(
    three: Nodes, sessions: list[ClusterSession]
) -> None:
    ranks = ranks_in(sessions, "turns")
    n = 3 * limits.MAX_PARTS_AT_ONCE
    keys, data = chain(n, 5), blocks(n, 5, LAYOUT)

    async def put_all(rank: Rank, parts: Blocks) -> list[Any]:
        session = rank.session
        space = await session.router.open("turns", LAYOUT)
        arena = session._ring.arena
        at = int(arena.__array_interface__["data"][0])
        size, cells = parts.shape[1], np.array(rank.cells, np.uint32)
        arena[: parts.size] = parts.ravel()
        sums = [cell_checksums(row, part_of(LAYOUT, cells).bounds) for row in parts]
        return await asyncio.gather(
            *(
                session.router.put(
                    space,
                    Puts(
                        hashes=keys[i : i + 1],
                        addresses=np.array([at + i * size], np.uint64),
                        checksums=np.array([sums[i]], np.uint64),
                        places=np.array([place_of(keys[i].tobytes())], np.uint64),
                        parent=b"",
                        position=-1,
                        ttl_ms=0,
                        copies=2,
                        persist=False,
                        cells=cells,
                        agreed=b"t" * 16,
                    ),
                    1e3 * PUT_S,
                )
                for i in range(n)
            )
        )

    for rank in ranks:
        done = rank.session._run(put_all(rank, parts_of(data, rank.cells)), PUT_S)
        expected = m.PutStatus.STORED if rank is ranks[-1] else m.PutStatus.WAITING
        assert [each.status.tolist() for each in done] == [[expected]] * n
    assert all((each.copies == 2).all() for each in done)
    for i in range(n):
        np.testing.assert_array_equal(ranks[0].got(keys[i : i + 1]), data[i : i + 1])


def test_a_rank_with_an_earlier_view_is_told_the_later_one(
    three: Nodes, sessions: list[ClusterSession]
) -> None:
    ranks = ranks_in(sessions, "earlier")
    keys, data = chain(4, 6), blocks(4, 6, LAYOUT)
    router = ranks[1].session.router
    view = router.view
    assert view
    best = ranked(ranks[0].session, keys)[0]
    others = tuple(member for member in view.members if member.name != best.name)
    router.view = replace(view, epoch=view.epoch - 1, members=others)
    router.ranking = Ranking(router.view)
    for rank in ranks[:2]:
        assert rank.put(keys, data, b"e" * 16).waiting == 4
    assert pending(three) == {best.name: 4}
    assert router.epoch == view.epoch
    assert ranks[2].put(keys, data, b"e" * 16).replicated == 4
    np.testing.assert_array_equal(ranks[1].got(keys), data)


def test_a_rank_with_a_later_view_waits_for_the_member_that_the_others_ask(
    three: Nodes, sessions: list[ClusterSession]
) -> None:
    ranks = ranks_in(sessions, "later")
    keys, data = chain(4, 7), blocks(4, 7, LAYOUT)
    router = ranks[1].session.router
    view = router.view
    assert view
    best = ranked(ranks[0].session, keys)[0].name
    before = refusals(ranks[0].session, best)
    router.view = replace(view, epoch=view.epoch + 1)
    try:
        with ThreadPoolExecutor(1) as thread:
            late = thread.submit(ranks[1].put, keys, data, b"l" * 16)
            try:
                eventually(lambda: refusals(ranks[0].session, best) > before, 5.0, "refused")
            finally:
                router.view = view
            assert late.result(PUT_S).waiting == 4
    finally:
        router.view = view
    assert pending(three) == {best: 4}
    assert ranks[0].put(keys, data, b"l" * 16).waiting == 4
    assert ranks[2].put(keys, data, b"l" * 16).replicated == 4


def test_cells_that_the_layout_has_not_are_refused(sessions: list[ClusterSession]) -> None:
    rank = ranks_in(sessions, "wrong")[0]
    keys = chain(1, 8)
    some = [np.zeros(1, np.uint8)]
    with pytest.raises(LayoutMismatch, match="cells"):
        rank.session.put(rank.space, keys, some, cells=[8], put_id=b"w" * 16)
    with pytest.raises(LayoutMismatch, match="cells"):
        rank.session.get_into(rank.space, keys, some, cells=[1, 1])


def test_a_put_whose_first_node_dies_before_the_last_cells_is_never_acknowledged(
    three: Nodes, sessions: list[ClusterSession]
) -> None:
    ranks = ranks_in(sessions, "dies")
    old, older = chain(4, 9), blocks(4, 9, LAYOUT)
    for rank in ranks:
        kept = rank.put(old, older, b"o" * 16)
    assert kept.replicated == 4
    keys, data = chain(4, 10), blocks(4, 10, LAYOUT)
    best = ranked(ranks[0].session, keys)[0].name
    for rank in ranks[:2]:
        assert rank.put(keys, data, b"x" * 16).waiting == 4
    assert pending(three) == {best: 4}
    three.kill(best)
    last = ranks[2].put(keys, data, b"x" * 16)
    assert (last.stored, last.existed, last.replicated) == (0, 0, 0)
    assert ranks[0].count(keys) == 0
    np.testing.assert_array_equal(ranks[0].got(old), older)
    np.testing.assert_array_equal(ranks[0].got(old, ranks[1].cells), parts_of(older, RANKS[1]))
    # Once all ranks avoid it, they meet at the next one, and two nodes are left to keep copies.
    seeds = iter(range(100, 200))

    def put_anew() -> bool:
        seed = next(seeds)
        fresh, more = chain(4, seed), blocks(4, seed, LAYOUT)
        done = [rank.put(fresh, more, bytes([seed]) * 16) for rank in ranks]
        return done[-1].replicated == 4 and bool((ranks[0].got(fresh) == more).all())

    eventually(put_anew, DEAD_S, "a put at the two that are left")
