"""What is read of a machine, from texts that real ones have shown."""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import pytest

from kvstore import host
from kvstore.sizes import format_size, parse_size

MEMINFO = """MemTotal:       24684084 kB
MemFree:        24138656 kB
MemAvailable:   24273268 kB
HugePages_Total:     512
HugePages_Free:      500
Hugepagesize:       2048 kB
"""
V1_CGROUP = "9:name=systemd:/\n4:memory:/pods/one\n1:cpu,cpuacct:/\n0::/\n"
V1_MOUNTS = (
    "35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
    "36 31 0:33 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices\n"
    "41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n"
)
V2_CGROUP = "0::/system.slice/kvstore.service\n"
V2_MOUNTS = "30 24 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_NO_LIMIT = "9223372036854771712\n"


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_meminfo_is_in_bytes_and_counts() -> None:
    found = host.parse_meminfo(MEMINFO)
    assert found["MemAvailable"] == 24273268 * 1024
    assert found["HugePages_Total"] == 512
    assert found["Hugepagesize"] == 2 << 20


@pytest.mark.parametrize(
    ("text", "limit"), [("max\n", None), (V1_NO_LIMIT, None), ("", None), ("4096\n", 4096)]
)
def test_a_limit_is_bytes_or_none(text: str, limit: int | None) -> None:
    assert host.parse_limit(text) == limit


def test_choices_and_ranges() -> None:
    assert host.parse_choice("always within_size advise [never] deny force\n") == "never"
    assert host.parse_choice("") is None
    assert host.parse_ranges("0-2,4,6-7\n") == (0, 1, 2, 4, 6, 7)
    assert host.parse_ranges("") == ()


def test_both_versions_of_cgroups_are_found() -> None:
    assert host.parse_cgroup_paths(V1_CGROUP) == {
        1: PurePosixPath("/pods/one"),
        2: PurePosixPath("/"),
    }
    versions = [mount.version for mount in host.parse_cgroup_mounts(V1_MOUNTS)]
    assert versions == [1, 2]
    assert host.parse_cgroup_mounts("garbage\n\n1 2 - cgroup2\n") == []


@pytest.mark.parametrize(
    ("path", "root", "folders"),
    [
        ("/a/b", "/", ["/cg/a/b", "/cg/a", "/cg"]),
        ("/docker/x", "/docker/x", ["/cg"]),  # a container that is shown its own part
        ("/docker/x/y", "/docker/x", ["/cg/y", "/cg"]),
        ("/../other", "/", ["/cg"]),  # outside of the cgroup namespace
    ],
)
def test_all_parents_of_a_cgroup_bound_it(path: str, root: str, folders: list[str]) -> None:
    mount = host.CgroupMount(version=2, root=PurePosixPath(root), point=PurePosixPath("/cg"))
    found = host.cgroup_folders(PurePosixPath(path), mount)
    assert [str(folder) for folder in found] == folders


def test_the_tightest_limit_counts_and_page_cache_does_not(tmp_path: Path) -> None:
    own = "sys/fs/cgroup/system.slice/kvstore.service"
    machine = host.read_host(
        write(
            tmp_path,
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": V2_CGROUP,
                "proc/self/mountinfo": V2_MOUNTS,
                f"{own}/memory.max": "1073741824\n",
                f"{own}/memory.current": "314572800\n",
                f"{own}/memory.stat": "anon 5\ninactive_file 104857600\nactive_file 104857600\n",
                "sys/fs/cgroup/system.slice/memory.max": "max\n",
            },
        )
    )
    assert [group.used_bytes for group in machine.cgroups] == [100 << 20]
    assert machine.room is not None
    assert machine.room.nbytes == (1 << 30) - (100 << 20)
    assert "kvstore.service" in machine.room.bound_by


def test_a_version_1_limit_of_a_parent_counts(tmp_path: Path) -> None:
    memory = "sys/fs/cgroup/memory/pods"
    machine = host.read_host(
        write(
            tmp_path,
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": V1_CGROUP,
                "proc/self/mountinfo": V1_MOUNTS,
                f"{memory}/one/memory.limit_in_bytes": V1_NO_LIMIT,
                f"{memory}/memory.limit_in_bytes": "2147483648\n",
                f"{memory}/memory.usage_in_bytes": "1073741824\n",
                f"{memory}/memory.stat": "total_inactive_file 536870912\n",
            },
        )
    )
    assert machine.room is not None
    assert machine.room.nbytes == 3 << 29


def test_without_limits_the_machine_bounds_and_all_else_is_read(tmp_path: Path) -> None:
    machine = host.read_host(
        write(
            tmp_path,
            {
                "proc/meminfo": MEMINFO,
                "proc/sys/kernel/osrelease": "6.18.44\n",
                "sys/kernel/mm/transparent_hugepage/shmem_enabled": "always [advise] never\n",
                "sys/devices/system/node/online": "0-1\n",
            },
        )
    )
    assert machine.room == host.Room(nbytes=24273268 * 1024, bound_by="MemAvailable")
    assert machine.huge_pages == host.HugePageCounts(total=512, free=500, page_bytes=2 << 20)
    assert (machine.kernel, machine.shmem_thp) == ("6.18.44", "advise")
    assert machine.numa_nodes == (0, 1)


def test_a_machine_that_says_nothing_is_unknown_not_an_error(tmp_path: Path) -> None:
    machine = host.read_host(tmp_path)
    assert machine.room is None
    assert machine.kernel is None
    assert machine.shm_bytes is None


def test_this_machine_is_read() -> None:
    machine = host.read_host()
    assert machine.room is not None
    assert 0 < machine.room.nbytes < 1 << 60
    assert machine.kernel


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("8GiB", 8 << 30), ("512 MB", 512 << 20), ("1.5g", 3 << 29), (4096, 4096), ("9T", 9 << 40)],
)
def test_sizes_are_read_in_units_of_1024(text: object, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "much", "-1", "8 Gigs", "GiB", True, "1e9"])
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="is no size"):
        parse_size(text)


def test_sizes_are_written_for_people() -> None:
    assert [format_size(n) for n in (0, 1023, 1536, 8 << 30, 5 << 40, 1 << 62)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "8 GiB",
        "5 TiB",
        "4194304 TiB",
    ]
