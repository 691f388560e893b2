"""The eviction policies against models and the properties they are chosen for."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from kvstore.errors import InvalidArgument
from kvstore.eviction import EvictionPolicy, make_policy
from kvstore.eviction.arc import Arc
from kvstore.eviction.order import BoolArray, GhostTable, IdArray, LazyOrder

NAMES = ["lru", "s3fifo", "arc"]


def ids_of(*values: int) -> IdArray:
    return np.array(values, np.uint32)


def span(start: int, stop: int) -> IdArray:
    return np.arange(start, stop, dtype=np.uint32)


def admit(policy: EvictionPolicy, ids: IdArray) -> None:
    policy.admit(ids, ids.astype(np.uint64) + np.uint64(1))


def every(ids: IdArray) -> BoolArray:
    return np.ones(ids.size, np.bool_)


def none(ids: IdArray) -> BoolArray:
    return np.zeros(ids.size, np.bool_)


def test_unknown_policy_names_the_known() -> None:
    with pytest.raises(InvalidArgument, match="arc, lru, s3fifo"):
        make_policy("fifo", 10)
    with pytest.raises(InvalidArgument):
        make_policy("lru", 0)


def test_order_against_a_model() -> None:
    rng = np.random.default_rng(3)
    order, model = LazyOrder(100), OrderedDict[int, None]()
    for _ in range(5000):
        ids = rng.integers(0, 100, int(rng.integers(0, 150))).astype(np.uint32)
        op = rng.integers(0, 3)
        if op == 0:
            order.push_back(ids)
            for i in ids.tolist():
                model.pop(i, None)
                model[i] = None
        elif op == 1:
            order.remove(ids[:20])
            for i in ids[:20].tolist():
                model.pop(i, None)
        else:
            k = int(rng.integers(0, 30))
            want = [model.popitem(last=False)[0] for _ in range(min(k, len(model)))]
            assert order.pop_front(k).tolist() == want
        assert len(order) == len(model)
        order.check()


def test_lru_against_a_model() -> None:
    rng = np.random.default_rng(5)
    policy, model = make_policy("lru", 200), OrderedDict[int, None]()
    for _ in range(3000):
        ids = rng.permutation(200)[: int(rng.integers(0, 30))].astype(np.uint32)
        op = int(rng.integers(0, 4))
        if op == 0:
            admit(policy, ids)
        elif op == 1:
            policy.touch(ids)
        elif op == 2:
            policy.forget(ids[:5])
            for i in ids[:5].tolist():
                model.pop(i, None)
        else:
            want = [model.popitem(last=False)[0] for _ in range(min(7, len(model)))]
            assert policy.victims(7, every).tolist() == want
        for i in ids[::-1].tolist() if op < 2 else []:
            if op == 0 or i in model:
                model.pop(i, None)
                model[i] = None
        assert len(policy) == len(model)
        policy.check()


@pytest.mark.parametrize("name", NAMES)
def test_the_tail_of_a_chain_goes_first(name: str) -> None:
    policy = make_policy(name, 100)
    admit(policy, span(0, 10))
    assert policy.victims(10, every).tolist() == list(range(9, -1, -1))
    assert len(policy) == 0


@pytest.mark.parametrize("name", NAMES)
def test_demoted_go_first_unless_read_again(name: str) -> None:
    policy = make_policy(name, 100)
    admit(policy, span(0, 30))
    policy.demote(span(10, 14))
    policy.touch(ids_of(12))
    policy.demote(ids_of(99))  # not held: ignored
    assert policy.victims(3, every).tolist() == [13, 11, 10]
    policy.check()


@pytest.mark.parametrize("name", NAMES)
def test_blocks_in_use_are_skipped_and_progress_is_made(name: str) -> None:
    policy = make_policy(name, 20_000)
    admit(policy, span(0, 20_000)[::-1])  # evicted from 0 up
    looked = 0

    def upper(ids: IdArray) -> BoolArray:
        nonlocal looked
        looked += ids.size
        return ids >= 15_000

    out: list[int] = []
    for _ in range(60):
        out += policy.victims(4, upper).tolist()
    assert out
    assert min(out) >= 15_000
    assert looked <= 60 * (8 * 4 + 1024 + 1024)  # the last chunk of a queue may be cut short
    assert len(policy) == 20_000 - len(out)
    assert policy.victims(5, none).size == 0
    assert len(policy) == 20_000 - len(out)
    policy.check()


@pytest.mark.parametrize("name", NAMES)
def test_demoted_blocks_in_use_do_not_hide_the_others(name: str) -> None:
    policy = make_policy(name, 10_000)
    admit(policy, span(0, 10_000))
    policy.demote(span(0, 9_000))
    assert policy.victims(5, lambda ids: ids >= 9_000).size == 5


@pytest.mark.parametrize("name", NAMES)
def test_random_operations_keep_the_invariants(name: str) -> None:
    rng = np.random.default_rng(11)
    policy, held = make_policy(name, 500), set[int]()
    for _ in range(1500):
        ids = rng.permutation(500)[: int(rng.integers(0, 60))].astype(np.uint32)
        op = int(rng.integers(0, 5))
        if op == 0:
            admit(policy, ids)
            held |= set(ids.tolist())
        elif op == 1:
            policy.touch(ids)
        elif op == 2:
            policy.demote(ids)
        elif op == 3:
            policy.forget(ids)
            held -= set(ids.tolist())
        else:
            out = policy.victims(20, lambda x: x % 3 != 0).tolist()
            assert set(out) <= held
            assert len(out) == len(set(out)) == min(20, sum(i % 3 != 0 for i in held))
            held -= set(out)
        assert len(policy) == len(held)
        policy.check()


def test_s3fifo_one_hit_wonders_go_before_twice_read_blocks() -> None:
    policy = make_policy("s3fifo", 1000)
    admit(policy, span(0, 1000))
    for _ in range(2):
        policy.touch(span(900, 1000))  # the tail, which would go first otherwise
    out = policy.victims(850, every)
    assert out.size == 850
    assert out.max() < 900


def test_s3fifo_of_hot_blocks_still_yields_and_ghosts_return_to_main() -> None:
    policy = make_policy("s3fifo", 50_000)
    admit(policy, span(0, 50_000))
    for _ in range(3):
        policy.touch(span(0, 50_000))
    assert policy.victims(3, every).size == 3
    other = make_policy("s3fifo", 100)
    admit(other, span(0, 100))
    back = other.victims(10, every)
    admit(other, back)
    assert not np.isin(other.victims(60, every), back).any()


def test_arc_resists_a_scan() -> None:
    policy = make_policy("arc", 2000)
    admit(policy, span(0, 100))
    policy.touch(span(0, 100))
    for start in range(100, 1900, 100):
        admit(policy, span(start, start + 100))
        out = policy.victims(100, every)
        assert out.size == 100
        assert out.min() >= 100


def test_arc_moves_its_target_by_the_ghosts_hit() -> None:
    policy = Arc(1000)
    admit(policy, span(0, 50))
    policy.touch(span(0, 50))
    admit(policy, span(50, 100))
    out = policy.victims(20, every)
    assert policy.target == 0
    admit(policy, out)
    risen = policy.target
    assert risen >= 20
    out = policy.victims(40, every)
    from_t2 = out[out < 50]
    assert from_t2.size
    admit(policy, from_t2)
    assert policy.target < risen
    policy.check()


def test_ghosts_age_and_leave_on_a_hit() -> None:
    ghosts = GhostTable(1 << 12)
    first = np.arange(1, 5, dtype=np.uint64)
    ghosts.put(first)
    ghosts.trim(3)
    assert ghosts.take(first).tolist() == [False, True, True, True]
    assert not ghosts.take(first).any()
    assert len(ghosts) == 0


def test_ghosts_that_share_a_bucket_are_forgotten_oldest_first() -> None:
    ghosts = GhostTable(16)  # four buckets of four
    many = np.arange(1, 33, dtype=np.uint64)
    ghosts.put(many[:16])
    ghosts.put(many[16:])
    known = ghosts.take(many)
    assert 4 <= known.sum() <= 16
    assert known[-4:].all()
    assert not known[:4].any()


def test_ghosts_of_a_table_half_full_are_hardly_forgotten() -> None:
    ghosts = GhostTable(1 << 12)
    fingerprints = np.random.default_rng(2).integers(1 << 64, size=1 << 11, dtype=np.uint64)
    for start in range(0, 1 << 11, 64):
        ghosts.put(fingerprints[start : start + 64])
    assert ghosts.take(fingerprints).mean() > 0.9
