"""Carries operations out: the one place where blocks go between the pool and a disk."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.layout import Layout
from kvstore.nvme.format import Disk, aligned
from kvstore.nvme.ops import (
    U8,
    U32,
    U64,
    CheckBlocks,
    Op,
    Outcome,
    ReadBlocks,
    Run,
    Sync,
    WriteBlocks,
    WriteRaw,
)
from kvstore.nvme.slots import holds, namespace_of, renumber

_CHECKED_AT_ONCE = 8 << 20  # bytes that a scrub reads at a time
# Batches that are begun together are verified one after another where processors are few: the first
# is on its way to the disk sooner, and who puts the next ones, and the store, have time as well.
_verifying = threading.Semaphore(max(1, len(os.sched_getaffinity(0)) - 1))


def perform(op: Op, disks: Sequence[Disk], pool: U8) -> Outcome:
    """Does it, and says what came of it; an `OSError` is an outcome. Thread-safe."""
    disk = disks[op.volume]
    bad: npt.NDArray[np.bool_] = np.zeros(0, np.bool_)
    try:
        match op:
            case WriteRaw():
                _write_raw(op, disk)
            case WriteBlocks():
                bad = _write_blocks(op, disk, pool)
            case ReadBlocks():
                bad = _read_blocks(op, disk, pool)
            case CheckBlocks():
                bad = _check_blocks(op, disk)
            case Sync():
                disk.sync()
    except OSError as error:
        return Outcome(op.number, error=error.strerror or type(error).__name__)
    return Outcome(op.number, bad=bad)


def _write_raw(op: WriteRaw, disk: Disk) -> None:
    if op.syncs_before:
        disk.sync()
    for offset, content in op.writes:
        disk.write(offset, [content])
    if op.syncs_after:
        disk.sync()


def _write_blocks(op: WriteBlocks, disk: Disk, pool: U8) -> npt.NDArray[np.bool_]:
    slots = _slots(pool, op.granules, op.slot_granules)
    with _verifying:
        bad = _bad(slots, op.keys, op.stamps, op.layout)
    if not bad.any():
        disk.write(op.offset, [op.head, *slots])
    return bad


def _read_blocks(op: ReadBlocks, disk: Disk, pool: U8) -> npt.NDArray[np.bool_]:
    slots = _slots(pool, op.granules, op.slot_granules)
    first = 0
    for run in op.runs:
        disk.read(run.offset, slots[first : first + run.count])
        first += run.count
    bad = _bad(slots, op.keys, op.stamps, op.layout)
    for slot, wrong in zip(slots, bad.tolist(), strict=True):
        if not wrong and namespace_of(slot) != op.namespace:
            renumber(slot, op.namespace)
    return bad


def _check_blocks(op: CheckBlocks, disk: Disk) -> npt.NDArray[np.bool_]:
    size = op.slot_granules * limits.GRANULE_BYTES
    most = max(1, _CHECKED_AT_ONCE // size)
    room = aligned(most * size)
    parts = [np.zeros(0, np.bool_)]
    first = 0
    for run in _cut(op.runs, most, size):
        slots = list(room[: run.count * size].reshape(run.count, size))
        disk.read(run.offset, slots)
        end = first + run.count
        parts.append(_bad(slots, op.keys[first:end], op.stamps[first:end], op.layout))
        first = end
    return np.concatenate(parts)


def _cut(runs: Sequence[Run], most: int, size: int) -> Iterator[Run]:
    """The runs in pieces of at most so many slots."""
    for run in runs:
        for at in range(0, run.count, most):
            yield Run(offset=run.offset + at * size, count=min(most, run.count - at))


def _slots(pool: U8, granules: U32, slot_granules: int) -> list[U8]:
    unit = limits.GRANULE_BYTES
    return [pool[g * unit : (g + slot_granules) * unit] for g in granules.tolist()]


def _bad(slots: Sequence[U8], keys: U8, stamps: U64, layout: Layout) -> npt.NDArray[np.bool_]:
    """Which slots do not hold what they should: bool (n,)."""
    return ~holds(slots, keys, stamps, layout)
