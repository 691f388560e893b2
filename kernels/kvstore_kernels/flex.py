"""Attention with any mask or score over pages: torch's flex_attention, told where the pages lie.

Roofline. As for all decoding, each KV byte is read once: the floor is KV bytes / read rate. A mask
costs arithmetic, for which reading leaves room. Prefill is bound by its matrix products.

How a few queries a sequence get there, in torch's FlexDecoding kernel:

- It reads pages in place: `flex_plan` makes them blocks of one sequence.
- All pages are listed as partly masked. Full blocks would spare the mask, but the kernel divides
  those by the length of the whole pool: of 64 splits most find nothing to do. Partly masked ones it
  divides by what the sequence has.
- A tile is a page at most. So tiles are 16 tokens, and go to one warp each, with two more on their
  way, and many blocks of threads to a multiprocessor (`options_for`). Torch's own choice, two warps
  that wait for each tile, takes twice as long.
- Mods are written in positions, the kernel counts in pool. It looks a page's place up in a table,
  and Triton fetches table entries as early as it does KV; a mod that needs no position reads none.
  Where a sequence ends is known without the table, from its last page alone.
- Indices have as many bits as the declared size of the pool needs, and 64 do not compile there
  (torch 2.11). So a large pool is declared smaller than it is. Addresses have 64 bits all the same,
  because the numbers of pages have, and nothing is compared with the declared size (IS_DIVISIBLE).

Many queries, and pages that cannot be blocks, are gathered into one piece for the kernel of long
queries, with lists of blocks of 128 by the band of the mask.

Each combination of shapes, options and mods is compiled once, when it is first met, which takes 5
to 20 s. Lengths and page numbers are data and compile nothing; sizes of prefill are rounded up to
powers of two. Each combination has a code object of its own, because torch stops compiling one
after eight. On a CPU the same graphs run uncompiled with all scores in memory: for small sizes.

Stale bytes behind the end of a sequence have the weight zero. Where pages are read in place they
must be finite numbers, as in a pool that was zeroed once: zero times NaN is NaN.

The algorithm of the kernels is that of Dong et al., 2024, "Flex Attention: A Programming Model for
Generating Optimized Attention Kernels".
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.flex_graphs import Form, Mods, decode_graph, prefill_graph, structure
from kvstore_kernels.flex_masks import Band, MaskMod, ScoreMod, band_of, needed_for_last
from kvstore_kernels.flex_plan import (
    ALIGNMENT,
    BLOCK,
    MAX_DECODE_QUERIES,
    PagePlan,
    as_sequence,
    band_blocks,
    padded_rows,
    plan_pages,
    power_of_two,
    unit_of,
)

Tensor = torch.Tensor
Inputs = tuple[Tensor, Tensor, Tensor]  # queries, and the pages of keys and of values
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


# ---------------------------------------------------------------------------- options


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How the decoding kernel runs. splits: parts of a sequence. tile: keys at a time. tile_rows:
    queries times heads of a group at a time. stages: tiles on their way, and the one that is worked
    on."""

    splits: int
    tile: int
    tile_rows: int
    warps: int
    stages: int

    def for_torch(self) -> dict[str, Any]:
        """As `kernel_options`."""
        return {
            "BACKEND": "TRITON_DECODE",
            "SPLIT_KV": self.splits,
            "BLOCK_M": self.tile_rows,
            "BLOCK_N": self.tile,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "IS_DIVISIBLE": True,  # a page is a whole number of tiles
        }


# Measured on an H200 without a mask, 8 KV heads of 128 in bfloat16, pages of 16, one warp, three
# stages; microseconds by the number of splits:
#
#     64 x 8192   1: 484   2: 487   3: 549   6: 510
#     16 x 4096   4: 71.6   6: 71.6   9: 74.9   18: 80.3
#     1 x 4096    32: 13.1   64: 12.4   128: 13.5
#
# With two warps 1.11 times as long, with four stages 0.96 to 1.13 times. 3 splits of 64 x 8192 are
# a few more blocks of threads than run at once, and those wait for all others. With 2 splits ALiBi
# and a soft cap take 494; their blocks are slower, but there are enough of them.
TILE, WARP_ROWS, STAGES = 16, 16, 3
MAX_TILE_ROWS = 64
# Two to each quarter of a multiprocessor's registers, however many of them a mod takes.
WARPS_AT_ONCE = 8
SHARED_BYTES = 227 << 10  # of a multiprocessor; each block of threads takes 1 KiB more than its own
OCCUPIED = 0.75  # of the blocks that can run at once, on average: rounding may go to all of them
MAX_SPLITS = 128
MIN_SPLIT_TOKENS = 64  # so that partial results are less than a quarter of the KV they come from


def options_for(
    *,
    batch: int,
    kv_heads: int,
    rows: int,
    row_bytes: int,
    longest: int,
    multiprocessors: int = 132,
) -> Options:
    """What suits a shape on an H100 or H200: as many blocks of threads as run at once, and no more.

    rows: queries times heads of a group. row_bytes: of one key. longest: tokens that the longest
    sequence may have.
    """
    tile_rows = min(max(WARP_ROWS, power_of_two(rows)), MAX_TILE_ROWS)
    warps = tile_rows // WARP_ROWS
    shared = (tile_rows + 2 * (STAGES - 1) * TILE) * row_bytes
    at_once = max(1, min(WARPS_AT_ONCE // warps, SHARED_BYTES // (shared + 1024)))
    tiles = batch * kv_heads * -(-rows // tile_rows)
    splits = round(OCCUPIED * at_once * multiprocessors / tiles)
    most = min(MAX_SPLITS, longest // MIN_SPLIT_TOKENS)
    return Options(
        splits=max(1, min(splits, most)),
        tile=TILE,
        tile_rows=tile_rows,
        warps=warps,
        stages=STAGES,
    )


# ---------------------------------------------------------------------------- attention


def flex_attention_paged(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    *,
    query_lengths: Tensor | None = None,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    scale: float | None = None,
    longest: int | None = None,
    plan: PagePlan | None = None,
    options: Options | None = None,
    check: bool = False,
) -> Tensor:
    """Attention of each sequence's last tokens to its pages; gives q's shape and dtype.

    With a few queries a sequence it can be captured in a CUDA graph, once it has run before.

    q: (batch, queries, heads, dim), or (batch, heads, dim) for one query a sequence; bfloat16,
        float16 or float32. The heads that share a KV head are neighbours.
    k_pages, v_pages: (pages, kv_heads, page_tokens, dim) of q's dtype, in any strides, the same for
        both, but for a dense last dimension. The queries' own KV is in them already.
    page_table: (batch, width) int32 or int64, the pages of each sequence in the order of its
        tokens. A page may be in several sequences, and once in each.
    lengths: (batch,) int32 or int64, tokens of each sequence, its queries among them.
    query_lengths: (batch,) int32 or int64: how many rows of q belong to a sequence, the first ones;
        None for all. They are the last of its tokens.
    score_mod, mask_mod: see `flex_masks`; None for scores as they are, and to see all keys.
    scale: of the scores; None for dim ** -0.5.
    longest: the most tokens any sequence has, where that is known, for queries that need their
        pages gathered: what is behind it in the table is not.
    plan: that `plan_pages` made of this step's arguments, which then are not looked at.
    options: of the decoding kernel; None for those of `options_for`.
    check: whether to check numbers on a GPU, which waits for it; those on a CPU always are. A page
        number outside of the pool that is not checked means the pool's first or last page, a length
        the shortest or longest.

    Queries that see no key, and rows that are no queries, give zeros. Raises KernelArgumentError
    for shapes, strides, dtypes and devices that do not fit, and for page numbers and lengths.
    """
    rows = q if q.dim() == 4 else q[:, None]
    _check_kv(rows, k_pages, v_pages)
    if rows.shape[1] == 1:
        mask_mod = needed_for_last(mask_mod)
    if plan is None:
        plan = plan_pages(
            k_pages,
            page_table,
            lengths,
            queries=rows.shape[1],
            query_lengths=query_lengths,
            score_mod=score_mod,
            mask_mod=mask_mod,
            check=check,
        )
    require(len(plan.table) == len(q), "page_table", "must have a row for each of q's sequences")
    form = _form_of(rows, k_pages, plan, band_of(mask_mod), scale)
    in_place = form.unit and v_pages.data_ptr() % ALIGNMENT == 0
    inputs, mods = (rows, k_pages, v_pages), Mods(score_mod, mask_mod)
    with torch.no_grad():
        if in_place and form.queries <= MAX_DECODE_QUERIES:
            out = _decode(form, inputs, plan, mods, options)
        else:
            out = _prefill(form, inputs, plan, mods, longest)
    return out.reshape(q.shape)


def _form_of(q: Tensor, k_pages: Tensor, plan: PagePlan, band: Band, scale: float | None) -> Form:
    group = q.shape[2] // k_pages.shape[1]
    return Form(
        queries=q.shape[1],
        group=group,
        padded=power_of_two(group),
        page_tokens=k_pages.shape[2],
        unit=unit_of(k_pages, plan.table.shape[1]),
        band=band,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        dense=q.is_cpu,
    )


def _decode(
    form: Form, inputs: Inputs, plan: PagePlan, mods: Mods, options: Options | None
) -> Tensor:
    q, k_pages, v_pages = inputs
    if options is None:
        options = options_for(
            batch=len(q),
            kv_heads=k_pages.shape[1],
            rows=form.queries * form.padded,
            row_bytes=q.shape[3] * q.element_size(),
            longest=plan.blocks.shape[-1] * form.page_tokens,
            multiprocessors=_multiprocessors(q.device),
        )
    arguments = (q, as_sequence(k_pages, form.unit), as_sequence(v_pages, form.unit), plan, mods)
    for_torch = {} if form.dense else options.for_torch()
    return decode_graph(form, tuple(for_torch.items()), structure(arguments))(*arguments)


def _prefill(form: Form, inputs: Inputs, plan: PagePlan, mods: Mods, longest: int | None) -> Tensor:
    q, k_pages, v_pages = inputs
    room = plan.table.shape[1] * form.page_tokens
    table = _resized(plan.table, _gathered_pages(min(longest or room, room), form.page_tokens))
    padded = F.pad(q, (0, 0, 0, 0, 0, padded_rows(form.queries) - form.queries))
    lists = plan.lists or band_blocks(plan.first, plan.lengths, form.queries, room, form.band)
    arguments = ((padded, k_pages, v_pages), table, lists, plan, mods)
    return prefill_graph(form, structure(arguments))(*arguments)[:, : form.queries]


def _gathered_pages(tokens: int, page_tokens: int) -> int:
    """Pages with room for so many tokens: a whole number of blocks, and of few sizes."""
    step = BLOCK // math.gcd(BLOCK, page_tokens)  # so many pages are whole blocks
    wanted = -(-max(BLOCK, power_of_two(tokens)) // page_tokens)
    return -(-wanted // step) * step


def _resized(table: Tensor, width: int) -> Tensor:
    """The table's first columns, and page 0 in those that it lacks."""
    missing = width - table.shape[1]
    return F.pad(table, (0, missing)) if missing > 0 else table[:, :width].contiguous()


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _check_kv(q: Tensor, k_pages: Tensor, v_pages: Tensor) -> None:
    check_tensor("q", q, shape=(None,) * 4, dtypes=DTYPES)
    batch, queries, heads, dim = q.shape
    require(batch > 0 and queries > 0 and heads > 0, "q", "must not be empty")
    require(dim >= 16, "q", f"must have at least 16 elements a head, not {dim}")
    check_tensor(
        "k_pages", k_pages, shape=(None, None, None, dim), dtypes=(q.dtype,), device=q.device
    )
    require(k_pages.numel() > 0, "k_pages", "must not be empty")
    check_tensor("v_pages", v_pages, shape=k_pages.shape, dtypes=(q.dtype,), device=q.device)
    require(k_pages.stride() == v_pages.stride(), "v_pages", "must have the strides of k_pages")
    kv_heads = k_pages.shape[1]
    require(heads % kv_heads == 0, "q", f"must have a multiple of {kv_heads} heads, not {heads}")
