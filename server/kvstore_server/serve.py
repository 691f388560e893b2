"""The daemon's life: checks, memory, channel, gateway, banner, drain. It decides about no block."""

from __future__ import annotations

import contextlib
import os
import signal
import stat
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import structlog

from kvstore import __version__
from kvstore.channel.paths import grpc_socket
from kvstore.errors import InvalidArgument
from kvstore.host import Host, read_host
from kvstore.memory import HugePages
from kvstore.sizes import format_size
from kvstore.store import NvmePolicy
from kvstore_server.channel import ChannelServer, bind, raise_descriptor_limit
from kvstore_server.logs import configure_logging
from kvstore_server.loop import Loop
from kvstore_server.secrets_file import load_secret, load_shared_secret, load_token_path
from kvstore_server.settings import Settings
from kvstore_server.supervisor import Gateway, GatewayReady, NodeProcess, NodeReady
from kvstore_server.tenants import Tenants
from kvstore_server.turns import let_wakers_go_on

_ALL_BYTES = 1 << 40  # a second: more than any link carries
_ENDING = (signal.SIGTERM, signal.SIGINT)
# Some programs, timeout(1) among them, signal a process and then its group: that is one request.
_SAME_SIGNAL_S = 0.2
# How long a thread that is to begin a read or a write waits for the loop, which may be busy with
# many small commands, to hand the interpreter on; by default ten times that, longer than a write.
_SWITCH_S = 0.0005

log = structlog.get_logger()


def check_pool_fits(settings: Settings, host: Host) -> None:
    """`InvalidArgument` for a pool that the machine, or the process's cgroup, cannot hold.

    Asked before anything is made: too large a pool would start well and be killed when it fills.
    """
    reserved = host.huge_pages.free * host.huge_pages.page_bytes
    if settings.huge_pages is not HugePages.OFF and settings.dram <= reserved:
        return  # reserved huge pages are no part of the memory that is counted as available
    room = host.room
    if room and settings.dram > room.nbytes:
        raise InvalidArgument(
            "dram",
            f"a pool of {format_size(settings.dram)} does not fit into the"
            f" {format_size(room.nbytes)} of memory available ({room.bound_by}): lower dram",
        )


class EndingSignals:
    """SIGTERM and SIGINT as a descriptor that a loop can watch. A second one kills at once."""

    def __init__(self, now_s: Callable[[], float] = time.monotonic) -> None:
        self.fd, self._write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._now_s = now_s
        self._first_s: float | None = None
        self._previous = {number: signal.signal(number, self._note) for number in _ENDING}

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._first_s is None:
            self._first_s = self._now_s()
            os.write(self._write_fd, b"x")
        elif self._now_s() - self._first_s > _SAME_SIGNAL_S:
            # The kernel's own action needs no loop that still turns.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def close(self) -> None:
        """Puts the previous handlers back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        os.close(self.fd)
        os.close(self._write_fd)


class SocketFile:
    """The file of a unix socket, removed only while it is still the one that was seen."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int] | None = None

    def see(self) -> None:
        """Takes what lies there now for ours."""
        self._seen = self._identity()

    def remove(self) -> None:
        """Removes ours; a daemon started since then keeps its own."""
        if self._seen and self._seen == self._identity():
            self.path.unlink(missing_ok=True)

    def _identity(self) -> tuple[int, int] | None:
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        # Whatever else may lie at that path, a file or a folder, is nobody's to remove.
        return (found.st_dev, found.st_ino) if stat.S_ISSOCK(found.st_mode) else None


class _Daemon:
    """One run: what happens when the gateway has a say, and when a signal arrives."""

    def __init__(
        self,
        settings: Settings,
        tenants: Tenants,
        loop: Loop,
        channel: SocketFile,
        signals: EndingSignals,
    ) -> None:
        self._settings, self._tenants, self._loop = settings, tenants, loop
        self._channel, self._signals = channel, signals
        self._grpc = SocketFile(grpc_socket(settings.socket))
        self._banner_due = True
        self._gateway: Gateway | None = None
        self._node: NodeProcess | None = None
        self._gateway_said: GatewayReady | None = None
        self._waits_for = {part for part, on in self._parts() if on}

    def _parts(self) -> list[tuple[str, bool]]:
        """The processes beside this one."""
        return [("gateway", self._settings.grpc), ("node", self._settings.node_name is not None)]

    def start(self) -> None:
        """Queues the first work of the loop: the gateway, or at once the banner."""
        self._loop.watch(self._signals.fd, self.drain)
        if self._settings.grpc:
            command = gateway_command(self._settings, load_token_path(self._settings.data_dir))
            self._gateway = Gateway(self._loop, command, on_outcome=self._gateway_is)
            self._gateway.start()
        if self._settings.node_name is not None:
            command = node_command(self._settings)
            self._node = NodeProcess(self._loop, command, on_outcome=self._node_is)
            self._node.start()
        if not self._waits_for:
            self._loop.call_later(0.0, self._announce)

    def drain(self) -> None:
        """No new clients, then the gateway's end, then the loop's."""
        log.info("drains")
        self._loop.unwatch(self._signals.fd)
        self._channel.remove()  # who connects from here on is told at once that nobody is there
        running: list[Gateway | NodeProcess] = [p for p in (self._gateway, self._node) if p]
        left = len(running)

        def one_less() -> None:
            nonlocal left
            left -= 1
            if left <= 0:
                self._loop.stop()

        if self._gateway:
            self._grpc.see()
        for process in running:
            process.drain(one_less)
        if not running:
            self._loop.stop()

    def close(self) -> None:
        """Ends what still runs."""
        if self._gateway:
            self._gateway.close()
            self._grpc.remove()
        if self._node:
            self._node.close()

    def _gateway_is(self, gateway: GatewayReady | None) -> None:
        self._gateway_said = gateway
        self._heard_of("gateway")

    def _node_is(self, node: NodeReady | None) -> None:
        del node
        self._heard_of("node")

    def _heard_of(self, part: str) -> None:
        self._waits_for.discard(part)
        if not self._waits_for:
            self._announce()

    def _announce(self) -> None:
        """Prints the banner after the first outcome of each; later ones are in the log."""
        if self._banner_due:
            self._banner_due = False
            details = self._tenants.describe()
            print("\n".join(banner(self._settings, self._gateway_said, details)), flush=True)


def gateway_command(settings: Settings, token: Path) -> list[str]:
    """The gateway's command line, less the pipes that its supervisor adds."""
    # -P: the folder that the daemon happens to run in must not shadow a module.
    command = [sys.executable, "-P", "-m", "kvstore_server.gateway"]
    command += ["--channel", str(settings.socket), "--token-file", str(token)]
    command += ["--grpc-socket", str(grpc_socket(settings.socket))]
    if settings.grpc_port is not None:
        command += ["--grpc-port", str(settings.grpc_port)]
    return command


def node_command(settings: Settings) -> list[str]:
    """The node process's command line, less the pipes that its supervisor adds."""
    assert settings.node_name
    command = [sys.executable, "-P", "-m", "kvstore_server.cluster"]
    command += ["--channel", str(settings.socket), "--name", settings.node_name]
    command += ["--listen", settings.peer_listen, "--advertise", settings.advertised]
    command += ["--weight", str(settings.node_weight), "--replicas", str(settings.replicas)]
    command += ["--members", settings.members, "--etcd", settings.etcd]
    command += ["--cluster", settings.cluster, "--transfer", settings.transfer]
    command += ["--repair-rate", str(settings.repair_rate or _ALL_BYTES)]
    command += ["--secret-file", str(settings.shared_secret), "--data-dir", str(settings.data_dir)]
    command += ["--log-format", settings.log_format, "--log-level", settings.log_level]
    optional = {
        "--etcd-user": settings.etcd_user,
        "--etcd-password-file": settings.etcd_password_file,
        "--etcd-ca": settings.etcd_ca,
        "--etcd-cert": settings.etcd_cert,
        "--etcd-key": settings.etcd_key,
        "--tls-ca": settings.peer_tls_ca,
        "--tls-certificate": settings.peer_tls_certificate,
        "--tls-key": settings.peer_tls_key,
        "--metrics-port": settings.node_metrics_port,
    }
    for flag, value in optional.items():
        if value is not None:
            command += [flag, str(value)]
    return command


def banner(
    settings: Settings, gateway: GatewayReady | None, details: Sequence[str] = ()
) -> list[str]:
    """What a started daemon says; scripts wait for the last line, which begins with `  ready`."""
    pools = f" in {settings.tenants} pools" if settings.tenants > 1 else ""
    return [
        f"kvstore-server {__version__}",
        f"  socket    unix://{settings.socket}",
        f"  grpc      {_grpc_words(settings, gateway)}",
        f"  dram      {format_size(settings.dram)}{pools}, {settings.eviction} eviction",
        *(f"  nvme      {location}" for location in settings.nvme),
        f"  blocks    at most {settings.max_blocks_per_pool:,} a pool",
        f"  data      {settings.data_dir}",
        *_node_words(settings),
        *details,
        f"  ready     pid {os.getpid()}",
    ]


def _grpc_words(settings: Settings, gateway: GatewayReady | None) -> str:
    if not settings.grpc:
        return "off"
    if gateway is None:
        return "down: the gateway failed and is being tried again, see the log"
    words = f"grpc+unix://{gateway.grpc_socket}"
    if gateway.grpc_port is not None:
        words += f", grpc://127.0.0.1:{gateway.grpc_port} with the token in the data folder"
    return words


def _secret(settings: Settings) -> bytes:
    """What keys all chains: in a cluster the same at all nodes, else blocks would not be found."""
    if settings.cluster_secret is None:
        return load_secret(settings.data_dir)
    return load_shared_secret(settings.cluster_secret)


def _node_words(settings: Settings) -> list[str]:
    if settings.node_name is None:
        return []
    by = f"etcd, cluster {settings.cluster}" if settings.etcd else "a static list"
    where = f"{settings.node_name} at {settings.advertised}"
    return [f"  node      {where}, {settings.replicas} copies, members by {by}"]


def _make_tenants(settings: Settings, loop: Loop) -> Tenants:
    return Tenants(
        dram=settings.dram,
        max_blocks=settings.max_blocks_per_pool,
        eviction=settings.eviction,
        tenants=settings.tenants,
        trust=settings.trust,
        huge_pages=settings.huge_pages,
        numa_node=settings.numa_node,
        prefault=settings.prefault,
        secret=_secret(settings),
        version=__version__,
        nvme=settings.volumes,
        nvme_policy=NvmePolicy(
            every=settings.nvme_admission == "every",
            bytes_per_s=settings.nvme_write_rate,
            scrub_bytes_per_s=settings.nvme_scrub_rate,
        ),
        soon=loop.call_soon,
    )


def serve(settings: Settings) -> None:
    """Runs the daemon in this process until SIGTERM or SIGINT, then drains it.

    `InvalidArgument` where the machine cannot give what is asked, `Unavailable` beside another
    daemon, `OSError` for folders that cannot be written; all sockets are gone afterwards.
    """
    check_pool_fits(settings, read_host())
    configure_logging(settings.log_format, settings.log_level)
    raise_descriptor_limit()
    sys.setswitchinterval(_SWITCH_S)
    with contextlib.ExitStack() as stack:
        signals = EndingSignals()
        stack.callback(signals.close)
        listener = stack.enter_context(bind(settings.socket, for_all_users=settings.tenants > 1))
        channel = SocketFile(settings.socket)
        channel.see()
        stack.callback(channel.remove)
        loop = Loop()
        stack.callback(loop.close)
        tenants = _make_tenants(settings, loop)
        stack.callback(tenants.close)
        server = ChannelServer(loop, tenants, listener)
        stack.callback(server.close)
        daemon = _Daemon(settings, tenants, loop, channel, signals)
        stack.callback(daemon.close)
        daemon.start()
        let_wakers_go_on()
        loop.run()
