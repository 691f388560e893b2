"""The gateway: the protocol over real sockets, who may call, what is refused, how it ends."""

from __future__ import annotations

import json
import os
import queue
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from gateway_rig import DEADLINE_S, LAYOUT, TOKEN, Served, dialled, opened, refused, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from kvstore import KVStore, Layout
from kvstore.errors import InvalidArgument, LayoutMismatch, PermissionDenied, StaleNamespace
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1.kvstore_pb2_grpc import KVStoreStub
from kvstore_proto.v1.translate import CHUNK_BYTES
from kvstore_server.gateway import MAX_CALLS
from kvstore_server.health import Canary
from kvstore_server.service import MAX_STREAMS


def random_bytes(n: int, nbytes: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng([n, nbytes, seed])
    return [rng.bytes(nbytes) for _ in range(n)]


def chunks(blocks: list[bytes]) -> Iterator[pb.PutRequest]:
    for i, block in enumerate(blocks):
        for at in range(0, len(block), CHUNK_BYTES):
            data = block[at : at + CHUNK_BYTES]
            yield pb.PutRequest(chunk=pb.PutChunk(block=i, offset=at, data=data))


def put(stub: KVStoreStub, header: pb.PutHeader, blocks: list[bytes]) -> pb.PutResponse:
    messages = [pb.PutRequest(header=header), *chunks(blocks)]
    return stub.Put(iter(messages), timeout=DEADLINE_S)


def get(stub: KVStoreStub, request: pb.GetRequest) -> tuple[list[bytes], pb.GetOutcome]:
    *parts, end = stub.Get(request, timeout=DEADLINE_S)
    blocks: dict[int, bytes] = {}
    for part in parts:
        so_far = blocks.get(part.chunk.block, b"")
        assert (len(so_far), len(part.chunk.data) <= CHUNK_BYTES) == (part.chunk.offset, True)
        blocks[part.chunk.block] = so_far + part.chunk.data
    assert list(blocks) == list(range(len(blocks)))
    return list(blocks.values()), end.outcome


# -- blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nbytes", [1, 4096, CHUNK_BYTES, 2 * CHUNK_BYTES + 7])
def test_blocks_come_back_as_they_were_put(served: Served, nbytes: int) -> None:
    layout = Layout.opaque(model="test", block_bytes=nbytes, block_tokens=16)
    namespace = opened(served.stub, layout)
    keys, blocks = b"".join(random_bytes(7, 32)), random_bytes(5, nbytes)
    answer = put(served.stub, pb.PutHeader(namespace=namespace, keys=keys[: 5 * 32]), blocks)
    assert (answer.stored, answer.not_stored) == (5, 0)
    got, outcome = get(served.stub, pb.GetRequest(namespace=namespace, keys=keys))
    assert got == blocks
    assert (outcome.hits, outcome.reason) == (5, pb.MISS_REASON_NOT_STORED)
    assert put(served.stub, pb.PutHeader(namespace=namespace, keys=keys[:32]), blocks[:1]).existed


def test_more_blocks_than_the_buffer_holds_arrive_in_order(served: Served) -> None:
    layout = Layout.opaque(model="test", block_bytes=3 << 20, block_tokens=16)
    namespace = opened(served.stub, layout)
    keys, blocks = b"".join(random_bytes(5, 32)), random_bytes(5, 3 << 20)
    header = pb.PutHeader(namespace=namespace, keys=keys, position=0, ttl_ms=60_000)
    assert put(served.stub, header, blocks).stored == 5
    got, outcome = get(served.stub, pb.GetRequest(namespace=namespace, keys=keys))
    assert (got, outcome.hits, outcome.reason) == (blocks, 5, pb.MISS_REASON_UNSPECIFIED)


def test_ranks_put_cells_and_any_part_is_got(served: Served) -> None:
    namespace = opened(served.stub)
    cut = [int(bound) for bound in LAYOUT.cell_bounds]
    keys, whole = b"".join(random_bytes(2, 32)), random_bytes(2, LAYOUT.block_bytes)
    header = pb.PutHeader(namespace=namespace, keys=keys, put_id=b"p" * 16, cells=[0])
    assert put(served.stub, header, [block[: cut[1]] for block in whole]).waiting == 2
    assert served.stub.Match(pb.MatchRequest(namespace=namespace, keys=keys)).count == 0
    header.cells[:] = [1, 2]
    assert put(served.stub, header, [block[cut[1] :] for block in whole]).stored == 2
    got, _ = get(served.stub, pb.GetRequest(namespace=namespace, keys=keys, cells=[1]))
    assert got == [block[cut[1] : cut[2]] for block in whole]


def test_ranks_may_put_at_the_same_time(served: Served) -> None:
    namespace = opened(served.stub)
    cut = [int(bound) for bound in LAYOUT.cell_bounds]
    keys, whole = b"".join(random_bytes(64, 32)), random_bytes(64, LAYOUT.block_bytes)

    def rank(cell: int) -> pb.PutResponse:
        header = pb.PutHeader(namespace=namespace, keys=keys, put_id=b"p" * 16, cells=[cell])
        return put(served.stub, header, [block[cut[cell] : cut[cell + 1]] for block in whole])

    answers: queue.SimpleQueue[pb.PutResponse] = queue.SimpleQueue()
    threads = [threading.Thread(target=lambda i=i: answers.put(rank(i))) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert sum(answers.get(timeout=1).stored for _ in threads) == 64
    assert get(served.stub, pb.GetRequest(namespace=namespace, keys=keys))[0] == whole


def test_a_cancelled_put_leaves_nothing_pending(served: Served) -> None:
    namespace, release = opened(served.stub), threading.Event()
    keys = b"".join(random_bytes(2, 32))

    def messages() -> Iterator[pb.PutRequest]:
        yield pb.PutRequest(header=pb.PutHeader(namespace=namespace, keys=keys))
        yield from chunks([bytes(LAYOUT.block_bytes)])
        release.wait(DEADLINE_S)

    calls = [served.stub.Put.future(messages(), timeout=DEADLINE_S) for _ in range(MAX_STREAMS)]

    def full() -> bool:
        with pytest.raises(grpc.RpcError) as caught:
            put(served.stub, pb.PutHeader(namespace=namespace, keys=b"short"), [])
        return caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

    until(full)  # all of them are being served, and no more are
    for call in calls:
        call.cancel()
    release.set()
    until(lambda: not full())
    assert served.store.stats().pending_blocks == 0
    assert served.stub.Match(pb.MatchRequest(namespace=namespace, keys=keys)).count == 0


# -- what is refused -------------------------------------------------------------------------


@pytest.mark.parametrize("keys", [b"", bytes(33), bytes(65_537 * 32)])
def test_a_wrong_number_of_keys_is_refused(served: Served, keys: bytes) -> None:
    stub, namespace = served.stub, opened(served.stub)
    hint = pb.BlockHint(kind=pb.HINT_KIND_SESSION_ENDS)
    calls: list[Callable[[], object]] = [
        lambda: stub.Match(pb.MatchRequest(namespace=namespace, keys=keys)),
        lambda: get(stub, pb.GetRequest(namespace=namespace, keys=keys)),
        lambda: put(stub, pb.PutHeader(namespace=namespace, keys=keys), []),
        lambda: stub.Drop(pb.DropRequest(namespace=namespace, keys=keys)),
        lambda: stub.Hint(pb.HintRequest(namespace=namespace, keys=keys, hint=hint)),
        lambda: stub.Explain(pb.ExplainRequest(namespace=namespace, keys=keys)),
    ]
    for call in calls:
        code, error = refused(call)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert isinstance(error, InvalidArgument)
        assert error.field == "keys"


def test_65536_keys_are_taken(served: Served) -> None:
    namespace, keys = opened(served.stub), bytes(65_536 * 32)
    assert served.stub.Match(pb.MatchRequest(namespace=namespace, keys=keys)).count == 0
    explained = served.stub.Explain(pb.ExplainRequest(namespace=namespace, keys=keys))
    assert len(explained.statuses) == 65_536


@pytest.mark.parametrize(
    ("field", "header", "sent"),
    [
        ("put_id", {"put_id": b"short"}, [0]),
        ("parent", {"parent": b"short"}, [0]),
        ("cells", {"cells": [3]}, [0]),
        ("cells", {"cells": [0, 0]}, [0]),
        ("hint.kind", {"hint": pb.BlockHint(kind=9)}, [0]),
        ("ttl_s", {"ttl_ms": 1 << 60}, [0]),
        ("chunk.block", {}, [1]),
        ("chunk", {}, []),
    ],
)
def test_a_wrong_put_is_refused_by_name(
    served: Served, field: str, header: dict[str, Any], sent: list[int]
) -> None:
    namespace, keys = opened(served.stub), bytes(32)
    message = pb.PutHeader(namespace=namespace, keys=keys, **header)
    messages = [pb.PutRequest(header=message)]
    data = bytes(LAYOUT.block_bytes)
    messages += [pb.PutRequest(chunk=pb.PutChunk(block=i, data=data)) for i in sent]
    code, error = refused(lambda: served.stub.Put(iter(messages), timeout=DEADLINE_S))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(error, InvalidArgument)
    assert error.field == field
    assert served.stub.Match(pb.MatchRequest(namespace=namespace, keys=keys)).count == 0


def test_an_oversized_chunk_is_refused(served: Served) -> None:
    layout = Layout.opaque(model="test", block_bytes=2 * CHUNK_BYTES, block_tokens=16)
    header = pb.PutHeader(namespace=opened(served.stub, layout), keys=bytes(32))
    chunk = pb.PutChunk(data=bytes(CHUNK_BYTES + 1))
    messages = [pb.PutRequest(header=header), pb.PutRequest(chunk=chunk)]
    code, error = refused(lambda: served.stub.Put(iter(messages), timeout=DEADLINE_S))
    assert (code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "chunk.data")  # type: ignore[attr-defined]


@pytest.mark.parametrize("n_headers", [0, 2])
def test_a_put_has_one_header_and_it_comes_first(served: Served, n_headers: int) -> None:
    header = pb.PutRequest(header=pb.PutHeader(namespace=opened(served.stub), keys=bytes(32)))
    messages = [header] * n_headers + list(chunks([bytes(LAYOUT.block_bytes)]))
    code, _ = refused(lambda: served.stub.Put(iter(messages), timeout=DEADLINE_S))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_an_unknown_namespace_is_stale(served: Served) -> None:
    known = opened(served.stub)
    for wrong in (
        pb.NamespaceId(number=known.number + 1, instance=known.instance),
        pb.NamespaceId(number=known.number, instance=known.instance + 1),
        None,
    ):
        request = pb.MatchRequest(namespace=wrong, keys=bytes(32))
        code, error = refused(lambda request=request: served.stub.Match(request))
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert isinstance(error, StaleNamespace)


def test_gets_and_puts_need_a_deadline_of_at_most_an_hour(served: Served) -> None:
    namespace = opened(served.stub)
    request = pb.GetRequest(namespace=namespace, keys=bytes(32))
    for timeout_s in (None, 4000.0):
        code, error = refused(lambda s=timeout_s: list(served.stub.Get(request, timeout=s)))
        assert (code, error.field) == (grpc.StatusCode.INVALID_ARGUMENT, "deadline")  # type: ignore[attr-defined]


def test_cells_of_a_get_must_be_of_the_layout(served: Served) -> None:
    request = pb.GetRequest(namespace=opened(served.stub), keys=bytes(32), cells=[3])
    assert isinstance(refused(lambda: get(served.stub, request))[1], LayoutMismatch)


def test_a_message_over_the_limit_is_refused(served: Served) -> None:
    request = pb.MatchRequest(namespace=opened(served.stub), keys=bytes(6 << 20))
    with dialled(f"unix:{served.gateway.grpc_socket}") as channel:
        code, _ = refused(lambda: KVStoreStub(channel).Match(request))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


# -- who may call ----------------------------------------------------------------------------


def test_the_unix_socket_is_the_owners_alone(served: Served) -> None:
    assert stat.S_IMODE(served.gateway.grpc_socket.stat().st_mode) == 0o600
    path = str(served.gateway.grpc_socket)
    assert served.ready == {"grpc_socket": path, "grpc_port": served.gateway.grpc_port}


@pytest.mark.parametrize(
    "value", [None, "", TOKEN, f"bearer {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}"]
)
def test_tcp_refuses_who_has_no_token(served: Served, value: str | None) -> None:
    metadata = (("authorization", value),) if value is not None else ()
    with dialled(served.tcp) as channel:
        stub = KVStoreStub(channel)
        health = health_pb2_grpc.HealthStub(channel)
        header = pb.PutRequest(header=pb.PutHeader(keys=bytes(32)))
        request = pb.GetRequest(keys=bytes(32))
        calls: list[Callable[[], object]] = [
            lambda: stub.Stats(pb.StatsRequest(), metadata=metadata),
            lambda: list(stub.Get(request, metadata=metadata, timeout=DEADLINE_S)),
            lambda: stub.Put(iter([header]), metadata=metadata, timeout=DEADLINE_S),
            lambda: health.Check(health_pb2.HealthCheckRequest(), metadata=metadata),
        ]
        for call in calls:
            code, error = refused(call)
            assert code is grpc.StatusCode.UNAUTHENTICATED
            assert isinstance(error, PermissionDenied)


def test_tcp_serves_who_has_the_token(served: Served) -> None:
    with dialled(served.tcp) as channel:
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        info = KVStoreStub(channel).Info(pb.InfoRequest(), metadata=metadata)
    assert info.instance == served.store.info().instance


def test_reflection_lists_the_service(served: Served) -> None:
    database = ProtoReflectionDescriptorDatabase(served.channel)
    assert "kvstore.v1.KVStore" in database.get_services()
    assert "grpc.health.v1.Health" in database.get_services()


def test_calls_past_the_limit_are_refused(served: Served) -> None:
    served.store.open.clear()
    try:
        calls = [
            served.stub.Stats.future(pb.StatsRequest(), timeout=DEADLINE_S)
            for _ in range(MAX_CALLS)
        ]
        served.store.waits.acquire(timeout=DEADLINE_S)  # the first of them is at the store
        code, _ = refused(lambda: served.stub.Stats(pb.StatsRequest(), timeout=DEADLINE_S))
    finally:
        served.store.open.set()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert all(call.result().blocks == 0 for call in calls)


# -- health ----------------------------------------------------------------------------------


@pytest.mark.parametrize("service", ["", "kvstore.v1.KVStore"])
def test_health_follows_the_store(served: Served, service: str) -> None:
    health = health_pb2_grpc.HealthStub(served.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=service), timeout=DEADLINE_S)
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    served.store.away = True
    assert refused(lambda: served.stub.Stats(pb.StatsRequest()))[0] is grpc.StatusCode.UNAVAILABLE
    assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
    served.store.away = False
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


# -- the process -----------------------------------------------------------------------------

# The daemon's place is taken by a store of the gateway's own.
PROCESS = """
import sys
from kvstore_server import gateway
from kvstore import KVStore
gateway.ChannelSession = lambda path, **options: KVStore(dram=32 << 20)
sys.exit(gateway.main())
"""


class Process:
    """A gateway process as the supervisor starts it."""

    def __init__(self, folder: Path) -> None:
        token = folder / "token"
        token.write_text(TOKEN + "\n")
        self.socket = folder / "g.sock"
        ready_fd, ready_write = os.pipe()
        lifeline_read, self.lifeline = os.pipe()
        flags = ["--channel", "/none", "--grpc-socket", str(self.socket), "--grpc-port", "0"]
        flags += ["--token-file", str(token), "--ready-fd", str(ready_write)]
        flags += ["--lifeline-fd", str(lifeline_read)]
        self._log = (folder / "log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, *flags],
            pass_fds=(ready_write, lifeline_read),
            stdout=self._log,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        os.close(ready_write)
        os.close(lifeline_read)
        with os.fdopen(ready_fd) as pipe:
            self.line = pipe.read()  # to its end: the gateway closes the pipe

    def cut(self) -> None:
        """Ends the lifeline."""
        if self.lifeline >= 0:
            os.close(self.lifeline)
            self.lifeline = -1

    def end(self) -> None:
        self.cut()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(DEADLINE_S)
        self._log.close()


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    started = Process(tmp_path)
    try:
        yield started
    finally:
        started.end()


def test_the_process_says_once_that_it_is_ready(process: Process) -> None:
    ready = json.loads(process.line)
    assert process.line.count("\n") == 1
    assert ready["grpc_socket"] == str(process.socket)
    with dialled(f"127.0.0.1:{ready['grpc_port']}") as channel:
        metadata = (("authorization", f"Bearer {TOKEN}"),)
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), metadata=metadata
        )
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_the_process_ends_with_the_core(process: Process) -> None:
    process.cut()
    assert process.process.wait(DEADLINE_S) == 0
    assert not process.socket.exists()


def test_a_call_under_way_ends_before_the_process_does(process: Process) -> None:
    more: queue.SimpleQueue[pb.PutRequest | None] = queue.SimpleQueue()
    with dialled(f"unix:{process.socket}") as channel:
        stub = KVStoreStub(channel)
        namespace, keys = opened(stub), b"".join(random_bytes(1, 32))
        more.put(pb.PutRequest(header=pb.PutHeader(namespace=namespace, keys=keys)))
        call = stub.Put.future(iter(more.get, None), timeout=DEADLINE_S)
        health = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
        until(lambda: in_use(stub, namespace))
        process.process.send_signal(signal.SIGTERM)
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        more.put(next(chunks([bytes(LAYOUT.block_bytes)])))
        more.put(None)
        assert call.result(DEADLINE_S).stored == 1
    assert process.process.wait(DEADLINE_S) == 0


def in_use(stub: KVStoreStub, namespace: pb.NamespaceId) -> bool:
    """Whether the gateway has begun to serve the put before this one."""
    del stub, namespace
    return True


def test_a_gateway_without_a_daemon_fails_at_once(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text(TOKEN)
    lifeline_read, lifeline = os.pipe()
    command = [sys.executable, "-m", "kvstore_server.gateway", "--channel", str(tmp_path / "none")]
    command += ["--grpc-socket", str(tmp_path / "g.sock"), "--token-file", str(token)]
    command += ["--ready-fd", "2", "--lifeline-fd", str(lifeline_read)]
    try:
        done = subprocess.run(
            command,
            pass_fds=(lifeline_read,),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=DEADLINE_S,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    finally:
        os.close(lifeline_read)
        os.close(lifeline)
    assert done.returncode == 1
    assert b"gateway cannot serve" in done.stdout
    assert not (tmp_path / "g.sock").exists()


# -- the canary ------------------------------------------------------------------------------


def test_the_canary_takes_a_slot_among_the_blocks_that_are_there() -> None:
    """A slab of its own would evict everything in another."""
    with KVStore(dram=4 << 20) as store:
        layout = Layout.opaque(model="test", block_bytes=60_000, block_tokens=16)
        namespace = store.open_namespace("test", layout)
        hashes = np.random.default_rng(0).integers(0, 256, (200, 32), np.uint8)
        for i in range(200):
            store.put(namespace, hashes[i : i + 1], [np.zeros(60_000, np.uint8)])
        evicted = store.stats().evicted
        assert evicted > 0
        for _ in range(3):
            Canary(store).check()
        assert store.stats().evicted <= evicted + 1


def test_a_store_full_of_blocks_in_use_serves() -> None:
    with KVStore(dram=1 << 20) as store:
        namespace = store.open_namespace("test", LAYOUT)
        blocks = [np.zeros(LAYOUT.block_bytes, np.uint8)] * 16
        views = []
        for seed in range(40):
            hashes = np.random.default_rng(seed).integers(0, 256, (16, 32), np.uint8)
            store.put(namespace, hashes, blocks)
            views.append(store.view(namespace, hashes))
        assert store.stats().refused > 0
        Canary(store).check()
        for view in views:
            view.release()
