"""Latent attention of few query rows, as fast as a multiprocessor can be fed (Gluon, for Hopper).

A block of threads has three buffers of 64 tokens by 512 columns, which go round:

    tiles     a warp that brings the latents of tile after tile, item after item, as buffers are
              freed. It claims the items, and tells the others
    sides     a warp that brings queries, and the tiles' rope columns
    group     a warpgroup that multiplies
    arrivals  a warp that counts at GPU scope what the group has left

Tokens are rows of the first product and latent columns those of the second, so that 16 query rows,
their columns, fill the matrix units without padding; a tile in shared memory is a factor of both.

For each tile the group waits for it, scores it, gives its rope columns back, takes the softmax,
puts the weights into shared memory, adds its values to the output, and gives the buffer back. That
takes it half of the time in which memory brings a tile, so that two to three buffers are always
being filled: no second group is needed to hide the softmax.

Barriers. Buffers have one of being full and one of being free each, and so have the rope columns
and the queries. Items go through a queue of two, whose places are told, and heard by all three. One
barrier says that an item's result is stored. Weights are written and read by the group alone.

Results. An item that is all of its sequence writes the output. A part leaves a partial result,
columns by rows. Blocks whose first items were parts keep these: without more items, they merge
their sequences, each some of the columns. For whom a block may wait then, see
`mla_ring_merge.meet`.
"""

# A kernel's functions are inlined and their arguments have no Python types.
# ruff: noqa: N806, PLR0915, PLR0917
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvstore_kernels.mla_gluon_parts import (
    BLOCK,
    FLAT,
    HIDDEN,
    NEVER,
    RANK,
    SWIZZLED,
    new_barrier,
    sync,
    tokens_in,
    viewed,
)
from kvstore_kernels.mla_ring_append import FEW
from kvstore_kernels.mla_ring_items import (
    AT_END,
    AT_ONCE,
    COLUMNS,
    GROUP_WARPS,
    KEEPS,
    first_new,
    hear,
    load_parts,
    load_span,
    new_barriers,
    tiles_of,
)
from kvstore_kernels.mla_ring_merge import meet
from kvstore_kernels.mla_ring_warps import (
    BUFFERS,
    announce,
    load_sides,
    load_tiles,
    write_tokens,
)

THREADS_REGISTERS = 168

ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
BY_ROW = gl.constexpr(gl.SliceLayout(0, ACC.value))
BY_TOKEN = gl.constexpr(gl.SliceLayout(1, ACC.value))
WEIGHTS = gl.constexpr(gl.NVMMASharedLayout(32, 16, 2))


@gluon.jit
def _score(q, latent, tail, full, tail_full, buffer, tiles):
    """Scores of a tile, tokens by rows."""
    scores = gl.full([64, FEW], 0.0, gl.float32, ACC)
    mbarrier.wait(full.index(buffer), tiles // BUFFERS & 1)
    panels = viewed(latent, [8, 64, 64])
    # Addresses that depend on the loop are made in it; the compiler would keep all of the constant
    # ones in registers, which there are not.
    zero = tiles >> 31
    for panel in gl.static_range(8):
        queries = q.index(panel + zero).permute((1, 0))
        scores = warpgroup_mma(panels.index(panel), queries, scores, is_async=True)
    mbarrier.wait(tail_full, tiles & 1)
    queries = q.index(8 + zero).permute((1, 0))
    scores = warpgroup_mma(tail.index(zero), queries, scores, is_async=True)
    return warpgroup_mma_wait(0, [scores])


@gluon.jit
def _masked(scores, first, end, seen):
    """Scores of the tile that begins at `first`, where its rows see its tokens."""
    place = gl.arange(0, 64, BY_TOKEN) - (BLOCK - tokens_in(first, end))
    shown = (place >= 0)[:, None] & ((first + place)[:, None] < seen[None, :])
    return gl.where(shown, scores, HIDDEN)


@gluon.jit
def _store_partial(acc, top, weight, partials, lse, partial):
    """acc: (512, 16), columns by rows."""
    column = gl.arange(0, RANK, BY_TOKEN)
    at = gl.arange(0, FEW, BY_ROW)
    start = partials + partial.to(gl.int64) * (FEW * RANK)
    gl.store(start + column[:, None] * FEW + at[None, :], acc)
    gl.store(lse + partial * FEW + at, gl.where(weight > 0, top + gl.log2(weight), HIDDEN))


@gluon.jit
def _store_output(acc, target, limit):
    column = gl.arange(0, RANK, BY_TOKEN)
    at = gl.arange(0, FEW, BY_ROW)
    places = at[None, :] * RANK + column[:, None]
    gl.store(target + places, acc.to(gl.bfloat16), mask=(at < limit)[None, :])


@gluon.jit
def _group(q, ring, tail, weights, bars, line, items, sizes, scale, results):
    q_full, q_free, full, free, tail_full, tail_free, stored = bars
    rows, heads, q_tokens = sizes
    out, partials, lse, counters = results
    tiles = 0
    number = 0
    kept = -1
    item = hear(line, number, GROUP_WARPS)
    while item >= 0:
        sequence, group, first, end = load_span(items, item)
        partial, _, parts, _ = load_parts(items, item)
        unseen = first_new(items, item, q_tokens) + 1
        keeps = gl.load(items + (1 + item) * COLUMNS + KEEPS)
        at = group * FEW + gl.arange(0, FEW, BY_ROW)
        seen = unseen + gl.minimum(at // heads, q_tokens - 1)
        edge = gl.minimum(unseen + group * FEW // heads, end)
        top = gl.full([FEW], NEVER, gl.float32, BY_ROW)
        # Summed over the tokens once, behind the loop: a sum across warps is a barrier.
        total = gl.full([64, FEW], 0.0, gl.float32, ACC)
        acc = gl.full([RANK, FEW], 0.0, gl.float32, ACC)
        mbarrier.wait(q_full, number & 1)
        count = tiles_of(first, end)
        for tile in range(count):
            token = first + tile * BLOCK
            buffer = tiles % BUFFERS
            latent = ring.index(buffer)
            scores = _score(q, latent, tail, full, tail_full, buffer, tiles)
            sync()
            mbarrier.arrive(tail_free)
            mbarrier.arrive(q_free, pred=tile == count - 1)
            if token + BLOCK > edge:
                scores = _masked(scores, token, end, seen)
            new_top = gl.maximum(top, gl.max(scores, 0) * scale)
            fade = gl.exp2(top - new_top)[None, :]
            shares = gl.exp2(scores * scale - new_top[None, :])
            total = total * fade + shares
            weights.store(shares.to(gl.bfloat16))
            fence_async_shared()
            sync()
            acc = warpgroup_mma(latent.permute((1, 0)), weights, acc * fade, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
            sync()
            mbarrier.arrive(free.index(buffer))
            top = new_top
            tiles += 1
        weight = gl.sum(total, 0)
        acc = acc * (1.0 / gl.where(weight > 0, weight, 1.0))[None, :]
        if parts == 1:
            target = out + (sequence * rows + group * FEW).to(gl.int64) * RANK
            _store_output(acc, target, rows - group * FEW)
        else:
            _store_partial(acc, top, weight, partials, lse, partial)
        sync()
        mbarrier.arrive(stored.index(number & 1))
        if keeps == AT_ONCE:
            meet(out, partials, lse, counters, items, item, rows, False, 1)
        kept = gl.where(keeps == AT_END, item, kept)
        number += 1
        item = hear(line, number, GROUP_WARPS)
    if kept >= 0:
        meet(out, partials, lse, counters, items, kept, rows, item == -1, 0)


@gluon.jit(
    do_not_specialize=["table_stride", "page_tokens", "rows", "heads", "q_tokens", "n_pages",
                       "page_stride", "token_stride"],
)  # fmt: skip
def ring_kernel(
    q_desc,  # [batch, rows, 576] bfloat16 in boxes of [1, 16, 64]
    kv_desc,  # [pages, page_tokens, 576] in boxes of [1, 64, 64]
    page_table,  # [batch, table_stride] int32
    items,  # [1 + n, 16] int32: a RingList's
    out,  # [batch, rows, 512] bfloat16
    partials,  # [n_partials, 512, 16] float32
    lse,  # [n_partials, 16] float32
    counters,  # [n_counters] int64, zeros, and zeros again afterwards
    claims,  # [1] int32, likewise
    scale,  # of the scores, times log2 e
    table_stride,
    page_tokens,
    rows,
    heads,
    q_tokens,
    q_rope_ptr,  # [batch, q_tokens, heads, 64]; all of these are None without new tokens
    latents_ptr,  # [batch, q_tokens, 576]
    norm_ptr,  # [512]
    cos_ptr,  # [batch, q_tokens, 32]
    sin_ptr,
    page_ids_ptr,  # [batch, q_tokens]
    offsets_ptr,
    pages_ptr,  # what kv_desc describes
    n_pages,
    page_stride,
    token_stride,
    n: gl.constexpr,  # an AppendGeometry, or None: new tokens are in the pages
):
    WRITERS: gl.constexpr = 0 if n is None else 1
    ring = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, 64, 512], SWIZZLED)
    tail = gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], SWIZZLED)
    q = gl.allocate_shared_memory(gl.bfloat16, [9, FEW, 64], SWIZZLED)
    weights = gl.allocate_shared_memory(gl.bfloat16, [64, FEW], WEIGHTS)
    queue = gl.allocate_shared_memory(gl.int32, [2, 1], FLAT)
    full, free = new_barriers(BUFFERS, 1), new_barriers(BUFFERS, 1)
    told, heard = new_barriers(2, 1), new_barriers(2, 3 + WRITERS)
    q_full, q_free = new_barrier(1 + WRITERS), new_barrier(1)
    tail_full, tail_free = new_barrier(1), new_barrier(1)
    # Two, since the group may have stored the next item before the first is counted.
    stored, written = new_barriers(2, 1), new_barrier(1)
    fence_async_shared()
    # Nothing that a kernel writes: launches before this one may still run.
    worker = gl.program_id(0)
    item = gl.where(worker < gl.load(items), worker, -1)
    gdc_wait()
    gdc_launch_dependents()
    sizes = (rows, heads, q_tokens)
    results = (out, partials, lse, counters)
    line = (queue, told, heard)
    group_bars = (q_full, q_free, full, free, tail_full, tail_free, stored)
    tile_bars = (full, free, written)
    side_bars = (q_full, q_free, tail_full, tail_free, written)
    group = (q, ring, tail, weights, group_bars, line, items, sizes, scale, results)
    # New tokens that loads wait for are the last so many.
    tiles = (kv_desc, page_table, items, item, claims, table_stride, page_tokens, ring, tile_bars,
             line, q_tokens * WRITERS)  # fmt: skip
    sides = (q_desc, kv_desc, page_table, items, table_stride, page_tokens, q, tail, side_bars,
             line, q_tokens * WRITERS)  # fmt: skip
    arrivals = (items, counters, stored, line)
    if n is None:
        gl.warp_specialize(
            [(_group, group), (load_tiles, tiles), (load_sides, sides), (announce, arrivals)],
            [1, 1, 1],
            [40, 40, 40],
        )
    else:
        new = (q_rope_ptr, latents_ptr, norm_ptr, cos_ptr, sin_ptr, page_ids_ptr, offsets_ptr)
        # From the first to the second of a pair, and from pair to pair.
        apart, step = (1, 2) if n.interleaved else (32, 1)
        strides = (n.q_sequence, n.q_token, n.q_head, n.k_sequence, n.k_token, n.angle_sequence,
                   n.angle_token, apart, step)  # fmt: skip
        pages = (pages_ptr, n_pages, page_tokens, page_stride, token_stride)
        writer = (new, strides, pages, items, sizes, q, (q_full, q_free, written), line, n.eps)
        gl.warp_specialize(
            [
                (_group, group),
                (load_tiles, tiles),
                (load_sides, sides),
                (announce, arrivals),
                (write_tokens, writer),
            ],
            [1, 1, 1, 1],
            [40, 40, 40, 88],
        )
