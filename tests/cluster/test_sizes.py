"""How a get is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.cluster.sizes import with_a_tail


@given(n=st.integers(0, 500), tail=st.integers(1, 80), most=st.integers(1, 80))
def test_all_blocks_are_in_a_piece_and_none_is_too_large(n: int, tail: int, most: int) -> None:
    sizes = with_a_tail(n, tail=tail, most=most)
    assert sum(sizes) == n
    assert all(1 <= size <= most for size in sizes)
    assert len(sizes) < 2 or sizes[-1] <= tail
    assert len(sizes) <= -(-n // most) + 1


def test_few_pieces_and_little_at_the_end() -> None:
    assert with_a_tail(64, tail=16, most=64) == [64]
    assert with_a_tail(64, tail=4, most=16) == [16, 16, 16, 12, 4]
    assert with_a_tail(20, tail=16, most=64) == [20]
    assert with_a_tail(0, tail=1, most=1) == []
