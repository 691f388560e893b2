"""How a cluster agrees on its members: what holds for every way, and what faults of etcd do."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import grpc
import pytest
from aetcd import rpc
from cluster.etcd_rig import Etcd, free_port, running_etcd

from kvstore import limits
from kvstore.cluster.coordination import Coordination
from kvstore.cluster.members import Member, MemberState, View, encode_member, encode_view
from kvstore.errors import (
    InvalidArgument,
    KVStoreError,
    PermissionDenied,
    ProtocolError,
    ResourceExhausted,
    Unavailable,
)
from kvstore_server.coordination.etcd import EtcdCoordination
from kvstore_server.coordination.etcd_client import Access, EtcdClient, Lease
from kvstore_server.coordination.static import StaticCoordination

T = TypeVar("T")
_LONG_S = 20.0  # more than anything here takes, and less than waiting for a person
_clusters = itertools.count()

A = Member(name="a", address="10.0.0.1:7000", run=1)
B = Member(name="b", address="10.0.0.2:7000", run=2, weight=3)
C = Member(name="c", address="10.0.0.3:7000", run=3)


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 2 * _LONG_S))


@pytest.fixture
def cluster() -> str:
    return f"test-{next(_clusters)}"


@contextlib.asynccontextmanager
async def nodes(server: Etcd, cluster: str, *, n: int = 1, ttl_s: int = 1, timeout_s: float = 2.0):
    """The coordination of n nodes, each as in a process of its own."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for _ in range(n):
            each = EtcdCoordination(
                [server.endpoint], cluster, lease_ttl_s=ttl_s, timeout_s=timeout_s
            )
            stack.push_async_callback(each.close)
            made.append(each)
        yield made


@contextlib.asynccontextmanager
async def raw(server: Etcd) -> AsyncIterator[EtcdClient]:
    client = EtcdClient([server.endpoint], access=Access(), timeout_s=2.0)
    try:
        yield client
    finally:
        await client.close()


async def until(
    node: Coordination, holds: Callable[[], Awaitable[bool]], *, unreachable: bool = False
) -> None:
    """Looks at each change, and ten times a second. unreachable: etcd may be, for a while."""
    async with asyncio.timeout(_LONG_S):
        while True:
            try:
                if await holds():
                    return
            except Unavailable:
                if not unreachable:
                    raise
            await node.changed(0.1)


def names_are(node: Coordination, *names: str) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return tuple(member.name for member in await node.registered()) == names

    return look


def member_is(node: Coordination, member: Member) -> Callable[[], Awaitable[bool]]:
    async def look() -> bool:
        return await node.registered() == [member]

    return look


async def watching(node: Coordination) -> None:
    """Until the node hears of changes, and has heard of all before."""
    if isinstance(node, EtcdCoordination):
        await node.changed(_LONG_S)


async def seconds(work: Awaitable[object]) -> float:
    now = asyncio.get_running_loop().time
    began = now()
    await work
    return now() - began


async def fails(error: type[KVStoreError], work: Awaitable[object], within_s: float) -> None:
    async def failing() -> None:
        with pytest.raises(error):
            await work

    assert await seconds(failing()) < within_s


# -- every way ------------------------------------------------------------------------------------


@pytest.fixture(params=["static", "etcd"])
def way(request: pytest.FixtureRequest, cluster: str) -> Callable[[], Coordination]:
    """Makes the coordination of node `a` in a cluster of a, b and c, whose view is at epoch 1."""
    if request.param == "static":
        return lambda: StaticCoordination([A, B, C], 2, "a")
    server = request.getfixturevalue("shared_etcd")
    return lambda: EtcdCoordination([server.endpoint], cluster)


@contextlib.asynccontextmanager
async def begun(way: Callable[[], Coordination]) -> AsyncIterator[Coordination]:
    node = way()
    try:
        await node.register(A)
        await node.advance(View(epoch=1, replicas=2, members=(A, B, C)))
        yield node
    finally:
        await node.close()


def test_a_node_that_registered_is_registered(way: Callable[[], Coordination]) -> None:
    async def go() -> None:
        async with begun(way) as node:
            assert A in await node.registered()

    run(go())


def test_the_view_is_the_one_that_was_agreed(way: Callable[[], Coordination]) -> None:
    async def go() -> None:
        async with begun(way) as node:
            assert await node.view() == View(epoch=1, replicas=2, members=(A, B, C))

    run(go())


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_only_the_next_epoch_can_follow(way: Callable[[], Coordination], epoch: int) -> None:
    async def go() -> None:
        async with begun(way) as node:
            before = await node.view()
            assert not await node.advance(View(epoch=epoch, replicas=1, members=(A,)))
            assert await node.view() == before

    run(go())


def test_waiting_for_a_change_ends_in_time(way: Callable[[], Coordination]) -> None:
    async def go() -> None:
        async with begun(way) as node:
            await watching(node)
            assert 0.2 <= await seconds(node.changed(0.2)) < 2.0

    run(go())


def test_close_ends_what_waits_and_can_be_called_again(way: Callable[[], Coordination]) -> None:
    async def go() -> None:
        async with begun(way) as node:
            await watching(node)
            waiting = asyncio.create_task(node.changed(_LONG_S))
            await asyncio.sleep(0)
            await node.close()
            assert await seconds(waiting) < 2.0
            await node.close()

    run(go())


def test_nothing_is_waited_for_once_closed(way: Callable[[], Coordination]) -> None:
    async def go() -> None:
        async with begun(way) as node:
            await node.close()
            with pytest.raises(Unavailable):
                await node.changed(_LONG_S)

    run(go())


# -- a given list ---------------------------------------------------------------------------------


def test_who_is_not_in_the_list_is_told_so() -> None:
    with pytest.raises(InvalidArgument, match="this node, d, is none of a, b"):
        StaticCoordination([A, B], 1, "d")


@pytest.mark.parametrize("member", [B, Member(name="a", address="10.0.0.9:7000")])
def test_who_is_otherwise_than_in_the_list_is_told_so(member: Member) -> None:
    with pytest.raises(InvalidArgument, match=r"but the list says a at 10\.0\.0\.1:7000"):
        run(StaticCoordination([A, B], 1, "a").register(member))


# -- registrations --------------------------------------------------------------------------------


def test_each_node_sees_all_that_are_registered(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with nodes(shared_etcd, cluster, n=3) as (a, b, c):
            await asyncio.gather(c.register(C), a.register(A), b.register(B))
            for node in (a, b, c):
                assert await node.registered() == [A, B, C]

    run(go())


def test_clusters_do_not_see_each_other(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with (
            nodes(shared_etcd, cluster) as (a,),
            nodes(shared_etcd, f"{cluster}-more") as (b,),
        ):
            await a.register(A)
            assert await b.registered() == []
            assert await b.advance(View(epoch=1, replicas=1, members=(B,)))
            assert await a.view() is None

    run(go())


def test_a_node_may_say_anew_what_it_is(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with nodes(shared_etcd, cluster) as (a,):
            await a.register(A)
            drains = Member(name="a", address=A.address, run=1, state=MemberState.DRAINING)
            await a.register(drains)
            assert await a.registered() == [drains]

    run(go())


def test_a_node_stays_registered_for_longer_than_its_lease(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with nodes(shared_etcd, cluster, n=2) as (a, b):
            await a.register(A)
            await watching(b)
            assert await seconds(b.changed(2.2)) >= 2.2
            assert await b.registered() == [A]

    run(go())


def test_a_node_that_says_nothing_any_more_is_gone_and_its_going_is_told(
    shared_etcd: Etcd, cluster: str
) -> None:
    async def go() -> None:
        async with raw(shared_etcd) as silent, nodes(shared_etcd, cluster) as (b,):
            lease = await silent.grant(1)
            key = f"/kvstore/{cluster}/members/a"
            assert await silent.put_if(key, encode_member(A), revision=0, lease=lease.id)
            assert await b.registered() == [A]
            await watching(b)
            assert await seconds(b.changed(_LONG_S)) < 5.0
            assert await b.registered() == []

    run(go())


def test_a_name_is_free_at_once_after_close(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with nodes(shared_etcd, cluster, n=2, ttl_s=60) as (a, again):
            await a.register(A)
            await a.close()
            await again.register(Member(name="a", address=A.address, run=9))

    run(go())


def test_after_a_crash_the_name_is_waited_for(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with raw(shared_etcd) as crashed, nodes(shared_etcd, cluster, n=1) as (a,):
            lease = await crashed.grant(1)
            key = f"/kvstore/{cluster}/members/a"
            earlier = Member(name="a", address=A.address, run=7)
            await crashed.put_if(key, encode_member(earlier), revision=0, lease=lease.id)
            assert 0.5 < await seconds(a.register(A)) < 5.0
            assert await a.registered() == [A]

    run(go())


def test_two_living_nodes_cannot_have_one_name(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with nodes(shared_etcd, cluster, n=2) as (a, other):
            await a.register(A)
            with pytest.raises(InvalidArgument, match=r"two nodes are called a: .* another at"):
                await other.register(Member(name="a", address="10.0.0.9:7000", run=9))
            assert await a.registered() == [A]

    run(go())


def test_of_two_nodes_that_want_one_name_at_once_one_gets_it(
    shared_etcd: Etcd, cluster: str
) -> None:
    async def go() -> None:
        async with nodes(shared_etcd, cluster, n=2) as both:
            same = [Member(name="a", address=f"10.0.0.{i}:7000", run=i) for i in (1, 2)]
            done = await asyncio.gather(
                *(node.register(me) for node, me in zip(both, same, strict=True)),
                return_exceptions=True,
            )
            assert sorted(map(type, done), key=str) == [type(None), InvalidArgument]
            winner = same[done.index(None)]
            assert await both[0].registered() == [winner]

    run(go())


def test_a_name_that_no_lease_will_free_is_not_waited_for(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with raw(shared_etcd) as hand, nodes(shared_etcd, cluster) as (a,):
            other = Member(name="a", address=A.address, run=9)
            key = f"/kvstore/{cluster}/members/a"
            await hand.put_if(key, encode_member(other), revision=0)
            await fails(InvalidArgument, a.register(A), 1.0)

    run(go())


# -- the view -------------------------------------------------------------------------------------


def test_before_the_first_view_there_is_none(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with nodes(shared_etcd, cluster) as (a,):
            assert await a.view() is None
            assert not await a.advance(View(epoch=2, replicas=1, members=(A,)))
            with pytest.raises(InvalidArgument, match="the first is 1"):
                await a.advance(View(epoch=0, replicas=1, members=(A,)))
            assert await a.view() is None
            assert await a.advance(View(epoch=1, replicas=1, members=(A,)))

    run(go())


@pytest.mark.parametrize("n", [2, 8])
def test_of_those_that_advance_at_once_exactly_one_does(
    shared_etcd: Etcd, cluster: str, n: int
) -> None:
    async def go() -> None:
        async with nodes(shared_etcd, cluster, n=n) as all_of_them:
            for epoch in range(1, 13):
                views = [
                    View(epoch=epoch, replicas=1, members=(Member(name=f"n{i}", address="h:1"),))
                    for i in range(n)
                ]
                done = await asyncio.gather(
                    *(node.advance(view) for node, view in zip(all_of_them, views, strict=True))
                )
                assert done.count(True) == 1
                assert await all_of_them[0].view() == views[done.index(True)]

    run(go())


def test_what_another_release_wrote_is_named(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with raw(shared_etcd) as other, nodes(shared_etcd, cluster) as (a,):
            root = f"/kvstore/{cluster}"
            view = encode_view(View(epoch=1, replicas=1, members=(A,)))
            newer = view.replace(b'"version":1', b'"version":2')
            await other.put_if(f"{root}/view", newer, revision=0)
            with pytest.raises(ProtocolError, match=f"{root}/view: a view of version 2"):
                await a.view()
            with pytest.raises(ProtocolError, match=f"{root}/view"):
                await a.advance(View(epoch=2, replicas=1, members=(A,)))
            await other.put_if(f"{root}/members/a", b"{", revision=0)
            with pytest.raises(ProtocolError, match=f"{root}/members/a: malformed member"):
                await a.registered()
            with pytest.raises(ProtocolError, match=f"{root}/members/a"):
                await a.register(A)

    run(go())


def test_a_registration_under_the_name_of_another_is_named(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with raw(shared_etcd) as hand, nodes(shared_etcd, cluster) as (a,):
            key = f"/kvstore/{cluster}/members/a"
            await hand.put_if(key, encode_member(B), revision=0)
            with pytest.raises(ProtocolError, match=f"{key} is about b"):
                await a.registered()

    run(go())


def test_more_registrations_than_a_cluster_may_have_are_an_error(
    shared_etcd: Etcd, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_MEMBERS", 2)

    async def go() -> None:
        async with nodes(shared_etcd, cluster, n=3) as (a, b, c):
            await asyncio.gather(a.register(A), b.register(B))
            assert len(await a.registered()) == 2
            await c.register(C)
            with pytest.raises(ResourceExhausted, match="more than 2 keys"):
                await a.registered()

    run(go())


# -- changes --------------------------------------------------------------------------------------


def test_each_change_wakes_who_waits(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with nodes(shared_etcd, cluster, n=2) as (a, b):
            await watching(b)
            changes: list[Callable[[], Awaitable[object]]] = [
                lambda: a.register(A),
                lambda: a.advance(View(epoch=1, replicas=1, members=(A,))),
                a.close,
            ]
            for change in changes:
                waiting = asyncio.create_task(b.changed(_LONG_S))
                await change()
                assert await seconds(waiting) < 5.0

    run(go())


def test_a_change_before_the_wait_is_not_lost(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with nodes(shared_etcd, cluster, n=2) as (a, b):
            await watching(b)
            first, second = (asyncio.create_task(b.changed(_LONG_S)) for _ in range(2))
            await a.register(A)
            await asyncio.gather(first, second)  # both were waiting for it
            await a.advance(View(epoch=1, replicas=1, members=(A,)))
            assert await seconds(b.changed(_LONG_S)) < 5.0

    run(go())


# -- etcd's faults --------------------------------------------------------------------------------


def test_where_etcd_never_was_each_call_fails_at_once(cluster: str) -> None:
    async def go() -> None:
        node = EtcdCoordination([f"http://127.0.0.1:{free_port()}"], cluster)
        try:
            await fails(Unavailable, node.register(A), 1.5)
            await fails(Unavailable, node.registered(), 1.5)
            await fails(Unavailable, node.view(), 1.5)
            await fails(Unavailable, node.advance(View(epoch=1, replicas=1, members=(A,))), 1.5)
            assert 0.3 <= await seconds(node.changed(0.3)) < 1.5
        finally:
            assert await seconds(node.close()) < 1.5

    run(go())


def test_after_a_restart_of_etcd_all_is_as_before(etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        async with nodes(etcd, cluster, n=2, timeout_s=0.5) as (a, b):
            view = View(epoch=1, replicas=1, members=(A,))
            await a.register(A)
            await a.advance(view)
            await watching(b)
            etcd.kill()
            await fails(Unavailable, b.view(), 1.5)
            assert await seconds(b.changed(0.3)) >= 0.3
            etcd.start()
            await b.changed(_LONG_S)  # the new watch
            await until(b, names_are(b, "a"), unreachable=True)
            assert await b.view() == view
            assert await seconds(b.changed(1.6)) >= 1.6  # it goes on being renewed
            assert await b.registered() == [A]

    run(go())


def test_a_paused_etcd_is_unavailable_in_time_and_used_again_after(
    etcd: Etcd, cluster: str
) -> None:
    async def go() -> None:
        async with nodes(etcd, cluster, timeout_s=0.4) as (a,):
            await a.register(A)
            await watching(a)
            etcd.pause()
            view = View(epoch=1, replicas=1, members=(A,))
            for call in (a.registered(), a.view(), a.advance(view), a.register(A)):
                await fails(Unavailable, call, 1.0)
            assert await seconds(a.changed(0.3)) < 1.0
            etcd.resume()
            await until(a, names_are(a, "a"), unreachable=True)
            assert await a.advance(
                (await a.view() or View(epoch=0, replicas=1, members=())).without()
            )

    run(go())


def test_what_was_paused_for_longer_than_a_lease_registers_again(etcd: Etcd, cluster: str) -> None:
    """A new etcd that knows nothing stands for any way in which a lease is lost."""

    async def go() -> None:
        async with nodes(etcd, cluster, n=2, timeout_s=0.5) as (a, b):
            await a.register(A)
            etcd.kill()
            shutil.rmtree(etcd.folder / "data")
            etcd.start()
            await until(b, names_are(b, "a"), unreachable=True)

    run(go())


def test_a_node_whose_name_was_taken_meanwhile_waits_for_it(
    shared_etcd: Etcd, cluster: str
) -> None:
    async def go() -> None:
        other = Member(name="a", address="10.0.0.9:7000", run=9)
        async with nodes(shared_etcd, cluster, n=2) as (a, b), raw(shared_etcd) as hand:
            await a.register(A)
            lease, taken = await hand.grant(2), False
            key = f"/kvstore/{cluster}/members/a"
            while not taken:  # it may register again in the moment between
                there = await hand.get(key)
                if there:
                    await hand.revoke(Lease(there.lease, 1))
                taken = await hand.put_if(key, encode_member(other), revision=0, lease=lease.id)
            await until(b, member_is(b, A))
            assert await hand.left_s(lease.id) == 0

    run(go())


def test_a_watch_that_cannot_begin_is_not_tried_without_pause(
    cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0
    watch = EtcdClient.watch

    def counted(self: EtcdClient, prefix: str) -> Any:
        nonlocal tries
        tries += 1
        return watch(self, prefix)

    monkeypatch.setattr(EtcdClient, "watch", counted)

    async def go() -> None:
        node = EtcdCoordination([f"http://127.0.0.1:{free_port()}"], cluster)
        try:
            await node.changed(1.2)
        finally:
            await node.close()

    run(go())
    assert 2 <= tries <= 5  # pauses of 0.1, 0.2, 0.4 and 0.8 s


@contextlib.contextmanager
def silent_endpoint():
    """Connections to it are taken by the system, and nobody ever answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_of_several_endpoints_one_that_answers_is_enough(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        with silent_endpoint() as silent:
            dead = f"http://127.0.0.1:{free_port()}"
            node = EtcdCoordination([dead, silent, shared_etcd.endpoint], cluster, timeout_s=1.0)
            try:
                # Half a second for the silent one, once: who answered is asked first from then on.
                assert await seconds(node.register(A)) < 1.2
                assert await seconds(node.registered()) < 0.4
                await watching(node)
            finally:
                await node.close()

    run(go())


class Relay:
    """A way to etcd on which, once `deaf`, requests still arrive and answers do not."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.deaf = False
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _connect(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        far, there = await asyncio.open_connection("127.0.0.1", self._port)
        for source, target, answers in ((near, there, False), (far, back, True)):
            self._tasks.add(asyncio.create_task(self._carry(source, target, answers)))

    async def _carry(
        self, source: asyncio.StreamReader, target: asyncio.StreamWriter, answers: bool
    ) -> None:
        with contextlib.closing(target):
            while data := await source.read(1 << 16):
                if not (answers and self.deaf):
                    target.write(data)


@pytest.mark.parametrize("other", [None, b"other"])
def test_a_change_whose_answer_was_lost_is_known_to_be_made(
    shared_etcd: Etcd, cluster: str, other: bytes | None
) -> None:
    """other: what somebody else set the key to before."""

    async def go() -> None:
        relay = Relay(shared_etcd.port)
        async with relay.serving() as lossy, raw(shared_etcd) as somebody:
            endpoints = [lossy, shared_etcd.endpoint]
            client = EtcdClient(endpoints, access=Access(), timeout_s=1.0)
            key = f"/kvstore/{cluster}/view"
            assert await client.get(key) is None
            if other:
                assert await somebody.put_if(key, other, revision=0)
            relay.deaf = True
            assert await client.put_if(key, b"ours", revision=0) == (other is None)
            there = await somebody.get(key)
            assert there
            assert there.value == (other or b"ours")
            await client.close()

    run(go())


def test_a_name_is_kept_while_a_member_of_etcd_is_silent(shared_etcd: Etcd, cluster: str) -> None:
    async def go() -> None:
        with silent_endpoint() as silent:
            endpoints = [shared_etcd.endpoint, silent]
            node = EtcdCoordination(endpoints, cluster, lease_ttl_s=1, timeout_s=1.0)
            try:
                await node.register(A)
                await watching(node)
                assert await seconds(node.changed(2.2)) >= 2.2
            finally:
                await node.close()

    run(go())


# -- getting in -----------------------------------------------------------------------------------


def certificates(folder: Path) -> dict[str, Path]:
    """An authority, and what it signed for 127.0.0.1 and for a node."""
    folder.mkdir()

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words], cwd=folder, check=True, capture_output=True)

    new = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2")
    openssl("req", "-x509", *new, "-subj", "/CN=ca", "-keyout", "ca.key", "-out", "ca.pem")
    extensions = {"server": "subjectAltName=IP:127.0.0.1", "node": "extendedKeyUsage=clientAuth"}
    for name, extension in extensions.items():
        (folder / "extensions").write_text(extension)
        subject = ("-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl("req", *new, *subject)
        signed = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
        out = ("-extfile", "extensions", "-out", f"{name}.pem")
        openssl("x509", "-req", "-in", f"{name}.csr", *signed, *out)
    return {path.name: path for path in folder.iterdir()}


def tls_flags(files: dict[str, Path]) -> list[str]:
    """Of an etcd that shows a certificate and asks for one."""
    flags = ["--client-cert-auth", "--trusted-ca-file", str(files["ca.pem"])]
    return [*flags, "--cert-file", str(files["server.pem"]), "--key-file", str(files["server.key"])]


def test_tls_with_certificates_on_both_sides(tmp_path: Path, cluster: str) -> None:
    files = certificates(tmp_path / "tls")
    flags = tls_flags(files)
    full = Access(ca=files["ca.pem"], cert=files["node.pem"], key=files["node.key"])
    others = {
        "see etcd_cert": Access(ca=files["ca.pem"]),
        "in etcd_ca": Access(cert=files["node.pem"], key=files["node.key"]),
    }

    async def go(server: Etcd) -> None:
        node = EtcdCoordination([server.endpoint], cluster, access=full)
        await node.register(A)
        assert await node.registered() == [A]
        await watching(node)
        await node.close()
        for words, access in others.items():
            node = EtcdCoordination([server.endpoint], cluster, access=access, timeout_s=0.5)
            with pytest.raises(Unavailable, match=words):
                await node.registered()
            await node.close()

    with running_etcd(tmp_path / "etcd", *flags, scheme="https") as server:
        run(go(server))


@contextlib.asynccontextmanager
async def administering(
    server: Etcd, files: dict[str, Path] | None = None
) -> AsyncIterator[rpc.AuthStub]:
    """What users and roles are changed by. files: of `certificates`, where it asks for those."""
    address = server.endpoint.rpartition("/")[2]
    if files:
        read = [files[name].read_bytes() for name in ("ca.pem", "node.key", "node.pem")]
        credentials = grpc.ssl_channel_credentials(*read)
        channel = grpc.aio.secure_channel(address, credentials)
    else:
        channel = grpc.aio.insecure_channel(address)
    async with channel:
        yield rpc.AuthStub(channel)


async def ask_for_passwords(
    server: Etcd, cluster: str, files: dict[str, Path] | None = None
) -> None:
    """From now on: `node` may read and write what is the cluster's, `guest` nothing."""
    async with administering(server, files) as auth:
        await auth.UserAdd(rpc.AuthUserAddRequest(name="root", password="secret"))
        await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="root", role="root"))
        for name in ("node", "guest"):
            await auth.UserAdd(rpc.AuthUserAddRequest(name=name, password=f"{name}'s"))
        await auth.RoleAdd(rpc.AuthRoleAddRequest(name="member"))
        begin = f"/kvstore/{cluster}/"
        both = rpc.Permission(
            permType=rpc.Permission.READWRITE,
            key=begin.encode(),
            range_end=f"/kvstore/{cluster}0".encode(),  # what comes after the last slash
        )
        await auth.RoleGrantPermission(rpc.AuthRoleGrantPermissionRequest(name="member", perm=both))
        await auth.UserGrantRole(rpc.AuthUserGrantRoleRequest(user="node", role="member"))
        await auth.AuthEnable(rpc.AuthEnableRequest())


async def change_password(
    server: Etcd, password: str, files: dict[str, Path] | None = None
) -> None:
    """From now on `node` has this one."""
    async with administering(server, files) as auth:
        root = rpc.AuthenticateRequest(name="root", password="secret")
        token = (await auth.Authenticate(root)).token
        change = rpc.AuthUserChangePasswordRequest(name="node", password=password)
        await auth.UserChangePassword(change, metadata=(("token", token),))


def password_file(folder: Path, password: str) -> Path:
    path = folder / "password"
    path.write_text(f"{password}\n")
    path.chmod(0o600)
    return path


def test_a_user_needs_what_is_the_cluster_s_alone(etcd: Etcd, cluster: str, tmp_path: Path) -> None:
    async def go() -> None:
        await ask_for_passwords(etcd, cluster)
        access = Access(user="node", password_file=password_file(tmp_path, "node's"))
        assert "node's" not in repr(access)
        node = EtcdCoordination([etcd.endpoint], cluster, access=access, lease_ttl_s=1)
        try:
            await node.register(A)
            await watching(node)
            etcd.stop()
            etcd.start()  # and has forgotten the tokens that it gave
            await until(node, names_are(node, "a"), unreachable=True)
            assert await node.advance(View(epoch=1, replicas=1, members=(A,)))
            assert await seconds(node.changed(_LONG_S)) < 5.0
        finally:
            await node.close()

    run(go())


def test_whom_etcd_does_not_let_in_is_told_what_to_set(
    etcd: Etcd, cluster: str, tmp_path: Path
) -> None:
    async def refused(user: str | None, password: str, error: type[KVStoreError]) -> str:
        path = password_file(tmp_path, password)
        access = Access(user=user, password_file=path) if user else Access()
        node = EtcdCoordination([etcd.endpoint], cluster, access=access)
        try:
            with pytest.raises(error) as caught:
                await node.register(A)
            await node.changed(0.2)
            return str(caught.value)
        finally:
            await node.close()

    async def go() -> None:
        assert "or name no user" in await refused("node", "x", InvalidArgument)
        await ask_for_passwords(etcd, cluster)
        assert "set etcd_user and etcd_password_file" in await refused(None, "x", PermissionDenied)
        for user in ("node", "nobody"):
            words = await refused(user, "wrong", PermissionDenied)
            assert f"correct etcd_user, {user}, or the password in {tmp_path}" in words
            assert "wrong" not in words
        words = await refused("guest", "guest's", PermissionDenied)
        assert "grant this node's user readwrite" in words

    run(go())


def test_a_password_may_change_while_nodes_run(etcd: Etcd, cluster: str, tmp_path: Path) -> None:
    async def go() -> None:
        await ask_for_passwords(etcd, cluster)
        access = Access(user="node", password_file=password_file(tmp_path, "node's"))
        node = EtcdCoordination([etcd.endpoint], cluster, access=access, lease_ttl_s=1)
        try:
            await node.register(A)
            await change_password(etcd, "another")
            with pytest.raises(PermissionDenied, match="correct etcd_user"):
                await node.registered()
            (tmp_path / "password").unlink()
            with pytest.raises(PermissionDenied, match="No such file"):
                await node.registered()
            password_file(tmp_path, "another")
            await until(node, names_are(node, "a"))
        finally:
            await node.close()

    run(go())


@pytest.mark.parametrize(
    ("endpoints", "words"),
    [
        ([], "at least one"),
        (["10.0.0.1:2379"], "is not http://HOST:PORT"),
        (["http://10.0.0.1:port"], "is not http://HOST:PORT"),
        (["http://u:hidden@10.0.0.1:99999"], "'10.0.0.1:99999' is not"),
        (["http://10.0.0.1:2379/v3"], "is not http://HOST:PORT"),
        (["http://10.0.0.1:2379", "https://10.0.0.2:2379"], "some endpoints"),
    ],
)
def test_endpoints_that_are_none(endpoints: list[str], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        EtcdCoordination(endpoints, "c")
    assert "hidden" not in str(caught.value)


def test_settings_that_cannot_be() -> None:
    endpoints = ["http://127.0.0.1"]
    with pytest.raises(InvalidArgument, match="cluster"):
        EtcdCoordination(endpoints, "a/b")
    with pytest.raises(InvalidArgument, match="lease_ttl_s"):
        EtcdCoordination(endpoints, "a", lease_ttl_s=0)
    with pytest.raises(InvalidArgument, match="for endpoints with https"):
        EtcdCoordination(endpoints, "a", access=Access(ca=Path("/nowhere")))
    with pytest.raises(InvalidArgument, match="/nowhere: No such file"):
        EtcdCoordination(["https://h"], "a", access=Access(ca=Path("/nowhere")))
    with pytest.raises(InvalidArgument, match="go together"):
        Access(cert=Path("cert"))
    with pytest.raises(InvalidArgument, match="go together"):
        Access(user="root")


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (None, 0o600, "cannot be read: No such file"),
        (b"x", 0o604, "chmod 600"),
        (b"\n", 0o600, "is empty"),
        (b"\xff", 0o600, "no text in UTF-8"),
    ],
)
def test_a_password_file_that_is_none_is_named_before_etcd_is_asked(
    tmp_path: Path, content: bytes | None, mode: int, words: str
) -> None:
    path = tmp_path / "password"
    if content is not None:
        path.write_bytes(content)
        path.chmod(mode)
    access = Access(user="node", password_file=path)
    with pytest.raises(InvalidArgument, match=words) as caught:
        EtcdCoordination(["http://h"], "c", access=access)
    assert str(path) in str(caught.value)
