"""Grouped-query decode attention of many long sequences, through a ring of tiles (Hopper).

For one new token of each sequence, in bfloat16, with heads of 128 dimensions, a multiple of 8 KV
heads and up to 8 query heads for each, over pages of a multiple of 16 tokens. One launch, for
compute capability 9.0 only, in Gluon (Triton 3.6 to 3.9). `gqa_decode` does the same everywhere,
and all other forms.

Roofline. As for `gqa_decode`, KV bytes over what a plain read reaches: for 8 KV heads 4 KiB a
token, 1 us per 1,100 tokens on an H200. A multiprocessor gets a tile of 16 tokens (64 KiB) each 1.9
us, and multiplies it in 0.6.

How it gets there:
- One block of threads a multiprocessor, with three tiles of shared memory and a warp that keeps the
  copy engine filling them, past the ends of items (`gqa_ring_kernel` tells how).
- All KV heads of a tile are read at once, a page's bytes together: DRAM is as fast as for pages
  that are only read.
- Blocks claim the last part of the work, in small items, as they have read what they had
  (`gqa_ring_schedule`): multiprocessors read at unequal speed.
- Last tiles of fewer than 16 tokens are brought by a box that ends with the last token; page
  numbers outside of the pool give zeros. So nothing outside of the pool is ever read, nor stale
  bytes behind the last token.
- A warp of its own counts what has been stored, and the last part's block merges a sequence behind
  its next item, so that nothing waits.
- Partial results never reach the memory: they are the last to leave the L2, which drops them when
  they have been merged. Few bytes are written among many that are read at a high price: without
  this 4 MB cost as much as 20 MB of keys and values.
- A block knows its first item, and has its page numbers on their way, before launches ahead of it
  have ended.

Which block has which item is left to chance; the parts and the order of every sum are not: equal
inputs give bitwise equal outputs.
"""

# ruff: noqa: PLR0917 - attention is called by position: queries, keys, values

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.compiling import Variant
from kvstore_kernels.gqa_form import GqaForm
from kvstore_kernels.gqa_ring_kernel import THREADS_REGISTERS, gqa_ring_kernel
from kvstore_kernels.gqa_ring_schedule import TILE_TOKENS, plan_gqa_ring
from kvstore_kernels.mla_hopper import ALIGNED_ELEMENTS, LOG2_E, check_pages, multiprocessors
from kvstore_kernels.mla_ring_schedule import COLUMNS, RingList, most_items, most_partials

HEADS = 8  # KV heads of a tile
ROWS = 8  # query rows of a KV head, at most
DIM = 128
HALF = 64  # columns of a box: 128 bytes, the widest swizzle

OPTIONS = MappingProxyType({"num_warps": 8, "maxnreg": THREADS_REGISTERS})
_KV_BOX = (1, HEADS, 2, TILE_TOKENS, HALF)
_Q_BOX = (1, HEADS, ROWS, DIM)


class GqaRingWorkspace:
    """The buffers of fixed address that launches of one form need: the items, partial results.

    One workspace serves all layers of a model, one launch after another; launches that may run at
    the same time, on several streams, need one each. Once per step `plan` cuts the sequences (host
    only) and `load` copies the items to the device, before the launches or the replay of a graph
    that has them. Partial results take 32 KiB four times a worker, 17 MB on an H200.

    max_sequences: of a batch. workers: blocks of threads that a launch has; default the device's
    multiprocessors. Raises KernelArgumentError for forms that the kernel does not take.
    """

    def __init__(
        self,
        form: GqaForm,
        *,
        max_sequences: int,
        device: torch.device | str,
        workers: int | None = None,
    ) -> None:
        check_form(form)
        require(max_sequences >= 1, "max_sequences", "must be at least 1")
        self.form = form
        self.device = torch.empty(0, device=device).device  # with its index
        self.max_sequences = max_sequences
        self.workers = workers or multiprocessors(self.device)
        self.groups = form.kv_heads // HEADS
        size = 1 + most_items(max_sequences, self.groups, self.workers)
        partials = most_partials(self.workers)
        self.items = torch.zeros((size, COLUMNS), dtype=torch.int32, device=self.device)
        self.partials = torch.empty((partials, HEADS, DIM, ROWS), device=self.device)
        self.lse = torch.empty((partials, HEADS, ROWS), device=self.device)
        self.counters = torch.zeros(partials, dtype=torch.int32, device=self.device)
        self.claims = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.planned = self.plan([])

    def plan(self, lengths: npt.ArrayLike) -> RingList:
        """Cuts sequences of these lengths, new tokens included; pure host code. Raises
        KernelArgumentError."""
        return plan_gqa_ring(lengths, groups=self.groups, workers=self.workers)

    def load(self, planned: RingList) -> None:
        """Makes the launches that follow on this stream, captured ones too, do this list. Modifies
        items. Raises KernelArgumentError when it is for more than max_sequences."""
        rows = planned.items
        require(
            len(planned.lengths) <= self.max_sequences and len(rows) <= len(self.items),
            "planned",
            f"must be for at most {self.max_sequences} sequences",
        )
        self.items[: len(rows)].copy_(torch.from_numpy(rows))
        self.planned = planned


def check_form(form: GqaForm) -> None:
    """Raises KernelArgumentError for forms that the kernel does not take."""
    require(form.head_dim == DIM, "head_dim", f"must be {DIM}")
    require(form.q_tokens == 1, "q_tokens", "must be 1")
    require(form.group <= ROWS, "heads", f"must be at most {ROWS} for each KV head")
    require(form.kv_heads % HEADS == 0, "kv_heads", f"must be a multiple of {HEADS}")
    require(
        form.page_tokens % TILE_TOKENS == 0,
        "page_tokens",
        f"must be a multiple of {TILE_TOKENS}",
    )
    for name, dtype in (("dtype", form.dtype), ("kv_dtype", form.kv_dtype)):
        require(dtype is torch.bfloat16, name, "must be bfloat16")
    require(form.softcap is None, "softcap", "must be None")
    require(form.window is None, "window", "must be None")


def gqa_decode_ring(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    workspace: GqaRingWorkspace,
    *,
    out: torch.Tensor | None = None,
    check: bool = False,
) -> torch.Tensor:
    """Attention of each sequence's last token to all of its tokens.

    q: (batch, 1, heads, 128) bfloat16. k_pages, v_pages: (pages, kv_heads, page_tokens, 128)
    bfloat16 in any strides of whole 16 bytes but for the last, so views of any pool, as for
    `gqa_decode`. page_table: (batch, max_pages) int32, the pages of each sequence in order; entries
    past its length do not matter. The lengths are those that the workspace's list was made of.

    Returns (batch, 1, heads, 128) bfloat16: `out`, whose last dimension is contiguous, or a new
    tensor. Sequences without tokens give zeros. Modifies the workspace's partial results. Waits for
    nothing; may be captured in a graph.

    A page number outside of the pool reads as zeros, which gives a wrong result for that sequence
    alone. With `check` it raises KernelArgumentError, which waits for the GPU. Raises
    KernelArgumentError for wrong shapes, dtypes, devices, strides, and for tensors on the CPU.
    """
    lengths = workspace.planned.lengths
    _check_tensors(q, k_pages, v_pages, page_table, workspace, lengths)
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    check_tensor("out", out, shape=q.shape, dtypes=(q.dtype,), device=q.device)
    if check:
        check_pages(page_table, len(k_pages), workspace.form.page_tokens, lengths)
    require(q.device.type == "cuda", "q", f"must be on a CUDA device, not {q.device}")
    if len(q):
        _launch(q, k_pages, v_pages, page_table, workspace, out)
    return out


def _launch(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    workspace: GqaRingWorkspace,
    out: torch.Tensor,
) -> None:
    form = workspace.form
    scale = form.head_dim**-0.5 if form.scale is None else form.scale
    gqa_ring_kernel[(workspace.workers,)](
        described_pages(k_pages),
        described_pages(v_pages),
        described_queries(q, form),
        page_table,
        workspace.items,
        out,
        workspace.partials,
        workspace.lse,
        workspace.counters,
        workspace.claims,
        scale * LOG2_E,
        page_table.stride(0),
        form.page_tokens,
        form.group,
        out.stride(0),
        out.stride(2),
        launch_pdl=True,
        **OPTIONS,
    )


def described_pages(pages: torch.Tensor) -> Any:
    """A tensor map over (pages, KV heads, halves of a row, tokens, 64), in boxes of a tile."""
    n_pages, kv_heads, tokens, dim = pages.shape
    page, head, token, _ = pages.stride()
    return TensorDescriptor(
        pages,
        [n_pages, kv_heads, dim // HALF, tokens, HALF],
        [page, head, HALF, token, 1],
        list(_KV_BOX),
        gl.NVMMASharedLayout(128, 16, len(_KV_BOX)),
    )


def described_queries(q: torch.Tensor, form: GqaForm) -> Any:
    """A tensor map over (batch, KV heads, query heads of one, 128), in boxes of a tile's; there
    are zeros behind a KV head's query heads."""
    sequence, _, head, _ = q.stride()
    return TensorDescriptor(
        q,
        [len(q), form.kv_heads, form.group, DIM],
        [sequence, form.group * head, head, 1],
        list(_Q_BOX),
        gl.NVMMASharedLayout(128, 16, len(_Q_BOX)),
    )


# --------------------------------------------------------------------------------- arguments


def _check_tensors(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    workspace: GqaRingWorkspace,
    lengths: npt.NDArray[np.int64],
) -> None:
    form, device, batch = workspace.form, workspace.device, len(lengths)
    bf16 = (torch.bfloat16,)
    check_tensor("q", q, shape=(batch, 1, form.heads, DIM), dtypes=bf16)
    require(q.device == device, "workspace", f"must be on {q.device}, not {device}")
    _check_aligned("q", q)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        shape = (None, form.kv_heads, form.page_tokens, DIM)
        check_tensor(name, pages, shape=shape, dtypes=bf16, device=q.device)
        _check_aligned(name, pages)
    require(len(k_pages) == len(v_pages) > 0, "v_pages", "must be as many as k_pages, and some")
    int32 = (torch.int32,)
    check_tensor("page_table", page_table, shape=(batch, None), dtypes=int32, device=q.device)
    has = page_table.shape[1] * form.page_tokens
    longest = int(lengths.max(initial=0))
    require(longest <= has, "page_table", f"must have pages for {longest} tokens, not {has}")


def _check_aligned(name: str, tensor: torch.Tensor) -> None:
    require(
        tensor.data_ptr() % 16 == 0 and not any(s % ALIGNED_ELEMENTS for s in tensor.stride()[:-1]),
        name,
        "must have its address and strides in whole 16 bytes",
    )


# ---------------------------------------------------------------------------------- compiled


def variants() -> Iterator[Variant]:
    """One specialisation serves all forms."""
    boxes = {
        name: f"tensordesc<bf16[{', '.join(map(str, box))}],"
        f"{gl.NVMMASharedLayout(128, 16, len(box))!r}>"
        for name, box in (("k_desc", _KV_BOX), ("v_desc", _KV_BOX), ("q_desc", _Q_BOX))
    }
    pointers = {
        **dict.fromkeys(("page_table", "items"), "*i32"),
        "out": "*bf16",
        **dict.fromkeys(("partials", "lse"), "*fp32"),
        **dict.fromkeys(("counters", "claims"), "*i32"),
    }
    sizes = ("table_stride", "page_tokens", "rows", "out_sequence", "out_head")
    yield Variant(
        name="gqa ring",
        kernel=gqa_ring_kernel,
        signature={**boxes, **pointers, "scale": "fp32", **dict.fromkeys(sizes, "i32")},
        aligned=tuple(pointers),
        options=OPTIONS,
        gluon=True,
        max_registers=THREADS_REGISTERS,
    )
