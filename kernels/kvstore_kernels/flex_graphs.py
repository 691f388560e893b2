"""The graphs that torch compiles for `flex`: few queries over pages in place, many over a copy.

Each combination of shapes, options and mods has a graph with a code object of its own, because
torch stops compiling one after eight. On a CPU the same graphs run as they are, uncompiled.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from kvstore_kernels.flex_masks import Band, MaskMod, ScoreMod
from kvstore_kernels.flex_plan import BLOCK, BandBlocks, PagePlan

Tensor = torch.Tensor
Graph = Callable[..., Tensor]
COMPILED = 256  # graphs that are kept


class Mods(NamedTuple):
    """What a caller wants done to scores, in positions."""

    score: ScoreMod | None
    mask: MaskMod | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a graph is made for, apart from the shapes of its tensors.

    queries: rows of a sequence. group: query heads that share a KV head. padded: the same, rounded
    up to a power of two as the decoding kernel needs it. unit: see `unit_of`. dense: whether all
    keys of the pool are looked at, as on a CPU, and not only the listed blocks.
    """

    queries: int
    group: int
    padded: int
    page_tokens: int
    unit: int
    band: Band
    scale: float
    dense: bool


class _Positions(NamedTuple):
    """Turns what the kernel counts into positions, which are always inside of the sequence, so that
    mods may look up anything by them. span: tokens from one page to the next, in the kernel's
    sequence."""

    plan: PagePlan
    form: Form
    span: int

    def query(self, batch: Tensor, row: Tensor) -> Tensor:
        return _inside(self.plan.first[batch] + row, self.plan.lengths[batch])

    def key(self, batch: Tensor, token: Tensor) -> Tensor:
        page, slot = _divided(token, self.span)
        position = self.plan.places[batch, page] * self.form.page_tokens + slot
        return _inside(position, self.plan.lengths[batch])

    def head(self, head: Tensor) -> Tensor:
        group, padded = self.form.group, self.form.padded
        if group == padded:
            return head
        return head // padded * group + (head % padded).clamp(max=group - 1)

    def seen(self, batch: Tensor, token: Tensor) -> Tensor:
        """Whether the sequence has the token: all those of its pages but the last one's rest."""
        into_last = token - self.plan.last[batch]
        seen = (into_last < self.plan.tail[batch]) | (into_last >= self.form.page_tokens)
        if not self.form.dense:
            return seen
        page, slot = _divided(token, self.span)
        return seen & (self.plan.places[batch, page] >= 0) & (slot < self.form.page_tokens)


@lru_cache(maxsize=COMPILED)
def decode_graph(form: Form, kernel_options: tuple[tuple[str, Any], ...], like: Hashable) -> Graph:
    """graph(q, k, v, plan, mods): q is (batch, queries, heads, dim), k and v pools as sequences.

    kernel_options: torch's, as items. like: `structure` of the arguments.
    """
    del like
    options = dict(kernel_options)

    def attend(q: Tensor, k: Tensor, v: Tensor, plan: PagePlan, mods: Mods) -> Tensor:
        at = _Positions(plan, form, form.page_tokens * form.unit)

        def mask(batch: Tensor, head: Tensor, row: Tensor, token: Tensor) -> Tensor:
            seen = at.seen(batch, token)
            if mods.mask is None:
                return seen
            key = at.key(batch, token)
            return seen & mods.mask(batch, at.head(head), at.query(batch, row), key)

        def score(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, token: Tensor) -> Tensor:
            if mods.score is None:
                return score
            key = at.key(batch, token)
            return mods.score(score, batch, at.head(head), at.query(batch, row), key)

        blocks = BlockMask.from_kv_blocks(
            plan.counts,
            plan.blocks,
            BLOCK_SIZE=(BLOCK, form.page_tokens),
            mask_mod=mask,
            seq_lengths=(form.queries, k.shape[2]),
            compute_q_blocks=False,
        )
        out = flex_attention(
            _padded_groups(q.transpose(1, 2), form),
            k,
            v,
            score_mod=score,
            block_mask=blocks,
            scale=form.scale,
            enable_gqa=True,
            kernel_options=cast(Any, options),
        )
        return _only_queries(_own_heads(out, form).transpose(1, 2), plan)

    return _compiled(attend, dense=form.dense)


@lru_cache(maxsize=COMPILED)
def prefill_graph(form: Form, like: Hashable) -> Graph:
    """graph((q, k_pages, v_pages), table, lists, plan, mods): q is (batch, rows, heads, dim), its
    rows a multiple of 128, and the table has pages for a multiple of 128 tokens.

    like: `structure` of the arguments.
    """
    del like
    options = {} if form.dense else {"BACKEND": "TRITON"}

    def attend(
        inputs: tuple[Tensor, Tensor, Tensor],
        table: Tensor,
        lists: BandBlocks,
        plan: PagePlan,
        mods: Mods,
    ) -> Tensor:
        q, k_pages, v_pages = inputs
        rows, tokens = q.shape[1], table.shape[1] * form.page_tokens
        at, lengths = _Positions(plan, form, tokens), plan.lengths

        def mask(batch: Tensor, head: Tensor, row: Tensor, token: Tensor) -> Tensor:
            seen = token < lengths[batch]
            if mods.mask is None:
                return seen
            key = _inside(token, lengths[batch])
            return seen & mods.mask(batch, head, at.query(batch, row), key)

        def score(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, token: Tensor) -> Tensor:
            if mods.score is None:
                return score
            key = _inside(token, lengths[batch])
            return mods.score(score, batch, head, at.query(batch, row), key)

        blocks = BlockMask.from_kv_blocks(
            lists.partial_counts,
            lists.partial,
            lists.whole_counts if form.band.exact else None,
            lists.whole if form.band.exact else None,
            BLOCK_SIZE=BLOCK,
            mask_mod=mask,
            seq_lengths=(rows, tokens),
            compute_q_blocks=False,
        )
        out = flex_attention(
            q.transpose(1, 2),
            _gathered(k_pages, table, lengths),
            _gathered(v_pages, table, lengths),
            score_mod=score,
            block_mask=blocks,
            scale=form.scale,
            enable_gqa=True,
            kernel_options=cast(Any, options),
        )
        return _only_queries(out.transpose(1, 2), plan)

    return _compiled(attend, dense=form.dense)


def structure(value: object) -> Hashable:
    """What two values have in common where one graph serves both: of tensors the shape, of
    functions the code and what they hold, of others the value."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype, value.device
    if isinstance(value, types.FunctionType):
        held = tuple(cell.cell_contents for cell in value.__closure__ or ())
        return value.__code__, structure(held), structure(value.__defaults__)
    if isinstance(value, PagePlan):
        return tuple(structure(getattr(value, name)) for name in PagePlan.__slots__)
    if isinstance(value, tuple | list):
        return tuple(structure(each) for each in value)
    return value if isinstance(value, Hashable) else id(value)


_numbers = itertools.count()


def _compiled(graph: Graph, *, dense: bool) -> Graph:
    code = graph.__code__.replace(co_name=f"{graph.__name__}_{next(_numbers)}")
    own = types.FunctionType(code, graph.__globals__, code.co_name, None, graph.__closure__)
    backend = "eager" if dense else "inductor"
    return cast(Graph, torch.compile(own, fullgraph=True, dynamic=False, backend=backend))


def _inside(position: Tensor, length: Tensor) -> Tensor:
    return torch.minimum(position, length - 1).clamp(min=0)


def _divided(number: Tensor, by: int) -> tuple[Tensor, Tensor]:
    """Quotient and remainder of numbers that are not negative."""
    if by & (by - 1):
        return number // by, number % by
    return number >> (by.bit_length() - 1), number & (by - 1)


def _padded_groups(q: Tensor, form: Form) -> Tensor:
    """(batch, heads, queries, dim), with a head of zeros for each that a group lacks."""
    if form.group == form.padded:
        return q
    batch, heads, queries, dim = q.shape
    groups = q.reshape(batch, heads // form.group, form.group, queries, dim)
    return F.pad(groups, (0, 0, 0, 0, 0, form.padded - form.group)).flatten(1, 2)


def _own_heads(out: Tensor, form: Form) -> Tensor:
    """The reverse of `_padded_groups`."""
    if form.group == form.padded:
        return out
    batch, heads, queries, dim = out.shape
    groups = out.reshape(batch, heads // form.padded, form.padded, queries, dim)
    return groups[:, :, : form.group].flatten(1, 2)


def _gathered(pages: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """(batch, heads, tokens, dim): each sequence in one piece, with zeros behind its end."""
    found = pages[table].transpose(2, 3).flatten(1, 2)
    inside = torch.arange(found.shape[1], device=table.device) < lengths[:, None]
    return torch.where(inside[:, :, None, None], found, 0).transpose(1, 2)


def _only_queries(out: Tensor, plan: PagePlan) -> Tensor:
    """(batch, rows, heads, dim), with zeros in rows whose position the sequence has not."""
    position = plan.first[:, None] + torch.arange(out.shape[1], device=out.device)
    real = (position >= 0) & (position < plan.lengths[:, None])
    return torch.where(real[:, :, None, None], out, 0)
