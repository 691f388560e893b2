"""The gateway process: the public protocol over gRPC, beside the daemon, as one of its clients.

It lives and dies with the daemon's core: the end of file of a pipe that only the core holds open
ends it, as does SIGTERM. `python -m kvstore_server.gateway --help` lists its flags.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # until `settle`

import argparse
import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import structlog
from grpc_health.v1 import health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from kvstore.errors import KVStoreError
from kvstore.lasting import settle
from kvstore.session import ChannelSession, Session
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1.kvstore_pb2_grpc import add_KVStoreServicer_to_server
from kvstore_proto.v1.translate import MESSAGE_OPTIONS
from kvstore_server.auth import TokenInterceptor
from kvstore_server.health import Health
from kvstore_server.logs import configure_logging
from kvstore_server.service import KVStoreService

WORKERS = 16  # more than all of service's streams, so that health is answered beside those
MAX_CALLS = 64  # running and waiting for a worker
NICENESS = 10  # where processors are short, clients on this host, who share memory, go first
DRAIN_S = 5.0
CONNECT_S = 5.0
_OPTIONS = (
    *MESSAGE_OPTIONS,
    ("grpc.so_reuseport", 0),  # a port that another process has is an error
    # Of one connection, watchers of the health included, which hold no worker.
    ("grpc.max_concurrent_streams", 2 * MAX_CALLS),
)

log = structlog.get_logger()


class Gateway:
    """Serves a session over gRPC.

    grpc_socket: a unix socket, mode 0600, made here; its owner needs no token. grpc_port: also
    TCP on the loopback, for those with the token (0: any free port; None: no TCP). ready_fd:
    where one line of JSON says that it serves; closed then. `RuntimeError` where an address
    cannot be had.
    """

    def __init__(
        self,
        session: Session,
        *,
        grpc_socket: Path,
        grpc_port: int | None,
        token: str,
        ready_fd: int,
    ) -> None:
        self.grpc_socket, self.grpc_port = grpc_socket, grpc_port
        self._ready_fd = ready_fd
        self._pools: list[ThreadPoolExecutor] = []
        self._health = Health(session, on_first_pass=self._say_ready)
        self._service = KVStoreService(session, on_trouble=self._health.doubt)
        self._servers = [self._new_server()]
        _bind_unix(self._servers[0], grpc_socket)
        if grpc_port is not None:
            # A server of its own: strangers on TCP cannot take the workers of the socket's users.
            self._servers.append(self._new_server(TokenInterceptor(token)))
            self.grpc_port = self._servers[1].add_insecure_port(f"127.0.0.1:{grpc_port}")

    def start(self) -> None:
        """Takes calls; the canary decides when they are told that it serves."""
        for server in self._servers:
            server.start()
        self._health.start()

    def drain(self, grace_s: float) -> None:
        """Takes no more calls, lets those under way end for so long, and cancels the rest."""
        self._health.shut_down()
        ending = [server.stop(grace_s) for server in self._servers]
        self._service.end_looking()
        for stopped in ending:
            stopped.wait()
        self._health.close()
        for pool in self._pools:
            pool.shutdown(wait=False)  # a cancelled call may still wait for the store

    def _new_server(self, *interceptors: grpc.ServerInterceptor) -> grpc.Server:
        pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="kvstore-grpc")
        self._pools.append(pool)
        server = grpc.server(
            pool,
            interceptors=list(interceptors),
            options=_OPTIONS,
            maximum_concurrent_rpcs=MAX_CALLS,
        )
        add_KVStoreServicer_to_server(self._service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health.servicer, server)
        services = [found.full_name for found in pb.DESCRIPTOR.services_by_name.values()]
        names = (*services, "grpc.health.v1.Health", reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        return server

    def _say_ready(self) -> None:
        line = {"grpc_socket": str(self.grpc_socket), "grpc_port": self.grpc_port}
        # Nobody may be listening any more; the lifeline tells of that.
        with contextlib.suppress(BrokenPipeError), os.fdopen(self._ready_fd, "w") as pipe:
            pipe.write(json.dumps(line) + "\n")


def _bind_unix(server: grpc.Server, path: Path) -> None:
    # By the mask, because a mode that is set afterwards comes too late for the first moment.
    previous = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{path}")
    finally:
        os.umask(previous)


class End:
    """What ends the process: SIGTERM, SIGINT, or the lifeline's end of file."""

    def __init__(self, lifeline_fd: int) -> None:
        self._lifeline_fd = lifeline_fd
        self._signalled = os.eventfd(0, os.EFD_CLOEXEC)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os.eventfd_write(self._signalled, 1))

    def wait(self) -> str:
        """Blocks until one of them happens; says which."""
        poller = select.poll()
        poller.register(self._signalled, select.POLLIN)
        poller.register(self._lifeline_fd, select.POLLIN)
        found = [fd for fd, _ in poller.poll()]
        return "signal" if self._signalled in found else "the core is gone"


def run(options: argparse.Namespace) -> None:
    """Serves until the end; `KVStoreError`, `OSError` or `RuntimeError` where it cannot."""
    os.nice(NICENESS)
    end = End(options.lifeline_fd)
    token = options.token_file.read_text().strip()
    # The bytes leave this host's memory, so they are checked before they do.
    session = ChannelSession(options.channel, timeout_s=CONNECT_S, verify_reads=True)
    try:
        gateway = Gateway(
            session,
            grpc_socket=options.grpc_socket,
            grpc_port=options.grpc_port,
            token=token,
            ready_fd=options.ready_fd,
        )
        gateway.start()
        log.info("gateway drains", reason=end.wait())
        gateway.drain(DRAIN_S)
    finally:
        session.close()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, which the supervisor writes."""
    parser = argparse.ArgumentParser(prog="kvstore-gateway", description=__doc__)
    parser.add_argument("--channel", required=True, help="the daemon's unix socket")
    parser.add_argument("--grpc-socket", type=Path, required=True, help="unix socket to serve on")
    parser.add_argument("--grpc-port", type=int, help="also serve on this port; 0 picks one")
    parser.add_argument("--token-file", type=Path, required=True, help="the token for TCP")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument(
        "--log-level", choices=("debug", "info", "warning", "error"), default="info"
    )
    parser.add_argument("--ready-fd", type=int, required=True, help="where to say: it serves")
    parser.add_argument("--lifeline-fd", type=int, required=True, help="ends this when it ends")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the process; its exit status."""
    settle()
    options = parse(arguments)
    configure_logging(options.log_format, options.log_level)
    try:
        run(options)
    except (KVStoreError, OSError, RuntimeError) as error:
        log.error("gateway cannot serve", reason=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
