"""Gathers what `doctor` looks at: the host, the socket, the packages, a daemon if one answers."""

from __future__ import annotations

import importlib.metadata
import os
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from kvstore import __version__
from kvstore.errors import InvalidArgument, KVStoreError, PermissionDenied
from kvstore.host import Host, read_host
from kvstore.nvme.nixl import why_not
from kvstore.transfer.choose import Availability, available
from kvstore_client.cli.target import Connect

PACKAGES = (
    *("grpcio", "h2", "numba", "numpy", "protobuf", "sortedcontainers", "tenacity", "xxhash"),
    *("rich", "typer"),  # this command's own
)
NO_NVME = 3  # the store has no volume
_RDMA_DEVICES = Path("/sys/class/infiniband")


@dataclass(frozen=True, slots=True, kw_only=True)
class DaemonFacts:
    """A daemon that answered."""

    version: str
    pool_bytes: int
    round_trip_ms: float
    nvme_health: int = NO_NVME  # the worst volume's `kvstore.nvme.volume.Health`
    nvme_used_bytes: int = 0
    nvme_total_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketFacts:
    """A daemon's socket. `mode` and `folder_mode` are as in `os.stat`."""

    path: Path
    owner: int
    mode: int
    folder_mode: int
    usable: bool  # this user may connect


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Everything the checks look at. daemon: None if none answered, and `problem` says why."""

    target: str
    client_version: str
    user: int
    host: Host
    packages: tuple[tuple[str, str | None], ...]  # name and version, None: not installed
    rdma: bool  # the host has RDMA devices
    transfers: tuple[Availability, ...]
    no_nixl_engine: str = ""  # why NVMe volumes cannot be moved by NIXL; empty: they can
    daemon: DaemonFacts | None = None
    problem: str = ""
    refused: bool = False  # a daemon is there, and does not let this user in
    socket: SocketFacts | None = None


def gather(connect: Connect, target: str, timeout_s: float) -> Facts:
    """Everything that the checks need. `InvalidArgument` for a target that is none."""
    daemon, problem = _ask(connect, target, timeout_s)
    return Facts(
        target=target,
        client_version=__version__,
        user=os.geteuid(),
        host=read_host(),
        packages=tuple((name, package_version(name)) for name in PACKAGES),
        rdma=_RDMA_DEVICES.is_dir() and any(_RDMA_DEVICES.iterdir()),
        transfers=tuple(available()),
        no_nixl_engine=why_not(),
        daemon=daemon,
        problem=str(problem or ""),
        refused=isinstance(problem, PermissionDenied),
        socket=read_socket(target),
    )


def package_version(name: str) -> str | None:
    """The installed version, None if there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def read_socket(target: str) -> SocketFacts | None:
    """The unix socket of a target; None for other targets, and where there is no such file."""
    url = urlparse(target)
    if url.scheme not in ("unix", "grpc+unix"):
        return None
    path = Path(url.path)
    try:
        found, folder = path.stat(), path.parent.stat()
    except OSError:
        return None
    return SocketFacts(
        path=path,
        owner=found.st_uid,
        mode=found.st_mode,
        folder_mode=folder.st_mode,
        usable=os.access(path, os.W_OK),
    )


def _ask(
    connect: Connect, target: str, timeout_s: float
) -> tuple[DaemonFacts | None, KVStoreError | None]:
    """What the daemon says of itself, or why it says nothing."""
    try:
        with connect(target, timeout_s) as session:
            version = session.info().version
            start = time.perf_counter()
            stats = session.stats()
            round_trip_ms = (time.perf_counter() - start) * 1e3
    except InvalidArgument:
        raise
    except KVStoreError as error:
        return None, error
    found = DaemonFacts(
        version=version,
        pool_bytes=stats.total_bytes,
        round_trip_ms=round_trip_ms,
        nvme_health=stats.nvme_health,
        nvme_used_bytes=stats.nvme_used_bytes,
        nvme_total_bytes=stats.nvme_total_bytes,
    )
    return found, None
