"""Pieces that grow."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from kvstore.pieces import growing

LIMITS = st.integers(1, 50)


@given(st.integers(0, 2000), LIMITS, LIMITS, st.integers(2, 4))
def test_pieces_hold_every_block_once_and_keep_their_limits(
    n: int, least: int, most: int, factor: int
) -> None:
    sizes = growing(n, least=least, most=most, factor=factor)
    assert sum(sizes) == n
    assert all(0 < size <= most for size in sizes)
    assert all(a <= b for a, b in itertools.pairwise(sizes[:-1]))
    if sizes:
        assert sizes[0] == min(n, least, most)


def test_pieces_double() -> None:
    assert growing(64, least=2, most=16) == [2, 4, 8, 16, 16, 16, 2]
    assert growing(3, least=8, most=16) == [3]


def test_pieces_grow_faster_where_that_is_wanted() -> None:
    assert growing(64, least=4, most=24, factor=3) == [4, 12, 24, 24]
