"""A client of another user: it reaches nothing that is not its own, and can write nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from daemon import daemon
from kvstore import Layout
from kvstore_client import KVStoreClient

NOBODY = 65534
LAYOUT = Layout.opaque(model="users", block_bytes=3840, block_tokens=16)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")

# Runs as the other user. Everything that it is not allowed must fail, or it says so and exits 1.
INTRUDER = """
import fcntl, mmap, os, sys
import numpy as np
from kvstore import Layout
from kvstore.channel.port import ChannelPort
from kvstore.errors import PermissionDenied
from kvstore_client import KVStoreClient
target, grpc_target, known = sys.argv[1:]
hashes = np.random.default_rng(1).integers(0, 256, (4, 32), np.uint8)
layout = Layout.opaque(model="users", block_bytes=3840, block_tokens=16)

port = ChannelPort(target.removeprefix("unix://"), 5.0)
assert not port.welcome.writable
for name, fd in zip(("pool", "generations", "index"), port.fds):
    size = os.fstat(fd).st_size
    def write_at(fd=fd): os.pwrite(fd, b"x", 0)
    def map_to_write(fd=fd): mmap.mmap(fd, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    def open_to_write(fd=fd): os.pwrite(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), b"x", 0)
    def cut(fd=fd): os.ftruncate(fd, 0)
    def punch(fd=fd):
        import ctypes
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(fd, 3, ctypes.c_long(0), ctypes.c_long(4096)):
            raise OSError(ctypes.get_errno(), "fallocate")
    for attack in (write_at, map_to_write, open_to_write, cut, punch):
        try:
            attack()
        except OSError:
            continue
        sys.exit(f"{attack.__name__} of the {name} went through")
port.close()

with KVStoreClient(target) as client:
    namespace = client.open_namespace("shared name", layout)
    if namespace.key.hex() == known:
        sys.exit("the chain key is the other user's")
    if client.match(namespace, hashes).count:
        sys.exit("the other user's blocks can be found")
    if any(name.blocks for name in client.info().namespaces):
        sys.exit("the other user's blocks can be counted")
    mine = [np.full(3840, 7, np.uint8)] * 4
    assert client.put(namespace, hashes, mine).stored == 4
    got = np.zeros(3840, np.uint8)
    client.get_into(namespace, hashes[:1], [got])
    assert (got == 7).all()
try:
    KVStoreClient(grpc_target, timeout_s=1.0).stats()
except Exception as error:
    print(type(error).__name__)
else:
    sys.exit("the gateway serves the other user")
"""


# The interpreter may lie where only its owner can reach it, so what is needed is imported first.
# A process that changes its user loses its hold on /proc/self; it gets that back (PR_SET_DUMPABLE).
BECOME = """
import ctypes, fcntl, mmap, os, sys
import numpy, numpy.random, grpc, kvstore_client.remote, kvstore_client.targets
from kvstore_client import KVStoreClient
os.setgroups([])
os.setgid({uid})
os.setuid({uid})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
"""


def as_user(uid: int, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code as a user without rights."""
    return subprocess.run(
        [sys.executable, "-c", BECOME.format(uid=uid) + code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that others may enter: pytest's own are private."""
    for parent in (tmp_path, *tmp_path.parents):
        if parent.owner() == "root" and parent.is_relative_to("/tmp/"):
            parent.chmod(0o755)
    return tmp_path


def test_another_user_has_a_pool_of_its_own_and_nothing_else(folder: Path) -> None:
    with (
        daemon(folder, "--dram", "8MiB", "--tenants", "2", grpc=True) as running,
        KVStoreClient(running.target) as client,
    ):
        namespace = client.open_namespace("shared name", LAYOUT)
        hashes = np.random.default_rng(1).integers(0, 256, (4, 32), np.uint8)
        owned = [np.full(3840, 1, np.uint8)] * 4
        assert client.put(namespace, hashes, owned).stored == 4
        grpc_target = f"grpc+unix://{running.grpc_socket}"
        done = as_user(NOBODY, INTRUDER, running.target, grpc_target, namespace.key.hex())
        assert done.returncode == 0, done.stderr
        got = np.zeros(3840, np.uint8)
        for at in range(4):
            client.get_into(namespace, hashes[at : at + 1], [got])
            assert (got == 1).all()
        assert [n.blocks for n in client.info().namespaces if n.name == "shared name"] == [4]
        assert (running.data_dir / "chain.key").stat().st_mode & 0o777 == 0o600


def test_another_user_is_refused_with_a_reason_where_there_is_one_pool(folder: Path) -> None:
    code = "KVStoreClient(sys.argv[1])"
    with daemon(folder, "--dram", "8MiB") as running:
        done = as_user(NOBODY, code, running.target)
        assert "PermissionDenied" in done.stderr
        assert "may not connect" in done.stderr


def test_a_user_without_a_pool_left_is_refused_with_a_reason(folder: Path) -> None:
    with daemon(folder, "--dram", "8MiB", "--tenants", "2") as running:
        outcomes = [
            as_user(uid, "KVStoreClient(sys.argv[1])", running.target)
            for uid in (NOBODY, NOBODY - 1)
        ]
        assert outcomes[0].returncode == 0, outcomes[0].stderr
        assert "ResourceExhausted" in outcomes[1].stderr
        assert "tenants" in outcomes[1].stderr
