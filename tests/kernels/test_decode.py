"""The entry point: which kernel is taken and why, and that it gets what was asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from kvstore_kernels import decode, decode_choice, flex, gqa_decode
from kvstore_kernels.decode import DecodeWorkspace, Rules, Scales, decode_attention
from kvstore_kernels.decode_choice import Request, Timing, choose
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.flex_masks import sliding_window
from kvstore_kernels.gqa_form import GqaForm
from kvstore_kernels.gqa_reference import gqa_reference
from kvstore_kernels.mla_reference import mla_reference

FP8 = torch.float8_e4m3fn
BF16 = torch.bfloat16
GQA = Request(
    attention="gqa",
    heads=32,
    kv_heads=8,
    dim=128,
    page_tokens=16,
    q_tokens=1,
    dtype=BF16,
    kv_dtype=BF16,
    sequences=64,
)
MLA = replace(GQA, attention="mla", heads=128, kv_heads=1, dim=576, page_tokens=64, scale=0.1)
LENGTHS = (20, 1, 70)


@pytest.mark.parametrize(
    ("request_", "kernel"),
    [
        (GQA, "gqa_ring"),
        (replace(GQA, sequences=16), "gqa_decode"),
        (replace(GQA, hopper=False), "gqa_decode"),
        (replace(GQA, kv_heads=4), "gqa_decode"),
        (replace(GQA, heads=128), "gqa_decode"),
        (replace(GQA, page_tokens=24), "gqa_decode"),
        (replace(GQA, kv_dtype=FP8, scaled=True), "gqa_decode"),
        (replace(GQA, softcap=30.0, window=1024, q_tokens=4), "gqa_decode"),
        (replace(GQA, modified=True), "flex"),
        (replace(GQA, dim=80), "flex"),
        (replace(GQA, q_tokens=5), "flex"),
        (replace(GQA, heads=256), "flex"),
        (replace(GQA, page_tokens=256), "flex"),
        (replace(GQA, dtype=torch.float32, kv_dtype=torch.float32), "flex"),
        (MLA, "mla_gluon"),
        (replace(MLA, heads=16), "mla_ring"),
        (replace(MLA, heads=32), "mla_decode"),
        (replace(MLA, heads=4, q_tokens=4, page_tokens=128), "mla_ring"),
        (replace(MLA, heads=16, page_tokens=16), "mla_decode"),
        (replace(MLA, heads=16, q_tokens=4), "mla_gluon"),
        (replace(MLA, page_tokens=32), "mla_decode"),
        (replace(MLA, kv_dtype=FP8, scaled=True), "mla_decode"),
        (replace(MLA, hopper=False), "mla_decode"),
        (replace(MLA, hopper=False, heads=16), "mla_decode"),
    ],
)
def test_the_kernel_is_one_that_can(request_, kernel):
    choice = choose(request_)
    assert choice.kernel == kernel
    assert kernel not in choice.refused


@pytest.mark.parametrize(
    ("request_", "reasons"),
    [
        (replace(GQA, kv_dtype=FP8, modified=True), ["has no score_mod", "takes pages of q's"]),
        (replace(MLA, softcap=1.0), ["mla_gluon: has no soft cap", "mla_decode: has no soft cap"]),
        (replace(MLA, dim=512), ["takes latents of 576 elements"]),
        (replace(MLA, dtype=torch.float16), ["takes queries in bfloat16"]),
    ],
)
def test_where_none_can_all_say_why(request_, reasons):
    with pytest.raises(KernelArgumentError) as raised:
        choose(request_)
    for reason in reasons:
        assert reason in str(raised.value)


def test_the_choice_says_why():
    choice = choose(replace(GQA, sequences=3))
    assert "4 rows, 1 x 4096 tokens: gqa_decode" in choice.reason
    assert not choice.refused
    choice = choose(replace(GQA, modified=True))
    assert choice.reason == "the only kernel that can"
    no_mods = "has no score_mod or mask_mod"
    assert choice.refused == {"gqa_decode": no_mods, "gqa_ring": no_mods}


def test_the_nearest_measurement_decides(monkeypatch):
    timings = (
        Timing("gqa", 4, 1, 4096, {"gqa_decode": 2.0, "flex": 1.0}),
        Timing("gqa", 4, 64, 4096, {"gqa_decode": 1.0, "flex": 2.0}),
        Timing("gqa", 4, 32, 4096, {"gqa_decode": 9.0}),
        Timing("mla", 4, 32, 4096, {"gqa_decode": 9.0, "flex": 1.0}),
    )
    monkeypatch.setattr(decode_choice, "MEASURED", timings)
    kernels = [choose(replace(GQA, sequences=n, hopper=False)).kernel for n in (1, 7, 9, 500)]
    assert kernels == ["flex", "flex", "gqa_decode", "gqa_decode"]
    monkeypatch.setattr(decode_choice, "MEASURED", ())
    assert choose(GQA).reason == "not measured beside the others"


@pytest.mark.parametrize(
    ("request_", "appends"),
    [
        (replace(GQA, sequences=1), True),
        (replace(GQA, sequences=16, q_tokens=4), True),
        (replace(GQA, sequences=64), False),
        (replace(GQA, sequences=1, kv_dtype=FP8), False),
        (replace(GQA, sequences=1, scaled=True), False),
        (replace(GQA, sequences=1, modified=True), False),
        (MLA, False),
        (replace(MLA, heads=16), True),
        (replace(MLA, heads=16, sequences=1), True),
        (replace(MLA, heads=32, sequences=1), False),
        (replace(MLA, heads=16, kv_dtype=FP8, scaled=True), False),
    ],
)
def test_new_tokens_are_appended_where_that_is_faster(request_, appends):
    assert choose(request_).appends is appends


def test_every_kernel_of_the_registry_can_be_run():
    names = {name for kernels in decode_choice.KERNELS.values() for name in kernels}
    assert names == decode.RUNNERS.keys()
    assert names >= decode_choice.APPENDED.keys()
    assert names >= {name for timing in decode_choice.MEASURED for name in timing.us}


class Case:
    """Queries and pages of a few sequences, one page after another."""

    def __init__(self, dtype: torch.dtype = torch.float16, q_tokens: int = 1) -> None:
        torch.manual_seed(5)
        self.q = torch.randn(3, q_tokens, 4, 64).to(dtype)
        pool = torch.randn(10, 2, 2, 16, 64).to(dtype)
        self.k, self.v = pool.unbind(2)
        self.table = torch.tensor([[3, 1, 0, 0, 0], [2, 0, 0, 0, 0], [4, 9, 8, 6, 5]]).int()
        self.lengths = torch.tensor(LENGTHS, dtype=torch.int32)
        self.workspace = DecodeWorkspace(max_sequences=3, device="cpu")
        self.workspace.step(LENGTHS)

    def run(self, **options: Any) -> Any:
        return decode_attention(
            self.q, self.k, self.v, self.table, self.lengths, self.workspace, **options
        )

    def error(self, out: torch.Tensor, rules: Rules = decode.PLAIN, **scales: Any) -> float:
        form = GqaForm(
            heads=4,
            kv_heads=2,
            head_dim=64,
            page_tokens=16,
            q_tokens=self.q.shape[1],
            dtype=torch.float16,
            kv_dtype=torch.float16,
            scale=rules.scale,
            softcap=rules.softcap,
            window=rules.window,
        )
        counts = self.lengths.numpy()
        want = gqa_reference(self.q, self.k, self.v, self.table, counts, form, **scales)
        return float((out.double() - want).norm() / want.norm())


def test_grouped_attention():
    case = Case(q_tokens=2)
    rules = Rules(scale=0.2, softcap=2.0, window=30)
    scales = {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": torch.tensor([3.0, 0.1])}
    out = torch.full_like(case.q, torch.nan)
    got = case.run(
        rules=rules, scales=Scales(k=scales["k_scale"], v=scales["v_scale"]), out=out, check=True
    )
    assert got is out
    assert case.error(out, rules, **scales) < 1e-3


def test_explaining_launches_nothing(monkeypatch):
    monkeypatch.setattr(gqa_decode, "gqa_decode", None)
    assert Case().run(explain=True).kernel == "gqa_decode"


def test_latent_attention():
    torch.manual_seed(6)
    q = torch.randn(2, 1, 4, 576).bfloat16()
    pages = torch.randn(4, 16, 576).bfloat16()
    table = torch.tensor([[2, 0], [3, 1]], dtype=torch.int32)
    lengths = torch.tensor([20, 9], dtype=torch.int32)
    workspace = DecodeWorkspace(max_sequences=2, device="cpu")
    workspace.step(lengths)
    rules = Rules(scale=0.05)
    out = decode_attention(q, pages, None, table, lengths, workspace, rules=rules)
    want = mla_reference(q, pages, table, lengths, scale=0.05)
    assert (out.double() - want).norm() / want.norm() < 2e-2
    with pytest.raises(KernelArgumentError, match="scale must be given for latent attention"):
        decode_attention(q, pages, None, table, lengths, workspace)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_step_plans_for_all_calls_that_follow(graphs):
    case = Case()
    case.workspace = DecodeWorkspace(max_sequences=3, device="cpu", graphs=graphs)
    for lengths in (LENGTHS, (1, 2, 3), (32, 0, 80)):
        case.workspace.step(lengths)
        case.lengths = torch.tensor(lengths, dtype=torch.int32)
        assert case.error(case.run()) < 1e-3


def test_flex_gets_the_rules_as_mods(monkeypatch):
    calls = []

    def flexed(q: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        calls.append(options)
        return torch.ones_like(q)

    monkeypatch.setattr(flex, "flex_attention_paged", flexed)
    case = Case(torch.float32)
    out = torch.empty_like(case.q)
    assert case.run(out=out) is out
    assert (out == 1).all()
    assert calls[-1] == {"score_mod": None, "mask_mod": None, "scale": None, "check": False}

    case = Case(torch.float32, q_tokens=2)
    case.run(rules=Rules(scale=0.5))
    assert calls[-1]["scale"] == 0.5
    assert seen(calls[-1]["mask_mod"], 5) == set(range(6))

    def even(batch: Any, head: Any, query: Any, key: Any) -> Any:
        return key % 2 == 0

    def doubled(score: Any, *_: Any) -> Any:
        return 2 * score

    case.run(rules=Rules(window=3, softcap=1.0, mask_mod=even, score_mod=doubled))
    assert seen(calls[-1]["mask_mod"], 6) == {4, 6}
    score = calls[-1]["score_mod"](torch.tensor(0.25), 0, 0, 0, 0)
    assert torch.isclose(score, torch.tensor(0.5).tanh())
    case.run(rules=Rules(mask_mod=sliding_window(2)))
    assert seen(calls[-1]["mask_mod"], 6) == {5, 6}


def seen(mask: Any, query: int) -> set[int]:
    """Keys among the first ten that a query sees."""
    return {key for key in range(10) if mask(0, 0, torch.tensor(query), torch.tensor(key))}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: setattr(c, "q", c.q[:, 0]), "q must be .batch, q_tokens"),
        (lambda c: setattr(c, "q", c.q[:, :, :3]), "q must have a multiple of the 2 KV heads"),
        (lambda c: setattr(c, "k", c.k[0]), "k_pages must be .pages, kv_heads"),
        (lambda c: setattr(c, "v", None), "k_pages must be .pages, page_tokens, dim. without"),
        (lambda c: setattr(c, "table", c.table + 100), "page_table must have numbers of the pool"),
        (lambda c: c.workspace.step([1, 2, 3, 4]), "lengths must be of at most 3 sequences"),
        (lambda c: c.workspace.step([[1]]), "lengths must be of at most 3 sequences"),
        (lambda c: c.workspace.step([1, 1]), "q must have the work list's 2 sequences"),
        (lambda c: DecodeWorkspace(max_sequences=0, device="cpu"), "max_sequences must be"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    def changed() -> None:
        case = Case()
        change(case)
        case.run()

    with pytest.raises(KernelArgumentError, match=message):
        changed()


def test_scales_are_those_of_the_attention():
    case = Case()
    with pytest.raises(KernelArgumentError, match="scales must be k and v alone"):
        case.run(scales=Scales(pages=torch.ones(10)))
    case.k, case.v = case.k[:, 0], None
    with pytest.raises(KernelArgumentError, match="scales must be pages alone"):
        case.run(scales=Scales(k=torch.ones(2)))
