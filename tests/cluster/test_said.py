"""What a client of a cluster takes from the headers of blocks that landed."""

from __future__ import annotations

import numpy as np

from kvstore.block import BlockHeader, pack
from kvstore.layout import Attention, Layout
from kvstore.session.parts import part_of
from kvstore_client.cluster.gets import _said

LAYOUT = Layout(
    model="m",
    attention=Attention.GQA,
    layers=2,
    kv_heads=2,
    head_dim=64,
    dtype="bfloat16",
    block_tokens=16,
)


def test_only_sound_headers_of_the_blocks_that_were_asked_for_count() -> None:
    rng = np.random.default_rng(1)
    chain = rng.integers(0, 256, (4, 32), np.uint8)
    sums = rng.integers(0, 1 << 63, (4, LAYOUT.n_cells), np.uint64)
    keys = [chain[0], chain[1], chain[2], rng.integers(0, 256, 32, np.uint8)]  # the last: another's
    packed = [
        pack(
            BlockHeader(
                namespace=1,
                key=key.tobytes(),
                put_id=bytes(16),
                length=LAYOUT.block_bytes,
                checksums=own,
                parent=None,
                position=None,
            )
        )
        for key, own in zip(keys, sums, strict=True)
    ]
    headers = np.array([np.frombuffer(one, np.uint8) for one in packed])
    headers[1, 110] ^= 1  # a checksum
    said, sound = _said(headers, chain, LAYOUT, part_of(LAYOUT))
    assert sound.tolist() == [True, False, True, False]
    np.testing.assert_array_equal(said[[0, 2]], sums[[0, 2]])
    some = np.array([1], np.uint32)
    said, sound = _said(headers, chain, LAYOUT, part_of(LAYOUT, some))
    assert sound.tolist() == [True, False, True, False]
    np.testing.assert_array_equal(said[[0, 2]], sums[[0, 2]][:, [1]])
    said, sound = _said(headers[:, :64], chain, LAYOUT, part_of(LAYOUT))
    assert not sound.any()
