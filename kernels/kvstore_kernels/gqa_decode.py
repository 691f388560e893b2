"""Decode attention over pages of keys and values: one launch, at the speed of reading them.

Each sequence has 1 to 4 new tokens (the last of its `length` tokens, in the pages already or put
there by this launch), which attend to all of its tokens. Query heads are in groups that share a KV
head.

Roofline. Each KV byte is read once. In bfloat16 it takes part in as many FLOPs as there are rows
(group * new tokens, 16 at least), far under the 170 FLOPs a byte at which an H200 turns from
memory- to matrix-bound. So the floor is KV bytes over what a plain read reaches, 4.5 TB/s on an
H200: for 8 KV heads of 128 in bfloat16, 4 KiB a token, 1 us per 1,100 tokens of the whole batch.
What comes on top is latency: the launch, the chain work item -> page numbers -> KV, and the merging
of partial results.

How it gets there:
- One block of threads per item of a `worklist`: (sequence, KV head, run of tokens). All rows of the
  group are one tile, so that KV is read once and both products run on the matrix units.
- KV tiles are read by asynchronous copies of 16 bytes, several tiles ahead. Page numbers are loaded
  one tile ahead and carried to the next iteration. That distance of one matters: where a loop
  carries a value over more iterations, Triton's pipeliner leaves the whole loop as it is.
- What lies past the end is not masked: its address is the last token's, in cache anyway, and its
  score is discarded. So the copies need no predicates, and stale bytes in a page, NaNs among them,
  are not touched.
- New tokens that are not in the pages yet (`fused.NewTokens`) are rotated and written by the block
  that reads them, before it reads: what it needs for that comes along with its queries.
- Values in float8 are read as pairs of columns, which then are multiplied apart: the transposing
  loads from shared memory know 16-bit elements only.
- The last part of a (sequence, head) to arrive, by an atomic counter at GPU scope, merges the
  partial results, which are still in the L2, without a second launch. It resets the counter, so
  that launches can be replayed. Whoever merges, the order is that of the parts: equal inputs give
  bitwise equal outputs.
- Consecutive launches overlap (programmatic dependent launch): the next one is set up while this
  one ends; it touches memory only once this one is complete.

The algorithm is flash decoding (Dao and others, 2023) with an in-kernel reduction as in stream-K
(Osama and others, "Stream-K: work-centric parallel decomposition for dense matrix-matrix
multiplication on the GPU", 2023).
"""

# ruff: noqa: PLR0917 - attention is called by position: queries, keys, values

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.fused import (
    NewTokens,
    check_places,
    check_tokens,
    power_of_two,
    token_geometry,
)
from kvstore_kernels.gqa_form import GqaConfig, GqaForm, GqaWorkspace
from kvstore_kernels.gqa_kernel import Geometry, gqa_kernel

LOG2_E = math.log2(math.e)
MERGE_ROWS = 8  # at most, at a time
# Parts are summed without any exchange between threads if one thread has all parts of an element.
# Of two dimensions that are equally far apart in memory, Triton 3.6 hands out the first to threads
# first, later ones the second; it should be the rows.
_PARTS_AXIS = 1 if triton.__version__.startswith("3.6.") else 0
NEW = (  # the kernel's arguments that there are with new tokens
    *("k_new_ptr", "v_new_ptr", "page_ids_ptr", "offsets_ptr"),
    *("cos_ptr", "sin_ptr", "q_weight_ptr", "k_weight_ptr"),
)
STRIDES = (
    *("q_sequence", "q_token", "q_head", "k_page", "k_head", "k_token"),
    *("v_page", "v_head", "v_token", "out_sequence", "out_token", "out_head"),
)


def gqa_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    workspace: GqaWorkspace,
    *,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    append: NewTokens | None = None,
    out: torch.Tensor | None = None,
    check: bool = False,
) -> torch.Tensor:
    """Causal attention of each sequence's last q_tokens tokens to all of its tokens.

    q: (batch, q_tokens, heads, head_dim). k_pages, v_pages: (pages, kv_heads, page_tokens,
    head_dim) in any strides but for the last, so views of any pool: `pool.unbind(2)` of
    [pages, kv_heads, 2, page_tokens, head_dim], or a transposed [pages, page_tokens, kv_heads,
    head_dim]. page_table: (batch, max_pages) int32, the pages of each sequence in order; entries
    past its length do not matter. lengths: (batch,) int32, tokens of each sequence, the new ones
    included; those that the workspace's plan was made of. k_scale, v_scale: (kv_heads,) float32,
    by which stored keys and values are multiplied; default 1. append: the new tokens, which are not
    in the pages yet: they are written there, and q too is given before norm and rotation. Only for
    pages of q's dtype, without scales.

    Returns (batch, q_tokens, heads, head_dim) of q's dtype: `out`, or a new tensor. Queries that
    see no token (length 0, or new tokens that do not exist) give zeros. Modifies the workspace's
    partial results, and pages with `append`. Waits for nothing; may be captured in a graph.

    A page number outside of the pool never leads outside of it: the pool's last page is read in its
    place, which makes the result of that sequence alone wrong, and nothing is written. With
    `check`, and always for tensors on the CPU, it raises KernelArgumentError, as do lengths that
    are not the plan's, and places of new tokens that are not the page table's; for tensors on a GPU
    that waits for it. Raises KernelArgumentError for wrong shapes, dtypes, devices, strides.
    """
    form = workspace.form
    _check_tensors(q, k_pages, v_pages, page_table, lengths, workspace)
    scales = _both_scales(k_scale, v_scale, workspace)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_tensor("out", out, shape=q.shape, dtypes=(form.dtype,), device=q.device)
    if append is not None:
        _check_append(q, append, scales, form)
    if check or page_table.device.type == "cpu":
        _check_values(page_table, lengths, len(k_pages), workspace)
        if append is not None:
            check_places(append, page_table, workspace.lengths.astype(np.int64), form.page_tokens)
    if workspace.grid:
        _launch(q, k_pages, v_pages, page_table, workspace, scales, append, out)
    return out


def _launch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    workspace: GqaWorkspace,
    scales: tuple[torch.Tensor, torch.Tensor] | tuple[None, None],
    append: NewTokens | None,
    out: torch.Tensor,
) -> None:
    config, gpu = workspace.config, q.device.type == "cuda"
    geometry = geometry_of(
        workspace.form,
        config,
        [tensor.stride()[:-1] for tensor in (q, k_pages, v_pages, out)],
        paired=_in_pairs(v_pages),
        scaled=scales[0] is not None,
        gpu=gpu,
    )
    # The interpreter would take them for arguments of the kernel.
    options = {"launch_pdl": config.overlap, "enable_fp_fusion": True} if gpu else {}
    gqa_kernel[(workspace.grid,)](
        q,
        k_pages,
        v_pages,
        out,
        page_table,
        *scales,
        workspace.items,
        workspace.partials,
        workspace.lse,
        workspace.counters,
        *(_new_tensors(append) if append else [None] * len(NEW)),
        len(k_pages),
        page_table.shape[1],
        page_table.stride(0),
        geometry,
        token_geometry(append) if append else None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **options,
    )


def _new_tensors(new: NewTokens) -> list[torch.Tensor | None]:
    """In the kernel's order."""
    places = (new.page_ids, new.offsets)
    return [new.k, new.v, *places, new.cos, new.sin, new.q_norm, new.k_norm]


def _in_pairs(pages: torch.Tensor) -> bool:
    """Whether pairs of columns, of bytes, lie as 16-bit numbers do."""
    places = (pages.data_ptr(), *pages.stride()[:-1])
    return pages.dtype is torch.float8_e4m3fn and not any(place % 2 for place in places)


def _exponent(form: GqaForm) -> tuple[float, float]:
    """The kernel's scale and softcap."""
    scale = form.head_dim**-0.5 if form.scale is None else form.scale
    if form.softcap is None:
        return scale * LOG2_E, 0.0
    return 2 * scale / form.softcap * LOG2_E, form.softcap * LOG2_E


def geometry_of(
    form: GqaForm,
    config: GqaConfig,
    strides: Sequence[tuple[int, ...]],
    *,
    paired: bool,
    scaled: bool,
    gpu: bool,
) -> Geometry:
    """What the kernel is compiled for. strides: of q, k_pages, v_pages and out, but for the last.
    paired: values are read as pairs of columns. scaled: there are scales of stored values."""
    fp8 = form.kv_dtype is torch.float8_e4m3fn
    half = tl.float16 if fp8 or form.dtype is torch.float16 else tl.bfloat16
    scale, softcap = _exponent(form)
    merge_rows = min(power_of_two(form.rows), MERGE_ROWS)
    return Geometry(
        group=form.group,
        rows=form.rows,
        q_tokens=form.q_tokens,
        tile_rows=form.tile_rows,
        dim=form.head_dim,
        page_tokens=form.page_tokens,
        tile_tokens=config.tile_tokens,
        compute=half if gpu else tl.float32,  # the interpreter cannot compute in bfloat16
        saturated=fp8 and form.dtype is torch.bfloat16,
        paired=paired,
        interpreted=not gpu,
        scaled=scaled,
        scale=scale,
        softcap=softcap,
        window=form.window or 0,
        merge_parts=max(1, config.merge_elements // (merge_rows * form.head_dim)),
        merge_rows=merge_rows,
        parts_axis=_PARTS_AXIS,
        overlap=config.overlap and gpu,
        **dict(zip(STRIDES, itertools.chain(*strides), strict=True)),
    )


# --------------------------------------------------------------------------------- arguments


def _check_tensors(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    workspace: GqaWorkspace,
) -> None:
    form, device = workspace.form, workspace.device
    shape = (None, form.q_tokens, form.heads, form.head_dim)
    check_tensor("q", q, shape=shape, dtypes=(form.dtype,))
    require(q.device.type == device.type, "q", f"must be on the workspace's {device}")
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        shape = (None, form.kv_heads, form.page_tokens, form.head_dim)
        check_tensor(name, pages, shape=shape, dtypes=(form.kv_dtype,), device=q.device)
        in_page = form.page_tokens * pages.stride(2)
        require(in_page < 2**31, name, "must have a page's tokens within 2^31 elements")
    require(len(k_pages) == len(v_pages) > 0, "v_pages", "must be as many as k_pages, and some")
    check_tensor(
        "page_table", page_table, shape=(len(q), None), dtypes=(torch.int32,), device=q.device
    )
    require(page_table.shape[1] > 0, "page_table", "must have at least one column")
    check_tensor("lengths", lengths, shape=(len(q),), dtypes=(torch.int32,), device=q.device)
    planned = len(workspace.lengths)
    require(planned == len(q), "q", f"must have the work list's {planned} sequences, not {len(q)}")


def _check_append(
    q: torch.Tensor,
    append: NewTokens,
    scales: tuple[torch.Tensor, torch.Tensor] | tuple[None, None],
    form: GqaForm,
) -> None:
    require(form.kv_dtype is form.dtype, "append", "must be for pages of q's dtype")
    require(scales[0] is None, "append", "must be without scales of stored values")
    check_tokens(q, append, form.kv_heads)


def _both_scales(
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, workspace: GqaWorkspace
) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Checked; both where there is one."""
    if k_scale is None and v_scale is None:
        return None, None
    shape, device = (workspace.form.kv_heads,), workspace.items.device
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is not None:
            check_tensor(name, scale, shape=shape, dtypes=(torch.float32,), device=device)
    one = torch.ones(shape, device=device)
    return one if k_scale is None else k_scale, one if v_scale is None else v_scale


def _check_values(
    page_table: torch.Tensor, lengths: torch.Tensor, n_pages: int, workspace: GqaWorkspace
) -> None:
    """Page numbers and lengths, on the host."""
    counts = lengths.cpu().numpy()
    require(bool((counts == workspace.lengths).all()), "lengths", "must be those of the work list")
    table = page_table.cpu().numpy()
    used = -(-counts // workspace.form.page_tokens)
    require(
        bool((used <= table.shape[1]).all()),
        "page_table",
        f"must have a sequence's {used.max(initial=0)} pages in its {table.shape[1]} columns",
    )
    matters = np.arange(table.shape[1]) < used[:, None]
    wrong = matters & ((table < 0) | (table >= n_pages))
    require(
        not wrong.any(),
        "page_table",
        f"must have numbers of the pool's {n_pages} pages; the first wrong one is at "
        f"{tuple(int(i) for i in np.argwhere(wrong)[0]) if wrong.any() else ()}",
    )
