"""Tests of kvstore.keys: golden hashes, the chain's properties, every error."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore import limits
from kvstore.errors import InvalidArgument
from kvstore.keys import HashScheme, as_hashes, hash_chain, namespace_key

KEY = bytes(range(32))
CHAINED = [HashScheme.BLAKE2B, HashScheme.XXH3_128]
TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=40)
GOLDEN = {
    HashScheme.BLAKE2B: [
        "10475fa7d7066a4235fa5d1686e584e372196bcaa609b65853903e2ed823d68f",
        "9af95683a18162c805cd5ba161beb33ebc09e793fa355291f4a12d1a486b9107",
    ],
    HashScheme.XXH3_128: [
        "85cc112e1f8c10f3193a05da10555f4e94d34b1371d0c70e798e1416163db182",
        "630de5fe976c58c3f749e71f9acd36d3cc4f8aee2db002c7cc24e96dffc6ec0e",
    ],
}


@pytest.mark.parametrize("scheme", CHAINED)
def test_golden_chain(scheme: HashScheme) -> None:
    hashes = hash_chain(range(9), block_tokens=4, key=KEY, scheme=scheme, extra_keys=[b"lora"])
    assert [row.tobytes().hex() for row in hashes] == GOLDEN[scheme]
    assert hashes.dtype == np.uint8
    assert hashes.flags.c_contiguous


def test_golden_namespace_key() -> None:
    key = namespace_key(KEY, layout_fingerprint=bytes(32), name="default")
    assert key.hex() == "77ee3776eddc1e60767111401bad8646300ebbd27e48c1149f3d73d4961ab2c1"


def test_a_block_is_keyed_blake2b_of_parent_and_tokens() -> None:
    parent = b"p" * 32
    words = np.array([1, 2**32 - 1], dtype="<u4")
    expected = hashlib.blake2b(parent + words.tobytes(), digest_size=32, key=KEY).digest()
    assert hash_chain(words, block_tokens=2, key=KEY, parent=parent).tobytes() == expected


@given(tokens=TOKENS, block_tokens=st.integers(1, 7), scheme=st.sampled_from(CHAINED))
def test_a_chain_continued_from_a_parent_is_the_whole_chain(
    tokens: list[int], block_tokens: int, scheme: HashScheme
) -> None:
    whole = hash_chain(tokens, block_tokens=block_tokens, key=KEY, scheme=scheme)
    assert whole.shape == (len(tokens) // block_tokens, 32)
    for done in range(1, len(whole)):
        rest = hash_chain(
            tokens[done * block_tokens :],
            block_tokens=block_tokens,
            key=KEY,
            scheme=scheme,
            parent=whole[done - 1].tobytes(),
        )
        assert np.array_equal(rest, whole[done:])


@given(tokens=st.lists(st.integers(0, 2**32 - 2), min_size=1, max_size=12), data=st.data())
def test_a_changed_token_changes_its_block_and_all_after(tokens: list[int], data: Any) -> None:
    at = data.draw(st.integers(0, len(tokens) - 1))
    changed = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
    before = hash_chain(tokens, block_tokens=1, key=KEY)
    after = hash_chain(changed, block_tokens=1, key=KEY)
    same = (before == after).all(axis=1)
    assert same.tolist() == [i < at for i in range(len(tokens))]


@pytest.mark.parametrize("dtype", ["u1", "<i2", ">i4", "<u4", ">u8", "<i8"])
def test_the_dtype_of_tokens_does_not_matter(dtype: str) -> None:
    expected = hash_chain([1, 2, 3, 4], block_tokens=2, key=KEY)
    strided = np.array([1, 0, 2, 0, 3, 0, 4, 0], dtype=dtype)[::2]
    assert np.array_equal(hash_chain(strided, block_tokens=2, key=KEY), expected)


@pytest.mark.parametrize("scheme", CHAINED)
def test_everything_bound_at_the_root_matters(scheme: HashScheme) -> None:
    def first(key: bytes, *extra: bytes) -> bytes:
        return hash_chain([1], block_tokens=1, key=key, scheme=scheme, extra_keys=extra).tobytes()

    names = [
        first(KEY),
        first(b"k" * 16),
        first(KEY, b""),
        first(KEY, b"ab"),
        first(KEY, b"a", b"b"),
        first(KEY, b"b", b"a"),
    ]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokens": [[1, 2]]}, "tokens"),
        ({"tokens": 3}, "tokens"),
        ({"tokens": [1.5]}, "tokens"),
        ({"tokens": [True]}, "tokens"),
        ({"tokens": ["a"]}, "tokens"),
        ({"tokens": [[1], [1, 2]]}, "tokens"),
        ({"tokens": [-1]}, "tokens"),
        ({"tokens": [2**32]}, "tokens"),
        ({"tokens": [2**70]}, "tokens"),
        ({"block_tokens": 0}, "block_tokens"),
        ({"block_tokens": True}, "block_tokens"),
        ({"block_tokens": 1.0}, "block_tokens"),
        ({"key": b"k" * 15}, "key"),
        ({"key": b"k" * 65}, "key"),
        ({"key": "k" * 32}, "key"),
        ({"scheme": HashScheme.ENGINE}, "scheme"),
        ({"scheme": 9}, "scheme"),
        ({"parent": b"p" * 31}, "parent"),
        ({"parent": "p" * 32}, "parent"),
        ({"parent": b"p" * 32, "extra_keys": [b"x"]}, "extra_keys"),
        ({"extra_keys": b"x"}, "extra_keys"),
        ({"extra_keys": ["x"]}, "extra_keys"),
        ({"extra_keys": 5}, "extra_keys"),
    ],
)
def test_hash_chain_errors(change: dict[str, Any], field: str) -> None:
    arguments: dict[str, Any] = {"tokens": [1, 2], "block_tokens": 1, "key": KEY, **change}
    with pytest.raises(InvalidArgument) as caught:
        hash_chain(arguments.pop("tokens"), **arguments)
    assert caught.value.field == field


def test_namespace_keys_differ() -> None:
    keys = {
        namespace_key(secret, layout_fingerprint=layout, name=name)
        for secret in (b"a" * 16, b"b" * 64)
        for layout in (bytes(32), b"l" * 32)
        for name in ("", "a", "é" * 128)
    }
    assert len(keys) == 12


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"secret": b"s"}, "secret"),
        ({"layout_fingerprint": b"l" * 31}, "layout_fingerprint"),
        ({"layout_fingerprint": "l" * 32}, "layout_fingerprint"),
        ({"name": b"n"}, "name"),
        ({"name": "n" * 257}, "name"),
        ({"name": "é" * 129}, "name"),
        ({"name": "\ud800"}, "name"),
    ],
)
def test_namespace_key_errors(change: dict[str, Any], field: str) -> None:
    arguments: dict[str, Any] = {"secret": KEY, "layout_fingerprint": bytes(32), "name": "n"}
    arguments |= change
    with pytest.raises(InvalidArgument) as caught:
        namespace_key(arguments.pop("secret"), **arguments)
    assert caught.value.field == field


@given(rows=st.lists(st.binary(min_size=32, max_size=32), max_size=8))
def test_as_hashes_brings_all_forms_to_one(rows: list[bytes]) -> None:
    expected = np.array([list(row) for row in rows], dtype=np.uint8).reshape(-1, 32)
    for value in (rows, tuple(rows), b"".join(rows), expected, np.asfortranarray(expected)):
        hashes = as_hashes(value)
        assert hashes.shape == (len(rows), 32)
        assert hashes.dtype == np.uint8
        assert hashes.flags.c_contiguous
        assert np.array_equal(hashes, expected)


MANY = limits.MAX_KEYS_PER_CALL + 1


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"x" * 33, id="ragged-bytes"),
        pytest.param([b"x" * 31], id="short"),
        pytest.param(["x" * 32], id="text-item"),
        pytest.param("x" * 32, id="text"),
        pytest.param(bytearray(32), id="bytearray"),
        pytest.param(None, id="none"),
        pytest.param(np.zeros(32, np.uint8), id="1-D"),
        pytest.param(np.zeros((1, 31), np.uint8), id="narrow"),
        pytest.param(np.zeros((1, 32), np.int8), id="signed"),
        pytest.param(np.zeros((MANY, 32), np.uint8), id="many-array"),
        pytest.param(bytes(MANY * 32), id="many-bytes"),
        pytest.param([bytes(32)] * MANY, id="many-sequence"),
    ],
)
def test_as_hashes_errors(value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        as_hashes(value)
    assert caught.value.field == "keys"
