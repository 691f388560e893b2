"""What is NIXL's own about an engine: its parts, what fails in it, and a store over it."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import resource
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvme.sim_disk import aligned

from kvstore import Hit, KVStore, Layout
from kvstore.errors import InvalidArgument, Unavailable
from kvstore.nvme import nixl
from kvstore.nvme.disk import ALIGN_BYTES, FileDisk
from kvstore.nvme.nixl import NixlEngine, why_not
from kvstore.nvme.opening import Location, open_all
from kvstore.store import NvmePolicy

NBYTES = 16 << 20
PAGE = ALIGN_BYTES
LAYOUT = Layout.opaque(model="test", block_bytes=200_000, block_tokens=16)
N = 24
WAIT_S = 30.0
HERE = pytest.mark.skipif(bool(why_not()), reason="NIXL's POSIX plugin does not work here")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[FileDisk]:
    opened = FileDisk.open(tmp_path, NBYTES, name="volume", engine=NixlEngine)
    yield opened
    opened.close()


# -- what is asked of NIXL -----------------------------------------------------------------


@settings(derandomize=True, database=None, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 63), st.integers(0, 9)), max_size=40),
    st.integers(0, 5),
    st.integers(1, 7),
    st.integers(1, 5),
)
def test_all_bytes_are_asked_for_once_in_few_pieces_in_their_place(
    buffers: list[tuple[int, int]], first: int, most_parts: int, part_pages: int
) -> None:
    memory = aligned(72 * PAGE)
    start = memory.ctypes.data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nixl, "_PARTS", most_parts)
        patch.setattr(nixl, "_PART_BYTES", part_pages * PAGE)
        chosen = [memory[at * PAGE : (at + n) * PAGE] for at, n in buffers]
        transfers = list(nixl._transfers(first * PAGE, chosen))
    wanted = [start + (at + i) * PAGE for at, n in buffers for i in range(n)]
    found: list[int] = []
    for pieces in transfers:
        assert 0 < len(pieces.nbytes) <= most_parts
        for address, offset, nbytes in zip(
            pieces.local.tolist(), pieces.remote.tolist(), pieces.nbytes.tolist(), strict=True
        ):
            assert offset == (first + len(found)) * PAGE
            assert 0 < nbytes <= part_pages * PAGE
            found += range(address, address + nbytes, PAGE)
    assert found == wanted


def test_neighbours_in_memory_are_one_piece() -> None:
    memory = aligned(64 * PAGE)
    (pieces,) = nixl._transfers(0, list(memory.reshape(64, PAGE)))
    assert pieces.nbytes.tolist() == [64 * PAGE]


@HERE
def test_more_pieces_than_a_transfer_takes(disk: FileDisk) -> None:
    n = 2500
    data = aligned(n * PAGE, seed=1)
    backwards = list(data.reshape(n, PAGE))[::-1]
    disk.write(0, backwards)
    filled = aligned(n * PAGE)
    disk.read(0, [filled])
    assert np.array_equal(filled, np.concatenate(backwards))
    again = aligned(n * PAGE)
    disk.read(0, list(again.reshape(n, PAGE))[::-1])
    assert np.array_equal(again, data)


# -- what fails ----------------------------------------------------------------------------


@dataclass
class Flaky:
    """NIXL's bindings, where some posts or looks fail. fails: from which one on, and how many."""

    call: str
    first: int = 0
    times: int | None = 1
    calls: int = 0
    real: Any = field(default_factory=nixl.load)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def nixlAgent(self, name: str, config: object) -> FlakyAgent:
        return FlakyAgent(self, self.real.nixlAgent(name, config))

    def count(self, call: str) -> None:
        if call != self.call:
            return
        self.calls += 1
        end = None if self.times is None else self.first + self.times
        if self.first and self.first <= self.calls and (end is None or self.calls < end):
            raise self.real.nixlBackendError("planted")


@dataclass
class FlakyAgent:
    """One agent, whose real one ends with it."""

    flaky: Flaky
    real: Any

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def createBackend(self, *args: Any) -> int:
        self.flaky.count("create")
        backend: int = self.real.createBackend(*args)
        return backend

    def postXferReq(self, *args: Any) -> Any:
        self.flaky.count("post")
        return self.real.postXferReq(*args)

    def getXferStatus(self, *args: Any) -> Any:
        self.flaky.count("look")
        return self.real.getXferStatus(*args)


@HERE
@pytest.mark.parametrize("call", ["post", "look"])
def test_what_failed_in_nixl_is_an_io_error_and_the_next_call_is_none(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flaky = Flaky(call)
    monkeypatch.setattr(nixl, "load", lambda: flaky)
    disk = FileDisk.open(tmp_path, NBYTES, name="volume", engine=NixlEngine)
    data, found = aligned(NBYTES, seed=1), aligned(NBYTES)
    flaky.first = flaky.calls + 1
    with pytest.raises(OSError, match="planted") as caught:
        disk.write(0, [data])
    assert caught.value.errno == errno.EIO
    disk.write(0, [data])
    flaky.first = flaky.calls + 1
    with pytest.raises(OSError, match="planted"):
        disk.read(0, [found])
    found[:] = 0
    for _ in range(8):  # by each of its agents
        disk.read(0, [found])
    disk.close()
    assert np.array_equal(found, data)


@HERE
def test_an_agent_in_which_something_failed_has_ended_when_the_error_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, agents = nixl.load(), []

    class Noting:
        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def nixlAgent(self, name: str, config: Any) -> Any:
            agent = real.nixlAgent(name, config)
            agents.append(weakref.ref(agent))
            return agent

    monkeypatch.setattr(nixl, "load", Noting)
    disk = FileDisk.open(tmp_path, NBYTES, name="volume", engine=NixlEngine)
    os.truncate(disk.path, PAGE)
    with pytest.raises(OSError) as caught:
        disk.read(0, [aligned(2 * PAGE)])
    # Nobody has it any more, nor does the traceback.
    assert caught.value.__traceback__ is not None
    assert [agent() is None for agent in agents].count(True) == 1
    disk.close()
    assert all(agent() is None for agent in agents)


@HERE
def test_nothing_lands_after_an_interrupt(disk: FileDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    data = aligned(NBYTES, seed=1)
    disk.write(0, [data])
    disk.sync()

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    found = aligned(NBYTES)
    with monkeypatch.context() as patch:
        patch.setattr("kvstore.nvme.nixl.time.sleep", interrupted)
        with pytest.raises(KeyboardInterrupt):
            disk.read(0, [found])
    # The disk had begun, and its end was waited for.
    assert np.array_equal(found, data)
    found[:] = 0
    for _ in range(8):
        disk.read(0, [found])
    assert np.array_equal(found, data)


@HERE
def test_a_file_that_takes_no_such_writes_is_an_io_error() -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    disk = FileDisk(
        fd, Path("/dev/full"), nbytes=PAGE, file_bytes=PAGE, direct=False, engine=NixlEngine
    )
    with pytest.raises(OSError) as caught:
        disk.write(0, [aligned(PAGE)])
    disk.close()
    assert caught.value.errno == errno.EIO


@HERE
def test_a_write_that_the_system_cuts_short_is_an_io_error(disk: FileDisk) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * PAGE, before[1]))
    try:
        with pytest.raises(OSError) as caught:
            disk.write(0, [aligned(8 * PAGE)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno == errno.EIO


# -- where it cannot be had ----------------------------------------------------------------


def test_without_nixl_the_volume_is_not_used_and_the_log_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> None:
        raise Unavailable("no NIXL: pip install nixl-cu13")

    monkeypatch.setattr(nixl, "load", missing)
    assert "pip install nixl-cu13" in why_not()
    with caplog.at_level(logging.ERROR):
        opened = open_all([Location(tmp_path, 64 << 20, "nixl")], name="volume")
    assert not opened.volumes
    assert "pip install nixl-cu13" in opened.problems[0]
    assert "pip install nixl-cu13" in caplog.text
    again = open_all([Location(tmp_path, 64 << 20)], name="volume")  # its lock was given back
    assert len(again.volumes) == 1
    again.close()


@HERE
def test_a_plugin_that_does_not_start_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nixl, "load", lambda: Flaky("create", first=2, times=None))
    with pytest.raises(Unavailable, match=r"planted.*use the engine pread, or raise fs\.aio-max"):
        FileDisk.open(tmp_path, NBYTES, name="volume", engine=NixlEngine)
    monkeypatch.undo()
    FileDisk.open(tmp_path, NBYTES, name="volume", engine=NixlEngine).close()


def test_an_engine_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="'uring' is none of pread, nixl") as caught:
        Location(tmp_path, 64 << 20, "uring")  # type: ignore[arg-type]
    assert caught.value.field == "nvme_engine"


# -- a store over it -----------------------------------------------------------------------


def block(i: int) -> np.ndarray:
    return np.random.default_rng(i).integers(0, 256, LAYOUT.block_bytes, np.uint8)


@contextlib.contextmanager
def store_on(folder: Path) -> Iterator[KVStore]:
    with KVStore(
        dram=4 << 20,
        secret=b"s" * 32,
        nvme={folder: 64 << 20},
        nvme_policy=NvmePolicy(every=True, scrub_bytes_per_s=0),
        nvme_engine="nixl",
    ) as store:
        end_s = time.monotonic() + WAIT_S
        while not store.stats().nvme_ready:
            assert time.monotonic() < end_s
        yield store
        store.check()


def get(store: KVStore, keys: np.ndarray, numbers: list[int]) -> int:
    """How many of the blocks are there; those that are hold the right bytes."""
    namespace = store.open_namespace("a", LAYOUT)
    rows = [np.empty(LAYOUT.block_bytes, np.uint8) for _ in numbers]
    results = store.get_into(namespace, keys[numbers], rows, timeout_s=WAIT_S)
    for number, row, result in zip(numbers, rows, results, strict=True):
        assert not isinstance(result, Hit) or (row == block(number)).all()
    return sum(isinstance(result, Hit) for result in results)


def live(folder: Path) -> tuple[int, int]:
    """Two lives of a store that writes more than its memory holds; how many blocks were called
    persisted, and how many the second life found."""
    keys = np.random.default_rng(1).integers(0, 256, (N, 32), np.uint8)
    persisted: list[int] = []
    with store_on(folder) as store:
        namespace = store.open_namespace("a", LAYOUT)
        has_volume = store.stats().nvme_total_bytes > 0  # it could be read at the start
        for first in range(0, N, 6):
            numbers = list(range(first, first + 6))
            rows = [block(i) for i in numbers]
            put = store.put(namespace, keys[numbers], rows, persist=has_volume, timeout_s=WAIT_S)
            assert put.stored == 6
            persisted += numbers if put.persisted == 6 else []
        get(store, keys, list(range(N)))
    with store_on(folder) as store:
        found = get(store, keys, persisted) if persisted else 0
    return len(persisted), found


def fail_each(folder: Path, patch: pytest.MonkeyPatch, times: int | None, step: int) -> None:
    """The volume is written no more, or not used; no byte is wrong, and nothing hangs."""
    patch.setattr(nixl, "_AGENTS", 1)  # it takes a while to end one
    calm, last = Flaky("post"), folder / "calm"
    patch.setattr(nixl, "load", lambda: calm)
    last.mkdir()
    assert live(last) == (N, N)
    assert calm.calls > 20
    numbers, missed = range(1, calm.calls + 1, step), 0
    for first in numbers:
        flaky, last = Flaky("post", first=first, times=times), folder / f"{first}"
        patch.setattr(nixl, "load", lambda flaky=flaky: flaky)
        last.mkdir()
        persisted, found = live(last)
        assert found <= persisted <= N
        missed += flaky.calls < first  # how much goes into one transfer is a matter of time
    assert missed <= len(numbers) // 4


ONCE_AND_FOR_GOOD = pytest.mark.parametrize("times", [1, None], ids=["once", "for good"])


@HERE
@ONCE_AND_FOR_GOOD
def test_transfers_may_fail(
    times: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_each(tmp_path, monkeypatch, times, step=7)


@HERE
@ONCE_AND_FOR_GOOD
@pytest.mark.long
def test_any_transfer_may_fail(
    times: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_each(tmp_path, monkeypatch, times, step=1)
