"""Where a store is: the targets that a client takes, and the session that each one gets."""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, urlsplit

from kvstore import limits
from kvstore.channel.paths import default_socket, grpc_socket
from kvstore.errors import InvalidArgument, ProtocolError, Unavailable
from kvstore.session import ChannelSession, Session
from kvstore.sizes import parse_size
from kvstore.transfer.choose import KINDS

if TYPE_CHECKING:  # gRPC is imported by those who connect through it: an engine does not
    from kvstore_client.cluster.session import ClusterSession

CLUSTER_SCHEME = "cluster://"
_NO_BLOCKS_BYTES = 1 << 16  # of memory, where only questions are asked
_MOST_MEMORY_BYTES = 1 << 40
_TRANSFER = "auto"  # as nodes have it that were told nothing
_OPTIONS = ("transfer", "replicas", "arena", "ring")
_FORMS = (
    "unix:///path/to/kvstore.sock, grpc+unix:///path/to/kvstore.grpc.sock, grpc://127.0.0.1:port or"
    " cluster://host:port,host:port"
)

log = logging.getLogger(__name__)


class DataPath(enum.StrEnum):
    """How blocks travel between this process and the store."""

    SHARED_MEMORY = "shared memory"
    GRPC = "grpc"
    CLUSTER = "cluster"


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed target.

    address: the channel's path, what gRPC takes for an address, or the addresses of some nodes with
    commas between. The others are of a cluster's target, None where it says nothing; arena, ring:
    bytes of memory for puts and gets.
    """

    data_path: DataPath
    address: str
    transfer: str | None = None
    replicas: int | None = None
    arena: int | None = None
    ring: int | None = None


def default_target() -> str:
    """The daemon of this user, where nothing else was said."""
    return f"unix://{default_socket()}"


def parse_target(target: str) -> Target:
    """`unix:///x.sock`, `grpc+unix:///x.grpc.sock`, `grpc://host:port`, or
    `cluster://host:port,host:port[?transfer=KIND&replicas=N&arena=SIZE&ring=SIZE]`;
    `InvalidArgument`."""
    if target.startswith(CLUSTER_SCHEME):
        return _parse_cluster(target)
    url = _split(target)
    if url.scheme == "unix" and url.path and not url.netloc:
        return Target(DataPath.SHARED_MEMORY, url.path)
    if url.scheme == "grpc+unix" and url.path and not url.netloc:
        return Target(DataPath.GRPC, f"unix:{url.path}")
    if url.scheme == "grpc" and _is_address(url.netloc) and not url.path.strip("/"):
        return Target(DataPath.GRPC, url.netloc)
    raise InvalidArgument("target", f"{target!r}: expected {_FORMS}")


def _parse_cluster(target: str) -> Target:
    nodes, _, query = target.removeprefix(CLUSTER_SCHEME).partition("?")
    for node in nodes.split(","):
        if not _is_address(node):
            message = f"{target!r}: {node!r} is not HOST:PORT; expected {CLUSTER_SCHEME}HOST:PORT"
            raise InvalidArgument("target", f"{message},HOST:PORT")
    given = parse_qsl(query, keep_blank_values=True)
    options = dict(given)
    if len(options) < len(given) or not options.keys() <= set(_OPTIONS):
        names = ", ".join(_OPTIONS)
        raise InvalidArgument("target", f"{target!r}: behind ? there may be {names}, each once")
    transfer, replicas = options.get("transfer"), options.get("replicas")
    if transfer is not None and transfer not in KINDS:
        kinds = ", ".join(KINDS)
        raise InvalidArgument("target", f"{target!r}: transfer is none of {kinds}")
    most = limits.MAX_REPLICAS
    if replicas is not None and replicas not in map(str, range(1, most + 1)):
        raise InvalidArgument("target", f"{target!r}: replicas must be 1 to {most}")
    return Target(
        DataPath.CLUSTER,
        nodes,
        transfer,
        int(replicas) if replicas else None,
        arena=_size(target, "arena", options),
        ring=_size(target, "ring", options),
    )


def _size(target: str, name: str, options: dict[str, str]) -> int | None:
    if name not in options:
        return None
    try:
        found = parse_size(options[name])
    except ValueError as error:
        raise InvalidArgument("target", f"{target!r}: {name}: {error}") from None
    if not 0 < found <= _MOST_MEMORY_BYTES:
        raise InvalidArgument("target", f"{target!r}: {name} must be 1B to 1TiB")
    return found


def connect(
    target: str, *, timeout_s: float, token: str | None, verify_reads: bool, lazy: bool
) -> tuple[Session, DataPath]:
    """A session with the store at `target`, over shared memory where that can be had.

    Where the daemon's memory cannot be mapped, or its channel is of another version, the gateway
    beside it is asked instead. Raises as `KVStoreClient` says.
    """
    found = parse_target(target)
    if found.data_path is DataPath.CLUSTER:
        return _connect_cluster(found, timeout_s, token, lazy=lazy), DataPath.CLUSTER
    if found.data_path is DataPath.SHARED_MEMORY:
        try:
            session = ChannelSession(
                found.address, timeout_s=timeout_s, verify_reads=verify_reads, lazy=lazy
            )
            return session, DataPath.SHARED_MEMORY
        except (OSError, ProtocolError) as error:
            found = _gateway_beside(found.address, error)
            log.warning("no shared memory with %s, using %s: %s", target, found.address, error)
    from kvstore_client.remote import RemoteSession

    session_of_gateway = RemoteSession(found.address, token=token, timeout_s=timeout_s, lazy=lazy)
    return session_of_gateway, DataPath.GRPC


def connect_to_ask(target: str, *, timeout_s: float, token: str | None = None) -> ClusterSession:
    """A session with the cluster at `target` for questions about it: it has hardly any memory for
    blocks, and needs no device. `InvalidArgument` for a target that is no cluster's; else raises as
    `connect`."""
    found = parse_target(target)
    if found.data_path is not DataPath.CLUSTER:
        message = f"{target!r} is no cluster: expected {CLUSTER_SCHEME}HOST:PORT,HOST:PORT"
        raise InvalidArgument("target", message)
    from kvstore_client.cluster.access import find_tls, find_token
    from kvstore_client.cluster.session import ClusterSession

    return ClusterSession(
        found.address.split(","),
        token=find_token(token),
        tls=find_tls(),
        timeout_s=timeout_s,
        transfer="grpc",
        arena_bytes=_NO_BLOCKS_BYTES,
        ring_bytes=_NO_BLOCKS_BYTES,
    )


def _connect_cluster(
    found: Target, timeout_s: float, token: str | None, *, lazy: bool
) -> ClusterSession:
    from kvstore_client.cluster.access import find_tls, find_token
    from kvstore_client.cluster.session import ARENA_BYTES, RING_BYTES, ClusterSession

    return ClusterSession(
        found.address.split(","),
        token=find_token(token),
        tls=find_tls(),
        timeout_s=timeout_s,
        replicas=found.replicas,
        transfer=found.transfer or _TRANSFER,
        arena_bytes=found.arena or ARENA_BYTES,
        ring_bytes=found.ring or RING_BYTES,
        lazy=lazy,
    )


def _gateway_beside(path: str, error: Exception) -> Target:
    """The gateway of the daemon whose channel at `path` is of no use; `Unavailable` if none."""
    gateway = grpc_socket(Path(path))
    if not gateway.exists():
        # Most likely the path is the gateway's own socket, under the channel's scheme.
        raise Unavailable(
            f"{path} is no channel of this version ({error}), and there is no {gateway}: if it is"
            f" the socket of gRPC, write grpc+unix://{path}"
        ) from error
    return Target(DataPath.GRPC, f"unix:{gateway}")


def _split(target: str) -> SplitResult:
    """The parts of a URL, all empty for what is none."""
    try:
        return urlsplit(target)
    except ValueError:
        return urlsplit("")


def _is_address(text: str) -> bool:
    """Whether it is HOST:PORT, an IPv6 address in brackets, and nothing else."""
    try:
        url = urlsplit(f"//{text}")
        return bool(url.hostname and url.port) and url.netloc == text and "@" not in text
    except ValueError:
        return False
