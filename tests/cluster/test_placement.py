"""Where blocks belong: that it is the same everywhere, balanced, and moves no more than it must."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.replay_trace import Chain, keys_of
from benchmarks.scale import made_up, measure
from kvstore.cluster.members import Member, MemberState, View
from kvstore.cluster.placement import (
    NONCE_BYTES,
    OVERLOAD,
    PUT_ID_BYTES,
    SPARE,
    U64,
    Ranking,
    new_put_id,
    overloaded,
    place_of,
    places_of,
    places_of_put_ids,
    segment_blocks,
)

KEY_BYTES = 32


def some_places(n: int, seed: int = 0) -> U64:
    return np.random.default_rng(seed).integers(1 << 64, size=n, dtype=np.uint64)


def some_keys(n: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(256, size=(n, KEY_BYTES), dtype=np.uint8)


def members(weights: Sequence[int], state: MemberState = MemberState.UP) -> tuple[Member, ...]:
    return tuple(
        Member(name=f"n{i}", address=f"10.0.0.1:{i + 1}", weight=weight, state=state)
        for i, weight in enumerate(weights)
    )


def view_of(some: Sequence[Member], replicas: int = 2) -> View:
    return View(epoch=1, replicas=replicas, members=tuple(some))


def names(view: View, ranks: npt.NDArray[np.int16]) -> list[list[str]]:
    return [[view.members[n].name for n in row] for row in ranks.tolist()]


def as_state(view: View, name: str, state: MemberState) -> View:
    member = view.find(name)
    assert member
    return view.with_members([replace(member, state=state)])


weights = st.lists(st.integers(1, 16), min_size=2, max_size=9)


# -- what must never change by accident -----------------------------------------------------------


def test_places_and_ranks_are_the_same_in_every_release() -> None:
    """Another number here means that all nodes of a cluster have to be renewed at once."""
    key = bytes(range(KEY_BYTES))
    assert place_of(key) == 0x3523581FE96E4C05
    chain = np.arange(4 * KEY_BYTES, dtype=np.uint8).reshape(4, KEY_BYTES)
    firsts = [0x3523581FE96E4C05, 0x14AE999E94D4A60E]
    assert places_of(chain, position=0, segment=2).tolist() == [
        each for each in firsts for _ in "ab"
    ]
    view = view_of(members([1, 1, 2, 4, 1, 1, 8]))
    places = np.array([0, 1, 1 << 63, (1 << 64) - 1, place_of(key)], np.uint64)
    expected = [[2, 6, 3], [2, 6, 3], [3, 6, 5], [6, 5, 0], [4, 6, 2]]
    assert Ranking(view).targets(places).tolist() == expected
    put_id = b"\xc1\x05nonce!\x01\x02\x03\x04\x05\x06\x07\x08"
    assert new_put_id(b"nonce!", 0x0807060504030201) == put_id


@given(weights, st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=8))
@settings(derandomize=True, deadline=None)
def test_ranks_are_those_of_weighted_rendezvous_hashing(some: list[int], places: list[int]) -> None:
    """One by one, in whole numbers of any length."""
    view = view_of(members(some))
    ranks = Ranking(view).targets(np.array(places, np.uint64), most=len(some))
    for place, row in zip(places, ranks.tolist(), strict=True):
        scores = [score(place, member) for member in view.members]
        assert [scores[n] for n in row] == pytest.approx(sorted(scores, reverse=True))


def score(place: int, member: Member) -> float:
    """`weight / -ln(u)`; u: by the finalizer of splitmix64 (Steele, Lea, Flood 2014)."""
    whole = (1 << 64) - 1
    mixed = place ^ xxhash.xxh3_64_intdigest(member.name.encode())
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & whole
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & whole
    mixed ^= mixed >> 31
    return member.weight / -math.log(((mixed >> 11) + 0.5) / (1 << 53))


@pytest.mark.parametrize(("block_tokens", "blocks"), [(1, 512), (16, 32), (512, 1), (513, 1)])
def test_a_segment_has_at_most_512_tokens_and_at_least_one_block(
    block_tokens: int, blocks: int
) -> None:
    assert segment_blocks(block_tokens) == blocks


# -- ranks ----------------------------------------------------------------------------------------


@given(weights, st.integers(1, 7), st.integers(0, 1000))
@settings(derandomize=True, deadline=None)
def test_ranks_are_distinct_members_and_more_ranks_only_add(
    some: list[int], replicas: int, seed: int
) -> None:
    ranking = Ranking(view_of(members(some), replicas))
    places = some_places(50, seed)
    ranks = ranking.targets(places)
    assert ranks.shape == (50, min(replicas + SPARE, len(some)))
    whole = ranking.targets(places, most=len(some))
    assert (np.sort(whole, axis=1) == np.arange(len(some))).all()
    for k in range(1, len(some) + 1):
        assert (ranking.targets(places, most=k) == whole[:, :k]).all()


def test_one_place_alone_ranks_as_among_others() -> None:
    ranking = Ranking(view_of(members([1, 2, 3, 4])))
    places = some_places(100)
    together = ranking.targets(places)
    for i in range(len(places)):
        assert (ranking.targets(places[i : i + 1]) == together[i]).all()


def test_without_members_or_places_there_are_no_ranks() -> None:
    nobody = Ranking(view_of(()))
    assert nobody.targets(some_places(3)).shape == (3, 0)
    assert nobody.readers(7) == []
    assert Ranking(view_of(members([1, 1, 1]))).targets(some_places(0)).shape == (0, 3)


@pytest.mark.parametrize(
    ("state", "new", "old"),
    [
        (MemberState.UP, True, True),
        (MemberState.JOINING, True, False),
        (MemberState.DRAINING, False, True),
        (MemberState.OUT, False, False),
    ],
)
def test_who_gets_new_blocks_and_who_may_have_old_ones(
    state: MemberState, new: bool, old: bool
) -> None:
    view = as_state(view_of(members([1, 1, 1])), "n1", state)
    ranking, places = Ranking(view), some_places(100)
    assert (1 in ranking.targets(places, most=3)) == new
    assert (1 in ranking.earlier(places)) == old
    assert any(1 in ranking.readers(place) for place in places.tolist()) == (new or old)


# -- movement -------------------------------------------------------------------------------------


@given(weights, st.integers(1, 16), st.integers(1, 3), st.integers(0, 1000))
@settings(derandomize=True, deadline=None)
def test_who_joins_or_leaves_moves_only_what_it_gains_or_loses(
    some: list[int], weight: int, replicas: int, seed: int
) -> None:
    """Without the one that comes or goes, every ranking is as it was."""
    before = view_of(members(some), replicas)
    other = Member(name="other", address="10.0.0.2:1", weight=weight)
    after = before.with_members([other])
    places = some_places(200, seed)
    ranks = names(before, Ranking(before).targets(places))
    more = names(after, Ranking(after).targets(places, most=len(ranks[0]) + 1))
    for few, many in zip(ranks, more, strict=True):
        assert [name for name in many if name != "other"][: len(few)] == few


def test_what_moves_is_the_share_of_who_joins() -> None:
    before = view_of(members([1, 2, 3, 4]))
    after = before.with_members([Member(name="other", address="10.0.0.2:1", weight=5)])
    places = some_places(60_000)
    first = np.array(names(before, Ranking(before).targets(places, most=1)))
    then = np.array(names(after, Ranking(after).targets(places, most=1)))
    assert (first != then).mean() == pytest.approx(5 / 15, rel=0.03)


def test_who_gets_more_weight_only_gains() -> None:
    before = view_of(members([4, 4, 4, 4]))
    after = before.with_members([replace(before.members[0], weight=8)])
    places = some_places(20_000)
    first, then = (Ranking(view).targets(places, most=1)[:, 0] for view in (before, after))
    assert set(then[first != then].tolist()) == {0}
    assert (first != then).mean() == pytest.approx(8 / 20 - 4 / 16, rel=0.05)


def test_a_name_alone_decides_neither_address_nor_run_nor_state() -> None:
    view = view_of(members([1, 2, 3, 4]))
    moved = view_of([replace(m, address=f"h:{9 - m.weight}", run=7) for m in view.members])
    places = some_places(200)
    assert (Ranking(view).targets(places) == Ranking(moved).targets(places)).all()


# -- balance --------------------------------------------------------------------------------------


@pytest.mark.parametrize("some", [[1] * 10, [1, 1, 2, 4, 8], [3, 1024, 1000]])
def test_members_get_their_weights_share_at_every_rank_that_is_copied(some: list[int]) -> None:
    places = some_places(200_000)
    first = Ranking(view_of(members(some))).targets(places, most=1)[:, 0]
    shares = np.bincount(first, minlength=len(some)) / len(places)
    expected = np.array(some) / sum(some)
    large = expected > 0.01
    assert (np.abs(shares - expected)[large] <= 0.05 * expected[large]).all()


def test_copies_of_equal_members_are_spread_evenly_too() -> None:
    places = some_places(100_000)
    ranks = Ranking(view_of(members([1] * 10), 3)).targets(places)
    for rank in ranks.T:
        assert np.bincount(rank, minlength=10).max() < 1.05 * len(places) / 10


def stored_by_member(requests: list[Chain], segment: int, n: int) -> npt.NDArray[np.int64]:
    """How many blocks each of n members has once all have been put."""
    keys = keys_of(requests)
    seen: dict[int, int] = {}
    for chain in requests:
        places = places_of(keys[chain], position=0, segment=segment)
        for block, place in zip(chain.tolist(), places.tolist(), strict=True):
            seen.setdefault(block, place)
    places = np.array(list(seen.values()), np.uint64)
    first = Ranking(view_of(members([1] * n))).targets(places, most=1)[:, 0]
    return np.bincount(first, minlength=n)


def test_blocks_of_conversations_are_spread_evenly() -> None:
    stored = stored_by_member(made_up(3000, seed=5), segment_blocks(512), 10)
    assert stored.sum() > 15_000
    assert stored.max() / stored.mean() < 1.06


def test_longer_segments_would_be_spread_worse() -> None:
    requests = made_up(3000, seed=5)
    spread = [stored_by_member(requests, segment, 10) for segment in (1, 64)]
    assert spread[1].max() / spread[1].mean() > 1.1 > spread[0].max() / spread[0].mean()


def test_the_benchmark_counts_what_placement_does() -> None:
    requests = made_up(1000, seed=3)
    (row,) = measure("made up", requests, sizes=[7]).rows
    blocks = len(np.unique(np.concatenate(requests)))
    stored = stored_by_member(requests, 1, 7)
    for balance in row.balance:
        assert balance.bounded <= balance.free
    assert row.balance[0].free == pytest.approx(stored.max() / stored.mean(), rel=0.1)
    for moved in row.movement:
        assert moved.died == moved.died_least
        assert moved.joined == pytest.approx(moved.copies * blocks / 8, rel=0.1)
    assert 1 <= row.asked.mean <= row.asked.most <= 7


@pytest.mark.parametrize(
    ("used", "some", "expected"),
    [
        ([], [], []),
        ([0, 0], [1, 1], [False, False]),
        ([125, 75], [1, 1], [False, False]),
        ([126, 74], [1, 1], [True, False]),
        ([126, 74], [2, 1], [False, False]),
        ([10, 126], [1, 2], [False, True]),
    ],
)
def test_who_has_a_quarter_more_than_its_share_is_overloaded(
    used: list[int], some: list[int], expected: list[bool]
) -> None:
    assert OVERLOAD == 1.25
    assert overloaded(used, some).tolist() == expected


# -- readers --------------------------------------------------------------------------------------


@given(weights, st.integers(1, 3), st.integers(0, 1000))
@settings(derandomize=True, deadline=None)
def test_what_was_written_before_a_join_or_a_drain_is_still_asked_for(
    some: list[int], replicas: int, seed: int
) -> None:
    """Also what the next rank took because another had too much."""
    settled = view_of(members(some), replicas)
    places = some_places(20, seed)
    written = names(settled, Ranking(settled).targets(places))
    joining = Member(name="other", address="h:1", weight=4, state=MemberState.JOINING)
    for view in (
        settled,
        settled.with_members([joining]),
        as_state(settled, "n0", MemberState.DRAINING),
    ):
        ranking = Ranking(view)
        for place, row, before in zip(
            places.tolist(), names(view, ranking.targets(places)), written, strict=True
        ):
            (readers,) = names(view, np.array([ranking.readers(place)], np.int16))
            assert readers[: len(row)] == row  # who gets new ones is asked first
            assert set(before) <= set(readers)
            assert len(set(readers)) == len(readers)


def test_hot_segments_have_more_readers() -> None:
    ranking = Ranking(view_of(members([1] * 8)))
    assert [len(ranking.readers(5, extra)) for extra in (0, 1, 3, 99)] == [3, 4, 6, 8]
    assert ranking.readers(5, 3)[:3] == ranking.readers(5)


def test_when_nobody_is_up_yet_those_who_join_are_asked() -> None:
    ranking = Ranking(view_of(members([1, 1, 1], MemberState.JOINING)))
    assert sorted(ranking.readers(5)) == [0, 1, 2]
    assert ranking.earlier(some_places(4)).shape == (4, 0)


# -- places of chains -----------------------------------------------------------------------------


def test_all_blocks_of_a_segment_have_the_place_of_its_first() -> None:
    chain = some_keys(10)
    expected = [place_of(chain[i // 4 * 4].tobytes()) for i in range(10)]
    assert places_of(chain, position=0, segment=4).tolist() == expected


def test_blocks_without_a_chain_have_places_of_their_own() -> None:
    keys = some_keys(5)
    expected = [place_of(key.tobytes()) for key in keys]
    assert places_of(keys, position=-1, segment=4).tolist() == expected
    assert places_of(keys, position=3, segment=1).tolist() == expected


def test_no_blocks_have_no_places() -> None:
    for position in (-1, 0, 3):
        assert places_of(some_keys(0), position=position, segment=4).shape == (0,)


@given(
    st.integers(1, 80),
    st.sampled_from([1, 2, 3, 7, 32]),
    st.lists(st.integers(0, 80), max_size=6),
    st.integers(0, 1000),
)
@settings(derandomize=True, deadline=None)
def test_places_are_the_same_however_a_chain_is_cut(
    n: int, segment: int, cuts: list[int], seed: int
) -> None:
    chain = some_keys(n, seed)
    whole = places_of(chain, position=0, segment=segment)
    edges = sorted({0, n, *(cut for cut in cuts if cut < n)})
    known: list[int] = []
    for begin, end in itertools.pairwise(edges):
        before = known[-1] if known else None
        piece = chain[begin:end]
        known += places_of(piece, position=begin, segment=segment, first_place=before).tolist()
    assert known == whole.tolist()


# -- put ids --------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=20),
    st.integers(0, 1),
    st.integers(1, 255),
)
@settings(derandomize=True)
def test_put_ids_carry_places_and_others_do_not(places: list[int], at: int, flip: int) -> None:
    ids = [new_put_id(bytes(range(NONCE_BYTES)), place) for place in places]
    assert {len(each) for each in ids} == {PUT_ID_BYTES}
    other = bytearray(ids[0])
    other[at] ^= flip
    rows = np.frombuffer(b"".join([*ids, other]), np.uint8).reshape(-1, PUT_ID_BYTES)
    found, placed = places_of_put_ids(rows)
    assert found[:-1].tolist() == places
    assert placed.tolist() == [*([True] * len(ids)), False]
