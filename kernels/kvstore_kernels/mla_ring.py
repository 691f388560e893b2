"""Latent attention of few query rows to pages, through a ring of tiles: at reading speed (Hopper).

For up to 16 query rows (heads times new tokens) of each sequence, which is what a rank of a
tensor-parallel model has, in bfloat16, over pages of a multiple of 64 tokens; any number of rows
works, as groups of 16 that read the pages anew. One launch, for compute capability 9.0 only, in
Gluon (Triton 3.6 to 3.9). `mla_decode` does the same everywhere, and other pages.

Roofline. A token costs 1,152 bytes and 2 * 16 * (576 + 512) FLOPs: 30 FLOPs a byte, under the 170
at which an H200 turns from memory- to matrix-bound. So the floor is bytes over what a plain read
reaches, 4.5 TB/s on an H200: 67 us for 64 sequences of 4,096 tokens, 268 us of 16,384. A
multiprocessor then gets a tile of 64 tokens (72 KiB) each 2.2 us, and multiplies it in one.

How it gets there:
- One block of threads a multiprocessor, with three tiles of shared memory and a warp that keeps the
  copy engine filling them, past the ends of items (`mla_ring_kernel` tells how). So memory is only
  at rest until the first tile comes, and while the last parts are merged.
- Both products have the tokens or the latent columns as their rows and the queries as their
  columns, so that 16 query rows fill the matrix units without padding.
- Multiprocessors read at unequal speed. So blocks claim the last part of the work, in small items,
  as they have read what they had (`mla_ring_schedule`).
- Last tiles of fewer than 64 tokens are brought by a box that ends with the last token and begins
  before the page, where the hardware gives zeros; page numbers outside of the pool give zeros the
  same way. So nothing outside of the pool is ever read, nor stale bytes behind the last token.
- Parts leave partial results in float32, 32 KiB each; a warp of its own counts their arrival, so
  that nothing else waits until they are written. Blocks merge what they had parts of once they have
  no more items, each some of the columns. They wait only for blocks that have started, whatever
  else runs on the GPU.
- Consecutive launches overlap (programmatic dependent launch): the next one's blocks begin where
  this one's have ended; they touch what kernels write only once all have.

Which block has which item is left to chance; the parts and the order of every sum are not: equal
inputs give bitwise equal outputs.
"""

# ruff: noqa: PLR0917 - attention is called by position: queries, pages

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy.typing as npt
import torch

from kvstore_kernels.checks import require
from kvstore_kernels.compiling import Variant
from kvstore_kernels.fused import NewLatents, check_latents, check_places, latent_geometry
from kvstore_kernels.mla_decode import NEW, dense_new
from kvstore_kernels.mla_hopper import (
    MlaHopperForm,
    MlaHopperWorkspace,
    check_pages,
    check_tensors,
    launch,
    output_of,
    signature_of,
)
from kvstore_kernels.mla_reference import RANK
from kvstore_kernels.mla_ring_kernel import THREADS_REGISTERS, ring_kernel
from kvstore_kernels.mla_ring_schedule import (
    COLUMNS,
    RingList,
    most_items,
    most_partials,
    plan_ring,
)

ROWS = 16
MOST_ITEMS = (1 << 16) - 1  # they are counted in half a word

OPTIONS = MappingProxyType({"num_warps": 4, "maxnreg": THREADS_REGISTERS})


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaRingForm(MlaHopperForm):
    """A `MlaHopperForm` whose new tokens are in the pages already, or written by the launch."""

    @property
    def groups(self) -> int:
        """Groups of 16 query rows of a sequence."""
        return -(-self.rows // ROWS)


class MlaRingWorkspace(MlaHopperWorkspace[MlaRingForm]):
    """The buffers of fixed address that launches of one form need: the items, partial results.

    One workspace serves all layers of a model, one launch after another; launches that may run at
    the same time, on several streams, need one each. Once per step `plan` cuts the sequences (host
    only) and `load` copies the items to the device, before the launches or the replay of a graph
    that has them. Partial results take 32 KiB four times a worker, 17 MB on an H200.

    max_sequences: of a batch. workers: blocks of threads that a launch has; default the device's
    multiprocessors.
    """

    def __init__(
        self,
        form: MlaRingForm,
        *,
        max_sequences: int,
        device: torch.device | str,
        workers: int | None = None,
    ) -> None:
        super().__init__(form, max_sequences=max_sequences, device=device, workers=workers)
        size = 1 + most_items(max_sequences, form.groups, self.workers)
        require(size <= MOST_ITEMS, "max_sequences", f"must make at most {MOST_ITEMS} items")
        partials = most_partials(self.workers)
        self.items = torch.zeros((size, COLUMNS), dtype=torch.int32, device=self.device)
        self.partials = torch.empty((partials, RANK, ROWS), device=self.device)
        self.lse = torch.empty((partials, ROWS), device=self.device)
        self.counters = torch.zeros(partials, dtype=torch.int64, device=self.device)
        self.claims = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.planned = self.plan([])

    def plan(self, lengths: npt.ArrayLike) -> RingList:
        """Cuts sequences of these lengths, new tokens included; pure host code. Raises
        KernelArgumentError."""
        return plan_ring(lengths, groups=self.form.groups, workers=self.workers)

    def load(self, planned: RingList) -> None:
        """Makes the launches that follow on this stream, captured ones too, do this list. Modifies
        items. Raises KernelArgumentError when it is for more than max_sequences."""
        self._load("planned", planned.items, planned.lengths, self.items)
        self.planned = planned


def mla_decode_ring(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    workspace: MlaRingWorkspace,
    *,
    append: NewLatents | None = None,
    out: torch.Tensor | None = None,
    check: bool = False,
) -> torch.Tensor:
    """Causal latent attention of each sequence's last q_tokens tokens to all of its tokens.

    q: (batch, q_tokens, heads, 576) bfloat16, latent part then rope part; heads and tokens evenly
    spaced. pages: (pages, page_tokens, 576) bfloat16, any page and token strides of whole 16 bytes,
    so a layer's view of a pool of several layers too. page_table: (batch, max_pages) int32, the
    pages of each sequence in order; entries past its length do not matter. The lengths are those
    that the workspace's list was made of. append: the new tokens, which are not in the pages yet:
    they are written there, and q's rope part, which is there before rotation, is not read from q.

    Returns (batch, q_tokens, heads, 512) bfloat16: `out`, or a new tensor. Queries that see no
    token (length 0, or new tokens that do not exist) give zeros. Modifies the workspace's partial
    results, and pages with `append`. Waits for nothing; may be captured in a graph.

    A page number outside of the pool reads as zeros, which gives a wrong result for that sequence
    alone, and nothing is written there. With `check` it raises KernelArgumentError, which waits for
    the GPU. Raises KernelArgumentError for wrong shapes, dtypes, devices, strides, and for tensors
    on the CPU.
    """
    lengths, page_tokens = workspace.planned.lengths, workspace.form.page_tokens
    check_tensors(q, pages, page_table, workspace, lengths)
    out = output_of(q, out)
    if append is not None:
        check_latents(q, append, RANK)
    if check:
        check_pages(page_table, len(pages), page_tokens, lengths)
        if append is not None:
            check_places(append, page_table, lengths, page_tokens)
    require(q.device.type == "cuda", "q", f"must be on a CUDA device, not {q.device}")
    if len(q):
        _launch(q, pages, page_table, workspace, append, out)
    return out


def _launch(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    workspace: MlaRingWorkspace,
    append: NewLatents | None,
    out: torch.Tensor,
) -> None:
    results = (out, workspace.partials, workspace.lse, workspace.counters, workspace.claims)
    launch(
        ring_kernel,
        workspace,
        q,
        pages,
        page_table,
        (workspace.items, *results),
        _new(append, pages),
        q_rows=ROWS,
        options=OPTIONS,
    )


def _new(new: NewLatents | None, pages: torch.Tensor) -> list[Any]:
    """What the kernel is told of new tokens."""
    if new is None:
        return [None] * (len(NEW) + 5)
    return [
        *(new.q_rope, new.latents, new.norm, new.cos, new.sin, new.page_ids, new.offsets),
        *(pages, len(pages), pages.stride(0), pages.stride(1)),
        latent_geometry(new),
    ]


def variants() -> Iterator[Variant]:
    """Without new tokens one specialisation serves all forms; with them, it has their strides."""
    buffers = {"items": "*i32", "out": "*bf16", "partials": "*fp32", "lse": "*fp32",
               "counters": "*i64", "claims": "*i32"}  # fmt: skip
    signature = signature_of(buffers, q_rows=ROWS)
    numbers = dict.fromkeys(("n_pages", "page_stride", "token_stride"), "i32")
    new = dict(zip(NEW, (*["*bf16"] * 5, *["*i64"] * 2), strict=True)) | {"pages_ptr": "*bf16"}
    for name, more, geometry in (
        ("mla ring", {}, None),
        ("mla ring, append", new | numbers, dense_new(ROWS)),
    ):
        known = signature | more
        absent = [key for key in (*new, *numbers) if key not in known]
        yield Variant(
            name=name,
            kernel=ring_kernel,
            signature=known,
            constants={"n": geometry, **dict.fromkeys(absent)},
            aligned=tuple(key for key, kind in known.items() if kind.startswith("*")),
            options=OPTIONS,
            gluon=True,
            max_registers=THREADS_REGISTERS,
            max_spills=32 if more else 0,
        )
