"""The node process. It lives and dies with the daemon's core, as the gateway does.

`python -m kvstore_server.cluster --help` lists its flags, which the supervisor writes.
"""

from __future__ import annotations

import gc

if __name__ == "__main__":
    gc.disable()  # until `settle`

import argparse
import asyncio
import contextlib
import json
import os
import secrets
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog

from kvstore.cluster.coordination import Coordination
from kvstore.cluster.members import Member, parse_members
from kvstore.cluster.node import Node
from kvstore.cluster.site import NodePolicy
from kvstore.errors import InvalidArgument, KVStoreError, Unavailable
from kvstore.lasting import settle
from kvstore.transfer.apart import make_safe_agent
from kvstore_proto.cluster.pipes import Streams
from kvstore_proto.cluster.rpc import Tls, client_token, node_token
from kvstore_proto.cluster.world import AsyncWorld
from kvstore_server.cluster.ledger import FileLedger
from kvstore_server.cluster.metrics import serve_metrics
from kvstore_server.cluster.service import PeerService
from kvstore_server.cluster.store import ChannelNodeStore
from kvstore_server.cluster.transfers import AgentTransfers
from kvstore_server.coordination.static import StaticCoordination
from kvstore_server.gateway import End
from kvstore_server.logs import configure_logging

CONNECT_S = 5.0
DRAIN_S = 5.0
_BEGIN_S = 5.0  # how long a start waits for the first look at the members
_LOOK_S = 0.01
_FIRST = asyncio.FIRST_COMPLETED
_NICENESS = 5  # engines on this host go first
_SWITCH_S = 0.0005  # how long a thread that has bytes to move waits for one that does not

log = structlog.get_logger()


class _Process:
    """All parts of one node, made in order and ended in the reverse one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        self._secret = options.secret_file.read_bytes()
        self._tls = _tls(options)
        self._stack = contextlib.AsyncExitStack()

    async def serve(self, end: End) -> None:
        options = self._options
        me = Member(
            name=options.name,
            address=options.advertise,
            weight=options.weight,
            run=secrets.randbits(62),
        )
        coordination = _coordination(options, me)
        async with self._stack as stack:
            store = ChannelNodeStore(str(options.channel), timeout_s=CONNECT_S)
            stack.callback(store.close)
            streams = Streams()
            host = me.address.rpartition(":")[0]
            agent = make_safe_agent(options.transfer, me.name, streams.book.find, host=host)
            streams.set_agent(agent)
            transfers = AgentTransfers(agent, store.pool, store.pool_fd)
            stack.callback(transfers.close)
            world = AsyncWorld(token=node_token(self._secret), tls=self._tls, streams=streams)
            stack.push_async_callback(world.close)
            stack.push_async_callback(coordination.close)
            ledger = FileLedger(options.data_dir, me.name)
            node = Node(
                world,
                store,
                transfers,
                coordination,
                ledger,
                me=me,
                replicas=options.replicas,
                policy=NodePolicy(repair_bytes_per_ms=options.repair_rate / 1e3),
            )
            stack.push_async_callback(node.close)
            service = PeerService(
                node,
                node_token=node_token(self._secret),
                client_token=client_token(self._secret),
                streams=streams,
            )
            await service.start(options.listen, self._tls)
            stack.push_async_callback(service.stop, DRAIN_S)
            if options.metrics_port is not None:
                loop = asyncio.get_event_loop()
                stack.callback(serve_metrics(node, transfers, options.metrics_port, loop))
            running = asyncio.create_task(node.run())
            ending = _when_over(end)
            await asyncio.wait(
                [running, asyncio.create_task(_until_begun(node))], return_when=_FIRST
            )
            if not running.done():
                self._say_ready()
            lost = asyncio.create_task(store.lost.wait())
            parts: list[asyncio.Future[Any]] = [running, ending, lost]
            await asyncio.wait(parts, return_when=_FIRST)
            if running.done():
                running.result()  # it ends only by an error, which says why
            if lost.done() and not ending.done():
                raise Unavailable("the core did not answer in time: this process begins anew")
            log.info("node drains", reason=ending.result())
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    def _say_ready(self) -> None:
        line = {"address": self._options.advertise, "name": self._options.name}
        with (
            contextlib.suppress(BrokenPipeError),
            os.fdopen(self._options.ready_fd, "w") as pipe,
        ):
            pipe.write(json.dumps(line) + "\n")


def _when_over(end: End) -> asyncio.Future[str]:
    """Why the process is to end, once it is. By a thread that nobody waits for: where the node
    itself fails, the process must not stay until somebody else ends it."""
    loop = asyncio.get_running_loop()
    over: asyncio.Future[str] = loop.create_future()

    def wait() -> None:
        reason = end.wait()
        with contextlib.suppress(RuntimeError):  # the loop has ended by itself
            loop.call_soon_threadsafe(over.set_result, reason)

    threading.Thread(target=wait, name="kvstore-node-end", daemon=True).start()
    return over


async def _until_begun(node: Node) -> None:
    """Until the node serves, or knows that it cannot yet, or for so long."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_BEGIN_S):
            while not (node.site.serving or node.membership.failed):
                await asyncio.sleep(_LOOK_S)


def _coordination(options: argparse.Namespace, me: Member) -> Coordination:
    if options.etcd:
        try:  # a cluster of a static list works without the client of etcd
            from kvstore_server.coordination.etcd import EtcdCoordination
            from kvstore_server.coordination.etcd_client import Access
        except ImportError as error:
            hint = "needs its client: pip install 'kvstore-llm[etcd]'"
            raise InvalidArgument("etcd", f"{hint} ({error})") from None
        access = Access(
            ca=options.etcd_ca,
            cert=options.etcd_cert,
            key=options.etcd_key,
            user=options.etcd_user,
            password_file=options.etcd_password_file,
        )
        return EtcdCoordination(options.etcd.split(","), cluster=options.cluster, access=access)
    members = parse_members(options.members)
    return StaticCoordination(members, replicas=options.replicas, me=me.name)


def _tls(options: argparse.Namespace) -> Tls | None:
    paths = (options.tls_ca, options.tls_certificate, options.tls_key)
    if not any(paths):
        return None
    if not all(paths):
        raise InvalidArgument("tls", "name all of the authority, the certificate and its key")
    return Tls(ca=paths[0], certificate=paths[1], key=paths[2])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, which the supervisor writes."""
    parser = argparse.ArgumentParser(prog="kvstore-node", description=__doc__)
    parser.add_argument("--channel", type=Path, required=True, help="the daemon's unix socket")
    parser.add_argument("--name", required=True, help="of this node in the cluster")
    parser.add_argument("--listen", required=True, help="HOST:PORT to serve on")
    parser.add_argument("--advertise", required=True, help="HOST:PORT that others reach it at")
    parser.add_argument("--weight", type=int, default=1, help="share of the blocks")
    parser.add_argument("--replicas", type=int, default=2, help="copies of a block")
    parser.add_argument("--members", default="", help="a static list, NAME=HOST:PORT,...")
    parser.add_argument("--etcd", default="", help="etcd's endpoints, with commas between")
    parser.add_argument("--etcd-user", help="where etcd asks for one")
    parser.add_argument("--etcd-password-file", type=Path, help="with the user's password")
    for name in ("ca", "cert", "key"):
        parser.add_argument(f"--etcd-{name}", type=Path, help="PEM file")
    parser.add_argument("--cluster", default="default", help="the cluster's name in etcd")
    parser.add_argument("--transfer", default="auto", help="shm, nixl, ucxx, grpc or auto")
    parser.add_argument("--repair-rate", type=int, default=256 << 20, help="bytes a second")
    parser.add_argument("--secret-file", type=Path, required=True, help="the cluster's secret")
    parser.add_argument("--data-dir", type=Path, required=True, help="where the ledger lies")
    parser.add_argument("--metrics-port", type=int, help="loopback port of Prometheus' metrics")
    for name in ("ca", "certificate", "key"):
        parser.add_argument(f"--tls-{name}", type=Path, help="PEM file")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    levels = ("debug", "info", "warning", "error")
    parser.add_argument("--log-level", choices=levels, default="info")
    parser.add_argument("--ready-fd", type=int, required=True, help="where to say: it serves")
    parser.add_argument("--lifeline-fd", type=int, required=True, help="ends this when it ends")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the process; its exit status: 2 where starting it again cannot help."""
    settle()
    options = parse(arguments)
    configure_logging(options.log_format, options.log_level)
    os.nice(_NICENESS)
    sys.setswitchinterval(_SWITCH_S)
    end = End(options.lifeline_fd)
    try:
        asyncio.run(_Process(options).serve(end))
    except InvalidArgument as error:
        log.error("node cannot serve", reason=str(error))
        return 2
    except (KVStoreError, OSError, RuntimeError) as error:
        log.error("node cannot serve", reason=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
