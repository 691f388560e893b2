"""Real nodes for tests: daemons that are members of one cluster, on loopback ports of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
from cluster.proxies import Proxies

from benchmarks.networks import Network
from daemon import Daemon
from kvstore import Layout, Session
from kvstore.cluster import messages as m
from kvstore.commands import ExplainStatus
from kvstore.errors import KVStoreError
from kvstore_client import KVStoreClient
from kvstore_client.cluster.session import ClusterSession
from kvstore_proto.cluster.rpc import client_token

LAYOUT = Layout.opaque(model="cluster-test", block_tokens=16, block_bytes=64 << 10)
ETCD = "etcd"  # among those that can be cut off from each other
_END_S = 20.0
_WELL_S = 30.0
_LOOK_S = 0.02
_NODE = b"kvstore_server.cluster"
T = TypeVar("T")


def free_ports(n: int) -> list[int]:
    """Ports that nobody has now."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(n):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            found.append(sock.getsockname()[1])
        return found


def eventually(look: Callable[[], T], timeout_s: float, what: str | Callable[[], object] = "") -> T:
    """What `look` returns once that is true: other processes tell nobody when they are done. A
    `KVStoreError` counts as not yet. what: for the failure; called then."""
    end, pace, last = time.monotonic() + timeout_s, threading.Event(), ""
    while True:
        try:
            found = look()
        except KVStoreError as error:
            found, last = None, str(error)  # type: ignore[assignment]
        if found:
            return found
        if time.monotonic() >= end:
            said = what() if callable(what) else what
            raise AssertionError(f"not within {timeout_s} s: {said} {last}")
        pace.wait(_LOOK_S)


def all_well(session: ClusterSession) -> bool:
    """Whether every member answers and serves, and trusts all others."""
    return all(
        each and m.CODEC.decode_frame(each.pong).serving and not each.suspects
        for each in session.status().values()
    )


class Nodes:
    """Daemons named a, b, c, ... that share a secret.

    flags: of all of them; `{folder}` in one stands for the node's own folder. proxied: they
    advertise addresses of `proxies`, which can cut any two of them, or one from all
    clients or from `ETCD`, off from each other. network: where each node is a host of its
    name; on loopback without one.
    """

    def __init__(
        self,
        folder: Path,
        n: int,
        *flags: str,
        etcd: str = "",
        replicas: int = 2,
        proxied: bool = False,
        network: Network | None = None,
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.flags, self.replicas, self.etcd = folder, flags, replicas, etcd
        self.names = [chr(ord("a") + i) for i in range(n)]
        self.ports = dict(zip(self.names, free_ports(n), strict=True))
        self.secret = secrets.token_bytes(32)
        self.secret_file = folder / "secret"
        self.secret_file.write_bytes(self.secret)
        os.chmod(self.secret_file, 0o600)
        self.daemons: dict[str, Daemon] = {}
        self.proxies: Proxies | None = None
        if proxied:
            at = {ETCD: int(etcd.rpartition(":")[2])} if etcd else {}
            self.proxies = Proxies(self._node_pids, {**self.ports, **at})
            if etcd:
                self.etcd = f"http://127.0.0.1:{self.proxies.ports[ETCD]}"
        self.network = network
        self._sessions: dict[str, KVStoreClient] = {}
        self._paused: set[str] = set()

    @property
    def addresses(self) -> Mapping[str, str]:
        """Where nodes and clients reach each node, by name."""
        ports = self.proxies.ports if self.proxies else self.ports
        return {name: f"{self._host(name)}:{ports[name]}" for name in self.names}

    @property
    def seeds(self) -> list[str]:
        """Where clients find the nodes."""
        return list(self.addresses.values())

    def _host(self, name: str) -> str:
        return self.network.addresses[name] if self.network else "127.0.0.1"

    # -- their lives -------------------------------------------------------------------

    def start(self, names: Sequence[str] = ()) -> None:
        """Starts nodes that do not run, all or those of some names, and waits until they serve."""
        starting = [self.begin(name) for name in names or self.names]
        for daemon in starting:
            daemon.wait_ready()

    def wait_until_well(self) -> None:
        """Until all of them serve, and none suspects another one."""
        with self.client(
            lazy=True, transfer="grpc", arena_bytes=1 << 16, ring_bytes=1 << 16
        ) as one:
            eventually(lambda: all_well(one), _WELL_S, self._last_words)

    def _last_words(self) -> str:
        """What the daemons said last, for a failure."""
        said = [f"{name}: {line}" for name, d in self.daemons.items() for line in d.log[-5:]]
        return "\n".join(("all are well", *said))

    def begin(self, name: str, *flags: str) -> Daemon:
        """Starts a node, and does not wait. flags: in addition to those of all."""
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        members = ",".join(f"{name}={address}" for name, address in self.addresses.items())
        who = ["--etcd", self.etcd] if self.etcd else ["--members", members]
        if self.proxies:
            who += ["--peer-advertise", self.addresses[name]]
        if self.network:
            who += ["--peer-insecure"]
        if name in self.daemons:
            self.daemons[name].end()
        with self.network.inside(name) if self.network else contextlib.nullcontext():
            self.daemons[name] = Daemon(
                folder,
                *("--dram", "64MiB", "--node-name", name),
                *("--peer-listen", f"{self._host(name)}:{self.ports[name]}", *who),
                *("--replicas", str(self.replicas), "--cluster-secret", str(self.secret_file)),
                *(flag.format(folder=folder) for flag in (*self.flags, *flags)),
            )
        return self.daemons[name]

    def node_pid(self, name: str) -> int | None:
        """The process beside the daemon's core that speaks with other hosts; None while there is
        none."""
        return _child_of(self.daemons[name].process.pid)

    def kill(self, name: str) -> None:
        """Both processes of a node die, as with their host; returns when they have."""
        self._forget_session(name)
        node = self.node_pid(name)
        with contextlib.ExitStack() as stack:
            if node:
                ended = stack.enter_context(_pidfd(node))
            self.daemons[name].kill()
            if node:
                signal.pidfd_send_signal(ended, signal.SIGKILL)
                select.select([ended], [], [], _END_S)
        self._paused.discard(name)

    def kill_node_process(self, name: str) -> None:
        """The process beside the core dies alone; its supervisor starts another one."""
        node = self.node_pid(name)
        assert node
        with _pidfd(node) as ended:
            signal.pidfd_send_signal(ended, signal.SIGKILL)
            select.select([ended], [], [], _END_S)

    def pause(self, name: str, part: str = "both") -> None:
        """A node's processes (`core`, `node`, `both`) stop where they are: connections stay open,
        nothing is answered."""
        self._paused.add(name)
        self._signal(name, signal.SIGSTOP, part)

    def resume(self, name: str) -> None:
        """Ends a `pause`."""
        self._signal(name, signal.SIGCONT)
        self._paused.discard(name)

    def resume_all(self) -> None:
        """Ends every `pause`."""
        for name in list(self._paused):
            self.resume(name)

    def _signal(self, name: str, number: int, part: str = "both") -> None:
        pids = {"node": self.node_pid(name), "core": self.daemons[name].process.pid}
        for each, pid in pids.items():
            if pid and part in (each, "both"):
                os.kill(pid, number)

    def end(self) -> None:
        """Ends what still runs."""
        for name in list(self._sessions):
            self._forget_session(name)
        self.resume_all()
        for daemon in self.daemons.values():
            if daemon.process.poll() is None:
                daemon.process.terminate()
        for daemon in self.daemons.values():
            with contextlib.suppress(TimeoutError):
                daemon.process.wait(_END_S)
            daemon.end()
        if self.proxies:
            self.proxies.close()

    # -- to look at them ---------------------------------------------------------------

    def client(self, **options: object) -> ClusterSession:
        """A session with all of them."""
        token = client_token(self.secret)
        return ClusterSession(self.seeds, token=token, **options)  # type: ignore[arg-type]

    def local(self, name: str) -> Session:
        """A session with one node's own store, on its unix socket."""
        if name not in self._sessions:
            self._sessions[name] = KVStoreClient(self.daemons[name].target)
        return self._sessions[name]

    def holders(
        self, space: str, hashes: npt.NDArray[np.uint8], layout: Layout = LAYOUT
    ) -> dict[str, npt.NDArray[np.bool_]]:
        """Which of the blocks each living node has: bool (n,), by name."""
        found = {}
        for name, daemon in self.daemons.items():
            if daemon.process.poll() is None and name not in self._paused:
                store = self.local(name)
                reports = store.explain(store.open_namespace(space, layout), hashes)
                found[name] = np.array([r.status == ExplainStatus.STORED for r in reports])
        return found

    def fewest_copies(self, space: str, hashes: npt.NDArray[np.uint8]) -> int:
        """Of all these blocks, at how many living nodes the rarest is."""
        if not len(hashes):
            return len(self.names)
        return int(sum(here.astype(int) for here in self.holders(space, hashes).values()).min())

    def where(self, space: str, hashes: npt.NDArray[np.uint8]) -> str:
        """What each living node says of blocks, in words."""
        words = []
        for name, daemon in self.daemons.items():
            if daemon.process.poll() is None and name not in self._paused:
                with contextlib.suppress(KVStoreError), KVStoreClient(daemon.target) as store:
                    reports = store.explain(store.open_namespace(space, LAYOUT), hashes)
                    words.append(f"{name}: {', '.join(r.status.name for r in reports)}")
        return "; ".join(words)

    def log(self, name: str) -> str:
        """What a node has logged."""
        return "\n".join(self.daemons[name].log)

    def _forget_session(self, name: str) -> None:
        session = self._sessions.pop(name, None)
        if session:
            session.close()

    def _node_pids(self) -> dict[int, str]:
        pids = {}
        for name in list(self.daemons):
            pid = self.node_pid(name)
            if pid:
                pids[pid] = name
        return pids


@contextlib.contextmanager
def nodes(
    folder: Path,
    n: int,
    *flags: str,
    etcd: str = "",
    replicas: int = 2,
    proxied: bool = False,
    network: Network | None = None,
) -> Iterator[Nodes]:
    """Nodes that serve, for the length of a `with`."""
    found = Nodes(folder, n, *flags, etcd=etcd, replicas=replicas, proxied=proxied, network=network)
    try:
        found.start()
        yield found
    finally:
        found.end()


def blocks(n: int, seed: int, layout: Layout = LAYOUT) -> npt.NDArray[np.uint8]:
    """Random payloads, (n, block_bytes)."""
    return np.random.default_rng(seed).integers(0, 256, (n, layout.block_bytes), np.uint8)


def chain(n: int, seed: int) -> npt.NDArray[np.uint8]:
    """Random keys, (n, 32)."""
    return np.random.default_rng(seed).integers(0, 256, (n, 32), np.uint8)


@contextlib.contextmanager
def _pidfd(pid: int) -> Iterator[int]:
    fd = os.pidfd_open(pid)
    try:
        yield fd
    finally:
        os.close(fd)


def _child_of(parent: int) -> int | None:
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            stat = Path(f"/proc/{name}/stat").read_bytes()
            state, ppid = stat.rpartition(b")")[2].split()[:2]
            if int(ppid) != parent or state == b"Z":
                continue
            if _NODE in Path(f"/proc/{name}/cmdline").read_bytes().split(b"\0"):
                return int(name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return None
