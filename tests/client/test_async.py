"""The client for asyncio: generated, as complete as its source, and honest when cancelled."""

from __future__ import annotations

import asyncio
import inspect
import sys
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "client"))
from generate_async import PACKAGE, generate

from daemon import daemon
from kvstore import Hint, HintKind, Hit, KVStore, Layout, Tier
from kvstore.errors import InvalidArgument, Unavailable
from kvstore_client import AsyncKVStoreClient, KVStoreClient
from kvstore_client.threads import AsyncView, Threads

LAYOUT = Layout.opaque(model="test", block_bytes=1000, block_tokens=1)
HASHES = np.random.default_rng(3).integers(0, 256, (3, 32), np.uint8)
BLOCKS = [np.full(1000, i, np.uint8) for i in range(3)]


@pytest.fixture(scope="module")
def generated() -> str:
    return generate()


def test_the_asyncio_client_is_that_of_its_source(generated: str) -> None:
    written = (PACKAGE / "aio.py").read_text()
    assert written == generated, "run `python client/generate_async.py`"


def test_every_call_is_there_with_the_same_parameters() -> None:
    calls = [name for name in vars(KVStoreClient) if not name.startswith("_")]
    assert len(calls) == 13
    for name in calls:
        blocking = inspect.signature(getattr(KVStoreClient, name))
        awaited = inspect.signature(getattr(AsyncKVStoreClient, name))
        assert awaited.parameters == blocking.parameters
        assert inspect.iscoroutinefunction(getattr(AsyncKVStoreClient, name))


def test_every_call_works_over_both_ways(tmp_path: Path) -> None:
    with daemon(tmp_path, "--dram", "8MiB", grpc=True) as running:
        for target in (running.target, f"grpc+unix://{running.grpc_socket}"):
            asyncio.run(use_every_call(target))


async def use_every_call(target: str) -> None:
    async with await AsyncKVStoreClient.connect(target, timeout_s=20.0) as client:
        assert repr(client).startswith(f"AsyncKVStoreClient('{target}', data_path=")
        namespace = await client.open_namespace("test", LAYOUT)
        assert (await client.put(namespace, HASHES, BLOCKS)).stored == 3
        assert (await client.match(namespace, HASHES)).count == 3
        got = [np.zeros(1000, np.uint8) for _ in HASHES]
        assert await client.get_into(namespace, HASHES, got) == [Hit(Tier.DRAM)] * 3
        np.testing.assert_array_equal(got, BLOCKS)
        async with await client.buffers(3, 1000) as buffers:
            for buffer in buffers.blocks:
                buffer[:] = 1
        with pytest.raises(InvalidArgument, match="one array"):
            await client.buffers(0, 1000)
        async with await client.view(namespace, HASHES) as view:
            np.testing.assert_array_equal(view.blocks, BLOCKS)
        assert view.blocks == []
        await view.release()
        assert (await client.stats()).leased_blocks == 0
        assert await client.hint(namespace, HASHES, Hint(kind=HintKind.SESSION_ENDS)) == 3
        assert len(await client.explain(namespace, HASHES)) == 3
        assert await client.drop(namespace, HASHES[:1]) == 1
        assert await client.drop_namespace(namespace) == 2
        assert (await client.info()).version
        with pytest.raises(InvalidArgument, match="timeout_s"):
            await client.stats(timeout_s=0)
    await client.close()
    await view.release()
    with pytest.raises(Unavailable, match="closed"):
        await client.stats()


def test_connect_raises_what_the_blocking_client_raises() -> None:
    with pytest.raises(InvalidArgument, match="target"):
        asyncio.run(AsyncKVStoreClient.connect("http://x"))
    with pytest.raises(Unavailable, match=r"/nowhere/k\.sock"):
        asyncio.run(AsyncKVStoreClient.connect("unix:///nowhere/k.sock"))


# -- cancellation ----------------------------------------------------------------------


@asynccontextmanager
async def under_way(work: Callable[[], object]) -> AsyncIterator[asyncio.Future[object]]:
    """A call that has begun in its thread."""
    threads, begun = Threads(1), asyncio.Event()
    loop = asyncio.get_running_loop()

    def noted() -> object:
        loop.call_soon_threadsafe(begun.set)
        return work()

    task = asyncio.ensure_future(threads.run(noted))
    await begun.wait()
    yield task
    threads.end()


def test_a_cancelled_call_ends_before_the_cancellation_goes_on() -> None:
    go_on, over = threading.Event(), threading.Event()

    def work() -> None:
        go_on.wait()
        over.set()

    async def main() -> None:
        async with under_way(work) as task:
            for _ in range(2):  # nor does an impatient caller get its buffers sooner
                task.cancel()
                done, _ = await asyncio.wait([task], timeout=0)
                assert not done
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert over.is_set()

    asyncio.run(main())


def test_a_view_that_nobody_gets_any_more_is_released() -> None:
    go_on = threading.Event()

    async def main(store: KVStore) -> None:
        namespace = store.open_namespace("test", LAYOUT)
        store.put(namespace, HASHES, BLOCKS)

        def work() -> object:
            go_on.wait()
            view = store.view(namespace, HASHES)
            assert store.stats().leased_blocks == 3
            return view

        async with under_way(work) as task:
            task.cancel()
            go_on.set()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert store.stats().leased_blocks == 0

    with KVStore(dram=8 << 20) as store:
        asyncio.run(main(store))


def test_a_view_is_released_when_its_block_ends_in_an_error() -> None:
    async def fail_with(view: AsyncView, store: KVStore) -> None:
        async with view:
            assert store.stats().leased_blocks == 3
            raise KeyError

    async def main(store: KVStore) -> None:
        namespace, threads = store.open_namespace("test", LAYOUT), Threads(1)
        store.put(namespace, HASHES, BLOCKS)
        with pytest.raises(KeyError):
            await fail_with(AsyncView(store.view(namespace, HASHES), threads), store)
        assert store.stats().leased_blocks == 0
        threads.end()

    with KVStore(dram=8 << 20) as store:
        asyncio.run(main(store))
