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
their sequences, each some of the columns. For whom a block may wait then, see `_meet`.
"""

# A kernel's functions are inlined and their arguments have no Python types.
# ruff: noqa: N803, N806, PLR0915, PLR0917
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

from kvstore_kernels import mla_ring_schedule as schedule
from kvstore_kernels.mla_gluon_parts import (
    BARRIER,
    BLOCK,
    FLAT,
    HIDDEN,
    NEVER,
    PANEL,
    RANK,
    SWIZZLED,
    TAIL,
    load_panel,
    load_tail,
    locate,
    new_barrier,
    sync,
    tokens_in,
    viewed,
)
from kvstore_kernels.mla_ring_append import FEW, append_tokens, rotate_queries

BUFFERS = gl.constexpr(3)
THREADS_REGISTERS = 168

LATENT_BYTES = gl.constexpr(64 * 512 * 2)
QUERY_BYTES, LATENT_QUERY_BYTES = gl.constexpr(16 * 576 * 2), gl.constexpr(16 * 512 * 2)
HIGH = gl.constexpr(1 << 16)  # one, in the upper half of a word that holds two counters
LOW = gl.constexpr((1 << 16) - 1)
COMES, CLAIM, LEAVES = gl.constexpr(1 << 16), gl.constexpr(1 << 32), gl.constexpr(1 << 48)

ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 16, 16]))
BY_ROW = gl.constexpr(gl.SliceLayout(0, ACC.value))
BY_TOKEN = gl.constexpr(gl.SliceLayout(1, ACC.value))
WEIGHTS = gl.constexpr(gl.NVMMASharedLayout(32, 16, 2))
ONE_WARP = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
GROUP_WARPS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
COLUMNS = gl.constexpr(schedule.COLUMNS)
KEEPERS = gl.constexpr(schedule.KEEPERS)
KEEPS = gl.constexpr(schedule.KEEPS)
PIECES = gl.constexpr(schedule.PIECES)
AT_END = gl.constexpr(schedule.AT_END)
AT_ONCE = gl.constexpr(schedule.AT_ONCE)


@gluon.jit
def _new_barriers(HOW_MANY: gl.constexpr, COUNT: gl.constexpr):
    """Each completes a phase with every COUNT arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [HOW_MANY, 1], BARRIER)
    for at in gl.static_range(HOW_MANY):
        mbarrier.init(bars.index(at), count=COUNT)
    return bars


@gluon.jit
def _tiles_of(first, end):
    """At least one, so that all items take the same steps."""
    return gl.maximum((end - first + BLOCK - 1) // BLOCK, 1)


@gluon.jit
def _page_at(table, token, end, page_tokens):
    """The page that has a tile, which then has tokens; -1 is outside of the pool, and so zeros."""
    return gl.load(table + token // page_tokens, mask=token < end, other=-1)


@gluon.jit
def _span(items, item):
    """(sequence, group, first token, end)."""
    at = items + (1 + item) * COLUMNS
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)


@gluon.jit
def _parts(items, item):
    """(partial, counter, parts, part)."""
    at = items + (1 + item) * COLUMNS
    return gl.load(at + 4), gl.load(at + 5), gl.load(at + 6), gl.load(at + 7)


@gluon.jit
def _newest(items, item, q_tokens):
    """The position of the first of the sequence's last so many tokens."""
    return gl.load(items + (1 + item) * COLUMNS + 8) - q_tokens


@gluon.jit
def _tell(item, line, number):
    """Gives all others the next item, or that there is none."""
    queue, told, heard = line
    mbarrier.wait(heard.index(number & 1), (number >> 1 & 1) ^ 1)
    queue.index(number & 1).store(gl.full([1], item, gl.int32, ONE_WARP))
    sync()
    mbarrier.arrive(told.index(number & 1))


@gluon.jit
def _listen(line, number, LAYOUT: gl.constexpr):
    """The next item, or a negative number if there is none."""
    queue, told, _ = line
    mbarrier.wait(told.index(number & 1), number >> 1 & 1)
    item = gl.max(queue.index(number & 1).load(LAYOUT), 0)
    sync()
    return item


@gluon.jit
def _hear(line, number, LAYOUT: gl.constexpr):
    """The same; what it was read from is free then."""
    item = _listen(line, number, LAYOUT)
    heard = line[2]
    mbarrier.arrive(heard.index(number & 1))
    return item


@gluon.jit
def _claim(items, claims, workers):
    """The next item that nobody has. If there is none: -1 if all workers have started, else -2.

    The word counts claims, and workers that have started in its upper half. Each worker claims in
    vain once, and the last of them sets the word back for the next launch.
    """
    claim = gl.atomic_add(claims, 1, sem="relaxed", scope="gpu")
    count = gl.load(items)
    claimed = claim & LOW
    if claimed + 1 == gl.maximum(count, workers):
        gl.store(claims, 0)
    nothing = gl.where(claim // HIGH == workers, -1, -2)
    return gl.where(workers + claimed < count, workers + claimed, nothing)


@gluon.jit
def _load_tiles(kv_desc, page_table, items, item, claims, table_stride, page_tokens, ring, bars,
                line, appends):  # fmt: skip
    full, free, written = bars
    workers = gl.num_programs(0)
    gl.atomic_add(claims, HIGH, sem="relaxed", scope="gpu")
    number = 0
    tiles = 0
    if item < 0:
        item = _claim(items, claims, workers)
    while item >= 0:
        _tell(item, line, number)
        sequence, _, first, end = _span(items, item)
        newest = _newest(items, item, appends)
        table = page_table + sequence.to(gl.int64) * table_stride
        # So many ahead as there are buffers, whose latencies are then one.
        page = _page_at(table, first, end, page_tokens)
        second = _page_at(table, first + BLOCK, end, page_tokens)
        third = _page_at(table, first + 2 * BLOCK, end, page_tokens)
        for tile in range(_tiles_of(first, end)):
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
        item = _claim(items, claims, workers)
    _tell(item, line, number)


@gluon.jit
def _load_sides(q_desc, kv_desc, page_table, items, table_stride, page_tokens, q, tail, bars,
                line, appends):  # fmt: skip
    q_full, q_free, tail_full, tail_free, written = bars
    tiles = 0
    number = 0
    item = _hear(line, number, ONE_WARP)
    while item >= 0:
        sequence, group, first, end = _span(items, item)
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
        newest = _newest(items, item, appends)
        for tile in range(_tiles_of(first, end)):
            token = first + tile * BLOCK
            page, inner = locate(table, token, end, page_tokens)
            mbarrier.wait(tail_free, (tiles & 1) ^ 1)
            if gl.minimum(token + BLOCK, end) > newest:
                mbarrier.wait(written, number & 1)
            load_tail(kv_desc, page, inner, tail_full, tail)
            tiles += 1
        number += 1
        item = _hear(line, number, ONE_WARP)


@gluon.jit
def _write(new, strides, pages, items, sizes, q, bars, line, eps):
    """New tokens to the pages, and the queries' rope part to shared memory."""
    q_full, q_free, written = bars
    number = 0
    item = _hear(line, number, ONE_WARP)
    while item >= 0:
        sequence, group, _, end = _span(items, item)
        newest = _newest(items, item, sizes[2])
        # Also what keeps this warp from being two items ahead of who waits for `written`.
        mbarrier.wait(q_free, (number & 1) ^ 1)
        rotate_queries(new, strides, sequence, group, sizes, q)
        mbarrier.arrive(q_full)
        append_tokens(new, strides, pages, sequence, newest, end, sizes[2], eps)
        mbarrier.arrive(written)
        number += 1
        item = _hear(line, number, ONE_WARP)


@gluon.jit
def _announce(items, counters, stored, line):
    """Counts the arrival of partial results that the group has stored, which then need not wait
    until they are there."""
    number = 0
    item = _listen(line, number, ONE_WARP)
    while item >= 0:
        _, counter, parts, _ = _parts(items, item)
        keeps = gl.load(items + (1 + item) * COLUMNS + KEEPS)
        mbarrier.wait(stored, number & 1)
        if (parts > 1) & (keeps != AT_ONCE):
            gl.atomic_add(counters + counter, 1, sem="release", scope="gpu")
        # Not before: so the group is no more than one item ahead.
        mbarrier.arrive(line[2].index(number & 1))
        number += 1
        item = _listen(line, number, ONE_WARP)


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
    item = _hear(line, number, GROUP_WARPS)
    while item >= 0:
        sequence, group, first, end = _span(items, item)
        partial, _, parts, _ = _parts(items, item)
        unseen = _newest(items, item, q_tokens) + 1
        keeps = gl.load(items + (1 + item) * COLUMNS + KEEPS)
        at = group * FEW + gl.arange(0, FEW, BY_ROW)
        seen = unseen + gl.minimum(at // heads, q_tokens - 1)
        edge = gl.minimum(unseen + group * FEW // heads, end)
        top = gl.full([FEW], NEVER, gl.float32, BY_ROW)
        # Summed over the tokens once, behind the loop: a sum across warps is a barrier.
        total = gl.full([64, FEW], 0.0, gl.float32, ACC)
        acc = gl.full([RANK, FEW], 0.0, gl.float32, ACC)
        mbarrier.wait(q_full, number & 1)
        count = _tiles_of(first, end)
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
        mbarrier.arrive(stored)
        if keeps == AT_ONCE:
            _meet(out, partials, lse, counters, items, item, rows, False, 1)
        kept = gl.where(keeps == AT_END, item, kept)
        number += 1
        item = _hear(line, number, GROUP_WARPS)
    if kept >= 0:
        _meet(out, partials, lse, counters, items, kept, rows, item == -1, 0)


@gluon.jit
def _meet(out, partials, lse, counters, items, item, rows, patient, ARRIVE: gl.constexpr):
    """Merges the parts of an item's (sequence, group), together with all who keep one of these.

    Called once it has no more items by a block of threads that keeps one, and else, with ARRIVE,
    by each part once it is stored. patient: all blocks have started. They have all items then, and
    none waits before these are done, so it may wait for all parts. So may the last to come here.
    Whoever may not wait leaves the merging to others.

    A counter has arrivals, those who came here, claims of shares to merge, and those who left, in
    16 bits each. Who stays makes one claim in vain, so that the last to touch the counter knows
    that it is. It makes it zero again.
    """
    sequence, group, _, _ = _span(items, item)
    partial, counter, parts, part = _parts(items, item)
    keepers = gl.load(items + (1 + item) * COLUMNS + KEEPERS)
    pieces = gl.load(items + (1 + item) * COLUMNS + PIECES)
    counters += counter
    target = out + (sequence * rows + group * FEW).to(gl.int64) * RANK
    limit = rows - group * FEW
    lead = partial - part
    # With ARRIVE, all threads' stores came before a barrier, and it before the atomic, which
    # releases them to the whole GPU; it acquires the other parts'.
    come = COMES + gl.where(patient, CLAIM, 0) + ARRIVE
    word = gl.atomic_add(counters, come, sem="acq_rel", scope="gpu")
    size = (pieces + keepers - 1) // keepers
    shares = (pieces + size - 1) // size
    stays = patient | (_field(word, COMES) == keepers - 1)
    if stays:
        if not patient:
            word = gl.atomic_add(counters, CLAIM, sem="acq_rel", scope="gpu")
        word += ARRIVE
        if pieces == 2:
            word = _merge(target, partials, lse, counters, word, lead, parts, size, limit, 4, 256)
        elif pieces == 4:
            word = _merge(target, partials, lse, counters, word, lead, parts, size, limit, 8, 128)
        elif pieces == 32:
            word = _merge(target, partials, lse, counters, word, lead, parts, size, limit, 32, 16)
        else:
            word = _merge(target, partials, lse, counters, word, lead, parts, size, limit, 128, 4)
    else:
        word = gl.atomic_add(counters, LEAVES, sem="relaxed", scope="gpu")
    if _field(word, CLAIM) + _field(word, LEAVES) + 1 == shares + keepers:
        gl.store(counters, 0)


@gluon.jit
def _field(word, UNIT: gl.constexpr):
    """The counter whose unit that is."""
    return (word // UNIT).to(gl.int32) & LOW


@gluon.jit
def _merge(target, partials, lse, counters, word, lead, parts, size, limit, DEPTH: gl.constexpr,
           WIDTH: gl.constexpr):  # fmt: skip
    """Merges the share of `size` pieces that is claimed, and then those that nobody else has.

    word: the counter when the claim was made. Returns what it was at the claim in vain. After that
    it is looked at no more, since others may have set it back.
    """
    pieces: gl.constexpr = RANK // WIDTH
    claim = _field(word, CLAIM)
    if claim * size < pieces:
        arrived = word
        while _field(arrived, 1) < parts:
            arrived = gl.atomic_add(counters, 0, sem="acquire", scope="gpu")
    while claim * size < pieces:
        for piece in range(claim * size, gl.minimum((claim + 1) * size, pieces)):
            _merge_piece(target, partials, lse, lead, parts, piece, limit, DEPTH, WIDTH)
        word = gl.atomic_add(counters, CLAIM, sem="relaxed", scope="gpu")
        claim = _field(word, CLAIM)
    return word


@gluon.jit
def _merge_piece(target, partials, lse, lead, parts, piece, limit, DEPTH: gl.constexpr,
                 WIDTH: gl.constexpr):  # fmt: skip
    """WIDTH columns, DEPTH partial results at a time, always in the order of the parts, so that
    equal inputs give equal bits."""
    SPREAD: gl.constexpr = [2, 4, 4] if WIDTH == 4 else [1, 8, 4]
    WARPS: gl.constexpr = [4, 1, 1] if WIDTH < 32 else [1, 4, 1]
    CUBE: gl.constexpr = gl.BlockedLayout([1, 1, 4], SPREAD, WARPS, [2, 1, 0])
    FACE: gl.constexpr = gl.SliceLayout(0, CUBE)  # columns, rows
    SHARES: gl.constexpr = gl.SliceLayout(1, CUBE)  # parts, rows
    LINE: gl.constexpr = gl.SliceLayout(0, SHARES)
    depth = gl.arange(0, DEPTH, gl.SliceLayout(1, SHARES))
    line = gl.arange(0, FEW, LINE)
    at = gl.arange(0, FEW, gl.SliceLayout(0, FACE))
    column = piece * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(1, FACE))
    place = column[:, None] * FEW + at[None, :]
    best = gl.full([FEW], NEVER, gl.float32, LINE)
    total = gl.full([FEW], 0.0, gl.float32, LINE)
    acc = gl.full([WIDTH, FEW], 0.0, gl.float32, FACE)
    for done in range(0, parts, DEPTH):
        there = done + depth < parts
        partial = lead + done + depth
        # Past the L1, which knows nothing of what other multiprocessors have written.
        logs = gl.load(
            lse + partial[:, None] * FEW + line[None, :],
            mask=there[:, None],
            other=HIDDEN,
            cache_modifier=".cg",
        )
        start = gl.convert_layout(partial, gl.SliceLayout(1, gl.SliceLayout(2, CUBE)))
        held = gl.convert_layout(there, gl.SliceLayout(1, gl.SliceLayout(2, CUBE)))
        values = gl.load(
            partials + (start.to(gl.int64) * (FEW * RANK))[:, None, None] + place[None, :, :],
            mask=held[:, None, None],
            other=0.0,
            cache_modifier=".cg",
        )
        higher = gl.maximum(best, gl.max(logs, 0))
        fade = gl.exp2(best - higher)
        shares = gl.exp2(logs - higher[None, :])
        total = total * fade + gl.sum(shares, 0)
        fades = gl.convert_layout(fade, gl.SliceLayout(0, FACE))
        acc = acc * fades[None, :] + gl.sum(values * shares[:, None, :], 0)
        best = higher
    totals = gl.convert_layout(total, gl.SliceLayout(0, FACE))
    result = acc / gl.where(totals > 0, totals, 1.0)[None, :]
    places = target + at[None, :] * RANK + column[:, None]
    gl.store(places, result.to(gl.bfloat16), mask=(at < limit)[None, :])


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
    full, free = _new_barriers(BUFFERS, 1), _new_barriers(BUFFERS, 1)
    told, heard = _new_barriers(2, 1), _new_barriers(2, 3 + WRITERS)
    q_full, q_free = new_barrier(1 + WRITERS), new_barrier(1)
    tail_full, tail_free = new_barrier(1), new_barrier(1)
    stored, written = new_barrier(1), new_barrier(1)
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
            [(_group, group), (_load_tiles, tiles), (_load_sides, sides), (_announce, arrivals)],
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
                (_load_tiles, tiles),
                (_load_sides, sides),
                (_announce, arrivals),
                (_write, writer),
            ],
            [1, 1, 1, 1],
            [40, 40, 40, 88],
        )
