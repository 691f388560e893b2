"""How a collation is cut into programs: everything that its kernels are compiled for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from kvstore_kernels.checks import require
from kvstore_kernels.page_table import CellForm, PageForm, PageTable

_UNITS = {1: tl.uint8, 2: tl.int16, 4: tl.int32, 8: tl.int64}
_ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """tile_bytes: of pages that one program moves. thread_bytes: of them that one thread has under
    way. column_bytes: the longest piece that has one address. All are powers of two. kept_bytes: of
    a head that is larger than a tile, until it has been read whole and is quantised; what is beyond
    is read again.

    load_policy: Triton's eviction policy of loads; "evict_first" was 1 % slower than none. keep:
    what is written is the last to leave the L2.
    """

    tile_bytes: int = 2 << 10
    thread_bytes: int = 32
    column_bytes: int = 2 << 10
    kept_bytes: int = 72 << 10
    load_policy: str = ""
    keep: bool = False


# Few programs have to keep a link of microseconds of latency busy, so each has far more under way.
ZERO_COPY_TUNING = Tuning(tile_bytes=128 << 10, thread_bytes=128, column_bytes=8 << 10)
# Whole heads are to fit a tile; larger ones are gone through in steps of STEP_BYTES, by as many
# threads as keep 72 KiB in half of a multiprocessor's registers.
QUANTISE_TUNING = Tuning(tile_bytes=16 << 10, thread_bytes=128)
STEP_BYTES, STEP_WARPS = 8 << 10, 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Pairing:
    """Which pages belong to which rows; raises KernelArgumentError where they do not fit.

    first_head, first_layer: the head and layer of the row that the pages' first is.
    """

    pages: PageForm
    form: CellForm
    first_head: int = 0
    first_layer: int = 0

    def __post_init__(self) -> None:
        pages, form = self.pages, self.form
        for name in ("kinds", "head_dim"):
            want = getattr(pages, name)
            require(getattr(form, name) == want, "form", f"must have {name}={want}, as the pages")
        for name in ("head", "layer"):
            here, there = getattr(pages, f"{name}s"), getattr(form, f"{name}s")
            require(
                0 <= getattr(self, f"first_{name}") <= there - here,
                f"first_{name}",
                f"must leave room for the pages' {here} {name}s among the row's {there}",
            )
        fits = pages.dtype in _ELEMENTS if form.scaled else pages.dtype is form.dtype
        kept = f"{form.dtype} with scales" if form.scaled else f"{form.dtype}"
        require(fits, "form", f"keeps {kept}, which the pages' {pages.dtype} cannot become")

    @property
    def run_tokens(self) -> int:
        """Tokens that a page and a block have in common."""
        return self.pages.run_tokens(self.form.block_tokens)


def rows_are_pages(table: PageTable, pairing: Pairing) -> bool:
    """Whether a block's row is a page's memory as it is, from its first plane on."""
    pages, form = table.form, pairing.form
    whole = (pages.layers, pages.heads, pages.page_tokens)
    if form.scaled or whole != (form.layers, form.heads, form.block_tokens):
        return False
    if pages.page_tokens > 1 and pages.token_stride != pages.head_dim:
        return False
    origin, step = table.views[0][0].data_ptr(), pages.head_stride * pages.dtype.itemsize
    return all(
        form.place(layer, head, kind)[0] == plane.data_ptr() + head * step - origin
        for layer, planes in enumerate(table.views)
        for kind, plane in enumerate(planes)
        for head in range(pages.heads)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """All that a kernel is compiled for. Strides and places are in elements: of the pages' dtype
    where values change, else units of up to 8 bytes.

    A line is the longest part of a head's plane that is dense on both sides. It has `chunks` pieces
    of `columns` elements. Pieces of a plane are numbered in the order (head, line, chunk).
    """

    page_type: Any  # Triton's type of an element
    cell_type: Any
    alignment: int  # bytes; every plane and every row begins at a multiple of it
    planes: int  # of the pages
    kinds: int
    heads: int
    lines: int  # of a head
    chunks: int
    columns: int
    plane_pieces: int  # heads * lines * chunks
    runs_per_page: int
    runs_per_block: int
    lines_per_run: int
    page_stride: int
    run_stride: int
    line_stride: int
    head_stride: int
    first_layer: int
    first_head: int
    row_layers: int
    row_heads: int
    cell_layers: int
    cell_heads: int
    plane_units: int  # of one head in a cell
    head_units: int  # of one head of one layer, scales included
    row_bytes: int
    scaled: bool
    tile_pieces: int  # a power of two
    tile_heads: int  # of a quantised tile, likewise
    steps: int  # in which a quantised tile is gone through
    kept_steps: int  # the first of them, of which registers hold what was read
    tiles_per_plane: int  # 0 where a tile may have pieces of several planes
    tiles_per_block: int
    plane_by_plane: bool  # tiles' order: all blocks' of a plane first, instead of all of a block
    load_policy: str
    store_policy: str
    interpreted: bool  # by Triton's interpreter


@dataclass(frozen=True, slots=True)
class Plan:
    """What to launch: programs of `warps` warps, `geometry.tiles_per_block` tiles a block."""

    geometry: Geometry
    warps: int


def plan_copy(pairing: Pairing, alignment: int, tuning: Tuning) -> Plan:
    """For bytes copied either way, or rows with scales written to pages.

    alignment: bytes that each plane and each row is aligned to.
    """
    pages, scaled = pairing.pages, pairing.form.scaled
    unit = pages.dtype.itemsize if scaled else _unit(pages, alignment)
    lines = _lines(pairing, unit, tuning)
    planes, per_plane = pages.layers * pages.kinds, pages.heads * lines.pieces
    require(planes * per_plane < 1 << 31, "form", "has too many pieces for 32 bits")
    pieces = max(1, tuning.tile_bytes // (lines.columns * unit))
    pieces = min(pieces, _power_above(planes * per_plane))
    # A tile of one plane needs one pointer. It may be half as large for that, but not smaller.
    divisor = per_plane & -per_plane
    one_plane = 2 * divisor >= pieces
    pieces = min(pieces, divisor) if one_plane else pieces
    geometry = Geometry(
        **_common(pairing, lines, unit, tuning),
        page_type=_ELEMENTS[pages.dtype] if scaled else _UNITS[unit],
        cell_type=tl.float8e4nv if scaled else _UNITS[unit],
        alignment=alignment,
        tile_pieces=pieces,
        tile_heads=1,
        steps=1,
        kept_steps=1,
        tiles_per_plane=per_plane // pieces if one_plane else 0,
        tiles_per_block=-(-planes * per_plane // pieces),
        # From float8 two bytes are written for each that is read, and DRAM writes faster where what
        # is written lies near to each other, as a plane's pages do.
        plane_by_plane=scaled and one_plane and _dense_planes(pages),
    )
    return Plan(geometry, _warps(pieces * lines.columns * unit, tuning, most=32))


def plan_quantise(pairing: Pairing, alignment: int, tuning: Tuning) -> Plan:
    """For pages written to rows with scales: tiles of whole heads."""
    pages, size = pairing.pages, pairing.pages.dtype.itemsize
    lines = _lines(pairing, size, tuning)
    piece = lines.columns * size
    width = _power_above(lines.pieces)
    if 4 * lines.pieces < 3 * width:  # rather go on in another step than have threads idle
        width //= 2
    in_steps = width * piece > tuning.tile_bytes
    width = min(width, max(1, (STEP_BYTES if in_steps else tuning.tile_bytes) // piece))
    steps = -(-lines.pieces // width)
    heads = 1
    if steps == 1:
        heads = max(1, min(tuning.tile_bytes // (width * piece), _power_above(pages.heads)))
    per_plane = -(-pages.heads // heads)
    geometry = Geometry(
        **_common(pairing, lines, size, tuning),
        page_type=_ELEMENTS[pages.dtype],
        cell_type=tl.float8e4nv,
        alignment=alignment,
        tile_pieces=heads * width,
        tile_heads=heads,
        steps=steps,
        kept_steps=max(1, min(steps, tuning.kept_bytes // (width * piece))),
        tiles_per_plane=per_plane,
        tiles_per_block=per_plane * pages.layers * pages.kinds,
        plane_by_plane=False,
    )
    warps = STEP_WARPS if in_steps else _warps(heads * width * piece, tuning, most=16)
    return Plan(geometry, warps)


@dataclass(frozen=True, slots=True)
class _Lines:
    """How a head's plane divides into lines, and lines into pieces."""

    lines: int
    tokens: int  # of a line
    chunks: int
    columns: int

    @property
    def pieces(self) -> int:
        return self.lines * self.chunks


def _lines(pairing: Pairing, unit: int, tuning: Tuning) -> _Lines:
    """unit: bytes of an element on the pages' side."""
    pages = pairing.pages
    tokens = pairing.run_tokens if pages.token_stride == pages.head_dim else 1
    elements = tokens * pages.head_dim * pages.dtype.itemsize // unit
    columns = min(elements & -elements, max(1, tuning.column_bytes // unit))
    return _Lines(pairing.form.block_tokens // tokens, tokens, elements // columns, columns)


def _common(pairing: Pairing, lines: _Lines, unit: int, tuning: Tuning) -> dict[str, Any]:
    """The fields of a Geometry that do not say how planes are cut into tiles."""
    pages, form = pairing.pages, pairing.form
    cell_unit = 1 if form.scaled else unit

    def units(elements: int) -> int:
        return elements * pages.dtype.itemsize // unit

    return {
        "planes": pages.layers * pages.kinds,
        "kinds": pages.kinds,
        "heads": pages.heads,
        "lines": lines.lines,
        "chunks": lines.chunks,
        "columns": lines.columns,
        "plane_pieces": pages.heads * lines.pieces,
        "runs_per_page": pages.runs_per_page(form.block_tokens),
        "runs_per_block": pages.runs_per_block(form.block_tokens),
        "lines_per_run": pairing.run_tokens // lines.tokens,
        "page_stride": units(pages.page_stride),
        "run_stride": units(pages.token_stride * pairing.run_tokens),
        "line_stride": units(pages.token_stride * lines.tokens),
        "head_stride": units(pages.head_stride),
        "first_layer": pairing.first_layer,
        "first_head": pairing.first_head,
        "row_layers": form.layers,
        "row_heads": form.heads,
        "cell_layers": form.cell_layers,
        "cell_heads": form.heads_per_cell,
        "plane_units": form.plane_bytes // cell_unit,
        "head_units": form.head_bytes // cell_unit,
        "row_bytes": form.nbytes,
        "scaled": form.scaled,
        "load_policy": tuning.load_policy,
        "store_policy": "evict_last" if tuning.keep else "",
        "interpreted": bool(triton.knobs.runtime.interpret),
    }


def _dense_planes(pages: PageForm) -> bool:
    """Whether nothing lies between the pages of a plane."""
    return pages.page_stride == pages.page_tokens * pages.heads * pages.head_dim


def _unit(pages: PageForm, alignment: int) -> int:
    """Bytes of the widest integer of which pages and rows are made."""
    strides = (pages.page_stride, pages.token_stride, pages.head_stride, pages.head_dim)
    return math.gcd(8, alignment, *(stride * pages.dtype.itemsize for stride in strides))


def _power_above(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def _warps(nbytes: int, tuning: Tuning, most: int) -> int:
    """For a tile of so many bytes; a power of two."""
    return max(1, min(most, nbytes // (32 * tuning.thread_bytes)))
