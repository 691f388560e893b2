"""The thin engines on a GPU: their pages there, the decode kernels, and a store on the host."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engines.wide import PROMPTS, save_wide, save_wide_latent

from kvstore import KVStore
from kvstore_engines import kernel_graphs
from kvstore_engines.adapter import SessionStore
from kvstore_engines.attention import TorchAttention, make_batch
from kvstore_engines.engine import Engine
from kvstore_engines.kernel_attention import KernelAttention
from kvstore_engines.kernel_graphs import GraphedModel
from kvstore_engines.layouts import layout_of

MODELS = {"llama": save_wide, "deepseek_v3": save_wide_latent}
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
    engine = Engine(folder, store=None, num_pages=64, dtype=BF16, device=gpu, attention=compared)
    engine.generate(PROMPTS, 12)
    assert compared.calls > 2 * 11
    assert compared.worst < 1e-2


def graphed_engine(folder: Path, gpu: torch.device) -> Engine:
    engine = Engine(folder, store=None, num_pages=256, dtype=BF16, device=gpu)
    engine._model = GraphedModel(engine._model, engine._model._attention)
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
    assert all(graph._graph is not None for graph in model._graphs.values())
    assert pool is engine.pool


def test_the_graphs_that_were_used_longest_ago_go(
    gpu: torch.device, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_graphs, "MOST_GRAPHS", 2)
    engine = graphed_engine(folder, gpu)
    for prompts in (PROMPTS[:1], PROMPTS[:2], PROMPTS[:3], PROMPTS[:1]):
        engine.generate(prompts, 4)
    assert len(engine._model._graphs) == 2


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


def test_a_gpu_takes_kernels_by_itself(gpu: torch.device, folder: Path) -> None:
    engine = Engine(folder, store=None, num_pages=64, dtype=BF16, device=gpu)
    assert isinstance(engine._model._attention, KernelAttention)


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
