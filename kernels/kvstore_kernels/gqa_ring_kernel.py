"""Grouped-query decode attention through a ring of tiles (Gluon, for Hopper).

A tile is 16 tokens of 8 KV heads, keys and values: 64 KiB, a page where pages have 16 tokens. A
block of threads has three such buffers, which go round:

    scout     a warp that claims items, and says what they are before they are needed
    tiles     a warp that brings tile after tile, item after item, as buffers are freed
    queries   a warp that brings an item's queries
    group     eight warps that multiply, each one KV head
    announce  a warp that counts at GPU scope what the group has stored

Tokens and then columns of the values are rows of the products, queries their columns: a KV head's
up to 8 query rows are one matrix instruction wide. Warps share nothing but the buffers, and no
result crosses from one to another.

Memory. What lies together is read together, else DRAM opens the same rows twice: a box is 16 tokens
of all heads, keys and values follow each other at once, and the halves of a row are 2 KiB apart in
a box, not at its two ends. Halves of 128 bytes, tokens one after the other, are also what matrix
units load from shared memory without conflicts.

Barriers. A buffer has one of being full and one of being free; the queries likewise. Items go
through a queue of two, told by the scout and heard by all others. `near` says that the tiles' warp
is about to need the next item, `stored` that an item's result is, `decided` whether it was the last
part of a sequence: the group then merges these, one item later, so that it waits for nobody.

A buffer is given back no sooner than behind a branch behind what needs its last load from shared
memory: a barrier of threads lets loads be under way, and the copy engine, whose zeros for tokens
that do not exist are there at once, overtakes them.
"""

# A kernel's functions are inlined and their arguments have no Python types.
# ruff: noqa: N803, N806, PLR0915, PLR0917
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvstore_kernels import gqa_ring_schedule as schedule
from kvstore_kernels.mla_gluon_parts import (
    FLAT,
    HIDDEN,
    NEVER,
    load_panel,
    new_barrier,
    sync,
)
from kvstore_kernels.mla_ring_items import COLUMNS, ONE_WARP, new_barriers

UNIT = gl.constexpr(schedule.TILE_TOKENS)  # tokens of a tile
HEADS = gl.constexpr(8)  # KV heads of a tile, a warp each
ROWS = gl.constexpr(8)  # query rows of a KV head, at most
DIM = gl.constexpr(128)
HALF = gl.constexpr(64)  # columns of a row of shared memory: 128 bytes, the widest swizzle
BUFFERS = gl.constexpr(3)
AHEAD = gl.constexpr(5)  # tiles before its end that an item's successor is claimed
THREADS_REGISTERS = 160  # 12 warps leave room for a small kernel beside them

DROP = gl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p discard.global.L2 [$1], 128; mov.u32 $0, 0; }"
)

TILE_BYTES = gl.constexpr(2 * 8 * 16 * 128 * 2)
QUERY_BYTES = gl.constexpr(8 * 8 * 128 * 2)

# An item's columns, in shared memory.
_SEQUENCE, _GROUP, _FIRST, _END = (gl.constexpr(place) for place in range(4))
_PARTIAL, _COUNTER, _PARTS, _PART = (gl.constexpr(place) for place in range(4, 8))
FIELDS = gl.constexpr(8)

MMA = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [8, 1, 1], [1, 16, 8]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, MMA.value, 2))
RIGHT = gl.constexpr(gl.DotOperandLayout(1, MMA.value, 2))
BY_ROW = gl.constexpr(gl.SliceLayout(1, MMA.value))  # heads, rows
GROUP_WARPS = gl.constexpr(gl.BlockedLayout([1], [32], [8], [0]))
# What is merged: parts, heads, columns, rows; four rows or eight.
FEW_ROWS = gl.constexpr(gl.BlockedLayout([1, 1, 1, 4], [1, 1, 32, 1], [1, 8, 1, 1], [3, 2, 1, 0]))
ALL_ROWS = gl.constexpr(gl.BlockedLayout([1, 1, 1, 4], [1, 1, 16, 2], [1, 8, 1, 1], [3, 2, 1, 0]))

HALVES = gl.constexpr(gl.NVMMASharedLayout(128, 16, 4))  # as boxes come: heads, halves, tokens, 64
QUERIES = gl.constexpr(gl.NVMMASharedLayout(128, 16, 3))
# The same bytes as heads, tokens, columns: what the offset's bits stand for, swizzle included.
_BITS = [
    *([0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 8], [0, 0, 16], [0, 0, 32]),
    *([0, 1, 8], [0, 2, 16], [0, 4, 32], [0, 8, 0]),
    *([0, 0, 64], [1, 0, 0], [2, 0, 0], [4, 0, 0]),
]
TOKEN_ROWS = gl.constexpr(gl.SharedLinearLayout(_BITS, alignment=1024))
COLUMN_ROWS = gl.constexpr(
    gl.SharedLinearLayout([[head, column, token] for head, token, column in _BITS], alignment=1024)
)


@builtin
def _as(memory: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """Shared memory in another shape and layout."""
    sizes = [_unwrap_if_constexpr(size) for size in _unwrap_if_constexpr(shape)]
    return _semantic.memdesc_reinterpret(memory, memory.dtype, sizes, _unwrap_if_constexpr(layout))


@gluon.jit
def load_keys(memory):
    """(heads, tokens, columns), a left factor."""
    return _as(memory, [HEADS, UNIT, DIM], TOKEN_ROWS).load(LEFT)


@gluon.jit
def load_values(memory):
    """(heads, columns, tokens), a left factor."""
    return _as(memory, [HEADS, DIM, UNIT], COLUMN_ROWS).load(LEFT)


@gluon.jit
def load_queries(memory):
    """(heads, columns, rows), a right factor."""
    return memory.permute((0, 2, 1)).load(RIGHT)


# ------------------------------------------------------------------------------------ items


@gluon.jit
def _field(fields, number, LAYOUT: gl.constexpr, COLUMN: gl.constexpr):
    """A column of an item that was told."""
    place = fields.index((number & 1) * FIELDS + COLUMN)
    return gl.max(place.load(LAYOUT), 0).to(gl.int32)


@gluon.jit
def _next(line, number, LAYOUT: gl.constexpr):
    """The sequence of the item of that number, once it is told; negative if there is none."""
    fields, _, told, _ = line
    mbarrier.wait(told.index(number & 1), number >> 1 & 1)
    return _field(fields, number, LAYOUT, _SEQUENCE)


@gluon.jit
def _tile_count(first, end):
    """At least one, so that all items take the same steps."""
    return gl.maximum((end - first + UNIT - 1) // UNIT, 1)


@gluon.jit
def _page_numbers(table, first, end, page_tokens):
    """Of 32 tiles; -1 where there are no tokens: outside of the pool, and so zeros."""
    token = first + gl.arange(0, 32, ONE_WARP) * UNIT
    return gl.load(table + token // page_tokens, mask=token < end, other=-1)


@gluon.jit
def _claim(items, claims, workers):
    """The next item that nobody has, or -1. Each worker claims in vain once, and the last of them
    sets the word back for the next launch."""
    claim = gl.atomic_add(claims, 1, sem="relaxed", scope="gpu")
    count = gl.load(items)
    if claim + 1 == gl.maximum(count, workers):
        gl.store(claims, 0)
    return gl.where(workers + claim < count, workers + claim, -1)


@gluon.jit
def _load_item(items, item):
    """(sequence, group, first token, end, partial, counter, parts, part)."""
    at = items + (1 + item) * COLUMNS
    return (
        gl.load(at),
        gl.load(at + 1),
        gl.load(at + 2),
        gl.load(at + 3),
        gl.load(at + 4),
        gl.load(at + 5),
        gl.load(at + 6),
        gl.load(at + 7),
    )


@gluon.jit
def call_up(place):
    """Brings what is there into the L2; whatever it is, as that is what others write to as well."""
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [place],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _tell(fields, number, column, value):
    place = fields.index((number & 1) * FIELDS + column)
    place.store(gl.full([1], value, gl.int32, ONE_WARP))


@gluon.jit
def _scout(page_table, items, item, claims, table_stride, page_tokens, line, near):
    fields, pages, told, heard = line
    workers = gl.num_programs(0)
    # Launches before this one may still run. Nothing that a kernel writes is read before they end,
    # but where the first page numbers are is known.
    sequence, group, first, end, partial, counter, parts, part = _load_item(
        items, gl.maximum(item, 0)
    )
    if (item >= 0) & (first < end):
        table = page_table + sequence.to(gl.int64) * table_stride
        call_up(table + first // page_tokens)
        call_up(table + gl.minimum(first + 31 * UNIT, end - 1) // page_tokens)
    gdc_wait()
    gdc_launch_dependents()
    if item < 0:
        item = _claim(items, claims, workers)
        sequence, group, first, end, partial, counter, parts, part = _load_item(
            items, gl.maximum(item, 0)
        )
    number = 0
    while item >= 0:
        table = page_table + sequence.to(gl.int64) * table_stride
        numbers = _page_numbers(table, first, end, page_tokens)
        mbarrier.wait(heard.index(number & 1), (number >> 1 & 1) ^ 1)
        _tell(fields, number, _SEQUENCE, sequence)
        _tell(fields, number, _GROUP, group)
        _tell(fields, number, _FIRST, first)
        _tell(fields, number, _END, end)
        _tell(fields, number, _PARTIAL, partial)
        _tell(fields, number, _COUNTER, counter)
        _tell(fields, number, _PARTS, parts)
        _tell(fields, number, _PART, part)
        pages.index(number & 1).store(numbers)
        sync()
        mbarrier.arrive(told.index(number & 1))
        mbarrier.wait(near, number & 1)
        number += 1
        item = _claim(items, claims, workers)
        sequence, group, first, end, partial, counter, parts, part = _load_item(
            items, gl.maximum(item, 0)
        )
    mbarrier.wait(heard.index(number & 1), (number >> 1 & 1) ^ 1)
    _tell(fields, number, _SEQUENCE, -1)
    sync()
    mbarrier.arrive(told.index(number & 1))


# ------------------------------------------------------------------------------------ loads


@gluon.jit
def _tiles(k_desc, v_desc, page_table, table_stride, page_tokens, ring, full, free, line, near):
    fields, pages, _, heard = line
    lane = gl.arange(0, 32, ONE_WARP)
    tiles = 0
    number = 0
    sequence = _next(line, number, ONE_WARP)
    while sequence >= 0:
        head = _field(fields, number, ONE_WARP, _GROUP) * HEADS
        first = _field(fields, number, ONE_WARP, _FIRST)
        end = _field(fields, number, ONE_WARP, _END)
        numbers = pages.index(number & 1).load(ONE_WARP).to(gl.int32)
        sync()
        mbarrier.arrive(heard.index(number & 1))
        table = page_table + sequence.to(gl.int64) * table_stride
        count = _tile_count(first, end)
        calls = gl.maximum(count - AHEAD, 0)
        for block in range(0, count, 32):
            following = _page_numbers(table, first + (block + 32) * UNIT, end, page_tokens)
            for tile in range(block, gl.minimum(block + 32, count)):
                token = first + tile * UNIT
                page = gl.max(gl.where(lane == tile - block, numbers, -1), 0)
                # A last tile of fewer tokens begins before them, so that it ends with them: what
                # lies behind is never read, and what lies before the page is zeros.
                there = gl.maximum(gl.minimum(end - token, UNIT), 0)
                inner = token % page_tokens + there - UNIT
                buffer = tiles % BUFFERS
                bar = full.index(buffer)
                mbarrier.wait(free.index(buffer), (tiles // BUFFERS & 1) ^ 1)
                mbarrier.expect(bar, TILE_BYTES)
                load_panel(k_desc, [page, head, 0, inner, 0], bar, ring.index(2 * buffer))
                load_panel(v_desc, [page, head, 0, inner, 0], bar, ring.index(2 * buffer + 1))
                mbarrier.arrive(near, pred=tile == calls)
                tiles += 1
            numbers = following
        number += 1
        sequence = _next(line, number, ONE_WARP)


@gluon.jit
def _queries(q_desc, q, q_full, q_free, line):
    fields, _, _, heard = line
    number = 0
    sequence = _next(line, number, ONE_WARP)
    while sequence >= 0:
        head = _field(fields, number, ONE_WARP, _GROUP) * HEADS
        sync()
        mbarrier.arrive(heard.index(number & 1))
        mbarrier.wait(q_free, (number & 1) ^ 1)
        mbarrier.expect(q_full, QUERY_BYTES)
        load_panel(q_desc, [sequence, head, 0, 0], q_full, q)
        number += 1
        sequence = _next(line, number, ONE_WARP)


# ---------------------------------------------------------------------------------- results


@gluon.jit
def _announce(counters, stored, decided, verdicts, line):
    """Says of each item how many parts its sequence has if this was the last to be stored, else
    zero; and which sequence, group and first partial result that is."""
    fields, _, _, heard = line
    number = 0
    sequence = _next(line, number, ONE_WARP)
    while sequence >= 0:
        group = _field(fields, number, ONE_WARP, _GROUP)
        partial = _field(fields, number, ONE_WARP, _PARTIAL)
        counter = _field(fields, number, ONE_WARP, _COUNTER)
        parts = _field(fields, number, ONE_WARP, _PARTS)
        part = _field(fields, number, ONE_WARP, _PART)
        mbarrier.wait(stored.index(number & 1), number >> 1 & 1)
        sync()
        # Not before: so the group is no more than one item ahead.
        mbarrier.arrive(heard.index(number & 1))
        merges = 0
        if parts > 1:
            # Releases what the group stored to the whole GPU, and acquires the other parts'.
            arrived = gl.atomic_add(counters + counter, 1, sem="acq_rel", scope="gpu")
            if arrived == parts - 1:
                gl.store(counters + counter, 0)
                merges = parts
        verdict = (number & 1) * 4
        verdicts.index(verdict).store(gl.full([1], merges, gl.int32, ONE_WARP))
        verdicts.index(verdict + 1).store(gl.full([1], sequence, gl.int32, ONE_WARP))
        verdicts.index(verdict + 2).store(gl.full([1], group, gl.int32, ONE_WARP))
        verdicts.index(verdict + 3).store(gl.full([1], partial - part, gl.int32, ONE_WARP))
        sync()
        mbarrier.arrive(decided.index(number & 1))
        number += 1
        sequence = _next(line, number, ONE_WARP)


@gluon.jit
def _heed(verdicts, decided, number, results, sizes):
    """Merges the parts of the sequence of that item, if this one's was the last."""
    mbarrier.wait(decided.index(number & 1), number >> 1 & 1)
    verdict = (number & 1) * 4
    parts = gl.max(verdicts.index(verdict).load(GROUP_WARPS), 0).to(gl.int32)
    if parts > 0:
        sequence = gl.max(verdicts.index(verdict + 1).load(GROUP_WARPS), 0).to(gl.int32)
        group = gl.max(verdicts.index(verdict + 2).load(GROUP_WARPS), 0).to(gl.int32)
        lead = gl.max(verdicts.index(verdict + 3).load(GROUP_WARPS), 0).to(gl.int32)
        # As many partial results at a time as registers hold.
        if sizes[0] <= 4:
            _merge(results, sequence, group, lead, parts, sizes, 4, 4, FEW_ROWS)
        else:
            _merge(results, sequence, group, lead, parts, sizes, 8, 2, ALL_ROWS)


@gluon.jit
def forget(start, lines):
    """Has the L2 drop so many lines of 128 bytes, of float32, which it would write to memory."""
    for at in range(0, lines, 256):
        line = at + gl.arange(0, 256, GROUP_WARPS)
        gl.inline_asm_elementwise(
            DROP,
            "=r,l,r",
            [(start + line * 32).to(gl.int64), (line < lines).to(gl.int32)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@gluon.jit
def _merge(results, sequence, group, lead, parts, sizes, WIDTH: gl.constexpr, DEPTH: gl.constexpr,
           CUBE: gl.constexpr):  # fmt: skip
    """Always in the order of the parts, so that equal inputs give equal bits."""
    out, partials, lse = results
    rows, out_sequence, out_head = sizes
    LINES: gl.constexpr = HEADS * WIDTH
    FACE: gl.constexpr = gl.SliceLayout(0, CUBE)  # heads, columns, rows
    SHARES: gl.constexpr = gl.SliceLayout(2, CUBE)  # parts, heads, rows
    LINE: gl.constexpr = gl.SliceLayout(0, SHARES)  # heads, rows
    depth = gl.arange(0, DEPTH, gl.SliceLayout(1, gl.SliceLayout(2, SHARES)))
    depths = gl.arange(0, DEPTH, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, CUBE))))
    line_head = gl.arange(0, HEADS, gl.SliceLayout(1, LINE))[:, None]
    line_row = gl.arange(0, WIDTH, gl.SliceLayout(0, LINE))[None, :]
    line = line_head * WIDTH + line_row
    head = gl.arange(0, HEADS, gl.SliceLayout(1, gl.SliceLayout(2, FACE)))[:, None, None]
    column = gl.arange(0, DIM, gl.SliceLayout(0, gl.SliceLayout(2, FACE)))[None, :, None]
    row = gl.arange(0, WIDTH, gl.SliceLayout(0, gl.SliceLayout(1, FACE)))[None, None, :]
    place = (head * DIM + column) * WIDTH + row
    best = gl.full([HEADS, WIDTH], NEVER, gl.float32, LINE)
    total = gl.full([HEADS, WIDTH], 0.0, gl.float32, LINE)
    acc = gl.full([HEADS, DIM, WIDTH], 0.0, gl.float32, FACE)
    for done in range(0, parts, DEPTH):
        # Past the L1, which knows nothing of what other multiprocessors have written.
        logs = gl.load(
            lse + ((lead + done + depth) * LINES)[:, None, None] + line[None, :, :],
            mask=(done + depth < parts)[:, None, None],
            other=HIDDEN,
            cache_modifier=".cg",
        )
        start = (lead + done + depths).to(gl.int64) * (LINES * DIM)
        values = gl.load(
            partials + start[:, None, None, None] + place[None, :, :, :],
            mask=(done + depths < parts)[:, None, None, None],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = gl.maximum(best, gl.max(logs, 0))
        fade = gl.exp2(best - higher)
        shares = gl.exp2(logs - higher[None, :, :])
        total = total * fade + gl.sum(shares, 0)
        fades = gl.convert_layout(fade, gl.SliceLayout(1, FACE))
        acc = acc * fades[:, None, :] + gl.sum(values * shares[:, :, None, :], 0)
        best = higher
    totals = gl.convert_layout(total, gl.SliceLayout(1, FACE))
    result = acc / gl.where(totals > 0, totals, 1.0)[:, None, :]
    query_head = (group * HEADS + head) * rows + row
    target = out + sequence.to(gl.int64) * out_sequence
    gl.store(target + query_head * out_head + column, result.to(gl.bfloat16), mask=row < rows)
    # Whoever has stored its share of the output has read its share of all parts.
    sync()
    forget(partials + lead.to(gl.int64) * (LINES * DIM), parts * (LINES * DIM // 32))


@gluon.jit
def _store_partial(acc, logs, partials, lse, partial, WIDTH: gl.constexpr):
    """Rows that there are not too, since memory is slow where part of 32 bytes is written. To stay
    in the L2 until they are merged."""
    head = gl.arange(0, HEADS, gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
    column = gl.arange(0, DIM, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, MMA)))[None, None, :]
    start = partials + partial.to(gl.int64) * (HEADS * DIM * WIDTH)
    gl.store(
        start + (head * DIM + column) * WIDTH + row,
        acc,
        mask=row < WIDTH,
        eviction_policy="evict_last",
    )
    line_head = gl.arange(0, HEADS, gl.SliceLayout(1, BY_ROW))[:, None]
    line_row = gl.arange(0, ROWS, gl.SliceLayout(0, BY_ROW))[None, :]
    line = (partial * HEADS + line_head) * WIDTH + line_row
    gl.store(lse + line, logs, mask=line_row < WIDTH, eviction_policy="evict_last")


@gluon.jit
def _store(acc, top, weight, sequence, group, partial, parts, results, sizes):
    """An item's result: into the output, or as a partial result."""
    out, partials, lse = results
    rows, out_sequence, out_head = sizes
    head = gl.arange(0, HEADS, gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
    column = gl.arange(0, DIM, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(0, gl.SliceLayout(1, MMA)))[None, None, :]
    if parts == 1:
        query_head = (group * HEADS + head) * rows + row
        target = out + sequence.to(gl.int64) * out_sequence
        gl.store(target + query_head * out_head + column, acc.to(gl.bfloat16), mask=row < rows)
    else:
        logs = gl.where(weight > 0, top + gl.log2(weight), HIDDEN)
        if rows <= 4:
            _store_partial(acc, logs, partials, lse, partial, 4)
        else:
            _store_partial(acc, logs, partials, lse, partial, 8)


@gluon.jit
def _group(q, q_full, q_free, ring, full, free, stored, decided, verdicts, line, scale, results,
           sizes):  # fmt: skip
    fields, _, _, heard = line
    tiles = 0
    number = 0
    sequence = _next(line, number, GROUP_WARPS)
    while sequence >= 0:
        group = _field(fields, number, GROUP_WARPS, _GROUP)
        first = _field(fields, number, GROUP_WARPS, _FIRST)
        end = _field(fields, number, GROUP_WARPS, _END)
        partial = _field(fields, number, GROUP_WARPS, _PARTIAL)
        parts = _field(fields, number, GROUP_WARPS, _PARTS)
        mbarrier.wait(q_full, number & 1)
        queries = load_queries(q)
        sync()
        mbarrier.arrive(heard.index(number & 1))
        top = gl.full([HEADS, ROWS], NEVER, gl.float32, BY_ROW)
        # Summed over the tokens once, behind the loop.
        total = gl.full([HEADS, UNIT, ROWS], 0.0, gl.float32, MMA)
        acc = gl.full([HEADS, DIM, ROWS], 0.0, gl.float32, MMA)
        count = _tile_count(first, end)
        for tile in range(count):
            sync()
            mbarrier.arrive(free.index((tiles + BUFFERS - 1) % BUFFERS), pred=tile > 0)
            buffer = tiles % BUFFERS
            mbarrier.wait(full.index(buffer), tiles // BUFFERS & 1)
            keys = load_keys(ring.index(2 * buffer))
            scores = mma_v2(keys, queries, gl.full([HEADS, UNIT, ROWS], 0.0, gl.float32, MMA))
            there = gl.minimum(end - first - tile * UNIT, UNIT)
            if there < UNIT:
                place = gl.arange(0, UNIT, gl.SliceLayout(0, gl.SliceLayout(2, MMA)))
                scores = gl.where((place >= UNIT - there)[None, :, None], scores, HIDDEN)
            new_top = gl.maximum(top, gl.max(scores, 1) * scale)
            fade = gl.exp2(top - new_top)[:, None, :]
            shares = gl.exp2(scores * scale - new_top[:, None, :])
            total = total * fade + shares
            weights = gl.convert_layout(shares.to(gl.bfloat16), RIGHT)
            values = load_values(ring.index(2 * buffer + 1))
            acc = mma_v2(values, weights, acc * fade)
            top = new_top
            tiles += 1
        sync()
        mbarrier.arrive(free.index((tiles + BUFFERS - 1) % BUFFERS))
        mbarrier.arrive(q_free)
        weight = gl.sum(total, 1)
        acc = acc * (1.0 / gl.where(weight > 0, weight, 1.0))[:, None, :]
        _store(acc, top, weight, sequence, group, partial, parts, results, sizes)
        sync()
        mbarrier.arrive(stored.index(number & 1))
        if number > 0:
            _heed(verdicts, decided, number - 1, results, sizes)
        number += 1
        sequence = _next(line, number, GROUP_WARPS)
    if number > 0:
        _heed(verdicts, decided, number - 1, results, sizes)


@gluon.jit(
    do_not_specialize=["table_stride", "page_tokens", "rows", "out_sequence", "out_head"],
)  # fmt: skip
def gqa_ring_kernel(
    k_desc,  # [pages, kv_heads, 2, page_tokens, 64] bfloat16 in boxes of [1, 8, 2, 16, 64]
    v_desc,
    q_desc,  # [batch, kv_heads, rows, 128] in boxes of [1, 8, 8, 128]
    page_table,  # [batch, table_stride] int32
    items,  # [1 + n, 16] int32: a RingList's
    out,  # [batch, kv_heads * rows, 128] bfloat16
    partials,  # [n_partials, 8, 128, 4 or 8] float32: heads, columns, rows
    lse,  # [n_partials, 8, 4 or 8] float32: log2 of the sums of exponentials
    counters,  # [n_counters] int32, zeros, and zeros again afterwards
    claims,  # [1] int32, likewise
    scale,  # of the scores, times log2 e
    table_stride,
    page_tokens,
    rows,
    out_sequence,
    out_head,
):
    ring = gl.allocate_shared_memory(gl.bfloat16, [2 * BUFFERS, HEADS, 2, UNIT, HALF], HALVES)
    q = gl.allocate_shared_memory(gl.bfloat16, [HEADS, ROWS, DIM], QUERIES)
    fields = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], FLAT)
    pages = gl.allocate_shared_memory(gl.int32, [2, 32], FLAT)
    verdicts = gl.allocate_shared_memory(gl.int32, [8, 1], FLAT)
    full, free = new_barriers(BUFFERS, 1), new_barriers(BUFFERS, 1)
    told, heard = new_barriers(2, 1), new_barriers(2, 4)
    stored, decided = new_barriers(2, 1), new_barriers(2, 1)
    q_full, q_free, near = new_barrier(1), new_barrier(1), new_barrier(1)
    fence_async_shared()
    worker = gl.program_id(0)
    item = gl.where(worker < gl.load(items), worker, -1)  # the host's, as all items
    line = (fields, pages, told, heard)
    sizes = (rows, out_sequence, out_head)
    results = (out, partials, lse)
    group = (q, q_full, q_free, ring, full, free, stored, decided, verdicts, line, scale, results,
             sizes)  # fmt: skip
    tiles = (k_desc, v_desc, page_table, table_stride, page_tokens, ring, full, free, line, near)
    scout = (page_table, items, item, claims, table_stride, page_tokens, line, near)
    gl.warp_specialize(
        [
            (_group, group),
            (_tiles, tiles),
            (_scout, scout),
            (_queries, (q_desc, q, q_full, q_free, line)),
            (_announce, (counters, stored, decided, verdicts, line)),
        ],
        [1, 1, 1, 1],
        [40, 40, 40, 40],
    )
