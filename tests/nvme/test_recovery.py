"""Tests of kvstore.nvme.recovery: what comes back after restarts, crashes and damage, and what
must not."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from kvstore import block, limits
from kvstore.errors import Corrupted, InvalidArgument, ProtocolError
from kvstore.layout import Layout
from kvstore.nvme import recovery
from kvstore.nvme.forget_log import read_log
from kvstore.nvme.format import (
    ENTRY,
    FLOOR,
    LOG_RECORD,
    WHOLE_USE,
    BatchHead,
    Footer,
    Geometry,
    LogSector,
    SegmentHeader,
    Superblock,
    aligned,
    checksum_of,
    head_granules,
    pack_footer,
    pack_head,
    pack_log_sector,
    pack_segment_header,
    pack_superblock,
)
from kvstore.nvme.recovery import (
    Log,
    RecoveredSegment,
    Survey,
    highest_sequence,
    recover,
    survey,
)
from kvstore.nvme.slots import check_slot, stamp_of
from kvstore.nvme.superblock import read_superblock

UNIT = limits.GRANULE_BYTES
GEOMETRY = Geometry(segment_granules=48, n_segments=6, log_granules=6)
VOLUME = Superblock(volume_id=b"volume number 01", geometry=GEOMETRY)
OTHER_VOLUME = dataclasses.replace(VOLUME, volume_id=b"volume number 02")
LAYOUT = Layout.opaque(model="m", block_bytes=5000, block_tokens=16)
SLOT = 2  # granules
FOOTER_AT = GEOMETRY.footer_granule(SLOT)


class MemoryDisk:
    """Bytes in memory. Reads that touch a granule of `broken` fail; `reads` lists the others."""

    def __init__(self, nbytes: int = GEOMETRY.nbytes) -> None:
        self.data = np.zeros(nbytes, np.uint8)
        self.broken: set[int] = set()
        self.reads: list[range] = []

    @property
    def nbytes(self) -> int:
        return len(self.data)

    def read(self, offset: int, buffers: Sequence[Any]) -> None:
        for at, raw in self._pieces(offset, buffers):
            granules = range(at // UNIT, (at + len(raw)) // UNIT)
            if self.broken.intersection(granules):
                raise OSError(errno.EIO, "Input/output error")
            self.reads.append(granules)
            raw[:] = self.data[at : at + len(raw)]

    def write(self, offset: int, buffers: Sequence[Any]) -> None:
        for at, raw in self._pieces(offset, buffers):
            self.data[at : at + len(raw)] = raw

    def sync(self) -> None:
        pass

    def _pieces(self, offset: int, buffers: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        for raw in buffers:
            assert offset % UNIT == len(raw) % UNIT == raw.ctypes.data % UNIT == 0
            assert 0 <= offset <= self.nbytes - len(raw)
            yield offset, raw
            offset += len(raw)

    def flip(self, byte: int, bit: int = 0) -> None:
        self.data[byte] ^= 1 << bit


def _slot(key: bytes, *, salt: int = 0, layout: Layout = LAYOUT, granules: int = SLOT) -> Any:
    """A sound block of this key; another salt makes other bytes."""
    rng = np.random.default_rng([*key[:8], salt])
    payload = rng.integers(0, 256, layout.block_bytes, np.uint8)
    header = block.pack_parts(
        namespace=salt,
        key=key,
        put_id=rng.bytes(16),
        length=layout.block_bytes,
        checksums=block.cell_checksums(payload, layout.cell_bounds),
        parent=bytes(32),
        position=-1,
    )
    slot = aligned(granules * UNIT)
    slot[: len(header)] = np.frombuffer(header, np.uint8)
    slot[len(header) : len(header) + len(payload)] = payload
    return slot


def _key(name: int | str) -> bytes:
    return str(name).encode().ljust(32, b".")


class Writer:
    """Writes one use of a segment, or goes on with a recovered one."""

    def __init__(
        self,
        disk: Any,
        segment: int,
        sequence: int,
        *,
        run: int = 1,
        volume: Superblock = VOLUME,
        layout: Layout = LAYOUT,
        slot: int = SLOT,
        name: str = "space",
    ) -> None:
        self.disk, self.segment, self.sequence, self.slot = disk, segment, sequence, slot
        self.layout, self.geometry = layout, volume.geometry
        header = pack_segment_header(
            SegmentHeader(
                volume_id=volume.volume_id,
                segment=segment,
                sequence=sequence,
                run=run,
                slot_granules=slot,
                name=name,
                layout=layout.encode(),
            )
        )
        self._write(0, [header])
        self.at, self.batches = 2, 0
        self.header = self.last = checksum_of(header)
        self.entries: list[Any] = []

    @classmethod
    def again(cls, disk: Any, found: RecoveredSegment) -> Writer:
        writer = cls.__new__(cls)
        writer.disk, writer.segment, writer.sequence = disk, found.segment, found.sequence
        writer.layout, writer.geometry = LAYOUT, GEOMETRY
        writer.slot, writer.at, writer.batches = (
            found.slot_granules,
            found.next_granule,
            found.batches,
        )
        writer.header, writer.last = found.header, found.last
        writer.entries = [found.entries]
        return writer

    def room(self, n: int) -> bool:
        end = self.geometry.footer_granule(self.slot)
        return self.at + head_granules(n) + n * self.slot <= end

    def batch(self, names: Sequence[Any], *, salt: int = 0) -> Any:
        """Writes a head and its slots; returns the entries."""
        slots = [
            _slot(_key(name), salt=salt, layout=self.layout, granules=self.slot) for name in names
        ]
        first = self.at + head_granules(len(names))
        entries = np.zeros(len(names), ENTRY)
        entries["key"] = [np.frombuffer(_key(name), np.uint8) for name in names]
        entries["stamp"] = [stamp_of(slot) for slot in slots]
        entries["granule"] = first + np.arange(len(names)) * self.slot
        entries["position"] = -1
        head = pack_head(
            BatchHead(
                segment=self.segment,
                sequence=self.sequence,
                batch=self.batches,
                granule=self.at,
                previous=self.last,
            ),
            entries,
        )
        self._write(self.at, [head, *slots])
        self.last, self.batches = checksum_of(head), self.batches + 1
        self.at = first + len(names) * self.slot
        self.entries.append(entries)
        return entries

    def footer(self, **changes: Any) -> Any:
        """Writes the footer; returns all entries."""
        entries = np.concatenate(self.entries) if self.entries else np.empty(0, ENTRY)
        fields = {
            "segment": self.segment,
            "sequence": self.sequence,
            "batches": self.batches,
            "header": self.header,
            "last": self.last,
        }
        footer = Footer(**{**fields, **changes})
        self._write(self.geometry.footer_granule(self.slot), [pack_footer(footer, entries)])
        return entries

    def _write(self, granule: int, buffers: Sequence[Any]) -> None:
        self.disk.write(self.geometry.offset(self.segment, granule), buffers)


def _records(*records: tuple[int, int, int]) -> Any:
    """Log records from (segment, sequence, granule)."""
    rows = np.zeros(len(records), LOG_RECORD)
    for row, record in zip(rows, records, strict=True):
        row["segment"], row["sequence"], row["granule"] = record
    return rows


def _log(
    disk: Any,
    half: int,
    number: int,
    *records: tuple[int, int, int],
    epoch: int = 1,
    base: int = 0,
    volume_id: bytes = VOLUME.volume_id,
    says: int | None = None,
) -> None:
    """Writes a sector of the log. says: its number, if not the place where it lies."""
    sector = LogSector(
        volume_id=volume_id, epoch=epoch, number=number if says is None else says, base=base
    )
    disk.write(GEOMETRY.log_offset(half, number), [pack_log_sector(sector, _records(*records))])


def _never() -> bool:
    return False


def _survey(disk: Any) -> Survey:
    found = survey(disk, VOLUME, stop=_never)
    assert found is not None
    return found


def _recovered(disk: Any) -> list[RecoveredSegment]:
    return list(recover(disk, VOLUME, stop=_never))


def _only(disk: Any) -> RecoveredSegment:
    (found,) = _recovered(disk)
    return found


def _names(found: RecoveredSegment) -> list[str]:
    return [key.tobytes().rstrip(b".").decode() for key in found.entries["key"]]


def _granule(segment: int, granule: int) -> int:
    return GEOMETRY.offset(segment, granule) // UNIT


@pytest.fixture
def disk() -> MemoryDisk:
    disk = MemoryDisk()
    for copy in range(2):
        disk.write(copy * UNIT, [pack_superblock(VOLUME)])
    return disk


# -- superblock ------------------------------------------------------------------------


def test_a_volume_that_was_never_formatted() -> None:
    assert read_superblock(MemoryDisk()) is None
    assert read_superblock(MemoryDisk(UNIT)) is None


@pytest.mark.parametrize("bad", [0, 1])
@pytest.mark.parametrize("harm", ["flip", "zero", "version", "broken", "other"])
def test_one_sound_superblock_is_enough(disk: MemoryDisk, bad: int, harm: str) -> None:
    copy = disk.data[bad * UNIT : (bad + 1) * UNIT]
    match harm:
        case "flip":
            disk.flip(bad * UNIT + 30)
        case "zero":
            copy[:] = 0
        case "version":
            copy[4] = 9
        case "broken":
            disk.broken = {bad}
        case "other":
            copy[:] = 7
    assert read_superblock(disk) == VOLUME


@pytest.mark.parametrize(
    ("first", "second", "error"),
    [
        ("flip", "flip", Corrupted),
        ("flip", "zero", Corrupted),
        ("zero", "flip", Corrupted),
        ("flip", "other", Corrupted),
        ("version", "version", ProtocolError),
        ("version", "zero", ProtocolError),
        ("other", "other", ProtocolError),
        ("zero", "other", ProtocolError),
        ("broken", "zero", OSError),
        ("flip", "broken", OSError),
    ],
)
def test_no_sound_superblock(
    disk: MemoryDisk, first: str, second: str, error: type[Exception]
) -> None:
    for copy, harm in enumerate((first, second)):
        raw = disk.data[copy * UNIT : (copy + 1) * UNIT]
        match harm:
            case "flip":
                raw[4000] ^= 1
            case "zero":
                raw[:] = 0
            case "version":
                raw[4] = 9
            case "other":
                raw[:] = 7
            case "broken":
                disk.broken.add(copy)
    with pytest.raises(error):
        read_superblock(disk)


def test_a_volume_that_was_cut_short(disk: MemoryDisk) -> None:
    disk.data = disk.data[:-UNIT]
    with pytest.raises(Corrupted, match="bytes"):
        read_superblock(disk)


def test_a_disk_that_grew(disk: MemoryDisk) -> None:
    disk.data = np.concatenate([disk.data, np.zeros(10 * UNIT, np.uint8)])
    assert read_superblock(disk) == VOLUME


# -- log -------------------------------------------------------------------------------


def _triples(log: Log) -> list[tuple[int, int, int]]:
    return [(int(r["segment"]), int(r["sequence"]), int(r["granule"])) for r in log.records]


def _state(log: Log) -> tuple[int, int, int, int]:
    return log.half, log.epoch, log.next_number, log.next_epoch


def test_a_log_that_was_never_begun(disk: MemoryDisk) -> None:
    log = read_log(disk, VOLUME)
    assert _state(log) == (0, 0, 0, 1)
    assert _triples(log) == []


@pytest.mark.parametrize("half", [0, 1])
def test_sectors_follow_each_other(disk: MemoryDisk, half: int) -> None:
    for number in range(3):
        _log(disk, half, number, (1, 2, number), (3, 4, number), epoch=5)
    log = read_log(disk, VOLUME)
    assert _state(log) == (half, 5, 3, 6)
    assert _triples(log) == [(s, q, n) for n in range(3) for s, q in ((1, 2), (3, 4))]


def test_a_full_half(disk: MemoryDisk) -> None:
    for number in range(6):
        _log(disk, 0, number, (number, 1, 1))
    assert _state(read_log(disk, VOLUME)) == (0, 1, 6, 2)


@pytest.mark.parametrize(
    "harm",
    [
        lambda disk: disk.flip(GEOMETRY.log_offset(0, 1) + 60),
        lambda disk: disk.data[GEOMETRY.log_offset(0, 1) :][:UNIT].fill(0),
        lambda disk: _log(disk, 0, 1, (9, 9, 9), epoch=4),  # of an earlier use of the half
        lambda disk: _log(disk, 0, 1, (9, 9, 9), epoch=5, says=2),
        lambda disk: _log(disk, 0, 1, (9, 9, 9), epoch=5, volume_id=OTHER_VOLUME.volume_id),
    ],
)
def test_the_log_ends_before_the_first_sector_that_is_not_valid(
    disk: MemoryDisk, harm: Callable[[MemoryDisk], None]
) -> None:
    for number in range(3):
        _log(disk, 0, number, (1, 2, number), epoch=5)
    harm(disk)
    log = read_log(disk, VOLUME)
    assert _state(log) == (0, 5, 1, 6)
    assert _triples(log) == [(1, 2, 0)]


def test_the_half_with_the_highest_epoch_holds(disk: MemoryDisk) -> None:
    _log(disk, 0, 0, (1, 1, 1), epoch=7)
    _log(disk, 1, 0, (2, 2, 2), epoch=6)
    assert _triples(read_log(disk, VOLUME)) == [(1, 1, 1)]
    _log(disk, 1, 0, (3, 3, 3), epoch=8)
    assert _triples(read_log(disk, VOLUME)) == [(3, 3, 3)]


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_half_written_half_is_void(disk: MemoryDisk, missing: int) -> None:
    _log(disk, 0, 0, (1, 1, 1), epoch=3)
    _log(disk, 0, 1, (2, 2, 2), epoch=3)
    for number in {0, 1, 2} - {missing}:
        _log(disk, 1, number, (3, 3, number), epoch=4, base=0 if number else 2)
    log = read_log(disk, VOLUME)
    assert _triples(log) == [(1, 1, 1), (2, 2, 2)]
    # Not 4: what is left of that half would else be valid again.
    assert _state(log) == (0, 3, 2, 5)
    _log(disk, 1, missing, (3, 3, missing), epoch=4, base=0 if missing else 2)
    assert _state(read_log(disk, VOLUME)) == (1, 4, 3, 5)


def test_an_unreadable_log_is_no_empty_log(disk: MemoryDisk) -> None:
    Writer(disk, 0, 1).batch("a")
    for half in range(2):
        disk.broken = {GEOMETRY.log_offset(half, 3) // UNIT}
        with pytest.raises(OSError):
            read_log(disk, VOLUME)
        with pytest.raises(OSError):
            survey(disk, VOLUME, stop=_never)
        with pytest.raises(OSError):
            _recovered(disk)


# -- whole segments --------------------------------------------------------------------


def test_an_empty_volume(disk: MemoryDisk) -> None:
    assert _recovered(disk) == []
    assert _survey(disk).problems == []
    assert highest_sequence(_survey(disk)) == 0


def test_a_whole_segment_by_its_footer(disk: MemoryDisk) -> None:
    writer = Writer(disk, 2, 9, name="tenant/a")
    writer.batch("abc")
    writer.batch("d")
    entries = writer.footer()
    disk.reads.clear()
    found = _only(disk)
    assert found.entries.tobytes() == entries.tobytes()
    assert (found.segment, found.sequence, found.slot_granules) == (2, 9, SLOT)
    assert (found.name, found.layout) == ("tenant/a", LAYOUT.encode())
    assert (found.whole, found.damaged) == (True, 0)
    assert (found.batches, found.header, found.last) == (2, writer.header, writer.last)
    assert found.next_granule == FOOTER_AT
    payload = {_granule(2, granule) for granule in range(2, FOOTER_AT)}
    assert not payload.intersection(granule for read in disk.reads for granule in read)


def test_a_whole_segment_without_blocks(disk: MemoryDisk) -> None:
    Writer(disk, 2, 9).footer()
    found = _only(disk)
    assert found.whole
    assert len(found.entries) == 0


def test_segments_come_newest_first(disk: MemoryDisk) -> None:
    for segment, sequence in enumerate([5, 2**64 - 1, 1, 7]):
        Writer(disk, segment, sequence).batch([segment])
    assert [s.sequence for s in _recovered(disk)] == [2**64 - 1, 7, 5, 1]
    assert highest_sequence(_survey(disk)) == 2**64 - 1


def test_entries_are_not_of_the_buffer_that_is_read_into(disk: MemoryDisk) -> None:
    for segment in range(4):
        writer = Writer(disk, segment, segment + 1)
        writer.batch([f"{segment}/{i}" for i in range(5)])
        if segment % 2:
            writer.footer()
    for found in _recovered(disk):
        assert _names(found) == [f"{found.segment}/{i}" for i in range(5)]
        assert found.entries.base is None


def _footer_harms() -> list[Callable[[MemoryDisk], None]]:
    start = GEOMETRY.offset(0, FOOTER_AT)
    rng = random.Random(3)
    flips = [0, 4, 8, 12, 24, 32, 40, UNIT - 1, *rng.sample(range(UNIT), 20)]

    def harm(at: int, bit: int) -> Callable[[MemoryDisk], None]:
        return lambda disk: disk.flip(start + at, bit)

    return [
        *(harm(at, rng.randrange(8)) for at in flips),
        lambda disk: disk.data[start : start + UNIT].fill(0),
    ]


@pytest.mark.parametrize("harm", _footer_harms())
def test_a_damaged_footer_is_not_needed(
    disk: MemoryDisk, harm: Callable[[MemoryDisk], None]
) -> None:
    writer = Writer(disk, 0, 9)
    writer.batch("abc")
    writer.batch("d")
    entries = writer.footer()
    harm(disk)
    found = _only(disk)
    assert found.entries.tobytes() == entries.tobytes()
    assert (found.whole, found.batches, found.last) == (False, 2, writer.last)
    assert (found.next_granule, found.damaged) == (writer.at, 0)


def test_the_footer_of_an_earlier_use(disk: MemoryDisk) -> None:
    old = Writer(disk, 0, 9)
    old.batch("abc")
    old.footer()
    new = Writer(disk, 0, 10)
    assert _names(_only(disk)) == []
    new.batch("d")
    found = _only(disk)
    assert (_names(found), found.sequence, found.whole) == (["d"], 10, False)


def test_the_footer_of_an_earlier_volume_or_run_with_the_same_sequence(disk: MemoryDisk) -> None:
    for changes in ({"volume": OTHER_VOLUME}, {"run": 2}):
        old = Writer(disk, 0, 1, **changes)
        old.batch("abc")
        old.footer()
        Writer(disk, 0, 1)
        found = _only(disk)
        assert (_names(found), found.whole) == ([], False)


@pytest.mark.parametrize(
    "changes", [{"segment": 1}, {"sequence": 8}, {"sequence": 10}, {"header": 0}]
)
def test_the_footer_of_something_else(disk: MemoryDisk, changes: dict[str, int]) -> None:
    writer = Writer(disk, 0, 9)
    writer.batch("ab")
    writer.footer(**changes)
    found = _only(disk)
    assert (_names(found), found.whole) == (["a", "b"], False)


@pytest.mark.parametrize(
    "granules", [[3, 4], [5, 3], [2, 5], [3, FOOTER_AT - 1], [3, 2**32 - 2], [3, 3]]
)
def test_a_footer_with_places_that_cannot_be(disk: MemoryDisk, granules: list[int]) -> None:
    writer = Writer(disk, 0, 9)
    writer.batch("ab")
    writer.entries[0]["granule"] = granules
    writer.footer()
    found = _only(disk)
    assert (found.whole, found.entries["granule"].tolist()) == (False, [3, 5])


# -- segments without a footer ---------------------------------------------------------


def test_a_segment_by_its_heads(disk: MemoryDisk) -> None:
    writer = Writer(disk, 1, 4)
    for names in ("abc", "d", "ef"):
        writer.batch(names)
    found = _only(disk)
    assert found.entries.tobytes() == np.concatenate(writer.entries).tobytes()
    assert (found.segment, found.sequence, found.name) == (1, 4, "space")
    assert (found.whole, found.damaged, found.batches) == (False, 0, 3)
    assert (found.next_granule, found.header, found.last) == (
        writer.at,
        writer.header,
        writer.last,
    )


def test_a_segment_with_a_header_only(disk: MemoryDisk) -> None:
    writer = Writer(disk, 1, 4)
    found = _only(disk)
    assert len(found.entries) == found.batches == found.damaged == 0
    assert (found.next_granule, found.last) == (2, writer.header)


def test_writing_goes_on_where_it_ended(disk: MemoryDisk) -> None:
    Writer(disk, 1, 4).batch("abc")
    writer = Writer.again(disk, _only(disk))
    writer.batch("de")
    assert _names(_only(disk)) == ["a", "b", "c", "d", "e"]
    writer.footer()
    found = _only(disk)
    assert (_names(found), found.whole, found.batches) == (["a", "b", "c", "d", "e"], True, 2)


def test_a_full_segment_by_its_heads(disk: MemoryDisk) -> None:
    most = GEOMETRY.slots(SLOT)
    writer = Writer(disk, 1, 4)
    writer.batch(range(most))
    assert writer.at <= FOOTER_AT
    found = _only(disk)
    assert len(found.entries) == most
    writer.footer()
    assert _only(disk).entries.tobytes() == found.entries.tobytes()


def test_heads_of_several_granules(disk: MemoryDisk) -> None:
    geometry = Geometry(segment_granules=200, n_segments=1, log_granules=6)
    volume = dataclasses.replace(VOLUME, geometry=geometry)
    layout = Layout.opaque(model="m", block_bytes=100, block_tokens=16)
    wide = MemoryDisk(geometry.nbytes)
    writer = Writer(wide, 0, 1, volume=volume, layout=layout, slot=1)
    for first in (0, 90):
        writer.batch(range(first, first + 90))
    (found,) = recover(wide, volume, stop=_never)
    assert _names(found) == [str(name) for name in range(180)]
    wide.flip(geometry.offset(0, 4) + 8)  # the third granule of the first head
    (found,) = recover(wide, volume, stop=_never)
    assert (_names(found), found.batches, found.next_granule) == ([], 0, 2)


@pytest.mark.parametrize("slots_per_read", [0, 1, 2, 3])
def test_a_batch_that_takes_several_reads(
    disk: MemoryDisk, monkeypatch: pytest.MonkeyPatch, slots_per_read: int
) -> None:
    monkeypatch.setattr(recovery, "_READ_BYTES", slots_per_read * SLOT * UNIT)
    writer = Writer(disk, 0, 1)
    writer.batch("abcdefgh")
    disk.flip(GEOMETRY.offset(0, 3 + 4 * SLOT))
    found = _only(disk)
    assert (_names(found), found.damaged) == (list("abcdfgh"), 1)
    assert max(map(len, disk.reads[-8:])) <= max(1, slots_per_read) * SLOT


@pytest.mark.parametrize("torn", range(6))
def test_torn_blocks_are_dropped_one_by_one(disk: MemoryDisk, torn: int) -> None:
    """Each granule of three slots in turn never reached the disk; what lay there before may be."""
    for before in (np.zeros(UNIT, np.uint8), _slot(_key("before"))[:UNIT]):
        writer = Writer(disk, 0, 1)
        writer.batch("ab")
        writer.batch("cde")
        place = GEOMETRY.offset(0, int(writer.entries[1]["granule"][0]) + torn)
        disk.data[place : place + UNIT] = before
        found = _only(disk)
        expected = [name for name in "abcde" if name != "cde"[torn // SLOT]]
        assert (_names(found), found.damaged) == (expected, 1)
        # Such a batch is no end: its head is sound, and the next one can follow it.
        assert (found.batches, found.next_granule) == (2, writer.at)


def test_every_flipped_bit_of_a_tail_costs_just_its_block(disk: MemoryDisk) -> None:
    writer = Writer(disk, 0, 1)
    writer.batch("abc")
    rng = random.Random(5)
    used = block.header_bytes(1) + LAYOUT.block_bytes
    for _ in range(60):
        index, at, bit = rng.randrange(3), rng.randrange(used), rng.randrange(8)
        if 120 <= at < 256:
            continue  # padding, which means nothing
        place = GEOMETRY.offset(0, 3 + index * SLOT) + at
        disk.flip(place, bit)
        found = _only(disk)
        assert (_names(found), found.damaged) == (
            [name for i, name in enumerate("abc") if i != index],
            1,
        )
        disk.flip(place, bit)


def test_a_sound_block_in_the_wrong_slot_is_dropped(disk: MemoryDisk) -> None:
    writer = Writer(disk, 0, 1)
    writer.batch("ab")
    first, second = (GEOMETRY.offset(0, granule) for granule in (3, 5))
    disk.write(second, [_slot(_key("a"))])
    assert _names(_only(disk)) == ["a"]
    disk.write(first, [_slot(_key("a"), salt=1)])  # of the same key, but of another put
    found = _only(disk)
    assert (_names(found), found.damaged) == ([], 2)


def test_every_flipped_bit_of_a_head_ends_the_segment_there(disk: MemoryDisk) -> None:
    writer = Writer(disk, 0, 1)
    writer.batch("ab")
    at = writer.at
    writer.batch("cd")
    writer.batch("e")
    rng = random.Random(4)
    for byte in [*range(60), *rng.sample(range(UNIT), 60), UNIT - 1]:
        place, bit = GEOMETRY.offset(0, at) + byte, rng.randrange(8)
        disk.flip(place, bit)
        found = _only(disk)
        assert (_names(found), found.batches, found.next_granule) == (["a", "b"], 1, at)
        disk.flip(place, bit)
    assert len(_only(disk).entries) == 5


def test_a_stale_batch_behind_the_tail_is_not_taken(disk: MemoryDisk) -> None:
    """A crash lost batch 1 and kept batch 2, whose number and place the next life comes to."""
    writer = Writer(disk, 0, 1)
    for names in ("ab", "cd", "ef"):
        writer.batch(names)
    disk.flip(GEOMETRY.offset(0, 7))  # the head of batch 1
    again = Writer.again(disk, _only(disk))
    again.batch("xy")
    found = _only(disk)
    assert (_names(found), found.batches) == (["a", "b", "x", "y"], 2)
    again.batch("z")
    assert _names(_only(disk)) == ["a", "b", "x", "y", "z"]


def test_a_stale_batch_0_of_an_earlier_use_is_not_taken(disk: MemoryDisk) -> None:
    for changes in ({"sequence": 8}, {"sequence": 9, "run": 2}, {"volume": OTHER_VOLUME}):
        old = Writer(disk, 0, **{"sequence": 9, **changes})  # type: ignore[arg-type]
        old.batch("ab")
        new = Writer(disk, 0, 9)
        assert _names(_only(disk)) == []
        new.batch("x")
        assert _names(_only(disk)) == ["x"]


@pytest.mark.parametrize(
    "changes",
    [{"segment": 1}, {"sequence": 2}, {"batch": 0}, {"batch": 2}, {"granule": 8}, {"previous": 0}],
)
def test_a_head_that_is_not_the_next_one(disk: MemoryDisk, changes: dict[str, int]) -> None:
    writer = Writer(disk, 0, 1)
    writer.batch("ab")
    entries = writer.batch("cd")
    previous = checksum_of(disk.data[GEOMETRY.offset(0, 2) : GEOMETRY.offset(0, 3)])
    fields = {"segment": 0, "sequence": 1, "batch": 1, "granule": 7, "previous": previous}
    place = GEOMETRY.offset(0, 7)
    disk.write(place, [pack_head(BatchHead(**fields), entries)])
    assert _names(_only(disk)) == ["a", "b", "c", "d"]
    disk.write(place, [pack_head(BatchHead(**{**fields, **changes}), entries)])
    assert _names(_only(disk)) == ["a", "b"]


@pytest.mark.parametrize("granules", [[4, 6], [3, 6], [5, 3], [3, 3]])
def test_a_head_with_places_that_cannot_be(disk: MemoryDisk, granules: list[int]) -> None:
    writer = Writer(disk, 0, 1)
    entries = writer.batch("ab")
    entries["granule"] = granules
    head = BatchHead(segment=0, sequence=1, batch=0, granule=2, previous=writer.header)
    disk.write(GEOMETRY.offset(0, 2), [pack_head(head, entries)])
    assert len(_only(disk).entries) == 0


def test_a_head_whose_slots_would_reach_into_the_footer(disk: MemoryDisk) -> None:
    writer = Writer(disk, 0, 1)
    n = (FOOTER_AT - 3) // SLOT + 1
    entries = np.zeros(n, ENTRY)
    entries["granule"] = 3 + np.arange(n) * SLOT
    head = BatchHead(segment=0, sequence=1, batch=0, granule=2, previous=writer.header)
    disk.write(GEOMETRY.offset(0, 2), [pack_head(head, entries)])
    found = _only(disk)
    assert (found.batches, found.damaged) == (0, 0)


# -- what must not come back -----------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_forgotten_blocks(disk: MemoryDisk, whole: bool) -> None:
    for segment, sequence in ((0, 5), (1, 6)):
        writer = Writer(disk, segment, sequence)
        writer.batch([f"{segment}{name}" for name in "abc"])
        if whole:
            writer.footer()
    _log(disk, 0, 0, (0, 5, 3), (1, 5, 3), (0, 6, 5), (2, 5, 3))
    _log(disk, 0, 1, (0, 5, 7), (1, 6, 5), (1, 6, 5), (1, 6, 999))
    assert [_names(found) for found in _recovered(disk)] == [["1a", "1c"], ["0b"]]
    for found in _recovered(disk):
        assert (found.whole, found.damaged, found.batches) == (whole, 0, 1)


def test_forgotten_uses(disk: MemoryDisk) -> None:
    for segment in range(4):
        Writer(disk, segment, 5 + segment).batch([segment])
    _log(disk, 0, 0, (0, 5, WHOLE_USE), (1, 5, WHOLE_USE), (2, 9, WHOLE_USE))
    disk.reads.clear()
    # Segment 1 is in a later use than the one that is over; that of segment 2 is before it.
    assert [found.segment for found in _recovered(disk)] == [3, 1]
    seen = {granule for read in disk.reads for granule in read}
    assert not seen.intersection(range(_granule(0, 2), _granule(1, 0)))


def test_a_use_without_a_live_block_is_told_of(disk: MemoryDisk) -> None:
    Writer(disk, 0, 5).batch("ab")
    _log(disk, 0, 0, (0, 5, 3), (0, 5, 5))
    found = _only(disk)
    assert (len(found.entries), found.batches) == (0, 1)


def test_no_block_gets_the_place_of_one_that_is_forgotten(disk: MemoryDisk) -> None:
    """A crash took a batch, and left the record that one of its blocks must not come back."""
    writer = Writer(disk, 0, 5)
    writer.batch("ab")
    _log(disk, 0, 0, (0, 5, writer.at - SLOT), (1, 5, 20), (0, 4, 20))
    assert _only(disk).next_granule == writer.at
    _log(disk, 0, 1, (0, 5, writer.at + 1))
    found = _only(disk)
    assert (_names(found), found.next_granule) == (["a"], FOOTER_AT)
    assert (found.batches, found.last) == (1, writer.last)


def test_only_the_active_half_counts(disk: MemoryDisk) -> None:
    Writer(disk, 0, 5).batch("ab")
    _log(disk, 0, 0, (0, 5, 3), epoch=1)
    _log(disk, 1, 0, (0, 5, 5), epoch=2)
    assert _names(_only(disk)) == ["a"]


def test_the_highest_sequence(disk: MemoryDisk) -> None:
    Writer(disk, 0, 7)
    Writer(disk, 1, 5).batch("a")
    assert highest_sequence(_survey(disk)) == 7
    _log(disk, 0, 0, (0, 7, WHOLE_USE))
    assert highest_sequence(_survey(disk)) == 7
    _log(disk, 0, 1, (2, 30, 4))  # of a use whose header is gone
    assert highest_sequence(_survey(disk)) == 30
    Writer(disk, 3, 99, volume=OTHER_VOLUME)
    assert highest_sequence(_survey(disk)) == 30
    _log(disk, 0, 2, (0, 50, FLOOR))
    assert highest_sequence(_survey(disk)) == 50
    Writer(disk, 4, 1000)
    disk.flip(GEOMETRY.offset(4) + 100)
    assert highest_sequence(_survey(disk)) > 1000


# -- single segments that fail ---------------------------------------------------------


def _three(disk: MemoryDisk) -> None:
    """Three segments, of which the middle one will fail."""
    for segment in range(3):
        writer = Writer(disk, segment, 10 + segment)
        writer.batch([segment])
        if segment != 1:
            writer.footer()


@pytest.mark.parametrize(
    ("granule", "sequence"), [(0, None), (1, None), (FOOTER_AT, 11), (2, 11), (3, 11), (4, 11)]
)
def test_an_unreadable_segment_is_skipped(
    disk: MemoryDisk, granule: int, sequence: int | None
) -> None:
    _three(disk)
    disk.broken = {_granule(1, granule)}
    found = _survey(disk)
    assert [s.segment for s in recover(disk, VOLUME, stop=_never, found=found)] == [2, 0]
    (problem,) = found.problems
    assert (problem.segment, problem.sequence) == (1, sequence)
    assert isinstance(problem.error, OSError)


def _rewrite_header(disk: MemoryDisk, **changes: Any) -> None:
    header = SegmentHeader(
        volume_id=VOLUME.volume_id,
        segment=1,
        sequence=11,
        run=1,
        slot_granules=SLOT,
        name="space",
        layout=LAYOUT.encode(),
    )
    disk.write(GEOMETRY.offset(1), [pack_segment_header(dataclasses.replace(header, **changes))])


@pytest.mark.parametrize(
    ("harm", "error"),
    [
        (lambda disk: disk.flip(GEOMETRY.offset(1) + 50), Corrupted),
        (lambda disk: disk.flip(GEOMETRY.offset(1, 1) + 50), Corrupted),
        (lambda disk: disk.data[GEOMETRY.offset(1, 1) :][:UNIT].fill(0), Corrupted),
        (lambda disk: disk.data[GEOMETRY.offset(1) :][:UNIT].fill(3), ProtocolError),
        (lambda disk: disk.flip(GEOMETRY.offset(1) + 4), ProtocolError),
        (lambda disk: _rewrite_header(disk, segment=2), Corrupted),
        (lambda disk: _rewrite_header(disk, slot_granules=1000), ProtocolError),
        (lambda disk: _rewrite_header(disk, layout=b"{}"), ProtocolError),
        (
            lambda disk: _rewrite_header(
                disk, layout=LAYOUT.encode().replace(b'"layers":1', b'"layers":0')
            ),
            ProtocolError,
        ),
    ],
)
def test_a_wrong_header_is_skipped(
    disk: MemoryDisk, harm: Callable[[MemoryDisk], None], error: type[Exception]
) -> None:
    _three(disk)
    harm(disk)
    found = _survey(disk)
    assert [s.segment for s in recover(disk, VOLUME, stop=_never, found=found)] == [2, 0]
    (problem,) = found.problems
    assert problem.segment == 1
    assert isinstance(problem.error, error)


def test_blocks_that_do_not_fit_their_slots(disk: MemoryDisk) -> None:
    large = Layout.opaque(model="m", block_bytes=50_000, block_tokens=16)
    writer = Writer(disk, 1, 1)
    _rewrite_header(disk, layout=large.encode())
    writer.last = checksum_of(disk.data[GEOMETRY.offset(1) : GEOMETRY.offset(1, 2)])
    writer.sequence = 11
    writer.batch("a")
    found = _survey(disk)
    assert list(recover(disk, VOLUME, stop=_never, found=found)) == []
    assert isinstance(found.problems[0].error, InvalidArgument)


def test_what_an_earlier_volume_left(disk: MemoryDisk) -> None:
    Writer(disk, 0, 50, volume=OTHER_VOLUME).batch("a")
    _log(disk, 0, 0, (1, 1, WHOLE_USE), epoch=70, volume_id=OTHER_VOLUME.volume_id)
    Writer(disk, 1, 1).batch("b")
    found = _survey(disk)
    assert found.problems == []
    assert found.log.next_epoch == 1
    assert [_names(s) for s in recover(disk, VOLUME, stop=_never, found=found)] == [["b"]]


# -- stopping --------------------------------------------------------------------------


def test_stopping_at_any_read(disk: MemoryDisk) -> None:
    for segment in range(4):
        writer = Writer(disk, segment, 10 - segment)
        writer.batch([segment])
        if segment % 2:
            writer.footer()
    yields = []
    for most in range(40):
        asked = 0

        def stop(most: int = most) -> bool:
            nonlocal asked
            asked += 1
            return asked > most

        yields.append([_names(s) for s in recover(disk, VOLUME, stop=stop)])
    assert yields[0] == []
    assert yields[-1] == [["0"], ["1"], ["2"], ["3"]]
    assert all(later[: len(sooner)] == sooner for sooner, later in itertools.pairwise(yields))
    assert {len(found) for found in yields} == {0, 1, 2, 3, 4}
    assert survey(disk, VOLUME, stop=lambda: True) is None


# -- many entries ----------------------------------------------------------------------


class SparseDisk(MemoryDisk):
    """Remembers what was written, and reads zeros elsewhere."""

    def __init__(self, nbytes: int) -> None:
        super().__init__(0)
        self._nbytes = nbytes
        self._pieces_written: dict[int, Any] = {}

    @property
    def nbytes(self) -> int:
        return self._nbytes

    def write(self, offset: int, buffers: Sequence[Any]) -> None:
        for at, raw in self._pieces(offset, buffers):
            self._pieces_written[at] = raw

    def read(self, offset: int, buffers: Sequence[Any]) -> None:
        for at, raw in self._pieces(offset, buffers):
            raw[:] = 0
            piece = self._pieces_written.get(at, raw[:0])[: len(raw)]
            raw[: len(piece)] = piece


def test_a_million_entries() -> None:
    geometry = Geometry(segment_granules=1 << 16, n_segments=17)
    volume = dataclasses.replace(VOLUME, geometry=geometry)
    disk = SparseDisk(geometry.nbytes)
    most = geometry.slots(1)
    rng = np.random.default_rng(0)
    layout = Layout.opaque(model="m", block_bytes=100, block_tokens=16)
    written = 0
    for segment in range(17):
        writer = Writer(disk, segment, segment + 1, volume=volume, layout=layout, slot=1)
        entries = np.frombuffer(rng.bytes(most * ENTRY.itemsize), ENTRY).copy()
        entries["granule"] = geometry.footer_granule(1) - most + np.arange(most)
        writer.entries = [entries]
        writer.footer()
        written += most
    assert written >= 1_000_000
    found = list(recover(disk, volume, stop=_never))
    assert sum(len(s.entries) for s in found) == written
    assert found[0].entries.tobytes() == entries.tobytes()
    assert all(s.whole for s in found)


# -- crashes ---------------------------------------------------------------------------


class CrashingDisk(MemoryDisk):
    """Of what was not synced, a crash keeps any granules and not others."""

    def __init__(self) -> None:
        super().__init__()
        self.durable = self.data.copy()
        self._dirty: list[int] = []

    def write(self, offset: int, buffers: Sequence[Any]) -> None:
        super().write(offset, buffers)
        size = sum(len(raw) for raw in buffers)
        self._dirty += range(offset // UNIT, (offset + size) // UNIT)

    def sync(self) -> None:
        for granule in self._dirty:
            self._keep(granule)
        self._dirty.clear()

    def crash(self, rng: random.Random) -> None:
        share = rng.choice([0.0, 0.3, 0.6, 0.9, 1.0])
        for granule in set(self._dirty):
            if rng.random() < share:
                self._keep(granule)
        self._dirty.clear()
        self.data = self.durable.copy()

    def _keep(self, granule: int) -> None:
        part = slice(granule * UNIT, (granule + 1) * UNIT)
        self.durable[part] = self.data[part]


Place = tuple[int, int, int]  # segment, sequence, granule


class Lives:
    """A store of lives, each of which ends in a crash, and what it may find in the next."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.disk = CrashingDisk()
        for copy in range(2):
            self.disk.write(copy * UNIT, [pack_superblock(VOLUME)])
        self.disk.sync()
        self.written: dict[Place, str] = {}  # all that ever was; a place has one block only
        self.durable: set[Place] = set()  # and not given up since
        self.gone: set[Place] = set()  # durably forgotten, or not found by a later life
        self.writers: dict[int, Writer] = {}
        self.live: set[Place] = set()
        self.unsaid: set[Place] = set()  # forgotten, and the log may not say so durably
        self.names = 0

    def begin(self) -> None:
        """Recovers, checks what came back, and begins a new half of the log."""
        found = _survey(self.disk)
        assert read_superblock(self.disk) == VOLUME
        self.sequence = highest_sequence(found)
        segments = list(recover(self.disk, VOLUME, stop=_never, found=found))
        back: dict[Place, str] = {}
        self.writers = {}
        for s in segments:
            for name, granule in zip(_names(s), s.entries["granule"].tolist(), strict=True):
                back[s.segment, s.sequence, granule] = name
            for entry in s.entries:
                at = GEOMETRY.offset(s.segment, int(entry["granule"]))
                slot = self.disk.data[at : at + SLOT * UNIT]
                check_slot(slot, entry["key"].tobytes(), int(entry["stamp"]), LAYOUT)
            if not s.whole:
                self.writers[s.segment] = Writer.again(self.disk, s)
        assert not self.gone & back.keys()
        assert self.durable <= back.keys()
        for place, name in back.items():
            assert self.written[place] == name
        self.live = set(back)
        self.gone |= self.written.keys() - back.keys()
        self.half, self.epoch = 1 - found.log.half, found.log.next_epoch
        self._begin_half(_triples(found.log))

    def _begin_half(self, records: list[Place]) -> None:
        records = list(dict.fromkeys(records))
        parts = [records[at : at + 200] for at in range(0, len(records), 200)]
        for i, part in enumerate(parts, 1):
            _log(self.disk, self.half, i, *part, epoch=self.epoch)
        self.disk.sync()
        _log(self.disk, self.half, 0, epoch=self.epoch, base=len(parts))
        self.records, self.number = records, 1 + len(parts)

    def step(self) -> None:
        steps = [self._write, self._open, self._close, self._forget, self._sync]
        self.rng.choices(steps, [10, 1, 1, 2, 2])[0]()

    def _open(self) -> None:
        segment = self.rng.randrange(2)  # few, so that their uses follow each other
        self.sequence += 1
        given_up = {place for place in self.live | self.durable if place[0] == segment}
        self.durable -= given_up
        self.live -= given_up
        self.writers[segment] = Writer(self.disk, segment, self.sequence, run=self.epoch)
        self.disk.sync()
        self._settle()

    def _write(self) -> None:
        if not self.writers:
            return
        writer = self.rng.choice(list(self.writers.values()))
        n = self.rng.randint(1, 2)
        if not writer.room(n):
            return
        names = [f"block {self.names + i}" for i in range(n)]
        self.names += n
        entries = writer.batch(names)
        for name, granule in zip(names, entries["granule"].tolist(), strict=True):
            place = writer.segment, writer.sequence, granule
            self.written[place] = name
            self.live.add(place)
            self.gone.discard(place)

    def _close(self) -> None:
        if self.writers:
            writer = self.writers.pop(self.rng.choice(list(self.writers)))
            self._sync()
            writer.footer()

    def _forget(self) -> None:
        if not self.live:
            return
        place = self.rng.choice(sorted(self.live))
        records = [place]
        if self.rng.random() < 0.2:
            records = [(place[0], place[1], WHOLE_USE)]
            self.writers.pop(place[0], None)
        lost = {p for p in self.live if p in records or (*p[:2], WHOLE_USE) in records}
        self.live -= lost
        self.durable -= lost
        if self.number < GEOMETRY.log_granules:
            _log(self.disk, self.half, self.number, *records, epoch=self.epoch)
            self.records += records
            self.number += 1
        else:
            self.half, self.epoch = 1 - self.half, self.epoch + 1
            self._begin_half(self.records + records)
        self.unsaid |= lost

    def _sync(self) -> None:
        self.disk.sync()
        self._settle()

    def _settle(self) -> None:
        self.durable |= self.live
        self.gone |= self.unsaid
        self.unsaid = set()

    def end(self) -> None:
        self.disk.crash(self.rng)
        self.unsaid = set()


@pytest.mark.parametrize("seed", range(100))
def test_lives_that_end_in_crashes(seed: int) -> None:
    lives = Lives(seed)
    for _ in range(20):
        lives.begin()
        for _ in range(lives.rng.randint(0, 10)):
            lives.step()
        lives.end()
    lives.begin()
