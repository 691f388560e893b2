"""Tests of kvstore.nvme.format and slots: golden bytes, round trips, damage, every error."""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import xxhash
from hypothesis import example, given
from hypothesis import strategies as st

from kvstore import block, limits
from kvstore.block import BlockHeader
from kvstore.errors import Corrupted, InvalidArgument, KVStoreError, ProtocolError
from kvstore.layout import Attention, Layout
from kvstore.nvme.format import (
    ENTRY,
    LOG_RECORD,
    LOG_RECORDS,
    WHOLE_USE,
    BatchHead,
    Footer,
    Geometry,
    LogSector,
    SegmentHeader,
    Superblock,
    aligned,
    checksum_of,
    footer_granules,
    head_count,
    head_granules,
    pack_footer,
    pack_head,
    pack_log_sector,
    pack_segment_header,
    pack_superblock,
    unpack_footer,
    unpack_head,
    unpack_log_sector,
    unpack_segment_header,
    unpack_superblock,
)
from kvstore.nvme.slots import check_slot as check_one
from kvstore.nvme.slots import holds, renumber, stamp_of, stamps_of

UNIT = limits.GRANULE_BYTES
VOLUME_ID = bytes(range(16))
SUPERBLOCK = Superblock(
    volume_id=VOLUME_ID,
    geometry=Geometry(segment_granules=0x10000, n_segments=0x0203, log_granules=256),
)
HEADER = SegmentHeader(
    volume_id=VOLUME_ID,
    segment=3,
    sequence=0x0102030405060708,
    run=0x1112131415161718,
    slot_granules=5,
    name="chät",
    layout=b'{"layers":1}',
)
HEAD = BatchHead(segment=3, sequence=7, batch=2, granule=90, previous=0x2122232425262728)
FOOTER = Footer(
    segment=3, sequence=7, batches=2, header=0x3132333435363738, last=0x4142434445464748
)
SECTOR = LogSector(volume_id=VOLUME_ID, epoch=9, number=0, base=4)


def check_slot(slot: np.ndarray, key: bytes, stamp: int, layout: Layout) -> BlockHeader:
    """`check_slot`, and `holds` must say the same of every slot that it can be asked of."""
    keys, stamps = np.frombuffer(key, np.uint8).reshape(1, -1), np.array([stamp], np.uint64)
    try:
        header = check_one(slot, key, stamp, layout)
    except Corrupted:
        assert not holds([slot], keys, stamps, layout).any()
        raise
    assert holds([slot], keys, stamps, layout).all()
    return header


def _entries(n: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.void]]:
    rng = np.random.default_rng(seed)
    return np.frombuffer(rng.bytes(n * ENTRY.itemsize), ENTRY).copy()


def _records(n: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.void]]:
    rng = np.random.default_rng(seed)
    return np.frombuffer(rng.bytes(n * LOG_RECORD.itemsize), LOG_RECORD).copy()


TWO_ENTRIES = np.zeros(2, ENTRY)
TWO_ENTRIES["key"] = [[1] * 32, [2] * 32]
TWO_ENTRIES["parent"] = [[0] * 32, [1] * 32]
TWO_ENTRIES["put_id"] = [[3] * 16, [4] * 16]
TWO_ENTRIES["stamp"] = [0x5152535455565758, 0x6162636465666768]
TWO_ENTRIES["expires_ms"] = [0, 0x0000018BCFE56800]
TWO_ENTRIES["position"] = [-1, 1]
TWO_ENTRIES["granule"] = [91, 96]
TWO_ENTRIES_HEX = (
    "01" * 32 + "00" * 32 + "03" * 16 + "5857565554535251" + "00" * 8 + "ffffffff" + "5b000000"
    + "02" * 32 + "01" * 32 + "04" * 16 + "6867666564636261" + "0068e5cf8b010000" + "01000000"
    + "60000000"
)  # fmt: skip
TWO_RECORDS = np.array([(7, 3, 91), (0x0102030405060708, 4, WHOLE_USE)], LOG_RECORD)
VOLUME_HEX = VOLUME_ID.hex()

# What each structure begins with, how many granules it takes, and the checksum at its end.
GOLDEN: dict[str, tuple[Callable[[], Any], str, int, str]] = {
    "superblock": (
        lambda: pack_superblock(SUPERBLOCK),
        "4b565356" + "0100" + "0000" + VOLUME_HEX + "00000100" + "03020000" + "00010000",
        1,
        "1a5b1f35698924f7",
    ),
    "header": (
        lambda: pack_segment_header(HEADER),
        "4b565347" + "0100" + "0000" + VOLUME_HEX + "03000000" + "05000000" + "0807060504030201"
        + "1817161514131211" + "05000000" + "0c000000" + "6368c3a474" + b'{"layers":1}'.hex(),
        2,
        "1e6fc6e3ec9b614c",
    ),
    "head": (
        lambda: pack_head(HEAD, TWO_ENTRIES),
        "4b565342" + "0100" + "0000" + "02000000" + "03000000" + "02000000" + "5a000000"
        + "0700000000000000" + "2827262524232221" + TWO_ENTRIES_HEX,
        1,
        "19424c4b61918e23",
    ),
    "footer": (
        lambda: pack_footer(FOOTER, TWO_ENTRIES),
        "4b565346" + "0100" + "0000" + "02000000" + "03000000" + "02000000" + "00000000"
        + "0700000000000000" + "3837363534333231" + "4847464544434241" + TWO_ENTRIES_HEX,
        1,
        "fccc5bf53b8ad927",
    ),
    "log": (
        lambda: pack_log_sector(SECTOR, TWO_RECORDS),
        "4b56534c" + "0100" + "0000" + VOLUME_HEX + "00000000" + "04000000" + "02000000"
        + "00000000" + "0900000000000000" + "0700000000000000" + "03000000" + "5b000000"
        + "0807060504030201" + "04000000" + "ffffffff",
        1,
        "9f182ca6f1e7196d",
    ),
}  # fmt: skip
UNPACK: dict[str, Callable[[Any], Any]] = {
    "superblock": unpack_superblock,
    "header": unpack_segment_header,
    "head": unpack_head,
    "footer": unpack_footer,
    "log": unpack_log_sector,
}
KINDS = list(GOLDEN)
# Structures of several granules, so that damage to each is tried.
LARGE: dict[str, Callable[[], Any]] = {
    "superblock": GOLDEN["superblock"][0],
    "header": lambda: pack_segment_header(
        dataclasses.replace(HEADER, name="n" * 256, layout=b"l" * 4096)
    ),
    "head": lambda: pack_head(HEAD, _entries(100)),
    "footer": lambda: pack_footer(FOOTER, _entries(100)),
    "log": lambda: pack_log_sector(SECTOR, _records(LOG_RECORDS)),
}


def _resummed(raw: Any) -> Any:
    """`raw` with its checksum made right again after a change."""
    own = xxhash.xxh3_64_intdigest(raw[:-8].tobytes())
    raw[-8:] = np.frombuffer(struct.pack("<Q", own), np.uint8)
    return raw


def _with(raw: Any, at: int, new: bytes) -> Any:
    changed = raw.copy()
    changed[at : at + len(new)] = np.frombuffer(new, np.uint8)
    return _resummed(changed)


# -- structures ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_golden_bytes(kind: str) -> None:
    pack, start, granules, checksum = GOLDEN[kind]
    packed = pack()
    expected = bytes.fromhex(start).ljust(granules * UNIT - 8, b"\0") + bytes.fromhex(checksum)
    assert packed.tobytes().hex() == expected.hex()
    assert checksum_of(packed) == int.from_bytes(bytes.fromhex(checksum), "little")


def test_row_types() -> None:
    assert ENTRY.itemsize == 104
    assert LOG_RECORD.itemsize == 16
    assert {name: ENTRY.fields[name][1] for name in ENTRY.names or ()} == {  # type: ignore[index]
        "key": 0, "parent": 32, "put_id": 64, "stamp": 80, "expires_ms": 88, "position": 96,
        "granule": 100,
    }  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_packed_bytes_can_be_written_as_they_are(kind: str) -> None:
    packed = LARGE[kind]()
    assert packed.dtype == np.uint8
    assert packed.size % UNIT == 0
    assert packed.ctypes.data % UNIT == 0


u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
ids = st.binary(min_size=16, max_size=16)
geometries = st.builds(
    Geometry,
    segment_granules=st.integers(5, 2**32 - 1),
    n_segments=st.integers(1, 2**32 - 1),
    log_granules=st.integers(1, 2**32 - 1),
)


@given(st.builds(Superblock, volume_id=ids, geometry=geometries))
def test_superblock_round_trip(superblock: Superblock) -> None:
    assert unpack_superblock(pack_superblock(superblock)) == superblock


@given(
    st.builds(
        SegmentHeader,
        volume_id=ids,
        segment=u32,
        sequence=u64,
        run=u64,
        slot_granules=st.integers(1, 2**32 - 1),
        name=st.text(min_size=1, max_size=64),
        layout=st.binary(min_size=1, max_size=4096),
    )
)
def test_segment_header_round_trip(header: SegmentHeader) -> None:
    assert unpack_segment_header(pack_segment_header(header)) == header


def test_the_longest_header_fits() -> None:
    header = dataclasses.replace(HEADER, name="n" * 256, layout=b"l" * 4096)
    assert unpack_segment_header(pack_segment_header(header)) == header


@given(
    st.builds(BatchHead, segment=u32, sequence=u64, batch=u32, granule=u32, previous=u64),
    st.integers(1, 130),
)
def test_batch_head_round_trip(head: BatchHead, n: int) -> None:
    packed = pack_head(head, _entries(n, n))
    assert len(packed) == head_granules(n) * UNIT
    assert head_count(packed[:UNIT]) == n
    found, entries = unpack_head(packed)
    assert found == head
    assert entries.tobytes() == _entries(n, n).tobytes()


@given(
    st.builds(Footer, segment=u32, sequence=u64, batches=u32, header=u64, last=u64),
    st.integers(0, 130),
    st.integers(0, 2),
)
def test_footer_round_trip(footer: Footer, n: int, more: int) -> None:
    packed = pack_footer(footer, _entries(n, n))
    assert len(packed) == footer_granules(n) * UNIT
    # What an older and longer footer left behind it is no part of it.
    found, entries = unpack_footer(np.concatenate([packed, np.full(more * UNIT, 255, np.uint8)]))
    assert found == footer
    assert entries.tobytes() == _entries(n, n).tobytes()


@given(
    st.builds(LogSector, volume_id=ids, epoch=st.integers(1, 2**64 - 1), number=u32),
    st.integers(0, LOG_RECORDS),
)
def test_log_sector_round_trip(sector: LogSector, n: int) -> None:
    found, records = unpack_log_sector(pack_log_sector(sector, _records(n, n)))
    assert found == sector
    assert records.tobytes() == _records(n, n).tobytes()


def test_rows_may_lie_apart_in_memory() -> None:
    every_other = _entries(6)[::2]
    assert unpack_head(pack_head(HEAD, every_other))[1].tobytes() == every_other.tobytes()


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview, lambda raw: raw])
@pytest.mark.parametrize("kind", KINDS)
def test_unpackers_take_any_buffer(kind: str, form: Callable[[Any], Any]) -> None:
    UNPACK[kind](form(GOLDEN[kind][0]()))


# -- damage ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_any_flipped_bit_is_found(kind: str) -> None:
    packed = LARGE[kind]()
    bits = {*range(64 * 8), *range((len(packed) - 16) * 8, len(packed) * 8)}
    bits.update(random.Random(kind).sample(range(len(packed) * 8), 2000))
    for bit in sorted(bits):
        packed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(ProtocolError if bit < 48 else Corrupted):
            UNPACK[kind](packed)
        packed[bit // 8] ^= 1 << bit % 8
    UNPACK[kind](packed)


@pytest.mark.parametrize("kind", KINDS)
def test_truncation(kind: str) -> None:
    packed = LARGE[kind]()
    for size in {0, 1, 7, UNIT - 1, len(packed) - UNIT, len(packed) - 1}:
        with pytest.raises(Corrupted, match="cut short"):
            UNPACK[kind](packed[:size])


@pytest.mark.parametrize("kind", KINDS)
def test_torn_and_zeroed_granules(kind: str) -> None:
    packed = LARGE[kind]()
    for granule in range(len(packed) // UNIT):
        torn = packed.copy()
        torn[granule * UNIT : (granule + 1) * UNIT] = 0
        with pytest.raises((Corrupted, ProtocolError)):
            UNPACK[kind](torn)


@pytest.mark.parametrize(
    ("at", "new", "message"),
    [(0, b"KVS?", "magic"), (4, b"\2\0", "version"), (6, b"\1\0", "flags")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_unknown_forms(kind: str, at: int, new: bytes, message: str) -> None:
    with pytest.raises(ProtocolError, match=message):
        UNPACK[kind](_with(GOLDEN[kind][0](), at, new))


@pytest.mark.parametrize(
    ("kind", "at", "new"),
    [
        ("superblock", 24, b"\4\0\0\0"),  # segments that hold nothing
        ("superblock", 28, b"\0\0\0\0"),  # no segment
        ("superblock", 32, b"\0\0\0\0"),  # no log
        ("header", 28, b"\0\0\0\0"),  # slots of nothing
        ("header", 48, b"\0\0\0\0"),  # no name
        ("header", 48, b"\1\1\0\0"),  # a name over the limit
        ("header", 52, b"\0\0\0\0"),  # no layout
        ("header", 52, b"\1\x10\0\0"),  # a layout over the limit
        ("header", 56, b"\xff"),  # a name that is no utf-8
        ("log", 24, b"\1\0\0\0"),  # a base in another sector than the first
        ("log", 32, struct.pack("<I", LOG_RECORDS + 1)),
        ("log", 40, bytes(8)),  # epoch 0
    ],
)
def test_sound_bytes_without_a_meaning(kind: str, at: int, new: bytes) -> None:
    with pytest.raises(ProtocolError):
        UNPACK[kind](_with(GOLDEN[kind][0](), at, new))


def test_a_head_without_a_block_is_none() -> None:
    with pytest.raises(Corrupted, match="no block"):
        head_count(_with(GOLDEN["head"][0](), 8, bytes(4)))


@pytest.mark.parametrize("kind", ["head", "footer"])
def test_an_impossible_count_reads_nothing_behind_the_buffer(kind: str) -> None:
    with pytest.raises(Corrupted, match="cut short"):
        UNPACK[kind](_with(GOLDEN[kind][0](), 8, b"\xff" * 4))


@pytest.mark.parametrize("kind", KINDS)
def test_random_bytes(kind: str) -> None:
    magic = bytes.fromhex(GOLDEN[kind][1][:16])
    rng = np.random.default_rng(0)
    for _ in range(50):
        raw = rng.integers(0, 256, 4 * UNIT, np.uint8)
        for at in (0, len(magic)):
            raw[:at] = np.frombuffer(magic[:at], np.uint8)
            with pytest.raises((Corrupted, ProtocolError)):
                UNPACK[kind](raw)


# -- wrong arguments -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "field", "wrong"),
    [
        (SUPERBLOCK, "volume_id", b"short"),
        (HEADER, "volume_id", "0123456789abcdef"),
        (HEADER, "segment", -1),
        (HEADER, "sequence", 1 << 64),
        (HEADER, "run", 1.0),
        (HEADER, "slot_granules", 0),
        (HEADER, "name", ""),
        (HEADER, "name", "ä" * 129),
        (HEADER, "layout", b""),
        (HEADER, "layout", bytes(4097)),
        (HEAD, "segment", 1 << 32),
        (HEAD, "sequence", -1),
        (HEAD, "batch", True),
        (HEAD, "granule", -1),
        (HEAD, "previous", 1 << 64),
        (FOOTER, "segment", -1),
        (FOOTER, "batches", 1 << 32),
        (FOOTER, "header", -1),
        (FOOTER, "last", None),
        (SECTOR, "volume_id", b""),
        (SECTOR, "epoch", 0),
        (SECTOR, "number", 1),  # with a base
        (SECTOR, "base", -1),
        (SUPERBLOCK.geometry, "segment_granules", 4),
        (SUPERBLOCK.geometry, "segment_granules", 1 << 32),
        (SUPERBLOCK.geometry, "n_segments", 0),
        (SUPERBLOCK.geometry, "log_granules", 0),
    ],
)
def test_wrong_fields(value: Any, field: str, wrong: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        dataclasses.replace(value, **{field: wrong})
    assert caught.value.field == ("base" if (value, field) == (SECTOR, "number") else field)


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda: pack_head(HEAD, _entries(0)), "entries"),
        (lambda: pack_head(HEAD, _records(1)), "entries"),
        (lambda: pack_footer(FOOTER, _entries(4).reshape(2, 2)), "entries"),
        (lambda: pack_log_sector(SECTOR, _records(LOG_RECORDS + 1)), "records"),
        (lambda: pack_log_sector(SECTOR, _entries(1)), "records"),
        (lambda: unpack_superblock(3), "buffer"),  # type: ignore[arg-type]
        (lambda: unpack_superblock(np.zeros((64, 128), np.uint8)[::2]), "buffer"),
        (lambda: aligned(-1), "nbytes"),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        call()
    assert caught.value.field == field


@pytest.mark.parametrize("nbytes", [0, 1, UNIT, 3 << 20])
def test_aligned(nbytes: int) -> None:
    raw = aligned(nbytes)
    assert raw.shape == (nbytes,)
    assert raw.ctypes.data % UNIT == 0 or not nbytes
    assert not raw.any()


# -- geometry --------------------------------------------------------------------------


def test_where_things_lie() -> None:
    geometry = Geometry.for_volume(nbytes=100 << 30, segment_bytes=256 << 20)
    assert geometry == Geometry(segment_granules=65536, n_segments=399, log_granules=256)
    assert geometry.log_offset(0, 0) == 2 * UNIT
    assert geometry.log_offset(1, 255) == 513 * UNIT
    assert geometry.first_granule == 1024
    assert geometry.offset(0) == 4 << 20
    assert geometry.offset(398, 65535) + UNIT == geometry.nbytes == (4 << 20) + 399 * (256 << 20)


@given(
    segment_granules=st.integers(5, 1 << 20),
    n_segments=st.integers(1, 100_000),
    log_granules=st.integers(1, 5000),
    spare=st.integers(0, 1 << 40),
)
def test_volumes_are_used_whole(
    segment_granules: int, n_segments: int, log_granules: int, spare: int
) -> None:
    made = Geometry(
        segment_granules=segment_granules, n_segments=n_segments, log_granules=log_granules
    )
    assert made.log_offset(1, log_granules - 1) + UNIT <= made.offset(0)
    assert made.offset(0) % (1024 * UNIT) == 0
    assert made.offset(n_segments - 1, segment_granules - 1) + UNIT == made.nbytes
    segment_bytes = segment_granules * UNIT
    more = made.nbytes + spare % segment_bytes
    args = {"segment_bytes": segment_bytes, "log_granules": log_granules}
    assert Geometry.for_volume(nbytes=more, **args) == made
    if n_segments == 1:
        with pytest.raises(InvalidArgument) as caught:
            Geometry.for_volume(nbytes=made.nbytes - 1, **args)
        assert caught.value.field == "nbytes"


@example(segment_granules=45, slot_granules=1)  # 39 slots: one more than a granule lists
@given(segment_granules=st.integers(5, 1 << 18), slot_granules=st.integers(1, 1 << 15))
def test_a_segment_holds_as_many_slots_as_fit(segment_granules: int, slot_granules: int) -> None:
    geometry = Geometry(segment_granules=segment_granules, n_segments=1)

    def used(n: int) -> int:
        return 2 + head_granules(n) + n * slot_granules + footer_granules(n)

    most = geometry.slots(slot_granules)
    assert used(most + 1) > segment_granules
    if not most:
        with pytest.raises(InvalidArgument) as caught:
            geometry.footer_granule(slot_granules)
        assert caught.value.field == "slot_granules"
        return
    assert used(most) <= segment_granules
    # However the slots are divided in batches, what the footer has to list fits behind them.
    footer = geometry.footer_granule(slot_granules)
    assert geometry.footer_granules(slot_granules) == footer_granules(most)
    assert footer + footer_granules(most) == segment_granules
    assert 2 + head_granules(most) + most * slot_granules <= footer


def test_sizes_of_heads() -> None:
    assert [head_granules(n) for n in (0, 1, 38, 39)] == [1, 1, 1, 2]
    assert [footer_granules(n) for n in (0, 38, 39)] == [1, 1, 2]
    assert len(pack_head(HEAD, _entries(38))) == UNIT
    assert len(pack_head(HEAD, _entries(39))) == 2 * UNIT
    assert LOG_RECORDS == 252


@pytest.mark.parametrize(
    ("call", "field"),
    [
        (lambda g: g.offset(-1), "segment"),
        (lambda g: g.offset(0x203), "segment"),
        (lambda g: g.offset(0, -1), "granule"),
        (lambda g: g.offset(0, 0x10000), "granule"),
        (lambda g: g.log_offset(2, 0), "half"),
        (lambda g: g.log_offset(-1, 0), "half"),
        (lambda g: g.log_offset(0, 256), "number"),
        (lambda g: g.log_offset(0, -1), "number"),
        (lambda g: g.slots(0), "slot_granules"),
        (lambda g: g.slots(1.0), "slot_granules"),
        (lambda g: Geometry.for_volume(nbytes=1 << 30, segment_bytes=0), "segment_bytes"),
        (lambda g: Geometry.for_volume(nbytes=1 << 30, segment_bytes=UNIT + 1), "segment_bytes"),
        (lambda g: Geometry.for_volume(nbytes=1 << 30, segment_bytes=UNIT), "segment_granules"),
        (lambda g: Geometry.for_volume(nbytes=4 << 20, segment_bytes=1 << 20), "nbytes"),
        (lambda g: Geometry.for_volume(nbytes=-1, segment_bytes=1 << 20), "nbytes"),
    ],
)
def test_wrong_places(call: Callable[[Geometry], Any], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        call(SUPERBLOCK.geometry)
    assert caught.value.field == field


# -- slots -----------------------------------------------------------------------------

LAYOUT = Layout(
    model="m",
    attention=Attention.GQA,
    layers=2,
    kv_heads=3,
    head_dim=8,
    dtype="float16",
    block_tokens=16,
)
PAYLOAD_AT = block.header_bytes(LAYOUT.n_cells)


def _slot(seed: int = 0, layout: Layout = LAYOUT, **changes: Any) -> Any:
    """A block in a slot, with its key and stamp."""
    rng = np.random.default_rng(seed)
    payload = rng.integers(0, 256, layout.block_bytes, np.uint8)
    fields = {
        "namespace": 5,
        "key": rng.bytes(32),
        "put_id": rng.bytes(16),
        "length": layout.block_bytes,
        "checksums": block.cell_checksums(payload, layout.cell_bounds),
        "parent": None,
        "position": 3,
    }
    header = block.BlockHeader(**{**fields, **changes})
    packed = np.frombuffer(block.pack(header), np.uint8)
    slot = aligned(-(-(len(packed) + len(payload)) // UNIT) * UNIT)
    slot[: len(packed)] = packed
    slot[len(packed) : len(packed) + len(payload)] = payload
    return slot, header, stamp_of(slot)


@pytest.mark.parametrize("seed", range(3))
def test_a_sound_slot(seed: int) -> None:
    slot, header, stamp = _slot(seed)
    assert check_slot(slot, header.key, stamp, LAYOUT) == header
    end = 104 + 8 * LAYOUT.n_cells
    assert stamp == xxhash.xxh3_64_intdigest(slot[:end].tobytes())


def test_any_flipped_bit_of_a_slot_is_found() -> None:
    slot, header, stamp = _slot()
    end = 104 + 8 * LAYOUT.n_cells + 8
    used = [*range(end), *range(PAYLOAD_AT, PAYLOAD_AT + LAYOUT.block_bytes)]
    rng = random.Random(1)
    for at in [*range(end), *rng.sample(used, 500)]:
        mask = 1 << rng.randrange(8)
        slot[at] ^= mask
        with pytest.raises(Corrupted):
            check_slot(slot, header.key, stamp, LAYOUT)
        slot[at] ^= mask
    check_slot(slot, header.key, stamp, LAYOUT)


def test_torn_slots() -> None:
    slot, header, stamp = _slot()
    old, _, _ = _slot(1)
    for granule in range(len(slot) // UNIT):
        for left in (np.zeros(UNIT, np.uint8), old[granule * UNIT : (granule + 1) * UNIT]):
            torn = slot.copy()
            torn[granule * UNIT : (granule + 1) * UNIT] = left
            with pytest.raises(Corrupted):
                check_slot(torn, header.key, stamp, LAYOUT)


def test_another_sound_block_in_the_slot() -> None:
    _, header, stamp = _slot()
    other_slot, other, other_stamp = _slot(1)
    with pytest.raises(Corrupted, match="another block"):
        check_slot(other_slot, header.key, stamp, LAYOUT)
    with pytest.raises(Corrupted, match="another block"):
        check_slot(other_slot, other.key, stamp, LAYOUT)
    with pytest.raises(Corrupted, match="another key"):
        check_slot(other_slot, header.key, other_stamp, LAYOUT)
    same_key, again, _ = _slot(1, put_id=bytes(16))
    assert again.key == other.key
    with pytest.raises(Corrupted, match="another block"):
        check_slot(same_key, other.key, other_stamp, LAYOUT)


def test_a_block_of_another_layout() -> None:
    small = dataclasses.replace(LAYOUT, block_tokens=8)
    fewer = dataclasses.replace(LAYOUT, heads_per_cell=3)
    for layout in (small, fewer):
        slot, header, stamp = _slot(0, layout)
        room = aligned(2 * len(slot))
        room[: len(slot)] = slot
        check_slot(room, header.key, stamp, layout)
        with pytest.raises(Corrupted, match="the layout says"):
            check_slot(room, header.key, stamp, LAYOUT)


def test_a_slot_that_is_too_small() -> None:
    slot, header, stamp = _slot()
    with pytest.raises(InvalidArgument) as caught:
        check_slot(slot[: PAYLOAD_AT + LAYOUT.block_bytes - 1], header.key, stamp, LAYOUT)
    assert caught.value.field == "slot"
    with pytest.raises(InvalidArgument):
        check_slot(slot.reshape(-1, UNIT), header.key, stamp, LAYOUT)


@pytest.mark.parametrize("n_cells", [0, 257, 2**32 - 1])
def test_stamp_of_no_header(n_cells: int) -> None:
    slot, _, _ = _slot()
    slot[8:12] = np.frombuffer(struct.pack("<I", n_cells), np.uint8)
    with pytest.raises(Corrupted):
        stamp_of(slot)
    with pytest.raises(Corrupted):
        stamp_of(slot[:103])
    with pytest.raises(Corrupted):
        stamp_of(_slot()[0][: 104 + 8 * LAYOUT.n_cells + 7])


@pytest.mark.parametrize("n_cells", [1, 18, 19, 256])
def test_stamps_of_packed_headers(n_cells: int) -> None:
    n = 20
    rng = np.random.default_rng(n_cells)
    packed = block.pack_many(
        namespace=3,
        keys=rng.integers(0, 256, (n, 32), np.uint8),
        put_ids=rng.bytes(16 * n),
        length=100,
        checksums=rng.integers(0, 2**64, (n, n_cells), np.uint64),
        parents=np.zeros((n, 32), np.uint8),
        positions=np.arange(n, dtype=np.int32),
    )
    expected = [stamp_of(row) for row in packed]
    assert stamps_of(packed).tolist() == expected
    assert stamps_of(packed).dtype == np.uint64
    pool = np.zeros((n, 2 * UNIT), np.uint8)
    pool[:, : packed.shape[1]] = packed
    assert stamps_of(pool[:, : packed.shape[1]]).tolist() == expected
    assert stamps_of(pool[::2]).tolist() == expected[::2]
    assert stamps_of(packed[:0]).tolist() == []


def test_stamps_of_damaged_headers_are_some_numbers() -> None:
    rows = np.random.default_rng(0).integers(0, 256, (50, 256), np.uint8)
    rows[0, 8:12] = 255
    assert stamps_of(rows).shape == (50,)
    with pytest.raises(InvalidArgument):
        stamps_of(rows[:, :119])


def test_renumber() -> None:
    slot, header, stamp = _slot()
    before = slot.copy()
    new = renumber(slot, 0xFFFFFFFF)
    assert new == stamp_of(slot) != stamp
    expected = dataclasses.replace(header, namespace=0xFFFFFFFF)
    assert check_slot(slot, header.key, new, LAYOUT) == expected
    assert renumber(slot, header.namespace) == stamp
    assert (slot == before).all()


@pytest.mark.parametrize("at", [0, 4, 16, 30, 110])
def test_renumber_leaves_what_is_not_sound(at: int) -> None:
    slot, _, _ = _slot()
    slot[at] ^= 1
    before = slot.copy()
    with pytest.raises(KVStoreError):
        renumber(slot, 7)
    assert (slot == before).all()


def test_renumber_to_no_namespace() -> None:
    slot, _, stamp = _slot()
    with pytest.raises(InvalidArgument):
        renumber(slot, -1)
    assert stamp_of(slot) == stamp
