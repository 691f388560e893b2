"""The shared index against a dict, against a racing writer and against foreign bytes."""

from __future__ import annotations

import mmap
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from kvstore.errors import InvalidArgument, ProtocolError
from kvstore.index import IndexReader, IndexTable, IndexView, capacity_for, index_bytes
from kvstore.index.format import (
    CHECK_FACTOR,
    CHECK_WEIGHTS,
    HOME_SHIFT,
    NAMESPACE_FACTOR,
    W_CHECK,
    checks_of,
)
from kvstore.index.probing import home_rows

ROOT = Path(__file__).resolve().parents[2]
ID = b"instance"
MASK64 = (1 << 64) - 1


def make(capacity: int, **options: int) -> tuple[IndexTable, IndexReader, bytearray]:
    buffer = bytearray(index_bytes(capacity))
    table = IndexTable.create(buffer, capacity, ID, **options)
    return table, IndexReader(IndexView.open(memoryview(buffer).toreadonly())), buffer


def keys_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, 32), dtype=np.uint8)


def crowded(n: int, homes: int) -> np.ndarray:
    """Keys whose homes are few and lie at the table's end, so that runs wrap around."""
    keys = keys_of(n, 1)
    keys.view(np.uint64)[:, 0] = (np.arange(n, dtype=np.uint64) % homes + 60) << np.uint64(20)
    return keys


def put(table: IndexTable, keys: np.ndarray, ids: np.ndarray, namespace: int = 0) -> np.ndarray:
    return table.insert(
        keys,
        namespace=namespace,
        lengths=ids + 7,
        granules=ids * 3,
        block_ids=ids,
        generations=ids + (1 << 50),
        tier=2,
    )


def test_sizes() -> None:
    assert capacity_for(1) == 8
    assert capacity_for(512) == 1024
    assert capacity_for(513) == 2048
    assert index_bytes(1024) == 4096 + 65536
    for bad in (0, 4, 1000):
        with pytest.raises(InvalidArgument):
            index_bytes(bad)
    with pytest.raises(InvalidArgument):
        capacity_for(0)


def test_rows_are_checked_and_placed_as_the_format_says() -> None:
    """By whole numbers, which no processor cuts off."""
    table, _, _ = make(1024)
    keys = keys_of(100)
    put(table, keys, np.arange(100), namespace=77)
    rows = table.view.rows[table.view.rows[:, W_CHECK] != 0]
    assert len(rows) == 100
    for row, check, home in zip(
        rows.tolist(), checks_of(rows).tolist(), home_rows(rows, 1023).tolist(), strict=True
    ):
        total = sum(row[word] * weight for word, weight in enumerate(CHECK_WEIGHTS)) & MASK64
        total = ((total ^ (total >> 32)) * CHECK_FACTOR) & MASK64
        assert row[W_CHECK] == check == (total ^ (total >> 29)) | 1
        assert home == ((row[0] ^ (77 * NAMESPACE_FACTOR & MASK64)) >> HOME_SHIFT) & 1023


@pytest.mark.parametrize("one", [True, False])
@pytest.mark.parametrize("homes", [3, 9, 64])
def test_against_a_dict(one: bool, homes: int) -> None:
    table, reader, _ = make(64)
    keys = crowded(40, homes)
    rng = random.Random(homes)
    model: dict[tuple[int, int], int] = {}
    free = set(range(32))
    for _ in range(600):
        namespace = rng.randrange(2)
        if rng.random() < 0.55 and free:
            n = 1 if one else rng.randint(0, min(6, len(free)))
            ids = np.array(rng.sample(sorted(free), n), np.int64)
            picks = rng.choices(range(40), k=n)
            done = put(table, keys[picks], ids, namespace).tolist()
            # The bulk path may choose another order only among different keys.
            for pick, block, went in zip(picks, ids.tolist(), done, strict=True):
                assert went == ((namespace, pick) not in model)
                if went:
                    model[namespace, pick] = block
                    free.remove(block)
        elif model:
            n = 1 if one else rng.randint(1, min(6, len(model)))
            for slot in rng.sample(sorted(model), n):
                block = model.pop(slot)
                table.delete(np.array([block, block]))
                free.add(block)
        table.check()
        assert table.entries == len(model)
        for space in range(2):
            want = [model.get((space, i), -1) for i in range(40)]
            assert table.find(space, keys).tolist() == want
            got = reader.lookup(space, keys)
            assert got.block_ids.tolist() == want
            assert got.found.tolist() == [w >= 0 for w in want]
            pick = rng.randrange(40)
            single = reader.lookup(space, keys[pick : pick + 1])
            for name in ("found", "granules", "lengths", "block_ids", "generations", "tiers"):
                assert getattr(single, name)[0] == getattr(got, name)[pick]
                assert getattr(single, name).dtype == getattr(got, name).dtype


@pytest.mark.parametrize("homes", [1, 3, 40, 4000])
@pytest.mark.parametrize("capacity", [64, 256, 1024])
def test_a_rebuilt_table_finds_what_the_old_one_held(homes: int, capacity: int) -> None:
    """Keys of two namespaces, few homes, runs that go around the end, some rows left out."""
    table, _, _ = make(64, max_blocks=100)
    table.bump_namespace_epoch()
    keys = crowded(32, homes)
    keys.view(np.uint64)[16:, 0] ^= np.uint64(5 * NAMESPACE_FACTOR & MASK64)
    assert put(table, keys[:16], np.arange(16)).all()
    assert put(table, keys[16:], np.arange(40, 56), 5).all()
    without = np.array([3, 41, 99, 3])
    buffer = bytearray(index_bytes(capacity))
    made, lost = table.rebuilt(buffer, capacity, without=without)
    assert lost.tolist() == []
    made.check()
    table.check()
    assert not table.retired
    reader = IndexReader(IndexView.open(buffer))
    assert reader.namespace_epoch == 1
    want = np.where(np.isin(np.arange(16), without), -1, np.arange(16)).tolist()
    also = np.where(np.isin(np.arange(40, 56), without), -1, np.arange(40, 56)).tolist()
    for space, expected in ((0, want + [-1] * 16), (5, [-1] * 16 + also)):
        assert made.find(space, keys).tolist() == expected
        assert reader.lookup(space, keys).block_ids.tolist() == expected
    assert reader.lookup(0, keys[:1]).granules.tolist() == [0]
    made.delete(np.arange(100))  # its positions are right, too
    made.check()
    assert made.entries == 0


@pytest.mark.parametrize("home", [100, 510])
def test_a_rebuilt_table_keeps_to_the_probe_bound_and_tells_what_it_lost(home: int) -> None:
    table, _, _ = make(1024)
    keys = keys_of(300, 1)
    words = keys.view(np.uint64)
    # Two homes of a table of 1,024 rows, which fall together in one of 512.
    words[:, 0] = ((np.arange(300, dtype=np.uint64) % 2) * 512 + home) << np.uint64(20)
    assert put(table, keys[:256], np.arange(256)).all()
    with pytest.raises(InvalidArgument, match="do not fit"):
        table.rebuilt(bytearray(index_bytes(256)), 256, without=np.arange(0))
    made, lost = table.rebuilt(bytearray(index_bytes(512)), 512, without=np.arange(0))
    made.check()
    assert made.entries == 128
    assert len(lost) == len(set(lost.tolist())) == 128
    assert (made.find(0, keys[lost]) == -1).all()
    kept = np.setdiff1d(np.arange(256), lost)
    assert made.find(0, keys[kept]).tolist() == kept.tolist()
    assert put(made, keys[lost[:1]], lost[:1].astype(np.int64)).tolist() == [False]


def test_a_delete_in_a_long_run_does_not_walk_to_its_end() -> None:
    table, reader, _ = make(1 << 15)
    keys = keys_of(1 << 14, 1)
    keys.view(np.uint64)[:, 0] = np.arange(1 << 14, dtype=np.uint64) << np.uint64(20)
    assert put(table, keys, np.arange(1 << 14)).all()
    # The other rows are taken too, each at its home: who walks on to an empty row walks for ever.
    rest = np.arange(1 << 14, 1 << 15, dtype=np.uint64)
    table.view.rows[1 << 14 :, 0] = rest << np.uint64(20)
    table.view.rows[1 << 14 :, W_CHECK] = 1
    before = table.view.rows.copy()
    table.delete(np.array([0]))
    assert (table.view.rows != before).any(axis=1).sum() == 1
    assert not reader.lookup(0, keys[:1]).found[0]


def test_match_stops_at_the_first_miss() -> None:
    table, reader, _ = make(4096)
    keys = keys_of(1000)
    assert put(table, keys, np.arange(1000), 5).all()
    assert reader.match(5, keys).count == 1000
    assert reader.match(4, keys).count == 0
    assert reader.match(5, keys[:0]).count == 0
    table.delete(np.array([300]))
    got = reader.match(5, keys)
    assert got.count == 300
    assert got.block_ids.tolist() == list(range(300))
    assert got.granules.tolist() == [3 * i for i in range(300)]
    assert got.lengths.tolist() == [i + 7 for i in range(300)]
    assert got.generations.tolist() == [i + (1 << 50) for i in range(300)]
    assert set(got.tiers.tolist()) == {2}
    assert reader.match(5, keys[:1]).count == 1


@pytest.mark.parametrize("n", [3, 500])
def test_a_short_match_does_not_hold_the_rows_of_all_that_was_asked(n: int) -> None:
    """Sessions keep what they found until they report it."""
    table, reader, _ = make(1024)
    keys = keys_of(n)
    assert put(table, keys[:1], np.arange(1), 1).all()
    found = reader.match(1, keys)
    assert found.count == 1
    base = found.rows if found.rows.base is None else found.rows.base
    assert base.nbytes == found.rows.nbytes


def test_load_and_probe_bounds() -> None:
    table, _, _ = make(64, max_blocks=100)
    assert put(table, keys_of(40), np.arange(40)).sum() == 32
    table.check()
    table, reader, _ = make(1024)
    keys = crowded(200, 1)
    assert put(table, keys, np.arange(200)).sum() == 128
    assert reader.lookup(0, keys).found.sum() == 128
    table.check()


def test_header_flags_and_epoch() -> None:
    table, reader, _ = make(64)
    assert not reader.retired
    assert reader.namespace_epoch == 0
    table.bump_namespace_epoch()
    table.retire()
    assert reader.retired
    assert table.retired
    assert reader.namespace_epoch == 1
    assert reader.view.instance_id == ID
    assert not reader.view.rows.flags.writeable


def test_foreign_bytes_are_refused() -> None:
    _, _, buffer = make(64)
    for offset, value in ((0, 0), (4, 9), (16, 3), (18, 1)):
        bad = bytearray(buffer)
        bad[offset] = value
        with pytest.raises(ProtocolError):
            IndexView.open(bad)
    for size in (0, 100, 4096, len(buffer) - 1):
        with pytest.raises(ProtocolError):
            IndexView.open(buffer[:size])


def test_bad_arguments_change_nothing() -> None:
    table, reader, buffer = make(64)
    put(table, keys_of(2), np.array([1, 2]))
    before = bytes(buffer)
    keys = keys_of(2, 9)
    for bad in (keys.astype(np.int8), keys[:, :31], keys[0]):
        with pytest.raises(InvalidArgument):
            reader.lookup(0, bad)
        with pytest.raises(InvalidArgument):
            put(table, bad, np.array([3, 4]))
    for ids in ([3, 3], [1, 4], [3, 32], [-1, 3], [3]):
        with pytest.raises(InvalidArgument):
            put(table, keys, np.array(ids))
    with pytest.raises(InvalidArgument):
        reader.lookup(1 << 32, keys)
    with pytest.raises(InvalidArgument):
        table.delete(np.array([32]))
    with pytest.raises(InvalidArgument):
        IndexTable.create(memoryview(buffer).toreadonly(), 64, ID)
    assert bytes(buffer) == before


@pytest.mark.parametrize("word", range(8))
def test_a_row_that_is_damaged_or_half_written_is_a_miss(word: int) -> None:
    """Whichever word it is; and others of its run are found still."""
    table, reader, _ = make(64)
    keys = crowded(4, 1)
    put(table, keys, np.arange(4))
    table.view.rows[61, word] ^= np.uint64(1 << 33)
    assert reader.lookup(0, keys).found.tolist() == [True, False, True, True]
    assert not reader.lookup(0, keys[1:2]).found[0]


def test_words_of_two_rows_never_make_one() -> None:
    """A key's row as it was and as it is after its block moved: no mixture of both is taken."""
    table, reader, _ = make(64)
    keys = crowded(1, 1)
    put(table, keys, np.array([5]))
    before = table.view.rows[60].copy()
    table.move(np.array([5]), granules=np.array([99]), generations=np.array([7]), tier=1)
    after = table.view.rows[60].copy()
    assert (before != after).tolist() == [False] * 5 + [True] * 3
    for mixture in range(1, 7):
        taken = np.array([0] * 5 + [mixture >> bit & 1 for bit in range(3)], bool)
        table.view.rows[60] = np.where(taken, after, before)
        assert not reader.lookup(0, keys).found[0]


WRITER = """
import mmap, random, sys
import numpy as np
from kvstore.index import IndexTable, index_bytes
capacity, universe = 256, 160
memory = mmap.mmap(int(sys.argv[1]), index_bytes(capacity))
table = IndexTable.create(memory, capacity, b"instance", max_blocks=universe)
keys = np.random.default_rng(0).integers(0, 256, (universe, 32), dtype=np.uint8)
words = keys.view(np.uint64)
rng, generation, live = random.Random(1), 0, np.zeros(universe, bool)
print("ready", flush=True)
while True:
    ids = np.array(rng.sample(range(universe), rng.choice((1, 1, 8))))
    table.delete(ids[live[ids]])
    live[ids] = False
    generation += 1
    stamps = np.full(len(ids), generation * 0x9E3779B97F4A & (1 << 56) - 1, np.uint64)
    mixed = (words[ids, 1] ^ stamps) * np.uint64(0xD6E8FEB86659FD93)
    low = np.uint64(0xFFFFFFFF)
    live[ids] = table.insert(keys[ids], namespace=0, lengths=mixed & low,
        granules=mixed >> np.uint64(32), block_ids=ids, generations=stamps, tier=generation & 255)
"""


def torn(keys: np.ndarray, got: object) -> int:
    """How many found rows have fields that were never written together for their key."""
    found = got.found
    stamps = got.generations
    mixed = (keys.view(np.uint64)[:, 1] ^ stamps) * np.uint64(0xD6E8FEB86659FD93)
    wrong = (mixed & np.uint64(0xFFFFFFFF)) != got.lengths.astype(np.uint64)
    wrong |= (mixed >> np.uint64(32)) != got.granules.astype(np.uint64)
    wrong |= got.block_ids != np.arange(len(keys)) % 160
    return int((wrong & found).sum())


def test_a_racing_writer_never_shows_a_torn_row() -> None:
    handle = os.memfd_create("index")
    size = index_bytes(256)
    os.ftruncate(handle, size)
    command = [sys.executable, "-c", WRITER, str(handle)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    memory = mmap.mmap(handle, size, prot=mmap.PROT_READ)
    with subprocess.Popen(
        command, pass_fds=[handle], env=env, stdout=subprocess.PIPE, text=True
    ) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            reader = IndexReader(IndexView.open(memoryview(memory)))
            keys = np.tile(keys_of(160), (8, 1))
            reads = hits = bad = 0
            start = time.monotonic()
            while (reads < 1_000_000 or time.monotonic() < start + 3) and (
                time.monotonic() < start + 20
            ):
                got = reader.lookup(0, keys)
                bad += torn(keys, got)
                hits += int(got.found.sum())
                for i in range(0, 160, 20):
                    one = reader.lookup(0, keys[i : i + 1])
                    assert not one.found[0] or one.block_ids[0] == i
                reads += len(keys) + 8
            assert writer.poll() is None
        finally:
            writer.kill()
    os.close(handle)
    assert bad == 0
    assert reads >= 1_000_000
    assert hits > reads // 4
