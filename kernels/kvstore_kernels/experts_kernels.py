"""The kernels of `experts`. Sums are float32, and each is made by one program in one order."""

# ruff: noqa: PLR0917 - kernels are called by position
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

NOBODY = tl.constexpr(1 << 30)  # above the number of any expert
LOWEST = tl.constexpr(float("-inf"))


@triton.jit
def _kept_groups(
    choice, groups_tile: tl.constexpr, size_tile: tl.constexpr, top: tl.constexpr, by: tl.constexpr
):
    """(groups_tile,), whether a group is one of the `top` whose `by` best experts sum up highest.
    The first of equals comes first."""
    group, member = tl.arange(0, groups_tile), tl.arange(0, size_tile)[None, :]
    rank = tl.zeros([groups_tile], tl.float32)
    left = choice
    for _ in tl.static_range(by):
        best = tl.max(left, 1)
        rank += best
        first = tl.min(tl.where(left == best[:, None], member, size_tile), 1)
        left = tl.where(member == first[:, None], LOWEST, left)
    kept = group < 0
    for _ in tl.static_range(top):
        best = tl.max(rank, 0)
        first = tl.min(tl.where(rank == best, group, groups_tile), 0)
        kept = kept | (group == first)
        rank = tl.where(group == first, LOWEST, rank)
    return kept


@triton.jit
def route_kernel(
    logits_ptr,  # (tokens, groups * size) float32
    correction_ptr,  # (groups * size,), or None
    weights_ptr,  # (tokens, top_k) float32
    chosen_ptr,  # (tokens, top_k) int32
    scaling,
    logits_token,  # stride, in elements
    groups: tl.constexpr,
    size: tl.constexpr,  # experts of a group
    groups_tile: tl.constexpr,  # these, up to powers of two
    size_tile: tl.constexpr,
    top_k: tl.constexpr,
    top_tile: tl.constexpr,
    top_groups: tl.constexpr,
    ranked_by: tl.constexpr,
    sigmoid: tl.constexpr,
    normalize: tl.constexpr,
):
    """A program has one token."""
    token = tl.program_id(0).to(tl.int64)
    group, member = tl.arange(0, groups_tile)[:, None], tl.arange(0, size_tile)[None, :]
    known = (group < groups) & (member < size)
    number = tl.where(known, group * size + member, NOBODY)
    logits = tl.load(logits_ptr + token * logits_token + number, mask=known, other=LOWEST)
    if sigmoid:
        scores = 1.0 / (1.0 + tl.exp(-logits))
    else:
        scores = tl.exp(logits - tl.max(tl.max(logits, 1), 0))
        scores = scores / tl.sum(tl.sum(scores, 1), 0)
    choice = scores
    if correction_ptr is not None:
        choice += tl.load(correction_ptr + number, mask=known, other=0.0).to(tl.float32)
    # What is no number is chosen last.
    choice = tl.where(known & (choice > LOWEST), choice, LOWEST)
    if top_groups < groups:
        kept = _kept_groups(choice, groups_tile, size_tile, top_groups, ranked_by)
        choice = tl.where(kept[:, None], choice, LOWEST)

    slot = tl.arange(0, top_tile)
    weights = tl.zeros([top_tile], tl.float32)
    chosen = tl.zeros([top_tile], tl.int32)
    for at in tl.static_range(top_k):
        best = tl.max(tl.max(choice, 1), 0)
        first = tl.min(tl.min(tl.where(choice == best, number, NOBODY), 1), 0)
        taken = number == first
        weight = tl.sum(tl.sum(tl.where(taken & known, scores, 0.0), 1), 0)
        weights = tl.where(slot == at, weight, weights)
        chosen = tl.where(slot == at, first, chosen)
        choice = tl.where(taken, LOWEST, choice)
    if normalize:
        weights = weights / (tl.sum(weights, 0) + 1e-20)
    at = token * top_k + slot
    tl.store(weights_ptr + at, weights * scaling, mask=slot < top_k)
    tl.store(chosen_ptr + at, chosen, mask=slot < top_k)


@triton.jit(do_not_specialize=("pairs", "first"))
def sort_kernel(
    chosen_ptr,  # (pairs,) int32, numbers of experts
    order_ptr,  # (pairs,) int32: pairs by expert, those of one expert in their order
    starts_ptr,  # (experts + 1,) int32: where each expert's pairs begin
    pairs,
    first,  # number of the first expert
    tile: tl.constexpr,
):
    """A program has one expert. Pairs of experts that are not here are left out."""
    expert = tl.program_id(0)
    step = tl.arange(0, tile)
    earlier = tl.zeros([tile], tl.int32)
    for at in range(0, pairs, tile):
        number = tl.load(chosen_ptr + at + step, mask=at + step < pairs, other=first - 1) - first
        earlier += ((number >= 0) & (number < expert)).to(tl.int32)
    place = tl.sum(earlier, 0)
    tl.store(starts_ptr + expert, place)
    for at in range(0, pairs, tile):
        number = tl.load(chosen_ptr + at + step, mask=at + step < pairs, other=first - 1) - first
        mine = (number == expert).to(tl.int32)
        tl.store(order_ptr + place + tl.cumsum(mine, 0) - 1, at + step, mask=mine > 0)
        place += tl.sum(mine, 0)
    if expert == tl.num_programs(0) - 1:
        tl.store(starts_ptr + expert + 1, place)


@triton.jit
def _product(
    total,
    x_rows,  # pointers (rows, 1)
    weight_rows,  # pointers (columns, 1)
    at,
    width: tl.constexpr,
    depth: tl.constexpr,
    compute: tl.constexpr,
    exact: tl.constexpr,
):
    """total + x of `depth` elements from `at` on, times as much of the weights."""
    dims = at + tl.arange(0, depth)[None, :]
    if width % depth == 0:
        x, weight = tl.load(x_rows + dims), tl.load(weight_rows + dims)
    else:
        x = tl.load(x_rows + dims, mask=dims < width, other=0.0)
        weight = tl.load(weight_rows + dims, mask=dims < width, other=0.0)
    weight = tl.trans(weight.to(compute))
    return tl.dot(x.to(compute), weight, total, input_precision="ieee" if exact else "tf32")


@triton.jit
def expert_kernel(
    x_ptr,  # (pairs / share, width)
    weight_ptr,  # (experts, columns, width), or with `gated` (experts, 2 * columns, width)
    pair_weights_ptr,  # (pairs,) float32, or None for 1
    out_ptr,  # (pairs, columns)
    order_ptr,  # see `sort_kernel`
    starts_ptr,
    x_row,  # stride, in elements
    columns: tl.constexpr,
    width: tl.constexpr,
    share: tl.constexpr,  # pairs that have the same row of x
    gated: tl.constexpr,  # silu of the first half of the weights' rows, times the second
    rows: tl.constexpr,  # of a tile
    tile: tl.constexpr,  # columns of a program
    depth: tl.constexpr,  # of a step
    compute: tl.constexpr,  # dtype of the products' factors
    exact: tl.constexpr,
):
    """A program has some output columns of one expert, for all of its pairs."""
    expert = tl.program_id(1)
    begin = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    column = tl.program_id(0) * tile + tl.arange(0, tile)
    # Addresses are clamped: what is read twice is not stored.
    inside = tl.minimum(column, columns - 1)[:, None]
    height: tl.constexpr = 2 * columns if gated else columns
    weight_rows = weight_ptr + expert.to(tl.int64) * (height * width) + inside * width
    for at in range(begin, end, rows):
        row = at + tl.arange(0, rows)
        pair = tl.load(order_ptr + tl.minimum(row, end - 1)).to(tl.int64)
        x_rows = x_ptr + (pair // share * x_row)[:, None]
        out = tl.zeros([rows, tile], tl.float32)
        if gated:
            up = tl.zeros([rows, tile], tl.float32)
            for k in range(0, width, depth):
                out = _product(out, x_rows, weight_rows, k, width, depth, compute, exact)
                up_rows = weight_rows + columns * width
                up = _product(up, x_rows, up_rows, k, width, depth, compute, exact)
            small = tl.exp(-tl.abs(out))  # never overflows
            out = out * tl.where(out < 0, small, 1.0) / (1.0 + small) * up
        else:
            for k in range(0, width, depth):
                out = _product(out, x_rows, weight_rows, k, width, depth, compute, exact)
        if pair_weights_ptr is not None:
            out *= tl.load(pair_weights_ptr + pair)[:, None]
        target = out_ptr + pair[:, None] * columns + column[None, :]
        mask = (row < end)[:, None] & (column < columns)[None, :]
        tl.store(target, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=("first", "experts"))
def combine_kernel(
    parts_ptr,  # (tokens * top_k, dim) float32
    chosen_ptr,  # (tokens, top_k) int32
    out_ptr,  # (tokens, dim)
    first,
    experts,
    out_token,  # stride, in elements
    dim: tl.constexpr,
    top_k: tl.constexpr,
    tile: tl.constexpr,
):
    """A program has a part of one token: the sum over its experts that are here."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * tile + tl.arange(0, tile)
    total = tl.zeros([tile], tl.float32)
    for at in tl.static_range(top_k):
        pair = token * top_k + at
        number = tl.load(chosen_ptr + pair) - first
        end = tl.where((number >= 0) & (number < experts), dim, 0)
        total += tl.load(parts_ptr + pair * dim + dims, mask=dims < end, other=0.0)
    out = total.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * out_token + dims, out, mask=dims < dim)
