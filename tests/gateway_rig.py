"""A gateway in the test's own process, and how tests talk to it."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from kvstore import Attention, KVStore, Layout
from kvstore.errors import KVStoreError, Unavailable
from kvstore_proto.v1 import kvstore_pb2 as pb
from kvstore_proto.v1.kvstore_pb2_grpc import KVStoreStub
from kvstore_proto.v1.status import error_of
from kvstore_proto.v1.translate import MESSAGE_OPTIONS
from kvstore_server.gateway import Gateway

TOKEN = "correct-horse-battery"
DEADLINE_S = 20.0
LAYOUT = Layout(
    model="test",
    attention=Attention.GQA,
    layers=1,
    kv_heads=3,
    head_dim=16,
    dtype="float32",
    block_tokens=16,
)


class Breakable(KVStore):
    """A store that can be away, and whose counters can be shut for a while."""

    away = False

    def __init__(self, *, dram: int) -> None:
        super().__init__(dram=dram)
        self.open, self.waits = threading.Event(), threading.Semaphore(0)
        self.open.set()

    def put(self, *args: Any, **kwargs: Any) -> Any:
        if self.away:
            raise Unavailable("away, for the test")
        return super().put(*args, **kwargs)

    def stats(self, *args: Any, **kwargs: Any) -> Any:
        if self.away:
            raise Unavailable("away, for the test")
        self.waits.release()
        self.open.wait(DEADLINE_S)
        return super().stats(*args, **kwargs)


@dataclass(frozen=True)
class Served:
    """A gateway in this process, and a channel to its unix socket."""

    store: Breakable
    gateway: Gateway
    channel: grpc.Channel
    ready: dict[str, Any]

    @property
    def stub(self) -> KVStoreStub:
        return KVStoreStub(self.channel)

    @property
    def tcp(self) -> str:
        return f"127.0.0.1:{self.gateway.grpc_port}"


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Served]:
    """A gateway whose sockets lie in a folder."""
    with contextlib.ExitStack() as stack:
        store = Breakable(dram=32 << 20)
        stack.callback(store.close)
        ready_fd, write_fd = os.pipe()
        path = folder / "g.sock"
        gateway = Gateway(store, grpc_socket=path, grpc_port=0, token=TOKEN, ready_fd=write_fd)
        stack.callback(gateway.drain, 0)
        gateway.start()
        with os.fdopen(ready_fd) as pipe:
            ready = json.loads(pipe.read())
        channel = stack.enter_context(dialled(f"unix:{path}"))
        yield Served(store, gateway, channel, ready)


@contextlib.contextmanager
def dialled(address: str) -> Iterator[grpc.Channel]:
    options = (*MESSAGE_OPTIONS, ("grpc.use_local_subchannel_pool", 1))
    with grpc.insecure_channel(address, options=options) as channel:
        yield channel


def opened(stub: KVStoreStub, layout: Layout = LAYOUT) -> pb.NamespaceId:
    request = pb.OpenNamespaceRequest(name="test", layout=layout.encode())
    return stub.OpenNamespace(request, timeout=DEADLINE_S).namespace


def refused(call: Callable[[], object]) -> tuple[grpc.StatusCode, KVStoreError]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), error_of(caught.value)


def until(condition: Callable[[], bool]) -> None:
    """Asks until it holds; the condition is one that no event tells of."""
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.01)
