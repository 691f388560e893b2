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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.compiling import Variant
from kvstore_kernels.fused import (
    NewTokens,
    check_places,
    check_tokens,
    power_of_two,
    token_geometry,
)
from kvstore_kernels.fused_kernels import AppendGeometry
from kvstore_kernels.gqa_kernel import Geometry, gqa_kernel
from kvstore_kernels.worklist import COLUMNS, WorkList, most_items, plan

LOG2_E = math.log2(math.e)
QUERY_DTYPES = (torch.bfloat16, torch.float16)
KV_DTYPES = (*QUERY_DTYPES, torch.float8_e4m3fn)
HEAD_DIMS = (64, 128, 256)
MAX_GROUP = 16
MAX_Q_TOKENS = 4
PAGE_TOKENS = range(16, 129)
MIN_ROWS = 16  # of a matrix product
MERGE_ROWS = 8  # at most, at a time
_MANY_HEADS = 1024  # sequences times KV heads: no longer cut into parts on any GPU
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


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaForm:
    """What an attention layer's launches have in common. Raises KernelArgumentError.

    heads: query heads, a multiple of kv_heads and at most 16 times as many; neighbours share a KV
    head. head_dim: 64, 128 or 256. page_tokens: 16 to 128. q_tokens: new tokens of each sequence, 1
    to 4. dtype: of queries and output, bfloat16 or float16. kv_dtype: the same, or float8_e4m3fn:
    then products are in float16, which has all its values, and queries beyond float16's range
    (65504) are brought to its ends. scale: of the scores, default head_dim ** -0.5. softcap: scores
    become softcap * tanh(score / softcap). window: how many tokens a query sees, itself included;
    None for all.
    """

    heads: int
    kv_heads: int
    head_dim: int
    page_tokens: int
    q_tokens: int = 1
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype = torch.bfloat16
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        _check_heads(self)
        require(self.head_dim in HEAD_DIMS, "head_dim", f"must be one of {HEAD_DIMS}")
        require(self.page_tokens in PAGE_TOKENS, "page_tokens", "must be 16 to 128")
        require(1 <= self.q_tokens <= MAX_Q_TOKENS, "q_tokens", f"must be 1 to {MAX_Q_TOKENS}")
        require(self.dtype in QUERY_DTYPES, "dtype", "must be bfloat16 or float16")
        require(
            self.kv_dtype in (self.dtype, torch.float8_e4m3fn),
            "kv_dtype",
            f"must be float8_e4m3fn or the queries' {self.dtype}",
        )
        require(self.softcap is None or self.softcap > 0, "softcap", "must be above 0")
        require(self.window is None or self.window >= 1, "window", "must be at least 1")

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def rows(self) -> int:
        """Queries that one block of threads attends with."""
        return self.group * self.q_tokens

    @property
    def tile_rows(self) -> int:
        """Rows of the tile that they are in."""
        return max(MIN_ROWS, power_of_two(self.rows))

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token and one KV head."""
        return 2 * self.head_dim * self.kv_dtype.itemsize

    @property
    def partial_bytes(self) -> int:
        """Bytes of one partial result."""
        return self.rows * (self.head_dim + 1) * 4


def _check_heads(form: GqaForm) -> None:
    require(form.kv_heads >= 1, "kv_heads", "must be at least 1")
    require(
        form.heads >= 1 and form.heads % form.kv_heads == 0,
        "heads",
        f"must be a multiple of the {form.kv_heads} KV heads, not {form.heads}",
    )
    require(form.group <= MAX_GROUP, "heads", f"must be at most {MAX_GROUP} for each KV head")


@dataclass(frozen=True, slots=True, kw_only=True)
class GqaConfig:
    """How the kernel is compiled and how finely sequences are cut.

    tile_tokens: read and multiplied at a time. num_stages: tiles in flight, plus one.
    blocks_per_sm: blocks of threads that a multiprocessor holds, by their registers and shared
    memory. min_tokens, item_tokens, cut_tokens, extra_waves: see `worklist.plan`. merge_elements:
    of partial results held in a block's registers at a time. overlap: consecutive launches overlap.
    """

    tile_tokens: int = 64
    num_warps: int = 4
    num_stages: int = 4
    blocks_per_sm: int = 2
    min_tokens: int = 64
    item_tokens: int = 64
    cut_tokens: int | None = 64
    extra_waves: int = 7
    merge_elements: int = 8192
    overlap: bool = True


def config_for(form: GqaForm, max_sequences: int = 1) -> GqaConfig:
    """The configuration that measured best for forms of its class and batches of that size."""
    fp8 = form.kv_dtype is torch.float8_e4m3fn
    tile = {64: 128, 128: 64, 256: 32}[form.head_dim]  # 16 KiB of keys in bfloat16
    wide = form.head_dim == 256
    if form.tile_rows == 16 and fp8:
        return GqaConfig(
            tile_tokens=tile, num_stages=3, blocks_per_sm=2 if wide else 3, merge_elements=4096
        )
    if form.tile_rows == 16 and max_sequences * form.kv_heads < _MANY_HEADS:
        # Where there is little to read, half as many blocks have half as many results to merge.
        return GqaConfig(
            tile_tokens=2 * tile,
            num_stages=3,
            num_warps=8,
            blocks_per_sm=1,
            item_tokens=256,
            cut_tokens=256,
        )
    if form.tile_rows <= 32:
        return GqaConfig(tile_tokens=tile, num_stages=3 if wide and form.tile_rows == 32 else 4)
    if wide:
        return GqaConfig(tile_tokens=tile, num_warps=8, blocks_per_sm=1)
    return GqaConfig(tile_tokens=64, num_stages=3)


class GqaWorkspace:
    """The buffers of fixed address that launches of one form need: the plan and partial results.

    One workspace serves all layers of a model, one launch after another; launches that may run at
    the same time, on several streams, need one each. Once per step `plan` cuts the sequences (host
    only), and `load` copies the plan to the device, before the launches or the replay of a graph
    that has them.

    max_sequences: of a batch. config: default `config_for(form, max_sequences)`. workers: blocks
    that run at once; default the device's multiprocessors times config.blocks_per_sm.
    """

    def __init__(
        self,
        form: GqaForm,
        *,
        max_sequences: int,
        device: torch.device | str,
        config: GqaConfig | None = None,
        workers: int | None = None,
    ) -> None:
        require(max_sequences >= 1, "max_sequences", "must be at least 1")
        self.form = form
        self.config = config or config_for(form, max_sequences)
        self.device = torch.device(device)
        self.max_sequences = max_sequences
        self.workers = workers or _workers(self.device, self.config)
        self.max_items = most_items(
            max_sequences, form.kv_heads, self.workers, self.config.extra_waves
        )
        self.items = torch.full((self.max_items, COLUMNS), -1, dtype=torch.int32, device=device)
        self.partials = torch.empty(
            (self.max_items, form.rows, form.head_dim), dtype=torch.float32, device=device
        )
        self.lse = torch.empty((self.max_items, form.rows), dtype=torch.float32, device=device)
        counters = max_sequences * form.kv_heads
        self.counters = torch.zeros(counters, dtype=torch.int32, device=device)
        self.grid = 0  # blocks that a launch has
        self.lengths = np.zeros(0, np.int32)  # of the sequences that are planned

    def plan(self, lengths: npt.ArrayLike) -> WorkList:
        """Cuts sequences of these lengths; pure host code. Raises KernelArgumentError."""
        return plan_gqa(self.form, self.config, lengths, self.workers)

    def load(self, worklist: WorkList, *, grid: int | None = None) -> None:
        """Makes the launches that follow on this stream do this list.

        grid: blocks that a launch has, so that a captured graph can be replayed with other lists of
        at most as many items; those without work end at once. Default: as many as there are items.
        Modifies items. Raises KernelArgumentError when the list is for more sequences than
        max_sequences, or grid is less than its items or more than max_items.
        """
        rows = worklist.items if grid is None else worklist.padded(grid)
        require(
            len(rows) <= self.max_items and worklist.n_counters <= len(self.counters),
            "worklist",
            f"must be for at most {self.max_sequences} sequences and {self.max_items} blocks",
        )
        self.items[: len(rows)].copy_(torch.from_numpy(rows))
        self.grid, self.lengths = len(rows), worklist.lengths()


def plan_gqa(form: GqaForm, config: GqaConfig, lengths: npt.ArrayLike, workers: int) -> WorkList:
    """The work list of sequences of these lengths, new tokens included, for so many workers."""
    counts = np.asarray(lengths)
    starts = None
    if form.window is not None:
        starts = np.maximum(counts - form.q_tokens - form.window + 1, 0)
    return plan(
        counts,
        groups=form.kv_heads,
        workers=workers,
        partial_bytes=form.partial_bytes,
        token_bytes=form.token_bytes,
        min_tokens=config.min_tokens,
        item_tokens=config.item_tokens,
        cut_tokens=config.cut_tokens,
        extra_waves=config.extra_waves,
        starts=starts,
    )


def _workers(device: torch.device, config: GqaConfig) -> int:
    if device.type != "cuda":
        return config.blocks_per_sm
    return torch.cuda.get_device_properties(device).multi_processor_count * config.blocks_per_sm


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
    geometry = _geometry(
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


def _geometry(
    form: GqaForm,
    config: GqaConfig,
    strides: Sequence[tuple[int, ...]],
    *,
    paired: bool,
    scaled: bool,
    gpu: bool,
) -> Geometry:
    """strides: of q, k_pages, v_pages and out."""
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


# --------------------------------------------------------------------------------- variants


_TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float8_e4m3fn: "*fp8e4nv"}


def variants() -> Iterator[Variant]:
    """The usual forms, and those that need most of something."""
    llama = GqaForm(heads=32, kv_heads=8, head_dim=128, page_tokens=16)
    forms = {
        "llama": llama,
        "pages_of_64": replace(llama, page_tokens=64),
        "float16": replace(llama, dtype=torch.float16, kv_dtype=torch.float16),
        "float8": replace(llama, kv_dtype=torch.float8_e4m3fn),
        "drafts": replace(llama, q_tokens=4),
        "dim_64": replace(llama, head_dim=64),
        "dim_256_window_cap": replace(llama, head_dim=256, softcap=50.0, window=4096),
        "group_1": replace(llama, kv_heads=32),
        "group_7": replace(llama, heads=28, kv_heads=4),
        "group_8_drafts": replace(llama, heads=64, q_tokens=4),
        "group_16_drafts": replace(llama, heads=128, q_tokens=4),
        "dim_256_group_16_drafts": replace(llama, heads=128, head_dim=256, q_tokens=4),
    }
    for name, form in forms.items():
        yield _variant(f"gqa_{name}", form, config_for(form))
    many = 1024 // llama.kv_heads
    for name in ("llama", "drafts", "dim_64", "group_16_drafts"):
        form = forms[name]
        yield _variant(f"gqa_append_{name}", form, config_for(form, many), appends=True)
    yield _variant("gqa_append_few", llama, config_for(llama), appends=True)
    normed = _variant("gqa_append_normed", llama, config_for(llama, many), appends=True)
    yield _with_norms(normed, llama)


def _variant(name: str, form: GqaForm, config: GqaConfig, *, appends: bool = False) -> Variant:
    """As compiled for dense pools [pages, kv_heads, 2, page_tokens, head_dim]."""
    scaled = form.kv_dtype is torch.float8_e4m3fn
    scales = ("k_scale_ptr", "v_scale_ptr")
    pointers = {
        **dict.fromkeys(("q_ptr", "out_ptr"), _TYPES[form.dtype]),
        **dict.fromkeys(("k_ptr", "v_ptr"), _TYPES[form.kv_dtype]),
        **dict.fromkeys(("table_ptr", "items_ptr", "counter_ptr"), "*i32"),
        **dict.fromkeys(("partial_ptr", "lse_ptr", *(scales if scaled else ())), "*fp32"),
    }
    new: dict[str, Any] = dict.fromkeys(NEW)
    if appends:
        kinds = (*[_TYPES[form.dtype]] * 2, *["*i64"] * 2, *[_TYPES[form.dtype]] * 2)
        new |= zip(NEW, kinds, strict=False)
    pointers |= {key: kind for key, kind in new.items() if kind}
    numbers = dict.fromkeys(("n_pages", "max_pages", "table_stride"), "i32")
    geometry = _geometry(form, config, _dense_strides(form), paired=scaled, scaled=scaled, gpu=True)
    absent = [key for key in (*scales, *NEW) if key not in pointers]
    return Variant(
        name=name,
        kernel=gqa_kernel,
        signature=pointers | numbers,
        constants={"g": geometry, "n": _dense_new(form) if appends else None}
        | dict.fromkeys(absent),
        aligned=tuple(pointers),
        options={
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "enable_fp_fusion": True,
        },
        # As many blocks as planned fit a multiprocessor: it has 64 Ki registers, handed out to
        # warps in units of 256, and 228 KiB of shared memory, 1 KiB of which is a block's own.
        max_registers=(65536 // (32 * config.num_warps * config.blocks_per_sm)) // 8 * 8,
        max_shared_bytes=(228 // config.blocks_per_sm - 1) << 10,
    )


def _with_norms(variant: Variant, form: GqaForm) -> Variant:
    """With norms of heads."""
    constants = dict(variant.constants)
    signature = dict(variant.signature)
    for key in NEW[-2:]:
        del constants[key]
        signature[key] = _TYPES[form.dtype]
    constants["n"] = replace(constants["n"], normed=True)
    aligned = (*variant.aligned, *NEW[-2:])
    return replace(variant, signature=signature, constants=constants, aligned=aligned)


def _dense_new(form: GqaForm) -> AppendGeometry:
    """Queries, keys and values as parts of one merged projection."""
    token = (form.heads + 2 * form.kv_heads) * form.head_dim
    strides = dict.fromkeys(("k_sequence", "v_sequence"), form.q_tokens * token)
    return AppendGeometry(
        rows=power_of_two(form.q_tokens),
        interleaved=False,
        normed=False,
        eps=1e-6,
        angle_sequence=form.q_tokens * form.head_dim // 2,
        angle_token=form.head_dim // 2,
        **strides,
        **dict.fromkeys(("k_token", "v_token"), token),
        **dict.fromkeys(("k_head", "v_head"), form.head_dim),
    )


def _dense_strides(form: GqaForm) -> list[tuple[int, ...]]:
    plane = form.page_tokens * form.head_dim
    pool = (form.kv_heads * 2 * plane, 2 * plane, form.head_dim)
    rows = (form.q_tokens * form.heads * form.head_dim, form.heads * form.head_dim, form.head_dim)
    return [rows, pool, pool, rows]
