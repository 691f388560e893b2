"""What this machine gives a store: memory, limits, huge pages, NUMA nodes.

Parsing is pure; only `read_host` and what it calls by `_read` touch files, and nothing is changed.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# A version 1 cgroup without a limit shows the largest page-aligned int64; no machine has that.
_NO_LIMIT_BYTES = 1 << 60


@dataclass(frozen=True, slots=True, kw_only=True)
class HugePageCounts:
    """Reserved huge pages of the default size."""

    total: int
    free: int
    page_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMemory:
    """One memory cgroup that has a limit. `used_bytes` leaves out the page cache, which yields."""

    folder: Path
    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What processes in it can still take."""
        return max(0, self.limit_bytes - self.used_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The tightest bound on new memory, and who sets it, in words."""

    nbytes: int
    bound_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """What was read; None where the machine does not say. `memlock_bytes` None: unlimited."""

    kernel: str | None
    memory_total_bytes: int | None
    memory_available_bytes: int | None
    cgroups: tuple[CgroupMemory, ...]  # this process's own first, then its parents
    shm_bytes: int | None
    memlock_bytes: int | None
    huge_pages: HugePageCounts
    shmem_thp: str | None  # always, within_size, advise, never, deny or force
    numa_nodes: tuple[int, ...]

    @property
    def room(self) -> Room | None:
        """How much memory a new pool can have at most; None where nothing tells."""
        rooms = [_cgroup_room(group) for group in self.cgroups]
        if self.memory_available_bytes is not None:
            rooms.append(Room(nbytes=self.memory_available_bytes, bound_by="MemAvailable"))
        return min(rooms, key=lambda room: room.nbytes, default=None)


def _cgroup_room(group: CgroupMemory) -> Room:
    words = f"memory cgroup {group.folder}, limit {group.limit_bytes} bytes"
    return Room(nbytes=group.free_bytes, bound_by=words)


@dataclass(frozen=True, slots=True, kw_only=True)
class CgroupMount:
    """Where a hierarchy with the memory controller is mounted; `root` is the part that is shown."""

    version: int
    root: PurePosixPath
    point: PurePosixPath


def parse_meminfo(text: str) -> dict[str, int]:
    """/proc/meminfo: bytes where the line says kB, plain counts elsewhere."""
    found = re.findall(r"^(\S+):\s+(\d+)( kB)?$", text, re.MULTILINE)
    return {name: int(number) << (10 if unit else 0) for name, number, unit in found}


def parse_counters(text: str) -> dict[str, int]:
    """memory.stat: one name and number a line."""
    return {name: int(number) for name, number in re.findall(r"^(\w+) (\d+)$", text, re.MULTILINE)}


def parse_limit(text: str) -> int | None:
    """memory.max or memory.limit_in_bytes; None: no limit."""
    word = text.strip()
    if not word.isdecimal() or int(word) >= _NO_LIMIT_BYTES:
        return None
    return int(word)


def parse_choice(text: str) -> str | None:
    """The chosen word of a sysfs file such as "always [never] deny"."""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else None


def parse_ranges(text: str) -> tuple[int, ...]:
    """A sysfs list such as "0-1,4" -> (0, 1, 4)."""
    numbers: list[int] = []
    for first, last in re.findall(r"(\d+)(?:-(\d+))?", text):
        numbers.extend(range(int(first), int(last or first) + 1))
    return tuple(numbers)


def parse_cgroup_paths(text: str) -> dict[int, PurePosixPath]:
    """/proc/self/cgroup: the path in the version 2 tree, and in version 1's memory tree."""
    paths = {}
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            paths[2] = PurePosixPath(path)
        elif "memory" in controllers.split(","):
            paths[1] = PurePosixPath(path)
    return paths


def parse_cgroup_mounts(text: str) -> list[CgroupMount]:
    """/proc/self/mountinfo: the mounts that may hold memory limits."""
    mounts = []
    for line in text.splitlines():
        left, _, right = line.partition(" - ")
        fields, kind = left.split(), right.split()
        version = _cgroup_version(kind)
        if version and len(fields) > 4:
            root, point = PurePosixPath(fields[3]), PurePosixPath(fields[4])
            mounts.append(CgroupMount(version=version, root=root, point=point))
    return mounts


def _cgroup_version(kind: list[str]) -> int:
    """2, 1, or 0 for a mount without the memory controller; `kind`: type, source, options."""
    if kind[:1] == ["cgroup2"]:
        return 2
    return int(kind[:1] == ["cgroup"] and "memory" in kind[-1].split(","))


def cgroup_folders(path: PurePosixPath, mount: CgroupMount) -> list[PurePosixPath]:
    """The folders that bound a process at `path`: its own first, then its parents.

    A container sees only a part of the tree; a path outside that part is the part's own root.
    """
    inside = path.is_relative_to(mount.root) and ".." not in path.parts
    own = mount.point / path.relative_to(mount.root) if inside else mount.point
    return [own, *(folder for folder in own.parents if folder.is_relative_to(mount.point))]


def read_host(root: Path = Path("/")) -> Host:
    """Reads everything below `root` (another one in tests); what cannot be read is None."""
    meminfo = parse_meminfo(_read(root / "proc/meminfo"))
    memlock, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return Host(
        kernel=_read(root / "proc/sys/kernel/osrelease").strip() or None,
        memory_total_bytes=meminfo.get("MemTotal"),
        memory_available_bytes=meminfo.get("MemAvailable"),
        cgroups=tuple(_read_cgroups(root)),
        shm_bytes=_filesystem_bytes(root / "dev/shm"),
        memlock_bytes=None if memlock == resource.RLIM_INFINITY else memlock,
        huge_pages=HugePageCounts(
            total=meminfo.get("HugePages_Total", 0),
            free=meminfo.get("HugePages_Free", 0),
            page_bytes=meminfo.get("Hugepagesize", 0),
        ),
        shmem_thp=parse_choice(_read(root / "sys/kernel/mm/transparent_hugepage/shmem_enabled")),
        numa_nodes=parse_ranges(_read(root / "sys/devices/system/node/online")),
    )


def _read_cgroups(root: Path) -> Iterator[CgroupMemory]:
    paths = parse_cgroup_paths(_read(root / "proc/self/cgroup"))
    for mount in parse_cgroup_mounts(_read(root / "proc/self/mountinfo")):
        if mount.version not in paths:
            continue
        for folder in cgroup_folders(paths[mount.version], mount):
            group = _read_cgroup(root / folder.relative_to("/"), mount.version)
            if group:
                yield group


def _read_cgroup(folder: Path, version: int) -> CgroupMemory | None:
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")}
    limit_name, usage_name, prefix = names.get(version, ("memory.max", "memory.current", ""))
    limit, usage = (parse_limit(_read(folder / name)) for name in (limit_name, usage_name))
    if limit is None:
        return None
    stat = parse_counters(_read(folder / "memory.stat"))
    cache = sum(stat.get(f"{prefix}{kind}_file", 0) for kind in ("active", "inactive"))
    return CgroupMemory(folder=folder, limit_bytes=limit, used_bytes=max(0, (usage or 0) - cache))


def _filesystem_bytes(folder: Path) -> int | None:
    with contextlib.suppress(OSError):
        found = os.statvfs(folder)
        return found.f_blocks * found.f_frsize
    return None


def _read(path: Path) -> str:
    """The file's text; empty where there is none, which every parser takes for "unknown"."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
