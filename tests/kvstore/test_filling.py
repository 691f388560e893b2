"""One block's slot, filled by one call, is byte for byte what is made of many blocks."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore.block import NO_PARENT, cell_checksums, header_bytes, pack_parts
from kvstore.filling import fill_slot

KEY, PUT_ID, PARENT = bytes(range(32)), bytes(range(100, 116)), bytes(range(32, 64))
AROUND = 192  # bytes on both sides of the slot that nobody may touch


@pytest.mark.parametrize("sizes", [[1], [3, 8, 9], [16, 17, 240, 241], [5000] * 17, [1024] * 40])
@pytest.mark.parametrize("shift", [0, 8])
@pytest.mark.parametrize(("parent", "position"), [(b"", -1), (PARENT, 7)])
def test_a_slot_has_the_blocks_bytes_its_header_and_nothing_else(
    sizes: list[int], shift: int, parent: bytes, position: int
) -> None:
    rng = np.random.default_rng(sum(sizes))
    room, total = header_bytes(len(sizes)), sum(sizes)
    source = rng.integers(0, 256, total, np.uint8)
    memory = np.full(2 * AROUND + room + total + 64, 7, np.uint8)
    slot = AROUND + -(memory.ctypes.data + AROUND) % 64 + shift
    bounds = np.concatenate(([0], np.cumsum(sizes))).astype(np.int64)
    # At the source the cells lie in another order than in the payload.
    order = rng.permutation(len(sizes))
    froms = np.zeros(len(sizes), np.int64)
    froms[order] = np.concatenate(([0], np.cumsum(np.array(sizes)[order])[:-1]))
    payload = np.concatenate(
        [source[at : at + n] for at, n in zip(froms.tolist(), sizes, strict=True)]
    )

    sums = fill_slot(
        memory.ctypes.data + slot,
        source.ctypes.data,
        cells=np.stack((bounds[:-1], froms, sizes), axis=1).astype(np.uint64),
        header_bytes=room,
        namespace=3,
        key=KEY,
        put_id=PUT_ID,
        length=total,
        parent=parent,
        position=position,
    )

    expected = cell_checksums(payload, bounds)
    header = pack_parts(
        namespace=3,
        key=KEY,
        put_id=PUT_ID,
        length=total,
        checksums=expected,
        parent=parent or NO_PARENT,
        position=position,
    )
    assert sums.tolist() == [expected.tolist()]
    assert memory[slot : slot + room].tobytes() == header
    assert (memory[slot + room : slot + room + total] == payload).all()
    assert (memory[:slot] == 7).all()
    assert (memory[slot + room + total :] == 7).all()
