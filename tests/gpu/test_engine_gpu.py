"""The thin engines on a GPU: their pages there, the decode kernels, and a store on the host."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engines.wide import PROMPTS, save_wide, save_wide_latent, save_wide_routed

from kvstore import KVStore
from kvstore_engines import kernel_graphs
from kvstore_engines.adapter import SessionStore
from kvstore_engines.attention import TorchAttention, make_batch
from kvstore_engines.engine import Engine
from kvstore_engines.kernel_attention import KernelAttention
from kvstore_engines.kernel_graphs import GraphedModel
from kvstore_engines.layouts import layout_of
from kvstore_kernels.capturing import own_stream

MODELS = {
    "llama": save_wide,
    "deepseek_v3": save_wide_latent,
    "deepseek_v3, routed": save_wide_routed,
}
BF16 = torch.bfloat16


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MODELS[request.param](tmp_path_factory.mktemp(request.param))


class Compared(KernelAttention):
    """Compares each answer with torch's, in float32 on the same pages."""

    calls = 0
    worst = 0.0

    def grouped(self, q: Any, layer_pages: Any, batch: Any, scale: float) -> torch.Tensor:
        out = super().grouped(q, layer_pages, batch, scale)
        self._note(out, TorchAttention().grouped(q.float(), layer_pages.float(), batch, scale))
        return out

    def latent(self, q: Any, pages: Any, batch: Any, scale: float, rank: int) -> torch.Tensor:
        out = super().latent(q, pages, batch, scale, rank)
        self._note(out, TorchAttention().latent(q.float(), pages.float(), batch, scale, rank))
        return out

    def _decode(self, *arguments: Any) -> torch.Tensor | None:
        found = super()._decode(*arguments)
        self.calls += found is not None
        return found

    def _note(self, out: torch.Tensor, wanted: torch.Tensor) -> None:
        error = ((out.float() - wanted).norm() / wanted.norm()).item()
        self.worst = max(self.worst, error)


def test_every_step_on_the_kernels_is_what_torch_says(gpu: torch.device, folder: Path) -> None:
    compared = Compared()
    engine = Engine(
        folder,
        store=None,
        num_pages=64,
        dtype=BF16,
        device=gpu,
        attention=compared,
        graphs=False,  # what is compared is read by the host
    )
    engine.generate(PROMPTS, 12)
    assert compared.calls > 2 * 11
    assert compared.worst < 1e-2


def graphed_engine(folder: Path, gpu: torch.device) -> Any:
    engine: Any = Engine(folder, store=None, num_pages=256, dtype=BF16, device=gpu)
    assert isinstance(engine._model, GraphedModel)
    return engine


def test_steps_in_graphs_give_the_same_logits_and_few_are_captured(
    gpu: torch.device, folder: Path
) -> None:
    """While sequences come and go, and past one whose page table grows."""
    engine = graphed_engine(folder, gpu)
    model = engine._model
    pool, worst, steps = engine.pool, 0.0, 0
    forward = model.forward

    def compared(token_ids: torch.Tensor, batch: Any, pool: Any) -> torch.Tensor:
        nonlocal worst, steps
        # The same is written to the same places by either.
        wanted = model._model.forward(token_ids, batch, pool).float()
        logits = forward(token_ids, batch, pool)
        worst = max(worst, float((logits.float() - wanted).norm() / wanted.norm()))
        steps += 1
        return logits

    model.forward = compared
    for number, prompt in enumerate(PROMPTS):
        engine.submit(prompt, 4 + 5 * number)
    while engine.busy:
        engine.step()
    assert steps > 20
    assert worst < 1e-2
    assert 1 <= len(model._graphs) <= len(PROMPTS)
    assert all(graph.captured for graph in model._graphs.values())
    assert pool is engine.pool


def test_a_step_has_the_same_bits_with_a_graph_and_without(gpu: torch.device, folder: Path) -> None:
    """Where the graph has no more rows than there are sequences, so that all products have the same
    shapes."""
    engine = graphed_engine(folder, gpu)
    torch.manual_seed(4)
    engine.pool.storage.normal_()
    with torch.inference_mode():
        for sequences in (1, 3, 8, 10, 16, 64):
            spans = [
                ([(3 * i + page) % 256 for page in range(3)], 20 + i % 25, 21 + i % 25)
                for i in range(sequences)
            ]
            batch = make_batch(spans, 16, gpu)
            token_ids = torch.arange(sequences, device=gpu)
            wanted = engine._model._model.forward(token_ids, batch, engine.pool).clone()
            assert torch.equal(engine._model.forward(token_ids, batch, engine.pool), wanted)
    assert all(graph.captured for graph in engine._model._graphs.values())


def test_many_sequences_share_a_graph_of_some_more(gpu: torch.device, folder: Path) -> None:
    """Rows of no sequence change nothing for the others, and write nothing."""
    engine = graphed_engine(folder, gpu)
    model, layers = engine._model, range(engine.config.layers)
    torch.manual_seed(3)
    engine.pool.storage.normal_()
    before = engine.pool.storage.clone()
    with torch.inference_mode():
        for sequences in (12, 9, 11, 10):
            spans = [([3 * i, 3 * i + 1], 20 + i, 21 + i) for i in range(sequences)]
            batch = make_batch(spans, 16, gpu)
            token_ids = torch.arange(sequences, device=gpu)
            wanted = model._model.forward(token_ids, batch, engine.pool).float()
            logits = model.forward(token_ids, batch, engine.pool).float()
            assert logits.shape == wanted.shape
            assert float((logits - wanted).norm() / wanted.norm()) < 1e-2
            for layer in layers:
                for pool in (before, engine.pool.storage):
                    where = pool.select(engine.pool._layer_dim, layer)
                    if engine.config.mla:
                        where[batch.pages, batch.offsets] = 0.0
                    else:
                        where[batch.pages, :, :, batch.offsets] = 0.0
            assert torch.equal(engine.pool.storage, before)
    assert sorted(key[1] for key in model._graphs) == [10, 12]


def test_a_step_that_cannot_be_captured_is_launched_one_by_one(
    gpu: torch.device, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    wanted = [r.token_ids for r in graphed_engine(folder, gpu).generate(PROMPTS, 6)]
    engine = graphed_engine(folder, gpu)
    model = engine._model._model
    forward = model.forward

    def waiting(token_ids: torch.Tensor, batch: Any, pool: Any) -> torch.Tensor:
        logits = forward(token_ids, batch, pool)
        logits[0, 0].item()  # waits for the GPU, which a capture cannot
        return logits

    model.forward = waiting
    assert [r.token_ids for r in engine.generate(PROMPTS, 6)] == wanted
    assert len(caplog.records) == 1
    assert not engine._model._graphs
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert [r.token_ids for r in graphed_engine(folder, gpu).generate(PROMPTS, 6)] == wanted


def test_the_graphs_that_were_used_longest_ago_go(
    gpu: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_graphs, "MOST_GRAPHS", 2)
    engine = graphed_engine(folder, gpu)
    for prompts in (PROMPTS[:1], PROMPTS[:2], PROMPTS[:3], PROMPTS[:1]):
        engine.generate(prompts, 4)
    assert len(engine._model._graphs) == 2


def test_a_replay_gives_the_bits_of_its_launches(
    gpu: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with so many sequences that a last bit would send some of them another way."""
    prompts = [[(3 * i + j * i + 1) % 97 for j in range(5 + i)] for i in range(14)]

    def tokens() -> list[tuple[int, ...]]:
        return [r.token_ids for r in graphed_engine(folder, gpu).generate(prompts, 30)]

    wanted = tokens()

    def launched(step: Any) -> None:
        def replay() -> None:
            with step._attention.fixed(step._step, step._workspace):
                step._logits = step._forward()

        step._graph = SimpleNamespace(replay=replay)

    monkeypatch.setattr(kernel_graphs._StepGraph, "_capture", launched)
    assert tokens() == wanted


def test_a_hundred_replays_give_the_same_bits(gpu: torch.device, folder: Path) -> None:
    engine = graphed_engine(folder, gpu)
    engine.generate(PROMPTS[:2], 3)
    spans = [([0, 1, 2], 40, 41), ([3, 4], 20, 21)]
    batch = make_batch(spans, 16, gpu)
    token_ids = torch.tensor([5, 9], device=gpu)
    with torch.inference_mode():
        first = engine._model.forward(token_ids, batch, engine.pool).clone()
        for _ in range(100):
            assert torch.equal(engine._model.forward(token_ids, batch, engine.pool), first)


def test_a_gpu_takes_kernels_and_graphs_by_itself(gpu: torch.device, folder: Path) -> None:
    assert isinstance(graphed_engine(folder, gpu)._model._attention, KernelAttention)
    engine: Any = Engine(folder, store=None, num_pages=64, dtype=BF16, device=gpu, graphs=False)
    assert not isinstance(engine._model, GraphedModel)


@contextmanager
def copies_elsewhere(gpu: torch.device) -> Iterator[None]:
    """Meanwhile another thread takes memory, copies both ways on one stream after the other, of
    which torch has 32, and checks what arrives."""
    ended, wrong = threading.Event(), list[str]()

    def copy() -> None:
        turn = 0
        while not ended.is_set() and not wrong:
            stream, turn = torch.cuda.Stream(gpu), turn + 1
            try:
                with torch.cuda.stream(stream):
                    host = torch.full((1 << 18,), turn, dtype=torch.int32).pin_memory()
                    there = host.to(gpu, non_blocking=True)
                    back = torch.empty_like(host, pin_memory=True)
                    back.copy_(there + 1, non_blocking=True)
                    stream.synchronize()
                if not bool((back == turn + 1).all()):
                    wrong.append(f"turn {turn}")
            except RuntimeError as error:
                wrong.append(f"turn {turn}: {error}")

    thread = threading.Thread(target=copy)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join(60)
    assert not thread.is_alive()
    assert not wrong


def answers(folder: Path, gpu: torch.device, *, graphs: bool) -> list[tuple[int, ...]]:
    """The tokens of sequences that come and go, of an engine that puts and of one that gets."""
    layout, found, matched = layout_of(folder, 16, BF16), [], 0
    with KVStore(dram=64 << 20) as store:
        for _ in range(2):
            held = SessionStore(store, "n", layout)
            engine: Any = Engine(
                folder, store=held, num_pages=64, dtype=BF16, device=gpu, graphs=graphs
            )
            assert isinstance(engine._model, GraphedModel) is graphs
            results = []
            for number, prompt in enumerate(PROMPTS):
                engine.submit(prompt, 20 - 4 * number)
                results += engine.step() + engine.step()
            while engine.busy:
                results += engine.step()
            results.sort(key=lambda result: result.request_id)
            found += [result.token_ids for result in results]
            matched += sum(result.matched_tokens for result in results)
    assert matched == 32 + 48
    return found


@pytest.mark.parametrize("most", [kernel_graphs.MOST_GRAPHS, 1])
def test_graphs_change_no_token(
    gpu: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """With blocks that come from the store and go there, beside copies on other streams, and where
    graphs are captured anew again and again."""
    monkeypatch.setattr(kernel_graphs, "MOST_GRAPHS", most)
    wanted = answers(folder, gpu, graphs=False)
    with copies_elsewhere(gpu):
        assert answers(folder, gpu, graphs=True) == wanted


def test_graphs_that_are_garbage_are_not_collected_in_a_capture(
    gpu: torch.device, folder: Path
) -> None:
    """An engine in a reference cycle goes when the collector runs, here as often as it can."""
    gone = graphed_engine(folder, gpu)
    gone.generate(PROMPTS[:2], 3)
    gone.itself = gone
    engine = graphed_engine(folder, gpu)
    before = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        gc.disable()
        del gone
        gc.enable()
        engine.generate(PROMPTS[:3], 4)
    finally:
        gc.enable()
        gc.set_threshold(*before)
    assert len(engine._model._graphs) == 3


def test_blocks_go_to_the_store_and_come_back_byte_for_byte(
    gpu: torch.device, folder: Path
) -> None:
    layout = layout_of(folder, 16, BF16)
    prompt = PROMPTS[3]
    with KVStore(dram=64 << 20) as store:

        def engine_on(device: torch.device | str) -> Engine:
            held = SessionStore(store, "n", layout)
            return Engine(folder, store=held, num_pages=64, dtype=BF16, device=device)

        first = engine_on(gpu)
        pages = first.pool.storage
        (computed,) = first.generate([prompt], 8)
        second = engine_on(gpu)
        (loaded,) = second.generate([prompt], 8)
        assert loaded.matched_tokens == 48
        assert loaded.token_ids == computed.token_ids
        host = engine_on("cpu")
        (on_host,) = host.generate([prompt], 1)
        assert on_host.matched_tokens == 48
        whole = slice(0, 3)
        assert torch.equal(used(pages)[whole], used(second.pool.storage)[whole])
        assert torch.equal(used(pages)[whole].cpu(), used(host.pool.storage)[whole])


def used(pages: torch.Tensor) -> torch.Tensor:
    """Pages are handed out from the first on."""
    return pages.view(torch.int16)


def test_captures_have_a_stream_that_nobody_else_has(gpu: torch.device) -> None:
    mine = own_stream(torch.empty(0, device=gpu).device)
    assert own_stream(mine.device) is mine
    given = {torch.cuda.Stream(gpu, priority=p).cuda_stream for _ in range(64) for p in (0, -1)}
    assert mine.cuda_stream not in given | {0}
