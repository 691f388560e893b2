"""The store's promises, on the pure class: no process, no socket, `check()` after each step."""

from __future__ import annotations

import numpy as np
import pytest

from kvstore import commands as c
from kvstore.errors import InvalidArgument, LayoutMismatch, PermissionDenied, StaleNamespace
from kvstore.index.format import capacity_for, index_bytes
from kvstore.layout import Attention, Layout
from kvstore.store import Store, StoreMemory

NO_CELLS = np.empty(0, np.uint32)
LAYOUT = Layout(
    model="test",
    attention=Attention.GQA,
    layers=2,
    kv_heads=2,
    head_dim=16,
    dtype="float32",
    block_tokens=16,
)


class Rig:
    """A store of `blocks` slots with one connection and one namespace."""

    def __init__(self, pool: int = 1 << 20, max_blocks: int = 512) -> None:
        self.store = Store(
            StoreMemory(
                pool=np.zeros(pool, np.uint8),
                generations=np.zeros(pool // 4096, np.uint64),
                index=np.zeros(index_bytes(capacity_for(max_blocks)), np.uint8),
            ),
            secret=b"s" * 32,
            instance_id=7,
            max_blocks=max_blocks,
        )
        self.me = self.store.connect()
        self.ns = self.open()

    def open(self) -> int:
        opened = self.do(c.OpenNamespace(name="t", layout=LAYOUT.encode()))
        assert isinstance(opened, c.NamespaceOpened)
        return opened.namespace

    def do(self, command: c.Command, connection: int | None = None) -> c.Result:
        result = self.store.handle(connection or self.me, command)
        self.store.check()
        return result

    def reserve(self, hashes: c.U8, **options: object) -> c.Reserved:
        connection = options.pop("connection", None)
        fields = {"namespace": self.ns, "put_id": b"p" * 16, "cells": NO_CELLS, **options}
        result = self.do(c.Reserve(hashes=hashes, **fields), connection)  # type: ignore[arg-type]
        assert isinstance(result, c.Reserved)
        return result

    def seal(self, hashes: c.U8, cells: int = LAYOUT.n_cells, **options: object) -> c.Sealed:
        connection = options.pop("connection", None)
        fields = {"namespace": self.ns, "put_id": b"p" * 16, **options}
        sums = np.zeros((len(hashes), cells), np.uint64)
        result = self.do(
            c.Seal(hashes=hashes, checksums=sums, **fields),  # type: ignore[arg-type]
            connection,
        )
        assert isinstance(result, c.Sealed)
        return result

    def explain(self, hashes: c.U8) -> list[int]:
        result = self.do(c.Explain(namespace=self.ns, hashes=hashes))
        assert isinstance(result, c.Explained)
        return result.status.tolist()


def keys(*numbers: int) -> c.U8:
    rng = [np.random.default_rng(number).bytes(32) for number in numbers]
    return np.frombuffer(b"".join(rng), np.uint8).reshape(-1, 32)


def test_a_block_is_found_only_after_it_was_sealed() -> None:
    rig = Rig()
    rig.reserve(keys(1))
    assert rig.explain(keys(1)) == [c.ExplainStatus.NOT_SEALED]
    assert rig.seal(keys(1)).status.tolist() == [c.SealStatus.STORED]
    assert rig.explain(keys(1)) == [c.ExplainStatus.STORED]


def test_two_ranks_seal_one_block_together() -> None:
    rig = Rig()
    other = rig.store.connect()
    first = rig.reserve(keys(1), cells=np.array([0], np.uint32))
    second = rig.reserve(keys(1), cells=np.array([1], np.uint32), connection=other)
    assert first.granules.tolist() == second.granules.tolist()
    assert rig.seal(keys(1), cells=1).status.tolist() == [c.SealStatus.WAITING]
    assert rig.seal(keys(1), cells=1, connection=other).status.tolist() == [c.SealStatus.STORED]


def test_another_put_id_waits_and_never_mixes() -> None:
    rig = Rig()
    rig.reserve(keys(1))
    other = rig.store.connect()
    status = rig.reserve(keys(1), put_id=b"q" * 16, connection=other).status
    assert status.tolist() == [c.ReserveStatus.IN_PROGRESS]
    dropped = rig.seal(keys(1), put_id=b"q" * 16, connection=other).status
    assert dropped.tolist() == [c.SealStatus.DROPPED]


def test_a_dead_writer_gives_back_its_slots_and_shows_nothing() -> None:
    rig = Rig()
    writer = rig.store.connect()
    rig.reserve(keys(1, 2), connection=writer)
    assert not rig.store.disconnect(writer)  # closed, but it may still write
    rig.store.check()
    assert rig.store.stats().quarantined_blocks == 2
    rig.store.holder_died(writer)
    rig.store.check()
    assert rig.store.stats().used_bytes == 0
    assert rig.explain(keys(1)) == [c.ExplainStatus.NEVER_STORED]


def test_a_full_pool_evicts_the_oldest_and_never_a_leased_block() -> None:
    rig = Rig()
    first = keys(0)
    rig.reserve(first)
    rig.seal(first)
    leased = rig.do(c.Lease(namespace=rig.ns, hashes=first))
    assert isinstance(leased, c.Leased)
    for i in range(1, 300):
        rig.reserve(keys(i))
        rig.seal(keys(i))
    assert rig.explain(first) == [c.ExplainStatus.STORED]
    assert rig.explain(keys(1)) != [c.ExplainStatus.STORED]
    assert rig.store.stats().evicted > 0
    rig.do(c.Release(lease=leased.lease))


def test_a_pool_of_leased_blocks_has_no_space() -> None:
    rig = Rig()
    for i in range(200):
        if rig.reserve(keys(i)).status[0] != c.ReserveStatus.GRANTED:
            break
        rig.seal(keys(i))
        rig.do(c.Lease(namespace=rig.ns, hashes=keys(i)))
    assert rig.reserve(keys(999)).status.tolist() == [c.ReserveStatus.NO_SPACE]


def test_chains_are_evicted_from_the_tail() -> None:
    rig = Rig()
    chain = keys(*range(40))
    rig.reserve(chain, position=0)
    rig.seal(chain)
    other = keys(*range(100, 100 + 20))
    rig.reserve(other)
    rig.seal(other)
    for start in range(200, 1200, 10):
        rig.reserve(keys(*range(start, start + 10)), put_id=b"z" * 16)
        rig.seal(keys(*range(start, start + 10)), put_id=b"z" * 16)
        stored = [s == c.ExplainStatus.STORED for s in rig.explain(chain)]
        assert stored == sorted(stored, reverse=True), "a head went before its tail"


def test_a_slot_changes_its_generation_when_it_is_given_up() -> None:
    rig = Rig()
    reserved = rig.reserve(keys(1))
    rig.seal(keys(1))
    generations = rig.store._memory.generations
    before = int(generations[reserved.granules[0]])
    assert before % 2 == 0
    rig.do(c.Drop(namespace=rig.ns, hashes=keys(1)))
    assert int(generations[reserved.granules[0]]) != before


def test_dropping_a_namespace_moves_its_generation_on() -> None:
    rig = Rig()
    rig.reserve(keys(1))
    rig.seal(keys(1))
    rig.do(c.Drop(namespace=rig.ns, hashes=np.empty((0, 32), np.uint8)))
    with pytest.raises(StaleNamespace, match="open it again"):
        rig.reserve(keys(1))
    rig.ns = rig.open()
    assert rig.explain(keys(1)) == [c.ExplainStatus.NEVER_STORED]


@pytest.mark.parametrize(
    ("command", "error", "field"),
    [
        ({"put_id": b"short"}, InvalidArgument, "put_id"),
        ({"hashes": np.zeros((0, 32), np.uint8)}, InvalidArgument, "hashes"),
        ({"hashes": np.zeros((1, 31), np.uint8)}, InvalidArgument, "hashes"),
        ({"hashes": np.zeros((65_537, 32), np.uint8)}, InvalidArgument, "hashes"),
        ({"cells": np.array([99], np.uint32)}, LayoutMismatch, "cells"),
    ],
)
def test_bad_input_names_its_field_and_changes_nothing(
    command: dict[str, object], error: type[InvalidArgument], field: str
) -> None:
    rig = Rig()
    before = rig.store.stats()
    with pytest.raises(error) as caught:
        rig.reserve(**{"hashes": keys(1), **command})  # type: ignore[arg-type]
    assert caught.value.field == field
    assert rig.store.stats() == before


def test_a_lease_is_its_holders_alone() -> None:
    rig = Rig()
    with pytest.raises(PermissionDenied):
        rig.do(c.Release(lease=1))


@pytest.mark.parametrize("seed", range(5))
def test_random_histories_keep_every_invariant(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rig = Rig(max_blocks=64)
    peers = [rig.me, rig.store.connect(), rig.store.connect()]
    leases: list[tuple[int, int]] = []
    for step in range(300):
        peer = peers[int(rng.integers(3))]
        some = keys(*rng.choice(120, size=int(rng.integers(1, 8)), replace=False).tolist())
        put_id = bytes([int(rng.integers(3))]) * 16
        match int(rng.integers(7)):
            case 0 | 1:
                rig.reserve(some, put_id=put_id, connection=peer, position=step % 3 - 1)
            case 2:
                rig.seal(some, put_id=put_id, connection=peer)
            case 3:
                lease = rig.do(c.Lease(namespace=rig.ns, hashes=some), peer)
                assert isinstance(lease, c.Leased)
                leases.append((peer, lease.lease))
            case 4 if leases:
                holder, number = leases.pop(int(rng.integers(len(leases))))
                rig.do(c.Release(lease=number), holder)
            case 5:
                rig.do(c.Drop(namespace=rig.ns, hashes=some), peer)
            case 6:
                rig.do(c.Abort(namespace=rig.ns, put_id=put_id, hashes=some), peer)
