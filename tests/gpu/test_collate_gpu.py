"""Collation on a GPU: every form a hundred times, byte by byte beside the reference on the CPU."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from kvstore_kernels.collate import Collator
from kvstore_kernels.collate_plan import Tuning
from kvstore_kernels.collate_reference import collate_reference, scatter_reference
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.page_table import CellForm, PageTable, runs_of

POISON = 0xA5
TIMES = 100
FP8 = torch.float8_e4m3fn


@dataclasses.dataclass(frozen=True)
class Case:
    """Pools in one form, and what blocks are made of them."""

    name: str
    dims: str
    shape: tuple[int, ...]  # of all layers; without K, of keys and of values each
    dtype: torch.dtype = torch.bfloat16
    block_tokens: int = 16
    page_tokens: int = 16
    pairs: bool = False  # keys and values in pools of their own
    cell_heads: int = 1
    cell_layers: int | None = None
    scaled: bool = False
    row_gap: int = 0
    tuning: Tuning | None = None


CASES = [
    Case("tokens first", "LPNHD", (4, 33, 16, 8, 128), pairs=True),
    Case("heads first", "LKPHND", (4, 2, 33, 8, 16, 128)),
    Case("one head", "LKPNHD", (5, 2, 33, 16, 1, 128)),
    Case("three heads of 80", "LKPNHD", (3, 2, 33, 16, 3, 80), torch.float16),
    Case("ragged cells", "LPKNHD", (5, 33, 2, 16, 7, 64), cell_heads=3, cell_layers=2),
    Case("all layers in a page", "PLKNHD", (33, 4, 2, 16, 4, 64)),
    Case("store order", "PHLKND", (33, 4, 4, 2, 16, 64)),
    Case("several pages a block", "LKPNHD", (2, 2, 65, 16, 4, 128), block_tokens=64),
    Case(
        "several blocks a page", "LKPNHD", (2, 2, 9, 64, 4, 128), block_tokens=16, page_tokens=64
    ),
    Case("pages of 48", "LKPNHD", (2, 2, 17, 48, 4, 128), block_tokens=32, page_tokens=48),
    Case("pages of 1", "LKPNHD", (2, 2, 257, 1, 4, 128), block_tokens=8, page_tokens=1),
    Case("latent", "LPND", (5, 17, 64, 576), block_tokens=64, page_tokens=64),
    Case("latent in fp8", "LPND", (5, 17, 64, 576), FP8, block_tokens=64, page_tokens=64),
    Case("float32", "LKPNHD", (2, 2, 33, 16, 2, 64), torch.float32),
    Case("odd bytes", "LKPNHD", (2, 2, 33, 16, 2, 33), torch.uint8, row_gap=1),
    Case("gaps of 4", "LKPNHD", (2, 2, 33, 16, 2, 64), row_gap=4),
    Case("large tiles", "LKPNHD", (3, 2, 33, 16, 8, 128), tuning=Tuning(tile_bytes=1 << 16)),
    Case("small tiles", "LKPNHD", (3, 2, 33, 16, 8, 128), tuning=Tuning(tile_bytes=1 << 12)),
    Case("quantised", "LKPNHD", (4, 2, 33, 16, 8, 128), scaled=True),
    Case("quantised, heads first", "LKPHND", (4, 2, 33, 8, 16, 128), scaled=True),
    Case("quantised, float16", "LKPNHD", (3, 2, 33, 16, 3, 80), torch.float16, scaled=True),
    Case("quantised, float32", "LKPNHD", (3, 2, 33, 16, 2, 64), torch.float32, scaled=True),
    Case("quantised, one head", "LKPNHD", (3, 2, 33, 16, 1, 128), scaled=True, cell_layers=1),
    Case(
        "quantised latent", "LPND", (5, 17, 64, 576), scaled=True, block_tokens=64, page_tokens=64
    ),
    Case(
        "quantised long heads", "LKPNHD", (2, 2, 9, 256, 2, 128), scaled=True, block_tokens=256,
        page_tokens=256,
    ),
]  # fmt: skip


def pool_of(case: Case, seed: int) -> torch.Tensor:
    """Any bytes, NaNs among them, where they are only copied; else numbers of many magnitudes."""
    generator = torch.Generator().manual_seed(seed)
    if case.scaled:
        pool = torch.randn(case.shape, generator=generator)
        scales = torch.rand(case.shape[:-1], generator=generator) * 8 - 4
        return (pool * 10 ** scales[..., None]).to(case.dtype)
    nbytes = case.shape[-1] * case.dtype.itemsize
    made = torch.randint(0, 256, (*case.shape[:-1], nbytes), dtype=torch.uint8, generator=generator)
    return made.view(case.dtype)


def table_of(case: Case, pools: list[torch.Tensor]) -> PageTable:
    if case.pairs:
        return PageTable.of(list(zip(*pools, strict=True)), case.dims.replace("L", ""))
    return PageTable.of(pools[0], case.dims)


def tables(case: Case, gpu: torch.device) -> tuple[PageTable, PageTable]:
    """The same pages on the CPU and on the GPU."""
    pools = [pool_of(case, seed) for seed in range(2 if case.pairs else 1)]
    return table_of(case, pools), table_of(case, [pool.to(gpu) for pool in pools])


def poisoned(case: Case, device: torch.device | str) -> list[torch.Tensor]:
    """Pools of the case's form, with no page written."""
    shape = (*case.shape[:-1], case.shape[-1] * case.dtype.itemsize)
    return [
        torch.full(shape, POISON, dtype=torch.uint8, device=device).view(case.dtype)
        for _ in range(2 if case.pairs else 1)
    ]


def form_of(case: Case, table: PageTable) -> CellForm:
    pages = table.form
    return CellForm(
        layers=pages.layers,
        heads=pages.heads,
        head_dim=pages.head_dim,
        block_tokens=case.block_tokens,
        dtype=FP8 if case.scaled else case.dtype,
        kinds=pages.kinds,
        layers_per_cell=case.cell_layers,
        heads_per_cell=case.cell_heads,
        scaled=case.scaled,
    )


def runs_for(case: Case, table: PageTable) -> torch.Tensor:
    """Most of the pages, in any order."""
    pages = torch.randperm(table.form.pages, generator=torch.Generator().manual_seed(7))[:-1]
    return runs_of(pages, case.page_tokens, case.block_tokens)


def same(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether all bytes of two lists of pools are."""
    return all(
        torch.equal(one.view(torch.uint8), other.view(torch.uint8).to(one.device))
        for one, other in zip(ones, others, strict=True)
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_rows_are_the_reference_s_a_hundred_times(case: Case, gpu: torch.device) -> None:
    on_cpu, on_gpu = tables(case, gpu)
    form, runs = form_of(case, on_cpu), runs_for(case, on_cpu)
    shape = (len(runs), form.nbytes + case.row_gap)
    expected = torch.full(shape, POISON, dtype=torch.uint8)
    collate_reference(on_cpu, Collator(on_cpu, form).pairing, runs, expected)
    wanted, collator = expected.to(gpu), Collator(on_gpu, form, tuning=case.tuning)
    for numbers in (runs, runs.to(gpu), runs.to(gpu).int()):
        rows = torch.full(shape, POISON, dtype=torch.uint8, device=gpu)
        collator.collate(numbers, rows)
        assert torch.equal(rows, wanted)
    numbers = runs.to(gpu)
    for _ in range(TIMES):
        rows.fill_(POISON)
        collator.collate(numbers, rows)
        assert torch.equal(rows, wanted)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_pages_are_the_reference_s_a_hundred_times(case: Case, gpu: torch.device) -> None:
    """And whatever is in none of the blocks is left alone."""
    on_cpu, _ = tables(case, gpu)
    form, runs = form_of(case, on_cpu), runs_for(case, on_cpu)
    rows = torch.full((len(runs), form.nbytes + case.row_gap), POISON, dtype=torch.uint8)
    collate_reference(on_cpu, Collator(on_cpu, form).pairing, runs, rows)
    wanted = poisoned(case, "cpu")
    there = table_of(case, wanted)
    scatter_reference(there, Collator(there, form).pairing, runs, rows)
    wanted = [pool.to(gpu) for pool in wanted]
    pools, numbers, rows = poisoned(case, gpu), runs.to(gpu), rows.to(gpu)
    collator = Collator(table_of(case, pools), form, tuning=case.tuning)
    for _ in range(TIMES):
        for pool in pools:
            pool.view(torch.uint8).fill_(POISON)
        collator.scatter(numbers, rows)
        assert same(pools, wanted)


def test_quantised_values_are_near_what_they_were(gpu: torch.device) -> None:
    case = Case("quantised", "LKPNHD", (4, 2, 33, 16, 8, 128), scaled=True)
    on_cpu, on_gpu = tables(case, gpu)
    form, runs = form_of(case, on_cpu), runs_for(case, on_cpu).to(gpu)
    rows = torch.empty((len(runs), form.nbytes), dtype=torch.uint8, device=gpu)
    Collator(on_gpu, form).collate(runs, rows)
    back = table_of(case, poisoned(case, gpu))
    Collator(back, form).scatter(runs, rows)
    for before, after in zip(
        itertools.chain(*on_gpu.views), itertools.chain(*back.views), strict=True
    ):
        was, now = before[runs[:, 0]].double(), after[runs[:, 0]].double()
        scale = was.abs().amax((1, 3), keepdim=True) / 448
        half_a_step = torch.maximum(was.abs() / 16, scale * 2**-10)
        assert bool(((was - now).abs() <= half_a_step * 1.01 + was.abs() * 2**-8).all())


def test_a_nan_stays_one_and_spoils_no_other(gpu: torch.device) -> None:
    pages = torch.randn(1, 2, 3, 16, 2, 64, dtype=torch.bfloat16, device=gpu)
    pages[0, 0, 1, 3, 1, 5] = float("nan")
    table = PageTable.of(pages, "LKPNHD")
    form = CellForm(
        layers=1, heads=2, head_dim=64, block_tokens=16, dtype=FP8, scaled=True
    )  # fmt: skip
    rows = torch.empty((1, form.nbytes), dtype=torch.uint8, device=gpu)
    runs = torch.tensor([[1]])
    Collator(table, form).collate(runs, rows)
    back = PageTable.of(torch.zeros_like(pages), "LKPNHD")
    Collator(back, form).scatter(runs, rows)
    after = back.views[0][0][1]
    assert torch.isnan(after[3, 1, 5])
    assert int(torch.isnan(after).sum()) == 1


@pytest.mark.parametrize("scaled", [False, True])
def test_numbers_that_nobody_checked_reach_no_memory_outside(
    gpu: torch.device, scaled: bool
) -> None:
    """A bad run reads as zeros and writes nothing; a bad offset neither."""
    pages = torch.randn(2, 2, 3, 16, 2, 64, dtype=torch.bfloat16, device=gpu)
    table = PageTable.of(pages, "LKPNHD")
    form = CellForm(
        layers=2, heads=2, head_dim=64, block_tokens=16,
        dtype=FP8 if scaled else torch.bfloat16, scaled=scaled,
    )  # fmt: skip
    collator = Collator(table, form)
    runs = torch.tensor([[3], [1], [-1], [1 << 40]], device=gpu)
    rows = torch.full((4, form.nbytes), POISON, dtype=torch.uint8, device=gpu)
    collator.collate(runs, rows)
    alone = torch.empty((1, form.nbytes), dtype=torch.uint8, device=gpu)
    collator.collate(runs[1:2], alone)
    assert torch.equal(rows[1], alone[0])
    assert not rows[[0, 2, 3], : form.plane_bytes].any()
    before = pages.clone()
    collator.scatter(runs[[0, 2, 3]], rows[[0, 2, 3]])
    assert torch.equal(pages, before)
    memory = torch.full((2 * form.nbytes + 32,), POISON, dtype=torch.uint8, device=gpu)
    offsets = torch.tensor([-16, 0, form.nbytes + 48, 8], device=gpu)
    collator.collate(torch.ones((4, 1), dtype=torch.int64, device=gpu), memory, offsets)
    assert torch.equal(memory[: form.nbytes], alone[0])
    assert bool((memory[form.nbytes :] == POISON).all())
    for bad in ({"runs": runs, "cells": rows}, {"runs": runs[1:2].repeat(4, 1), "cells": memory,
                                                "offsets": offsets}):  # fmt: skip
        with pytest.raises(KernelArgumentError):
            collator.collate(**bad, check=True)


def test_a_pool_of_more_than_2_to_the_31_elements(gpu: torch.device) -> None:
    """6 GiB; its first and its last pages."""
    pages = torch.empty((3 << 30) // (16 * 8 * 128), 16, 8, 128, dtype=torch.bfloat16, device=gpu)
    runs = torch.tensor([[len(pages) - 1], [0], [len(pages) - 2]])
    pages[runs[:, 0].to(gpu)] = torch.randn(3, 16, 8, 128, device=gpu).to(torch.bfloat16)
    table = PageTable([[pages]])
    form = CellForm(layers=1, heads=8, head_dim=128, block_tokens=16, dtype=torch.bfloat16, kinds=1)
    rows = torch.empty((3, form.nbytes), dtype=torch.uint8, device=gpu)
    Collator(table, form).collate(runs, rows)
    wanted = pages[runs[:, 0].to(gpu)].transpose(1, 2)
    assert torch.equal(rows.view(torch.bfloat16).view(3, 8, 16, 128), wanted)
    pages[runs[:, 0].to(gpu)] = 0
    Collator(table, form).scatter(runs, rows)
    assert torch.equal(pages[runs[:, 0].to(gpu)].transpose(1, 2), wanted)


def test_rows_past_2_to_the_31_bytes(gpu: torch.device) -> None:
    pages = torch.randn(2, 16, 8, 128, device=gpu).to(torch.bfloat16)
    form = CellForm(layers=1, heads=8, head_dim=128, block_tokens=16, dtype=torch.bfloat16, kinds=1)
    memory = torch.empty((3 << 30) + 16, dtype=torch.uint8, device=gpu)
    offsets = torch.tensor([(3 << 30) + 16 - form.nbytes, 1 << 31])
    collator = Collator(PageTable([[pages]]), form)
    collator.collate(torch.tensor([[0], [1]]), memory, offsets)
    for page, offset in enumerate(offsets.tolist()):
        row = memory[offset : offset + form.nbytes].view(torch.bfloat16).view(8, 16, 128)
        assert torch.equal(row, pages[page].transpose(0, 1))


def test_across_the_link_without_a_copy(gpu: torch.device) -> None:
    """Rows in pinned host memory, written and read by two programs of the kernel."""
    case = CASES[0]
    on_cpu, on_gpu = tables(case, gpu)
    form, runs = form_of(case, on_cpu), runs_for(case, on_cpu)
    expected = torch.full((len(runs), form.nbytes), POISON, dtype=torch.uint8)
    collate_reference(on_cpu, Collator(on_cpu, form).pairing, runs, expected)
    for programs in (1, None):
        rows = torch.full_like(expected, POISON).pin_memory()
        Collator(on_gpu, form).collate(runs, rows, programs=programs)
        torch.cuda.synchronize()
        assert torch.equal(rows, expected)
        pools = poisoned(case, gpu)
        Collator(table_of(case, pools), form).scatter(runs, rows, programs=programs)
        wanted = poisoned(case, "cpu")
        there = table_of(case, wanted)
        scatter_reference(there, Collator(there, form).pairing, runs, expected)
        assert same(pools, wanted)


def test_memory_of_the_host_that_is_not_pinned_is_refused(gpu: torch.device) -> None:
    _, on_gpu = tables(CASES[0], gpu)
    form = form_of(CASES[0], on_gpu)
    with pytest.raises(KernelArgumentError, match="pinned"):
        Collator(on_gpu, form).collate(
            torch.tensor([[0]]), torch.zeros((1, form.nbytes), dtype=torch.uint8)
        )


def test_a_graph_is_replayed_with_other_runs(gpu: torch.device) -> None:
    case = CASES[0]
    on_cpu, on_gpu = tables(case, gpu)
    form, runs = form_of(case, on_cpu), runs_for(case, on_cpu)
    numbers = runs.to(gpu)
    rows = torch.zeros((len(runs), form.nbytes), dtype=torch.uint8, device=gpu)
    collator = Collator(on_gpu, form)
    collator.collate(numbers, rows)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        collator.collate(numbers, rows)
    for shift in (1, 5):
        now = runs.roll(shift, 0)
        numbers.copy_(now)
        rows.fill_(POISON)
        graph.replay()
        expected = torch.empty(rows.shape, dtype=torch.uint8)
        collate_reference(on_cpu, Collator(on_cpu, form).pairing, now, expected)
        assert torch.equal(rows.cpu(), expected)


def test_what_ranks_of_one_size_wrote_ranks_of_another_read(gpu: torch.device) -> None:
    """Prefill on eight ranks with a head each, decode on two with four."""
    generator = torch.Generator().manual_seed(3)
    whole = torch.randn(4, 2, 33, 16, 8, 128, generator=generator).to(torch.bfloat16).to(gpu)
    table = PageTable.of(whole, "LKPNHD")
    form = CellForm(layers=4, heads=8, head_dim=128, block_tokens=16, dtype=torch.bfloat16)
    runs = torch.randperm(33, generator=generator)[:20, None]
    rows = torch.full((20, form.nbytes), POISON, dtype=torch.uint8, device=gpu)
    for head in range(8):
        rank = PageTable.of(whole[..., head : head + 1, :].contiguous(), "LKPNHD")
        Collator(rank, form, first_head=head).collate(runs, rows)
    alone = torch.empty_like(rows)
    Collator(table, form).collate(runs, alone)
    assert torch.equal(rows, alone)
    for head in (0, 4):
        there = torch.zeros(4, 2, 33, 4, 16, 128, dtype=torch.bfloat16, device=gpu)
        Collator(PageTable.of(there, "LKPHND"), form, first_head=head).scatter(runs, rows)
        picked = runs[:, 0].to(gpu)
        wanted = whole[..., head : head + 4, :].transpose(3, 4)
        assert torch.equal(there[:, :, picked], wanted[:, :, picked])


def test_pages_on_the_cpu_are_refused(gpu: torch.device) -> None:
    on_cpu, _ = tables(CASES[0], gpu)
    form = form_of(CASES[0], on_cpu)
    rows = torch.zeros((1, form.nbytes), dtype=torch.uint8, device=gpu)
    with pytest.raises(KernelArgumentError, match="table"):
        Collator(on_cpu, form).collate(torch.tensor([[0]]), rows)
