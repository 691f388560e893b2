"""The kernel of `gqa_decode`; a Geometry says what it is compiled for."""

# ruff: noqa: PLR0917 - kernels are called by position
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvstore_kernels.fused_kernels import new_places, read_to_rotate, rotate

NEVER = tl.constexpr(-1.0e30)  # below all scores, but finite: NEVER - NEVER is 0
HALF_MAX = tl.constexpr(65504.0)  # the largest float16
_PICK = """{
    .reg .b32 both;
    .reg .b16 two, none;
    prmt.b32 both, $1, 0, %s;
    mov.b32 {two, none}, both;
    cvt.rn.f16x2.e4m3x2 $0, two;
}"""
PICK_EVEN = tl.constexpr(_PICK % "0x20")
PICK_ODD = tl.constexpr(_PICK % "0x31")


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """All that the kernel is compiled for.

    rows: queries of one KV head, group * q_tokens; tile_rows: up to a power of two, at least 16.
    compute: dtype of the products' factors; saturated: queries may be beyond it. paired: values of
    float8 are read as pairs of columns. interpreted: not on a GPU. scale: from q.k to the exponent
    of 2; with softcap, to twice the argument of tanh times log2 e. softcap: times log2 e, or 0 for
    none. window: 0 for none. scaled: keys and values have scales. merge_parts, merge_rows: partial
    results held in registers at a time, powers of two. overlap: launched before the launch before
    it has ended. All others are strides, in elements.
    """

    group: int
    rows: int
    q_tokens: int
    tile_rows: int
    dim: int
    page_tokens: int
    tile_tokens: int
    compute: Any  # Triton's type
    saturated: bool
    paired: bool
    interpreted: bool
    scaled: bool
    scale: float
    softcap: float
    window: int
    merge_parts: int
    merge_rows: int
    parts_axis: int  # 0 or 1: which dimension of what is merged counts the parts
    overlap: bool
    q_sequence: int
    q_token: int
    q_head: int
    k_page: int
    k_head: int
    k_token: int
    v_page: int
    v_head: int
    v_token: int
    out_sequence: int
    out_token: int
    out_head: int


@triton.jit
def _page_numbers(table, token, last, g: tl.constexpr):
    """Of the tokens' pages; those past the last token have its page."""
    return tl.load(table + tl.minimum(token, last) // g.page_tokens)


@triton.jit
def _row_offsets(pages, inside, n_pages, page_stride: tl.constexpr, token_stride: tl.constexpr):
    """Where tokens' rows begin in a pool. A page number outside of the pool, negative ones too,
    becomes the pool's last page: nothing outside is ever read."""
    page = tl.minimum(pages.to(tl.uint32, bitcast=True), (n_pages - 1).to(tl.uint32)).to(tl.int64)
    return (page * page_stride + inside * token_stride)[:, None]


@triton.jit
def _head_rows(
    kv_head, rows, token_stride: tl.constexpr, head_stride: tl.constexpr, g: tl.constexpr
):
    """Where the rows of one KV head are among one sequence's queries or results."""
    head = kv_head * g.group + rows % g.group
    return (rows // g.group * token_stride + head * head_stride)[:, None]


@triton.jit
def _scores(q, k, token, position, limit, scale, g: tl.constexpr):
    """Exponents of 2, before the maximum is taken off; -inf where a row does not see a token."""
    scores = tl.dot(q, tl.trans(k.to(g.compute))) * scale
    if g.softcap > 0:
        scores = g.softcap * (1.0 - 2.0 / (1.0 + tl.exp2(scores)))
    seen = token[None, :] < limit[:, None]
    if g.window > 0:
        seen &= token[None, :] > (position - g.window)[:, None]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _column(pairs, odd: tl.constexpr, g: tl.constexpr):
    """The even or odd columns of a tile of float8_e4m3 whose pairs of columns are int16.

    As pairs the values come to the matrix units by the transposing loads from shared memory, which
    know 16-bit elements only; single bytes would be loaded and put together one by one.
    """
    if g.interpreted:
        if odd:
            bits = (pairs & -0x8000) | ((pairs >> 1) & 0x3F80)
        else:
            bits = ((pairs << 8) & -0x8000) | ((pairs & 0x7F) << 7)
        # Where a float16 has them; there the same bits of exponent mean 256 times less.
        return bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.inline_asm_elementwise(
        PICK_ODD if odd else PICK_EVEN, "=r,r", [pairs], tl.float16, is_pure=True, pack=2
    )


@triton.jit
def _merged(partial_ptr, lse_ptr, first, parts, rows, g: tl.constexpr):
    """Of these rows, the partial results weighed by their sums of exponentials.

    Several parts are read at a time; each of these slots keeps a maximum of its own, so that no
    thread waits for another before all is read.
    """
    slots = tl.arange(0, g.merge_parts)
    dims = tl.arange(0, g.dim)[None, None, :]
    if g.parts_axis == 0:
        part, row = slots[:, None], rows[None, :]
        best = tl.full([g.merge_parts, g.merge_rows], NEVER, tl.float32)
        acc = tl.full([g.merge_parts, g.merge_rows, g.dim], 0.0, tl.float32)
    else:
        part, row = slots[None, :], rows[:, None]
        best = tl.full([g.merge_rows, g.merge_parts], NEVER, tl.float32)
        acc = tl.full([g.merge_rows, g.merge_parts, g.dim], 0.0, tl.float32)
    total = best * 0.0
    for at in range(0, parts, g.merge_parts):
        there = (at + part < parts) & (row < g.rows)
        place = (first + at + part).to(tl.int64) * g.rows + row
        # Past the L1, which knows nothing of what other multiprocessors have written.
        partial = tl.load(
            partial_ptr + place[:, :, None] * g.dim + dims,
            mask=there[:, :, None],
            other=0.0,
            cache_modifier=".cg",
        )
        lse = tl.load(lse_ptr + place, mask=there, other=float("-inf"), cache_modifier=".cg")
        higher = tl.maximum(best, lse)
        shrink = tl.exp2(best - higher)
        weight = tl.exp2(lse - higher)
        total = total * shrink + weight
        acc = acc * shrink[:, :, None] + partial * weight[:, :, None]
        best = higher
    share = tl.exp2(best - tl.expand_dims(tl.max(best, g.parts_axis), g.parts_axis))
    weight = tl.sum(total * share, g.parts_axis)
    summed = tl.sum(acc * share[:, :, None], g.parts_axis)
    return summed / tl.where(weight > 0, weight, 1.0)[:, None]


@triton.jit
def _queries_to_rotate(angles, weight_ptr, q_at, real, sequence, rows, g, n: tl.constexpr):
    """Those of one KV head, as read."""
    cos_ptr, sin_ptr = angles
    angle = (sequence * n.angle_sequence + rows // g.group * n.angle_token)[:, None]
    return read_to_rotate(
        q_at, real, cos_ptr + angle, sin_ptr + angle, weight_ptr, g.dim, n.normed, n
    )


@triton.jit
def _factor(q, g: tl.constexpr):
    """Queries as a factor of the scores."""
    if g.saturated:
        q = q.to(tl.float32)
        q = tl.clamp(q, -HALF_MAX, HALF_MAX, propagate_nan=tl.PropagateNan.ALL)
    return q.to(g.compute)


@triton.jit
def _new_tokens(
    new,  # pointers: keys, values, page ids, offsets, the keys' norm
    angles,  # pointers: cosines, sines
    sequence,
    kv_head,
    newest,
    end,
    n_pages,
    g: tl.constexpr,
    n: tl.constexpr,
):
    """The new tokens before `end`, as read, and their places; of one KV head."""
    k_ptr, v_ptr, page_ids_ptr, offsets_ptr, weight_ptr = new
    cos_ptr, sin_ptr = angles
    at, held, page, offset = new_places(
        *(page_ids_ptr, offsets_ptr, sequence, newest, end, n_pages, g.q_tokens, g.page_tokens, n)
    )
    head = kv_head.to(tl.int64)
    k_at = k_ptr + sequence * n.k_sequence + at * n.k_token + head * n.k_head
    v_at = v_ptr + sequence * n.v_sequence + at * n.v_token + head * n.v_head
    angle = sequence * n.angle_sequence + at * n.angle_token
    v = tl.load(v_at + tl.arange(0, g.dim)[None, :], mask=held, other=0.0)
    k = read_to_rotate(k_at, held, cos_ptr + angle, sin_ptr + angle, weight_ptr, g.dim, n.normed, n)
    return k, v, page, offset


@triton.jit
def _append(read, k_ptr, v_ptr, kv_head, g: tl.constexpr, n: tl.constexpr):
    """Writes new tokens to their pages, keys rotated.

    Each block that is to read some of them writes these itself, and those before them, the same
    bytes as others. So none has to wait for another.
    """
    k, v, page, offset = read
    dims = tl.arange(0, g.dim)[None, :]
    head = kv_head.to(tl.int64)
    k_to = k_ptr + page * g.k_page + head * g.k_head + offset * g.k_token
    v_to = v_ptr + page * g.v_page + head * g.v_head + offset * g.v_token
    k = rotate(k, g.dim, n.normed, n)
    tl.store(k_to + dims, k.to(k_ptr.dtype.element_ty), mask=page >= 0)
    tl.store(v_to + dims, v, mask=page >= 0)
    tl.debug_barrier()  # what is read from the pages below is what was written here


@triton.jit
def _attend(
    pages,  # of the first tile
    q,
    k_base,
    v_base,
    table,
    position,
    limit,
    first,
    end,
    scale,
    n_pages,
    g: tl.constexpr,
):
    """(values, log2 of the sum of exponentials) of the rows."""
    best = tl.full([g.tile_rows], NEVER, tl.float32)
    # Summed over the tokens once, behind the loop: a sum across warps in each tile is a barrier.
    total = tl.full([g.tile_rows, g.tile_tokens], 0.0, tl.float32)
    acc = tl.full([g.tile_rows, g.dim // 2 if g.paired else g.dim], 0.0, tl.float32)
    acc_odd = acc
    last = tl.maximum(end, 1) - 1
    step = tl.arange(0, g.tile_tokens)
    dims = tl.arange(0, g.dim)[None, :]
    for at in range(first, end, g.tile_tokens):
        token = at + step
        inside = tl.minimum(token, last) % g.page_tokens
        k_at = _row_offsets(pages, inside, n_pages, g.k_page, g.k_token)
        v_at = _row_offsets(pages, inside, n_pages, g.v_page, g.v_token)
        pages = _page_numbers(table, token + g.tile_tokens, last, g)
        if g.paired:
            k = tl.load(k_base + k_at + dims)
            v_row = (v_base + v_at).to(tl.pointer_type(tl.int16), bitcast=True)
            v = tl.load(v_row + tl.arange(0, g.dim // 2)[None, :])
        else:
            # Values before keys: else ptxas may put the page numbers' loads behind copies of keys,
            # and the next iteration waits for them at its start. With pairs it does not.
            v = tl.load(v_base + v_at + dims)
            k = tl.load(k_base + k_at + dims)
        scores = _scores(q, k, token, position, limit, scale, g)
        higher = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp2(best - higher)[:, None]
        weights = tl.exp2(scores - higher[:, None])
        total = total * shrink + weights
        if g.paired:
            acc = tl.dot(weights.to(g.compute), _column(v, False, g), acc * shrink)
            acc_odd = tl.dot(weights.to(g.compute), _column(v, True, g), acc_odd * shrink)
        else:
            acc = tl.dot(weights.to(g.compute), v.to(g.compute), acc * shrink)
        best = higher

    if g.paired:
        acc = tl.reshape(tl.join(acc, acc_odd), [g.tile_rows, g.dim])
    weight = tl.sum(total, 1)
    weight = tl.where(weight > 0, weight, 1.0)  # a row that sees no token: zeros
    return acc / weight[:, None], best + tl.log2(weight)


@triton.jit
def _meet(out_base, partial_ptr, lse_ptr, counter_ptr, kv_head, leader, parts, v_scale, g):
    """Called by each part once its partial result is stored; the last one merges all."""
    # All threads' stores come before the barrier, and it before the atomic, which releases them to
    # the whole GPU and acquires the other parts'.
    tl.debug_barrier()
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    if arrived == parts - 1:
        tl.store(counter_ptr, 0)
        dims = tl.arange(0, g.dim)[None, :]
        for chunk in range(0, g.rows, g.merge_rows):
            rows = chunk + tl.arange(0, g.merge_rows)
            merged = _merged(partial_ptr, lse_ptr, leader, parts, rows, g) * v_scale
            out_at = out_base + _head_rows(kv_head, rows, g.out_token, g.out_head, g)
            there = (rows < g.rows)[:, None]
            tl.store(out_at + dims, merged.to(out_base.dtype.element_ty), mask=there)


@triton.jit(do_not_specialize=["n_pages", "max_pages", "table_stride"])
def gqa_kernel(
    q_ptr,  # [sequences, q_tokens, heads, dim]
    k_ptr,  # [n_pages, kv_heads, page_tokens, dim], in any strides but for the last
    v_ptr,
    out_ptr,  # as q
    table_ptr,  # [sequences, max_pages] int32
    k_scale_ptr,  # [kv_heads] float32; None where there are no scales
    v_scale_ptr,
    items_ptr,  # [n_items, 9] int32, of a WorkList
    partial_ptr,  # [n_partials, rows, dim] float32
    lse_ptr,  # [n_partials, rows] float32: log2 of the sum of exponentials
    counter_ptr,  # [n_counters] int32, all zero between launches
    k_new_ptr,  # [sequences, q_tokens, kv_heads, dim]; all of these are None without new tokens
    v_new_ptr,
    page_ids_ptr,  # [sequences, q_tokens]
    offsets_ptr,
    cos_ptr,  # [sequences, q_tokens, dim / 2]
    sin_ptr,
    q_weight_ptr,  # [dim], or None
    k_weight_ptr,
    n_pages,
    max_pages,
    table_stride,
    g: tl.constexpr,
    n: tl.constexpr,  # an AppendGeometry, or None: new tokens are in the pages
):
    """Attends with one KV head's queries to a run of one sequence's tokens."""
    if g.overlap:
        gdc_wait()
        gdc_launch_dependents()
    item = items_ptr + tl.program_id(0) * 9
    sequence = tl.load(item).to(tl.int64)
    kv_head = tl.load(item + 1)
    first = tl.load(item + 2)
    end = tl.minimum(tl.load(item + 3), max_pages * g.page_tokens)
    partial = tl.load(item + 4)
    counter = tl.load(item + 5)
    parts = tl.load(item + 6)
    part = tl.load(item + 7)
    newest = tl.load(item + 8) - g.q_tokens
    if sequence < 0:
        return

    # All that depends on the item alone is on its way before anything waits for it.
    table = table_ptr + sequence * table_stride
    step = tl.arange(0, g.tile_tokens)
    pages = _page_numbers(table, first + step, tl.maximum(end, 1) - 1, g)
    rows = tl.arange(0, g.tile_rows)
    dims = tl.arange(0, g.dim)[None, :]
    real = (rows < g.rows)[:, None]
    q_at = q_ptr + sequence * g.q_sequence + _head_rows(kv_head, rows, g.q_token, g.q_head, g)
    if n is None:
        q = tl.load(q_at + dims, mask=real, other=0.0)
    else:
        angles = (cos_ptr, sin_ptr)
        q = _queries_to_rotate(angles, q_weight_ptr, q_at, real, sequence, rows, g, n)
        new = (k_new_ptr, v_new_ptr, page_ids_ptr, offsets_ptr, k_weight_ptr)
        read = _new_tokens(new, angles, sequence, kv_head, newest, end, n_pages, g, n)
        q = rotate(q, g.dim, n.normed, n).to(q_ptr.dtype.element_ty)
        if end > newest:
            _append(read, k_ptr, v_ptr, kv_head, g, n)
    position = newest + rows // g.group
    scale = g.scale
    v_scale = 1.0
    if g.scaled:
        scale *= tl.load(k_scale_ptr + kv_head)
        v_scale = tl.load(v_scale_ptr + kv_head)
    acc, lse = _attend(
        pages,
        _factor(q, g),
        k_ptr + kv_head.to(tl.int64) * g.k_head,
        v_ptr + kv_head.to(tl.int64) * g.v_head,
        table,
        position,
        tl.minimum(position + 1, end),
        first,
        end,
        scale,
        n_pages,
        g,
    )
    out_base = out_ptr + sequence * g.out_sequence
    if parts == 1:
        out_at = out_base + _head_rows(kv_head, rows, g.out_token, g.out_head, g)
        tl.store(out_at + dims, (acc * v_scale).to(out_ptr.dtype.element_ty), mask=real)
        return
    row = partial.to(tl.int64) * g.rows + rows
    tl.store(partial_ptr + row[:, None] * g.dim + dims, acc, mask=real)
    tl.store(lse_ptr + row, lse, mask=rows < g.rows)
    meeting = (partial_ptr, lse_ptr, counter_ptr + counter)
    _meet(out_base, *meeting, kv_head, partial - part, parts, v_scale, g)
