"""The kernel of `mla_decode`; a MlaGeometry says what it is compiled for."""

# ruff: noqa: PLR0917 - kernels are called by position
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvstore_kernels.fused_kernels import (
    inverse_norm,
    new_places,
    read_to_rotate,
    rotate,
)
from kvstore_kernels.mla_reference import RANK, WIDTH

TILE_TOKENS = 64  # the least rows that a warpgroup's matrix product has
MOST_PARTS = (1 << 15) - 1  # of one sequence; two such counters are in a word

_RANK = tl.constexpr(RANK)
_ROPE = tl.constexpr(WIDTH - RANK)
_TILE = tl.constexpr(TILE_TOKENS)
_NEVER = tl.constexpr(-1.0e30)  # below all scores, but finite: NEVER - NEVER is 0
_HALF_MAX = tl.constexpr(65504.0)  # the largest float16
_LEAST_SCALE = tl.constexpr(2.0**-60)  # its reciprocal, and sums of many, are finite
_HIGH = tl.constexpr(1 << 16)  # one, in the upper half of a word that holds two counters
_LOW = tl.constexpr((1 << 16) - 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlaGeometry:
    """All that the kernel is compiled for.

    rows: query rows of a block, a power of two of at least 16. boxes: latents are brought by the
    copy engine, tile by tile; pages are then a multiple of 64 tokens, without scales. ahead: the
    next tile is called into the L2 while one is worked on. compute: dtype of the products' factors;
    saturated: queries may be beyond it. scaled: pages have scales. scale: from q.k to the exponent
    of 2. merge_elements: of partial results held in a block's registers at a time. overlap:
    launched before the launch before it has ended. token_bytes: of one token. All others are
    strides, in elements.
    """

    heads: int
    q_tokens: int
    rows: int
    page_tokens: int
    boxes: bool
    ahead: bool
    compute: Any  # Triton's type
    saturated: bool
    scaled: bool
    scale: float
    merge_elements: int
    overlap: bool
    token_bytes: int
    q_sequence: int
    q_token: int
    q_head: int
    page: int
    token: int
    page_scale: int
    out_sequence: int
    out_token: int
    out_head: int


@triton.jit
def _queries(q_at, real, columns, g: tl.constexpr):
    """(columns, rows): queries as the second factor of the scores."""
    q = tl.load(q_at[:, None] + columns[None, :], mask=real[:, None], other=0.0)
    if g.saturated:
        q = q.to(tl.float32)
        q = tl.clamp(q, -_HALF_MAX, _HALF_MAX, propagate_nan=tl.PropagateNan.ALL)
    return tl.trans(q.to(g.compute))


@triton.jit
def _queries_to_rotate(q_rope_ptr, angles, real, sequence, row, g: tl.constexpr, n: tl.constexpr):
    """The rope part of queries, as read."""
    cos_ptr, sin_ptr = angles
    token, head = row // g.heads, row % g.heads
    q_at = q_rope_ptr + sequence * n.q_sequence + token * n.q_token + head * n.q_head
    angle = (sequence * n.angle_sequence + token * n.angle_token)[:, None]
    cos_at, sin_at = cos_ptr + angle, sin_ptr + angle
    return read_to_rotate(q_at[:, None], real[:, None], cos_at, sin_at, None, _ROPE, False, n)


@triton.jit
def _rotated_queries(read, q_ptr, g: tl.constexpr, n: tl.constexpr):
    """(rope columns, rows): as `_queries`."""
    q = rotate(read, _ROPE, False, n).to(q_ptr.dtype.element_ty)
    return tl.trans(q.to(g.compute))


@triton.jit
def _page_number(table, token, last, g: tl.constexpr):
    """Of the tile's one page, or of each of its tokens; past the last token it is that one's."""
    if not g.boxes:
        token += tl.arange(0, _TILE)
    return tl.load(table + tl.minimum(token, last) // g.page_tokens)


@triton.jit
def _in_pool(page, n_pages):
    """A page number outside of the pool, negative ones too, becomes the last page's: nothing
    outside is ever read."""
    return tl.minimum(page.to(tl.uint32, bitcast=True), (n_pages - 1).to(tl.uint32)).to(tl.int64)


@triton.jit
def _overhang(token, end):
    """How far a tile that begins with this token goes past the last one."""
    return tl.maximum(token + _TILE - end, 0)


@triton.jit
def _positions(token, end, g: tl.constexpr):
    """Of the tile's tokens in the sequence. A box never goes past the last token: it begins before
    `token` instead. So stale bytes behind the last token never reach the values' product, where
    even a weight of 0 would let a NaN through."""
    if g.boxes:
        token -= _overhang(token, end)
    return token + tl.arange(0, _TILE)


@triton.jit
def _token_rows(pages_ptr, page, token, end, n_pages, g: tl.constexpr):
    """Where the tile's tokens lie. Of those that do not count, before `token` or past the last one,
    the places of some that do."""
    step = tl.arange(0, _TILE)
    if g.boxes:
        inside = tl.maximum(token % g.page_tokens - _overhang(token, end) + step, 0)
    else:
        inside = tl.minimum(token + step, tl.maximum(end - 1, 0)) % g.page_tokens
    return pages_ptr + _in_pool(page, n_pages) * g.page + inside * g.token


@triton.jit
def _rope(pages_ptr, page, token, end, n_pages, g: tl.constexpr):
    rows = _token_rows(pages_ptr, page, token, end, n_pages, g)
    return tl.load(rows[:, None] + (tl.arange(0, _ROPE) + _RANK)[None, :])


@triton.jit
def _latents(boxes, pages_ptr, page, token, end, n_pages, g: tl.constexpr):
    """(tile tokens, 512). What of a box is outside of a page, or of the pool, is zeros."""
    if g.boxes:
        inside = token % g.page_tokens - _overhang(token, end)
        latents = boxes.load([page, inside, 0]).reshape(_TILE, _RANK)
    else:
        rows = _token_rows(pages_ptr, page, token, end, n_pages, g)
        latents = tl.load(rows[:, None] + tl.arange(0, _RANK)[None, :])
    return latents


@triton.jit
def _call_ahead(pages_ptr, page, token, end, n_pages, g: tl.constexpr):
    """Has the L2 fetch the tile at `token`, if there is one; returns at once."""
    start = pages_ptr + _in_pool(page, n_pages) * g.page + token % g.page_tokens * g.token
    nbytes = tl.minimum(tl.maximum(end - token, 0), _TILE) * g.token_bytes
    tl.inline_asm_elementwise(
        """{
        .reg .b32 %thread;
        .reg .pred %leads;
        mov.u32 %thread, %tid.x;
        setp.eq.u32 %leads, %thread, 0;
        setp.ne.and.u32 %leads, $2, 0, %leads;
        @%leads cp.async.bulk.prefetch.L2.global [$1], $2;
        mov.u32 $0, 0;
        }""",
        "=r,l,r",
        [start.to(tl.int64), nbytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _page_scale(page_scale_ptr, page, n_pages, g: tl.constexpr):
    """(tile tokens, 1)."""
    scale = tl.load(page_scale_ptr + _in_pool(page, n_pages) * g.page_scale)
    return tl.maximum(scale, _LEAST_SCALE)[:, None]


@triton.jit
def _limits(length, end, row, g: tl.constexpr):
    """Before which position the rows' tokens are that they see: a number, or one for each row."""
    if g.q_tokens == 1:
        limit = tl.minimum(length, end)
    else:
        limit = tl.minimum(length - g.q_tokens + row // g.heads + 1, end)[None, :]
    return limit


@triton.jit
def _new_tokens(
    new,  # pointers: latents, norm, page ids, offsets
    angles,  # pointers: cosines, sines
    sequence,
    newest,
    end,
    n_pages,
    g: tl.constexpr,
    n: tl.constexpr,
):
    """The new tokens before `end`, as read, and their places."""
    latents_ptr, norm_ptr, page_ids_ptr, offsets_ptr = new
    cos_ptr, sin_ptr = angles
    at, held, page, offset = new_places(
        *(page_ids_ptr, offsets_ptr, sequence, newest, end, n_pages, g.q_tokens, g.page_tokens, n)
    )
    row = latents_ptr + sequence * n.k_sequence + at * n.k_token
    angle = sequence * n.angle_sequence + at * n.angle_token
    columns = tl.arange(0, _RANK)[None, :]
    latent = tl.load(row + columns, mask=held, other=0.0)
    norm = tl.load(norm_ptr + columns)
    cos_at, sin_at = cos_ptr + angle, sin_ptr + angle
    key = read_to_rotate(row + _RANK, held, cos_at, sin_at, None, _ROPE, False, n)
    return latent, norm, key, page, offset


@triton.jit
def _append(read, pages_ptr, g: tl.constexpr, n: tl.constexpr):
    """Writes new tokens to their pages, latents normed and keys rotated.

    Each block that is to read some of them writes these itself, and those before them, the same
    bytes as others. So none has to wait for another.
    """
    latent, norm, key, page, offset = read
    latent = latent.to(tl.float32)
    latent *= inverse_norm(latent * latent, _RANK, n.eps) * norm.to(tl.float32)
    key = rotate(key, _ROPE, False, n)
    to = pages_ptr + page * g.page + offset * g.token
    kind = pages_ptr.dtype.element_ty
    tl.store(to + tl.arange(0, _RANK)[None, :], latent.to(kind), mask=page >= 0)
    tl.store(to + (tl.arange(0, _ROPE) + _RANK)[None, :], key.to(kind), mask=page >= 0)
    if g.boxes and g.compute == tl.bfloat16:
        _for_copy_engine(offset)
    tl.debug_barrier()  # what is read from the pages below is what was written here


@triton.jit
def _for_copy_engine(some):
    """Has each thread's stores so far come before what the copy engine reads after a barrier."""
    tl.inline_asm_elementwise(
        "{ fence.proxy.async.global; mov.u32 $0, 0; }",
        "=r,r",
        [some.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _attend(
    boxes,
    pages_ptr,
    page_scale_ptr,
    table,
    q_latent,
    q_rope,
    limit,
    first,
    end,
    n_pages,
    g: tl.constexpr,
):
    """Values summed with weights (512, rows), the largest exponents and the weights' sums (rows).

    Tokens are rows of the first product and latent columns those of the second, so that few query
    rows still fill the matrix units: both take the one copy of the tile in shared memory.

    The rope tile must not be a factor out of shared memory. Its place there would be that of the
    weights later on, and of two descriptors of one address, in different layouts, CUDA 12.8's
    assembler makes one from registers that hold something else: an illegal access. A factor that
    is the result of arithmetic, here of a choice that is always the same, is taken from registers.
    """
    acc = tl.full([_RANK, g.rows], 0.0, tl.float32)
    best = tl.full([g.rows], _NEVER, tl.float32)
    # Summed over the tokens once, behind the loop: a sum across warps in each tile is a barrier.
    total = tl.full([_TILE, g.rows], 0.0, tl.float32)
    last = tl.maximum(end - 1, 0)
    page = _page_number(table, first, last, g)
    rope = _rope(pages_ptr, page, first, end, n_pages, g)
    # What is cheap to make again is not held in registers throughout the loop.
    for token in tl.range(first, end, _TILE, disable_licm=True):
        next_page = _page_number(table, token + _TILE, last, g)
        if g.scaled:
            page_scale = _page_scale(page_scale_ptr, page, n_pages, g)
        latent = _latents(boxes, pages_ptr, page, token, end, n_pages, g)
        # Between the arrival of one tile and the call for the next the memory must not rest.
        if g.ahead:
            _call_ahead(pages_ptr, next_page, token + _TILE, end, n_pages, g)
        next_rope = _rope(pages_ptr, next_page, token + _TILE, end, n_pages, g)
        latent = latent.to(g.compute)
        rope = tl.where(first < end, rope, 0.0)  # always as it is; see above
        scores = tl.dot(rope.to(g.compute), q_rope, tl.dot(latent, q_latent)) * g.scale
        if g.scaled:  # a page's scale goes into the weights, which leaves the latents as they are
            scores = scores * page_scale + tl.log2(page_scale)
        position = _positions(token, end, g)[:, None]
        scores = tl.where((position >= token) & (position < limit), scores, float("-inf"))
        higher = tl.maximum(best, tl.max(scores, 0))
        shrink = tl.exp2(best - higher)[None, :]
        weights = tl.exp2(scores - higher[None, :])
        total *= shrink
        total += weights / page_scale if g.scaled else weights
        acc = tl.dot(tl.trans(latent), weights.to(g.compute), acc * shrink)
        best = higher
        page = next_page
        rope = next_rope
    return acc, best, tl.sum(total, 0)


@triton.jit
def _normal(acc, weight):
    """Rows that see no token, whose weight is 0, are zeros."""
    return acc / tl.where(weight > 0, weight, 1.0)


@triton.jit
def _out_rows(out_ptr, sequence, row, g: tl.constexpr):
    start = out_ptr + sequence * g.out_sequence
    return start + row // g.heads * g.out_token + row % g.heads * g.out_head


@triton.jit
def _merge_piece(
    out_ptr,
    partial_ptr,
    moment_ptr,
    sequence,
    group,
    leader,
    parts,
    piece,
    at_once: tl.constexpr,
    g: tl.constexpr,
):
    """Writes one piece of the output: some rows, or some columns of one, of all parts."""
    size: tl.constexpr = g.merge_elements // at_once
    n_columns: tl.constexpr = size if size < _RANK else _RANK
    n_rows: tl.constexpr = size // n_columns
    row = piece * size // _RANK + tl.arange(0, n_rows)
    column = piece * size % _RANK + tl.arange(0, n_columns)
    slot = tl.arange(0, at_once)
    best = tl.full([n_rows], _NEVER, tl.float32)
    total = tl.full([n_rows], 0.0, tl.float32)
    acc = tl.full([n_rows, n_columns], 0.0, tl.float32)
    for at in tl.range(0, parts, at_once, num_stages=1):
        there = (at + slot < parts)[:, None]
        line = (leader + at + slot).to(tl.int64)[:, None] * g.rows + row[None, :]
        # Past the L1, which knows nothing of what other multiprocessors have written.
        partial = tl.load(
            partial_ptr + line[:, :, None] * _RANK + column[None, None, :],
            mask=there[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        top = tl.load(moment_ptr + 2 * line, mask=there, other=_NEVER, cache_modifier=".cg")
        weight = tl.load(moment_ptr + 2 * line + 1, mask=there, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(best, tl.max(top, 0))
        shrink = tl.exp2(best - higher)
        share = tl.exp2(top - higher[None, :])
        total = total * shrink + tl.sum(weight * share, 0)
        acc = acc * shrink[:, None] + tl.sum(partial * share[:, :, None], 0)
        best = higher
    merged = _normal(acc, total[:, None])
    row += group * g.rows
    out_at = _out_rows(out_ptr, sequence, row, g)
    tl.store(
        out_at[:, None] + column[None, :],
        merged.to(out_ptr.dtype.element_ty),
        mask=(row < g.heads * g.q_tokens)[:, None],
    )


@triton.jit
def _merge_pieces(
    out_ptr,
    partial_ptr,
    moment_ptr,
    claims_ptr,
    sequence,
    group,
    leader,
    parts,
    claim,
    at_once: tl.constexpr,
    g: tl.constexpr,
):
    """Merges the piece that is claimed and then those that nobody else has claimed before. Returns
    the claim that was in vain."""
    pieces: tl.constexpr = g.rows * _RANK * at_once // g.merge_elements
    while (claim & _LOW) < pieces:
        _merge_piece(
            *(out_ptr, partial_ptr, moment_ptr, sequence, group),
            *(leader, parts, claim & _LOW, at_once, g),
        )
        claim = tl.atomic_add(claims_ptr, 1, sem="relaxed", scope="gpu")
    return claim


@triton.jit
def _meet(
    out_ptr,
    partial_ptr,
    moment_ptr,
    meeting_ptr,
    sequence,
    group,
    leader,
    parts,
    patient,
    g: tl.constexpr,
):
    """Called by each part once its partial result is stored; all of them are merged by some.

    A part waits for the others only if all of these have started. They run then, and none of them
    waits before it arrives here, so they arrive. Whoever does not wait leaves the merging to those
    who do, at least to the last to arrive.

    The first word counts arrivals, and starts in its upper half. The second counts claims of pieces
    to merge, and in its upper half parts that make none. All others make one claim in vain each, so
    that the last to touch the word knows that it is. It makes both words zero again.
    """
    claims_ptr = meeting_ptr + 1
    at_once = tl.where(parts <= 4, 4, tl.where(parts <= 16, 16, 128))
    pieces = g.rows * _RANK * at_once // g.merge_elements
    # All threads' stores come before the barrier, and it before the atomic, which releases them to
    # the whole GPU and acquires the other parts'.
    tl.debug_barrier()
    met = tl.atomic_add(meeting_ptr, 1, sem="acq_rel", scope="gpu")
    arrived = (met & _LOW) + 1
    if (arrived == parts) | (patient & (met // _HIGH == parts)):
        claim = tl.atomic_add(claims_ptr, 1, sem="relaxed", scope="gpu")
        # Not after a claim in vain: others may have made the words zero by then.
        while (arrived < parts) & ((claim & _LOW) < pieces):
            arrived = tl.atomic_add(meeting_ptr, 0, sem="acquire", scope="gpu") & _LOW
        pointers = (out_ptr, partial_ptr, moment_ptr, claims_ptr)
        where = (sequence, group, leader, parts, claim)
        if at_once == 4:
            claim = _merge_pieces(*pointers, *where, 4, g)
        elif at_once == 16:
            claim = _merge_pieces(*pointers, *where, 16, g)
        else:
            claim = _merge_pieces(*pointers, *where, 128, g)
    else:
        claim = tl.atomic_add(claims_ptr, _HIGH, sem="relaxed", scope="gpu")
    if (claim & _LOW) + claim // _HIGH + 1 == pieces + parts:
        tl.store(meeting_ptr, 0)
        tl.store(claims_ptr, 0)


@triton.jit(do_not_specialize=["n_pages", "max_pages", "table_stride"])
def mla_kernel(
    q_ptr,  # [sequences, q_tokens, heads, 576]
    boxes,  # tensor map of [n_pages, page_tokens, 576] in boxes of [1, 64, 512]; None without boxes
    pages_ptr,  # [n_pages, page_tokens, 576]
    page_scale_ptr,  # [n_pages] float32; None where there are no scales
    out_ptr,  # [sequences, q_tokens, heads, 512]
    table_ptr,  # [sequences, max_pages] int32
    items_ptr,  # [1 + n_items, 9] int32: whether parts may wait; then a WorkList's
    partial_ptr,  # [n_partials, rows, 512] float32
    moment_ptr,  # [n_partials, rows, 2] float32: largest exponents, sums of weights
    meeting_ptr,  # [n_counters, 2] int32, all zero between launches
    q_rope_ptr,  # [sequences, q_tokens, heads, 64]; all of these are None without new tokens
    latents_ptr,  # [sequences, q_tokens, 576]
    norm_ptr,  # [512]
    cos_ptr,  # [sequences, q_tokens, 32]
    sin_ptr,
    page_ids_ptr,  # [sequences, q_tokens]
    offsets_ptr,
    n_pages,
    max_pages,
    table_stride,
    g: tl.constexpr,
    n: tl.constexpr,  # an AppendGeometry, or None: new tokens are in the pages
):
    """Attends with one group of query rows to a run of one sequence's tokens."""
    if g.overlap:
        gdc_wait()
        gdc_launch_dependents()
    item = items_ptr + (1 + tl.program_id(0)) * 9
    sequence = tl.load(item).to(tl.int64)
    group = tl.load(item + 1)
    first = tl.load(item + 2)
    end = tl.minimum(tl.load(item + 3), max_pages * g.page_tokens)
    partial = tl.load(item + 4)
    meeting_ptr += 2 * tl.load(item + 5)
    parts = tl.load(item + 6)
    part = tl.load(item + 7)
    length = tl.load(item + 8)
    patient = tl.load(items_ptr) != 0
    if sequence < 0:
        return
    if parts > 1:  # has started
        tl.atomic_add(meeting_ptr, _HIGH, sem="relaxed", scope="gpu")

    row = group * g.rows + tl.arange(0, g.rows)
    real = row < g.heads * g.q_tokens
    q_at = q_ptr + sequence * g.q_sequence + row // g.heads * g.q_token + row % g.heads * g.q_head
    if n is None:
        q_latent = _queries(q_at, real, tl.arange(0, _RANK), g)
        q_rope = _queries(q_at, real, tl.arange(0, _ROPE) + _RANK, g)
    else:
        newest = length - g.q_tokens
        angles = (cos_ptr, sin_ptr)
        new = (latents_ptr, norm_ptr, page_ids_ptr, offsets_ptr)
        q_read = _queries_to_rotate(q_rope_ptr, angles, real, sequence, row, g, n)
        q_latent = _queries(q_at, real, tl.arange(0, _RANK), g)
        q_rope = _rotated_queries(q_read, q_ptr, g, n)
        # Behind the queries: before them, the same costs 7 % at 64 x 16384.
        if end > newest:
            read = _new_tokens(new, angles, sequence, newest, end, n_pages, g, n)
            _append(read, pages_ptr, g, n)
    acc, best, total = _attend(
        boxes,
        pages_ptr,
        page_scale_ptr,
        table_ptr + sequence * table_stride,
        q_latent,
        q_rope,
        _limits(length, end, row, g),
        first,
        end,
        n_pages,
        g,
    )
    columns = tl.arange(0, _RANK)[None, :]
    if parts == 1:
        out = tl.trans(_normal(acc, total[None, :])).to(out_ptr.dtype.element_ty)
        out_at = _out_rows(out_ptr, sequence, row, g)[:, None]
        tl.store(out_at + columns, out, mask=real[:, None])
        return
    line = partial.to(tl.int64) * g.rows + tl.arange(0, g.rows)
    tl.store(partial_ptr + line[:, None] * _RANK + columns, tl.trans(acc))
    tl.store(moment_ptr + 2 * line, best)
    tl.store(moment_ptr + 2 * line + 1, total)
    _meet(
        *(out_ptr, partial_ptr, moment_ptr, meeting_ptr),
        *(sequence, group, partial - part, parts, patient, g),
    )
