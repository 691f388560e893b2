"""Pages of all layers gathered into rows of cells, and scattered back; one launch for many blocks.

What is done on the way costs nothing extra, because all of it is choosing addresses or arithmetic
on bytes that pass through registers anyway: pages that are scattered over a pool for each layer,
any order of dimensions on the engine's side, some of the heads and layers of a row (so that engines
of different tensor parallelism read each other's blocks), bfloat16 or float16 to float8_e4m3 with
a scale for each head, and back.

Floor: every byte is read once and written once, so the time is (bytes read + bytes written) / the
rate of a plain copy. To stay near it, a tile of 2 KiB is one program: it reads two numbers (a
pointer of the table, a run's number), and then has all of its loads, 16 bytes a thread each, under
way before its first store. Dozens of such programs are resident on a multiprocessor, which hides
the two dependent reads. All shapes and strides are compile-time constants, so that addresses
are shifts and a wide multiplication, and the compiler sees how each address is aligned. A quantised
tile holds whole heads: it is read once, its largest magnitude is found across the threads, and what
is in registers, as it was read, is scaled and written; of a head of more than 72 KiB the rest is
read again, out of a cache.

An address is never outside of the pool or of the rows' memory, whatever the numbers say: a run that
does not exist is gathered as zeros, and nothing is scattered to it.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import triton

from kvstore_kernels.checks import check_tensor, require
from kvstore_kernels.collate_kernels import (
    bring_kernel,
    collate_kernel,
    quantise_kernel,
    scatter_kernel,
)
from kvstore_kernels.collate_plan import (
    QUANTISE_TUNING,
    ZERO_COPY_TUNING,
    Pairing,
    Plan,
    Tuning,
    plan_copy,
    plan_quantise,
)
from kvstore_kernels.compiling import Variant
from kvstore_kernels.page_table import SCALE_BYTES, CellForm, PageForm, PageTable

BROUGHT_WORDS = 1024  # by one program, of numbers
ZERO_COPY_PROGRAMS = 2  # two keep a PCIe link busy; eight were seen to halve a decode's speed
_MOST_TILES = (1 << 31) - 1


class Collator:
    """Moves blocks between the pages of one engine rank and rows of one form, on the GPU.

    table: the rank's pages. form: of the rows. first_head, first_layer: the head and layer of the
    row that the pages' first is; the row may have more of both, which are left as they are. Where
    the form has scales, pages of bfloat16, float16 or float32 are quantised and dequantised;
    otherwise both sides have the same dtype and bytes are copied. Quantised, a NaN stays one, and a
    head with an infinity comes back as NaNs.

    Raises KernelArgumentError where table and form do not fit each other. Each direction compiles
    when it is first used, about a second, and again for rows that are aligned differently. Calls
    are asynchronous, on the current stream; a CUDA graph can have them where runs are on the GPU.
    """

    def __init__(
        self,
        table: PageTable,
        form: CellForm,
        *,
        first_head: int = 0,
        first_layer: int = 0,
        tuning: Tuning | None = None,
    ) -> None:
        self.pairing = Pairing(
            pages=table.form, form=form, first_head=first_head, first_layer=first_layer
        )
        self.table, self.form = table, form
        self._tuning = tuning
        self._plans: dict[tuple[bool, int, bool], Plan] = {}

    def collate(
        self,
        runs: torch.Tensor,
        cells: torch.Tensor,
        offsets: torch.Tensor | None = None,
        *,
        programs: int | None = None,
        check: bool = False,
    ) -> None:
        """Writes the rows of blocks from their pages.

        runs: (blocks, runs per block) int32 or int64, on the CPU or the GPU, see `runs_of`.
        cells: uint8 memory of rows, on the GPU or pinned on the host (then the kernel itself writes
        across the link). Without offsets: (blocks, at least the row's bytes), rows at any distance.
        With offsets, (blocks,) int64 on either side: (n,), row i begins at byte offsets[i], a
        multiple of 16. programs: how many work at a time at most; None is as many as there is work
        for, and on host memory ZERO_COPY_PROGRAMS. check: whether runs and offsets that are on the
        GPU are checked too, which waits for it; on the CPU they always are.

        Raises KernelArgumentError for arguments that do not fit, before anything is written. A run
        that is not checked and does not exist is written as zeros, and a row that is not within
        `cells` is not written.
        """
        self.check(runs, cells, offsets, check=check)
        self.launch(runs, cells, offsets, out=True, programs=programs)

    def scatter(
        self,
        runs: torch.Tensor,
        cells: torch.Tensor,
        offsets: torch.Tensor | None = None,
        *,
        programs: int | None = None,
        check: bool = False,
    ) -> None:
        """Writes the pages of blocks from their rows; arguments and errors as for `collate`.

        What is not checked and does not exist on either side is not written.
        """
        self.check(runs, cells, offsets, check=check)
        self.launch(runs, cells, offsets, out=False, programs=programs)

    def check(
        self,
        runs: torch.Tensor,
        cells: torch.Tensor,
        offsets: torch.Tensor | None = None,
        *,
        check: bool = False,
    ) -> None:
        """Raises KernelArgumentError for arguments that `collate` and `scatter` would refuse."""
        device = self.table.device
        usable = device.type == "cuda" or triton.knobs.runtime.interpret
        require(usable, "table", f"must have pages on a GPU, not on {device}")
        self._check_runs(runs, check=check)
        check_tensor("cells", cells, shape=cells.shape, dtypes=(torch.uint8,))
        require(
            cells.device == device or (cells.device.type == "cpu" and cells.is_pinned()),
            "cells",
            f"must be on {device}, or pinned host memory",
        )
        if offsets is None:
            self._check_rows(len(runs), cells)
        else:
            self._check_offsets(len(runs), cells, offsets, check=check)

    def launch(
        self,
        runs: torch.Tensor,
        cells: torch.Tensor,
        offsets: torch.Tensor | None = None,
        *,
        out: bool,
        programs: int | None = None,
    ) -> None:
        """`collate` (out) or `scatter` of what `check` has passed, whole or in part."""
        require(programs is None or programs >= 1, "programs", "must be at least 1")
        kernel = _kernel(out=out, scaled=self.form.scaled)
        across = cells.device != self.table.device
        stride = cells.stride(0) if offsets is None and len(runs) > 1 else 0
        alignment = math.gcd(16, cells.data_ptr(), stride)
        plan = self._plan(alignment, quantise=kernel is quantise_kernel, across=across)
        tiles = len(runs) * plan.geometry.tiles_per_block
        require(tiles <= _MOST_TILES, "runs", f"makes {tiles} tiles, over {_MOST_TILES}")
        if not tiles:
            return
        limit = programs or (ZERO_COPY_PROGRAMS if across else tiles)
        device = self.table.device
        with _on(device):
            kernel[(min(tiles, limit),)](
                self.table.pointers,
                _moved(runs, device),
                cells,
                None if offsets is None else _moved(offsets, device),
                self._n_runs(),
                stride,
                cells.numel(),
                tiles,
                plan.geometry,
                num_warps=plan.warps,
            )

    def _plan(self, alignment: int, *, quantise: bool, across: bool) -> Plan:
        """For rows that are aligned like this; across: a link to the host's memory."""
        key = (quantise, alignment, across)
        if key not in self._plans:
            make = plan_quantise if quantise else plan_copy
            usual = ZERO_COPY_TUNING if across else QUANTISE_TUNING if quantise else Tuning()
            tuning = self._tuning or usual
            self._plans[key] = make(self.pairing, math.gcd(alignment, self.table.alignment), tuning)
        return self._plans[key]

    def _n_runs(self) -> int:
        """Runs of the whole pool; a run's number is less."""
        pages = self.table.form
        return pages.pages * pages.runs_per_page(self.form.block_tokens)

    def _check_runs(self, runs: torch.Tensor, *, check: bool) -> None:
        shape = (None, self.table.form.runs_per_block(self.form.block_tokens))
        check_tensor("runs", runs, shape=shape, dtypes=(torch.int32, torch.int64))
        require(runs.is_contiguous(), "runs", "must be contiguous")
        bounds = self._bounds("runs", runs, check=check)
        count = self._n_runs()
        if bounds is not None:
            least, most = bounds
            require(least >= 0, "runs", f"have {least}, which is no run")
            require(most < count, "runs", f"have {most}, and the pool has {count} runs")

    def _check_rows(self, blocks: int, cells: torch.Tensor) -> None:
        nbytes = self.form.nbytes
        check_tensor("cells", cells, shape=(blocks, None), dtypes=(torch.uint8,))
        require(cells.shape[1] >= nbytes, "cells", f"must have rows of {nbytes} bytes")
        distance = cells.stride(0) if blocks > 1 else nbytes
        require(distance >= nbytes, "cells", "must have rows that do not overlap")
        aligned = math.gcd(cells.data_ptr(), distance) % SCALE_BYTES == 0
        require(aligned or not self.form.scaled, "cells", "must be aligned for float32 scales")

    def _check_offsets(
        self, blocks: int, cells: torch.Tensor, offsets: torch.Tensor, *, check: bool
    ) -> None:
        check_tensor("cells", cells, shape=(None,), dtypes=(torch.uint8,))
        check_tensor("offsets", offsets, shape=(blocks,), dtypes=(torch.int64,))
        aligned = cells.data_ptr() % SCALE_BYTES == 0
        require(aligned or not self.form.scaled, "cells", "must be aligned for float32 scales")
        bounds = self._bounds("offsets", offsets, check=check)
        if bounds is not None:
            least, most = bounds
            require(least >= 0, "offsets", f"have {least}, before the first byte")
            require(
                most <= cells.numel() - self.form.nbytes,
                "offsets",
                f"have {most}, which leaves less than {self.form.nbytes} bytes of {cells.numel()}",
            )
            require(not bool((offsets % 16).any()), "offsets", "must be multiples of 16")

    def _bounds(self, name: str, numbers: torch.Tensor, *, check: bool) -> tuple[int, int] | None:
        """The least and the largest, where they are to be checked and there are any."""
        device, on_cpu = self.table.device, numbers.device.type == "cpu"
        require(on_cpu or numbers.device == device, name, f"must be on {device} or on the CPU")
        if not numbers.numel() or not (on_cpu or check):
            return None
        least, most = torch.aminmax(numbers)
        return int(least), int(most)


def _kernel(*, out: bool, scaled: bool) -> Any:
    if not out:
        return scatter_kernel
    return quantise_kernel if scaled else collate_kernel


def _on(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(device)


def _moved(numbers: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for it."""
    if numbers.device == device:
        return numbers
    return numbers.pin_memory().to(device, non_blocking=True)


def variants() -> Iterator[Variant]:
    """Of all kernels: the usual forms of pages, and those that need most of something."""
    half = torch.bfloat16
    nhd = _dense(layers=32, heads=8, head_dim=128, page_tokens=16, dtype=half)
    hnd = _dense(layers=32, heads=8, head_dim=128, page_tokens=16, dtype=half, heads_first=True)
    one = _dense(layers=32, heads=1, head_dim=128, page_tokens=16, dtype=half)
    odd = _dense(layers=30, heads=3, head_dim=80, page_tokens=16, dtype=half)
    mla = _dense(layers=61, heads=1, head_dim=576, page_tokens=64, dtype=half, kinds=1)
    wide = _dense(layers=4, heads=4, head_dim=576, page_tokens=64, dtype=torch.float32)
    wide_fp8 = plan_quantise(
        Pairing(pages=wide, form=_form(wide, torch.float8_e4m3fn)), 16, QUANTISE_TUNING
    )
    yield _variant("quantise_float32", quantise_kernel, wide_fp8, max_registers=192)
    for name, pages in (("nhd", nhd), ("hnd", hnd), ("one_head", one), ("odd", odd), ("mla", mla)):
        pairing = Pairing(pages=pages, form=_form(pages, half))
        yield _variant(f"collate_{name}", collate_kernel, plan_copy(pairing, 16, Tuning()))
        yield _variant(f"scatter_{name}", scatter_kernel, plan_copy(pairing, 16, Tuning()))
        across = plan_copy(pairing, 16, ZERO_COPY_TUNING)
        # A thread of 1024 has 64 registers; a few bytes spilled are nothing beside the link.
        yield _variant(f"collate_across_{name}", collate_kernel, across, max_spills=16)
        fp8 = Pairing(pages=pages, form=_form(pages, torch.float8_e4m3fn))
        quantise = plan_quantise(fp8, 16, QUANTISE_TUNING)
        yield _variant(f"quantise_{name}", quantise_kernel, quantise, max_registers=128)
        yield _variant(f"dequantise_{name}", scatter_kernel, plan_copy(fp8, 16, Tuning()))
    yield Variant(
        name="bring",
        kernel=bring_kernel,
        signature={"source_ptr": "*i32", "target_ptr": "*i32", "n_words": "i32"},
        constants={"WORDS": BROUGHT_WORDS},
        options={"num_warps": 4},
        max_registers=32,
    )


def _dense(
    *,
    layers: int,
    heads: int,
    head_dim: int,
    page_tokens: int,
    dtype: torch.dtype,
    kinds: int = 2,
    heads_first: bool = False,
) -> PageForm:
    """Dense pages, of which there are any number."""
    return PageForm(
        layers=layers,
        kinds=kinds,
        dtype=dtype,
        pages=1,
        page_tokens=page_tokens,
        heads=heads,
        head_dim=head_dim,
        page_stride=page_tokens * heads * head_dim,
        token_stride=head_dim if heads_first or heads == 1 else heads * head_dim,
        head_stride=page_tokens * head_dim if heads_first else head_dim,
    )


def _form(pages: PageForm, dtype: torch.dtype) -> CellForm:
    return CellForm(
        layers=pages.layers,
        heads=pages.heads,
        head_dim=pages.head_dim,
        block_tokens=pages.page_tokens,
        dtype=dtype,
        kinds=pages.kinds,
        scaled=dtype is not pages.dtype,
    )


def _variant(
    name: str, kernel: Any, plan: Plan, *, max_registers: int = 80, max_spills: int = 0
) -> Variant:
    return Variant(
        name=name,
        kernel=kernel,
        signature={
            "table_ptr": "*i64",
            "runs_ptr": "*i64",
            "cells_ptr": "*u8",
            "n_runs": "i64",
            "row_stride": "i64",
            "cells_nbytes": "i64",
            "n_tiles": "i32",
        },
        constants={"g": plan.geometry, "offsets_ptr": None},
        options={"num_warps": plan.warps},
        max_registers=max_registers,
        max_spills=max_spills,
    )
