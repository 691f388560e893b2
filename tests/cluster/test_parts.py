"""Cells of several clients on their way into one node's store, whatever comes between them."""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from store_rig import LAYOUT, Rig

from kvstore import commands as c
from kvstore import limits
from kvstore.block import cell_checksums
from kvstore.cluster.intake import NO_POSITION, Arrivals
from kvstore.cluster.messages import PutStatus
from kvstore.cluster.parts import take_part
from kvstore.cluster.placement import new_put_id, nonce_of, places_of_put_ids
from kvstore.cluster.site import Counters, NodePolicy, Space
from kvstore.errors import StaleNamespace
from kvstore.session.parts import ALL_CELLS, part_of, payload_offset
from kvstore.transfer.base import Arrived, Pieces, TransferFailed

RANKS = [np.array(cells, np.uint32) for cells in ([0], [1])]
WAITING, STORED, FAILED = PutStatus.WAITING, PutStatus.STORED, PutStatus.FAILED
_FIRST = payload_offset(LAYOUT)


class Seats:
    """A node's store: connections of `rig`, one for each seat that was taken."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.lost: list[int] = []

    @asynccontextmanager
    async def seat(self, timeout_ms: float) -> AsyncIterator[Any]:
        del timeout_ms
        number = self.rig.store.connect()

        async def command(command: c.Command, timeout_ms: float) -> Any:
            del timeout_ms
            await asyncio.sleep(0)
            return self.rig.do(command, number)

        async def lose() -> None:
            self.lost.append(number)
            self.rig.store.disconnect(number)

        yield SimpleNamespace(command=command, lose=lose)
        if number not in self.lost:
            assert self.rig.store.disconnect(number), "a seat that was left holds something"

    def addresses(self, _layout: object, granules: c.U32) -> c.U64:
        pool = int(self.rig.pool.__array_interface__["data"][0])
        return (pool + _FIRST + granules.astype(np.int64) * limits.GRANULE_BYTES).astype(np.uint64)

    async def sums(self, layout: Any, granules: c.U32, cells: c.U32 = ALL_CELLS) -> c.U64:
        return part_of(layout, cells).sums(self.addresses(layout, granules))


class Memory:
    """A client's memory, here. before: awaited by each read, which copies only then."""

    def __init__(
        self, before: Callable[[], Awaitable[None]] | None = None, *, closes: bool = True
    ) -> None:
        self._before, self._closes = before, closes

    async def read(self, pieces: Pieces, timeout_ms: float, arrived: Arrived | None = None) -> None:
        del timeout_ms, arrived
        if self._before:
            await self._before()
        rows = zip(pieces.local, pieces.remote, pieces.nbytes, strict=True)
        for local, remote, nbytes in rows:
            ctypes.memmove(int(local), int(remote), int(nbytes))

    async def write(self, pieces: Pieces, timeout_ms: float) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        if not self._closes:
            raise TransferFailed("its end cannot be seen")


class Node:
    """What `take_part` needs of a node, around one store."""

    def __init__(self, pool: int = 1 << 20) -> None:
        self.rig = Rig(pool)
        self.store = Seats(self.rig)
        self.site: Any = SimpleNamespace(
            store=self.store,
            world=SimpleNamespace(now_ms=lambda: 0.0),
            counters=Counters(),
            policy=NodePolicy(),
        )
        self.space = Space(number=self.rig.ns, instance=7, name="t", layout=LAYOUT, key=b"")

    async def take(
        self, data: c.U8, rank: int, memory: Memory, *, seed: int = 0, damaged: bool = False
    ) -> list[int]:
        """Some rank's cells of blocks, all of one segment."""
        cells = RANKS[rank]
        bounds = LAYOUT.cell_bounds
        parts = [np.concatenate([b[bounds[i] : bounds[i + 1]] for i in cells]) for b in data]
        n = len(data)
        sums = [cell_checksums(part, part_of(LAYOUT, cells).bounds) for part in parts]
        put_id = new_put_id(nonce_of(b"agreed"), 5)
        arrivals = Arrivals(
            hashes=keys(n, seed),
            addresses=np.array([p.__array_interface__["data"][0] for p in parts], np.uint64),
            checksums=np.array(sums, np.uint64) + np.uint64(damaged),
            put_ids=np.tile(np.frombuffer(put_id, np.uint8), (n, 1)),
            parents=np.zeros((n, limits.KEY_BYTES), np.uint8),
            positions=np.full(n, NO_POSITION, np.uint32),
            ttl_ms=np.zeros(n, np.uint64),
        )
        taking = take_part(self.site, self.space, memory, arrivals, cells=cells, timeout_ms=1000.0)
        return (await taking).tolist()

    @property
    def stored(self) -> int:
        return self.rig.store.stats().blocks

    @property
    def under_way(self) -> tuple[int, int]:
        """Blocks that are pending, and that are in quarantine."""
        stats = self.rig.store.stats()
        return stats.pending_blocks, stats.quarantined_blocks


def keys(n: int, seed: int) -> c.U8:
    return np.random.default_rng(seed).integers(0, 256, (n, limits.KEY_BYTES), np.uint8)


def blocks(n: int) -> c.U8:
    return np.random.default_rng(9).integers(0, 256, (n, LAYOUT.block_bytes), np.uint8)


def test_all_who_agreed_on_a_put_id_make_the_same_ones() -> None:
    ids = [new_put_id(nonce_of(b"x" * 16), place) for place in (3, 1 << 63)]
    assert ids == [new_put_id(nonce_of(b"x" * 16), place) for place in (3, 1 << 63)]
    assert nonce_of(b"y" * 16) != nonce_of(b"x" * 16)
    places, placed = places_of_put_ids(np.array([list(each) for each in ids], np.uint8))
    assert (places.tolist(), placed.tolist()) == ([3, 1 << 63], [True, True])


@pytest.mark.parametrize("first", [0, 1])
def test_cells_of_one_that_arrive_while_the_other_s_do_are_kept_apart(first: int) -> None:
    node, data = Node(), blocks(3)

    async def go() -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()

        async def wait() -> None:
            begun.set()
            await go_on.wait()

        slow = asyncio.create_task(node.take(data, first, Memory(wait)))
        await begun.wait()
        assert await node.take(data, 1 - first, Memory()) == [WAITING] * 3
        assert node.stored == 0
        go_on.set()
        assert await slow == [STORED] * 3

    asyncio.run(go())
    assert (node.stored, node.under_way) == (3, (0, 0))
    found = node.rig.store._shelf.catalog.find(node.rig.ns, keys(3, 0))
    for block, granule in zip(data, node.rig.store._shelf.blocks.granule[found], strict=True):
        start = int(granule) * limits.GRANULE_BYTES + _FIRST
        np.testing.assert_array_equal(node.rig.pool[start : start + len(block)], block)


def test_the_same_cells_twice_are_in_progress() -> None:
    node, data = Node(), blocks(2)
    assert asyncio.run(node.take(data, 0, Memory())) == [WAITING] * 2
    assert asyncio.run(node.take(data, 0, Memory())) == [PutStatus.BUSY] * 2
    assert asyncio.run(node.take(data, 1, Memory())) == [STORED] * 2
    assert asyncio.run(node.take(data, 1, Memory())) == [PutStatus.EXISTS] * 2


def test_damaged_cells_end_the_put_for_all() -> None:
    node, data = Node(), blocks(2)
    asyncio.run(node.take(data, 0, Memory()))
    assert asyncio.run(node.take(data, 1, Memory(), damaged=True)) == [FAILED] * 2
    assert (node.stored, node.under_way) == (0, (0, 0))
    assert node.site.counters.corrupted == 2


async def broken() -> None:
    raise TransferFailed("the other side is gone")


def test_after_a_failed_transfer_that_has_ended_the_slots_are_free() -> None:
    node, data = Node(), blocks(2)
    asyncio.run(node.take(data, 0, Memory()))
    with pytest.raises(TransferFailed):
        asyncio.run(node.take(data, 1, Memory(broken)))
    assert node.under_way == (0, 0)
    assert (node.store.lost, node.site.counters.lost_slots) == ([], 0)
    assert node.site.counters.failed_transfers == 1


def test_slots_that_somebody_may_still_write_to_are_nobody_s_until_the_process_ends() -> None:
    node, data = Node(), blocks(2)
    asyncio.run(node.take(data, 0, Memory()))
    with pytest.raises(TransferFailed):
        asyncio.run(node.take(data, 1, Memory(broken, closes=False)))
    assert node.under_way == (0, 2)
    assert (len(node.store.lost), node.site.counters.lost_slots) == (1, 2)
    # Another attempt, under the same put id even, has other slots.
    assert asyncio.run(node.take(data, 1, Memory())) == [WAITING] * 2
    assert asyncio.run(node.take(data, 0, Memory())) == [STORED] * 2
    assert node.under_way == (0, 2)
    node.rig.store.holder_died(node.store.lost[0])
    assert node.under_way == (0, 0)
    node.rig.store.check()


def test_what_was_forgotten_meanwhile_is_not_stored() -> None:
    node, data = Node(), blocks(2)

    async def forget() -> None:
        nothing = np.empty((0, limits.KEY_BYTES), np.uint8)
        node.rig.do(c.Drop(namespace=node.rig.ns, hashes=nothing))

    with pytest.raises(StaleNamespace):
        asyncio.run(node.take(data, 0, Memory(forget)))
    assert node.under_way == (0, 0)


def test_blocks_for_which_there_is_no_room_are_said() -> None:
    node = Node()
    room = int(limits.MAX_GRANTED_SHARE * (1 << 20)) // (12 << 10)
    status = asyncio.run(node.take(blocks(room + 5), 0, Memory()))
    assert status == [WAITING] * room + [PutStatus.NO_SPACE] * 5
