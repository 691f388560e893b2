"""What a volume on a real file promises, past the page cache and through it, by each engine."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from nvme.sim_disk import aligned

from kvstore.errors import InvalidArgument, Unavailable
from kvstore.memory import Arena
from kvstore.nvme.disk import ALIGN_BYTES, FileDisk, MakeEngine, Pread
from kvstore.nvme.nixl import NixlEngine, why_not
from kvstore.nvme.opening import Location, Opened, open_all

NBYTES = 1 << 20
NAME = "volume"
PAGE = ALIGN_BYTES
NEEDS_NIXL = pytest.mark.skipif(bool(why_not()), reason="NIXL's POSIX plugin does not work here")

HOLDER = """
import sys
from pathlib import Path
from kvstore.nvme.disk import FileDisk
disk = FileDisk.open(Path(sys.argv[1]), 1 << 20, name="volume")
print("open", flush=True)
sys.stdin.read()
"""


def descriptors() -> set[str]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            found.add(f"{entry.name} {entry.readlink()}")
        except FileNotFoundError:  # the one that lists them
            continue
    return found


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = descriptors()
    yield
    assert descriptors() <= before


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[Pread, pytest.param(NixlEngine, marks=NEEDS_NIXL)], ids=["pread", "nixl"])
def engine(request: pytest.FixtureRequest) -> MakeEngine:
    made: MakeEngine = request.param
    return made


@pytest.fixture
def disk(tmp_path: Path, direct: bool, engine: MakeEngine) -> Iterator[FileDisk]:
    opened = FileDisk.open(tmp_path, NBYTES, name=NAME, direct=direct, engine=engine)
    yield opened
    opened.close()


@pytest.fixture
def pread_disk(tmp_path: Path, direct: bool) -> Iterator[FileDisk]:
    """By the engine whose system calls a test can play."""
    opened = FileDisk.open(tmp_path, NBYTES, name=NAME, direct=direct)
    yield opened
    opened.close()


def read(disk: FileDisk, offset: int, nbytes: int) -> bytes:
    buffer = aligned(nbytes)
    disk.read(offset, [buffer])
    return buffer.tobytes()


def refuse(tmp_path: Path, nbytes: int = NBYTES, name: str = NAME) -> str:
    """What is said to whoever opens it."""
    with pytest.raises(InvalidArgument) as caught:
        FileDisk.open(tmp_path, nbytes, name=name)
    assert caught.value.field == "nvme"
    return caught.value.message


def calls_of(disk: FileDisk) -> list[Callable[[], None]]:
    return [
        lambda: disk.read(0, [aligned(PAGE)]),
        lambda: disk.write(0, [aligned(PAGE)]),
        disk.sync,
        lambda: disk.reserve(0, PAGE),
    ]


def failing(number: int) -> Callable[..., None]:
    """A system call that does nothing but fail."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# Reading and writing.


def test_a_new_volume_is_sparse_zeros_for_its_owner_only(disk: FileDisk, tmp_path: Path) -> None:
    assert (disk.nbytes, disk.file_bytes, disk.path) == (NBYTES, 0, tmp_path / NAME)
    found = disk.path.stat()
    assert stat.S_IMODE(found.st_mode) == 0o600
    assert found.st_size == NBYTES
    assert found.st_blocks * 512 < NBYTES
    assert read(disk, 0, NBYTES) == bytes(NBYTES)


def test_what_was_written_is_read_also_by_the_next_one(
    disk: FileDisk, tmp_path: Path, direct: bool
) -> None:
    parts = [aligned(n * PAGE, seed=n) for n in (1, 3, 0, 16)]
    written = b"".join(part.tobytes() for part in parts)
    disk.write(5 * PAGE, parts)
    disk.sync()
    assert read(disk, 5 * PAGE, 20 * PAGE) == written
    first, rest = aligned(2 * PAGE), aligned(18 * PAGE)
    disk.read(5 * PAGE, [first, rest])
    assert first.tobytes() + rest.tobytes() == written
    disk.close()
    again = FileDisk.open(tmp_path, NBYTES, name=NAME, direct=not direct)
    assert (again.nbytes, again.file_bytes) == (NBYTES, NBYTES)
    assert read(again, 5 * PAGE, 20 * PAGE) == written
    assert read(again, 0, 5 * PAGE) == bytes(5 * PAGE)
    again.close()


def test_nothing_to_move_is_no_error(disk: FileDisk) -> None:
    disk.read(0, [])
    disk.write(NBYTES, [aligned(0)])


def test_more_buffers_than_the_kernel_takes_at_once(tmp_path: Path, direct: bool) -> None:
    n = 2500
    whole = aligned(n * PAGE, seed=1)
    disk = FileDisk.open(tmp_path, n * PAGE, name=NAME, direct=direct)
    disk.write(0, list(whole.reshape(n, PAGE)))
    filled = aligned(n * PAGE)
    disk.read(0, list(filled.reshape(n, PAGE)))
    disk.close()
    assert np.array_equal(filled, whole)


@pytest.mark.parametrize("step", [PAGE, 3 * PAGE, 1000])
def test_short_reads_and_writes_go_on_where_they_stopped(
    pread_disk: FileDisk, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if pread_disk.direct and step % PAGE:
        pytest.skip("past the page cache nothing stops within a sector")
    pwritev, preadv = os.pwritev, os.preadv
    calls = []

    def some(views: list[memoryview]) -> list[memoryview]:
        calls.append(len(views))
        left, taken = step, []
        for view in views:
            taken.append(view[:left])
            left -= taken[-1].nbytes
            if not left:
                break
        return taken

    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: pwritev(fd, some(views), at))
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: preadv(fd, some(views), at))
    parts = [aligned(n * PAGE, seed=n) for n in (2, 1, 5)]
    pread_disk.write(PAGE, parts)
    back = [aligned(part.nbytes) for part in parts]
    pread_disk.read(PAGE, back)
    assert len(calls) == 2 * -(-8 * PAGE // step)
    assert all(np.array_equal(a, b) for a, b in zip(parts, back, strict=True))


def test_memory_that_others_map_is_read_and_written(disk: FileDisk) -> None:
    pool = Arena.create("pool", 8 * PAGE)
    pool.array[: 4 * PAGE] = aligned(4 * PAGE, seed=1)
    disk.write(0, [pool.array[: 4 * PAGE]])
    disk.read(0, [pool.array[4 * PAGE :]])
    assert np.array_equal(pool.array[: 4 * PAGE], pool.array[4 * PAGE :])
    pool.close()


def test_threads_do_not_meet(disk: FileDisk) -> None:
    share = NBYTES // 8

    def work(i: int) -> bool:
        for turn in range(10):
            data = aligned(share, seed=100 * i + turn)
            disk.write(i * share, [data[: share // 2], data[share // 2 :]])
            if read(disk, i * share, share) != data.tobytes():
                return False
        disk.sync()
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(work, range(8)))


# What is refused, and what fails.


def test_what_is_not_in_whole_granules_is_refused(disk: FileDisk) -> None:
    good, frozen = aligned(2 * PAGE), aligned(PAGE)
    frozen.flags.writeable = False
    for offset, buffer in (
        (1, good),
        (-PAGE, good),
        (0, good[: PAGE + 512]),
        (0, good[512 : PAGE + 512]),
        (0, good.reshape(2, PAGE).T),
        (0, good.view(np.uint64)),
    ):
        with pytest.raises(InvalidArgument, match="nvme"):
            disk.write(offset, [buffer])  # type: ignore[list-item]
        with pytest.raises(InvalidArgument, match="nvme"):
            disk.read(offset, [buffer])  # type: ignore[list-item]
    with pytest.raises(InvalidArgument, match="written to"):
        disk.read(0, [frozen])
    disk.write(0, [frozen])


def test_nothing_is_past_the_end(disk: FileDisk) -> None:
    for offset, nbytes in ((NBYTES, PAGE), (NBYTES - PAGE, 2 * PAGE)):
        for call in (disk.read, disk.write):
            with pytest.raises(OSError, match="past the end") as caught:
                call(offset, [aligned(nbytes)])
            assert caught.value.errno == errno.EIO
        with pytest.raises(OSError, match="past the end"):
            disk.reserve(offset, nbytes)
    assert disk.path.stat().st_size == NBYTES


def test_a_file_cut_off_meanwhile_is_an_io_error(disk: FileDisk) -> None:
    os.truncate(disk.path, 4 * PAGE)
    for _ in range(2):
        with pytest.raises(OSError) as caught:
            disk.read(2 * PAGE, [aligned(4 * PAGE)])
        assert caught.value.errno == errno.EIO
    disk.write(0, [aligned(4 * PAGE, seed=1)])
    assert read(disk, 0, 4 * PAGE) == aligned(4 * PAGE, seed=1).tobytes()


def test_a_write_that_moves_nothing_is_an_io_error(
    pread_disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "pwritev", lambda fd, views, at: 0)
    with pytest.raises(OSError, match="ends") as caught:
        pread_disk.write(0, [aligned(PAGE)])
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_the_kernels_errors_are_passed_on(
    pread_disk: FileDisk, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("preadv", "pwritev", "fdatasync", "posix_fallocate"):
        monkeypatch.setattr(os, name, failing(number))
    for call in calls_of(pread_disk):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == number


def test_a_full_disk_in_mid_write_is_an_error(
    pread_disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev = os.pwritev

    def one_page(fd: int, views: list[memoryview], at: int) -> int:
        if at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwritev(fd, [views[0][:PAGE]], at)

    monkeypatch.setattr(os, "pwritev", one_page)
    with pytest.raises(OSError, match="space"):
        pread_disk.write(0, [aligned(4 * PAGE, seed=1)])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_device_that_is_full_says_so() -> None:
    fd = os.open("/dev/full", os.O_RDWR)
    disk = FileDisk(fd, Path("/dev/full"), nbytes=NBYTES, file_bytes=NBYTES, direct=False)
    with pytest.raises(OSError, match="space") as caught:
        disk.write(0, [aligned(PAGE)])
    disk.close()
    assert caught.value.errno == errno.ENOSPC


def test_a_closed_disk_touches_no_descriptor(disk: FileDisk) -> None:
    disk.close()
    disk.close()
    for call in calls_of(disk):
        with pytest.raises(OSError, match="closed"):
            call()


# Room and size.


def test_a_range_is_reserved(disk: FileDisk) -> None:
    disk.reserve(4 * PAGE, 64 * PAGE)
    found = disk.path.stat()
    assert found.st_size == NBYTES
    assert 64 * PAGE <= found.st_blocks * 512 < NBYTES
    assert read(disk, 4 * PAGE, 64 * PAGE) == bytes(64 * PAGE)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV])
def test_a_file_system_that_cannot_reserve_is_no_error(
    disk: FileDisk, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", failing(number))
    disk.reserve(0, PAGE)


@pytest.mark.parametrize("wanted", [NBYTES // 2, 2 * NBYTES])
def test_a_file_keeps_its_size_until_it_is_resized(disk: FileDisk, wanted: int) -> None:
    data = aligned(NBYTES, seed=1)
    disk.write(0, [data])
    disk.close()
    again = FileDisk.open(disk.path.parent, wanted, name=NAME)
    assert (again.nbytes, again.file_bytes) == (NBYTES, NBYTES)
    again.resize(NBYTES)
    for fewer in (NBYTES // 2, NBYTES - PAGE, NBYTES + 1):
        with pytest.raises(InvalidArgument, match="only grow"):
            again.resize(fewer)
    again.resize(2 * NBYTES)
    assert (again.nbytes, again.file_bytes) == (2 * NBYTES, NBYTES)
    assert read(again, 0, NBYTES) == data.tobytes()
    assert read(again, NBYTES, NBYTES) == bytes(NBYTES)
    again.close()


def test_a_last_part_of_a_granule_is_not_cut_off(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"x" * (PAGE + 100))
    disk = FileDisk.open(tmp_path, NBYTES, name=NAME)
    assert (disk.nbytes, disk.file_bytes) == (PAGE, PAGE + 100)
    disk.resize(PAGE)
    assert disk.path.stat().st_size == PAGE + 100
    disk.close()


def test_a_file_whose_maker_died_at_once_is_new(tmp_path: Path) -> None:
    (tmp_path / NAME).touch()
    disk = FileDisk.open(tmp_path, NBYTES, name=NAME)
    assert (disk.nbytes, disk.file_bytes) == (NBYTES, 0)
    disk.close()


def test_too_little_room_is_said_before_a_file_is_made(tmp_path: Path) -> None:
    assert "free some, or ask for less" in refuse(tmp_path, 1 << 60)
    assert not list(tmp_path.iterdir())
    disk = FileDisk.open(tmp_path, NBYTES, name=NAME)
    with pytest.raises(InvalidArgument, match="has room for"):
        disk.resize(1 << 60)
    assert disk.nbytes == disk.path.stat().st_size == NBYTES
    disk.close()


def test_a_restart_needs_no_room_for_a_file_that_is_there(
    disk: FileDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.close()
    full = os.statvfs_result((PAGE, PAGE, 100, 0, 0, 100, 0, 0, 0, 255))
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    FileDisk.open(disk.path.parent, NBYTES, name=NAME).close()
    disk.path.unlink()
    assert "has room for 0 bytes" in refuse(disk.path.parent)


# Whose it is.


def test_a_volume_has_one_user(disk: FileDisk, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=f"{tmp_path / NAME} is in use by another daemon: stop"):
        FileDisk.open(tmp_path, NBYTES, name=NAME)
    other = FileDisk.open(tmp_path, NBYTES, name="other")
    other.close()
    disk.close()
    FileDisk.open(tmp_path, NBYTES, name=NAME).close()


def test_another_processs_volume_is_free_when_it_dies(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with holder:
        assert holder.stdout
        assert holder.stdout.readline() == b"open\n"
        with pytest.raises(Unavailable, match="stop that one"):
            FileDisk.open(tmp_path, NBYTES, name=NAME)
        holder.send_signal(signal.SIGKILL)
    FileDisk.open(tmp_path, NBYTES, name=NAME).close()


# What cannot be opened.


def test_a_size_must_be_in_whole_granules(tmp_path: Path) -> None:
    for nbytes in (0, -PAGE, PAGE + 1):
        assert "multiple of 4096" in refuse(tmp_path, nbytes)


def test_a_missing_directory_is_not_made(tmp_path: Path) -> None:
    said = refuse(tmp_path / "no" / "where")
    assert str(tmp_path / "no" / "where") in said
    assert "make the directory" in said


def test_only_a_directory_or_a_block_device_will_do(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "name one" in refuse(tmp_path / "file")
    assert "a file where a directory should be" in refuse(tmp_path / "file" / "folder")
    assert "without a path" in refuse(tmp_path, name="../volume")


def test_only_a_regular_file_will_do(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / "fifo")
    assert "is a directory where the volume's file should be" in refuse(tmp_path, name="folder")
    assert "symbolic link" in refuse(tmp_path, name="link")
    assert "no regular file" in refuse(tmp_path, name="fifo")
    assert not (tmp_path / "target").exists()


def test_a_closed_directory_says_what_right_is_missing(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    me = os.geteuid()
    if me == 0:  # to whom nothing is closed
        os.seteuid(65534)
    try:
        said = refuse(tmp_path)
    finally:
        os.seteuid(me)
        tmp_path.chmod(0o700)
    assert "give it the right to read and write there" in said


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.EACCES, "give it the right to read and write there"),
        (errno.EROFS, "mount it for writing"),
        (errno.ENOSPC, "free some room"),
        (errno.EIO, "name another directory"),
    ],
)
def test_an_error_comes_with_advice(
    tmp_path: Path, number: int, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "open", failing(number))
    said = refuse(tmp_path)
    assert advice in said
    assert os.strerror(number) in said


def test_a_file_larger_than_this_process_may_make(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (NBYTES, before[1]))
    try:
        assert "ask for less" in refuse(tmp_path, 2 * NBYTES)
        disk = FileDisk.open(tmp_path, NBYTES, name=NAME)
        with pytest.raises(InvalidArgument, match="ask for less"):
            disk.resize(2 * NBYTES)
        assert disk.nbytes == NBYTES
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    disk.close()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (os, "fstat"),
        (os, "ftruncate"),
        (os, "fsync"),
        (os, "preadv"),
        (fcntl, "flock"),
        (fcntl, "fcntl"),
    ],
)
def test_no_failure_keeps_the_lock(
    tmp_path: Path, module: object, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descriptors()
    with monkeypatch.context() as patched:
        patched.setattr(module, name, failing(errno.EIO))
        refuse(tmp_path)
    assert descriptors() <= before
    FileDisk.open(tmp_path, NBYTES, name=NAME).close()


# Past the page cache or not.


def test_both_ways_are_told_apart(tmp_path: Path) -> None:
    for direct in (True, False):
        disk = FileDisk.open(tmp_path, NBYTES, name=NAME, direct=direct)
        is_set = bool(fcntl.fcntl(disk._fd, fcntl.F_GETFL) & os.O_DIRECT)
        assert disk.direct == is_set
        assert direct or not is_set
        disk.close()


@pytest.mark.parametrize("step", ["the flag", "the read"])
def test_a_file_system_without_o_direct_is_used_through_the_page_cache(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_flags, preadv = fcntl.fcntl, os.preadv

    def setfl(fd: int, what: int, flags: int = 0) -> int:
        if what == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no such flag here")
        return set_flags(fd, what, flags)

    def no_read(fd: int, views: list[memoryview], at: int) -> int:
        if set_flags(fd, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no such read here")
        return preadv(fd, views, at)

    if step == "the flag":
        monkeypatch.setattr(fcntl, "fcntl", setfl)
    else:
        monkeypatch.setattr(os, "preadv", no_read)
    disk = FileDisk.open(tmp_path, NBYTES, name=NAME)
    assert not disk.direct
    data = aligned(4 * PAGE, seed=1)
    disk.write(PAGE, [data])
    assert read(disk, PAGE, 4 * PAGE) == data.tobytes()
    disk.close()


# Block devices, played by files: a test cannot make one.


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "device"
    path.touch()
    os.truncate(path, 2 * NBYTES)
    number = path.stat().st_ino
    is_device = stat.S_ISBLK
    monkeypatch.setattr(
        stat, "S_ISBLK", lambda mode: path.stat().st_ino == number or is_device(mode)
    )
    return path


def test_a_device_is_used_up_to_what_is_asked(device: Path) -> None:
    disk = FileDisk.open(device, NBYTES, name=NAME)
    assert (disk.path, disk.nbytes, disk.file_bytes) == (device, NBYTES, 2 * NBYTES)
    with pytest.raises(OSError, match="past the end"):
        disk.write(NBYTES, [aligned(PAGE)])
    disk.resize(2 * NBYTES)
    disk.write(NBYTES, [aligned(PAGE)])
    with pytest.raises(InvalidArgument, match="ask for no more"):
        disk.resize(3 * NBYTES)
    with pytest.raises(Unavailable, match="in use"):
        FileDisk.open(device, NBYTES, name=NAME)
    disk.close()
    assert device.stat().st_size == 2 * NBYTES


def test_a_device_is_as_large_as_it_is(device: Path) -> None:
    assert f"has {2 * NBYTES} bytes" in refuse(device, 3 * NBYTES)


def test_a_mounted_device_is_left_alone(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = []

    def busy(path: Path, how: int, mode: int = 0) -> int:
        flags.append(how)
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))

    monkeypatch.setattr(os, "open", busy)
    with pytest.raises(Unavailable, match="mounted or in use"):
        FileDisk.open(device, NBYTES, name=NAME)
    assert flags == [os.O_RDWR | os.O_EXCL]


def opened_at(device: Path, nbytes: int) -> Opened:
    return open_all([Location(device, nbytes)], name=NAME)


def test_a_volume_on_a_device_keeps_its_size_when_less_is_asked(
    device: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.truncate(device, 64 << 20)
    first = opened_at(device, 48 << 20)
    (was,) = first.volumes
    first.close()
    for asked in (32 << 20, 8 << 20):
        caplog.clear()
        again = opened_at(device, asked)
        assert not again.problems
        (volume,) = again.volumes
        assert volume.superblock == was.superblock
        last = volume.superblock.geometry.nbytes - PAGE
        volume.disk.write(last, [aligned(PAGE, seed=2)])
        with pytest.raises(OSError, match="past the end"):
            volume.disk.write(last + PAGE, [aligned(PAGE)])
        assert "keeps its" in caplog.text
        again.close()
    larger = opened_at(device, 64 << 20)
    assert larger.volumes[0].superblock.volume_id == was.superblock.volume_id
    assert larger.nbytes > was.superblock.geometry.nbytes
    larger.close()


def test_a_volume_that_is_larger_than_its_device_was_cut_short(device: Path) -> None:
    os.truncate(device, 64 << 20)
    opened_at(device, 48 << 20).close()
    os.truncate(device, 32 << 20)
    opened = opened_at(device, 24 << 20)
    assert not opened.volumes
    assert "damaged" in opened.problems[0]
