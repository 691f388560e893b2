"""Where a store is: the targets that a client takes, and the session that each one gets."""

from __future__ import annotations

import enum
import logging
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from kvstore.channel.paths import default_socket, grpc_socket
from kvstore.errors import InvalidArgument, ProtocolError, Unavailable
from kvstore.session import ChannelSession, Session
from kvstore_client.remote import RemoteSession

log = logging.getLogger(__name__)


class DataPath(enum.StrEnum):
    """How blocks travel between this process and the store."""

    SHARED_MEMORY = "shared memory"
    GRPC = "grpc"


@dataclass(frozen=True, slots=True)
class Target:
    """A parsed target. `address`: the channel's path, or what gRPC takes for an address."""

    data_path: DataPath
    address: str


def default_target() -> str:
    """The daemon of this user, where nothing else was said."""
    return f"unix://{default_socket()}"


def parse_target(target: str) -> Target:
    """`unix:///x.sock`, `grpc+unix:///x.grpc.sock` or `grpc://host:port`; `InvalidArgument`."""
    url = urlsplit(target)
    if url.scheme == "unix" and url.path and not url.netloc:
        return Target(DataPath.SHARED_MEMORY, url.path)
    if url.scheme == "grpc+unix" and url.path and not url.netloc:
        return Target(DataPath.GRPC, f"unix:{url.path}")
    if url.scheme == "grpc" and _is_address(target):
        return Target(DataPath.GRPC, url.netloc)
    raise InvalidArgument(
        "target",
        f"{target!r}: expected unix:///path/to/kvstore.sock, grpc+unix:///path/to/kvstore.grpc.sock"
        " or grpc://127.0.0.1:port",
    )


def connect(
    target: str, *, timeout_s: float, token: str | None, verify_reads: bool, lazy: bool
) -> tuple[Session, DataPath]:
    """A session with the store at `target`, over shared memory where that can be had.

    Where the daemon's memory cannot be mapped, or its channel is of another version, the gateway
    beside it is asked instead. Raises as `KVStoreClient` says.
    """
    found = parse_target(target)
    if found.data_path is DataPath.SHARED_MEMORY:
        try:
            session = ChannelSession(
                found.address, timeout_s=timeout_s, verify_reads=verify_reads, lazy=lazy
            )
            return session, DataPath.SHARED_MEMORY
        except (OSError, ProtocolError) as error:
            found = _gateway_beside(found.address, error)
            log.warning("no shared memory with %s, using %s: %s", target, found.address, error)
    session_of_gateway = RemoteSession(found.address, token=token, timeout_s=timeout_s, lazy=lazy)
    return session_of_gateway, DataPath.GRPC


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


def _is_address(target: str) -> bool:
    url = urlsplit(target)
    try:
        return bool(url.hostname and url.port) and not url.path.strip("/")
    except ValueError:
        return False
