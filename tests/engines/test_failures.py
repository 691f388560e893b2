"""A store that is dead, slow, full, emptied or corrupted costs a miss: the same tokens, no error.

Real daemons; what is told apart is only what was matched and stored.
"""

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from engines.spoiling import corrupt  # noqa: E402
from engines.tiny import PROMPTS, reference  # noqa: E402

from daemon import daemon  # noqa: E402
from kvstore import Layout  # noqa: E402
from kvstore.errors import Unavailable  # noqa: E402
from kvstore_client import KVStoreClient  # noqa: E402
from kvstore_engines import adapter  # noqa: E402
from kvstore_engines.adapter import SessionStore  # noqa: E402
from kvstore_engines.engine import Engine  # noqa: E402
from kvstore_engines.jobs import EngineSpec, Job, Result  # noqa: E402
from kvstore_engines.launch import Workers  # noqa: E402
from kvstore_engines.layouts import layout_of  # noqa: E402

pytestmark = pytest.mark.engines

PROMPT = PROMPTS[3]
NEW = 40  # 50 + 39 tokens that are fed back: five blocks, three of them the prompt's
WAIT_S = 30.0


def run(to: Workers, engine: EngineSpec, count: int = NEW) -> Result:
    return to.ask(Job(engine=engine, prompts=[PROMPT], new_tokens=count))[0][0]


def engine_on(client: KVStoreClient, folder: Path, name: str = "n") -> Engine:
    layout = layout_of(folder, 16, torch.float32)
    return Engine(folder, store=SessionStore(client, name, layout), num_pages=16)


def finish(engine: Engine) -> Result:
    """Steps to the end of the only request."""
    while engine.busy:
        for result in engine.step():
            return result
    raise AssertionError("nothing ran")


@pytest.fixture(scope="module")
def wanted(tiny: Any) -> tuple[int, ...]:
    """What transformers says of the prompt."""
    return reference(tiny("llama")[1], PROMPT, NEW)


def test_a_store_that_dies_in_mid_run_is_missed_and_found_again(
    tiny: Any, wanted: tuple[int, ...], tmp_path: Path
) -> None:
    with contextlib.ExitStack() as running:
        first = running.enter_context(daemon(tmp_path, "--dram", "16MiB"))
        client = running.enter_context(KVStoreClient(first.target, timeout_s=WAIT_S))
        engine = engine_on(client, tiny("llama")[0])
        engine.submit(PROMPT, NEW)
        for _ in range(20):  # 69 tokens are computed, four blocks put
            assert engine.step() == []
        first.kill()
        result = finish(engine)
        assert (result.token_ids, result.stored_blocks) == (wanted, 4)
        running.enter_context(daemon(tmp_path, "--dram", "16MiB"))
        client.stats(timeout_s=WAIT_S)  # returns once it is connected again
        for matched, stored in ((0, 5), (48, 0)):
            result = engine.generate([PROMPT], NEW)[0]
            assert result.token_ids == wanted
            assert (result.matched_tokens, result.stored_blocks) == (matched, stored)


def test_a_store_that_was_never_there(
    tiny: Any, wanted: tuple[int, ...], tmp_path: Path, decode: Workers
) -> None:
    engine = EngineSpec(model=str(tiny("llama")[0]), target=f"unix://{tmp_path}/kvstore.sock")
    result = run(decode, engine)
    assert result.token_ids == wanted
    assert (result.matched_tokens, result.stored_blocks) == (0, 0)


def test_a_store_that_comes_later_is_used_from_then_on(
    tiny: Any, wanted: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = f"unix://{tmp_path}/kvstore.sock"
    monkeypatch.setattr(adapter, "RETRY_S", 0.0)
    with KVStoreClient(target, timeout_s=0.1, lazy=True) as client:
        engine = engine_on(client, tiny("llama")[0])
        assert engine.generate([PROMPT], NEW)[0].token_ids == wanted
        with daemon(tmp_path, "--dram", "16MiB"):
            client.stats(timeout_s=WAIT_S)
            engine.generate([PROMPT], NEW)
            result = engine.generate([PROMPT], NEW)[0]
    assert (result.token_ids, result.matched_tokens) == (wanted, 48)


class Absent:
    """A session whose store is away; counts how often it was asked, and for how long."""

    def __init__(self) -> None:
        self.asked: list[float | None] = []

    def open_namespace(self, name: str, layout: Layout, *, timeout_s: float | None = None) -> None:
        self.asked.append(timeout_s)
        raise Unavailable("nobody is there")


def test_an_absent_store_is_seldom_waited_for(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(adapter.time, "monotonic", lambda: now)
    session: Any = Absent()
    store = SessionStore(session, "n", layout_of(tiny("llama")[0], 16, torch.float32))
    for now in (100.5, 100.9, 101.1, 101.2, 102.2):  # noqa: B007 - the clock
        with pytest.raises(Unavailable):
            store.chain(range(16))
    assert session.asked == [None, adapter.BRIEF_S, adapter.BRIEF_S]


class TimedStore(SessionStore):
    """Notes how long each put took."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.puts_s: list[float] = []

    def put(self, *arguments: Any, **named: Any) -> int:
        began = time.monotonic()
        try:
            return super().put(*arguments, **named)
        finally:
            self.puts_s.append(time.monotonic() - began)


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    """A process that does not run for the length of a `with`."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_a_store_that_hangs_costs_one_deadline(tiny: Any, tmp_path: Path) -> None:
    folder, model = tiny("llama")
    with (
        daemon(tmp_path, "--dram", "16MiB") as running,
        KVStoreClient(running.target, timeout_s=1.0) as client,
    ):
        store = TimedStore(client, "n", layout_of(folder, 16, torch.float32))
        engine = Engine(folder, store=store, num_pages=16)
        engine.submit(PROMPT, 190)
        engine.step()
        with stopped(running.process.pid):
            result = finish(engine)
    assert result.token_ids == reference(model, PROMPT, 190)
    assert result.stored_blocks == 3
    assert len(store.puts_s) == 12
    # One put meets its deadline, and maybe one before it that of the report of what was read.
    assert 1 <= sum(took_s > 0.9 for took_s in store.puts_s) <= 2


def test_a_full_store_stores_nothing(tiny: Any, wanted: tuple[int, ...], tmp_path: Path) -> None:
    with (
        daemon(tmp_path, "--dram", "1MiB") as running,
        KVStoreClient(running.target) as client,
        contextlib.ExitStack() as held,
    ):
        fill(client, held)
        result = engine_on(client, tiny("llama")[0]).generate([PROMPT], NEW)[0]
        assert result.token_ids == wanted
        assert (result.matched_tokens, result.stored_blocks) == (0, 0)


def fill(client: KVStoreClient, held: contextlib.ExitStack) -> None:
    """Fills the pool with blocks that are held, so that none of them can be evicted."""
    layout = Layout.opaque(model="other", block_bytes=4000, block_tokens=16)
    other = SessionStore(client, "other", layout)
    namespace = client.open_namespace("other", layout)
    block = np.zeros(layout.block_bytes, np.uint8)
    for i in range(1000):
        key = other.chain([i] * 16)
        if not other.put(key, [block], put_id=i.to_bytes(16, "little")):
            return
        held.enter_context(client.view(namespace, key))
    raise AssertionError("the pool is never full")


def test_a_namespace_dropped_in_mid_run(tiny: Any, wanted: tuple[int, ...], target: str) -> None:
    folder = tiny("llama")[0]
    with KVStoreClient(target) as client, KVStoreClient(target) as operator:
        engine = engine_on(client, folder, "dropped")
        engine.submit(PROMPT, NEW)
        for _ in range(5):
            assert engine.step() == []
        layout = layout_of(folder, 16, torch.float32)
        assert operator.drop_namespace(operator.open_namespace("dropped", layout)) == 3
        assert finish(engine).token_ids == wanted
        # Of the first run only the blocks after the drop are left, and none of them leads.
        for matched, stored in ((0, 3), (48, 0)):
            result = engine.generate([PROMPT], NEW)[0]
            assert result.token_ids == wanted
            assert (result.matched_tokens, result.stored_blocks) == (matched, stored)


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_corrupted_bytes_are_a_miss_where_reads_are_verified(
    name: str, tiny: Any, target: str, prefill: Workers, decode: Workers
) -> None:
    folder, model = tiny(name)
    engine = EngineSpec(model=str(folder), target=target, namespace="corrupted")
    run(prefill, engine, 1)
    corrupt(target, engine, PROMPT, block=1)
    unverified = run(decode, engine)
    assert unverified.matched_tokens == 48
    result = run(decode, dataclasses.replace(engine, verify_reads=True))
    assert result.token_ids == reference(model, PROMPT, NEW)
    assert result.matched_tokens == 16  # the block before it
    assert unverified.token_ids != result.token_ids
