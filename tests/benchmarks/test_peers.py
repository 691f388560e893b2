"""The harness's clients: what they verify, and that a peer's failure ends that peer only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from benchmarks.client import Bytes1D, Keys
from benchmarks.limits import Memcpy
from benchmarks.peers import Harness, moves
from benchmarks.report import Results
from benchmarks.systems import JobError, System
from benchmarks.worker import Jobs


class Memory:
    """A store in a dict; it spoils what it returns if told to."""

    def __init__(self, *, spoil: bool = False) -> None:
        self.blocks: dict[bytes, Bytes1D] = {}
        self._spoil = spoil

    def buffers(self, n: int, nbytes: int) -> list[Bytes1D]:
        return list(np.zeros((n, nbytes), np.uint8))

    def put(self, keys: Keys, sources: Sequence[Bytes1D]) -> int:
        self.blocks.update(zip(keys, (source.copy() for source in sources), strict=True))
        return len(keys)

    def get(self, keys: Keys, targets: Sequence[Bytes1D]) -> int:
        for key, target in zip(keys, targets, strict=True):
            target[:] = self.blocks[key]
            target[-1] ^= self._spoil
        return len(keys)

    def exists(self, keys: Keys) -> int:
        return sum(key in self.blocks for key in keys)

    def drop(self, keys: Keys) -> None:
        for key in keys:
            del self.blocks[key]

    def close(self) -> None:
        self.blocks.clear()


def move(client: Memory) -> dict[str, list[tuple[float, float]]]:
    jobs = Jobs(client, chained=False)
    return jobs.move(seed="s", nbytes=4096, batch=3, repeats=2, meet=False)


def test_a_move_times_each_put_and_get_and_leaves_nothing_stored() -> None:
    client = Memory()
    spans = move(client)
    assert [len(spans[op]) for op in ("put", "get")] == [2, 2]
    assert not client.blocks


def test_one_wrong_byte_fails_the_move() -> None:
    with pytest.raises(AssertionError, match="other bytes"):
        move(Memory(spoil=True))


@pytest.mark.parametrize("chained", [False, True])
def test_look_ups_find_all_that_they_ask_for(chained: bool) -> None:
    jobs = Jobs(Memory(), chained=chained)
    jobs.load(seed="s", nbytes=16, n=10, batch=4)
    assert len(jobs.look(seed="s", n=10, count=7, repeats=3)["look"]) == 3
    jobs.unload(seed="s", n=10, batch=4)
    with pytest.raises(AssertionError, match="0 of 7"):
        jobs.look(seed="s", n=10, count=7, repeats=1)


class FailingWorker:
    def run(self, job: str, **arguments: object) -> dict[str, object]:
        raise JobError("the peer says no")


def test_a_system_that_fails_takes_no_further_part_and_is_reported() -> None:
    results = Results()
    system = System("peer", "benchmarks.adapters.redis", "1", False, [FailingWorker()])  # type: ignore
    Harness([system], results, rounds=1).measure_looks()
    assert "the peer says no" in results.missing["peer"]
    assert not results.systems


def test_each_shape_is_measured_a_few_times_but_never_for_long() -> None:
    repeats = {shape.name: shape.repeats for shape in moves([1, 4])}
    assert repeats["256 KiB x1"] == 20
    assert repeats["4 MiB x64, 4 clients"] == 1


@pytest.mark.parametrize(("batch", "threads"), [(1, 1), (1, 2), (5, 2)])
def test_the_memcpy_limit_moves_all_bytes(batch: int, threads: int) -> None:
    memcpy = Memcpy(4096, batch)
    memcpy._private[:] = np.arange(memcpy.nbytes) % 251  # it compares both sides itself
    assert len(memcpy.spans("put", threads, 1)) == 1
    memcpy._private[:] = 0
    assert len(memcpy.spans("get", threads, 1)) == 1
    assert memcpy._private.any()
