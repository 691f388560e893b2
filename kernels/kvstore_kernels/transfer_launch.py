"""A transfer's kernels, launched with as little work of the host as can be.

The first copy to the host waits for a kernel, and the kernel for the host. `Collator.launch` finds
its plan, and Triton the binary that fits the arguments, each time anew: 30 us, and more than 100
where the host has done something else for some milliseconds, so that nothing of it is in a cache.
Here all of that is settled once, and a launch is given addresses.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch

from kvstore_kernels.collate import BROUGHT_WORDS, Collator
from kvstore_kernels.collate_kernels import (
    bring_kernel,
    collate_kernel,
    quantise_kernel,
    scatter_kernel,
)
from kvstore_kernels.collate_plan import QUANTISE_TUNING, Tuning, plan_copy, plan_quantise

ROW_ALIGNMENT = 16  # bytes, of rows in a buffer


class BufferKernel:
    """Blocks between a collator's pages and rows of buffers, with the usual tuning.

    Numbers of runs that do not exist do no harm: they become zeros, or nothing is written.
    """

    def __init__(
        self, collator: Collator, *, runs: torch.dtype, stride: int, out: bool, keep: bool = False
    ) -> None:
        """Compiles, which takes about a second; the current device is the pages'.

        runs: the dtype of their numbers. stride: bytes from row to row of a buffer, a multiple of
        ROW_ALIGNMENT, as its address is. out: from the pages to the rows. keep: what is written is
        the last to leave the L2.
        """
        pages, form = collator.table.form, collator.form
        alignment = math.gcd(ROW_ALIGNMENT, collator.table.alignment)
        quantised = out and form.scaled
        make, tuning = (plan_quantise, QUANTISE_TUNING) if quantised else (plan_copy, Tuning())
        plan = make(collator.pairing, alignment, replace(tuning, keep=keep))
        kernel: Any = quantise_kernel if quantised else collate_kernel if out else scatter_kernel
        self._table = collator.table.pointers
        self._table_address = self._table.data_ptr()
        self._tiles_per_block = plan.geometry.tiles_per_block
        self._geometry = plan.geometry
        # Runs of the pool, bytes from row to row, and bytes of all rows, which matter with offsets.
        self._numbers = (pages.pages * pages.runs_per_page(form.block_tokens), stride, 0)
        no_runs = torch.empty(0, dtype=runs, device=self._table.device)
        no_rows = torch.empty(0, dtype=torch.uint8, device=self._table.device)
        arguments = (self._table, no_runs, no_rows, None, *self._numbers, 0, self._geometry)
        self._compiled = kernel[(1,)](*arguments, num_warps=plan.warps)

    def launch(
        self, runs: int, rows: int, blocks: int, stream: int, programs: int | None = None
    ) -> None:
        """Moves blocks, at least one; other arguments are addresses and a stream's handle.

        runs: of their numbers, on the GPU or pinned on the host. rows: of the buffer. programs:
        that work at a time at most; None for all at once.
        """
        tiles = blocks * self._tiles_per_block
        self._compiled[(min(tiles, programs or tiles), 1, 1)](
            self._table_address,
            runs,
            rows,
            None,
            *self._numbers,
            tiles,
            self._geometry,
            stream=stream,
        )


class NumbersKernel:
    """Numbers in pinned memory, brought to the GPU."""

    def __init__(self, device: torch.device) -> None:
        """Compiles; the device is the current one."""
        none = torch.empty(0, dtype=torch.int32, device=device)
        self._compiled: Any = bring_kernel[(1,)](none, none, 0, BROUGHT_WORDS, num_warps=4)

    def launch(self, source: int, target: int, nbytes: int, stream: int) -> None:
        """source, target: addresses. nbytes: a multiple of 4. stream: its handle."""
        words = nbytes // 4
        grid = (-(-words // BROUGHT_WORDS), 1, 1)
        self._compiled[grid](source, target, words, BROUGHT_WORDS, stream=stream)
