"""How pieces are cut, so that the first ones can be worked on while others are on their way."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.transfer.registered import portions

MIB = 1 << 20


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 1000])
@pytest.mark.parametrize("nbytes", [1, 4096, 256 << 10, 5 * MIB])
def test_each_piece_is_in_one_portion(n: int, nbytes: int) -> None:
    ends = portions(np.full(n, nbytes, np.uint64))
    assert ends == sorted(set(ends))
    assert ends[0] > 0
    assert ends[-1] == n


def test_the_last_is_small_and_little_is_not_cut() -> None:
    assert portions(np.full(64, 256 << 10, np.uint64)) == [8, 16, 24, 32, 40, 48, 56, 60, 64]
    assert portions(np.full(3, MIB, np.uint64)) == [3]
    assert portions(np.array([8 * MIB, 1, 1], np.uint64)) == [3]
