"""What others see between two steps of one that changes something."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from store_rig import LAYOUT, Rig, keys

from kvstore import Hit, KVStore, Layout, Miss
from kvstore.clock import Clock
from kvstore.index import boards as boards_module
from kvstore.index import looking
from kvstore.index.boards import BOARDS_BYTES, BoardKeeper, Boards
from kvstore.index.format import DRAM_TIER, key_words
from kvstore.session import writes
from kvstore.session.writes import Writer
from kvstore.store.blocks import BlockState
from kvstore.store.catalog import Catalog


def test_what_the_index_loses_while_it_is_kept_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig()
    for first in range(0, 80, 20):
        rig.put(keys(*range(first, first + 20)))
    read = keys(3)
    block = np.array([rig.store._shelf.catalog.find(rig.ns, read)[0]], np.uint32)
    real = Catalog.remove

    def loses(self: Catalog, ids: Any, *rest: Any) -> Any:
        """The index is made anew, and the kept one finds no place any more."""
        monkeypatch.undo()
        lost = real(self, ids, *rest)
        self._index.delete(block)
        return np.concatenate((lost, block))

    monkeypatch.setattr(Catalog, "remove", loses)
    rig.reserve(np.concatenate((read, keys(*range(1000, 1010)))))
    assert rig.store._shelf.blocks.count(BlockState.DOOMED) == 0


class StoppedError(Exception):
    """The writer got no further."""


class OneWrite:
    """Words whose writer stops after it has written one."""

    def __init__(self, words: Any) -> None:
        self.words = words

    def __getitem__(self, at: Any) -> Any:
        return self.words[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        self.words[at] = value
        raise StoppedError


def test_a_block_that_is_just_being_adopted_is_not_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    boards = Boards.create(np.zeros(BOARDS_BYTES, np.uint8))
    keeper = BoardKeeper(boards)
    board = keeper.open()
    assert board is not None
    rig = Rig()
    hashes = keys(0)
    generations = np.arange(2, 2 + 4096, dtype=np.uint64) * 2
    assert boards.post(
        board,
        rig.ns,
        key_words(hashes),
        length=LAYOUT.block_bytes,
        granules=np.array([0], np.uint32),
        generations=generations,
    )
    table = rig.store._shelf.catalog._index
    real = looking.pending

    def adopted_just_now(words: Any) -> bool:
        """The keeper has got as far as the first of its two words."""
        shown = table.insert(
            hashes,
            namespace=rig.ns,
            lengths=np.array([LAYOUT.block_bytes]),
            granules=np.array([0]),
            block_ids=np.array([0]),
            generations=generations[:1],
            tier=DRAM_TIER,
        )
        assert shown.all()
        with pytest.raises(StoppedError):
            boards_module._adopted(OneWrite(boards.words), board, np.uint64(0), np.uint64(1))
        return real(words)

    monkeypatch.setattr(looking, "pending", adopted_just_now)
    monkeypatch.setattr(looking, "in_order", lambda: None)
    monkeypatch.setattr(boards_module, "in_order", lambda: None)
    found = np.empty((1, 8), np.uint64)
    view = table.view
    count = looking._look(
        view.rows, key_words(hashes), rig.ns, 64, False, boards.words, boards.rows, found
    )
    assert count == 1


class Later:
    """A clock that is a minute ahead."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def now_ms(self) -> int:
        return self._clock.now_ms() + 60_000


def test_an_embedded_store_serves_nothing_past_its_time() -> None:
    layout = Layout.opaque(model="m", block_bytes=3840, block_tokens=16)
    with KVStore(dram=4 << 20) as store:
        namespace = store.open_namespace("t", layout)
        block, target = [np.ones(3840, np.uint8)], [np.zeros(3840, np.uint8)]
        assert store.put(namespace, keys(0), block, ttl_s=30.0).stored == 1
        assert isinstance(store.get_into(namespace, keys(0), target)[0], Hit)
        store._own._clock = Later(store._own._clock)  # type: ignore[assignment]
        assert store.match(namespace, keys(0)).count == 0
        assert isinstance(store.get_into(namespace, keys(0), target)[0], Miss)


def test_slots_of_a_put_that_was_broken_off_once_shown_are_not_written_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layout = Layout.opaque(model="m", block_bytes=3840, block_tokens=16)
    with KVStore(dram=4 << 20) as store:
        namespace = store.open_namespace("t", layout)
        block, target = [np.ones(3840, np.uint8)], [np.zeros(3840, np.uint8)]
        for i in range(3):
            store.put(namespace, keys(i), block)

        def interrupted() -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store._own, "_settle", interrupted)
            with pytest.raises(KeyboardInterrupt):
                store.put(namespace, keys(7), block, ttl_s=3600.0)
        assert isinstance(store.get_into(namespace, keys(7), target)[0], Hit)
        assert store.put(namespace, keys(8), [np.full(3840, 2, np.uint8)]).stored == 1
        assert isinstance(store.get_into(namespace, keys(7), target)[0], Hit)
        assert (target[0] == 1).all()


@pytest.mark.parametrize("n", [1, 2])
def test_a_put_sees_a_namespace_dropped_though_the_index_has_moved_with_it(
    monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """As `test_a_put_of_whole_blocks_goes_into_a_namespace_that_was_dropped_meanwhile`."""
    layout = Layout.opaque(model="m", block_bytes=3840, block_tokens=16)
    monkeypatch.setattr("kvstore.store.catalog._MANY", 0)  # a small index is made anew too
    with KVStore(dram=4 << 20) as store:
        namespace = store.open_namespace("t", layout)
        block, target = [np.ones(3840, np.uint8)] * n, [np.zeros(3840, np.uint8) for _ in range(n)]
        store.put(namespace, keys(*range(100, 100 + n)), block)
        store.put(namespace, keys(*range(n)), block)
        name = "_fill_one" if n == 1 else "copy_all_in"
        real = getattr(writes, name)

        def dropped_first(*a: Any, **rest: Any) -> Any:
            monkeypatch.setattr(writes, name, real)
            old = store._own._memory
            store.drop_namespace(namespace)
            assert old is not store._own._memory
            return real(*a, **rest)

        monkeypatch.setattr(writes, name, dropped_first)
        hashes = keys(*range(50, 50 + n))
        monkeypatch.setattr(Writer, "put_one", lambda *_, **__: None)
        assert store.put(namespace, hashes, block).stored == n
        got = store.get_into(namespace, hashes, target)
        assert all(isinstance(each, Hit) for each in got)
