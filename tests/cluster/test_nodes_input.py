"""What nodes make of settings, neighbours and callers that are wrong."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from cluster.etcd_rig import Etcd, running_etcd
from cluster.nodes import LAYOUT, Nodes, blocks, chain, eventually, nodes
from cluster.test_coordination import (
    ask_for_passwords,
    certificates,
    change_password,
    password_file,
    tls_flags,
)

from daemon import Daemon
from kvstore import Hit, NamespaceHandle, Session
from kvstore.cluster import messages as m
from kvstore.errors import (
    InvalidArgument,
    KVStoreError,
    PermissionDenied,
    ProtocolError,
    StaleNamespace,
    Unavailable,
)
from kvstore_client.cluster.session import ClusterSession
from kvstore_proto.cluster.pipes import Streams
from kvstore_proto.cluster.rpc import Tls, client_token
from kvstore_proto.cluster.world import AsyncWorld

T = TypeVar("T")
SMALL: dict[str, Any] = {"transfer": "grpc", "arena_bytes": 1 << 20, "ring_bytes": 1 << 20}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    """One node, which goes on serving whatever it is asked."""
    with nodes(tmp_path_factory.mktemp("one"), 1, "--transfer", "grpc", replicas=1) as running:
        yield running
        with running.client(**SMALL) as session:
            assert_serves(session, seed=1)


def assert_serves(session: Session, seed: int) -> None:
    space = session.open_namespace(f"serves-{seed}", LAYOUT)
    keys, data = chain(2, seed), blocks(2, seed)
    assert session.put(space, keys, list(data), position=0).stored == 2
    found = [block.copy() for block in data * 0]
    assert all(isinstance(each, Hit) for each in session.get_into(space, keys, found))
    assert all((a == b).all() for a, b in zip(found, data, strict=True))


_WITHOUT_ETCD = """
import sys
sys.modules["aetcd"] = None
from kvstore_server.cluster.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("where", "said"),
    [("--etcd=http://127.0.0.1:1", "kvstore-llm[etcd]"), ("--members=b=127.0.0.1:2", "members")],
)
def test_only_a_cluster_with_etcd_needs_the_client_of_etcd(
    tmp_path: Path, where: str, said: str
) -> None:
    reads, writes = os.pipe()
    secret = tmp_path / "secret-file"
    secret.write_bytes(b"x" * 32)
    secret.chmod(0o600)
    flags = [f"--{name}={tmp_path / name}" for name in ("channel", "secret-file", "data-dir")]
    flags += ["--name=a", "--listen=127.0.0.1:1", "--advertise=127.0.0.1:1", where]
    flags += [f"--ready-fd={writes}", f"--lifeline-fd={reads}"]
    ended = subprocess.run(
        [sys.executable, "-c", _WITHOUT_ETCD, *flags],
        pass_fds=(reads, writes),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    for fd in (reads, writes):
        os.close(fd)
    assert ended.returncode == 2, ended.stderr
    assert said in ended.stdout + ended.stderr


def ask(running: Nodes, work: Callable[[AsyncWorld, str], Coroutine[Any, Any, T]]) -> T:
    """What a client that is none of ours gets from the first node."""

    async def go() -> T:
        async with world(client_token(running.secret)) as asking:
            return await work(asking, running.seeds[0])

    return asyncio.run(go())


@asynccontextmanager
async def world(token: str) -> AsyncIterator[AsyncWorld]:
    made = AsyncWorld(token=token, streams=Streams())
    try:
        yield made
    finally:
        await made.close()


def hello(**fields: Any) -> m.Hello:
    whole = {"version": m.MESSAGES_VERSION, "name": "", "kind": "grpc", "agent": b"", "epoch": 0}
    return m.Hello(**{**whole, **fields})


# -- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--members a=127.0.0.1:1,a=127.0.0.1:2", "two members have the name a"),
        ("--members a=127.0.0.1:1,b=127.0.0.1:1", "two members have the address 127.0.0.1:1"),
        ("--members a=127.0.0.1:1,b=127.0.0.1:2 --replicas 3", "3 replicas cannot be on 2 nodes"),
        ("--members b=127.0.0.1:2,c=127.0.0.1:3", "this node, a, is none of b, c"),
        (
            "--members a=127.0.0.1:7001,b=127.0.0.1:2 --peer-listen 127.0.0.1:7000",
            "this node is a at 127.0.0.1:7000, but the list says a at 127.0.0.1:7001",
        ),
        (
            "--members a=0.0.0.0:7000,b=127.0.0.1:2 --peer-listen 0.0.0.0:7000",
            "is open to other hosts: name peer_tls_ca",
        ),
    ],
)
def test_a_daemon_says_what_is_wrong_with_its_cluster(
    tmp_path: Path, flags: str, words: str
) -> None:
    daemon = Daemon(tmp_path, "--node-name", "a", *flags.split())
    try:
        daemon.wait_ready()
    except RuntimeError as error:
        assert words in str(error)  # noqa: PT017 - or it starts, see below
    else:  # it serves its host meanwhile
        eventually(lambda: any(words in line for line in daemon.log), 10.0, str(daemon.log))
    finally:
        daemon.end()


# -- callers ----------------------------------------------------------------------------------


def test_another_secret_s_token_is_refused_with_what_to_do(one: Nodes) -> None:
    with pytest.raises(PermissionDenied, match="cluster-token"):
        ClusterSession(one.seeds, token=client_token(b"x" * 32), **SMALL)


def test_a_client_may_not_speak_as_a_node(one: Nodes) -> None:
    async def work(asking: AsyncWorld, address: str) -> None:
        for message in (m.Learn(view=b""), m.AskGenerations()):
            with pytest.raises(PermissionDenied, match="for nodes alone"):
                await asking.call(address, message, 2000.0)

    ask(one, work)


def test_another_way_to_transfer_is_refused_with_both_names(one: Nodes) -> None:
    async def work(asking: AsyncWorld, address: str) -> None:
        with pytest.raises(InvalidArgument, match="transfers by grpc, the other side by carrier"):
            await asking.attach(address, hello(kind="carrier", agent=b"pigeon"), 2000.0)

    ask(one, work)


def test_another_version_is_refused_with_both_numbers(one: Nodes) -> None:
    async def work(asking: AsyncWorld, address: str) -> None:
        with pytest.raises(ProtocolError, match=r"speaks version 99 .* a speaks \d+: run the same"):
            await asking.attach(address, hello(version=99), 2000.0)

    ask(one, work)


def test_an_agent_s_description_of_no_known_form_is_refused(one: Nodes) -> None:
    async def work(asking: AsyncWorld, address: str) -> None:
        for agent in (b"x", os.urandom(64)):
            with pytest.raises(KVStoreError):
                await asking.attach(address, hello(agent=agent), 2000.0)

    ask(one, work)


def test_sessions_and_namespaces_of_another_life_are_refused(one: Nodes) -> None:
    async def work(asking: AsyncWorld, address: str) -> None:
        look = m.Look(epoch=1, namespace=12345, instance=1, hashes=chain(1, 1))
        with pytest.raises(StaleNamespace, match="open it again"):
            await asking.call(address, look, 2000.0)

    ask(one, work)


def test_garbage_at_the_port_harms_nobody(one: Nodes) -> None:
    port = one.ports["a"]
    for noise in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", port), 5.0) as connection:
            connection.sendall(noise)

    async def work() -> None:
        token = (("authorization", f"Bearer {client_token(one.secret)}"),)
        async with grpc.aio.insecure_channel(one.seeds[0]) as channel:
            calls: Any = channel.stream_stream("/kvstore.cluster.v1.Peer/Calls")
            calling = calls(metadata=token, timeout=2.0)
            for junk in (b"", b"\0", os.urandom(100), os.urandom(100_000)):
                await calling.write(bytes(8) + junk)
                assert (await calling.read())[8:]  # says what is wrong
            await calling.write(b"\0")  # of which nobody can tell what an answer would be to
            assert await calling.read() is grpc.aio.EOF
            stream: Any = channel.stream_stream("/kvstore.cluster.v1.Peer/Attach")
            for junk in (b"", b"\0", b"\0" + os.urandom(50), b"\1" + os.urandom(50), b"\7"):
                attached = stream(metadata=token, timeout=2.0)
                await attached.write(junk)
                attached.cancel()

    asyncio.run(work())
    with one.client(**SMALL) as session:
        assert_serves(session, seed=2)
    assert "Traceback" not in one.log("a")


# -- members ----------------------------------------------------------------------------------


def test_a_daemon_serves_its_host_until_etcd_is_there(tmp_path: Path, etcd: Etcd) -> None:
    etcd.stop()
    with nodes(tmp_path, 1, "--transfer", "grpc", etcd=etcd.endpoint, replicas=1) as running:
        assert_serves(running.local("a"), seed=3)
        with pytest.raises(Unavailable, match="no members' list yet"):
            running.client(**SMALL)
        with running.client(lazy=True, **SMALL) as session:
            etcd.start()
            eventually(lambda: opened(session), 20.0, running.log("a"))
            assert_serves(session, seed=4)


def opened(session: Session) -> NamespaceHandle:
    return session.open_namespace("x", LAYOUT)


def test_two_nodes_of_one_name_are_told_so_and_the_first_serves_on(
    tmp_path: Path, etcd: Etcd
) -> None:
    with nodes(tmp_path / "first", 1, "--transfer", "grpc", etcd=etcd.endpoint, replicas=1) as one:
        second = Nodes(tmp_path / "second", 1, "--transfer", "grpc", etcd=etcd.endpoint, replicas=1)
        try:
            second.start()
            eventually(lambda: "two nodes are called a" in second.log("a"), 20.0)
            assert_serves(second.local("a"), seed=5)
            with one.client(**SMALL) as session:
                assert_serves(session, seed=6)
        finally:
            second.end()


def test_more_copies_than_there_are_nodes_are_made_when_there_are_more(
    tmp_path: Path, etcd: Etcd
) -> None:
    data = list(blocks(2, 13))
    with (
        nodes(tmp_path, 2, "--transfer", "grpc", etcd=etcd.endpoint) as running,
        running.client(lazy=True, **SMALL) as session,
    ):
        space = eventually(lambda: opened(session), 10.0)
        put = lambda: session.put(space, chain(2, 13), data, position=0)  # noqa: E731
        eventually(lambda: put().replicated == 2, 20.0, "both are members")
        running.kill("b")
        eventually(lambda: "b" not in session.status(), 20.0, "b is out")
        alone = session.put(space, chain(2, 14), data, position=0)
        assert (alone.stored, alone.replicated) == (2, 0)
        running.start(["b"])
        eventually(lambda: running.fewest_copies("x", chain(2, 14)) == 2, 20.0, "repaired")
        eventually(lambda: put().replicated == 2, 20.0, "as many as are wanted")


def test_nodes_show_etcd_a_certificate_and_a_password_and_say_what_is_wrong(
    tmp_path: Path,
) -> None:
    files = certificates(tmp_path / "tls")
    password = password_file(tmp_path, "wrong")
    flags = ["--transfer", "grpc", "--cluster", "blue", "--etcd-ca", str(files["ca.pem"])]
    flags += ["--etcd-cert", str(files["node.pem"]), "--etcd-key", str(files["node.key"])]
    flags += ["--etcd-user", "node", "--etcd-password-file", str(password)]
    with running_etcd(tmp_path / "etcd", *tls_flags(files), scheme="https") as server:
        asyncio.run(ask_for_passwords(server, "blue", files))
        with nodes(tmp_path, 2, *flags, etcd=server.endpoint, replicas=2) as running:
            assert_serves(running.local("a"), seed=9)
            words = f"correct etcd_user, node, or the password in {password}"
            eventually(lambda: words in running.log("a"), 10.0, "it says what is wrong")
            password_file(tmp_path, "node's")
            with running.client(lazy=True, **SMALL) as session:
                space = eventually(lambda: opened(session), 20.0, "the next start finds etcd")

                def is_at_both(seed: int) -> bool:
                    keys, data = chain(2, seed), list(blocks(2, seed))
                    return session.put(space, keys, data, position=0).replicated == 2

                eventually(lambda: is_at_both(10), 20.0, running.log("b"))
                asyncio.run(change_password(server, "another", files))
                failing = "cannot be renewed"
                eventually(lambda: failing in running.log("a"), 10.0, "etcd refuses a")
                eventually(lambda: failing in running.log("b"), 10.0, "etcd refuses b")
                assert is_at_both(11)  # they go on under the view that they have
                password_file(tmp_path, "another")
                for name in running.names:
                    eventually(lambda name=name: "renewed again" in running.log(name), 10.0, name)
                # Under one more view, where a lease was lost meanwhile.
                eventually(lambda: is_at_both(12), 10.0, "both are asked again")


# -- TLS --------------------------------------------------------------------------------------


def test_nodes_and_clients_show_each_other_certificates(tmp_path: Path) -> None:
    files = certificates(tmp_path / "tls")
    flags = ["--transfer", "grpc", "--peer-tls-ca", str(files["ca.pem"])]
    flags += ["--peer-tls-certificate", str(files["server.pem"])]
    flags += ["--peer-tls-key", str(files["server.key"])]
    with nodes(tmp_path, 2, *flags, replicas=2) as running:
        own = Tls(ca=files["ca.pem"], certificate=files["node.pem"], key=files["node.key"])
        with running.client(tls=own, **SMALL) as session:
            space = eventually(lambda: opened(session), 10.0)
            done = session.put(space, chain(2, 7), list(blocks(2, 7)), position=0)
            assert done.replicated == 2
            assert_serves(session, seed=8)
        with pytest.raises(Unavailable):
            running.client(timeout_s=1.0, **SMALL)
        stranger = certificates(tmp_path / "other")
        other = Tls(ca=files["ca.pem"], certificate=stranger["node.pem"], key=stranger["node.key"])
        with pytest.raises(Unavailable):
            running.client(tls=other, timeout_s=1.0, **SMALL)
