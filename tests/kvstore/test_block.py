"""Tests of kvstore.block: golden header, round trips, every kind of damage, every error."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import (
    BlockHeader,
    cell_checksums,
    copied_headers,
    header_bytes,
    pack,
    pack_many,
    read_headers,
    unpack,
    verify,
)
from kvstore.errors import Corrupted, InvalidArgument, LayoutMismatch, ProtocolError

PAYLOAD = bytes(range(256))
BOUNDS = np.array([0, 100, 256], dtype=np.int64)
SUMS = [22042537110060316, 4422219695137551729]
HEADER = BlockHeader(
    namespace=7,
    key=b"\1" * 32,
    put_id=b"\2" * 16,
    length=256,
    checksums=np.array(SUMS, dtype=np.uint64),
    parent=b"\3" * 32,
    position=5,
)
GOLDEN = bytes.fromhex(
    "4b564231" + "0100" + "0000" + "02000000" + "00010000" + "07000000"
    + "01" * 32 + "02" * 16 + "03" * 32 + "05000000"
    + "1cbd641a924f4e00" + "71f568ff61e15e3d" + "c52b129fcce2d8d6"
).ljust(256, b"\0")  # fmt: skip


def _resummed(data: bytes, n_cells: int = 2) -> bytes:
    """`data` with its own checksum made right again after a change."""
    end = 104 + 8 * n_cells
    own = struct.pack("<Q", xxhash.xxh3_64_intdigest(data[:end]))
    return data[:end] + own + data[end + 8 :]


def _with(at: int, new: bytes) -> bytes:
    return GOLDEN[:at] + new + GOLDEN[at + len(new) :]


def test_golden_header() -> None:
    assert pack(HEADER) == GOLDEN
    assert unpack(GOLDEN) == HEADER
    assert _resummed(GOLDEN) == GOLDEN


@pytest.mark.parametrize(("n_cells", "size"), [(1, 256), (18, 256), (19, 512), (256, 2304)])
def test_header_bytes(n_cells: int, size: int) -> None:
    assert header_bytes(n_cells) == size


@pytest.mark.parametrize("n_cells", [0, 257, -1, True, 1.0])
def test_header_bytes_errors(n_cells: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        header_bytes(n_cells)
    assert caught.value.field == "n_cells"


@given(
    header=st.builds(
        BlockHeader,
        namespace=st.integers(0, 2**32 - 1),
        key=st.binary(min_size=32, max_size=32),
        put_id=st.binary(min_size=16, max_size=16),
        length=st.integers(0, 64 << 20),
        checksums=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=256).map(
            lambda sums: np.array(sums, dtype=np.uint64)
        ),
        parent=st.none() | st.binary(min_size=32, max_size=32).filter(any),
        position=st.none() | st.integers(0, 2**31 - 1),
    ),
    more=st.binary(max_size=9),
)
def test_unpack_inverts_pack(header: BlockHeader, more: bytes) -> None:
    data = pack(header)
    assert len(data) == header_bytes(len(header.checksums))
    assert unpack(data + more) == header


@pytest.mark.parametrize("form", [bytearray, memoryview, lambda b: np.frombuffer(b, np.uint8)])
def test_unpack_takes_any_buffer(form: Any) -> None:
    assert unpack(form(GOLDEN)) == HEADER


def test_unpack_shares_no_memory() -> None:
    buffer = bytearray(GOLDEN)
    header = unpack(buffer)
    buffer[:] = bytes(256)
    assert header == HEADER


def test_headers_compare_by_all_fields() -> None:
    assert dataclasses.replace(HEADER, position=None) != HEADER
    assert dataclasses.replace(HEADER, checksums=HEADER.checksums + np.uint64(1)) != HEADER
    assert HEADER != "header"
    with pytest.raises(TypeError):
        hash(HEADER)


@given(bit=st.integers(0, 128 * 8 - 1))
def test_any_flipped_bit_is_found(bit: int) -> None:
    data = bytearray(GOLDEN)
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(ProtocolError if bit < 48 else Corrupted):
        unpack(data)


@pytest.mark.parametrize("size", [0, 3, 103, 104, 127, 255])
def test_truncation(size: int) -> None:
    with pytest.raises(Corrupted, match="cut short"):
        unpack(GOLDEN[:size])


@pytest.mark.parametrize("n_cells", [0, 257, 2**32 - 1])
def test_impossible_cell_count(n_cells: int) -> None:
    with pytest.raises(Corrupted, match="cells"):
        unpack(_with(8, struct.pack("<I", n_cells)))


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [
        (0, b"KVB2", "magic"),
        (4, b"\2\0", "version"),
        (6, b"\1\0", "flags"),
        (12, b"\xff" * 4, "length"),
        (100, struct.pack("<i", -2), "position"),
    ],
)
def test_sound_bytes_of_no_known_meaning(at: int, new: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        unpack(_resummed(_with(at, new)))


@pytest.mark.parametrize("buffer", ["text", 5, np.zeros((256, 2), np.uint8)[:, 0]])
def test_unpack_refuses_what_is_no_buffer(buffer: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        unpack(buffer)
    assert caught.value.field == "buffer"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("namespace", -1),
        ("namespace", 2**32),
        ("key", b"k" * 31),
        ("key", "k" * 32),
        ("put_id", b"p" * 17),
        ("length", (64 << 20) + 1),
        ("checksums", [1, 2]),
        ("checksums", np.zeros(2, np.int64)),
        ("checksums", np.zeros((1, 1), np.uint64)),
        ("checksums", np.zeros(0, np.uint64)),
        ("checksums", np.zeros(257, np.uint64)),
        ("parent", b"p"),
        ("parent", bytes(32)),
        ("position", -1),
        ("position", 2**31),
    ],
)
def test_wrong_fields(field: str, value: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        dataclasses.replace(HEADER, **{field: value})
    assert caught.value.field == field


def test_golden_checksums() -> None:
    sums = cell_checksums(PAYLOAD, BOUNDS)
    assert sums.dtype == np.uint64
    assert sums.tolist() == SUMS
    array = np.frombuffer(PAYLOAD, dtype=np.uint8)
    assert cell_checksums(array, BOUNDS).tolist() == SUMS
    verify(HEADER, array, BOUNDS)


@given(at=st.integers(0, 255), flip=st.integers(1, 255))
def test_verify_names_the_bad_cell(at: int, flip: int) -> None:
    payload = bytearray(PAYLOAD)
    payload[at] ^= flip
    with pytest.raises(Corrupted, match=f"cell {0 if at < 100 else 1} of 2"):
        verify(HEADER, payload, BOUNDS)


def test_verify_finds_a_wrong_length() -> None:
    with pytest.raises(Corrupted, match="255 bytes"):
        verify(HEADER, PAYLOAD[:-1], BOUNDS)


@pytest.mark.parametrize("bounds", [[0, 256], [0, 100, 255]])
def test_verify_refuses_bounds_of_another_layout(bounds: list[int]) -> None:
    with pytest.raises(LayoutMismatch) as caught:
        verify(HEADER, PAYLOAD, np.array(bounds, dtype=np.int64))
    assert caught.value.field == "bounds"


@pytest.mark.parametrize(
    "bounds",
    [
        [0, 100, 256],
        np.array([0, 256], dtype=np.int32),
        np.array([[0, 256]], dtype=np.int64),
        np.array([0], dtype=np.int64),
        np.arange(258, dtype=np.int64),
        np.array([1, 256], dtype=np.int64),
        np.array([0, 200, 100, 256], dtype=np.int64),
    ],
)
def test_wrong_bounds(bounds: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        cell_checksums(PAYLOAD, bounds)
    assert caught.value.field == "bounds"


@pytest.mark.parametrize("payload", ["text", np.zeros((16, 16), np.uint8), np.zeros(256, np.int16)])
def test_wrong_payload(payload: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        cell_checksums(payload, BOUNDS)
    assert caught.value.field == "payload"


def test_payload_of_another_layout() -> None:
    with pytest.raises(LayoutMismatch):
        cell_checksums(PAYLOAD[:-1], BOUNDS)


@pytest.mark.parametrize("n_cells", [1, 3, 40, 256])
def test_many_headers_at_once_are_those_of_one_at_a_time(n_cells: int) -> None:
    rng = np.random.default_rng(n_cells)
    keys, parents = (rng.integers(0, 256, (5, 32), np.uint8) for _ in range(2))
    parents[2] = 0
    sums = rng.integers(0, 1 << 63, (5, n_cells), np.uint64)
    put_ids, positions = [bytes([i]) * 16 for i in range(5)], np.array([0, 1, -1, 9, 7], np.int32)
    packed = pack_many(
        namespace=7,
        keys=keys,
        put_ids=b"".join(put_ids),
        length=999,
        checksums=sums,
        parents=parents,
        positions=positions,
    )
    for i, position in enumerate(positions.tolist()):
        header = BlockHeader(
            namespace=7,
            key=keys[i].tobytes(),
            put_id=put_ids[i],
            length=999,
            checksums=sums[i],
            parent=None if i == 2 else parents[i].tobytes(),
            position=None if position < 0 else position,
        )
        assert packed[i].tobytes() == pack(header)


@pytest.mark.parametrize("n_cells", [1, 2, 17, 250])
def test_many_headers_are_read_as_one_is(n_cells: int) -> None:
    """Sound ones say what `unpack` says, and one with any bit of it changed is not sound."""
    rng = np.random.default_rng(n_cells)
    whole = [
        BlockHeader(
            namespace=7,
            key=rng.bytes(32),
            put_id=rng.bytes(16),
            length=n_cells * 8,
            checksums=rng.integers(0, 1 << 63, n_cells, np.uint64),
            parent=rng.bytes(32) if i % 2 else None,
            position=i if i % 2 else None,
        )
        for i in range(40)
    ]
    packed = np.array([np.frombuffer(pack(one), np.uint8) for one in whole])
    used = 104 + 8 * n_cells + 8
    bits = rng.integers(0, 8 * used, len(packed))
    bits[:2], bits[2:4] = (8 * used - 1, 0), (64, 96)  # its own checksum, magic, number of cells
    broken = packed.copy()
    broken[np.arange(len(packed)), bits // 8] ^= (1 << bits % 8).astype(np.uint8)
    both = np.concatenate((packed, broken))
    addresses = np.array([row.ctypes.data for row in both], np.uint64)
    copied = copied_headers(addresses, n_cells)
    np.testing.assert_array_equal(copied, both)
    headers = read_headers(copied, n_cells)
    assert headers.sound.tolist() == [True] * len(packed) + [False] * len(broken)
    for i, one in enumerate(whole):
        assert headers.fields["key"][i].tobytes() == one.key
        assert headers.fields["length"][i] == one.length
        np.testing.assert_array_equal(headers.checksums[i], one.checksums)
        assert headers.own[i] == int.from_bytes(pack(one)[used - 8 : used], "little")
    assert not read_headers(copied, n_cells + 1).sound.any()
