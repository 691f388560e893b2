"""What a replay of a trace counts, on traces small enough to see it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.replay_store import replay, whole_slabs
from benchmarks.replay_tiers import replay_tiers
from benchmarks.replay_trace import Chain, attainable, foreseen, over, read_trace


def chains(*requests: list[int]) -> list[Chain]:
    return [np.array(request, np.int64) for request in requests]


def conversations(seed: int) -> list[Chain]:
    """Requests that go on from each other, behind a few common beginnings."""
    rng = np.random.default_rng(seed)
    known, fresh = chains([0, 1, 2], [0, 3]), 4
    for _ in range(200):
        before = known[int(rng.integers(len(known)))]
        n = int(rng.integers(1, 9))
        known.append(np.concatenate((before, np.arange(fresh, fresh + n))))
        fresh += n
    return known


def test_a_trace_is_read_without_blocks_that_are_not_full(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lengths = [(1024, [7, 8]), (1023, [7, 8]), (511, [9]), (1100, [7, 8, 9])]
    trace.write_text("\n".join(json.dumps({"input_length": n, "hash_ids": h}) for n, h in lengths))
    assert [chain.tolist() for chain in read_trace(trace)] == [[7, 8], [7], [7, 8]]
    assert [chain.tolist() for chain in read_trace(trace, 2)] == [[7, 8], [7]]


def test_a_session_is_over_when_its_last_block_is_not_asked_for_again() -> None:
    assert over(chains([1, 2], [1, 3], [1, 2, 4])).tolist() == [False, True, True]


def test_who_knows_the_future_keeps_what_comes_again() -> None:
    accesses = np.array([1, 2, 3, 1, 4, 2, 1, 3])
    assert [foreseen(accesses, blocks) for blocks in (1, 2, 3)] == [2, 3, 4]


@pytest.mark.parametrize("policy", ["lru", "arc", "s3fifo"])
def test_a_store_with_room_for_all_finds_whatever_can_be_found(policy: str) -> None:
    requests = conversations(1)
    unique = len(np.unique(np.concatenate(requests)))
    found = replay(whole_slabs(2 * unique), policy, requests, np.zeros(len(requests), np.bool_))
    assert found.hits == attainable(requests)
    assert found.put == unique


@pytest.mark.parametrize("hinted", [False, True])
def test_a_full_store_finds_less_and_never_more_than_can_be_foreseen(hinted: bool) -> None:
    requests = conversations(2)
    accesses = np.concatenate(requests)
    blocks = whole_slabs(1)
    told = over(requests) if hinted else np.zeros(len(requests), np.bool_)
    found = replay(blocks, "lru", requests, told)
    assert 0 < found.hits <= foreseen(accesses, blocks) < attainable(requests)


@pytest.mark.parametrize("every", [False, True])
def test_hits_by_tier_and_misses_are_all_look_ups(every: bool) -> None:
    requests = conversations(3)
    unique = len(np.unique(np.concatenate(requests)))
    found = replay_tiers(whole_slabs(unique // 10), unique // 2, "lru", requests, every=every)
    assert found.lookups == sum(map(len, requests))
    assert found.dram_hits + found.nvme_hits + found.misses == found.lookups
    assert found.written > 0
    assert found.amplification > 1.0
