"""What every session promises: exact bytes, honest misses, typed errors that change nothing."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from kvstore import (
    Attention,
    ExplainStatus,
    Hint,
    HintKind,
    Hit,
    Layout,
    Miss,
    MissReason,
    Session,
    Tier,
    hash_chain,
)
from kvstore.errors import InvalidArgument, LayoutMismatch, ResourceExhausted

from .conftest import LAYOUT, POOL_BYTES, empty_blocks, random_blocks, random_hashes


def test_a_get_returns_the_exact_bytes_that_were_put(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain = hash_chain(range(64), block_tokens=16, key=namespace.key)
    data = random_blocks(4)
    assert store.match(namespace, chain).count == 0
    result = store.put(namespace, chain[:3], data[:3], position=0)
    assert (result.stored, result.existed, result.not_stored) == (3, 0, 0)
    assert store.put(namespace, chain[:3], data[:3]).existed == 3
    matched = store.match(namespace, chain)
    assert (matched.count, matched.tiers) == (3, [Tier.DRAM] * 3)
    got = empty_blocks(4)
    answers = store.get_into(namespace, chain, got)
    assert answers == [Hit(Tier.DRAM)] * 3 + [Miss(MissReason.NOT_STORED)]
    for i in range(3):
        np.testing.assert_array_equal(got[i], data[i])


def test_a_large_batch_of_large_blocks_arrives_whole(store: Session, name: str) -> None:
    layout = Layout.opaque(model="test", block_bytes=(1 << 20) + 12345, block_tokens=16)
    namespace = store.open_namespace(name, layout)
    hashes, data = random_hashes(6), random_blocks(6, layout=layout)
    assert store.put(namespace, hashes, data).stored == 6
    got = empty_blocks(6, layout)
    assert all(isinstance(a, Hit) for a in store.get_into(namespace, hashes, got))
    for mine, put in zip(got, data, strict=True):
        np.testing.assert_array_equal(mine, put)
    store.drop_namespace(namespace)


def test_two_ranks_put_their_cells_and_a_third_reads_any_part(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, whole = random_hashes(2), random_blocks(2)
    cut = int(LAYOUT.cell_bounds[1])
    one = [block[:cut] for block in whole]
    other = [block[cut:] for block in whole]
    first = store.put(namespace, chain, one, put_id=b"x" * 16, cells=[0])
    assert (first.stored, first.waiting) == (0, 2)
    assert store.match(namespace, chain).count == 0
    explained = store.explain(namespace, chain)
    assert [report.status for report in explained] == [ExplainStatus.NOT_SEALED] * 2
    second = store.put(namespace, chain, other, put_id=b"x" * 16, cells=[1, 2])
    assert second.stored == 2
    got = empty_blocks(2)
    store.get_into(namespace, chain, got)
    np.testing.assert_array_equal(got, whole)
    middle = slice(int(LAYOUT.cell_bounds[1]), int(LAYOUT.cell_bounds[2]))
    parts = [np.zeros(middle.stop - middle.start, np.uint8) for _ in range(2)]
    assert isinstance(store.get_into(namespace, chain, parts, cells=[1])[1], Hit)
    for part, block in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(part, block[middle])


def test_another_put_of_a_key_in_progress_never_mixes_with_it(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, mine, theirs = random_hashes(1), random_blocks(1), random_blocks(1, seed=7)
    cut = int(LAYOUT.cell_bounds[1])
    store.put(namespace, chain, [mine[0][:cut]], put_id=b"a" * 16, cells=[0])
    other = store.put(namespace, chain, [theirs[0][cut:]], put_id=b"b" * 16, cells=[1, 2])
    assert other.not_stored == 1
    done = store.put(namespace, chain, [mine[0][cut:]], put_id=b"a" * 16, cells=[1, 2])
    assert done.stored == 1
    got = empty_blocks(1)
    store.get_into(namespace, chain, got)
    np.testing.assert_array_equal(got[0], mine[0])


def test_a_view_shows_the_bytes_and_holds_the_blocks(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, data = random_hashes(3), random_blocks(2)
    store.put(namespace, chain[:2], data)
    with store.view(namespace, chain) as view:
        assert len(view.blocks) == 2
        for shown, put in zip(view.blocks, data, strict=True):
            np.testing.assert_array_equal(shown, put)
            assert not shown.flags.writeable
        del shown
    view.release()  # a second one does nothing
    assert store.stats().leased_blocks == 0


def test_a_dropped_block_is_a_miss_and_says_so(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain = random_hashes(3)
    store.put(namespace, chain[:2], random_blocks(2))
    assert store.drop(namespace, chain[1:]) == 1
    assert store.match(namespace, chain).count == 1
    stored, dropped, never = store.explain(namespace, chain)
    assert (stored.status, stored.tier) == (ExplainStatus.STORED, Tier.DRAM)
    assert dropped.status is ExplainStatus.DROPPED
    assert dropped.when is not None
    assert never.status is ExplainStatus.NEVER_STORED


def test_a_dropped_namespace_is_empty_and_goes_on(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, data = random_hashes(2), random_blocks(2)
    store.put(namespace, chain, data)
    assert store.drop_namespace(namespace) == 2
    assert store.match(namespace, chain).count == 0
    assert store.put(namespace, chain, data).stored == 2  # the old handle is good for the new one
    assert store.match(namespace, chain).count == 2
    assert store.open_namespace(name, LAYOUT).generation == namespace.generation + 1


def test_a_block_of_another_layout_is_not_found_but_explained(store: Session, name: str) -> None:
    wider = Layout(
        model="test",
        attention=Attention.GQA,
        layers=2,
        kv_heads=4,
        head_dim=16,
        dtype="float32",
        block_tokens=16,
    )
    one, two = store.open_namespace(name, LAYOUT), store.open_namespace(name, wider)
    chain = hash_chain(range(32), block_tokens=16, key=one.key)
    store.put(one, chain, random_blocks(2))
    assert store.match(two, chain).count == 0
    assert [r.status for r in store.explain(two, chain)] == [ExplainStatus.OTHER_LAYOUT] * 2


def test_tenants_of_other_names_share_nothing(store: Session, name: str) -> None:
    one, two = store.open_namespace(name, LAYOUT), store.open_namespace(name + "b", LAYOUT)
    chain = hash_chain(range(32), block_tokens=16, key=one.key)
    store.put(one, chain, random_blocks(2))
    assert store.match(two, chain).count == 0
    assert store.match(two, hash_chain(range(32), block_tokens=16, key=two.key)).count == 0


def test_hints_reach_the_stored_blocks_only(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain = random_hashes(3)
    store.put(namespace, chain[:2], random_blocks(2), hint=Hint(kind=HintKind.PIN_UNTIL, for_s=60))
    assert store.stats().pinned_blocks == 2
    assert store.hint(namespace, chain, Hint(kind=HintKind.SESSION_ENDS)) == 2
    ends = Hint(kind=HintKind.NEXT_TURN_BY, for_s=60)
    assert store.match(namespace, chain, hint=ends).count == 2
    store.drop_namespace(namespace)
    assert store.stats().pinned_blocks == 0


def test_info_names_the_namespaces(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    store.put(namespace, random_hashes(2), random_blocks(2))
    info = store.info()
    mine = next(found for found in info.namespaces if found.name == name)
    assert (mine.blocks, mine.layout, mine.generation) == (2, LAYOUT, 0)
    assert info.policy == "lru"


@pytest.mark.parametrize("n", [1, 3])
def test_wrong_buffers_are_refused_with_their_name(store: Session, name: str, n: int) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain = random_hashes(n)
    with pytest.raises(LayoutMismatch, match=r"sources\[0\]"):
        store.put(namespace, chain, [np.zeros(3, np.uint8)] * n)
    with pytest.raises(InvalidArgument, match="buffers for"):
        store.get_into(namespace, chain, empty_blocks(n + 1))
    with pytest.raises(LayoutMismatch, match="cells"):
        store.put(namespace, chain, empty_blocks(n), cells=[3])
    with pytest.raises(LayoutMismatch, match="cells"):
        store.get_into(namespace, chain, empty_blocks(n), cells=[0, 0])
    assert store.match(namespace, chain).count == 0


def test_wrong_arguments_are_refused_with_their_name(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, data = random_hashes(1), random_blocks(1)
    none = np.empty((0, 32), np.uint8)
    with pytest.raises(InvalidArgument, match=r"hashes|keys"):
        store.put(namespace, none, [])
    with pytest.raises(InvalidArgument, match=r"hashes|keys"):
        store.drop(namespace, none)
    with pytest.raises(InvalidArgument, match=r"hashes|keys"):
        store.match(namespace, np.zeros((65_537, 32), np.uint8))
    with pytest.raises(InvalidArgument, match=r"hashes|keys"):
        store.match(namespace, [b"short"])
    with pytest.raises(InvalidArgument, match="put_id"):
        store.put(namespace, chain, data, put_id=b"short")
    with pytest.raises(InvalidArgument, match="parent"):
        store.put(namespace, chain, data, parent=b"short", position=1)
    with pytest.raises(InvalidArgument, match="timeout_s"):
        store.match(namespace, chain, timeout_s=0)
    with pytest.raises(InvalidArgument, match="timeout_s"):
        store.stats(timeout_s=-1.0)
    with pytest.raises(InvalidArgument, match="ttl"):
        store.put(namespace, chain, data, ttl_s=-1.0)
    with pytest.raises(InvalidArgument, match=r"for_s|for_ms"):
        store.hint(namespace, chain, Hint(kind=HintKind.PIN_UNTIL, for_s=1e9))
    with pytest.raises(InvalidArgument, match="name"):
        store.open_namespace("", LAYOUT)
    assert store.match(namespace, chain).count == 0


def test_a_block_too_large_for_the_pool_is_refused_at_open(store: Session, name: str) -> None:
    layout = Layout.opaque(model="test", block_bytes=POOL_BYTES, block_tokens=16)
    with pytest.raises(InvalidArgument, match="layout"):
        store.open_namespace(name, layout)


def test_more_than_half_of_the_pool_cannot_be_pinned(store: Session, name: str) -> None:
    layout = Layout.opaque(model="test", block_bytes=1 << 20, block_tokens=16)
    namespace = store.open_namespace(name, layout)
    chain, data = random_hashes(24), random_blocks(1, layout=layout) * 24
    for at in range(0, 24, 4):
        store.put(namespace, chain[at : at + 4], data[:4])
    stored = store.match(namespace, chain).count
    assert stored > 16
    with pytest.raises(ResourceExhausted, match="retry"):
        store.hint(namespace, chain, Hint(kind=HintKind.PIN_UNTIL, for_s=60))
    assert store.stats().pinned_blocks == 0
    store.drop_namespace(namespace)


def test_threads_may_share_a_session(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    wrong: list[str] = []

    def work(seed: int) -> None:
        chain, data = random_hashes(8, seed), random_blocks(8, seed)
        got = empty_blocks(8)
        for _ in range(5):
            store.put(namespace, chain, data)
            answers = store.get_into(namespace, chain, got)
            for answer, mine, put in zip(answers, got, data, strict=True):
                if isinstance(answer, Hit) and not np.array_equal(mine, put):
                    wrong.append(f"thread {seed}")
            store.drop(namespace, chain)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
