"""Real nodes for tests: daemons that are members of one cluster, on loopback ports of their own."""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from daemon import Daemon
from kvstore import Layout
from kvstore_client.cluster.session import ClusterSession
from kvstore_proto.cluster.rpc import client_token

LAYOUT = Layout.opaque(model="cluster-test", block_tokens=16, block_bytes=64 << 10)


def free_ports(n: int) -> list[int]:
    """Ports that nobody has now."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(n):
            sock = stack.enter_context(socket.socket())
            sock.bind(("127.0.0.1", 0))
            found.append(sock.getsockname()[1])
        return found


class Nodes:
    """Daemons named a, b, c, ... that share a secret."""

    def __init__(
        self, folder: Path, n: int, *flags: str, etcd: str = "", replicas: int = 2
    ) -> None:
        self.folder, self.flags, self.replicas, self.etcd = folder, flags, replicas, etcd
        self.names = [chr(ord("a") + i) for i in range(n)]
        self.ports = dict(zip(self.names, free_ports(n), strict=True))
        self.secret = secrets.token_bytes(32)
        self.secret_file = folder / "secret"
        self.secret_file.write_bytes(self.secret)
        os.chmod(self.secret_file, 0o600)
        self.daemons: dict[str, Daemon] = {}

    @property
    def seeds(self) -> list[str]:
        """Where clients find the nodes."""
        return [f"127.0.0.1:{port}" for port in self.ports.values()]

    def start(self, names: Sequence[str] = ()) -> None:
        """Starts nodes that do not run, all or those of some names, and waits until they serve."""
        starting = [self._begin(name) for name in names or self.names]
        for daemon in starting:
            daemon.wait_ready()

    def _begin(self, name: str) -> Daemon:
        folder = self.folder / name
        folder.mkdir(exist_ok=True)
        members = ",".join(f"{n}=127.0.0.1:{port}" for n, port in self.ports.items())
        who = ["--etcd", self.etcd] if self.etcd else ["--members", members]
        self.daemons[name] = Daemon(
            folder,
            *("--dram", "64MiB", "--node-name", name),
            *("--peer-listen", f"127.0.0.1:{self.ports[name]}", *who),
            *("--replicas", str(self.replicas), "--cluster-secret", str(self.secret_file)),
            *self.flags,
        )
        return self.daemons[name]

    def client(self, **options: object) -> ClusterSession:
        """A session with all of them."""
        token = client_token(self.secret)
        return ClusterSession(self.seeds, token=token, **options)  # type: ignore[arg-type]

    def end(self) -> None:
        """Ends what still runs."""
        for daemon in self.daemons.values():
            if daemon.process.poll() is None:
                daemon.process.terminate()
        for daemon in self.daemons.values():
            daemon.end()


@contextlib.contextmanager
def nodes(folder: Path, n: int, *flags: str, etcd: str = "", replicas: int = 2) -> Iterator[Nodes]:
    """Nodes that serve, for the length of a `with`."""
    found = Nodes(folder, n, *flags, etcd=etcd, replicas=replicas)
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
