"""A short way of launching kernels does what `Collator.launch` does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from kvstore_kernels import transfer_launch
from kvstore_kernels.collate import Collator
from kvstore_kernels.collate_plan import Geometry
from kvstore_kernels.page_table import CellForm, PageTable
from kvstore_kernels.transfer_launch import BufferKernel, NumbersKernel

PAGES, BLOCKS, STREAM = 7, 3, 77


@dataclass(frozen=True)
class Compiled:
    """A kernel in Triton's interpreter, called as a compiled one is: by addresses."""

    kernel: Any
    options: dict[str, int]
    tensors: dict[Any, torch.Tensor]  # by address
    grids: list[tuple[int, ...]]

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        def launch(*arguments: Any, stream: int) -> None:
            assert stream == STREAM
            self.grids.append(grid)
            self.kernel[grid](*(self.tensors.get(a, a) for a in arguments), **self.options)

        return launch


class Jit:
    """A kernel that gives what it is compiled to, as on a GPU, at its first launch."""

    def __init__(self, kernel: Any, tensors: dict[Any, torch.Tensor]) -> None:
        self._kernel, self._tensors = kernel, tensors
        self.grids: list[tuple[int, ...]] = []  # of the launches that follow
        self.policies: list[str] = []  # of its stores

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, **options: int) -> Compiled:
            self._kernel[grid](*arguments, **options)  # of nothing
            self.policies += [a.store_policy for a in arguments if isinstance(a, Geometry)]
            return Compiled(self._kernel, options, self._tensors, self.grids)

        return launch


def found(monkeypatch: pytest.MonkeyPatch, *tensors: torch.Tensor) -> dict[str, Jit]:
    """The kernels that are launched by address, of these tensors."""
    known = {tensor.data_ptr(): tensor for tensor in tensors}
    kernels = {}
    for name in ("collate_kernel", "quantise_kernel", "scatter_kernel", "bring_kernel"):
        kernels[name] = Jit(getattr(transfer_launch, name), known)
        monkeypatch.setattr(transfer_launch, name, kernels[name])
    return kernels


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
    found(monkeypatch, runs, rows, collator.table.pointers, other.table.pointers)
    for of, out in ((collator, True), (other, False)):
        kernel = BufferKernel(of, runs=dtype, stride=stride, out=out)
        assert (torch.equal(rows, wanted), back.any()) == (not out, False)
        kernel.launch(runs.data_ptr(), rows.data_ptr(), BLOCKS, STREAM)
    assert torch.equal(rows, wanted)
    assert torch.equal(back, expected)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("programs", [None, 1, 2, 1000])
def test_few_programs_do_all_there_is(
    monkeypatch: pytest.MonkeyPatch, programs: int | None, scaled: bool
) -> None:
    pages = torch.randn((2, 2, PAGES, 4, 2, 8), generator=torch.Generator().manual_seed(1))
    pages = pages.to(torch.float16)
    form = CellForm(
        layers=2, heads=2, head_dim=8, block_tokens=4, scaled=scaled,
        dtype=torch.float8_e4m3fn if scaled else torch.float16,
    )  # fmt: skip
    collator = Collator(PageTable.of(pages, "LKPNHD"), form)
    runs = torch.tensor([[5], [0], [3]])
    stride = -(-form.nbytes // 16) * 16
    wanted, rows = (torch.zeros((BLOCKS, stride), dtype=torch.uint8) for _ in range(2))
    collator.launch(runs, wanted, out=True)
    kernels = found(monkeypatch, runs, rows, collator.table.pointers)
    kernel = BufferKernel(collator, runs=runs.dtype, stride=stride, out=True)
    kernel.launch(runs.data_ptr(), rows.data_ptr(), BLOCKS, STREAM, programs)
    assert torch.equal(rows, wanted)
    ((size, *_),) = kernels["quantise_kernel" if scaled else "collate_kernel"].grids
    assert size == programs if programs in (1, 2) else 2 < size < 1000


@pytest.mark.parametrize("scaled", [False, True])
def test_what_is_kept_is_the_last_to_leave_the_l2(
    monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    dtype = torch.float8_e4m3fn if scaled else torch.float16
    form = CellForm(layers=1, heads=1, head_dim=8, block_tokens=4, dtype=dtype, scaled=scaled)
    pages = torch.zeros((1, 2, PAGES, 4, 1, 8), dtype=torch.float16)
    collator = Collator(PageTable.of(pages, "LKPNHD"), form)
    kernels = found(monkeypatch)
    for keep in (False, True):
        BufferKernel(collator, runs=torch.int64, stride=form.nbytes, out=True, keep=keep)
    name = "quantise_kernel" if scaled else "collate_kernel"
    assert kernels[name].policies == ["", "evict_last"]


@pytest.mark.parametrize("words", [1, 1023, 1024, 3000])
def test_numbers_are_brought_and_no_more(monkeypatch: pytest.MonkeyPatch, words: int) -> None:
    source = torch.arange(1, words + 1, dtype=torch.int32)
    target = torch.zeros(words + 3, dtype=torch.int32)
    found(monkeypatch, source, target)
    kernel = NumbersKernel(source.device)
    kernel.launch(source.data_ptr(), target.data_ptr(), 4 * words, STREAM)
    assert torch.equal(target[:words], source)
    assert not target[words:].any()
