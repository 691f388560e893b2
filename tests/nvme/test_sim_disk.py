"""That the simulated disk loses what a real one may lose, and never what it may not."""

from __future__ import annotations

import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from nvme.sim_disk import PIECE_BYTES, SECTOR_BYTES, Bytes, Crashed, Io, SimDisk, aligned

from kvstore.errors import InvalidArgument

NBYTES = 64 * SECTOR_BYTES
S = SECTOR_BYTES


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def content(disk: SimDisk, offset: int = 0, nbytes: int | None = None) -> Bytes:
    buffer = aligned(disk.nbytes - offset if nbytes is None else nbytes)
    disk.read(offset, [buffer])
    return buffer


def fails(call: Callable[[], None], number: int = errno.EIO) -> None:
    with pytest.raises(OSError) as caught:
        call()
    assert caught.value.errno == number


def fate(old: Bytes, new: Bytes, found: Bytes) -> str:
    """What became of a sector's write; anything else than the three is an error."""
    pieces = (found.reshape(-1, PIECE_BYTES) == new.reshape(-1, PIECE_BYTES)).all(1)
    n = int(pieces.sum())
    if n == 0:
        assert np.array_equal(found, old)
        return "dropped"
    if n == pieces.size:
        return "kept"
    assert np.array_equal(found[: n * PIECE_BYTES], new[: n * PIECE_BYTES])
    assert np.array_equal(found[n * PIECE_BYTES :], old[n * PIECE_BYTES :])
    return "torn"


# A healthy disk.


def test_what_was_written_is_read_synced_or_not() -> None:
    disk = SimDisk(NBYTES, seed=1)
    parts = [aligned(n * S, seed=n) for n in (1, 0, 3)]
    disk.write(2 * S, parts)
    first, rest = aligned(2 * S), aligned(4 * S)
    for _ in range(2):
        disk.read(S, [first, rest])
        assert not first[:S].any()
        assert not rest[3 * S :].any()
        read = np.concatenate([first[S:], rest[: 3 * S]])
        assert np.array_equal(read, np.concatenate(parts))
        disk.sync()
    parts[0][:] = 0  # the writer's memory is its own again
    assert content(disk, 2 * S, S).any()


def test_it_refuses_what_a_file_refuses() -> None:
    disk = SimDisk(NBYTES, seed=1)
    for offset, buffer in ((1, aligned(S)), (0, aligned(2 * S)[:100]), (0, aligned(2 * S)[1:])):
        for call in (disk.read, disk.write):
            with pytest.raises(InvalidArgument):
                call(offset, [buffer])
    fails(lambda: disk.read(NBYTES, [aligned(S)]))
    fails(lambda: disk.write(NBYTES - S, [aligned(2 * S)]))
    assert disk.ios == 0
    disk.close()
    fails(disk.sync, errno.EBADF)


def test_it_grows() -> None:
    disk = SimDisk(NBYTES, seed=1)
    data = aligned(NBYTES, seed=1)
    disk.write(0, [data])
    disk.resize(2 * NBYTES)
    disk.reserve(NBYTES, NBYTES)
    assert np.array_equal(content(disk, 0, NBYTES), data)
    assert not content(disk, NBYTES).any()
    with pytest.raises(InvalidArgument, match="grow"):
        disk.resize(NBYTES)


def test_ios_are_counted_and_traced() -> None:
    disk = SimDisk(NBYTES, seed=1, trace=True)
    disk.write(S, [aligned(2 * S), aligned(S)])
    disk.sync()
    disk.read(0, [aligned(S)])
    assert disk.ios == 3
    assert disk.trace == [Io("write", S, 3 * S), Io("sync", 0, 0), Io("read", 0, S)]


def test_threads_do_not_meet() -> None:
    disk = SimDisk(NBYTES, seed=1)

    def work(i: int) -> bool:
        for turn in range(50):
            data = aligned(8 * S, seed=100 * i + turn)
            disk.write(i * 8 * S, [data])
            disk.sync()
            if not np.array_equal(content(disk, i * 8 * S, 8 * S), data):
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))
    assert disk.ios == 8 * 50 * 3


# Crashes.


def test_what_was_synced_survives_every_crash() -> None:
    disk = SimDisk(NBYTES, seed=1)
    kept = aligned(32 * S, seed=1)
    disk.write(0, [kept])
    disk.sync()
    disk.write(32 * S, [aligned(32 * S, seed=2)])
    for seed in range(200):
        after = disk.crash(rng(seed))
        assert after.ios == 0
        assert np.array_equal(content(after, 0, 32 * S), kept)


def test_an_unsynced_sector_is_kept_dropped_or_torn() -> None:
    old, new = aligned(16 * S, seed=1), aligned(16 * S, seed=2)
    disk = SimDisk(NBYTES, seed=1)
    disk.write(0, [old])
    disk.sync()
    disk.write(0, [new])
    fates, whole = set(), set()
    for seed in range(200):
        found = content(disk.crash(rng(seed)), 0, 16 * S)
        seen = [
            fate(old[at : at + S], new[at : at + S], found[at : at + S])
            for at in range(0, 16 * S, S)
        ]
        fates |= set(seen)
        whole |= {seen[0]} if len(set(seen)) == 1 else {"mixed"}
    assert fates == {"kept", "dropped", "torn"}
    assert whole >= {"kept", "dropped", "mixed"}


def test_a_later_write_may_survive_an_earlier_one() -> None:
    disk = SimDisk(NBYTES, seed=1)
    for at in range(2):
        disk.write(at * S, [aligned(S, seed=at)])
    seen = set()
    for seed in range(200):
        after = content(disk.crash(rng(seed)))
        seen.add((bool(after[:S].any()), bool(after[S : 2 * S].any())))
    assert seen == {(False, False), (False, True), (True, False), (True, True)}


def test_of_two_unsynced_writes_to_a_sector_any_may_be_left() -> None:
    first, second = aligned(S, seed=1), aligned(S, seed=2)
    disk = SimDisk(NBYTES, seed=1)
    disk.write(0, [first])
    disk.write(0, [second])
    seen = set()
    for seed in range(200):
        found = content(disk.crash(rng(seed)), 0, S)
        for name, data in (("none", np.zeros(S)), ("first", first), ("second", second)):
            if np.array_equal(found, data):
                seen.add(name)
    assert seen == {"none", "first", "second"}


def test_a_crash_is_repeated_by_its_seed_and_durable_by_then() -> None:
    disk = SimDisk(NBYTES, seed=1)
    disk.write(0, [aligned(NBYTES, seed=1)])
    one, same, other = disk.crash(rng(1)), disk.crash(rng(1)), disk.crash(rng(2))
    assert np.array_equal(content(one), content(same))
    assert not np.array_equal(content(one), content(other))
    assert np.array_equal(content(one.crash(rng(3))), content(same))
    with pytest.raises(Crashed):  # the old one is gone
        disk.sync()


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_power_goes_in_the_nth_io(n: int) -> None:
    disk = SimDisk(NBYTES, seed=1)
    disk.crash_at(n)
    calls: list[Callable[[], None]] = [
        lambda: disk.write(0, [aligned(S, seed=1)]),
        disk.sync,
        lambda: disk.read(0, [aligned(S)]),
        lambda: disk.write(S, [aligned(S, seed=2)]),
    ]
    for call in calls[: n - 1]:
        call()
    for call in calls:  # the nth, and any other thread's
        with pytest.raises(Crashed):
            call()
    assert disk.crashed
    assert not isinstance(Crashed(), Exception)
    after = content(disk.crash(rng(1)))
    assert np.array_equal(after[:S], aligned(S, seed=1)) or n <= 2
    assert not after[2 * S :].any()


def test_a_write_that_the_power_goes_in_may_be_done_in_part_or_whole() -> None:
    new = aligned(4 * S, seed=2)
    seen = set()
    for seed in range(300):
        disk = SimDisk(NBYTES, seed)
        disk.crash_at(1)
        with pytest.raises(Crashed):
            disk.write(0, [new])
        found = content(disk.crash(rng(seed)), 0, 4 * S)
        fates = [
            fate(np.zeros(S, np.uint8), new[a : a + S], found[a : a + S])
            for a in range(0, 4 * S, S)
        ]
        seen.add(fates[0] if len(set(fates)) == 1 else "mixed")
    assert seen >= {"kept", "dropped", "mixed"}


# Errors.


def test_a_failed_sync_loses_what_it_was_to_keep_though_the_next_succeeds() -> None:
    disk = SimDisk(NBYTES, seed=1)
    kept, lost, later = (aligned(S, seed=i) for i in range(3))
    disk.write(0, [kept])
    disk.sync()
    disk.write(0, [lost])
    disk.write(S, [lost])
    disk.fail_at(disk.ios + 1, errno.EIO, of="sync")
    fails(disk.sync)
    disk.write(2 * S, [later])
    disk.sync()  # says that all is well
    assert np.array_equal(content(disk, 0, S), lost)  # and it is read, until
    for seed in range(50):
        after = content(disk.crash(rng(seed)))
        assert np.array_equal(after[:S], kept)
        assert not after[S : 2 * S].any()
        assert np.array_equal(after[2 * S : 3 * S], later)


def test_what_a_failed_sync_lost_is_kept_if_it_is_written_again() -> None:
    disk = SimDisk(NBYTES, seed=1)
    data = aligned(S, seed=1)
    disk.write(0, [data])
    disk.fail_at(2, errno.EIO)
    fails(disk.sync)
    disk.write(0, [data])
    disk.sync()
    assert np.array_equal(content(disk.crash(rng(1)), 0, S), data)


@pytest.mark.parametrize("again", [False, True])
def test_a_failed_sync_may_be_one_that_the_next_makes_good(again: bool) -> None:
    disk = SimDisk(NBYTES, seed=1, failed_sync_loses=False)
    disk.write(0, [aligned(S, seed=1)])
    disk.fail_at(2, errno.EIO)
    fails(disk.sync)
    if again:
        disk.sync()
    is_there = {bool(content(disk.crash(rng(seed)), 0, S).any()) for seed in range(50)}
    assert is_there == ({True} if again else {False, True})


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_the_nth_io_fails_and_does_nothing(number: int) -> None:
    disk = SimDisk(NBYTES, seed=1)
    disk.fail_at(2, number, times=2)
    disk.write(0, [aligned(S, seed=1)])
    fails(lambda: disk.write(S, [aligned(S, seed=1)]), number)
    fails(lambda: disk.read(0, [aligned(S)]), number)
    assert not content(disk, S).any()
    disk.fail_at(5, number, times=None)
    for _ in range(20):
        fails(disk.sync, number)
    disk.heal()
    disk.sync()


def test_only_the_ios_of_one_kind_fail() -> None:
    disk = SimDisk(NBYTES, seed=1)
    disk.fail_at(1, errno.ENOSPC, times=None, of="write")
    disk.sync()
    content(disk)
    fails(lambda: disk.write(0, [aligned(S)]), errno.ENOSPC)


def test_a_short_write_or_read_does_a_part_and_fails() -> None:
    new = aligned(8 * S, seed=1)
    done = set()
    for seed in range(50):
        disk = SimDisk(NBYTES, seed)
        disk.fail_at(1, "short", times=1)
        fails(lambda disk=disk: disk.write(0, [new[: 4 * S], new[4 * S :]]))  # type: ignore[misc]
        found = content(disk, 0, 8 * S)
        n = int((found.reshape(-1, PIECE_BYTES) == new.reshape(-1, PIECE_BYTES)).all(1).sum())
        assert np.array_equal(found[: n * PIECE_BYTES], new[: n * PIECE_BYTES])
        assert not found[n * PIECE_BYTES :].any()
        done.add(n)
    assert len(done) > 20
    assert max(done) < 64
    disk = SimDisk(NBYTES, seed=3)
    disk.write(0, [new])
    disk.fail_at(2, "short")
    halves = [aligned(4 * S), aligned(4 * S)]
    fails(lambda: disk.read(0, halves))
    assert np.concatenate(halves).any()
    assert not np.array_equal(np.concatenate(halves), new)


def test_a_lost_write_is_acknowledged() -> None:
    disk = SimDisk(NBYTES, seed=1)
    disk.lie_at(2)
    for at in range(3):
        disk.write(at * S, [aligned(S, seed=at)])
    disk.sync()
    for found in (content(disk), content(disk.crash(rng(1)))):
        assert found[:S].any()
        assert not found[S : 2 * S].any()
        assert found[2 * S : 3 * S].any()


# Rot.


def filled() -> tuple[SimDisk, Bytes]:
    """A disk with random bytes of which the first half is synced."""
    disk = SimDisk(NBYTES, seed=1)
    data = aligned(NBYTES, seed=1)
    disk.write(0, [data[: NBYTES // 2]])
    disk.sync()
    disk.write(NBYTES // 2, [data[NBYTES // 2 :]])
    return disk, data


def changed(disk: SimDisk, data: Bytes) -> list[int]:
    """The sectors that differ from `data`, which stay so when they are synced and after a crash."""
    found = content(disk)
    disk.sync()
    assert np.array_equal(content(disk), found)
    assert np.array_equal(content(disk.crash(rng(1))), found)
    return np.flatnonzero((found != data).reshape(-1, S).any(1)).tolist()


@pytest.mark.parametrize("half", [0, 1])
def test_rot_stays_where_it_was_put(half: int) -> None:
    start, stop = half * NBYTES // 2, (half + 1) * NBYTES // 2
    for seed in range(20):
        disk, data = filled()
        at = disk.flip_bit(rng(seed), start, stop)
        assert start <= at < stop
        assert int(content(disk)[at] ^ data[at]).bit_count() == 1
        assert changed(disk, data) == [at // S]

        disk, data = filled()
        at = disk.zero_sector(rng(seed), start, stop)
        assert not content(disk, at, S).any()
        assert changed(disk, data) == [at // S]

        disk, data = filled()
        one, other = disk.swap_sectors(rng(seed), start, stop)
        assert np.array_equal(content(disk, one, S), data[other : other + S])
        assert np.array_equal(content(disk, other, S), data[one : one + S])
        assert changed(disk, data) == sorted([one // S, other // S])


def test_the_last_write_of_a_range_is_undone() -> None:
    disk, data = filled()
    disk.write(2 * S, [aligned(4 * S, seed=2)])
    disk.undo_write(2 * S, 4 * S)
    assert changed(disk, data) == []
    disk, data = filled()
    disk.undo_write(3 * S, S)
    assert not content(disk, 3 * S, S).any()
    assert changed(disk, data) == [3]


def test_a_truncated_disk_ends_earlier() -> None:
    disk, data = filled()
    disk.truncate(40 * S)
    assert disk.nbytes == 40 * S
    fails(lambda: disk.read(40 * S, [aligned(S)]))
    assert changed(disk, data[: 40 * S]) == []
    disk, data = filled()
    disk.truncate(S)
    assert changed(disk, data[:S]) == []
