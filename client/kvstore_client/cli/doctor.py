"""`kvstore doctor`: what on this host keeps a store from running, or running well, and its fix.

Each check is a pure function of `Facts`; what gathers them is in `facts.py`. Nothing is changed.
"""

from __future__ import annotations

import enum
import re
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.text import Text

from kvstore.host import CgroupMemory, Host
from kvstore.sizes import format_size
from kvstore_client.cli import output
from kvstore_client.cli.facts import NO_NVME, Facts

LEAST_KERNEL = (5, 14)
SMALL_SHM_BYTES = 64 << 20  # what Docker gives a container
LOW_ROOM_BYTES = 1 << 30  # the daemon's default pool
_TIGHT_SHARE = 0.8
_SHMEM_THP_MODES = ("always", "within_size", "advise", "force")
_GATHERS = (6, 1)  # since this kernel the daemon gets them by itself where the mode is `never`
_WRITE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Level(enum.StrEnum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"  # works, but slower or less safely than it could
    FAIL = "fail"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One finding: what was measured, and what to do unless it is ok."""

    name: str
    level: Level
    measured: str
    fix: str = ""


def check_daemon(facts: Facts) -> Check:
    """Does a daemon answer?"""
    if facts.daemon is None:
        fix = "Start kvstore-server, or name the socket of a running one with --target."
        if facts.refused:
            fix = "Run as the daemon's user, or use the token of its data folder (grpc.token)."
        measured = f"{facts.target}: {facts.problem}"
        return Check(name="daemon", level=Level.FAIL, measured=measured, fix=fix)
    took = f"{facts.daemon.round_trip_ms:.3f} ms a round trip"
    return Check(name="daemon", level=Level.OK, measured=f"{facts.target} answers, {took}")


def check_versions(facts: Facts) -> Check | None:
    """Are client and daemon of one release?"""
    if facts.daemon is None:
        return None
    measured = f"client {facts.client_version}, daemon {facts.daemon.version}"
    if facts.daemon.version == facts.client_version:
        return Check(name="versions", level=Level.OK, measured=measured)
    fix = "Install the same release on both sides, then restart the daemon."
    return Check(name="versions", level=Level.WARN, measured=measured, fix=fix)


def check_socket(facts: Facts) -> Check | None:
    """May this user connect, and can nobody else put a socket of his own in its place?"""
    socket = facts.socket
    if socket is None:
        return None
    mode = stat.S_IMODE(socket.mode)
    measured = f"{socket.path}: mode {mode:04o}, user {socket.owner}"
    level, fix = Level.OK, ""
    if not socket.usable:
        level, fix = Level.FAIL, "Run as the daemon's user, or start a daemon of your own."
    elif socket.folder_mode & _WRITE_BY_OTHERS and not socket.folder_mode & stat.S_ISVTX:
        measured += f"; others can write to its folder, mode {stat.S_IMODE(socket.folder_mode):04o}"
        level, fix = Level.WARN, f"chmod go-w {socket.path.parent}"
    elif socket.owner not in (facts.user, 0):
        level, fix = Level.WARN, "Use it only if you trust that user: the daemon sees your blocks."
    return Check(name="socket", level=level, measured=measured, fix=fix)


def _version_of(kernel: str) -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", kernel)
    return (int(found[1]), int(found[2])) if found else None


def check_kernel(facts: Facts) -> Check:
    """Is the kernel one that the project is made for?"""
    release = facts.host.kernel or "unknown"
    found = _version_of(release)
    least = ".".join(map(str, LEAST_KERNEL))
    if found and found >= LEAST_KERNEL:
        return Check(name="kernel", level=Level.OK, measured=release)
    fix = f"Use Linux {least} or newer."
    return Check(
        name="kernel", level=Level.FAIL if found else Level.WARN, measured=release, fix=fix
    )


def check_memory(facts: Facts) -> Check:
    """Is there memory for the pool, within the cgroups and the machine?"""
    if facts.daemon is not None:
        return _pool_check(facts.host, facts.daemon.pool_bytes)
    room = facts.host.room
    if room is None:
        return Check(name="memory", level=Level.OK, measured="the machine does not say")
    measured = f"{format_size(room.nbytes)} free, bound by {room.bound_by}"
    if room.nbytes >= LOW_ROOM_BYTES:
        return Check(name="memory", level=Level.OK, measured=measured)
    fix = "Start the daemon with a --dram below that, or give the container more memory."
    return Check(name="memory", level=Level.WARN, measured=measured, fix=fix)


def check_nvme(facts: Facts) -> Check | None:
    """Does the daemon read and write all of its volumes?"""
    if facts.daemon is None or facts.daemon.nvme_health == NO_NVME:
        return None
    used, total = facts.daemon.nvme_used_bytes, facts.daemon.nvme_total_bytes
    measured = f"{format_size(used)} of {format_size(total)} in use"
    if facts.daemon.nvme_health == 0:
        return Check(name="NVMe", level=Level.OK, measured=measured)
    state = "is read and not written any more" if facts.daemon.nvme_health == 1 else "is given up"
    fix = "The daemon's log says why. Mend the disk or its directory, then restart the daemon."
    return Check(name="NVMe", level=Level.WARN, measured=f"a volume {state}; {measured}", fix=fix)


def check_engines(facts: Facts) -> Check:
    """Which engines can move the blocks of an NVMe volume here?"""
    nixl = f"not nixl ({facts.no_nixl_engine})" if facts.no_nixl_engine else "nixl"
    return Check(name="NVMe engines", level=Level.OK, measured=f"pread, {nixl}")


def check_shared_memory(facts: Facts) -> Check:
    """Is /dev/shm large? The pool does not lie there, but engines' own workers need it."""
    nbytes = facts.host.shm_bytes
    if nbytes is None:
        return Check(
            name="/dev/shm",
            level=Level.WARN,
            measured="not mounted",
            fix="Mount a tmpfs there if engines run here: NCCL and torch need it, the store not.",
        )
    measured = format_size(nbytes)
    if nbytes > SMALL_SHM_BYTES:
        return Check(name="/dev/shm", level=Level.OK, measured=measured)
    fix = "Give a container with engines more (docker run --shm-size=8g); the store needs none."
    return Check(name="/dev/shm", level=Level.WARN, measured=measured, fix=fix)


def check_memlock(facts: Facts) -> Check:
    """May a process lock the pool, as its registration with an RDMA device does?"""
    limit = facts.host.memlock_bytes
    measured = "unlimited" if limit is None else format_size(limit)
    if limit is None or not facts.rdma:
        measured += "" if facts.rdma else " (no RDMA device here needs more)"
        return Check(name="memlock", level=Level.OK, measured=measured)
    fix = "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit: RDMA locks the whole pool."
    return Check(name="memlock", level=Level.WARN, measured=measured, fix=fix)


def check_huge_pages(facts: Facts) -> Check:
    """Are huge pages reserved? `check_transparent` warns where there are none of either kind."""
    pages = facts.host.huge_pages
    size = format_size(pages.page_bytes)
    measured = f"{pages.total} of {size} reserved, {pages.free} free"
    if facts.daemon is None or not pages.total:
        return Check(name="huge pages", level=Level.OK, measured=measured)
    wanted = -(-facts.daemon.pool_bytes // pages.page_bytes)
    if pages.total >= wanted:
        return Check(name="huge pages", level=Level.OK, measured=measured)
    fix = f"sysctl vm.nr_hugepages={wanted}, then restart the daemon: these are too few for a pool."
    return Check(name="huge pages", level=Level.WARN, measured=measured, fix=fix)


def check_transparent(facts: Facts) -> Check:
    """Can shared memory have transparent huge pages, where none are reserved?"""
    mode = facts.host.shmem_thp
    reserved = facts.host.huge_pages.total > 0
    gathers = mode == "never" and (_version_of(facts.host.kernel or "") or (0, 0)) >= _GATHERS
    if reserved or gathers or mode in _SHMEM_THP_MODES:
        return Check(name="shmem THP", level=Level.OK, measured=mode or "unknown")
    folder = "/sys/kernel/mm/transparent_hugepage"
    fix = f"echo advise > {folder}/shmem_enabled: first touches of the pool are faster then."
    return Check(name="shmem THP", level=Level.WARN, measured=mode or "unknown", fix=fix)


def check_numa(facts: Facts) -> Check:
    """Is all memory equally near?"""
    nodes = facts.host.numa_nodes
    if len(nodes) <= 1:
        return Check(name="NUMA", level=Level.OK, measured="one node")
    measured = f"{len(nodes)} nodes: {', '.join(map(str, nodes))}"
    fix = "Start the daemon with --numa-node, the node of the engine's GPU, unless it is already."
    return Check(name="NUMA", level=Level.WARN, measured=measured, fix=fix)


def check_packages(facts: Facts) -> Check:
    """Are the packages there that every client needs?"""
    measured = ", ".join(f"{name} {version or 'missing'}" for name, version in facts.packages)
    if all(version is not None for _, version in facts.packages):
        return Check(name="packages", level=Level.OK, measured=measured)
    fix = "pip install 'kvstore-llm[cli]'"
    return Check(name="packages", level=Level.FAIL, measured=measured, fix=fix)


def check_transfer(facts: Facts) -> Check:
    """How do blocks get to other hosts, and is that the best that this one's devices can do?"""
    usable = [each for each in facts.transfers if each.usable]
    measured = ", ".join(f"{each.kind} ({each.words})" for each in usable)
    if not facts.rdma or any(each.kind == "nixl" for each in usable):
        return Check(name="transfer", level=Level.OK, measured=measured)
    fix = "pip install nixl-cu13 or nixl-cu12: only NIXL uses this host's RDMA devices."
    return Check(name="transfer", level=Level.WARN, measured=measured, fix=fix)


CHECKS: tuple[Callable[[Facts], Check | None], ...] = (
    check_daemon,
    check_versions,
    check_socket,
    check_kernel,
    check_memory,
    check_nvme,
    check_engines,
    check_shared_memory,
    check_memlock,
    check_huge_pages,
    check_transparent,
    check_numa,
    check_packages,
    check_transfer,
)


def examine(facts: Facts) -> list[Check]:
    """All findings; a check that needs a daemon is left out where there is none."""
    return [found for check in CHECKS if (found := check(facts))]


def failed(checks: Sequence[Check]) -> bool:
    """Whether something has to be mended before a store can be used."""
    return any(check.level is Level.FAIL for check in checks)


def checks_json(checks: Sequence[Check]) -> output.Json:
    """The answer of `doctor`."""
    rows = [
        {"name": each.name, "level": each.level, "measured": each.measured, "fix": each.fix}
        for each in checks
    ]
    return {"ok": not failed(checks), "checks": rows}


def show_checks(checks: Sequence[Check]) -> None:
    """Prints the answer of `doctor`, each fix under its finding."""
    colours = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}
    rows: list[tuple[str | Text, ...]] = []
    for each in checks:
        rows.append((Text(each.level, colours[each.level]), each.name, each.measured))
        if each.fix:
            rows.append(("", "", f"-> {each.fix}"))
    output.show(output.table(("", "check", "measured"), rows))


def _pool_check(host: Host, pool_bytes: int) -> Check:
    bound_bytes, whose = _memory_bound(host)
    measured = f"pool {format_size(pool_bytes)}"
    if bound_bytes is None:
        return Check(name="memory", level=Level.OK, measured=measured)
    measured += f", {format_size(bound_bytes)} {whose}"
    if pool_bytes <= _TIGHT_SHARE * bound_bytes:
        return Check(name="memory", level=Level.OK, measured=measured)
    level = Level.FAIL if pool_bytes > bound_bytes else Level.WARN
    fix = f"Start the daemon with --dram {int(_TIGHT_SHARE * bound_bytes) >> 20}MiB or less,"
    fix += " or raise the limit: what does not fit kills it, or is swapped."
    return Check(name="memory", level=level, measured=measured, fix=fix)


def _memory_bound(host: Host) -> tuple[int | None, str]:
    tightest: CgroupMemory | None = min(
        host.cgroups, key=lambda group: group.limit_bytes, default=None
    )
    if tightest is not None:
        return tightest.limit_bytes, f"limit of this command's memory cgroup {tightest.folder}"
    return host.memory_total_bytes, "in the machine"
