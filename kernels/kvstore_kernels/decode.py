"""Decode attention over pages: one entry point, which takes the fastest kernel that can.

Two kinds of attention: `gqa`, with keys and values per head, and `mla`, with one latent per token.
`decode_choice` says which kernel is taken, and `explain=True` tells. The choice depends on what is
fixed for a model and a `DecodeWorkspace` and never on lengths, so that a captured graph keeps its
kernel. A kernel's file is imported when it is first chosen.
"""

# ruff: noqa: PLR0917 - attention is called by position: queries, keys, values

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from types import MappingProxyType
from typing import Literal, Protocol, overload

import numpy as np
import numpy.typing as npt
import torch

from kvstore_kernels.checks import require
from kvstore_kernels.decode_choice import Choice, Request, choose
from kvstore_kernels.fused import New, NewLatents, NewTokens, rotate_first

Tensor = torch.Tensor
ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What a query sees, and how it is scored.

    scale: of the scores; None for head_dim ** -0.5, but to be given for latent attention. softcap:
    scores become softcap * tanh(score / softcap). window: how many tokens a query sees, itself
    included; None for all up to itself. score_mod, mask_mod: see `flex_masks`; the first comes
    before the soft cap, and the second hides more than what is outside of the window.
    """

    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scales:
    """By what stored elements are multiplied; None for 1. k, v: (kv_heads,) float32. pages: of
    latents, (pages,) float32."""

    k: Tensor | None = None
    v: Tensor | None = None
    pages: Tensor | None = None


PLAIN = Rules()
UNSCALED = Scales()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """The arguments of one call of `decode_attention`."""

    q: Tensor
    k_pages: Tensor
    v_pages: Tensor | None
    page_table: Tensor
    lengths: Tensor
    rules: Rules
    scales: Scales
    append: New | None
    out: Tensor | None
    check: bool


class _Runner(Protocol):
    """One kernel, for requests that differ in nothing but tensors."""

    def load(self, lengths: npt.NDArray[np.int64]) -> None:
        """For the launches that follow; see `DecodeWorkspace.step`."""

    def run(self, call: _Call) -> Tensor:
        """Launches it."""


class _GqaRunner:
    def __init__(self, request: Request, device: torch.device, fixed: bool) -> None:
        from kvstore_kernels.gqa_form import GqaForm, GqaWorkspace, config_for

        form = GqaForm(
            heads=request.heads,
            kv_heads=request.kv_heads,
            head_dim=request.dim,
            page_tokens=request.page_tokens,
            q_tokens=request.q_tokens,
            dtype=request.dtype,
            kv_dtype=request.kv_dtype,
            scale=request.scale,
            softcap=request.softcap,
            window=request.window,
        )
        config = config_for(form, request.sequences)
        if fixed:  # blocks without work would take longer than finer parts gain
            config = replace(config, extra_waves=1)
        self._workspace = GqaWorkspace(
            form, max_sequences=request.sequences, device=device, config=config
        )
        self._grid = self._workspace.max_items if fixed else None

    def load(self, lengths: npt.NDArray[np.int64]) -> None:
        self._workspace.load(self._workspace.plan(lengths), grid=self._grid)

    def run(self, call: _Call) -> Tensor:
        from kvstore_kernels.gqa_decode import gqa_decode

        assert call.v_pages is not None
        assert not isinstance(call.append, NewLatents)
        return gqa_decode(
            call.q,
            call.k_pages,
            call.v_pages,
            call.page_table,
            call.lengths,
            self._workspace,
            k_scale=call.scales.k,
            v_scale=call.scales.v,
            append=call.append,
            out=call.out,
            check=call.check,
        )


class _GqaRingRunner:
    def __init__(self, request: Request, device: torch.device, _fixed: bool) -> None:
        from kvstore_kernels.gqa_form import GqaForm
        from kvstore_kernels.gqa_ring import GqaRingWorkspace

        form = GqaForm(
            heads=request.heads,
            kv_heads=request.kv_heads,
            head_dim=request.dim,
            page_tokens=request.page_tokens,
            scale=request.scale,
        )
        self._workspace = GqaRingWorkspace(form, max_sequences=request.sequences, device=device)

    def load(self, lengths: npt.NDArray[np.int64]) -> None:
        self._workspace.load(self._workspace.plan(lengths))

    def run(self, call: _Call) -> Tensor:
        from kvstore_kernels.gqa_ring import gqa_decode_ring

        assert call.v_pages is not None
        return gqa_decode_ring(
            call.q,
            call.k_pages,
            call.v_pages,
            call.page_table,
            self._workspace,
            out=call.out,
            check=call.check,
        )


class _FlexRunner:
    def __init__(self, request: Request, device: torch.device, fixed: bool) -> None:
        """Nothing is kept between calls."""

    def load(self, lengths: npt.NDArray[np.int64]) -> None:
        """Lengths are read on the device."""

    def run(self, call: _Call) -> Tensor:
        from kvstore_kernels.flex import flex_attention_paged

        assert call.v_pages is not None
        out = flex_attention_paged(
            call.q,
            call.k_pages,
            call.v_pages,
            call.page_table,
            call.lengths,
            score_mod=_score_mod(call.rules),
            mask_mod=_mask_mod(call.rules, call.q.shape[1]),
            scale=call.rules.scale,
            check=call.check,
        )
        return out if call.out is None else call.out.copy_(out)


def _score_mod(rules: Rules) -> ScoreMod | None:
    from kvstore_kernels.flex_masks import chained, soft_cap

    if rules.softcap is None:
        return rules.score_mod
    cap = soft_cap(rules.softcap)
    return cap if rules.score_mod is None else chained(rules.score_mod, cap)


def _mask_mod(rules: Rules, q_tokens: int) -> MaskMod | None:
    from kvstore_kernels.flex_masks import causal, every, sliding_window

    if rules.window is None and rules.mask_mod is None and q_tokens == 1:
        return None  # the newest token sees all
    ours = causal if rules.window is None else sliding_window(rules.window)
    return ours if rules.mask_mod is None else every(ours, rules.mask_mod)


class _MlaRunner:
    def __init__(self, request: Request, device: torch.device, fixed: bool) -> None:
        from kvstore_kernels.mla_decode import MlaForm, MlaWorkspace

        form = MlaForm(
            heads=request.heads,
            scale=_mla_scale(request),
            q_tokens=request.q_tokens,
            page_tokens=request.page_tokens,
            kv_dtype=request.kv_dtype,
        )
        self._workspace = MlaWorkspace(form, max_sequences=request.sequences, device=device)
        self._grid = self._workspace.max_items if fixed else None

    def load(self, lengths: npt.NDArray[np.int64]) -> None:
        self._workspace.load(self._workspace.plan(lengths), grid=self._grid)

    def run(self, call: _Call) -> Tensor:
        from kvstore_kernels.mla_decode import mla_decode

        assert not isinstance(call.append, NewTokens)
        return mla_decode(
            call.q,
            call.k_pages,
            call.page_table,
            call.lengths,
            self._workspace,
            page_scales=call.scales.pages,
            append=call.append,
            out=call.out,
            check=call.check,
        )


class _MlaTilesRunner:
    def __init__(self, request: Request, device: torch.device, _fixed: bool) -> None:
        from kvstore_kernels.mla_gluon import MlaTilesForm, MlaTilesWorkspace

        form = MlaTilesForm(
            heads=request.heads,
            scale=_mla_scale(request),
            q_tokens=request.q_tokens,
            page_tokens=request.page_tokens,
        )
        self._workspace = MlaTilesWorkspace(form, max_sequences=request.sequences, device=device)

    def load(self, lengths: npt.NDArray[np.int64]) -> None:
        self._workspace.load(self._workspace.plan(lengths))

    def run(self, call: _Call) -> Tensor:
        from kvstore_kernels.mla_gluon import mla_decode_tiles

        return mla_decode_tiles(
            call.q,
            call.k_pages,
            call.page_table,
            self._workspace,
            out=call.out,
            check=call.check,
        )


class _MlaRingRunner:
    def __init__(self, request: Request, device: torch.device, _fixed: bool) -> None:
        from kvstore_kernels.mla_ring import MlaRingForm, MlaRingWorkspace

        form = MlaRingForm(
            heads=request.heads,
            scale=_mla_scale(request),
            q_tokens=request.q_tokens,
            page_tokens=request.page_tokens,
        )
        self._workspace = MlaRingWorkspace(form, max_sequences=request.sequences, device=device)

    def load(self, lengths: npt.NDArray[np.int64]) -> None:
        self._workspace.load(self._workspace.plan(lengths))

    def run(self, call: _Call) -> Tensor:
        from kvstore_kernels.mla_ring import mla_decode_ring

        assert not isinstance(call.append, NewTokens)
        return mla_decode_ring(
            call.q,
            call.k_pages,
            call.page_table,
            self._workspace,
            append=call.append,
            out=call.out,
            check=call.check,
        )


def _mla_scale(request: Request) -> float:
    # Of a latent alone the model's scale cannot be told: it is that of the heads before absorption.
    require(request.scale is not None, "scale", "must be given for latent attention")
    assert request.scale is not None
    return request.scale


RUNNERS: Mapping[str, Callable[[Request, torch.device, bool], _Runner]] = MappingProxyType(
    {
        "gqa_decode": _GqaRunner,
        "gqa_ring": _GqaRingRunner,
        "flex": _FlexRunner,
        "mla_decode": _MlaRunner,
        "mla_gluon": _MlaTilesRunner,
        "mla_ring": _MlaRingRunner,
    }
)


class DecodeWorkspace:
    """What calls on one device and stream keep between them: the step's plan, partial results.

    One serves all layers of a model, also where they differ in form. Calls that may run at the same
    time, on several streams, need one each.

    max_sequences: of a batch. graphs: calls are captured in graphs and replayed after later steps;
    what a kernel launches then is the same for all lengths. Call once with each form before the
    capture.
    """

    def __init__(
        self, *, max_sequences: int, device: torch.device | str, graphs: bool = False
    ) -> None:
        require(max_sequences >= 1, "max_sequences", "must be at least 1")
        self.max_sequences = max_sequences
        self.device = torch.device(device)
        self.graphs = graphs
        self._lengths: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        self._runners: dict[Request, tuple[_Runner, Choice]] = {}

    def step(self, lengths: npt.ArrayLike) -> None:
        """Plans for sequences of these lengths, new tokens included, as the calls' `lengths` are.

        To be called once per step, before its calls or the replay of graphs that have them. Raises
        KernelArgumentError for more sequences than max_sequences, and what a kernel's plan raises.
        """
        counts = np.asarray(lengths, dtype=np.int64)
        require(
            counts.ndim == 1 and len(counts) <= self.max_sequences,
            "lengths",
            f"must be of at most {self.max_sequences} sequences",
        )
        self._lengths = counts
        for runner, _ in self._runners.values():
            runner.load(counts)

    def runner(self, request: Request) -> tuple[_Runner, Choice]:
        """The one for such requests, with the step's plan loaded, and why it is that one."""
        if request not in self._runners:
            choice = choose(request)
            runner = RUNNERS[choice.kernel](request, self.device, self.graphs)
            runner.load(self._lengths)
            self._runners[request] = runner, choice
        return self._runners[request]


@overload
def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor | None,
    page_table: Tensor,
    lengths: Tensor,
    workspace: DecodeWorkspace,
    *,
    rules: Rules = PLAIN,
    scales: Scales = UNSCALED,
    append: New | None = None,
    out: Tensor | None = None,
    check: bool = False,
    explain: Literal[False] = False,
) -> Tensor: ...


@overload
def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor | None,
    page_table: Tensor,
    lengths: Tensor,
    workspace: DecodeWorkspace,
    *,
    rules: Rules = PLAIN,
    scales: Scales = UNSCALED,
    append: New | None = None,
    out: Tensor | None = None,
    check: bool = False,
    explain: Literal[True],
) -> Choice: ...


def decode_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor | None,
    page_table: Tensor,
    lengths: Tensor,
    workspace: DecodeWorkspace,
    *,
    rules: Rules = PLAIN,
    scales: Scales = UNSCALED,
    append: New | None = None,
    out: Tensor | None = None,
    check: bool = False,
    explain: bool = False,
) -> Tensor | Choice:
    """Causal attention of each sequence's newest tokens to its pages, by the fastest kernel.

    q: (batch, q_tokens, heads, dim). k_pages, v_pages: (pages, kv_heads, page_tokens, dim) of any
    pool, as views; for latent attention k_pages is (pages, page_tokens, 576), latent then rope, and
    v_pages None. page_table: (batch, max_pages) int32. lengths: (batch,) int32, tokens of each
    sequence, the new ones included: those that `workspace.step` was told.

    append: the new tokens, if they are not in the pages yet. They are rotated and written there, in
    the same launch where the Choice says so, and else by one of its own before. q then is not
    rotated either; for latent attention its rope part is not read, and may be overwritten.

    Returns (batch, q_tokens, heads, dim of the values): `out`, or a new tensor. With `explain` the
    Choice, and nothing is launched. `check` also checks page numbers and lengths, which waits for
    the GPU. Modifies the workspace, and the pages with `append`. Raises KernelArgumentError for
    what the chosen kernel does not take, and where no kernel can.
    """
    request = _request(q, k_pages, v_pages, workspace, rules, scales)
    if explain:
        return choose(request)
    kind = NewLatents if v_pages is None else NewTokens
    is_kind = append is None or isinstance(append, kind)
    require(is_kind, "append", f"must be {kind.__name__} for such pages")
    runner, choice = workspace.runner(request)
    if append is not None and not choice.appends:
        q, append = rotate_first(q, append, k_pages, v_pages), None
    call = _Call(
        q=q,
        k_pages=k_pages,
        v_pages=v_pages,
        page_table=page_table,
        lengths=lengths,
        rules=rules,
        scales=scales,
        append=append,
        out=out,
        check=check,
    )
    return runner.run(call)


def _request(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor | None,
    workspace: DecodeWorkspace,
    rules: Rules,
    scales: Scales,
) -> Request:
    """What the tensors ask for. Raises KernelArgumentError where they have other dimensions."""
    kv_heads = _kv_heads(q, k_pages, v_pages)
    per_head = scales.k is not None or scales.v is not None
    if v_pages is None:
        require(not per_head, "scales", "must be pages alone for latent attention")
    else:
        require(scales.pages is None, "scales", "must be k and v alone where there are heads")
    return Request(
        attention="mla" if v_pages is None else "gqa",
        heads=q.shape[2],
        kv_heads=kv_heads,
        dim=k_pages.shape[-1],
        page_tokens=k_pages.shape[-2],
        q_tokens=q.shape[1],
        dtype=q.dtype,
        kv_dtype=k_pages.dtype,
        sequences=workspace.max_sequences,
        scale=rules.scale,
        softcap=rules.softcap,
        window=rules.window,
        modified=rules.score_mod is not None or rules.mask_mod is not None,
        scaled=per_head or scales.pages is not None,
        hopper=_is_hopper(q.device),
    )


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def _kv_heads(q: Tensor, k_pages: Tensor, v_pages: Tensor | None) -> int:
    require(q.dim() == 4 and q.shape[1] >= 1, "q", "must be (batch, q_tokens, heads, dim)")
    if v_pages is None:
        require(k_pages.dim() == 3, "k_pages", "must be (pages, page_tokens, dim) without v_pages")
        return 1
    require(k_pages.dim() == 4, "k_pages", "must be (pages, kv_heads, page_tokens, dim)")
    kv_heads, heads = k_pages.shape[1], q.shape[2]
    require(
        heads >= kv_heads >= 1 and heads % kv_heads == 0,
        "q",
        f"must have a multiple of the {kv_heads} KV heads, not {heads} heads",
    )
    return kv_heads
