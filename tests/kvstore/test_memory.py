"""Mappings of shared memory: where they begin, whose pages they get, and which kind."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kvstore import memory
from kvstore.memory import Arena

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
HUGE = 2 << 20
NBYTES = 3 * HUGE + 4096


@pytest.fixture
def arena() -> Iterator[Arena]:
    with contextlib.closing(Arena.create("test", NBYTES)) as made:
        yield made


def again(arena: Arena, *, writable: bool) -> contextlib.closing[Arena]:
    return contextlib.closing(Arena(os.dup(arena.fd), arena.nbytes, writable=writable))


def address_of(arena: Arena) -> int:
    return int(arena.array.__array_interface__["data"][0])


def taken(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def smaps_of(arena: Arena, field: str) -> int:
    """Bytes of the mapping's `field` in /proc/self/smaps."""
    first, nbytes = f"{address_of(arena):x}-", 0
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if line.startswith(first):
                break
        for line in lines:
            name, _, rest = line.partition(":")
            if name == field:
                nbytes = int(rest.split()[0]) << 10
                break
    return nbytes


@pytest.mark.parametrize("writable", [True, False])
def test_a_mapping_begins_where_a_huge_page_may(arena: Arena, writable: bool) -> None:
    with again(arena, writable=writable) as other:
        assert address_of(arena) % HUGE == address_of(other) % HUGE == 0
        arena.array[:] = np.arange(NBYTES, dtype=np.uint64).astype(np.uint8)
        assert np.array_equal(arena.array, other.array)
        assert len(other.array) == NBYTES
        assert other.array.flags.writeable is writable


def test_a_mapping_is_gone_when_it_is_closed() -> None:
    with contextlib.closing(Arena.create("test-gone", NBYTES)):
        assert "kvstore-test-gone" in maps()
    assert "kvstore-test-gone" not in maps()


def maps() -> str:
    with open("/proc/self/maps") as file:
        return file.read()


def test_without_room_to_align_it_is_mapped_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("as planted")

    monkeypatch.setattr(memory, "_mapped_aligned", full)
    with contextlib.closing(Arena.create("test", NBYTES)) as arena:
        arena.array[-1] = 7
        assert arena.array[-1] == 7


@pytest.mark.parametrize("transparent", [True, False])
def test_prefault_takes_all_of_it_and_keeps_what_is_there(transparent: bool) -> None:
    made = Arena.create("test", NBYTES, transparent_huge_pages=transparent)
    with contextlib.closing(made) as arena, again(arena, writable=True) as other:
        other.array[5::4096] = 9
        arena.array[HUGE:] = 0
        arena.prefault(threading.Event())
        assert taken(arena) == NBYTES
        assert (arena.array[5:HUGE:4096] == 9).all()
        if not transparent and "[never]" in (HUGE_PAGES / "shmem_enabled").read_text():
            assert not smaps_of(arena, "ShmemPmdMapped")


@pytest.mark.skipif(
    tuple(map(int, platform.release().split(".")[:2])) < (6, 1) or not HUGE_PAGES.exists(),
    reason="this kernel gathers no pages to huge ones",
)
def test_prefault_takes_huge_pages(arena: Arena) -> None:
    arena.prefault(threading.Event())
    arena.populate(threading.Event())
    # Not all of them where the machine's memory is in pieces.
    assert smaps_of(arena, "ShmemPmdMapped") in range(HUGE, NBYTES, HUGE)


def test_who_maps_behind_another_takes_nothing_himself(
    arena: Arena, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = threading.Event()
    with again(arena, writable=True) as other:
        monkeypatch.setattr(memory, "_LOOK_S", 0)
        other.populate(stop, behind=True)  # gives up, as nobody takes more
        assert not taken(arena)
        arena.prefault(stop)
        other.populate(stop, behind=True)
        assert smaps_of(other, "Rss") == NBYTES
    stop.set()
    with again(arena, writable=True) as late:
        late.populate(stop, behind=True)
        assert not smaps_of(late, "Rss")


def test_who_maps_behind_another_waits_for_it(arena: Arena) -> None:
    stop = threading.Event()
    with again(arena, writable=True) as other:
        thread = threading.Thread(target=other.populate, args=(stop,), kwargs={"behind": True})
        thread.start()
        arena.prefault(stop)
        thread.join()
        assert smaps_of(other, "Rss") == NBYTES
