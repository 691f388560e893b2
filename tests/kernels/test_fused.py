"""Decode that also rotates and writes new tokens, in Triton's interpreter, beside two launches."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from kvstore_kernels import flex, gqa_decode, mla_decode, step
from kvstore_kernels.decode import DecodeWorkspace, Rules, decode_attention
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.fused import New, NewLatents, NewTokens, rotate_first
from kvstore_kernels.gqa_form import GqaConfig, GqaForm, GqaWorkspace
from kvstore_kernels.gqa_reference import gqa_reference
from kvstore_kernels.mla_decode import MlaConfig, MlaForm, MlaWorkspace, config_for
from kvstore_kernels.mla_reference import RANK, WIDTH, mla_reference
from kvstore_kernels.worklist import COLUMNS

BF16 = torch.bfloat16
GQA = GqaForm(
    heads=8, kv_heads=2, head_dim=64, page_tokens=16, dtype=torch.float16, kv_dtype=torch.float16
)
MLA = MlaForm(heads=16, scale=0.07)
# Sequences whose new tokens are in one part, in two, partly before the first token, or nowhere.
LENGTHS = (37, 0, 200, 1, 97, 64, 65, 130)
FINE_GQA = GqaConfig(tile_tokens=32, min_tokens=16, item_tokens=1, merge_elements=1024)
FINE_MLA = MlaConfig(min_tokens=64, item_tokens=1)
POISON = 0x7FFF  # a NaN in either dtype


class Case:
    """Page tables of a few sequences, and where their new tokens are; all pages are NaN, but for
    the tokens before."""

    def __init__(self, form: GqaForm | MlaForm, lengths: tuple[int, ...], dtype: torch.dtype):
        torch.manual_seed(len(lengths) + form.q_tokens)
        self.form, self.dtype, self.counts = form, dtype, np.array(lengths)
        needed = (-(-self.counts // form.page_tokens)).tolist()
        self.n_pages = sum(needed) + 1
        self.table = torch.full((len(lengths), max(needed) + 1), -7, dtype=torch.int32)
        order = torch.randperm(self.n_pages, dtype=torch.int32).split([*needed, 1])
        for row, numbers in zip(self.table, order, strict=False):
            row[: len(numbers)] = numbers
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.shape = (len(lengths), form.q_tokens)
        position = self.lengths[:, None] - form.q_tokens + torch.arange(form.q_tokens)
        column = (position // form.page_tokens).clamp(min=0).long()
        there = position >= 0
        self.page_ids = torch.where(there, self.table.gather(1, column), -1)
        self.offsets = position % form.page_tokens

    def numbers(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape).to(self.dtype)

    def places(self) -> list[tuple[int, int]]:
        """Pages and offsets of all tokens before the new ones."""
        size = self.form.page_tokens
        return [
            (int(self.table[sequence, at // size]), at % size)
            for sequence, length in enumerate(self.counts.tolist())
            for at in range(length - self.form.q_tokens)
        ]

    def angles(self, dim: int) -> dict[str, torch.Tensor]:
        cos, sin = self.numbers(2, *self.shape, dim // 2)
        return {"cos": cos, "sin": sin, "page_ids": self.page_ids, "offsets": self.offsets}


class GqaCase(Case):
    def __init__(
        self,
        form: GqaForm = GQA,
        lengths: tuple[int, ...] = LENGTHS,
        *,
        normed: bool = False,
        interleaved: bool = False,
        workers: int = 9,
    ) -> None:
        super().__init__(form, lengths, form.dtype)
        shape = (self.n_pages, form.kv_heads, 2, form.page_tokens, form.head_dim)
        self.pool = torch.full(shape, POISON, dtype=torch.int16).view(form.dtype)
        for page, offset in self.places():
            self.pool[page, :, :, offset] = self.numbers(form.kv_heads, 2, form.head_dim)
        merged = self.numbers(*self.shape, form.heads + 2 * form.kv_heads, form.head_dim)
        self.q, k, v = merged.split([form.heads, form.kv_heads, form.kv_heads], 2)
        norms = {}
        if normed:
            norms = {"q_norm": self.numbers(form.head_dim), "k_norm": self.numbers(form.head_dim)}
        rest: Any = norms | self.angles(form.head_dim)
        self.new = NewTokens(k=k, v=v, interleaved=interleaved, **rest)
        self.workspace = GqaWorkspace(
            form, max_sequences=len(lengths), device="cpu", config=FINE_GQA, workers=workers
        )
        self.workspace.load(self.workspace.plan(lengths))

    def run(self, pool: torch.Tensor, new: NewTokens | None, q: torch.Tensor) -> torch.Tensor:
        arguments = (*pool.unbind(2), self.table, self.lengths, self.workspace)
        return gqa_decode.gqa_decode(q, *arguments, append=new)

    def twice(self) -> tuple[torch.Tensor, torch.Tensor]:
        """A pool that was written by a launch before, and what float64 says of it."""
        pool = self.pool.clone()
        q = rotate_first(self.q, self.new, *pool.unbind(2))
        return pool, gqa_reference(q, *pool.unbind(2), self.table, self.counts, self.form)


class MlaCase(Case):
    def __init__(
        self,
        form: MlaForm = MLA,
        lengths: tuple[int, ...] = LENGTHS,
        *,
        interleaved: bool = True,
        workers: int = 24,
    ) -> None:
        super().__init__(form, lengths, BF16)
        shape = (self.n_pages, form.page_tokens, WIDTH)
        self.pool = torch.full(shape, POISON, dtype=torch.int16).view(BF16)
        for page, offset in self.places():
            self.pool[page, offset] = self.numbers(WIDTH)
        self.q = self.numbers(*self.shape, form.heads, WIDTH)
        self.q[..., RANK:] = torch.nan  # is not read
        rest: Any = self.angles(WIDTH - RANK)
        self.new = NewLatents(
            q_rope=self.numbers(*self.shape, form.heads, 192)[..., 128:],
            latents=self.numbers(*self.shape, 64 + WIDTH)[..., 64:],
            norm=self.numbers(RANK),
            interleaved=interleaved,
            **rest,
        )
        config = replace(FINE_MLA, rows=config_for(form).rows)
        self.workspace = MlaWorkspace(
            form, max_sequences=len(lengths), device="cpu", config=config, workers=workers
        )
        self.workspace.load(self.workspace.plan(lengths))

    def run(self, pool: torch.Tensor, new: NewLatents | None, q: torch.Tensor) -> torch.Tensor:
        arguments = (pool, self.table, self.lengths, self.workspace)
        return mla_decode.mla_decode(q, *arguments, append=new)

    def twice(self) -> tuple[torch.Tensor, torch.Tensor]:
        """As `GqaCase.twice`."""
        pool = self.pool.clone()
        q = rotate_first(self.q.clone(), self.new, pool, None)
        return pool, mla_reference(q, pool, self.table, self.lengths, scale=self.form.scale)


def check(case: GqaCase | MlaCase, most: float) -> None:
    """In both orders of the blocks."""
    written, want = case.twice()
    items = case.workspace.items
    blocks = (items if isinstance(case, GqaCase) else items[1:])[: case.workspace.grid]
    for order in (slice(None), torch.arange(len(blocks)).flip(0)):
        blocks.copy_(blocks[order].clone())
        pool = case.pool.clone()
        out = case.run(pool, case.new, case.q)
        assert (out.double() - want).norm() <= most * want.norm()
        assert torch.equal(pool.view(torch.int16), written.view(torch.int16))


@pytest.mark.parametrize(
    ("form", "options"),
    [
        pytest.param(GQA, {}, id="plain"),
        pytest.param(GQA, {"workers": 1}, id="whole-sequences"),
        pytest.param(replace(GQA, heads=14), {"normed": True}, id="normed"),
        pytest.param(GQA, {"normed": True, "interleaved": True}, id="interleaved"),
        pytest.param(replace(GQA, q_tokens=4), {"workers": 24}, id="4-new-tokens"),
        pytest.param(replace(GQA, q_tokens=3, page_tokens=48), {}, id="3-new-tokens"),
        pytest.param(replace(GQA, q_tokens=2, window=3), {"normed": True}, id="narrow-window"),
        pytest.param(replace(GQA, heads=16, kv_heads=1, q_tokens=4), {}, id="64-rows"),
        pytest.param(replace(GQA, head_dim=128, softcap=0.7), {"interleaved": True}, id="dim-128"),
    ],
)
def test_one_launch_does_what_two_do(form: GqaForm, options: dict[str, Any]) -> None:
    check(GqaCase(form, **options), 1e-3)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        pytest.param(MLA, {}, id="plain"),
        pytest.param(MLA, {"workers": 1}, id="whole-sequences"),
        pytest.param(replace(MLA, q_tokens=2), {"interleaved": False}, id="32-rows"),
        pytest.param(replace(MLA, heads=20, q_tokens=3), {}, id="60-rows"),
        pytest.param(replace(MLA, heads=3, q_tokens=4, page_tokens=128), {}, id="pages-of-128"),
        pytest.param(replace(MLA, heads=5, q_tokens=2, page_tokens=16), {}, id="pages-of-16"),
    ],
)
def test_one_launch_does_what_two_do_with_latents(form: MlaForm, options: dict[str, Any]) -> None:
    check(MlaCase(form, **options), 4e-3)


def test_new_tokens_may_be_in_two_parts() -> None:
    gqa = GqaCase(replace(GQA, q_tokens=4), (34,), workers=24)
    mla = MlaCase(replace(MLA, heads=4, q_tokens=4, page_tokens=128), (194,))
    for case, cut in ((gqa, 32), (mla, 192)):
        split_at(case, cut)
        check(case, 4e-3)


def split_at(case: GqaCase | MlaCase, cut: int) -> None:
    """Plans the one sequence as two parts."""
    (length,) = case.counts.tolist()
    groups = case.form.kv_heads if isinstance(case.form, GqaForm) else 1
    rows = [
        [0, group, (0, cut)[part], (cut, length)[part], 2 * group + part, group, 2, part, length]
        for part in range(2)
        for group in range(groups)
    ]
    items = np.array(rows, np.int32)
    assert items.shape[1] == COLUMNS
    worklist = replace(case.workspace.plan(case.counts), items=items, n_counters=groups)
    case.workspace.load(replace(worklist, n_partials=2 * groups))


def test_a_place_outside_of_the_pool_is_written_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gqa_decode, mla_decode):
        monkeypatch.setattr(module, "check_places", lambda *_: None)
    for case in (GqaCase(lengths=(40, 50)), MlaCase(lengths=(40, 50))):
        right = case.pool.clone()
        case.run(right, case.new, case.q)
        page_ids, offsets = case.page_ids.clone(), case.offsets.clone()
        for wrong in (-1, case.n_pages, 2**31 - 1):
            page_ids[0] = wrong
            pool = case.pool.clone()
            case.run(pool, replace(case.new, page_ids=page_ids, offsets=offsets), case.q)
            page, offset = case.page_ids[1, 0], case.offsets[1, 0]
            both = [p.view(torch.int16).movedim(-2, 1) for p in (right, pool, case.pool)]
            assert torch.equal(both[0][page, offset], both[1][page, offset])
            both[1][page, offset] = both[2][page, offset]
            assert torch.equal(both[1], both[2])


class Whole:
    """A call of `decode_attention`."""

    def __init__(self, case: GqaCase | MlaCase) -> None:
        self.case = case
        self.workspace = DecodeWorkspace(max_sequences=len(case.counts), device="cpu")
        self.workspace.step(case.counts)

    def run(self, pool: torch.Tensor, new: New, **options: Any) -> Any:
        case = self.case
        k, v = pool.unbind(2) if isinstance(case, GqaCase) else (pool, None)
        arguments = (case.q.clone(), k, v, case.table, case.lengths, self.workspace)
        options = {"rules": Rules(scale=case.form.scale)} | options
        return decode_attention(*arguments, append=new, **options)


@pytest.mark.parametrize("make", [GqaCase, MlaCase])
def test_the_entry_appends_in_the_one_launch(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make()
    written, want = case.twice()
    whole, pool = Whole(case), case.pool.clone()
    assert whole.run(pool, case.new, explain=True).appends
    for name in ("rope_append_kernel", "rope_append_latent_kernel"):
        monkeypatch.setattr(step, name, None)
    out = whole.run(pool, case.new)
    assert (out.double() - want).norm() <= 4e-3 * want.norm()
    assert torch.equal(pool.view(torch.int16), written.view(torch.int16))


def test_a_kernel_that_cannot_append_gets_a_launch_before(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def flexed(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        calls.append(q)
        return q

    monkeypatch.setattr(flex, "flex_attention_paged", flexed)
    case = GqaCase(replace(GQA, q_tokens=2))
    rules = Rules(mask_mod=lambda *_: True)
    written = case.pool.clone()
    q = rotate_first(case.q, case.new, *written.unbind(2))
    whole, pool = Whole(case), case.pool.clone()
    assert not whole.run(pool, case.new, rules=rules, explain=True).appends
    whole.run(pool, case.new, rules=rules)
    assert torch.equal(calls[0], q)
    assert torch.equal(pool.view(torch.int16), written.view(torch.int16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": lambda t: t[:, :, :1]}, "append.k must have shape"),
        ({"v": lambda t: t.bfloat16()}, "append.v must be float16"),
        ({"cos": lambda t: t[..., :8]}, "append.cos must have shape"),
        ({"sin": lambda t: t.float()}, "append.sin must be float16"),
        ({"sin": lambda t: t[:, :1].expand(t.shape)}, "append.sin must have cos's strides"),
        ({"page_ids": lambda t: t.short()}, "append.page_ids must be int64, int32"),
        ({"offsets": lambda t: t.repeat(1, 2)[:, :2]}, "append.offsets must be contiguous"),
        ({"page_ids": lambda t: t.flip(0)}, "append.page_ids must have the page table's places"),
        ({"offsets": lambda t: t + 1}, "append.page_ids must have the page table's places"),
        ({"q_norm": lambda _: None}, "append.k_norm must be there with q_norm"),
        ({"k_norm": lambda t: t[:8]}, "append.k_norm must have shape"),
        (
            {"k": lambda t: torch.cat([t, t], -1)[..., 1:65], "interleaved": lambda _: True},
            "append.k must have pairs that begin at whole 4 bytes",
        ),
    ],
)
def test_wrong_new_tokens_are_named(change: dict[str, Any], message: str) -> None:
    case = GqaCase(replace(GQA, q_tokens=2), (40, 50), normed=True)
    changed = {name: alter(getattr(case.new, name)) for name, alter in change.items()}
    with pytest.raises(KernelArgumentError, match=message):
        case.run(case.pool, replace(case.new, **changed), case.q)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_rope": lambda t: t[:, :, :1]}, "append.q_rope must have shape"),
        ({"latents": lambda t: t[..., :64]}, "append.latents must have shape"),
        ({"norm": lambda t: t.float()}, "append.norm must be bfloat16"),
        ({"page_ids": lambda t: t + 1}, "append.page_ids must have the page table's places"),
    ],
)
def test_wrong_new_latents_are_named(change: dict[str, Any], message: str) -> None:
    case = MlaCase(MLA, (40, 50))
    changed = {name: alter(getattr(case.new, name)) for name, alter in change.items()}
    with pytest.raises(KernelArgumentError, match=message):
        case.run(case.pool, replace(case.new, **changed), case.q)


def test_what_cannot_be_appended_to_is_refused() -> None:
    gqa, mla = GqaCase(), MlaCase()
    with pytest.raises(KernelArgumentError, match="append must be NewTokens for such pages"):
        Whole(gqa).run(gqa.pool, mla.new)
    with pytest.raises(KernelArgumentError, match="append must be NewLatents for such pages"):
        Whole(mla).run(mla.pool, gqa.new)
    with pytest.raises(KernelArgumentError, match="append must be without scales"):
        gqa_decode.gqa_decode(
            *(gqa.q, *gqa.pool.unbind(2), gqa.table, gqa.lengths, gqa.workspace),
            append=gqa.new,
            k_scale=torch.ones(2),
        )
    pages = torch.zeros(gqa.pool.shape, dtype=torch.float8_e4m3fn).unbind(2)
    form = replace(GQA, kv_dtype=torch.float8_e4m3fn)
    workspace = GqaWorkspace(form, max_sequences=len(LENGTHS), device="cpu")
    workspace.load(workspace.plan(LENGTHS))
    arguments = (gqa.q, *pages, gqa.table, gqa.lengths, workspace)
    with pytest.raises(KernelArgumentError, match="append must be for pages of q's dtype"):
        gqa_decode.gqa_decode(*arguments, append=gqa.new)
    two = MlaCase(replace(MLA, q_tokens=2))
    apart = torch.empty(len(LENGTHS), 3, MLA.heads, WIDTH, dtype=BF16)[:, :2]
    with pytest.raises(KernelArgumentError, match="q must have its tokens evenly spaced"):
        rotate_first(apart, two.new, two.pool, None)
