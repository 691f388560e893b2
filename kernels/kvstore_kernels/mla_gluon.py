"""Latent attention of many query rows to pages: decode at the speed of the matrix units (Hopper).

For 64 rows (query heads times new tokens) and more of each sequence, in bfloat16; below that,
reading is the limit and `mla_decode` the kernel. One launch, for compute capability 9.0 only, in
Gluon (Triton 3.6 to 3.9), since plain Triton leaves half of the matrix units' speed: it can neither
let two groups of warps take turns nor leave products in flight across a softmax.

Roofline. A token costs 2 * rows * (576 + 512) FLOPs and 1,152 bytes: at 128 rows 242 FLOPs a byte,
over the 170 at which an H200 turns from memory- to matrix-bound. So the floor is FLOPs over what
the matrix units sustain: 64 sequences of 16,384 tokens and 128 heads are 292 GFLOP, 385 us at 760
TFLOP/s, of which a long run keeps 670. A pair of blocks (128 tokens, 64 rows) is 17.8 MFLOP, 4,352
cycles of one multiprocessor's matrix units, 2.5 us. The next limit is near: each multiprocessor
takes 144 KiB a pair from the L2, 5.5 TB/s in all at 660 TFLOP/s.

Measured on an H200 with 128 heads: 640 to 667 TFLOP/s at 64 x 16384, 13.5 us at 1 x 4096, and 44 us
at 16 x 4096, where merging parts costs most.

How it gets there:
- One block of threads a multiprocessor, which goes through its items of a `mla_gluon_schedule`:
  even loads, with few cuts through sequences.
- Consecutive launches overlap (programmatic dependent launch): the next one's blocks begin where
  this one's have ended; they touch memory only once all have.
- Inside an item, two warpgroups and a loading warp take turns (`mla_gluon_seesaw` tells how). Two
  tiles of 72 KiB and the queries fill the shared memory; halves of a tile are freed and brought
  again as soon as they have been multiplied.
- Tiles of 64 query rows of one sequence run side by side on neighbouring multiprocessors and find
  each other's tokens in the L2, so that the memory sees each byte about once.
- Last blocks of fewer than 64 tokens are brought by a box that ends with the last token and begins
  outside of the page, where the hardware gives zeros. Page numbers outside of the pool give zeros
  the same way: nothing outside of the pool is ever read, nor stale bytes behind the last token.
- Parts of one sequence leave float32 partial results, 128 KiB each, and count their arrival at GPU
  scope. When a worker has no items left it merges its share of every sequence of which it had a
  part, 64 / parts rows from all of them, so that the merge is as parallel as the products were.
  Waiting there is safe, since all blocks of the launch run at once and each waits only when its own
  partial results are there. Counters go back to zero, for the next launch or a graph's replay.

The order of every sum is fixed by the schedule, so equal inputs give bitwise equal outputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import MappingProxyType

import numpy.typing as npt
import torch

from kvstore_kernels.checks import require
from kvstore_kernels.compiling import Variant
from kvstore_kernels.mla_gluon_schedule import (
    COLUMNS,
    TileSchedule,
    most_partials,
    most_records,
    plan_tiles,
)
from kvstore_kernels.mla_gluon_seesaw import THREADS_REGISTERS, seesaw_kernel
from kvstore_kernels.mla_hopper import (
    MlaHopperForm,
    MlaHopperWorkspace,
    check_pages,
    check_tensors,
    launch,
    multiprocessors,
    output_of,
    signature_of,
)
from kvstore_kernels.mla_reference import RANK

TILE_ROWS = 64

OPTIONS = MappingProxyType({"num_warps": 4, "maxnreg": THREADS_REGISTERS})


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaTilesForm(MlaHopperForm):
    """A `MlaHopperForm` whose new tokens are in the pages already."""

    @property
    def tiles(self) -> int:
        """Tiles of 64 query rows of a sequence."""
        return -(-self.rows // TILE_ROWS)


class MlaTilesWorkspace(MlaHopperWorkspace[MlaTilesForm]):
    """The buffers of fixed address that launches of one form need: the schedule, partial results.

    One workspace serves all layers of a model, one launch after another; launches that may run at
    the same time, on several streams, need one each. Once per step `plan` cuts the sequences (host
    only) and `load` copies the schedule to the device, before the launches or the replay of a graph
    that has them. Partial results take 128 KiB twice a worker, 35 MB on an H200.

    max_sequences: of a batch. workers: blocks of threads that run at once; default the device's
    multiprocessors, and never more: they wait for each other.
    """

    def __init__(
        self,
        form: MlaTilesForm,
        *,
        max_sequences: int,
        device: torch.device | str,
        workers: int | None = None,
    ) -> None:
        super().__init__(form, max_sequences=max_sequences, device=device, workers=workers)
        require(
            form.tiles <= self.workers <= max(multiprocessors(self.device), form.tiles),
            "workers",
            f"must be {form.tiles} to the number of the device's multiprocessors",
        )
        rows = most_records(max_sequences, form.tiles, self.workers)
        partials = most_partials(form.tiles, self.workers)
        self.records = torch.full((rows, COLUMNS), -1, dtype=torch.int32, device=self.device)
        self.partials = torch.empty(
            (partials, TILE_ROWS, RANK), dtype=torch.float32, device=self.device
        )
        self.lse = torch.empty((partials, 2, TILE_ROWS), dtype=torch.float32, device=self.device)
        self.counters = torch.zeros((partials, 2), dtype=torch.int32, device=self.device)
        self.schedule = plan_tiles([], tiles=form.tiles, workers=self.workers)

    def plan(self, lengths: npt.ArrayLike) -> TileSchedule:
        """Cuts sequences of these lengths, new tokens included; pure host code. Raises
        KernelArgumentError."""
        return plan_tiles(lengths, tiles=self.form.tiles, workers=self.workers)

    def load(self, schedule: TileSchedule) -> None:
        """Makes the launches that follow on this stream, captured ones too, do this schedule.
        Modifies records. Raises KernelArgumentError when it is for more than max_sequences."""
        self._load("schedule", schedule.records, schedule.lengths, self.records)
        self.schedule = schedule


def mla_decode_tiles(
    q: torch.Tensor,
    pages: torch.Tensor,
    page_table: torch.Tensor,
    workspace: MlaTilesWorkspace,
    *,
    out: torch.Tensor | None = None,
    check: bool = False,
) -> torch.Tensor:
    """Causal latent attention of each sequence's last q_tokens tokens to all of its tokens.

    q: (batch, q_tokens, heads, 576) bfloat16, latent part then rope part; heads and tokens evenly
    spaced. pages: (pages, page_tokens, 576) bfloat16, any page and token strides of whole 16 bytes,
    so a layer's view of a pool of several layers too. page_table: (batch, max_pages) int32, the
    pages of each sequence in order; entries past its length do not matter. The lengths are those
    that the workspace's schedule was made of.

    Returns (batch, q_tokens, heads, 512) bfloat16: `out`, or a new tensor. Queries that see no
    token (length 0, or new tokens that do not exist) give zeros. Modifies the workspace's partial
    results. Waits for nothing; may be captured in a graph.

    A page number outside of the pool reads as zeros, which gives a wrong result for that sequence
    alone. With `check` it raises KernelArgumentError, which waits for the GPU. Raises
    KernelArgumentError for wrong shapes, dtypes, devices, strides, and for tensors on the CPU.
    """
    lengths = workspace.schedule.lengths
    check_tensors(q, pages, page_table, workspace, lengths)
    out = output_of(q, out)
    if check:
        check_pages(page_table, len(pages), workspace.form.page_tokens, lengths)
    require(q.device.type == "cuda", "q", f"must be on a CUDA device, not {q.device}")
    if len(q):
        launch(
            seesaw_kernel,
            workspace,
            q,
            pages,
            page_table,
            (workspace.records, out, workspace.partials, workspace.lse, workspace.counters),
            (),
            q_rows=TILE_ROWS,
            options=OPTIONS,
        )
    return out


def variants() -> Iterator[Variant]:
    """The one specialisation, which serves all forms."""
    buffers = {"records": "*i32", "out": "*bf16", "partials": "*fp32", "lse": "*fp32",
               "counters": "*i32"}  # fmt: skip
    yield Variant(
        name="mla tiles",
        kernel=seesaw_kernel,
        signature=signature_of(buffers, q_rows=TILE_ROWS),
        aligned=("page_table", *buffers),
        options=OPTIONS,
        gluon=True,
        max_registers=THREADS_REGISTERS,
        max_spills=32,  # arguments that are needed again only when parts are merged
    )
