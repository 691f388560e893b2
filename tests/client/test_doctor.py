"""`kvstore doctor`: each check warns and fails where it should, and says how to mend it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import socket
import stat
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from client.scripted import ScriptedStore

from daemon import daemon
from kvstore.errors import InvalidArgument, Unavailable
from kvstore.host import CgroupMemory, Host, HugePageCounts
from kvstore.transfer.choose import Availability
from kvstore_client.cli import doctor, facts
from kvstore_client.cli.app import run
from kvstore_client.cli.doctor import Check, Level
from kvstore_client.cli.facts import DaemonFacts, Facts, SocketFacts

GIB = 1 << 30
HOST = Host(
    kernel="6.1.0-generic",
    memory_total_bytes=64 * GIB,
    memory_available_bytes=48 * GIB,
    cgroups=(),
    shm_bytes=32 * GIB,
    memlock_bytes=8 << 20,
    huge_pages=HugePageCounts(total=0, free=0, page_bytes=2 << 20),
    shmem_thp="advise",
    numa_nodes=(0,),
)
SOCKET = SocketFacts(
    path=Path("/run/user/7/kvstore.sock"),
    owner=7,
    mode=stat.S_IFSOCK | 0o600,
    folder_mode=stat.S_IFDIR | 0o700,
    usable=True,
)
FACTS = Facts(
    target="unix:///run/user/7/kvstore.sock",
    client_version="1.0",
    user=7,
    host=HOST,
    packages=(("numpy", "2.4.0"), ("rich", "15.0.0")),
    rdma=False,
    transfers=(Availability("nixl", True, "over TCP"), Availability("grpc", True, "copies")),
    daemon=DaemonFacts(
        version="1.0",
        pool_bytes=8 * GIB,
        round_trip_ms=0.05,
        nvme_health=0,
        nvme_used_bytes=2 * GIB,
        nvme_total_bytes=9 * GIB,
    ),
    socket=SOCKET,
)


def on(**host: Any) -> Facts:
    """The facts of another host."""
    return dataclasses.replace(FACTS, host=dataclasses.replace(HOST, **host))


def having(**changes: Any) -> Facts:
    """Other facts."""
    return dataclasses.replace(FACTS, **changes)


def with_socket(**changes: Any) -> Facts:
    """The facts with another socket."""
    return having(socket=dataclasses.replace(SOCKET, **changes))


def with_daemon(**changes: Any) -> Facts:
    """The facts with a daemon that says something else."""
    assert FACTS.daemon
    return having(daemon=dataclasses.replace(FACTS.daemon, **changes))


def group(gib: int) -> CgroupMemory:
    """A memory cgroup with that limit."""
    return CgroupMemory(folder=Path("/sys/fs/cgroup/x"), limit_bytes=gib * GIB, used_bytes=GIB)


def find(facts: Facts, name: str) -> Check:
    """The finding of one check."""
    (found,) = [check for check in doctor.examine(facts) if check.name == name]
    return found


def test_a_sound_host_passes_every_check() -> None:
    checks = doctor.examine(FACTS)
    assert len(checks) == len(doctor.CHECKS)
    assert {check.level for check in checks} == {Level.OK}
    assert not any(check.fix for check in checks)


def test_a_store_without_nvme_has_no_check_of_it() -> None:
    checks = doctor.examine(with_daemon(nvme_health=facts.NO_NVME))
    assert "NVMe" not in {check.name for check in checks}


ABSENT = having(daemon=None, problem="nobody there", socket=None)
NO_NIXL = (Availability("nixl", False, "no NIXL"), Availability("grpc", True, "copies"))
HUGE = HugePageCounts(total=100, free=100, page_bytes=2 << 20)
FINDINGS: dict[str, tuple[Facts, str, Level, str, str]] = {
    # what is wrong: the facts, the check, its level, a measured value, a word of the fix
    "no daemon": (ABSENT, "daemon", Level.FAIL, "nobody there", "kvstore-server"),
    "no token": (
        *(dataclasses.replace(ABSENT, problem="not you", refused=True), "daemon", Level.FAIL),
        *("not you", "grpc.token"),
    ),
    "old daemon": (having(client_version="2.0"), "versions", Level.WARN, "daemon 1.0", "release"),
    "no right to connect": (with_socket(usable=False), "socket", Level.FAIL, "0600", "user"),
    "open folder": (
        *(with_socket(folder_mode=stat.S_IFDIR | 0o777), "socket", Level.WARN),
        *("mode 0777", "chmod go-w /run/user/7"),
    ),
    "another user's socket": (with_socket(owner=8), "socket", Level.WARN, "user 8", "trust"),
    "old kernel": (on(kernel="5.13.9"), "kernel", Level.FAIL, "5.13.9", "5.14"),
    "unknown kernel": (on(kernel=None), "kernel", Level.WARN, "unknown", "5.14"),
    "pool over cgroup": (
        *(on(cgroups=(group(20), group(4))), "memory", Level.FAIL),
        *("pool 8 GiB, 4 GiB limit", "--dram 3276MiB"),
    ),
    "pool near cgroup": (on(cgroups=(group(9),)), "memory", Level.WARN, "9 GiB", "--dram"),
    "pool over machine": (
        *(on(memory_total_bytes=4 * GIB), "memory", Level.FAIL, "4 GiB in the machine", "--dram"),
    ),
    "a volume not written": (
        *(with_daemon(nvme_health=1), "NVMe", Level.WARN),
        *("not written any more; 2 GiB of 9 GiB", "log says why"),
    ),
    "a volume lost": (
        *(with_daemon(nvme_health=2), "NVMe", Level.WARN, "is given up", "restart the daemon"),
    ),
    "no NIXL engine": (
        *(having(no_nixl_engine="no NIXL: pip install nixl-cu13"), "NVMe engines", Level.OK),
        *("pread, not nixl (no NIXL: pip install nixl-cu13)", ""),
    ),
    "little memory": (
        *(dataclasses.replace(ABSENT, host=on(memory_available_bytes=GIB // 2).host), "memory"),
        *(Level.WARN, "512 MiB free", "--dram"),
    ),
    "small /dev/shm": (on(shm_bytes=64 << 20), "/dev/shm", Level.WARN, "64 MiB", "--shm-size"),
    "no /dev/shm": (on(shm_bytes=None), "/dev/shm", Level.WARN, "not mounted", "tmpfs"),
    "no NIXL for RDMA": (
        *(dataclasses.replace(on(memlock_bytes=None), rdma=True, transfers=NO_NIXL), "transfer"),
        *(Level.WARN, "grpc (copies)", "pip install nixl-cu13"),
    ),
    "memlock": (having(rdma=True), "memlock", Level.WARN, "8 MiB", "ulimit -l"),
    "few huge pages": (on(huge_pages=HUGE), "huge pages", Level.WARN, "100 of 2 MiB", "=4096"),
    "no THP": (on(shmem_thp="deny"), "shmem THP", Level.WARN, "deny", "echo advise"),
    "no THP without being told": (
        *(on(shmem_thp="never", kernel="5.15"), "shmem THP", Level.WARN, "never", "echo advise"),
    ),
    "two nodes": (on(numa_nodes=(0, 1)), "NUMA", Level.WARN, "2 nodes: 0, 1", "--numa-node"),
    "package": (
        *(having(packages=(("numpy", "2.4.0"), ("rich", None))), "packages", Level.FAIL),
        *("rich missing", "pip install"),
    ),
}


@pytest.mark.parametrize("case", FINDINGS)
def test_each_finding_has_its_level_its_measured_value_and_its_fix(case: str) -> None:
    given, name, level, measured, fix = FINDINGS[case]
    found = find(given, name)
    assert found.level is level
    assert measured in found.measured
    assert fix in found.fix
    others = [check for check in doctor.examine(given) if check.name not in (name, "daemon")]
    assert {check.level for check in others} == {Level.OK}


@pytest.mark.parametrize(
    "given",
    [
        on(memlock_bytes=None),
        on(huge_pages=HugePageCounts(total=4096, free=0, page_bytes=2 << 20), shmem_thp="never"),
        on(cgroups=(group(40),)),
        on(memory_total_bytes=None),
        with_socket(owner=0),
        with_socket(folder_mode=stat.S_IFDIR | stat.S_ISVTX | 0o777),
        on(kernel="5.14"),
        on(shmem_thp="never"),
        having(transfers=NO_NIXL),
    ],
    ids=[
        *(
            "memlock",
            "huge pages",
            "cgroup",
            "no meminfo",
            "root's",
            "sticky folder",
            "least",
            "gathered",
        ),
        "no NIXL, no RDMA",
    ],
)
def test_what_is_good_enough_passes(given: Facts) -> None:
    assert {check.level for check in doctor.examine(given)} == {Level.OK}


def test_a_target_without_a_socket_has_no_socket_check() -> None:
    names = [check.name for check in doctor.examine(having(socket=None))]
    assert "socket" not in names


def test_packages_are_those_that_the_project_asks_for() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["cli"]]
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in wanted}
    assert names == set(facts.PACKAGES)


def test_socket_is_read_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "x.sock"
    assert facts.read_socket(f"unix://{path}") is None
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o620)
        tmp_path.chmod(0o711)
        for scheme in ("unix", "grpc+unix"):
            found = facts.read_socket(f"{scheme}://{path}")
            assert found is not None
            assert stat.S_IMODE(found.mode) == 0o620
            assert stat.S_IMODE(found.folder_mode) == 0o711
            assert (found.owner, found.usable) == (os.geteuid(), True)
    assert facts.read_socket("grpc://127.0.0.1:1") is None


def doctor_with(
    answer: ScriptedStore | BaseException,
    monkeypatch: pytest.MonkeyPatch,
    *options: str,
    host: Host = HOST,
) -> int:
    """Runs the command on a sound host, with a store that answers or not; its exit code."""
    monkeypatch.setattr(facts, "read_host", lambda: host)

    @contextlib.contextmanager
    def connect(target: str, timeout_s: float) -> Iterator[ScriptedStore]:
        if isinstance(answer, BaseException):
            raise answer
        yield answer

    return run(["doctor", "--target", "unix:///nonexistent/x.sock", *options], connect)


def test_doctor_works_without_a_daemon(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor_with(Unavailable("nobody\nthere"), monkeypatch) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b" not in out
    lines = out.splitlines()
    assert re.match(r"fail +daemon +unix:///nonexistent/x.sock: nobody\\nthere", lines[1])
    assert lines[2].strip().startswith("-> Start kvstore-server")
    assert "kernel" in out


def test_doctor_in_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor_with(ScriptedStore(), monkeypatch, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    rows = {row["name"]: row for row in found["checks"]}
    assert rows["versions"]["level"] == "warn"  # warnings alone are no failure
    assert rows["memory"]["measured"].startswith("pool 32 MiB")

    old = dataclasses.replace(HOST, kernel="4.18")
    assert doctor_with(ScriptedStore(), monkeypatch, "--json", host=old) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_doctor_refuses_a_target_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor_with(InvalidArgument("target", "is none"), monkeypatch) == 2
    assert capsys.readouterr().err == "kvstore: target: is none\n"


def test_doctor_of_this_host_and_a_real_daemon(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with daemon(tmp_path, "--dram", "32MiB") as running:
        run(["doctor", "--target", running.target, "--json"])
    out, err = capsys.readouterr()
    assert err == ""
    levels = {row["name"]: row["level"] for row in json.loads(out)["checks"]}
    assert levels["daemon"] == levels["versions"] == levels["packages"] == "ok"
    assert levels["socket"] == "ok"
