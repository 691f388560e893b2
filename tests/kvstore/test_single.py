"""Puts of one block, which one compiled call looks up, fills and posts."""

from __future__ import annotations

from collections import UserList
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvstore import Attention, Hit, KVStore, Layout, limits
from kvstore.block import NO_PARENT, cell_checksums, pack_parts
from kvstore.errors import KVStoreError
from kvstore.session.base import NamespaceHandle
from kvstore.session.parts import part_of
from kvstore.session.posting import Board
from kvstore.session.single import FOUND, POSTED, UNSEEN

LAYOUT = Layout(
    model="test",
    attention=Attention.GQA,
    layers=2,
    kv_heads=3,
    head_dim=16,
    dtype="float32",
    block_tokens=16,
)
RNG = np.random.default_rng(11)
KEYS = RNG.integers(0, 256, (40, 32), np.uint8)
BLOCKS = RNG.integers(0, 256, (40, LAYOUT.block_bytes), np.uint8)


class Puts:
    """A store, and what became of each single block that was put there."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store = KVStore(dram=32 << 20, verify_reads=True)
        self.space: NamespaceHandle = self.store.open_namespace("test", LAYOUT)
        self.states: list[int] = []
        real = Board.put_one

        def noted(board: Board, *args: Any, **kwargs: Any) -> int:
            state = real(board, *args, **kwargs)
            self.states.append(state)
            return state

        monkeypatch.setattr(Board, "put_one", noted)
        self.put(0)  # brings slots for the next ones
        assert not self.states

    def put(self, i: int, *, key: Any = None, block: Any = None, **options: Any) -> tuple[int, int]:
        hashes = KEYS[i : i + 1] if key is None else key
        sources = BLOCKS[i : i + 1] if block is None else block
        done = self.store.put(self.space, hashes, sources, **options)
        return done.stored, done.existed

    def check(self, *rows: int) -> None:
        """These are there, with their bytes, before and after they were taken over."""
        for _ in range(2):
            for i in rows:
                target = np.zeros(LAYOUT.block_bytes, np.uint8)
                found = self.store.get_into(self.space, KEYS[i : i + 1], [target])
                assert isinstance(found[0], Hit)
                assert np.array_equal(target, BLOCKS[i])
            self.store.stats()
            self.store.check()


@pytest.fixture
def puts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Puts]:
    made = Puts(monkeypatch)
    with made.store:
        yield made


def test_a_block_is_put_by_one_call(puts: Puts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(puts.store._own, "call", None)  # no command is
    assert [puts.put(i) for i in (1, 2, 3)] == [(1, 0)] * 3
    assert puts.states == [POSTED] * 3
    monkeypatch.undo()
    puts.check(0, 1, 2, 3)
    assert puts.store.stats().stored == 4


def test_blocks_one_after_the_other_are_all_there(puts: Puts) -> None:
    """Through several rounds of asking for slots; their header says where they are in a chain."""
    for i in range(1, 40):
        assert puts.put(i, parent=KEYS[i - 1].tobytes(), position=i) == (1, 0)
    assert puts.states.count(POSTED) > 20
    puts.check(*range(40))
    assert puts.store.match(puts.space, KEYS).count == 40


def test_a_block_that_is_there_keeps_its_slot_free(puts: Puts) -> None:
    puts.put(1)
    left = len(puts.store._writer.stock)
    assert [puts.put(i) for i in (0, 1)] == [(0, 1)] * 2  # in the index, and on the board
    assert puts.states[1:] == [FOUND] * 2
    assert len(puts.store._writer.stock) == left
    puts.check(0, 1)


def test_a_block_that_is_there_counts_as_read(puts: Puts) -> None:
    puts.put(0)
    touch = puts.store._touches.take()
    assert touch is not None
    assert len(touch.granules) == 1
    assert (touch.lookups, touch.hits) == (0, 0)


def test_another_epoch_of_namespaces_shows_nothing(puts: Puts) -> None:
    """Then the store is asked, which knows what the namespace's id means now."""
    other = puts.store.open_namespace("other", LAYOUT)
    puts.store.drop_namespace(other)
    assert puts.put(1) == (1, 0)
    assert puts.put(2) == (1, 0)
    assert puts.states == [UNSEEN, POSTED]
    puts.check(0, 1, 2)


def test_of_a_namespace_that_was_dropped_nothing_is_left(puts: Puts) -> None:
    puts.put(1)
    puts.store.drop_namespace(puts.space)
    assert puts.put(2) == (1, 0)
    assert puts.put(1) == (1, 0)
    assert puts.store.match(puts.space, KEYS[:1]).count == 0
    puts.check(1, 2)


def test_each_of_many_handles_is_its_own_namespace(puts: Puts) -> None:
    """More than are remembered, each of which may lie where an earlier one did."""
    for i in range(100):
        space = puts.store.open_namespace(f"{i}", LAYOUT)
        for key in (KEYS[:1], KEYS[1:2]):
            assert puts.store.put(space, key, BLOCKS[:1]).stored == 1
        assert puts.store.match(space, KEYS[:3]).count == 2
        puts.store.drop(space, KEYS[:2])
    puts.store.check()


def test_a_new_index_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """It grows with what is stored; what was said of the old one counts no more."""
    monkeypatch.setattr(limits, "FIRST_INDEX_BLOCKS", 16)
    puts = Puts(monkeypatch)
    with puts.store:
        puts.put(1)
        old = puts.store._own.ready
        assert puts.store.put(puts.space, KEYS[4:], BLOCKS[4:]).stored == 36
        assert puts.store._own.ready is not old
        assert [puts.put(i) for i in (1, 2, 3)] == [(0, 1), (1, 0), (1, 0)]
        assert puts.states == [POSTED, POSTED, POSTED]  # in between the whole way, once
        puts.check(*range(40))


@pytest.mark.parametrize(
    "key",
    [KEYS[1:2], KEYS[1].tobytes(), [KEYS[1].tobytes()], KEYS[1:3][::2], np.stack([KEYS[1]])],
)
@pytest.mark.parametrize("block", [BLOCKS[1:2], [BLOCKS[1]], (BLOCKS[1],)])
def test_keys_and_blocks_of_any_plain_form(puts: Puts, key: Any, block: Any) -> None:
    assert puts.put(1, key=key, block=block) == (1, 0)
    assert puts.states == [POSTED]
    puts.check(0, 1)


@pytest.mark.parametrize(
    "form",
    [
        {"key": (KEYS[1].tobytes(),)},
        {"key": np.repeat(KEYS[1:2], 2, axis=1)[:, ::2]},
        {"block": [BLOCKS[1].view(np.recarray)]},
        {"block": UserList([BLOCKS[1]])},
    ],
)
def test_other_forms_are_looked_at_more_closely(puts: Puts, form: dict[str, Any]) -> None:
    assert puts.put(1, **form) == (1, 0)
    puts.check(0, 1)


@pytest.mark.parametrize(
    "bad",
    [
        {"key": KEYS[1].tobytes()[:-1]},
        {"key": KEYS[1]},
        {"key": []},
        {"key": [KEYS[1:2]]},
        {"key": KEYS[1:2].view(np.int8)},
        {"key": KEYS[1:3]},
        {"key": None},
        {"block": [BLOCKS[1][:-1]]},
        {"block": [BLOCKS[1].view(np.int8)]},
        {"block": [BLOCKS[1].tobytes()]},
        {"block": BLOCKS[1:3]},
        {"put_id": b"short"},
        {"parent": b"short"},
        {"position": -2},
        {"position": limits.MAX_POSITION},
        {"timeout_s": 0.0},
    ],
)
def test_bad_input_is_refused_and_changes_nothing(puts: Puts, bad: dict[str, Any]) -> None:
    given = {"key": KEYS[1:2], "block": BLOCKS[1:2]} | bad
    left = len(puts.store._writer.stock)
    key, block = given.pop("key"), given.pop("block")
    with pytest.raises(KVStoreError):
        puts.store.put(puts.space, key, block, **given)
    assert len(puts.store._writer.stock) == left
    assert puts.store.match(puts.space, KEYS[1:2]).count == 0
    puts.check(0)


@pytest.mark.parametrize("position", [-1, 0, 7, limits.MAX_POSITION - 1])
@pytest.mark.parametrize("parent", [b"", KEYS[9].tobytes()])
def test_the_header_is_as_that_of_many(puts: Puts, position: int, parent: bytes) -> None:
    put_id = bytes(range(16))
    assert puts.put(1, put_id=put_id, parent=parent, position=position) == (1, 0)
    assert puts.states == [POSTED]
    memory = puts.store._own.ready
    assert memory
    granule = int(memory.index.lookup(puts.space.id, KEYS[1:2]).granules[0])
    expected = pack_parts(
        namespace=puts.space.id,
        key=KEYS[1].tobytes(),
        put_id=put_id,
        length=LAYOUT.block_bytes,
        checksums=cell_checksums(BLOCKS[1], LAYOUT.cell_bounds),
        parent=(parent if position >= 0 else b"") or NO_PARENT,
        position=position,
    )
    first = granule * limits.GRANULE_BYTES
    assert memory.pool[first : first + len(expected)].tobytes() == expected


def test_a_closed_board_shows_nothing(puts: Puts) -> None:
    puts.store._own._board.close()
    assert puts.put(1) == (1, 0)
    assert puts.states == [UNSEEN]
    puts.check(0, 1)


def test_a_slot_is_not_written_again_after_a_put_was_broken_off(
    puts: Puts, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, noted = puts.store._writer.stock, Board.put_one
    left = len(stock)

    def broken_off(*args: Any, **kwargs: Any) -> int:
        noted(*args, **kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(Board, "put_one", broken_off)
    with pytest.raises(KeyboardInterrupt):
        puts.put(1)
    monkeypatch.setattr(Board, "put_one", noted)
    assert len(stock) == left - 1
    assert [puts.put(i) for i in (2, 3)] == [(1, 0)] * 2
    puts.check(0, 1, 2, 3)


@pytest.mark.parametrize("options", [{"ttl_s": 60.0}, {"cells": (1,)}])
def test_other_puts_are_calls(puts: Puts, options: dict[str, Any]) -> None:
    part = BLOCKS[1:2, : LAYOUT.block_bytes // LAYOUT.n_cells] if "cells" in options else None
    blocks = BLOCKS[1:2] if part is None else np.ascontiguousarray(part)
    puts.store.put(puts.space, KEYS[1:2], blocks, **options)
    assert not puts.states


def test_slots_of_a_size_that_is_not_used_any_more_go_back(puts: Puts) -> None:
    other = Layout.opaque(model="other", block_bytes=300 << 10, block_tokens=16)
    space = puts.store.open_namespace("other", other)
    blocks = np.zeros((40, 300 << 10), np.uint8)
    stock, small = puts.store._writer.stock, part_of(LAYOUT).slot_granules
    assert stock.count(small)
    for i in range(40):
        assert puts.store.put(space, KEYS[i : i + 1], blocks[i : i + 1]).stored == 1
    assert stock.count(small) == 0
    puts.store.check()
    assert puts.put(1) == (1, 0)
    puts.check(0, 1)


@pytest.mark.parametrize("options", [{}, {"ttl_s": 60.0}])
def test_a_block_does_not_go_for_the_slots_of_the_next_ones(options: dict[str, Any]) -> None:
    """In a pool of which all else is in use."""
    with KVStore(dram=1 << 20) as store:
        space = store.open_namespace("test", LAYOUT)
        for _ in range(80):
            if store.put(space, KEYS[:1], BLOCKS[:1], **options).stored:
                assert store.match(space, KEYS[:1]).count == 1
            store.drop(space, KEYS[:1])
            others = RNG.integers(0, 256, (1, 32), np.uint8)
            store.put(space, others, BLOCKS[1:2])
            store.view(space, others)
        assert store.stats().refused
        store.check()
