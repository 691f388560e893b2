"""A copy of one row, which has no arrays of rows, is the copy of rows."""

from __future__ import annotations

import numpy as np
import pytest
import xxhash

from kvstore.streaming import copy_and_hash


@pytest.mark.parametrize("nbytes", [1, 16, 240, 241, 4096, (256 << 10) + 3])
@pytest.mark.parametrize("shift", [0, 1, 63])
def test_a_copy_of_one_row_has_its_bytes_and_its_checksum(nbytes: int, shift: int) -> None:
    source = np.random.default_rng(nbytes).integers(0, 256, nbytes, np.uint8)
    room = np.full(nbytes + 192, 7, np.uint8)
    first = -room.ctypes.data % 64 + shift
    got = copy_and_hash(room.ctypes.data + first, source.ctypes.data, nbytes)
    assert got == xxhash.xxh3_64_intdigest(source.tobytes())
    assert (room[first : first + nbytes] == source).all()
    assert (room[:first] == 7).all()
    assert (room[first + nbytes :] == 7).all()
