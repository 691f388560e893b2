"""Look-ups over a stream that stays open: the same answers, deadlines and errors as calls have."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from gateway_rig import DEADLINE_S, LAYOUT, TOKEN, Served, dialled, opened, refused, until

from kvstore.errors import InvalidArgument, PermissionDenied, Unavailable
from kvstore.session.base import NamespaceHandle
from kvstore_client import looking
from kvstore_client.messages import MessageStream
from kvstore_client.remote import RemoteSession
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1.kvstore_pb2_grpc import KVStoreStub
from kvstore_server.service import MAX_LOOKING

KEYS = np.random.default_rng(5).integers(0, 256, (6, 32), np.uint8)
STORED = 4


class Client:
    """A session of which two look-ups were made, so that a stream is open, if one can be."""

    def __init__(self, served: Served) -> None:
        address = f"unix:{served.gateway.grpc_socket}"
        self.session = RemoteSession(address, token=None, timeout_s=DEADLINE_S)
        self.space: NamespaceHandle = self.session.open_namespace("test", LAYOUT)
        blocks = list(np.zeros((STORED, LAYOUT.block_bytes), np.uint8))
        self.session.put(self.space, KEYS[:STORED], blocks)
        assert self.found() == STORED
        assert self.found() == STORED

    @property
    def streams(self) -> bool:
        """Whether its next look-up is a message on a stream."""
        return self.session._looking._stream is not None

    def found(self, first: int = 0, **options: Any) -> int:
        """How many blocks a look-up from that key on finds."""
        return self.session.match(self.space, KEYS[first:], **options).count


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    made = Client(served)
    with made.session:
        yield made


def holding(
    served: Served, monkeypatch: pytest.MonkeyPatch, n: int = 1
) -> tuple[Any, threading.Event]:
    """The store's next n look-ups say that they have begun, and wait until they may go on."""
    real, begun, go_on = served.store.match, threading.Semaphore(0), threading.Event()
    those = iter(range(n))

    def held(*args: Any, **kwargs: Any) -> Any:
        if next(those, None) is not None:
            begun.release()
            go_on.wait(DEADLINE_S)
        return real(*args, **kwargs)

    monkeypatch.setattr(served.store, "match", held)
    return begun, go_on


def test_a_stream_answers_as_calls_do(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    assert client.streams
    monkeypatch.setattr(client.session._rpc, "call", None)  # none is made
    assert [client.found(first) for first in range(len(KEYS))] == [4, 3, 2, 1, 0, 0]
    assert client.streams


def test_one_look_up_opens_no_stream(served: Served) -> None:
    with RemoteSession(f"unix:{served.gateway.grpc_socket}", token=None, timeout_s=1.0) as session:
        space = session.open_namespace("test", LAYOUT)
        assert session.match(space, KEYS).count == 0
        assert session._looking._stream is None


def test_a_look_up_on_a_stream_has_a_deadline(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = holding(served, monkeypatch, 2)  # on the stream, and by the call after it
    try:
        assert client.found(timeout_s=0.05) == 0
        assert begun.acquire(timeout=DEADLINE_S)
        assert not client.streams
    finally:
        go_on.set()
    assert client.found() == STORED  # by a call
    monkeypatch.setattr(looking, "_PAUSE_S", 0.0)
    client.session._looking._not_before_s = 0.0
    until(lambda: client.found() == STORED and client.streams)


def test_another_threads_look_up_does_not_wait_for_the_stream(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = holding(served, monkeypatch)
    found: list[int] = []
    slow = threading.Thread(target=lambda: found.append(client.found()))
    slow.start()
    try:
        assert begun.acquire(timeout=DEADLINE_S)
        assert client.found(2) == STORED - 2
        assert not found
    finally:
        go_on.set()
        slow.join(DEADLINE_S)
    assert found == [STORED]


def test_more_sessions_than_there_are_streams_make_calls(served: Served) -> None:
    with contextlib.ExitStack() as stack:
        clients = [Client(served) for _ in range(MAX_LOOKING + 1)]
        for client in clients:
            stack.enter_context(client.session)
        assert [client.streams for client in clients] == [True] * MAX_LOOKING + [False]
        assert [client.found(1) for client in clients] == [STORED - 1] * len(clients)
        code, _ = refused(
            lambda: next(served.stub.Matches(iter([pb.MatchRequest()]), timeout=DEADLINE_S))
        )
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    with Client(served).session as session:  # theirs are free again
        until(lambda: session._looking._stream is not None)


def test_a_namespace_that_became_stale_is_opened_again(served: Served, client: Client) -> None:
    served.gateway._service._namespaces._handles.clear()
    assert client.found() == STORED


def test_a_look_up_that_was_broken_off_leaves_no_answer_to_the_next(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as now:
        now.setattr(MessageStream, "_receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            client.found()
    assert client.found(1) == STORED - 1


def test_a_stream_is_used_for_a_while_only(client: Client) -> None:
    first = client.session._looking._stream
    assert first is not None
    client.session._looking._until_s = 0.0
    assert client.found() == STORED
    assert client.session._looking._stream not in {None, first}


def test_a_gateway_that_drains_waits_for_no_stream(served: Served, client: Client) -> None:
    assert client.streams
    served.gateway.drain(3600.0)
    assert client.found(timeout_s=0.05) == 0


def test_closing_ends_the_stream(served: Served, client: Client) -> None:
    client.session.close()
    assert not client.streams
    assert client.found() == 0  # as always once closed: a store that is away
    client.session.close()


def test_closing_ends_a_look_up_under_way(
    served: Served, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, go_on = holding(served, monkeypatch)
    found: list[int] = []
    slow = threading.Thread(target=lambda: found.append(client.found()))
    slow.start()
    try:
        assert begun.acquire(timeout=DEADLINE_S)
        client.session.close()
        slow.join(DEADLINE_S)
        assert found == [0]
        assert not client.streams
    finally:
        go_on.set()


def test_a_forked_child_leaves_the_parents_stream_as_it_is(client: Client) -> None:
    child = os.fork()
    if not child:
        try:
            with pytest.raises(Unavailable):
                client.session._looking.ask(pb.MatchRequest(), 1.0)
            client.session._looking.close()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert not status
    assert client.found() == STORED
    assert client.streams


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_streams_over_tcp_bear_the_token(served: Served, host: str) -> None:
    """Only where no name has to be looked up, which may take longer than a deadline."""
    address = f"{host}:{served.gateway.grpc_port}"
    with RemoteSession(address, token=TOKEN, timeout_s=DEADLINE_S) as session:
        space = session.open_namespace("test", LAYOUT)
        assert [session.match(space, KEYS).count for _ in range(3)] == [0, 0, 0]
        assert (session._looking._stream is not None) is (host == "127.0.0.1")


def test_many_keys_are_looked_up_on_a_stream(client: Client) -> None:
    """More than the first window of HTTP/2 takes, there and back again."""
    keys = np.concatenate([KEYS[:STORED]] * 5_000)
    found = client.session.match(client.space, keys)
    assert found.count == len(keys)
    assert client.streams


def test_a_stream_needs_a_deadline(served: Served) -> None:
    code, error = refused(lambda: next(served.stub.Matches(iter([pb.MatchRequest()]))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(error, InvalidArgument)


def test_a_wrong_request_ends_the_stream_with_its_error(served: Served) -> None:
    good = pb.MatchRequest(namespace=opened(served.stub), keys=KEYS.tobytes())
    bad = pb.MatchRequest(namespace=good.namespace, keys=b"short")
    answers = served.stub.Matches(iter([good, bad, good]), timeout=DEADLINE_S)
    assert next(answers).count == 0
    code, error = refused(lambda: next(answers))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert isinstance(error, InvalidArgument)


def test_tcp_refuses_a_stream_without_the_token(served: Served) -> None:
    with dialled(served.tcp) as channel:
        answers = KVStoreStub(channel).Matches(iter([pb.MatchRequest()]), timeout=DEADLINE_S)
        code, error = refused(lambda: next(answers))
    assert code is grpc.StatusCode.UNAUTHENTICATED
    assert isinstance(error, PermissionDenied)
