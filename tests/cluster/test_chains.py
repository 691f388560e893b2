"""Which segments a client takes blocks to be of."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from kvstore.cluster.placement import places_of, segment_blocks
from kvstore.layout import Layout
from kvstore.session.base import NamespaceHandle
from kvstore.session.requests import PutRequest, checked_put
from kvstore_client.cluster.chains import Chains

LAYOUT = Layout.opaque(model="chains", block_bytes=4096, block_tokens=128)
SEGMENT = segment_blocks(LAYOUT.block_tokens)
MOST = 64  # chains that are remembered


def keys(n: int, seed: int) -> np.ndarray[tuple[int, int], np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


def test_the_end_of_a_chain_that_was_seen_is_of_that_chain_s_segments() -> None:
    chains, whole = Chains(), keys(3 * SEGMENT, 1)
    places = chains.places(LAYOUT, whole)
    np.testing.assert_array_equal(places, places_of(whole, position=0, segment=SEGMENT))
    for seed in range(2, MOST + 1):  # others, with which it is one of those that are remembered
        chains.places(LAYOUT, keys(1 + seed % 5, seed))
    for at in (1, SEGMENT, 2 * SEGMENT + 1):
        np.testing.assert_array_equal(chains.places(LAYOUT, whole[at:]), places[at:])


def test_the_oldest_chain_is_forgotten_first() -> None:
    chains = Chains()
    all_of_them = [keys(SEGMENT + 2 + seed % 3, seed) for seed in range(MOST + 1)]
    for chain in all_of_them:
        chains.places(LAYOUT, chain)
    for which, chain in enumerate(all_of_them[::-1]):
        known = which < MOST
        rest = chain[1:]
        as_known = places_of(chain, position=0, segment=SEGMENT)[1:]
        assert np.array_equal(chains.places(LAYOUT, rest), as_known) == known


def put_of(chain: np.ndarray[tuple[int, int], np.dtype[np.uint8]], position: int = 0) -> PutRequest:
    blocks: Any = [np.zeros(LAYOUT.block_bytes, np.uint8)] * len(chain)
    handle = NamespaceHandle(id=0, name="chains", layout=LAYOUT, generation=0, key=b"k" * 32)
    return checked_put(
        handle,
        chain,
        blocks,
        put_id=None,
        cells=(),
        parent=b"",
        position=position,
        ttl_s=None,
        hint=None,
    )


@pytest.mark.parametrize("succeeds", [True, False])
def test_a_chain_that_was_just_put_has_the_places_that_it_was_put_to(succeeds: bool) -> None:
    chains, chain = Chains(), keys(2 * SEGMENT, 3)
    put = put_of(chain)
    places = places_of(chain, position=0, segment=SEGMENT)
    np.testing.assert_array_equal(chains.places_of_put(put), places)
    if succeeds:
        chains.remember(put)
    np.testing.assert_array_equal(chains.places(LAYOUT, chain), places)
    np.testing.assert_array_equal(chains.places(LAYOUT, chain[1:]), places[1:])
    other = chain.copy()
    other[-1, -1] ^= 1
    np.testing.assert_array_equal(
        chains.places(LAYOUT, other), places_of(other, position=0, segment=SEGMENT)
    )


def test_places_are_those_of_the_layout_s_own_segments() -> None:
    chains, chain = Chains(), keys(8, 4)
    single = Layout.opaque(model="chains", block_bytes=4096, block_tokens=512)
    of_many = chains.places(LAYOUT, chain)
    of_one = chains.places(single, chain)
    np.testing.assert_array_equal(of_one, places_of(chain, position=0, segment=1))
    np.testing.assert_array_equal(of_many, places_of(chain, position=0, segment=SEGMENT))


def test_keys_that_begin_alike_are_told_apart() -> None:
    chains, one = Chains(), keys(SEGMENT + 1, 7)
    other = one.copy()
    other[:, 8:] = keys(SEGMENT + 1, 8)[:, 8:]
    chains.places(LAYOUT, one)
    places = chains.places(LAYOUT, other)
    np.testing.assert_array_equal(places, places_of(other, position=0, segment=SEGMENT))
    np.testing.assert_array_equal(
        chains.places(LAYOUT, one[1:])[:1], chains.places(LAYOUT, one)[1:2]
    )
