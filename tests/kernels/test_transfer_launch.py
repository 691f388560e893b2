"""A short way of launching kernels does what `Collator.launch` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvstore_kernels import transfer_launch
from kvstore_kernels.collate import Collator
from kvstore_kernels.page_table import CellForm, PageTable
from kvstore_kernels.transfer_launch import BufferKernel

PAGES, BLOCKS, STREAM = 7, 3, 77


@dataclass(frozen=True)
class Compiled:
    """A kernel in Triton's interpreter, called as a compiled one is: by addresses."""

    kernel: Any
    options: dict[str, int]
    tensors: dict[int, torch.Tensor]  # by address

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(table: int, runs: int, rows: int, *numbers: Any, stream: int) -> None:
            assert stream == STREAM
            pointers = (self.tensors[address] for address in (table, runs, rows))
            self.kernel[grid](*pointers, *numbers, **self.options)

        return launch


class Jit:
    """A kernel that gives what it is compiled to, as on a GPU, at its first launch."""

    def __init__(self, kernel: Any, tensors: dict[int, torch.Tensor]) -> None:
        self._kernel, self._tensors = kernel, tensors

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: int) -> Compiled:
            self._kernel[grid](*arguments, **options)  # of nothing
            return Compiled(self._kernel, options, self._tensors)

        return launch


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("gap", [0, 16])
@pytest.mark.parametrize(("page_tokens", "scaled"), [(4, False), (8, False), (2, False), (4, True)])
def test_blocks_move_both_ways(
    monkeypatch: pytest.MonkeyPatch, page_tokens: int, scaled: bool, gap: int, dtype: torch.dtype
) -> None:
    """And what does not exist does no harm."""
    shape = (2, 2, PAGES, page_tokens, 2, 8)
    pages = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.float16)
    form = CellForm(
        layers=2, heads=2, head_dim=8, block_tokens=4, scaled=scaled,
        dtype=torch.float8_e4m3fn if scaled else torch.float16,
    )  # fmt: skip
    collator = Collator(PageTable.of(pages, "LKPNHD"), form)
    back = torch.zeros_like(pages)
    other = Collator(PageTable.of(back, "LKPNHD"), form)
    per_block = collator.table.form.runs_per_block(4)
    runs = torch.tensor([5, 0, 3, 1, 6, 2], dtype=dtype)[: BLOCKS * per_block]
    runs = runs.view(BLOCKS, per_block)
    runs[1, 0] = -3
    stride = -(-form.nbytes // 16) * 16 + gap
    wanted = torch.zeros((BLOCKS, stride), dtype=torch.uint8)
    collator.launch(runs, wanted[:, : form.nbytes], out=True)
    expected = torch.zeros_like(pages)
    Collator(PageTable.of(expected, "LKPNHD"), form).launch(
        runs, wanted[:, : form.nbytes], out=False
    )

    rows = torch.zeros_like(wanted)
    known = (runs, rows, collator.table.pointers, other.table.pointers)
    tensors = {tensor.data_ptr(): tensor for tensor in known}
    for name in ("collate_kernel", "quantise_kernel", "scatter_kernel"):
        kernel = getattr(transfer_launch, name)
        monkeypatch.setattr(transfer_launch, name, Jit(kernel, tensors))
    for of, out in ((collator, True), (other, False)):
        kernel = BufferKernel(of, runs=dtype, stride=stride, out=out)
        assert (torch.equal(rows, wanted), back.any()) == (not out, False)
        kernel.launch(runs.data_ptr(), rows.data_ptr(), BLOCKS, STREAM)
    assert torch.equal(rows, wanted)
    assert torch.equal(back, expected)
