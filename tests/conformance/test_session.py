"""What every session promises: exact bytes, honest misses, typed errors that change nothing."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daemon import daemon
from kvstore import (
    Attention,
    ExplainStatus,
    Hint,
    HintKind,
    Hit,
    KVStore,
    Layout,
    Miss,
    MissReason,
    Session,
    Tier,
    hash_chain,
    limits,
)
from kvstore.errors import InvalidArgument, LayoutMismatch, ResourceExhausted, Unavailable
from kvstore.session import ChannelSession
from kvstore.session.link import Link
from kvstore_client import KVStoreClient

from .conftest import LAYOUT, POOL_BYTES, Place, empty_blocks, random_blocks, random_hashes

LARGE = Layout.opaque(model="test", block_bytes=1 << 20, block_tokens=16)
SMALL = Layout.opaque(model="test", block_bytes=64, block_tokens=1)
END_S = 30.0


def test_every_method_of_a_session_is_tested_here() -> None:
    methods = [name for name in vars(Session) if not name.startswith("_")]
    assert len(methods) == 13
    text = Path(__file__).read_text()
    assert [name for name in methods if not re.search(rf"store\.{name}\(", text)] == []


def test_a_get_returns_the_exact_bytes_that_were_put(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain = hash_chain(range(64), block_tokens=16, key=namespace.key)
    data = random_blocks(4)
    assert store.match(namespace, chain).count == 0
    result = store.put(namespace, chain[:3], data[:3], position=0)
    assert (result.stored, result.existed, result.not_stored) == (3, 0, 0)
    assert store.put(namespace, chain[:3], data[:3]).existed == 3
    matched = store.match(namespace, chain)
    assert (matched.count, matched.tiers) == (3, [Tier.DRAM] * 3)
    got = empty_blocks(4)
    answers = store.get_into(namespace, chain, got)
    assert answers == [Hit(Tier.DRAM)] * 3 + [Miss(MissReason.NOT_STORED)]
    for i in range(3):
        np.testing.assert_array_equal(got[i], data[i])


def test_without_nvme_blocks_are_stored_and_none_is_persisted(store: Session, name: str) -> None:
    namespace, hashes = store.open_namespace(name, LAYOUT), random_hashes(3)
    for existed in (0, 3):
        put = store.put(namespace, hashes, random_blocks(3), persist=True)
        assert (put.stored, put.existed, put.persisted) == (3 - existed, existed, 0)
    assert store.match(namespace, hashes).count == 3


def test_a_large_batch_of_large_blocks_arrives_whole(store: Session, name: str) -> None:
    layout = Layout.opaque(model="test", block_bytes=(1 << 20) + 12345, block_tokens=16)
    namespace = store.open_namespace(name, layout)
    hashes, data = random_hashes(6), random_blocks(6, layout=layout)
    assert store.put(namespace, hashes, data).stored == 6
    got = empty_blocks(6, layout)
    assert all(isinstance(a, Hit) for a in store.get_into(namespace, hashes, got))
    for mine, put in zip(got, data, strict=True):
        np.testing.assert_array_equal(mine, put)
    store.drop_namespace(namespace)


def test_two_ranks_put_their_cells_and_a_third_reads_any_part(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, whole = random_hashes(2), random_blocks(2)
    cut = int(LAYOUT.cell_bounds[1])
    one = [block[:cut] for block in whole]
    other = [block[cut:] for block in whole]
    first = store.put(namespace, chain, one, put_id=b"x" * 16, cells=[0])
    assert (first.stored, first.waiting) == (0, 2)
    assert store.match(namespace, chain).count == 0
    explained = store.explain(namespace, chain)
    assert [report.status for report in explained] == [ExplainStatus.NOT_SEALED] * 2
    second = store.put(namespace, chain, other, put_id=b"x" * 16, cells=[1, 2])
    assert second.stored == 2
    got = empty_blocks(2)
    store.get_into(namespace, chain, got)
    np.testing.assert_array_equal(got, whole)
    middle = slice(int(LAYOUT.cell_bounds[1]), int(LAYOUT.cell_bounds[2]))
    parts = [np.zeros(middle.stop - middle.start, np.uint8) for _ in range(2)]
    assert isinstance(store.get_into(namespace, chain, parts, cells=[1])[1], Hit)
    for part, block in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(part, block[middle])


def test_another_put_of_a_key_in_progress_never_mixes_with_it(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, mine, theirs = random_hashes(1), random_blocks(1), random_blocks(1, seed=7)
    cut = int(LAYOUT.cell_bounds[1])
    store.put(namespace, chain, [mine[0][:cut]], put_id=b"a" * 16, cells=[0])
    other = store.put(namespace, chain, [theirs[0][cut:]], put_id=b"b" * 16, cells=[1, 2])
    assert other.not_stored == 1
    done = store.put(namespace, chain, [mine[0][cut:]], put_id=b"a" * 16, cells=[1, 2])
    assert done.stored == 1
    got = empty_blocks(1)
    store.get_into(namespace, chain, got)
    np.testing.assert_array_equal(got[0], mine[0])


def test_a_view_shows_the_bytes_and_holds_the_blocks(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, data = random_hashes(3), random_blocks(2)
    store.put(namespace, chain[:2], data)
    with store.view(namespace, chain) as view:
        assert len(view.blocks) == 2
        for shown, put in zip(view.blocks, data, strict=True):
            np.testing.assert_array_equal(shown, put)
            assert not shown.flags.writeable
        del shown
    view.release()  # a second one does nothing
    assert store.stats().leased_blocks == 0


def test_a_dropped_block_is_a_miss_and_says_so(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain = random_hashes(3)
    store.put(namespace, chain[:2], random_blocks(2))
    assert store.drop(namespace, chain[1:]) == 1
    assert store.match(namespace, chain).count == 1
    stored, dropped, never = store.explain(namespace, chain)
    assert (stored.status, stored.tier) == (ExplainStatus.STORED, Tier.DRAM)
    assert dropped.status is ExplainStatus.DROPPED
    assert dropped.when is not None
    assert never.status is ExplainStatus.NEVER_STORED


def test_a_block_of_its_time_expires_and_says_when(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, began = random_hashes(2), time.time()
    store.put(namespace, chain[:1], random_blocks(1), ttl_s=0.05)
    store.put(namespace, chain[1:], random_blocks(1), ttl_s=3600.0)
    until = time.monotonic() + END_S
    while (report := store.explain(namespace, chain[:1])[0]).status is ExplainStatus.STORED:
        assert time.monotonic() < until
    assert report.status is ExplainStatus.EXPIRED
    assert report.when is not None
    assert began <= report.when <= time.time() + limits.TICK_MS / 1e3
    assert store.match(namespace, chain).count == 0
    assert store.get_into(namespace, chain[:1], empty_blocks(1)) == [Miss(MissReason.NOT_STORED)]
    assert store.match(namespace, chain[1:]).count == 1
    assert store.stats().expired >= 1


def test_an_evicted_block_says_so(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LARGE)
    chain, data = random_hashes(48), random_blocks(1, layout=LARGE) * 4
    for at in range(0, 48, 4):
        assert store.put(namespace, chain[at : at + 4], data).stored == 4
    first, last = (store.explain(namespace, chain)[i] for i in (0, -1))
    assert (first.status, first.tier) == (ExplainStatus.EVICTED, None)
    assert first.when is not None
    assert (last.status, last.tier, last.when) == (ExplainStatus.STORED, Tier.DRAM, None)
    assert store.stats().evicted >= 16
    store.drop_namespace(namespace)


def test_a_pool_of_blocks_in_use_takes_no_more_and_says_when_to_try_again(
    place: Place, name: str
) -> None:
    store = place.session
    namespace = store.open_namespace(name, LARGE)
    chain, data = random_hashes(48, seed=1), random_blocks(1, layout=LARGE) * 4
    with contextlib.ExitStack() as views:
        for at in range(0, 48, 4):
            result = store.put(namespace, chain[at : at + 4], data)
            views.enter_context(place.holder.view(namespace, chain[at : at + 4]))
            if result.not_stored:
                break
        assert result.not_stored
        assert result.retry_after_ms > 0
        again = store.put(namespace, chain[-4:], data)
        assert (again.stored, again.not_stored) == (0, 4)
        assert again.retry_after_ms > 0
        assert store.match(namespace, chain[:at]).count == at  # and nothing of it was evicted
    assert store.put(namespace, chain[-4:], data).stored == 4
    store.drop_namespace(namespace)


def test_buffers_are_put_as_they_lie(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, data = random_hashes(3), random_blocks(3)
    with store.buffers(3, LAYOUT.block_bytes) as buffers:
        for buffer, block in zip(buffers.blocks, data, strict=True):
            buffer[:] = block
        assert store.put(namespace, chain, buffers.blocks, position=0).stored == 3
    assert buffers.blocks == []
    got = empty_blocks(3)
    assert all(isinstance(each, Hit) for each in store.get_into(namespace, chain, got))
    for block, arrived in zip(data, got, strict=True):
        np.testing.assert_array_equal(arrived, block)
    for n, nbytes in ((0, 1), (1, 0)):
        with pytest.raises(InvalidArgument, match="one array"):
            store.buffers(n, nbytes)


def test_a_dropped_namespace_is_empty_and_goes_on(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, data = random_hashes(2), random_blocks(2)
    store.put(namespace, chain, data)
    assert store.drop_namespace(namespace) == 2
    assert store.match(namespace, chain).count == 0
    assert store.put(namespace, chain, data).stored == 2  # the old handle is good for the new one
    assert store.match(namespace, chain).count == 2
    assert store.open_namespace(name, LAYOUT).generation > namespace.generation


def test_a_block_of_another_layout_is_not_found_but_explained(store: Session, name: str) -> None:
    wider = Layout(
        model="test",
        attention=Attention.GQA,
        layers=2,
        kv_heads=4,
        head_dim=16,
        dtype="float32",
        block_tokens=16,
    )
    one, two = store.open_namespace(name, LAYOUT), store.open_namespace(name, wider)
    chain = hash_chain(range(32), block_tokens=16, key=one.key)
    store.put(one, chain, random_blocks(2))
    assert store.match(two, chain).count == 0
    assert [r.status for r in store.explain(two, chain)] == [ExplainStatus.OTHER_LAYOUT] * 2


def test_tenants_of_other_names_share_nothing(store: Session, name: str) -> None:
    one, two = store.open_namespace(name, LAYOUT), store.open_namespace(name + "b", LAYOUT)
    chain = hash_chain(range(32), block_tokens=16, key=one.key)
    store.put(one, chain, random_blocks(2))
    assert store.match(two, chain).count == 0
    assert store.match(two, hash_chain(range(32), block_tokens=16, key=two.key)).count == 0


def test_hints_reach_the_stored_blocks_only(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain = random_hashes(3)
    store.put(namespace, chain[:2], random_blocks(2), hint=Hint(kind=HintKind.PIN_UNTIL, for_s=60))
    assert store.stats().pinned_blocks == 2
    assert store.hint(namespace, chain, Hint(kind=HintKind.SESSION_ENDS)) == 2
    ends = Hint(kind=HintKind.NEXT_TURN_BY, for_s=60)
    assert store.match(namespace, chain, hint=ends).count == 2
    store.drop_namespace(namespace)
    assert store.stats().pinned_blocks == 0


def test_info_names_the_namespaces(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    store.put(namespace, random_hashes(2), random_blocks(2))
    info = store.info()
    mine = next(found for found in info.namespaces if found.name == name)
    assert (mine.blocks, mine.layout, mine.generation) == (2, LAYOUT, 0)
    assert info.policy == "lru"


Call = Callable[[Session, Any, np.ndarray, float], object]
TIMED: dict[str, Call] = {
    "open_namespace": lambda s, n, h, t: s.open_namespace(n.name, n.layout, timeout_s=t),
    "match": lambda s, n, h, t: s.match(n, h, timeout_s=t),
    "get_into": lambda s, n, h, t: s.get_into(n, h, empty_blocks(len(h), n.layout), timeout_s=t),
    "view": lambda s, n, h, t: s.view(n, h, timeout_s=t).release(),
    "put": lambda s, n, h, t: s.put(n, h, empty_blocks(len(h), n.layout), timeout_s=t),
    "drop": lambda s, n, h, t: s.drop(n, h, timeout_s=t),
    "drop_namespace": lambda s, n, h, t: s.drop_namespace(n, timeout_s=t),
    "hint": lambda s, n, h, t: s.hint(n, h, Hint(kind=HintKind.SESSION_ENDS), timeout_s=t),
    "explain": lambda s, n, h, t: s.explain(n, h, timeout_s=t),
    "stats": lambda s, n, h, t: s.stats(timeout_s=t),
    "info": lambda s, n, h, t: s.info(timeout_s=t),
}


@pytest.mark.parametrize("method", TIMED)
def test_every_call_takes_a_deadline_and_refuses_one_that_is_none(
    store: Session, name: str, method: str
) -> None:
    namespace, chain = store.open_namespace(name, LAYOUT), random_hashes(1)
    store.put(namespace, chain, random_blocks(1))
    for wrong in (0, 0.0, -1, -1e-9, float("nan"), float("inf"), limits.MAX_DEADLINE_MS / 1e3 + 1):
        with pytest.raises(InvalidArgument) as caught:
            TIMED[method](store, namespace, chain, wrong)
        assert caught.value.field == "timeout_s"
    assert store.match(namespace, chain).count == 1  # nothing was changed
    TIMED[method](store, namespace, chain, END_S)


@pytest.mark.parametrize("method", ["match", "get_into", "view", "put", "drop", "hint", "explain"])
def test_a_call_takes_65536_keys_and_not_one_more(store: Session, name: str, method: str) -> None:
    assert limits.MAX_KEYS_PER_CALL == 65_536
    namespace, call = store.open_namespace(name, SMALL), TIMED[method]
    chain = random_hashes(limits.MAX_KEYS_PER_CALL + 1)
    with pytest.raises(InvalidArgument) as caught:
        call(store, namespace, chain, END_S)
    assert caught.value.field in ("keys", "hashes")
    (mine,) = [each for each in store.info().namespaces if each.name == name]
    assert mine.blocks == 0
    # A put that is out of time stores less and raises nothing; all of this one takes gRPC long.
    call(store, namespace, chain[:-1], 2.0 if method == "put" else END_S)
    store.drop_namespace(namespace)


@pytest.mark.parametrize("n", [1, 3])
def test_wrong_buffers_are_refused_with_their_name(store: Session, name: str, n: int) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain = random_hashes(n)
    with pytest.raises(LayoutMismatch, match=r"sources\[0\]"):
        store.put(namespace, chain, [np.zeros(3, np.uint8)] * n)
    with pytest.raises(InvalidArgument, match="buffers for"):
        store.get_into(namespace, chain, empty_blocks(n + 1))
    with pytest.raises(LayoutMismatch, match="cells"):
        store.put(namespace, chain, empty_blocks(n), cells=[3])
    with pytest.raises(LayoutMismatch, match="cells"):
        store.get_into(namespace, chain, empty_blocks(n), cells=[0, 0])
    assert store.match(namespace, chain).count == 0


def test_wrong_arguments_are_refused_with_their_name(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    chain, data = random_hashes(1), random_blocks(1)
    none = np.empty((0, 32), np.uint8)
    with pytest.raises(InvalidArgument, match=r"hashes|keys"):
        store.put(namespace, none, [])
    with pytest.raises(InvalidArgument, match=r"hashes|keys"):
        store.drop(namespace, none)
    with pytest.raises(InvalidArgument, match=r"hashes|keys"):
        store.match(namespace, np.zeros((65_537, 32), np.uint8))
    with pytest.raises(InvalidArgument, match=r"hashes|keys"):
        store.match(namespace, [b"short"])
    with pytest.raises(InvalidArgument, match="put_id"):
        store.put(namespace, chain, data, put_id=b"short")
    with pytest.raises(InvalidArgument, match="parent"):
        store.put(namespace, chain, data, parent=b"short", position=1)
    with pytest.raises(InvalidArgument, match="timeout_s"):
        store.match(namespace, chain, timeout_s=0)
    with pytest.raises(InvalidArgument, match="timeout_s"):
        store.stats(timeout_s=-1.0)
    with pytest.raises(InvalidArgument, match="ttl"):
        store.put(namespace, chain, data, ttl_s=-1.0)
    with pytest.raises(InvalidArgument, match=r"for_s|for_ms"):
        store.hint(namespace, chain, Hint(kind=HintKind.PIN_UNTIL, for_s=1e9))
    with pytest.raises(InvalidArgument, match="name"):
        store.open_namespace("", LAYOUT)
    assert store.match(namespace, chain).count == 0


def test_a_block_too_large_for_the_pool_is_refused_at_open(store: Session, name: str) -> None:
    layout = Layout.opaque(model="test", block_bytes=POOL_BYTES, block_tokens=16)
    with pytest.raises(InvalidArgument, match="layout"):
        store.open_namespace(name, layout)


def test_more_than_half_of_the_pool_cannot_be_pinned(store: Session, name: str) -> None:
    layout = Layout.opaque(model="test", block_bytes=1 << 20, block_tokens=16)
    namespace = store.open_namespace(name, layout)
    chain, data = random_hashes(24), random_blocks(1, layout=layout) * 24
    for at in range(0, 24, 4):
        store.put(namespace, chain[at : at + 4], data[:4])
    stored = store.match(namespace, chain).count
    assert stored > 16
    with pytest.raises(ResourceExhausted, match="retry"):
        store.hint(namespace, chain, Hint(kind=HintKind.PIN_UNTIL, for_s=60))
    assert store.stats().pinned_blocks == 0
    store.drop_namespace(namespace)


def test_a_hint_beside_a_put_or_a_match_that_is_refused_fails_neither(
    store: Session, name: str
) -> None:
    namespace = store.open_namespace(name, LARGE)
    chain, data = random_hashes(24, seed=2), random_blocks(1, layout=LARGE) * 4
    pin = Hint(kind=HintKind.PIN_UNTIL, for_s=60)
    for at in range(0, 24, 4):
        assert store.put(namespace, chain[at : at + 4], data, hint=pin).stored == 4
    stats = store.stats()
    assert 0 < stats.pinned_blocks < 24
    assert store.match(namespace, chain, hint=pin).count == 24
    assert store.stats().pinned_blocks == stats.pinned_blocks
    store.drop_namespace(namespace)


def test_threads_may_share_a_session(store: Session, name: str) -> None:
    namespace = store.open_namespace(name, LAYOUT)
    wrong: list[str] = []

    def work(seed: int) -> None:
        chain, data = random_hashes(8, seed), random_blocks(8, seed)
        got = empty_blocks(8)
        for _ in range(5):
            store.put(namespace, chain, data)
            answers = store.get_into(namespace, chain, got)
            for answer, mine, put in zip(answers, got, data, strict=True):
                if isinstance(answer, Hit) and not np.array_equal(mine, put):
                    wrong.append(f"thread {seed}")
            store.drop(namespace, chain)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_closed_session_stays_closed(tmp_path: Path) -> None:
    with KVStore(dram=POOL_BYTES) as store:
        store.close()
        store.close()
        with pytest.raises(Unavailable, match="closed"):
            store.stats()
    with daemon(tmp_path, "--dram", "8MiB", grpc=True) as running:
        for target in (running.target, f"grpc+unix://{running.grpc_socket}"):
            client = KVStoreClient(target)
            client.close()
            client.close()
            with pytest.raises(Unavailable, match="closed"):
                client.stats()


# -- bytes that changed under the store ------------------------------------------------


@contextlib.contextmanager
def embedded_and_its_link(folder: Path) -> Iterator[tuple[Session, Link]]:
    """A store of this process that verifies, and what reaches its memory."""
    with KVStore(dram=POOL_BYTES, verify_reads=True) as store:
        yield store, store._link


@contextlib.contextmanager
def direct_and_its_link(folder: Path) -> Iterator[tuple[Session, Link]]:
    """A client that verifies and may write the pool, and what reaches its memory."""
    with (
        daemon(folder, "--dram", "8MiB") as running,
        ChannelSession(str(running.socket), timeout_s=END_S, verify_reads=True) as session,
    ):
        yield session, session._connection._link


@pytest.mark.parametrize("open_both", [embedded_and_its_link, direct_and_its_link])
def test_a_flipped_bit_is_a_miss_where_reads_are_verified(open_both: Any, tmp_path: Path) -> None:
    with open_both(tmp_path) as (store, link):
        namespace = store.open_namespace("flipped", LAYOUT)
        chain, data, got = random_hashes(3), random_blocks(3), empty_blocks(3)
        store.put(namespace, chain, data)
        memory = link.memory(END_S)
        granule = int(memory.index.match(namespace.id, chain[1:2]).granules[0])
        memory.payload(LAYOUT, granule)[-1] ^= 1
        assert store.get_into(namespace, chain, got) == [
            *(Hit(Tier.DRAM), Miss(MissReason.CORRUPTED)),
            Miss(MissReason.NOT_STORED),  # nobody looked behind the first miss
        ]
        np.testing.assert_array_equal(got[0], data[0])
        cut = int(LAYOUT.cell_bounds[1])  # the first cell of the block is sound
        part = [np.zeros(cut, np.uint8)]
        assert store.get_into(namespace, chain[1:2], part, cells=[0]) == [Hit(Tier.DRAM)]
        np.testing.assert_array_equal(part[0], data[1][:cut])
        memory.pool[granule * limits.GRANULE_BYTES + 40] ^= 1
        assert store.get_into(namespace, chain[1:2], part, cells=[0]) == [
            Miss(MissReason.CORRUPTED)
        ]
