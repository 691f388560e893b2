"""What single warps of a ring of tiles do beside the group that multiplies: they bring tiles and
queries, write new tokens, and count the arrival of results."""

# A kernel's functions are inlined and their arguments have no Python types.
# ruff: noqa: PLR0917
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kvstore_kernels.mla_gluon_parts import (
    BLOCK,
    PANEL,
    TAIL,
    load_panel,
    load_tail,
    locate,
    tokens_in,
    viewed,
)
from kvstore_kernels.mla_ring_append import FEW, append_tokens, rotate_queries
from kvstore_kernels.mla_ring_items import (
    AT_ONCE,
    COLUMNS,
    HIGH,
    KEEPS,
    ONE_WARP,
    claim_item,
    first_new,
    hear,
    listen,
    load_parts,
    load_span,
    tell,
    tiles_of,
)

BUFFERS = gl.constexpr(3)

LATENT_BYTES = gl.constexpr(64 * 512 * 2)
QUERY_BYTES, LATENT_QUERY_BYTES = gl.constexpr(16 * 576 * 2), gl.constexpr(16 * 512 * 2)


@gluon.jit
def _page_at(table, token, end, page_tokens):
    """The page that has a tile, which then has tokens; -1 is outside of the pool, and so zeros."""
    return gl.load(table + token // page_tokens, mask=token < end, other=-1)


@gluon.jit
def load_tiles(kv_desc, page_table, items, item, claims, table_stride, page_tokens, ring, bars,
                line, appends):  # fmt: skip
    full, free, written = bars
    workers = gl.num_programs(0)
    gl.atomic_add(claims, HIGH, sem="relaxed", scope="gpu")
    number = 0
    tiles = 0
    if item < 0:
        item = claim_item(items, claims, workers)
    while item >= 0:
        tell(item, line, number)
        sequence, _, first, end = load_span(items, item)
        newest = first_new(items, item, appends)
        table = page_table + sequence.to(gl.int64) * table_stride
        # So many ahead as there are buffers, whose latencies are then one.
        page = _page_at(table, first, end, page_tokens)
        second = _page_at(table, first + BLOCK, end, page_tokens)
        third = _page_at(table, first + 2 * BLOCK, end, page_tokens)
        for tile in range(tiles_of(first, end)):
            token = first + tile * BLOCK
            inner = token % page_tokens + tokens_in(token, end) - BLOCK
            buffer = tiles % BUFFERS
            mbarrier.wait(free.index(buffer), (tiles // BUFFERS & 1) ^ 1)
            if gl.minimum(token + BLOCK, end) > newest:
                mbarrier.wait(written, number & 1)
            panels = viewed(ring.index(buffer), [8, 64, 64])
            mbarrier.expect(full.index(buffer), LATENT_BYTES)
            for panel in gl.static_range(8):
                load_panel(
                    kv_desc,
                    [page, inner, panel * PANEL],
                    full.index(buffer),
                    panels.index(panel),
                )
            page = second
            second = third
            third = _page_at(table, token + 3 * BLOCK, end, page_tokens)
            tiles += 1
        number += 1
        item = claim_item(items, claims, workers)
    tell(item, line, number)


@gluon.jit
def load_sides(q_desc, kv_desc, page_table, items, table_stride, page_tokens, q, tail, bars,
                line, appends):  # fmt: skip
    q_full, q_free, tail_full, tail_free, written = bars
    tiles = 0
    number = 0
    item = hear(line, number, ONE_WARP)
    while item >= 0:
        sequence, group, first, end = load_span(items, item)
        mbarrier.wait(q_free, (number & 1) ^ 1)
        row = group * FEW
        if appends > 0:
            mbarrier.expect(q_full, LATENT_QUERY_BYTES)
        else:
            mbarrier.expect(q_full, QUERY_BYTES)
            load_panel(q_desc, [sequence, row, TAIL], q_full, q.index(8))
        for panel in gl.static_range(8):
            load_panel(q_desc, [sequence, row, panel * PANEL], q_full, q.index(panel))
        table = page_table + sequence.to(gl.int64) * table_stride
        newest = first_new(items, item, appends)
        for tile in range(tiles_of(first, end)):
            token = first + tile * BLOCK
            page, inner = locate(table, token, end, page_tokens)
            mbarrier.wait(tail_free, (tiles & 1) ^ 1)
            if gl.minimum(token + BLOCK, end) > newest:
                mbarrier.wait(written, number & 1)
            load_tail(kv_desc, page, inner, tail_full, tail)
            tiles += 1
        number += 1
        item = hear(line, number, ONE_WARP)


@gluon.jit
def write_tokens(new, strides, pages, items, sizes, q, bars, line, eps):
    """New tokens to the pages, and the queries' rope part to shared memory."""
    q_full, q_free, written = bars
    number = 0
    item = hear(line, number, ONE_WARP)
    while item >= 0:
        sequence, group, _, end = load_span(items, item)
        newest = first_new(items, item, sizes[2])
        # Also what keeps this warp from being two items ahead of who waits for `written`.
        mbarrier.wait(q_free, (number & 1) ^ 1)
        rotate_queries(new, strides, sequence, group, sizes, q)
        mbarrier.arrive(q_full)
        append_tokens(new, strides, pages, sequence, newest, end, sizes[2], eps)
        mbarrier.arrive(written)
        number += 1
        item = hear(line, number, ONE_WARP)


@gluon.jit
def announce(items, counters, stored, line):
    """Counts the arrival of partial results that the group has stored, which then need not wait
    until they are there."""
    number = 0
    item = listen(line, number, ONE_WARP)
    while item >= 0:
        _, counter, parts, _ = load_parts(items, item)
        keeps = gl.load(items + (1 + item) * COLUMNS + KEEPS)
        mbarrier.wait(stored.index(number & 1), (number >> 1) & 1)
        if (parts > 1) & (keeps != AT_ONCE):
            gl.atomic_add(counters + counter, 1, sem="release", scope="gpu")
        # Not before: so the group is no more than one item ahead.
        mbarrier.arrive(line[2].index(number & 1))
        number += 1
        item = listen(line, number, ONE_WARP)
