"""Decode attention over pages of latents (MLA) for few query rows: at the speed of reading them.

Each sequence has 1 to 4 new tokens (the last of its `length` tokens, in the pages already or put
there by this launch), whose heads all attend to the same latents: a token is 512 elements, which
are key and value at once, and 64 of rope, which are key only. For up to 32 query rows (heads times
new tokens) of a sequence, which is what a rank of a tensor-parallel model has; any number works, as
groups of 32 that read the pages anew. On Hopper `mla_ring` is faster up to 16 rows, and `mla_gluon`
from 64 on.

Roofline. A token costs 1,152 bytes in bfloat16 and 2 * rows * (576 + 512) FLOPs: 30 FLOPs a byte
at 16 rows, 60 at 32, under the 170 at which an H200 turns from memory- to matrix-bound. So the
floor is bytes over what a plain read reaches, 4.5 TB/s on an H200: 268 us for 64 sequences of
16,384 tokens. A multiprocessor then gets a tile of 64 tokens (72 KiB) each 2.2 us, and all else has
to hide behind that, or to happen once.

How it gets there:
- One block of threads per item of a `worklist`: (sequence, group of rows, run of tokens). Two
  blocks, of four warps and one tile each, share a multiprocessor: while one computes, the other's
  tile arrives. That also hides where a block begins and ends.
- The copy engine (TMA) brings a tile's latents, so that no registers and few instructions go into
  it. They lie in shared memory once and are a factor of both products: rows of tokens for the
  scores, transposed for the values. Both products have the tokens or the latent columns as their
  rows, and the queries as their columns: 16 query rows then fill a warpgroup's product, which has
  64 rows at least, without padding.
- With 32 rows, while a tile is worked on, the next one is called into the L2, so that the memory
  never rests. With 16, a tile's work is short enough for the other block's tile to do that alone.
- A last tile of fewer than 64 tokens is a box that ends with the last token and begins before its
  page, where the hardware gives zeros. So stale bytes in a page, NaNs among them, are not touched,
  and a page number outside of the pool reads zeros.
- New tokens that are not in the pages yet (`fused.NewLatents`) are normed, rotated and written by
  the block that reads them, before it reads; a fence orders that before the copy engine's reads.
- Pages of other sizes than 64 and 128 tokens are read by plain loads, which is slower; and so are
  pages in float8_e4m3fn, which pass through registers on their way to the products.
- The parts of a sequence leave partial results in float32 and meet at a counter (atomics of release
  and acquire at GPU scope). If all items run at once, all parts of a sequence merge a share of its
  rows and columns each, as tiles of 32 KiB, rather than the last to arrive everything: 264 parts
  are 8.6 MB. A part waits only for parts that have started, and these do not wait before they
  arrive, so nothing waits for ever, whatever else runs on the GPU. Which part merges what is left
  to chance, the order of each sum is not: equal inputs give bitwise equal outputs.
- Consecutive launches overlap (programmatic dependent launch): the next one is set up while this
  one ends; it touches memory only once this one is complete.

The algorithm is flash decoding (Dao and others, 2023) over absorbed latent attention (DeepSeek-V2,
arXiv 2405.04434), with an in-kernel reduction as in stream-K (Osama and others, "Stream-K:
work-centric parallel decomposition for dense matrix-matrix multiplication on the GPU", 2023).
"""

# ruff: noqa: PLR0917 - attention is called by position: queries, pages

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.compiling import Variant
from kvstore_kernels.fused import (
    NewLatents,
    check_latents,
    check_places,
    latent_geometry,
    power_of_two,
)
from kvstore_kernels.fused_kernels import AppendGeometry
from kvstore_kernels.mla_kernel import MOST_PARTS, TILE_TOKENS, MlaGeometry, mla_kernel
from kvstore_kernels.mla_reference import RANK, WIDTH
from kvstore_kernels.worklist import COLUMNS, NOBODY, PARTS, WorkList, most_items, plan

LOG2_E = math.log2(math.e)
KV_DTYPES = (torch.bfloat16, torch.float8_e4m3fn)
MAX_Q_TOKENS = 4
PAGE_TOKENS = range(16, 129)
BLOCK_ROWS = (16, 32, 64)
FEW_ROWS, MORE_ROWS = 16, 32  # the least of a matrix product, the most of two blocks' registers
ALIGNED_BYTES = 16  # as the copy engine and wide loads want addresses and strides
NEW = (  # the kernel's arguments that there are with new tokens
    *("q_rope_ptr", "latents_ptr", "norm_ptr", "cos_ptr", "sin_ptr"),
    *("page_ids_ptr", "offsets_ptr"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaForm:
    """What an attention layer's launches have in common. Raises KernelArgumentError.

    heads: query heads, of this rank. scale: of the scores. q_tokens: new tokens of each sequence, 1
    to 4. page_tokens: 16 to 128; multiples of 64 are the fast ones.
    kv_dtype: bfloat16, or float8_e4m3fn: then products are in float16, which has all its values,
    and queries beyond float16's range (65504) are brought to its ends.
    """

    heads: int
    scale: float
    q_tokens: int = 1
    page_tokens: int = 64
    kv_dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        require(self.heads >= 1, "heads", "must be at least 1")
        require(self.scale > 0, "scale", "must be above 0")
        require(1 <= self.q_tokens <= MAX_Q_TOKENS, "q_tokens", f"must be 1 to {MAX_Q_TOKENS}")
        require(self.page_tokens in PAGE_TOKENS, "page_tokens", "must be 16 to 128")
        require(
            self.kv_dtype in KV_DTYPES, "kv_dtype", "must be torch.bfloat16 or torch.float8_e4m3fn"
        )

    @property
    def rows(self) -> int:
        """Query rows of a sequence."""
        return self.heads * self.q_tokens

    @property
    def boxes(self) -> bool:
        """Whether the copy engine can bring tiles as they are needed."""
        return self.kv_dtype is torch.bfloat16 and self.page_tokens % TILE_TOKENS == 0

    @property
    def token_bytes(self) -> int:
        """Of one token in the pages."""
        return WIDTH * self.kv_dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaConfig:
    """How the kernel is compiled and how finely sequences are cut. Raises KernelArgumentError.

    rows: query rows of a block: 16, 32 or 64. num_stages: 1 for one tile of shared memory, 2 for
    two. blocks_per_sm: blocks of threads that a multiprocessor holds, by their registers and shared
    memory. ahead: call the next tile into the L2. min_tokens, item_tokens, extra_waves: see
    `worklist.plan`. merge_elements: of partial results held in a block's registers at a time, a
    power of two. overlap: consecutive launches overlap.
    """

    rows: int = FEW_ROWS
    num_warps: int = 4
    num_stages: int = 1
    blocks_per_sm: int = 2
    ahead: bool = True
    min_tokens: int = 128
    item_tokens: int = 64
    extra_waves: int = 3
    merge_elements: int = 8192
    overlap: bool = True

    def __post_init__(self) -> None:
        require(self.rows in BLOCK_ROWS, "rows", f"must be one of {BLOCK_ROWS}")
        # Four parts' worth of all rows at most, since pieces of that size are merged first.
        most = 4 * RANK * self.rows
        fits = self.merge_elements.bit_count() == 1 and 1024 <= self.merge_elements <= most
        require(fits, "merge_elements", f"must be a power of two, 1024 to {most}")


def config_for(form: MlaForm) -> MlaConfig:
    """The configuration that measured best for forms of its class, on an H100."""
    more = form.boxes and form.rows > FEW_ROWS
    return MlaConfig(rows=MORE_ROWS if more else FEW_ROWS, ahead=more)


class MlaWorkspace:
    """The buffers of fixed address that launches of one form need: the plan and partial results.

    One workspace serves all layers of a model, one launch after another; launches that may run at
    the same time, on several streams, need one each. Once per step `plan` cuts the sequences (host
    only), and `load` copies the plan to the device, before the launches or the replay of a graph
    that has them. The partial results may take 32 KiB (16 rows) or 64 KiB (32) times `max_items`.

    max_sequences: of a batch. config: default `config_for(form)`. workers: blocks that run at once;
    default the device's multiprocessors times config.blocks_per_sm.
    """

    def __init__(
        self,
        form: MlaForm,
        *,
        max_sequences: int,
        device: torch.device | str,
        config: MlaConfig | None = None,
        workers: int | None = None,
    ) -> None:
        require(max_sequences >= 1, "max_sequences", "must be at least 1")
        self.form = form
        self.config = config or config_for(form)
        self.device = torch.device(device)
        self.max_sequences = max_sequences
        self.workers = workers or _workers(self.device, self.config)
        groups, rows = _groups(form, self.config), self.config.rows
        self.max_items = most_items(max_sequences, groups, self.workers, self.config.extra_waves)
        # The first row says whether parts may wait for each other.
        size = (1 + self.max_items, COLUMNS)
        self.items = torch.full(size, NOBODY, dtype=torch.int32, device=device)
        self.partials = torch.empty((self.max_items, rows, RANK), device=device)
        self.moments = torch.empty((self.max_items, rows, 2), device=device)
        counters = max_sequences * groups
        self.meetings = torch.zeros((counters, 2), dtype=torch.int32, device=device)
        self.grid = 0  # blocks that a launch has
        self.lengths = np.zeros(0, np.int32)  # of the sequences that are planned

    def plan(self, lengths: npt.ArrayLike) -> WorkList:
        """Cuts sequences of these lengths; pure host code. Raises KernelArgumentError."""
        return plan_mla(self.form, self.config, lengths, self.workers)

    def load(self, worklist: WorkList, *, grid: int | None = None) -> None:
        """Makes the launches that follow on this stream do this list.

        grid: blocks that a launch has, so that a captured graph can be replayed with other lists of
        at most as many items; those without work end at once. Default: as many as there are items.
        Modifies items. Raises KernelArgumentError when the list is for more sequences than
        max_sequences, or grid is less than its items or more than max_items.
        """
        rows = worklist.items if grid is None else worklist.padded(grid)
        require(
            len(rows) <= self.max_items and worklist.n_counters <= len(self.meetings),
            "worklist",
            f"must be for at most {self.max_sequences} sequences and {self.max_items} blocks",
        )
        most = int(rows[:, PARTS].max(initial=0))
        require(most <= MOST_PARTS, "worklist", f"must cut into at most {MOST_PARTS} parts")
        patient = np.full((1, COLUMNS), len(worklist) <= self.workers, np.int32)
        self.items[: 1 + len(rows)].copy_(torch.from_numpy(np.concatenate([patient, rows])))
        self.grid, self.lengths = len(rows), worklist.lengths()


def plan_mla(form: MlaForm, config: MlaConfig, lengths: npt.ArrayLike, workers: int) -> WorkList:
    """The work list of sequences of these lengths, new tokens included, for so many workers."""
    return plan(
        lengths,
        groups=_groups(form, config),
        workers=workers,
        partial_bytes=config.rows * (RANK + 2) * 4,
        token_bytes=form.token_bytes,
        block_tokens=TILE_TOKENS,
        min_tokens=config.min_tokens,
        item_tokens=config.item_tokens,
        extra_waves=config.extra_waves,
    )


def _groups(form: MlaForm, config: MlaConfig) -> int:
    return -(-form.rows // config.rows)


def _workers(device: torch.device, config: MlaConfig) -> int:
    if device.type != "cuda":
        return config.blocks_per_sm
    return torch.cuda.get_device_properties(device).multi_processor_count * config.blocks_per_sm


def mla_decode(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    workspace: MlaWorkspace,
    *,
    page_scales: torch.Tensor | None = None,
    append: NewLatents | None = None,
    out: torch.Tensor | None = None,
    check: bool = False,
) -> torch.Tensor:
    """Causal latent attention of each sequence's last q_tokens tokens to all of its tokens.

    q: (batch, q_tokens, heads, 576) bfloat16, latent part then rope part. pages: (pages,
    page_tokens, 576) of the form's kv_dtype, any page and token strides of whole 16 bytes, so a
    layer's view of a pool of several layers too. page_table: (batch, max_pages) int32, the pages
    of each sequence in order; entries past its length do not matter. lengths: (batch,) int32,
    tokens of each sequence, the new ones included; those that the workspace's plan was made of.
    page_scales: (pages,) float32, at least 2**-60, by which the elements of a page are multiplied;
    for float8_e4m3fn only, default 1. append: the new tokens, which are not in the pages yet: they
    are written there, and q's rope part, which is there before rotation, is not read from q. For
    bfloat16 only.

    Returns (batch, q_tokens, heads, 512) bfloat16: `out`, or a new tensor. Queries that see no
    token (length 0, or new tokens that do not exist) give zeros. Modifies the workspace's partial
    results, and pages with `append`. Waits for nothing; may be captured in a graph.

    A page number outside of the pool never leads outside of it: zeros or the pool's last page are
    read in its place, which makes the result of that sequence alone wrong, and nothing is written.
    With `check`, and always for tensors on the CPU, it raises KernelArgumentError, as do lengths
    that are not the plan's, and places of new tokens that are not the page table's; for tensors on
    a GPU that waits for it. Raises KernelArgumentError for wrong shapes, dtypes, devices, strides.
    """
    _check_tensors(q, pages, page_table, lengths, page_scales, workspace)
    if out is None:
        out = torch.empty((*q.shape[:3], RANK), dtype=q.dtype, device=q.device)
    check_tensor("out", out, shape=(*q.shape[:3], RANK), dtypes=(q.dtype,), device=q.device)
    if append is not None:
        bf16 = workspace.form.kv_dtype is torch.bfloat16
        require(bf16, "append", "must be for pages of bfloat16")
        check_latents(q, append, RANK)
    if check or page_table.device.type == "cpu":
        _check_values(page_table, lengths, len(pages), workspace)
        if append is not None:
            counts = workspace.lengths.astype(np.int64)
            check_places(append, page_table, counts, workspace.form.page_tokens)
    if workspace.grid:
        _launch(q, pages, page_table, page_scales, workspace, append, out)
    return out


def _launch(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    page_scales: torch.Tensor | None,
    workspace: MlaWorkspace,
    append: NewLatents | None,
    out: torch.Tensor,
) -> None:
    config, gpu = workspace.config, q.device.type == "cuda"
    geometry = _geometry(workspace.form, config, q, pages, page_scales, out, gpu=gpu)
    # The interpreter would take it for an argument of the kernel.
    overlap = {"launch_pdl": config.overlap} if gpu else {}
    mla_kernel[(workspace.grid,)](
        q,
        _boxes(pages) if geometry.boxes else None,
        pages,
        page_scales,
        out,
        page_table,
        workspace.items,
        workspace.partials,
        workspace.moments,
        workspace.meetings,
        *(_new_tensors(append) if append else [None] * len(NEW)),
        len(pages),
        page_table.shape[1],
        page_table.stride(0),
        geometry,
        latent_geometry(append) if append else None,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **overlap,
    )


def _new_tensors(new: NewLatents) -> list[torch.Tensor]:
    """In the kernel's order."""
    return [new.q_rope, new.latents, new.norm, new.cos, new.sin, new.page_ids, new.offsets]


def _boxes(pages: torch.Tensor) -> TensorDescriptor:
    """A tensor map over the pool, in boxes of one tile's latents."""
    n_pages, page_tokens, width = pages.shape
    token = pages.stride(1)
    page = pages.stride(0) if n_pages > 1 else page_tokens * token
    box = [1, TILE_TOKENS, RANK]
    return TensorDescriptor(pages, [n_pages, page_tokens, width], [page, token, 1], box)


def _geometry(
    form: MlaForm,
    config: MlaConfig,
    q: torch.Tensor,
    pages: torch.Tensor,
    page_scales: torch.Tensor | None,
    out: torch.Tensor,
    *,
    gpu: bool,
) -> MlaGeometry:
    fp8 = form.kv_dtype is torch.float8_e4m3fn
    return MlaGeometry(
        heads=form.heads,
        q_tokens=form.q_tokens,
        rows=config.rows,
        page_tokens=form.page_tokens,
        boxes=form.boxes,
        ahead=config.ahead and gpu and form.boxes and pages.stride(1) == WIDTH,
        compute=(tl.float16 if fp8 else tl.bfloat16) if gpu else tl.float32,
        saturated=fp8,
        scaled=page_scales is not None,
        scale=form.scale * LOG2_E,
        merge_elements=config.merge_elements,
        overlap=config.overlap and gpu,
        token_bytes=form.token_bytes,
        **dict(zip(("q_sequence", "q_token", "q_head"), q.stride(), strict=False)),
        **dict(zip(("page", "token"), pages.stride(), strict=False)),
        page_scale=0 if page_scales is None else page_scales.stride(0),
        **dict(zip(("out_sequence", "out_token", "out_head"), out.stride(), strict=False)),
    )


# --------------------------------------------------------------------------------- arguments


def _check_tensors(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    page_scales: torch.Tensor | None,
    workspace: MlaWorkspace,
) -> None:
    form, device = workspace.form, workspace.device
    check_tensor("q", q, shape=(None, form.q_tokens, form.heads, WIDTH), dtypes=(torch.bfloat16,))
    require(q.device.type == device.type, "q", f"must be on the workspace's {device}")
    tokens = (None, form.page_tokens, WIDTH)
    check_tensor("pages", pages, shape=tokens, dtypes=(form.kv_dtype,), device=q.device)
    require(len(pages) > 0, "pages", "must not be empty")
    for name, tensor in (("q", q), ("pages", pages)):
        _check_aligned(name, tensor)
    in_page = form.page_tokens * pages.stride(1)
    require(in_page < 2**31, "pages", "must have a page's tokens within 2^31 elements")
    int32, one_each = (torch.int32,), (len(q),)
    check_tensor("page_table", page_table, shape=(len(q), None), dtypes=int32, device=q.device)
    require(page_table.shape[1] > 0, "page_table", "must have a column")
    check_tensor("lengths", lengths, shape=one_each, dtypes=int32, device=q.device)
    planned = len(workspace.lengths)
    require(planned == len(q), "q", f"must have the work list's {planned} sequences, not {len(q)}")
    if page_scales is not None:
        fp8 = form.kv_dtype is torch.float8_e4m3fn
        require(fp8, "page_scales", "must be given for float8_e4m3fn only")
        check_tensor(
            "page_scales",
            page_scales,
            shape=(len(pages),),
            dtypes=(torch.float32,),
            device=q.device,
            last_contiguous=False,
        )


def _check_aligned(name: str, tensor: torch.Tensor) -> None:
    steps = [s for size, s in zip(tensor.shape, tensor.stride(), strict=True) if size > 1][:-1]
    unit = ALIGNED_BYTES // tensor.dtype.itemsize
    require(
        tensor.data_ptr() % ALIGNED_BYTES == 0 and not any(step % unit for step in steps),
        name,
        "must have its address and strides in whole 16 bytes",
    )


def _check_values(
    page_table: torch.Tensor, lengths: torch.Tensor, n_pages: int, workspace: MlaWorkspace
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
    wrong = np.argwhere(matters & ((table < 0) | (table >= n_pages)))
    require(
        not len(wrong),
        "page_table",
        f"must have numbers of the pool's {n_pages} pages, unlike at {wrong[:1].tolist()}",
    )


# --------------------------------------------------------------------------------- variants

_TYPES = {torch.bfloat16: "bf16", torch.float8_e4m3fn: "fp8e4nv"}


def variants() -> Iterator[Variant]:
    """The usual forms, and those that need most of something."""
    rank = MlaForm(heads=16, scale=0.1)
    forms = {
        "16_rows": rank,
        "32_rows": replace(rank, q_tokens=2),
        "pages_of_16": replace(rank, page_tokens=16),
        "float8": replace(rank, kv_dtype=torch.float8_e4m3fn),
    }
    for name, form in forms.items():
        yield _variant(f"mla_{name}", form, config_for(form))
    for name in ("16_rows", "32_rows", "pages_of_16"):
        yield _variant(f"mla_append_{name}", forms[name], config_for(forms[name]), appends=True)


def _variant(name: str, form: MlaForm, config: MlaConfig, *, appends: bool = False) -> Variant:
    """As compiled for dense tensors."""
    kv, fp8 = _TYPES[form.kv_dtype], form.kv_dtype is torch.float8_e4m3fn
    q, out = (
        torch.empty((1, form.q_tokens, form.heads, width), device="meta") for width in (WIDTH, RANK)
    )
    pages = torch.empty((1, form.page_tokens, WIDTH), device="meta")
    scales = torch.empty(1, device="meta") if fp8 else None
    geometry = _geometry(form, config, q, pages, scales, out, gpu=True)
    pointers = {
        **dict.fromkeys(("q_ptr", "out_ptr"), "*bf16"),
        "pages_ptr": f"*{kv}",
        **dict.fromkeys(("table_ptr", "items_ptr", "meeting_ptr"), "*i32"),
        **dict.fromkeys(("partial_ptr", "moment_ptr", *(["page_scale_ptr"] * fp8)), "*fp32"),
    }
    new: dict[str, Any] = dict.fromkeys(NEW)
    if appends:
        new |= zip(NEW, (*["*bf16"] * 5, *["*i64"] * 2), strict=True)
    pointers |= {key: kind for key, kind in new.items() if kind}
    boxes = {"boxes": f"tensordesc<{kv}[1,{TILE_TOKENS},{RANK}]>"} if geometry.boxes else {}
    numbers = dict.fromkeys(("n_pages", "max_pages", "table_stride"), "i32")
    absent: dict[str, Any] = {"boxes": None, "page_scale_ptr": None, **dict.fromkeys(NEW)}
    signature = pointers | boxes | numbers
    return Variant(
        name=name,
        kernel=mla_kernel,
        signature=signature,
        constants={"g": geometry, "n": dense_new(form.heads, form.q_tokens) if appends else None}
        | {k: v for k, v in absent.items() if k not in signature},
        aligned=tuple(pointers),
        options={"num_warps": config.num_warps, "num_stages": config.num_stages},
        max_spills=0 if form.boxes and config.rows == FEW_ROWS else 640,
        # As many blocks as planned fit a multiprocessor, which has 228 KiB of shared memory, 1 KiB
        # of which is a block's own.
        max_shared_bytes=(228 // config.blocks_per_sm - 1) << 10,
    )


def dense_new(heads: int, q_tokens: int = 1) -> AppendGeometry:
    """Of queries as DeepSeek-V3's projection gives them, 128 + 64 a head."""
    head, half = 128 + WIDTH - RANK, (WIDTH - RANK) // 2
    return AppendGeometry(
        rows=power_of_two(q_tokens),
        interleaved=True,
        normed=False,
        eps=1e-6,
        angle_sequence=q_tokens * half,
        angle_token=half,
        k_sequence=q_tokens * WIDTH,
        k_token=WIDTH,
        q_sequence=heads * q_tokens * head,
        q_token=heads * head,
        q_head=head,
    )
