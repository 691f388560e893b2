"""What the latent attention kernel in Gluon does besides taking turns.

Names that differ between Triton 3.6 and 3.9; tiles of shared memory and how they are filled;
records of a `mla_gluon_schedule`; masks and the online softmax; and what becomes of an item's
result: rows of the output, or a partial result which all parts of the (sequence, tile) merge
together, each some of the rows.
"""

# A kernel's functions are inlined and their arguments have no Python types.
# ruff: noqa: N803, N806, PLR0917
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr, builtin
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from kvstore_kernels import mla_gluon_schedule as schedule
from kvstore_kernels import worklist

ROWS = gl.constexpr(64)  # query rows of a tile
BLOCK = gl.constexpr(64)  # tokens of a block
HALF = gl.constexpr(256)  # columns of half of the latent
BOX = gl.constexpr(128)  # columns that are waited for together
PANEL = gl.constexpr(64)  # columns that one tensor-map copy brings: 128 bytes, the widest swizzle
TAIL = gl.constexpr(512)  # the column where the rope part begins
RANK = gl.constexpr(512)
PANEL_BYTES = gl.constexpr(64 * 64 * 2)
BOX_BYTES = gl.constexpr(64 * 128 * 2)
TILE_BYTES = gl.constexpr(9 * 64 * 64 * 2)

NEVER = gl.constexpr(-1.0e30)  # below all scores, but finite: NEVER - NEVER is 0
HIDDEN = gl.constexpr(float("-inf"))

SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())

NOBODY = gl.constexpr(worklist.NOBODY)
PAIR = gl.constexpr(schedule.PAIR_TOKENS)
COLUMNS = gl.constexpr(schedule.COLUMNS)

# Triton 3.6's name, then 3.9's: a panel from global to shared memory; a barrier of the partition.
load_panel: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
sync: Any = getattr(gl, "barrier", None) or gl.thread_barrier


@builtin
def viewed(memory: Any, shape: Any, _semantic: Any = None) -> Any:
    """Swizzled shared memory in another shape; panels of 64 columns lie one after the other."""
    sizes = [_unwrap_if_constexpr(size) for size in _unwrap_if_constexpr(shape)]
    return _semantic.memdesc_reinterpret(memory, memory.dtype, sizes, SWIZZLED.value)


@gluon.jit
def new_barrier(COUNT: gl.constexpr):
    """An mbarrier that completes a phase with every COUNT arrivals."""
    bar = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    mbarrier.init(bar, count=COUNT)
    return bar


@gluon.jit
def new_pair():
    """Two of these for one arrival each, in allocations of their own: the compiler orders accesses
    to one allocation with barriers of all threads, which nothing here needs."""
    return new_barrier(1), new_barrier(1)


@gluon.jit
def new_tile():
    """Shared memory for 64 rows of 576 columns: left half, right half, tail."""
    left = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BOX], SWIZZLED)
    right = gl.allocate_shared_memory(gl.bfloat16, [2, 64, BOX], SWIZZLED)
    tail = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], SWIZZLED)
    return left, right, tail


@gluon.jit
def load_half(desc, outer, inner, column, bars, memory):
    """Brings 64 rows of 256 columns; bars: one for each box of the memory."""
    panels = viewed(memory, [4, 64, 64])
    for box in gl.static_range(2):
        mbarrier.expect(bars[box], BOX_BYTES)
        for panel in gl.static_range(2 * box, 2 * box + 2):
            load_panel(desc, [outer, inner, column + panel * PANEL], bars[box], panels.index(panel))


@gluon.jit
def load_tail(desc, outer, inner, bar, memory):
    """Brings 64 rows of the rope part."""
    mbarrier.expect(bar, PANEL_BYTES)
    load_panel(desc, [outer, inner, TAIL], bar, memory.index(0))


@gluon.jit
def load_queries(desc, sequence, tile, bar, q):
    """Brings a tile's 64 query rows; those behind a sequence's last are zeros."""
    mbarrier.expect(bar, TILE_BYTES)
    left, right, tail = q
    lefts, rights = viewed(left, [4, 64, 64]), viewed(right, [4, 64, 64])
    row = tile * ROWS
    for panel in gl.static_range(4):
        load_panel(desc, [sequence, row, panel * PANEL], bar, lefts.index(panel))
        load_panel(desc, [sequence, row, HALF + panel * PANEL], bar, rights.index(panel))
    load_panel(desc, [sequence, row, TAIL], bar, tail.index(0))


# ------------------------------------------------------------------------------ schedule


@gluon.jit
def first_record(records, worker):
    """The row of the worker's first item, or -1."""
    return gl.where(gl.load(records + worker * COLUMNS) == NOBODY, -1, worker)


@gluon.jit
def load_span(records, row):
    """(sequence, tile, first token, end) of a record, and the next record's row."""
    at = records + row * COLUMNS
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3), gl.load(at + 9)


@gluon.jit
def load_parts(records, row):
    """(partial, counter, parts, part) of a record."""
    at = records + row * COLUMNS
    return gl.load(at + 4), gl.load(at + 5), gl.load(at + 6), gl.load(at + 7)


@gluon.jit
def pairs_of(first, end):
    """Pairs of blocks of an item. At least one, so that all items take the same steps."""
    return gl.maximum((end - first + PAIR - 1) // PAIR, 1)


@gluon.jit
def tokens_in(first, end):
    """How many tokens the block has that begins at `first`: 0 to 64."""
    return gl.maximum(gl.minimum(end - first, BLOCK), 0)


@gluon.jit
def locate(table, first, end, page_tokens):
    """Where the block that begins at `first` lies: (page, row in the page) for a box of 64 rows.

    A last block of fewer tokens is taken from as many rows further up, so that its tokens are the
    box's last rows and the rows above are earlier tokens, or outside of the page and so zeros. What
    lies in the page behind the last token is never read: were it NaN, a weight of 0 would not hide
    it. A block without tokens is page -1, outside of the pool: zeros.
    """
    tokens = tokens_in(first, end)
    page = -1
    if tokens > 0:
        page = gl.load(table + first // page_tokens)
    return page, first % page_tokens + tokens - BLOCK


# ------------------------------------------------------------------------- masks, softmax


@gluon.jit
def tokens_seen(records, row, tile, heads, q_tokens, LAYOUT: gl.constexpr):
    """How many of the sequence's tokens each row sees, (64,); and the least of these."""
    unseen = gl.load(records + row * COLUMNS + 8) - q_tokens + 1
    rows = tile * ROWS + gl.arange(0, 64, LAYOUT)
    seen = unseen + gl.minimum(rows // heads, q_tokens - 1)
    return seen, unseen + tile * ROWS // heads


@gluon.jit
def masked(scores, first, end, seen, LAYOUT: gl.constexpr):
    """Scores of the block that begins at `first`, where its rows see its tokens."""
    column = gl.arange(0, 64, gl.SliceLayout(0, LAYOUT)) - (BLOCK - tokens_in(first, end))
    shown = (column >= 0)[None, :] & ((first + column)[None, :] < seen[:, None])
    return gl.where(shown, scores, HIDDEN)


@gluon.jit
def softmax_step(scores, top, scale):
    """(weights, new top): weights are 2 ** (scores * scale - new top)."""
    new_top = gl.maximum(top, gl.max(scores, 1) * scale)
    return gl.exp2(scores * scale - new_top[:, None]), new_top


@gluon.jit
def scaled(acc, factor, LAYOUT: gl.constexpr):
    """Rows of acc times a factor each, which comes in the layout of scores."""
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, LAYOUT))[:, None]


# -------------------------------------------------------------------------------- results


@gluon.jit
def store_result(acc, top, total, out, partials, lse, counters, records, row, sequence, tile, rows,
                 HALF_INDEX: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """An item's result: into the output, or as a partial result, whose arrival is then counted.

    acc: (64, 256), that half's columns. top, total: (64,), in the layout of scores.
    """
    partial, counter, _, _ = load_parts(records, row)
    acc = scaled(acc, 1.0 / gl.where(total > 0, total, 1.0), LAYOUT)
    at = gl.arange(0, 64, gl.SliceLayout(1, LAYOUT))
    column = HALF_INDEX * HALF + gl.arange(0, HALF, gl.SliceLayout(0, LAYOUT))
    place = at[:, None] * RANK + column[None, :]
    if partial < 0:
        start = out + (sequence * rows + tile * ROWS).to(gl.int64) * RANK
        gl.store(start + place, acc.to(gl.bfloat16), mask=(tile * ROWS + at < rows)[:, None])
    else:
        gl.store(partials + partial.to(gl.int64) * (ROWS * RANK) + place, acc)
        weight = gl.where(total > 0, top + gl.log2(total), HIDDEN)
        weight = gl.convert_layout(weight, gl.SliceLayout(1, LAYOUT))
        gl.store(lse + (partial * 2 + HALF_INDEX) * ROWS + at, weight)
        sync()  # all of this group's stores come before the one thread's release
        gl.atomic_add(counters + counter * 2 + HALF_INDEX, 1, sem="release", scope="gpu")


@gluon.jit
def merge_items(out, partials, lse, counters, records, row, rows, HALF_INDEX: gl.constexpr):
    """Merges this worker's share of each (sequence, tile) of which it had a part.

    Called when the worker has no items left, so that nobody waits for one who waits: all workers
    of a launch run at once, and none waits before its own partial results are there.
    """
    while row >= 0:
        sequence, tile, _, _, following = load_span(records, row)
        partial, counter, parts, part = load_parts(records, row)
        if parts > 1:
            place = counters + counter * 2 + HALF_INDEX
            await_parts(place, parts)
            lead = partial - part
            limit = rows - tile * ROWS
            target = out + (sequence * rows + tile * ROWS).to(gl.int64) * RANK
            low, high = part * ROWS // parts, gl.minimum((part + 1) * ROWS // parts, limit)
            if parts > 8:
                merge_rows(target, partials, lse, lead, parts, low, high, HALF_INDEX, 16, 2)
            elif parts > 4:
                merge_rows(target, partials, lse, lead, parts, low, high, HALF_INDEX, 8, 8)
            elif parts > 2:
                merge_rows(target, partials, lse, lead, parts, low, high, HALF_INDEX, 4, 8)
            else:
                merge_rows(target, partials, lse, lead, parts, low, high, HALF_INDEX, 2, 16)
            leave(place, parts)
        row = following


@gluon.jit
def await_parts(counter, parts):
    """Returns when all parts' partial results are there, and then sees them."""
    arrived = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")
    while arrived < parts:
        arrived = gl.atomic_add(counter, 0, sem="acquire", scope="gpu")


@gluon.jit
def leave(counter, parts):
    """Counts who has merged its share; the last one sets the counter back for the next launch."""
    sync()
    if gl.atomic_add(counter, 1, sem="relaxed", scope="gpu") == 2 * parts - 1:
        gl.store(counter, 0)


@gluon.jit
def merge_rows(target, partials, lse, lead, parts, low, high, HALF_INDEX: gl.constexpr,
               DEPTH: gl.constexpr, HEIGHT: gl.constexpr):  # fmt: skip
    """Rows low to high of the output from all parts, DEPTH partial results and HEIGHT rows at a
    time: as much as hides the latency of the L2. Always in the order of the parts, so that equal
    inputs give equal bits."""
    CUBE: gl.constexpr = gl.BlockedLayout([1, 1, 4], [1, 1, 32], [1, 2, 2], [2, 1, 0])
    FACE: gl.constexpr = gl.SliceLayout(0, CUBE)  # rows, columns
    WEIGHTS: gl.constexpr = gl.SliceLayout(2, CUBE)  # parts, rows
    LINE: gl.constexpr = gl.SliceLayout(0, WEIGHTS)  # rows
    depth = gl.arange(0, DEPTH, gl.SliceLayout(1, WEIGHTS))
    line = gl.arange(0, HEIGHT, LINE)
    column = HALF_INDEX * HALF + gl.arange(0, HALF, gl.SliceLayout(0, FACE))
    columns = gl.convert_layout(column, gl.SliceLayout(0, gl.SliceLayout(1, CUBE)))
    for row in range(low, high, HEIGHT):
        best = gl.full([HEIGHT], NEVER, gl.float32, LINE)
        total = gl.full([HEIGHT], 0.0, gl.float32, LINE)
        acc = gl.full([HEIGHT, HALF], 0.0, gl.float32, FACE)
        for done in range(0, parts, DEPTH):
            there = (done + depth < parts)[:, None] & (row + line < high)[None, :]
            partial = lead + done + depth
            lses = lse + ((partial * 2 + HALF_INDEX) * ROWS)[:, None] + (row + line)[None, :]
            weights = gl.load(lses, mask=there, other=HIDDEN, cache_modifier=".cg")
            lines = (partial.to(gl.int64) * ROWS)[:, None] + (row + line)[None, :]
            values = gl.load(
                partials + (lines * RANK)[:, :, None] + columns[None, None, :],
                mask=there[:, :, None],
                other=0.0,
                cache_modifier=".cg",
            )
            higher = gl.maximum(best, gl.max(weights, 0))
            fade = gl.exp2(best - higher)
            weights = gl.exp2(weights - higher[None, :])
            total = total * fade + gl.sum(weights, 0)
            fades = gl.convert_layout(fade, gl.SliceLayout(1, FACE))
            acc = acc * fades[:, None] + gl.sum(values * weights[:, :, None], 0)
            best = higher
        totals = gl.convert_layout(total, gl.SliceLayout(1, FACE))
        result = acc / gl.where(totals > 0, totals, 1.0)[:, None]
        at = row + gl.arange(0, HEIGHT, gl.SliceLayout(1, FACE))
        places = target + at[:, None] * RANK + column[None, :]
        gl.store(places, result.to(gl.bfloat16), mask=(at < high)[:, None])
