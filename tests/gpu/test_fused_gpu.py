"""Decode that also writes new tokens, on a GPU: beside two launches and float64, many times, in
graphs."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvstore_kernels.decode import DecodeWorkspace, Rules, decode_attention
from kvstore_kernels.fused import New, NewLatents, NewTokens, rotate_first
from kvstore_kernels.gqa_form import GqaForm
from kvstore_kernels.gqa_reference import gqa_reference
from kvstore_kernels.mla_decode import MlaForm
from kvstore_kernels.mla_reference import RANK, WIDTH, mla_reference

LLAMA = GqaForm(heads=32, kv_heads=8, head_dim=128, page_tokens=16)
RANK_OF_8 = MlaForm(heads=16, scale=192**-0.5)  # what one of eight ranks has of 128 heads
RAGGED = (37, 0, 2600, 1, 129, 16384, 15, 777, 64, 65, 4097, 2)
SHORT = tuple(range(1, 1400, 3))
NAN = 0x7FFF  # in bfloat16
MOST_ERROR = 5e-3
REPEATS = 100
SECONDS = 120  # for a first launch, compilation included


class Case:
    """Pages whose tokens before the new ones are random, and all others NaN; layers of a pool."""

    def __init__(self, form: GqaForm | MlaForm, lengths: tuple[int, ...], **options: bool) -> None:
        self.form, self.counts = form, np.array(lengths)
        torch.manual_seed(3)
        self.normed = options.get("normed", False)
        self.interleaved = options.get("interleaved", isinstance(form, MlaForm))
        needed = (-(-self.counts // form.page_tokens)).tolist()
        self.n_pages = sum(needed) + 1
        order = torch.randperm(self.n_pages, dtype=torch.int32).split([*needed, 1])
        table = torch.full((len(lengths), max(needed)), -7, dtype=torch.int32)
        for row, numbers in zip(table, order, strict=False):
            row[: len(numbers)] = numbers
        self.table = table.cuda()
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        position = self.lengths[:, None] - form.q_tokens + torch.arange(form.q_tokens).cuda()
        column = (position // form.page_tokens).clamp(min=0).long()
        self.page_ids = torch.where(position >= 0, self.table.gather(1, column), -1).long()
        self.offsets = (position % form.page_tokens).long()
        self.places = (self.page_ids[position >= 0], self.offsets[position >= 0])
        self.shape = (len(lengths), form.q_tokens)
        self.pool, self.q, self.new = self._latents() if self._latent else self._tokens()
        self._spoil(table)
        self.workspace = DecodeWorkspace(
            max_sequences=len(lengths), device="cuda", graphs=options.get("graphs", False)
        )
        self.workspace.step(lengths)

    @property
    def _latent(self) -> bool:
        return isinstance(self.form, MlaForm)

    def _angles(self, dim: int) -> dict[str, Any]:
        cos, sin = numbers(2, *self.shape, dim // 2)
        places = {"page_ids": self.page_ids, "offsets": self.offsets}
        return {"cos": cos, "sin": sin, "interleaved": self.interleaved, **places}

    def _tokens(self) -> tuple[torch.Tensor, torch.Tensor, New]:
        form = self.form
        assert isinstance(form, GqaForm)
        pool = numbers(self.n_pages, form.kv_heads, 2, 2, form.page_tokens, form.head_dim)
        heads = [form.heads, form.kv_heads, form.kv_heads]
        q, k, v = numbers(*self.shape, sum(heads), form.head_dim).split(heads, 2)
        norms = {}
        if self.normed:
            norms = {"q_norm": numbers(form.head_dim), "k_norm": numbers(form.head_dim)}
        return pool[:, :, 1], q, NewTokens(k=k, v=v, **norms, **self._angles(form.head_dim))

    def _latents(self) -> tuple[torch.Tensor, torch.Tensor, New]:
        form = self.form
        pool = numbers(self.n_pages, 2, form.page_tokens, WIDTH)[:, 1]
        q = numbers(*self.shape, form.heads, WIDTH)
        new = NewLatents(
            q_rope=numbers(*self.shape, form.heads, 192)[..., 128:],
            latents=numbers(*self.shape, 1536 + WIDTH)[..., 1536:],
            norm=numbers(RANK),
            **self._angles(WIDTH - RANK),
        )
        return pool, q, new

    def _spoil(self, table: torch.Tensor) -> None:
        """All that is not of a token before the new ones."""
        size = self.form.page_tokens
        kept = torch.zeros(self.n_pages, size, dtype=torch.bool)
        for row, length in zip(table, self.counts.tolist(), strict=True):
            at = torch.arange(max(length - self.form.q_tokens, 0))
            kept[row[at // size].long(), at % size] = True
        spoilt = ~kept.cuda()
        rows = self.pool if self._latent else self.pool.movedim(-2, 1)
        rows[spoilt] = torch.full((), NAN, dtype=torch.int16).view(torch.bfloat16).item()

    def run(self, pool: torch.Tensor, new: New | None, q: torch.Tensor) -> torch.Tensor:
        k, v = (pool, None) if self._latent else pool.unbind(2)
        rules = Rules(scale=getattr(self.form, "scale", None))
        arguments = (q, k, v, self.table, self.lengths, self.workspace)
        return decode_attention(*arguments, rules=rules, append=new)

    def written(self, pool: torch.Tensor) -> torch.Tensor:
        """The new tokens' bits, as numbers whose neighbours are neighbours."""
        rows = pool if self._latent else pool.movedim(-2, 1)
        return rows[self.places].contiguous().view(torch.int16).int()

    def twice(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(bits, output) of two launches, and float64's output, of which the first has most."""
        pool = self.pool.clone()
        k, v = (pool, None) if self._latent else pool.unbind(2)
        q = rotate_first(self.q.clone(), self.new, k, v)
        out = self.run(pool, None, q)
        if isinstance(self.form, GqaForm):
            want = gqa_reference(q, k, v, self.table, self.counts, self.form)
        else:
            want = mla_reference(q, pool, self.table, self.lengths, scale=self.form.scale)
        return self.written(pool), out, want


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def launch_that_ends(gpu: torch.device) -> torch.device:
    """A first launch is in a process which is ended when it takes long."""
    subprocess.run([sys.executable, __file__], timeout=SECONDS, check=True)
    return gpu


FORMS = [
    pytest.param(LLAMA, {}, id="llama"),
    pytest.param(replace(LLAMA, q_tokens=4), {}, id="llama-4-new"),
    pytest.param(replace(LLAMA, q_tokens=3, page_tokens=64), {}, id="pages-of-64"),
    pytest.param(LLAMA, {"normed": True}, id="normed"),
    pytest.param(LLAMA, {"normed": True, "interleaved": True}, id="interleaved"),
    pytest.param(replace(LLAMA, heads=128, q_tokens=4), {}, id="64-rows"),
    pytest.param(replace(LLAMA, head_dim=64, heads=9, kv_heads=3), {}, id="dim-64"),
    pytest.param(replace(LLAMA, head_dim=256, heads=16, kv_heads=2), {}, id="dim-256"),
    pytest.param(RANK_OF_8, {}, id="latents"),
    pytest.param(RANK_OF_8, {"interleaved": False}, id="latents-halves"),
    pytest.param(replace(RANK_OF_8, q_tokens=2), {}, id="latents-2-new"),
    pytest.param(replace(RANK_OF_8, heads=5, q_tokens=4, page_tokens=128), {}, id="pages-of-128"),
    pytest.param(replace(RANK_OF_8, page_tokens=16), {}, id="latents-pages-of-16"),
    pytest.param(replace(RANK_OF_8, heads=128), {}, id="latents-128-heads"),
]


@pytest.mark.parametrize("lengths", [RAGGED, SHORT], ids=["ragged", "short"])
@pytest.mark.parametrize(("form", "options"), FORMS)
def test_one_launch_does_what_two_do(form, options, lengths):
    case = Case(form, lengths, **options)
    bits, two, want = case.twice()
    pool = case.pool.clone()
    out = case.run(pool, case.new, case.q.clone())
    apart = (case.written(pool) - bits).abs()
    # A norm's sum is taken in another order: a last bit may differ, in few places.
    assert int(apart.max()) <= int(case.normed or case._latent)
    assert (apart > 0).float().mean() < 1e-2
    for result in (two, out):
        assert (result.double() - want).norm() <= MOST_ERROR * want.norm()
    rows = pool if case._latent else pool.movedim(-2, 1)
    before = case.pool if case._latent else case.pool.movedim(-2, 1)
    rows[case.places] = before[case.places]
    assert torch.equal(pool.view(torch.int16), case.pool.view(torch.int16)), "more was written"


@pytest.mark.parametrize(("form", "options"), [*FORMS[:5], *FORMS[8:13]])
def test_a_hundred_launches_give_the_same_bits(form, options):
    case = Case(form, RAGGED, **options)
    pool = case.pool.clone()
    first = case.run(pool, case.new, case.q).clone()
    bits = case.written(pool)
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        pool.copy_(case.pool)  # new tokens are NaN again
        differ += (case.run(pool, case.new, case.q) != first).sum()
        differ += (case.written(pool) != bits).sum()
    assert int(differ) == 0


@pytest.mark.parametrize("form", [LLAMA, RANK_OF_8], ids=["llama", "latents"])
def test_a_graph_is_replayed_for_other_lengths(form):
    case = Case(form, (700, 3000, 17), graphs=True)
    pool = case.pool.clone()
    case.run(pool, case.new, case.q)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = case.run(pool, case.new, case.q)
    for lengths in ((700, 3000, 17), (16, 2050, 1), (0, 1, 5)):
        other = Case(form, (700, 3000, 17))
        short = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        position = short[:, None] - 1
        column = (position // form.page_tokens).clamp(min=0).long()
        case.page_ids.copy_(torch.where(position >= 0, case.table.gather(1, column), -1))
        case.offsets.copy_(position % form.page_tokens)
        case.lengths.copy_(short)
        case.workspace.step(lengths)
        pool.copy_(other.pool)
        graph.replay()
        again = other.pool.clone()
        eager = DecodeWorkspace(max_sequences=3, device="cuda")
        eager.step(lengths)
        case.workspace, kept = eager, case.workspace
        wanted = case.run(again, case.new, case.q)
        case.workspace = kept
        assert not out.isnan().any()
        assert (out.double() - wanted.double()).norm() <= MOST_ERROR * wanted.double().norm()
        assert torch.equal(pool.view(torch.int16), again.view(torch.int16))


@pytest.mark.parametrize("name", ["llama", "deepseek"])
@torch.inference_mode()
def test_a_model_has_a_launch_less_a_layer(name):
    pytest.importorskip("safetensors")
    from benchmarks.gpu.launches import MODELS, kernels_in, make_step, random_weights
    from kvstore_engines.kernel_attention import KernelAttention
    from kvstore_engines.kernel_ops import KernelOps

    class InTwo(KernelAttention):
        def append_grouped(self, *_: Any, **__: Any) -> None:
            """Never in one launch."""

        append_latent = append_grouped

    few = {"heads": 16, "kv_heads": 16} if name == "deepseek" else {}
    config = replace(MODELS[name], layers=2, **few)
    weights = random_weights(config)
    logits, launches = [], []
    for attention in (InTwo(), KernelAttention()):
        step = make_step(config, weights, KernelOps(), attention)
        logits.append(step().double())
        launches.append(kernels_in(step))
    assert launches[0] - launches[1] == config.layers
    assert (logits[1] - logits[0]).norm() <= 2e-2 * logits[0].norm()


if __name__ == "__main__":
    for first in (LLAMA, RANK_OF_8):
        one = Case(first, RAGGED)
        one.run(one.pool, one.new, one.q)
    torch.cuda.synchronize()
