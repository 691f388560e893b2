"""The kernels of `collate`; a Geometry says what each is compiled for.

All go through tiles: of neighbouring pieces, or (quantised) of whole heads. Both sides' addresses
follow from a piece's number, by divisions by constants.
"""

# Kernels are called by position; assigned, a constant is a tensor; nothing is unpacked in them.
# ruff: noqa: PLR0917, RET504, RUF005
# mypy: disable-error-code="no-untyped-def, untyped-decorator, assignment, misc"

from __future__ import annotations

import triton
import triton.language as tl

FP8_MAX = tl.constexpr(448.0)  # the largest float8_e4m3fn
# The least magnitude that a head is scaled by: its scale is then the smallest normal float32, so
# that the reciprocal is finite. A head of zeros has this scale.
LEAST_MAGNITUDE = tl.constexpr(448.0 * 2.0**-126)


@triton.jit
def _row(cells_ptr, offsets_ptr, row_stride, cells_nbytes, block, g: tl.constexpr):
    """Pointer to a block's row, and how many pieces of each of its planes are in the rows' memory:
    all or none."""
    alignment: tl.constexpr = g.alignment
    pieces = g.plane_pieces
    if offsets_ptr is None:
        offset = block.to(tl.int64) * row_stride
    else:
        offset = tl.load(offsets_ptr + block)
        inside = (offset >= 0) & (offset <= cells_nbytes - g.row_bytes) & (offset % alignment == 0)
        pieces = tl.where(inside, pieces, 0)
    start = (cells_ptr + offset).to(tl.pointer_type(g.cell_type))
    return tl.multiple_of(start, alignment), pieces


@triton.jit
def _pages(table_ptr, runs_ptr, n_runs, block, plane, piece, g: tl.constexpr):
    """Pointers to the beginning of each piece in its page, and which of the pages exist."""
    alignment: tl.constexpr = g.alignment
    start = tl.load(table_ptr + plane).to(tl.pointer_type(g.page_type))
    if g.tiles_per_plane == 0:
        start = tl.multiple_of(start, [alignment])
    else:
        start = tl.multiple_of(start, alignment)
    chunk = piece % g.chunks
    line = piece // g.chunks % g.lines
    head = (piece // (g.chunks * g.lines)).to(tl.int64)
    run = tl.load(runs_ptr + block.to(tl.int64) * g.runs_per_block + line // g.lines_per_run)
    run = run.to(tl.int64)
    page = run // g.runs_per_page
    offset = page * g.page_stride + (run - page * g.runs_per_page) * g.run_stride
    offset += (line % g.lines_per_run).to(tl.int64) * g.line_stride
    offset += head * g.head_stride + chunk * g.columns
    return start + offset, (run >= 0) & (run < n_runs)


@triton.jit
def _group(index, total: tl.constexpr, per: tl.constexpr):
    """Which group of `per` a head or layer is in. That there is but one, the compiler must know to
    see how cells are aligned."""
    group = index * 0 if per >= total else index // per
    return group


@triton.jit
def _group_size(group, total: tl.constexpr, per: tl.constexpr):
    """Members of a group; the last one may have fewer than the others."""
    size = per if total % per == 0 else tl.minimum(per, total - group * per)
    return size


@triton.jit
def _in_row(plane, head, g: tl.constexpr):
    """Where in its row a head's plane begins, and where the byte of its scale is."""
    layer = (plane // g.kinds + g.first_layer).to(tl.int64)
    head = (head + g.first_head).to(tl.int64)
    head_group = _group(head, g.row_heads, g.cell_heads)
    layer_group = _group(layer, g.row_layers, g.cell_layers)
    heads = _group_size(head_group, g.row_heads, g.cell_heads)
    layers = _group_size(layer_group, g.row_layers, g.cell_layers)
    cell = head_group * (g.cell_heads * g.row_layers) + layer_group * g.cell_layers * heads
    cell = cell * g.head_units
    index = (layer - layer_group * g.cell_layers) * heads + head - head_group * g.cell_heads
    index = index * g.kinds + plane % g.kinds
    scales = cell + layers.to(tl.int64) * heads * (g.kinds * g.plane_units)
    return cell + index * g.plane_units, scales + index * 4


@triton.jit
def _tile(tile, n_tiles, g: tl.constexpr):
    """The block, plane (of all pieces, or of each) and pieces of a tile, and which exist."""
    if g.plane_by_plane:
        blocks = n_tiles // g.tiles_per_block
        in_plane = tile // g.tiles_per_plane
        block = in_plane % blocks
        number = in_plane // blocks * g.tiles_per_plane + tile % g.tiles_per_plane
    else:
        block = tile // g.tiles_per_block
        number = tile % g.tiles_per_block
    if g.tiles_per_plane == 0:
        piece = number * g.tile_pieces + tl.arange(0, g.tile_pieces)
        exists = piece < g.planes * g.plane_pieces
        plane = tl.minimum(piece // g.plane_pieces, g.planes - 1)
        piece = piece % g.plane_pieces
    else:
        plane = number // g.tiles_per_plane
        piece = number % g.tiles_per_plane * g.tile_pieces + tl.arange(0, g.tile_pieces)
        exists = piece < g.plane_pieces
    return block, plane, piece, exists


@triton.jit(
    do_not_specialize=["n_runs", "row_stride", "cells_nbytes", "n_tiles"],
    do_not_specialize_on_alignment=["table_ptr", "runs_ptr", "cells_ptr", "offsets_ptr"],
)
def collate_kernel(
    table_ptr,  # (planes,) int64: where each plane's pages begin
    runs_ptr,  # (blocks, runs per block)
    cells_ptr,  # rows
    offsets_ptr,  # (blocks,) int64: where each row begins, or None for rows at equal distances
    n_runs: tl.int64,  # of the pool
    row_stride: tl.int64,  # bytes
    cells_nbytes: tl.int64,
    n_tiles: tl.int32,
    g: tl.constexpr,
):
    """Copies pages to rows, byte by byte."""
    columns = tl.arange(0, g.columns)[None, :]
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        block, plane, piece, exists = _tile(tile, n_tiles, g)
        page, in_pool = _pages(table_ptr, runs_ptr, n_runs, block, plane, piece, g)
        row, pieces = _row(cells_ptr, offsets_ptr, row_stride, cells_nbytes, block, g)
        place, _ = _in_row(plane, piece // (g.chunks * g.lines), g)
        place += piece % (g.chunks * g.lines) * g.columns
        values = tl.load(
            page[:, None] + columns,
            mask=(exists & in_pool)[:, None],
            other=0,
            eviction_policy=g.load_policy,
        )
        tl.store(
            row + (place[:, None] + columns),
            values,
            mask=(exists & (piece < pieces))[:, None],
            eviction_policy=g.store_policy,
        )


@triton.jit(
    do_not_specialize=["n_runs", "row_stride", "cells_nbytes", "n_tiles"],
    do_not_specialize_on_alignment=["table_ptr", "runs_ptr", "cells_ptr", "offsets_ptr"],
)
def scatter_kernel(
    table_ptr,  # as for collate_kernel
    runs_ptr,
    cells_ptr,
    offsets_ptr,
    n_runs: tl.int64,
    row_stride: tl.int64,
    cells_nbytes: tl.int64,
    n_tiles: tl.int32,
    g: tl.constexpr,
):
    """Copies rows to pages, byte by byte or multiplied by their scales."""
    columns = tl.arange(0, g.columns)[None, :]
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        block, plane, piece, exists = _tile(tile, n_tiles, g)
        page, in_pool = _pages(table_ptr, runs_ptr, n_runs, block, plane, piece, g)
        row, pieces = _row(cells_ptr, offsets_ptr, row_stride, cells_nbytes, block, g)
        place, scale_place = _in_row(plane, piece // (g.chunks * g.lines), g)
        place += piece % (g.chunks * g.lines) * g.columns
        exists = exists & in_pool & (piece < pieces)
        pointers = row + (place[:, None] + columns)
        if g.scaled and g.columns >= 8:
            # Threads then read what they write: 8 bytes here, 16 there. Wider reads would be
            # exchanged through shared memory.
            pointers = tl.max_contiguous(pointers, [1, 8])
        values = tl.load(
            pointers,
            mask=exists[:, None],
            other=0.0 if g.scaled else 0,
            eviction_policy=g.load_policy,
        )
        if g.scaled:
            scales = (row + scale_place).to(tl.pointer_type(tl.float32))
            scale = tl.load(scales, mask=exists, other=0)
            values = (values.to(tl.float32) * scale[:, None]).to(g.page_type)
        tl.store(page[:, None] + columns, values, mask=exists[:, None])


@triton.jit
def _heads_tile(tile, g: tl.constexpr):
    """The block, plane and first head of a tile of whole heads."""
    block = tile // g.tiles_per_block
    number = tile % g.tiles_per_block
    plane = number // g.tiles_per_plane
    first_head = number % g.tiles_per_plane * g.tile_heads
    return block, plane, first_head


@triton.jit
def _step(first_head, step, g: tl.constexpr):
    """Pieces of one step through a tile of whole heads, and which exist."""
    width: tl.constexpr = g.tile_pieces // g.tile_heads
    row = tl.arange(0, g.tile_pieces)
    head = first_head + row // width
    within = step * width + row % width
    head_pieces: tl.constexpr = g.lines * g.chunks
    return head * head_pieces + within, (head < g.heads) & (within < head_pieces)


@triton.jit
def _read(table_ptr, runs_ptr, n_runs, block, plane, first_head, step, g: tl.constexpr):
    """(pieces, columns) of one step as they are in their pages, 0 where there is none."""
    piece, exists = _step(first_head, step, g)
    page, in_pool = _pages(table_ptr, runs_ptr, n_runs, block, plane, piece, g)
    pointers = page[:, None] + tl.arange(0, g.columns)[None, :]
    return tl.load(pointers, mask=(exists & in_pool)[:, None], other=0)


@triton.jit
def _largest(values, g: tl.constexpr):
    """(heads,) float32, the largest magnitude of each."""
    width: tl.constexpr = g.tile_pieces // g.tile_heads
    magnitudes = tl.max(tl.abs(values.to(tl.float32)), 1)
    return tl.max(tl.reshape(magnitudes, (g.tile_heads, width)), 1)


@triton.jit
def _unchanged(values, g: tl.constexpr):
    """The same values, of which the compiler knows no more: else it would keep the float32 that
    they have been, in twice the registers."""
    if g.interpreted:
        return values
    bits: tl.constexpr = g.page_type.primitive_bitwidth
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [values], g.page_type, is_pure=False, pack=32 // bits
    )


@triton.jit
def _write(values, inverse, row, pieces, plane, first_head, step, g: tl.constexpr):
    """Writes one step's values, times the inverse of their heads' scales."""
    width: tl.constexpr = g.tile_pieces // g.tile_heads
    head_pieces: tl.constexpr = g.lines * g.chunks
    piece, exists = _step(first_head, step, g)
    place, _ = _in_row(plane, piece // head_pieces, g)
    place += piece % head_pieces * g.columns
    factor = tl.reshape(tl.broadcast_to(inverse[:, None], (g.tile_heads, width)), (g.tile_pieces,))
    pointers = row + (place[:, None] + tl.arange(0, g.columns)[None, :])
    scaled = (values.to(tl.float32) * factor[:, None]).to(g.cell_type)
    vector: tl.constexpr = 128 // g.page_type.primitive_bitwidth
    if g.columns >= vector:
        pointers = tl.max_contiguous(pointers, [1, vector])  # as threads have read it
    tl.store(
        pointers,
        scaled,
        mask=(exists & (piece < pieces))[:, None],
        eviction_policy=g.store_policy,
    )


@triton.jit(
    do_not_specialize=["n_runs", "row_stride", "cells_nbytes", "n_tiles"],
    do_not_specialize_on_alignment=["table_ptr", "runs_ptr", "cells_ptr", "offsets_ptr"],
)
def quantise_kernel(
    table_ptr,  # as for collate_kernel
    runs_ptr,
    cells_ptr,
    offsets_ptr,
    n_runs: tl.int64,
    row_stride: tl.int64,
    cells_nbytes: tl.int64,
    n_tiles: tl.int32,
    g: tl.constexpr,
):
    """Writes pages to rows as float8_e4m3, each head scaled by its largest magnitude."""
    n_kept: tl.constexpr = g.kept_steps
    for tile in range(tl.program_id(0), n_tiles, tl.num_programs(0)):
        block, plane, first = _heads_tile(tile, g)
        row, pieces = _row(cells_ptr, offsets_ptr, row_stride, cells_nbytes, block, g)
        # All that is kept is under way before any of it is looked at.
        kept = ()
        for step in tl.static_range(0, n_kept):
            kept = kept + (_read(table_ptr, runs_ptr, n_runs, block, plane, first, step, g),)
        largest = _largest(kept[0], g)
        for step in tl.static_range(1, n_kept):
            largest = tl.maximum(largest, _largest(kept[step], g))
        for step in range(n_kept, g.steps):
            more = _read(table_ptr, runs_ptr, n_runs, block, plane, first, step, g)
            largest = tl.maximum(largest, _largest(more, g))
        scale = tl.math.div_rn(tl.maximum(largest, LEAST_MAGNITUDE), FP8_MAX)
        inverse = tl.math.div_rn(tl.full((g.tile_heads,), 1.0, tl.float32), scale)
        head = first + tl.arange(0, g.tile_heads)
        _, scale_place = _in_row(plane, head, g)
        scales = (row + scale_place).to(tl.pointer_type(tl.float32))
        tl.store(scales, scale, mask=(head < g.heads) & (head * (g.lines * g.chunks) < pieces))
        for step in tl.static_range(0, n_kept):
            again = _unchanged(kept[step], g)
            _write(again, inverse, row, pieces, plane, first, step, g)
        for step in range(n_kept, g.steps):
            again = _read(table_ptr, runs_ptr, n_runs, block, plane, first, step, g)
            _write(again, inverse, row, pieces, plane, first, step, g)


@triton.jit(
    do_not_specialize=["n_words"],
    do_not_specialize_on_alignment=["source_ptr", "target_ptr"],
)
def bring_kernel(
    source_ptr,  # int32, in host memory
    target_ptr,
    n_words: tl.int32,
    WORDS: tl.constexpr,  # noqa: N803
):
    """Brings a few words across the link, past the copies that wait for the copy engine."""
    at = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    words = tl.load(source_ptr + at, mask=at < n_words, other=0)
    tl.store(target_ptr + at, words, mask=at < n_words)
