"""Collation in Triton's interpreter, beside its torch reference, which has other arithmetic."""

from __future__ import annotations

import gc
import itertools
import mmap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from kvstore.layout import Attention, Layout
from kvstore_kernels.collate import Collator
from kvstore_kernels.collate_plan import (
    QUANTISE_TUNING,
    Tuning,
    plan_copy,
    plan_quantise,
    rows_are_pages,
)
from kvstore_kernels.collate_reference import collate_reference, scatter_reference
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.page_table import CellForm, PageTable, runs_of

POISON = 0xA5
FP8 = torch.float8_e4m3fn


FLOATS = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: FP8,
}


@pytest.fixture(autouse=True)
def _rounding_as_a_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter loses carries when it rounds to few bits, so torch rounds in its place."""

    def convert(values: Any, source: Any, target: Any, _rounding: object) -> Any:
        carrier = torch.from_numpy(values.copy())
        converted = carrier.view(FLOATS[source]).to(FLOATS[target])
        integer = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[converted.itemsize]
        return converted.view(integer).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def pools(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0, *, numbers: bool = False
) -> torch.Tensor:
    """Any bytes, or numbers."""
    generator = torch.Generator().manual_seed(seed)
    if numbers:
        return torch.randn(shape, generator=generator).to(dtype)
    nbytes = shape[-1] * dtype.itemsize
    made = torch.randint(0, 256, (*shape[:-1], nbytes), dtype=torch.uint8, generator=generator)
    return made.view(dtype)


def copy_of(table: PageTable) -> PageTable:
    """The same form of pages in other memory, all poisoned; views are of one tensor each."""
    storages: dict[int, torch.Tensor] = {}
    for plane in itertools.chain(*table.views):
        storage = plane.untyped_storage()
        poison = torch.full((storage.nbytes(),), POISON, dtype=torch.uint8)
        storages.setdefault(storage.data_ptr(), poison)
    moved = [
        [
            storages[plane.untyped_storage().data_ptr()]
            .view(plane.dtype)
            .as_strided(plane.shape, plane.stride(), plane.storage_offset())
            for plane in layer
        ]
        for layer in table.views
    ]
    return PageTable(moved)


def bytes_of(table: PageTable) -> torch.Tensor:
    """All memory of the pools, between the pages too."""
    storages = {
        plane.untyped_storage().data_ptr(): plane.untyped_storage()
        for plane in itertools.chain(*table.views)
    }
    whole = [torch.empty(0, dtype=torch.uint8).set_(storage) for storage in storages.values()]
    return torch.cat(whole)


def form_of(table: PageTable, block_tokens: int, **changes: Any) -> CellForm:
    pages = table.form
    fields = {
        "layers": pages.layers,
        "heads": pages.heads,
        "head_dim": pages.head_dim,
        "block_tokens": block_tokens,
        "dtype": pages.dtype,
        "kinds": pages.kinds,
    }
    return CellForm(**{**fields, **changes})


def check_both_ways(
    table: PageTable,
    form: CellForm,
    runs: torch.Tensor,
    *,
    row_gap: int = 0,
    programs: int | None = None,
    tuning: Tuning | None = None,
    **first: int,
) -> None:
    """Collates and scatters; every byte of rows and pools is as the reference leaves it."""
    collator = Collator(table, form, tuning=tuning, **first)
    rows, expected = (
        torch.full((len(runs), form.nbytes + row_gap), POISON, dtype=torch.uint8) for _ in range(2)
    )
    collator.collate(runs, rows, programs=programs)
    collate_reference(table, collator.pairing, runs, expected)
    assert torch.equal(rows, expected)

    back, wanted = copy_of(table), copy_of(table)
    other = Collator(back, form, tuning=tuning, **first)
    other.scatter(runs, rows, programs=programs)
    scatter_reference(wanted, other.pairing, runs, expected)
    assert torch.equal(bytes_of(back), bytes_of(wanted))


FORMS = {
    "tokens before heads": ("LPNHD", (3, 7, 4, 2, 16)),
    "heads before tokens": ("LPHND", (3, 7, 2, 4, 16)),
    "keys and values in one pool": ("LKPNHD", (2, 2, 7, 4, 2, 16)),
    "keys beside values in a page": ("LPKHND", (2, 7, 2, 2, 4, 16)),
    "keys beside values of a head": ("PHLKND", (7, 2, 2, 2, 4, 16)),
    "a latent": ("LPND", (3, 7, 4, 72)),
    "all layers in a page": ("PLKNHD", (7, 2, 2, 4, 3, 8)),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, FP8, torch.float32], ids=str)
@pytest.mark.parametrize("name", FORMS)
def test_any_form_of_pages_gives_the_same_bytes_there_and_back(
    name: str, dtype: torch.dtype
) -> None:
    dims, shape = FORMS[name]
    if dims in ("LPNHD", "LPHND"):  # a tensor for each of keys and values
        pair = [pools(shape, dtype, seed) for seed in range(2)]
        letters = dims.replace("L", "")
        table = PageTable.of(list(zip(*pair, strict=True)), letters)
    else:
        table = PageTable.of(pools(shape, dtype), dims)
    check_both_ways(table, form_of(table, 8), torch.tensor([[5, 0], [3, 6]]))


@pytest.mark.parametrize(
    ("page_tokens", "block_tokens", "pages"),
    [(1, 4, 8), (4, 4, 5), (2, 6, 7), (8, 4, 3), (6, 4, 4), (12, 4, 2)],
)
def test_pages_and_blocks_of_any_size_in_tokens(
    page_tokens: int, block_tokens: int, pages: int
) -> None:
    """Tokens of a sequence come out in order, wherever its pages are."""
    table = PageTable.of(pools((2, 2, 9, page_tokens, 2, 8), torch.float16, numbers=True), "LKPNHD")
    numbers = torch.randperm(9, generator=torch.Generator().manual_seed(1))[:pages]
    runs = runs_of(numbers, page_tokens, block_tokens)
    assert len(runs) == pages * page_tokens // block_tokens
    form = form_of(table, block_tokens)
    check_both_ways(table, form, runs)
    rows = torch.empty((len(runs), form.nbytes), dtype=torch.uint8)
    Collator(table, form).collate(runs, rows)
    sequence = table.views[1][0][numbers].flatten(0, 1)[: len(runs) * block_tokens]
    at, _ = form.place(1, 1, 0)
    head = rows[:, at : at + form.plane_bytes].clone().view(torch.float16)
    assert torch.equal(head.view(-1, 8), sequence[:, 1])


@pytest.mark.parametrize(("heads_per_cell", "layers_per_cell"), [(1, 1), (2, 2), (3, None), (2, 3)])
def test_cells_of_any_group_of_heads_and_layers(
    heads_per_cell: int, layers_per_cell: int | None
) -> None:
    """Also where the last group is smaller."""
    table = PageTable.of(pools((4, 2, 5, 4, 3, 8), torch.float16, numbers=True), "LKPNHD")
    form = form_of(table, 4, heads_per_cell=heads_per_cell, layers_per_cell=layers_per_cell)
    check_both_ways(table, form, torch.tensor([[4], [0]], dtype=torch.int32))
    scaled = form_of(
        table, 4, heads_per_cell=heads_per_cell, layers_per_cell=layers_per_cell,
        dtype=FP8, scaled=True,
    )  # fmt: skip
    check_both_ways(table, scaled, torch.tensor([[4], [0]]))


def test_what_ranks_of_one_size_wrote_ranks_of_another_read() -> None:
    """Four ranks with a head each write a block; two with two heads each, two stages of layers
    each, read it: their pages hold what one rank with everything has."""
    whole = PageTable.of(pools((4, 2, 5, 4, 4, 8), torch.float16, numbers=True), "LKPNHD")
    form = form_of(whole, 4, layers_per_cell=2)
    runs = torch.tensor([[3], [1]])
    rows = torch.full((2, form.nbytes), POISON, dtype=torch.uint8)
    for head in range(4):
        rank = PageTable([[kind[:, :, head : head + 1] for kind in layer] for layer in whole.views])
        Collator(rank, form, first_head=head).collate(runs, rows)
    expected = torch.empty_like(rows)
    collate_reference(whole, Collator(whole, form).pairing, runs, expected)
    assert torch.equal(rows, expected)
    for head, layer in itertools.product((0, 2), (0, 2)):
        there = pools((2, 2, 5, 2, 4, 8), torch.float16, seed=9)  # heads before tokens
        table = PageTable.of(there, "LKPHND")
        Collator(table, form, first_head=head, first_layer=layer).scatter(runs, rows)
        for here, kind in itertools.product(range(2), range(2)):
            source = whole.views[layer + here][kind][runs[:, 0], :, head : head + 2]
            assert torch.equal(table.views[here][kind][runs[:, 0]], source)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("dims", "shape"), [("LKPNHD", (2, 2, 5, 4, 3, 16)), ("LKPHND", (2, 2, 5, 3, 4, 16)),
                        ("LPND", (2, 5, 4, 36))],
)  # fmt: skip
def test_quantised_heads_are_within_half_a_step_of_what_they_were(
    dims: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    pool = pools(shape, torch.float32, numbers=True)
    pool *= torch.logspace(-3, 3, pool.shape[-2])[:, None]
    table = PageTable.of(pool.to(dtype), dims)
    form = form_of(table, 8, dtype=FP8, scaled=True)
    runs = torch.tensor([[4, 1], [0, 2]])
    check_both_ways(table, form, runs)
    rows = torch.empty((2, form.nbytes), dtype=torch.uint8)
    collator = Collator(table, form)
    collator.collate(runs, rows)
    back = copy_of(table)
    Collator(back, form).scatter(runs, rows)
    for before, after in zip(
        itertools.chain(*table.views), itertools.chain(*back.views), strict=True
    ):
        for block in runs:
            was, now = before[block].double(), after[block].double()
            scale = was.abs().amax((0, 1, 3), keepdim=True) / 448
            half_a_step = torch.maximum(was.abs() / 16, scale * 2**-10)  # 3 bits behind the first
            rounded_back = was.abs() * torch.finfo(dtype).eps
            assert bool(((was - now).abs() <= half_a_step * 1.01 + rounded_back).all())


@pytest.mark.parametrize(("kept_bytes", "kept"), [(72 << 10, 9), (20 << 10, 2), (1, 1)])
def test_a_head_too_large_for_one_tile_is_quantised_in_steps(kept_bytes: int, kept: int) -> None:
    """Of which the last are read again where not all is kept."""
    table = PageTable.of(pools((1, 3, 64, 576), torch.float16, numbers=True), "LPND")
    form = form_of(table, 64, dtype=FP8, scaled=True)
    tuning = replace(QUANTISE_TUNING, kept_bytes=kept_bytes)
    geometry = plan_quantise(Collator(table, form).pairing, 16, tuning).geometry
    assert (geometry.steps, geometry.kept_steps) == (9, kept)
    check_both_ways(table, form, torch.tensor([[2]]), tuning=tuning)


@pytest.mark.parametrize(
    ("dims", "scaled", "ordered"),
    [("LKPNHD", True, True), ("LKPNHD", False, False), ("PLKNHD", True, False)],
)
def test_what_is_written_from_float8_lies_together(dims: str, scaled: bool, ordered: bool) -> None:
    """Plane by plane, where a plane's pages follow each other."""
    sizes = {"L": 3, "K": 2, "P": 4, "N": 16, "H": 2, "D": 64}
    pool = pools(tuple(sizes[letter] for letter in dims), torch.float16, numbers=True)
    table = PageTable.of(pool, dims)
    form = form_of(table, 16, dtype=FP8, scaled=True) if scaled else form_of(table, 16)
    plan = plan_copy(Collator(table, form).pairing, 16, Tuning())
    assert plan.geometry.plane_by_plane == ordered
    check_both_ways(table, form, torch.tensor([[2], [0], [3]]))


def test_zeros_keep_a_scale_and_stay_zeros() -> None:
    table = PageTable.of(torch.zeros(1, 2, 3, 4, 1, 8, dtype=torch.float16), "LKPNHD")
    form = form_of(table, 4, dtype=FP8, scaled=True)
    rows = torch.full((1, form.nbytes), POISON, dtype=torch.uint8)
    Collator(table, form).collate(torch.tensor([[1]]), rows)
    _, scale_at = form.place(0, 0, 1)
    assert rows[0, scale_at : scale_at + 4].view(torch.float32).item() == 2.0**-126
    back = copy_of(table)
    Collator(back, form).scatter(torch.tensor([[1]]), rows)
    assert not back.views[0][1][1].any()


@pytest.mark.parametrize("programs", [1, 2, 1000])
@pytest.mark.parametrize("tuning", [Tuning(tile_bytes=64, column_bytes=16), Tuning()], ids=str)
def test_any_number_of_programs_and_any_size_of_tiles(programs: int, tuning: Tuning) -> None:
    table = PageTable.of(pools((1, 2, 3, 2, 3, 8), torch.float16, numbers=True), "LKPNHD")
    runs = torch.tensor([[2], [0]])
    check_both_ways(table, form_of(table, 2), runs, programs=programs, tuning=tuning)
    scaled = form_of(table, 2, dtype=FP8, scaled=True)
    check_both_ways(table, scaled, runs, programs=programs, tuning=tuning)


@pytest.mark.parametrize("head_dim", [1, 3, 80, 100])
def test_head_dims_that_are_no_power_of_two(head_dim: int) -> None:
    table = PageTable.of(pools((2, 2, 3, 2, 2, head_dim), torch.float16), "LKPNHD")
    check_both_ways(table, form_of(table, 4), torch.tensor([[2, 0]]))


@pytest.mark.parametrize("row_gap", [0, 1, 4, 48])
def test_rows_at_any_distance(row_gap: int) -> None:
    """What is between them is left alone, however badly they are aligned."""
    table = PageTable.of(pools((1, 2, 3, 2, 1, 8), torch.bfloat16), "LKPNHD")
    check_both_ways(table, form_of(table, 2), torch.tensor([[2], [0], [1]]), row_gap=row_gap)


def test_rows_at_offsets() -> None:
    table = PageTable.of(pools((1, 2, 3, 2, 1, 8), torch.float16, numbers=True), "LKPNHD")
    form = form_of(table, 2)
    runs, places = torch.tensor([[2], [0], [1]]), torch.tensor([2, 0, 1])
    memory = torch.full((1024,), POISON, dtype=torch.uint8)
    collator = Collator(table, form)
    collator.collate(runs, memory, places * 256)
    rows = torch.full((3, 256), POISON, dtype=torch.uint8)
    collate_reference(table, collator.pairing, runs, rows)
    expected = torch.full((4, 256), POISON, dtype=torch.uint8)
    expected[places] = rows
    assert torch.equal(memory, expected.flatten())
    back = copy_of(table)
    Collator(back, form).scatter(runs, memory, places * 256)
    assert torch.equal(bytes_of(back), bytes_of(table))


@pytest.mark.parametrize("scaled", [False, True])
def test_numbers_that_were_not_checked_reach_no_memory_outside(
    monkeypatch: pytest.MonkeyPatch, scaled: bool
) -> None:
    """As they come from a GPU, where nobody looks at them before the kernel."""
    monkeypatch.setattr(Collator, "_bounds", lambda *_args, **_kwargs: None)
    table = PageTable.of(pools((1, 2, 3, 2, 1, 8), torch.float16, numbers=True), "LKPNHD")
    form = form_of(table, 2, **({"dtype": FP8, "scaled": True} if scaled else {}))
    collator = Collator(table, form)
    runs = torch.tensor([[3], [1], [-1], [1 << 40]])
    rows = torch.full((4, form.nbytes), POISON, dtype=torch.uint8)
    collator.collate(runs, rows)
    good = torch.empty((1, form.nbytes), dtype=torch.uint8)
    collate_reference(table, collator.pairing, runs[1:2], good)
    assert torch.equal(rows[1], good[0])
    assert not rows[[0, 2, 3], : form.plane_bytes].any()  # zeros, not somebody's bytes
    back = copy_of(table)
    Collator(back, form).scatter(runs, rows)
    changed = back.views[0][0].view(torch.uint8) != POISON
    assert changed[1].any()
    assert not changed[[0, 2]].any()
    offsets = torch.tensor([-256, 0, 512 - form.nbytes + 16, 8])
    memory = torch.full((512,), POISON, dtype=torch.uint8)
    collator.collate(torch.ones((4, 1), dtype=torch.int64), memory, offsets)
    assert torch.equal(memory[: form.nbytes], good[0])
    assert bool((memory[form.nbytes :] == POISON).all())


def test_a_pool_of_more_than_2_to_the_31_elements(tmp_path: Path) -> None:
    """A sparse file that has memory only where the page is; any stride may be this long."""
    with (tmp_path / "pool").open("w+b") as file:
        file.truncate(5 << 29)
        reserved = mmap.mmap(file.fileno(), 5 << 29)
    long = (9 << 28) + 1  # odd, so that elements are single bytes in the kernel too
    with reserved:
        storage = torch.frombuffer(reserved, dtype=torch.uint8)
        for strides in ((long, 32, 16, 1), (64, long, 16, 1), (64, 32, long, 1)):
            plane = storage.as_strided((2, 2, 2, 16), strides)
            _check_last_page(PageTable([[plane]]))
        distant = storage[long:].as_strided((2, 2, 2, 16), (64, 32, 16, 1))
        _check_last_page(PageTable([[distant]]))
        del storage, plane, distant
        gc.collect()


def _check_last_page(table: PageTable) -> None:
    form, plane = form_of(table, 2), table.views[0][0]
    plane[1] = pools((2, 2, 16), torch.uint8)
    wanted = plane[1].transpose(0, 1).clone()
    rows = torch.empty((1, form.nbytes), dtype=torch.uint8)
    Collator(table, form).collate(torch.tensor([[1]]), rows)
    assert torch.equal(rows.view(2, 2, 16), wanted)
    plane[1] = 0
    Collator(table, form).scatter(torch.tensor([[1]]), rows)
    assert torch.equal(plane[1].transpose(0, 1), wanted)


def test_no_blocks_are_no_work() -> None:
    table = PageTable.of(pools((1, 2, 3, 2, 1, 8), torch.float16), "LKPNHD")
    form = form_of(table, 2)
    rows = torch.empty((0, form.nbytes), dtype=torch.uint8)
    Collator(table, form).collate(torch.empty((0, 1), dtype=torch.int64), rows)
    Collator(table, form).scatter(torch.empty((0, 1), dtype=torch.int64), rows)


LAYOUTS = [
    {"layers": 4, "kv_heads": 4, "layers_per_cell": 3, "heads_per_cell": 3},
    {"layers": 5, "kv_heads": 8, "layers_per_cell": 2, "scales": "per_head"},
    {"layers": 6, "kv_heads": 1, "attention": Attention.MLA, "scales": "per_head"},
    {"layers": 6, "kv_heads": 1, "attention": Attention.MLA, "layers_per_cell": 4},
]


@pytest.mark.parametrize("fields", LAYOUTS)
def test_rows_are_the_blocks_of_the_store(fields: dict[str, Any]) -> None:
    """Every cell begins where the layout says, and holds exactly its heads' and layers' planes."""
    scaled = "scales" in fields
    fields = {"attention": Attention.GQA, **fields}
    layout = Layout(
        model="m",
        head_dim=8,
        block_tokens=4,
        dtype="float8_e4m3" if scaled else "float16",
        **fields,
    )
    form = CellForm(
        layers=layout.layers,
        heads=layout.kv_heads,
        head_dim=8,
        block_tokens=4,
        dtype=FP8 if scaled else torch.float16,
        kinds=1 if layout.attention is Attention.MLA else 2,
        layers_per_cell=layout.layers_per_cell,
        heads_per_cell=layout.heads_per_cell,
        scaled=scaled,
    )
    assert form.nbytes == layout.block_bytes
    for cell in layout.cells:
        owned: set[int] = set()
        for layer, head in itertools.product(cell.layers, cell.heads):
            for kind in range(form.kinds):
                at, scale_at = form.place(layer, head, kind)
                owned |= set(range(at, at + form.plane_bytes))
                owned |= set(range(scale_at, scale_at + 4)) if scaled else set()
        assert owned == set(range(cell.offset, cell.offset + cell.nbytes))


def test_a_rank_s_part_is_a_row_of_its_own() -> None:
    """A rank that puts only its cells has a smaller row, with the same bytes in the same order."""
    layout = Layout(
        model="m", attention=Attention.GQA, layers=4, kv_heads=4, head_dim=8, dtype="float16",
        block_tokens=4, layers_per_cell=2,
    )  # fmt: skip
    table = PageTable.of(pools((2, 2, 3, 4, 4, 8), torch.float16), "LKPNHD")
    rank = PageTable([[kind[:, :, 1:3] for kind in layer] for layer in table.views])
    block = torch.zeros((1, layout.block_bytes), dtype=torch.uint8)
    form = form_of(table, 4, layers=4, layers_per_cell=2)
    runs = torch.tensor([[2]])
    Collator(rank, form, first_head=1, first_layer=2).collate(runs, block)
    cells = layout.cells_of(heads=range(1, 3), layers=range(2, 4))
    bounds = layout.cell_bounds
    picked = torch.cat([block[0, bounds[cell] : bounds[cell + 1]] for cell in cells])
    part = torch.empty((1, len(picked)), dtype=torch.uint8)
    Collator(rank, form_of(rank, 4, layers_per_cell=2)).collate(runs, part)
    assert torch.equal(part[0], picked)


@pytest.mark.parametrize(
    ("dims", "shape", "changes", "same"),
    [
        ("PHLKND", (3, 2, 4, 2, 4, 8), {}, True),  # the pages of our own engines
        ("PLND", (3, 4, 4, 8), {}, True),
        ("PLND", (3, 4, 1, 8), {}, True),
        ("PLHKND", (3, 4, 2, 2, 4, 8), {"heads_per_cell": 2}, True),
        ("PHLKND", (3, 2, 4, 2, 4, 8), {"heads_per_cell": 2}, False),
        ("PHLKND", (3, 2, 4, 2, 4, 8), {"layers_per_cell": 2}, True),  # cells after each other
        ("PLHKND", (3, 4, 2, 2, 4, 8), {"layers_per_cell": 1}, False),
        ("PHLKND", (3, 2, 4, 2, 4, 8), {"heads": 3}, False),
        ("PHLKND", (3, 2, 4, 2, 4, 8), {"dtype": FP8, "scaled": True}, False),
        ("PHLKND", (3, 2, 4, 2, 8, 8), {}, False),
        ("PHLNKD", (3, 2, 4, 4, 2, 8), {}, False),
        ("LKPNHD", (4, 2, 3, 4, 2, 8), {}, False),
    ],
)
def test_pages_that_are_rows_are_known(
    dims: str, shape: tuple[int, ...], changes: dict[str, Any], same: bool
) -> None:
    table = PageTable.of(pools(shape, torch.float16, numbers=True), dims)
    form = form_of(table, 1 if shape[-2] == 1 else 4, **changes)
    collator = Collator(table, form)
    assert rows_are_pages(table, collator.pairing) == same
    if same:
        rows = torch.empty((1, form.nbytes), dtype=torch.uint8)
        collate_reference(table, collator.pairing, torch.tensor([[2]]), rows)
        assert torch.equal(rows[0], bytes_of(table)[2 * form.nbytes :])


def small() -> tuple[PageTable, CellForm]:
    table = PageTable.of(pools((1, 2, 3, 2, 2, 8), torch.float16), "LKPNHD")
    return table, form_of(table, 2)


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("runs", {"runs": torch.tensor([2, 0])}),
        ("runs", {"runs": torch.tensor([[2, 0], [1, 1]])}),
        ("runs", {"runs": torch.tensor([[2.0], [0.0]])}),
        ("runs", {"runs": torch.tensor([[3], [0]])}),
        ("runs", {"runs": torch.tensor([[-1], [0]])}),
        ("runs", {"runs": torch.zeros((2, 2), dtype=torch.int64)[:, :1]}),
        ("cells", {"cells": torch.zeros((1, 128), dtype=torch.uint8)}),
        ("cells", {"cells": torch.zeros((2, 127), dtype=torch.uint8)}),
        ("cells", {"cells": torch.zeros((2, 128), dtype=torch.int8)}),
        ("cells", {"cells": torch.zeros((2, 256), dtype=torch.uint8)[:, ::2]}),
        ("cells", {"cells": torch.zeros((1, 128), dtype=torch.uint8).expand(2, 128)}),
        ("cells", {"cells": torch.zeros((2, 128), dtype=torch.uint8, device="meta")}),
        ("cells", {"offsets": torch.tensor([0, 128])}),
        ("programs", {"programs": 0}),
        ("offsets", {"cells": torch.zeros(256, dtype=torch.uint8), "offsets": torch.tensor([0])}),
        ("offsets", {"cells": torch.zeros(256, dtype=torch.uint8),
                     "offsets": torch.tensor([0, 144])}),
        ("offsets", {"cells": torch.zeros(256, dtype=torch.uint8),
                     "offsets": torch.tensor([-16, 0])}),
        ("offsets", {"cells": torch.zeros(272, dtype=torch.uint8),
                     "offsets": torch.tensor([0, 136])}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("way", ["collate", "scatter"])
def test_wrong_arguments_are_named(way: str, argument: str, changes: dict[str, Any]) -> None:
    table, form = small()
    arguments = {
        "runs": torch.tensor([[2], [0]]),
        "cells": torch.zeros((2, 128), dtype=torch.uint8),
    }
    with pytest.raises(KernelArgumentError) as caught:
        getattr(Collator(table, form), way)(**{**arguments, **changes})
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "changes"),
    [
        ("form", {"kinds": 1}),
        ("form", {"head_dim": 16}),
        ("form", {"dtype": torch.bfloat16}),
        ("form", {"dtype": FP8}),
        ("first_head", {"heads": 1}),
        ("dtype", {"scaled": True}),
        ("heads", {"heads": 0}),
        ("kinds", {"kinds": 3}),
        ("layers_per_cell", {"layers_per_cell": 0}),
        ("head_dim", {"scaled": True, "dtype": FP8, "head_dim": 1, "block_tokens": 3}),
    ],
)
def test_wrong_forms_are_named(argument: str, changes: dict[str, Any]) -> None:
    table, _ = small()
    with pytest.raises(KernelArgumentError) as caught:
        Collator(table, form_of(table, changes.pop("block_tokens", 2), **changes))
    assert caught.value.argument == argument


@pytest.mark.parametrize("first", [{"first_head": 1}, {"first_layer": -1}, {"first_layer": 1}])
def test_pages_outside_of_the_row_are_refused(first: dict[str, int]) -> None:
    table, form = small()
    with pytest.raises(KernelArgumentError):
        Collator(table, form, **first)


def test_fp8_pages_are_not_quantised_again() -> None:
    table = PageTable.of(pools((1, 2, 3, 2, 2, 8), FP8), "LKPNHD")
    with pytest.raises(KernelArgumentError):
        Collator(table, form_of(table, 2, scaled=True))


@pytest.mark.parametrize(
    ("argument", "planes"),
    [
        ("planes", []),
        ("planes", [[]]),
        ("planes", [[torch.zeros(2, 2, 2, 8)] * 3]),
        ("planes", [[torch.zeros(2, 2, 2, 8)] * 2, [torch.zeros(2, 2, 2, 8)]]),
        ("planes", [[torch.zeros(2, 2, 2, 8), torch.zeros(2, 2, 2, 16)]]),
        ("planes", [[torch.zeros(2, 2, 2, 8), torch.zeros(2, 2, 2, 16)[..., :8]]]),
        ("planes", [[torch.zeros(2, 2, 2, 8), torch.zeros(2, 2, 2, 8, dtype=torch.float16)]]),
        ("planes", [[torch.zeros(2, 2, 2, 16)[..., ::2]]]),
        ("planes", [[torch.zeros(2, 2, 8)]]),
        ("planes", [[torch.zeros(0, 2, 2, 8)]]),
        ("planes", [[torch.zeros(2, 2, 2, 8, dtype=torch.int64)]]),
    ],
)
def test_wrong_pools_are_refused(argument: str, planes: list[list[torch.Tensor]]) -> None:
    with pytest.raises(KernelArgumentError) as caught:
        PageTable(planes)
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "pool", "dims"),
    [
        ("dims", torch.zeros(2, 2, 2, 8), "PNH"),
        ("dims", torch.zeros(2, 2, 2, 8), "PNHDX"),
        ("dims", torch.zeros(2, 2, 2, 8), "PNHDD"),
        ("dims", torch.zeros(2, 2, 2, 8), "PNHD"),
        ("pools", torch.zeros(2, 2, 2, 8), "LPNHD"),
        ("pools", [torch.zeros(2, 2, 2, 8)], "LPNHD"),
        ("pools", [torch.zeros(2, 2, 2, 8)], "KPNHD"),
        ("pools", [[torch.zeros(2, 2, 2, 8)] * 2], "PND"),
    ],
)
def test_wrong_dims_are_refused(argument: str, pool: Any, dims: str) -> None:
    with pytest.raises(KernelArgumentError) as caught:
        PageTable.of(pool, dims)
    assert caught.value.argument == argument
