"""The kernels of `step`. Whatever the dtype, arithmetic is float32, and rounds once at its end."""

# ruff: noqa: PLR0917 - kernels are called by position
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _slot(page_ids_ptr, offsets_ptr, token, n_pages, page_tokens):
    """(page, offset in it, whether the pool has that place) of a token's KV, (1, 1) each."""
    only = tl.zeros([1, 1], tl.int32)
    page = tl.load(page_ids_ptr + token + only).to(tl.int64)
    offset = tl.load(offsets_ptr + token + only).to(tl.int64)
    there = (page >= 0) & (page < n_pages) & (offset >= 0) & (offset < page_tokens)
    return page, offset, there


@triton.jit
def _store_halves(rows, a, b, mask, half: tl.constexpr, tile: tl.constexpr):
    pair = tl.arange(0, tile)[None, :]
    tl.store(rows + pair, a.to(rows.dtype.element_ty), mask=mask)
    tl.store(rows + pair + half, b.to(rows.dtype.element_ty), mask=mask)


@triton.jit
def _rotate(
    source,  # pointers to rows (rows, 1)
    target,
    mask,  # (rows, tile), of what is read
    wanted,  # (rows, tile), of what is written
    weight_ptr,  # of the rows' RMSNorm, with normed
    cos,  # (1, tile)
    sin,
    eps,
    half: tl.constexpr,
    tile: tl.constexpr,
    normed: tl.constexpr,
    interleaved: tl.constexpr,
):
    """Rows of 2 * half elements, normed if so, rotated, and written as two halves."""
    pair = tl.arange(0, tile)[None, :]
    if interleaved:
        first, second = 2 * pair, 2 * pair + 1
    else:
        first, second = pair, pair + half
    a = tl.load(source + first, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(source + second, mask=mask, other=0.0).to(tl.float32)
    if normed:
        scale = tl.rsqrt(tl.sum(a * a + b * b, axis=1) / (2 * half) + eps)[:, None]
        known = pair < half
        a *= scale * tl.load(weight_ptr + first, mask=known, other=0.0).to(tl.float32)
        b *= scale * tl.load(weight_ptr + second, mask=known, other=0.0).to(tl.float32)
    _store_halves(target, a * cos - b * sin, b * cos + a * sin, wanted, half, tile)


@triton.jit
def _tables(cos_ptr, sin_ptr, token, token_stride, half: tl.constexpr, tile: tl.constexpr):
    """cos and sin of one token, (1, tile) each."""
    pair = tl.arange(0, tile)[None, :]
    at = token * token_stride + pair
    cos = tl.load(cos_ptr + at, mask=pair < half, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=pair < half, other=0.0).to(tl.float32)
    return cos, sin


@triton.jit(do_not_specialize=("n_pages",))
def rope_append_kernel(
    q_ptr,  # (tokens, heads, 2 * half)
    k_ptr,  # (tokens, kv_heads, 2 * half)
    v_ptr,
    out_ptr,  # as q
    k_pages_ptr,  # (pages, kv_heads, page_tokens, 2 * half)
    v_pages_ptr,
    cos_ptr,  # (tokens, half)
    sin_ptr,
    page_ids_ptr,  # (tokens,)
    offsets_ptr,
    q_weight_ptr,  # (2 * half,) or None
    k_weight_ptr,
    eps,
    n_pages,
    page_tokens,
    table_token,  # these and all below: strides, in elements
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    out_token,
    out_head,
    k_pages_page,
    k_pages_head,
    k_pages_token,
    v_pages_page,
    v_pages_head,
    v_pages_token,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    tile: tl.constexpr,  # half, up to a power of two
    rows: tl.constexpr,  # heads of a program
    normed: tl.constexpr,
    interleaved: tl.constexpr,
):
    """A program has some heads of one token: of the queries first, then of keys with values."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cos, sin = _tables(cos_ptr, sin_ptr, token, table_token, half, tile)
    known = tl.arange(0, tile)[None, :] < half
    q_blocks: tl.constexpr = (heads + rows - 1) // rows
    if block < q_blocks:
        head = (block * rows + tl.arange(0, rows))[:, None].to(tl.int64)
        mask = (head < heads) & known
        source = q_ptr + token * q_token + head * q_head
        target = out_ptr + token * out_token + head * out_head
        _rotate(
            source, target, mask, mask, q_weight_ptr, cos, sin, eps, half, tile, normed, interleaved
        )
    else:
        head = ((block - q_blocks) * rows + tl.arange(0, rows))[:, None].to(tl.int64)
        mask = (head < kv_heads) & known
        page, offset, there = _slot(page_ids_ptr, offsets_ptr, token, n_pages, page_tokens)
        wanted = mask & there
        k_from = k_ptr + token * k_token + head * k_head
        k_to = k_pages_ptr + page * k_pages_page + offset * k_pages_token + head * k_pages_head
        _rotate(
            k_from, k_to, mask, wanted, k_weight_ptr, cos, sin, eps, half, tile, normed, interleaved
        )
        v_from = v_ptr + token * v_token + head * v_head + tl.arange(0, tile)[None, :]
        v_to = v_pages_ptr + page * v_pages_page + offset * v_pages_token + head * v_pages_head
        low = tl.load(v_from, mask=mask, other=0.0)
        high = tl.load(v_from + half, mask=mask, other=0.0)
        _store_halves(v_to, low, high, wanted, half, tile)


@triton.jit(do_not_specialize=("n_pages",))
def rope_append_latent_kernel(
    q_ptr,  # (tokens, heads, 2 * half)
    cached_ptr,  # (tokens, rank + 2 * half)
    out_ptr,  # as q
    pool_ptr,  # (pages, page_tokens, rank + 2 * half)
    cos_ptr,  # (tokens, half)
    sin_ptr,
    page_ids_ptr,  # (tokens,)
    offsets_ptr,
    weight_ptr,  # (rank,)
    eps,
    n_pages,
    page_tokens,
    table_token,  # these and all below: strides, in elements
    q_token,
    q_head,
    cached_token,
    out_token,
    out_head,
    pool_page,
    pool_token,
    heads: tl.constexpr,
    rank: tl.constexpr,
    rank_tile: tl.constexpr,  # rank, up to a power of two
    half: tl.constexpr,
    tile: tl.constexpr,  # half, up to a power of two
    rows: tl.constexpr,  # heads of a program
    interleaved: tl.constexpr,
):
    """A token's first program has what is cached, each other one some heads of the queries."""
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cos, sin = _tables(cos_ptr, sin_ptr, token, table_token, half, tile)
    known = tl.arange(0, tile)[None, :] < half
    if block == 0:
        page, offset, there = _slot(page_ids_ptr, offsets_ptr, token, n_pages, page_tokens)
        source = cached_ptr + token * cached_token + tl.zeros([1, 1], tl.int32)
        target = pool_ptr + page * pool_page + offset * pool_token
        dims = tl.arange(0, rank_tile)[None, :]
        latent = tl.load(source + dims, mask=dims < rank, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + dims, mask=dims < rank, other=0.0).to(tl.float32)
        latent *= tl.rsqrt(tl.sum(latent * latent, axis=1) / rank + eps)[:, None] * weight
        tl.store(target + dims, latent.to(pool_ptr.dtype.element_ty), mask=(dims < rank) & there)
        _rotate(
            source + rank,
            target + rank,
            known,
            known & there,
            weight_ptr,
            cos,
            sin,
            eps,
            half,
            tile,
            False,
            interleaved,
        )
    else:
        head = ((block - 1) * rows + tl.arange(0, rows))[:, None].to(tl.int64)
        mask = (head < heads) & known
        q_from = q_ptr + token * q_token + head * q_head
        q_to = out_ptr + token * out_token + head * out_head
        _rotate(q_from, q_to, mask, mask, weight_ptr, cos, sin, eps, half, tile, False, interleaved)


@triton.jit
def add_rmsnorm_kernel(
    x_ptr,  # (tokens, dim)
    delta_ptr,  # as x, or None
    weight_ptr,  # (dim,)
    total_ptr,  # as x, or None
    out_ptr,  # as x
    eps,
    x_token,  # strides, in elements
    delta_token,
    total_token,
    out_token,
    dim: tl.constexpr,
    tile: tl.constexpr,  # dim, up to a power of two
    added: tl.constexpr,
):
    """A program has one token."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, tile)
    known = dims < dim
    x = tl.load(x_ptr + token * x_token + dims, mask=known, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + dims, mask=known, other=0.0).to(tl.float32)
    if added:
        x += tl.load(delta_ptr + token * delta_token + dims, mask=known, other=0.0).to(tl.float32)
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + token * total_token + dims, total, mask=known)
        x = total.to(tl.float32)  # what later layers see is what is normed
    x *= tl.rsqrt(tl.sum(x * x, axis=0) / dim + eps) * weight
    tl.store(out_ptr + token * out_token + dims, x.to(out_ptr.dtype.element_ty), mask=known)


@triton.jit
def silu_mul_kernel(
    gate_ptr,  # (tokens, dim)
    up_ptr,
    out_ptr,
    dim,
    gate_token,  # strides, in elements
    up_token,
    out_token,
    tile: tl.constexpr,
):
    """A program has a part of one token."""
    token = tl.program_id(0).to(tl.int64)
    dims = tl.program_id(1) * tile + tl.arange(0, tile)
    known = dims < dim
    gate = tl.load(gate_ptr + token * gate_token + dims, mask=known, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + token * up_token + dims, mask=known, other=0.0).to(tl.float32)
    small = tl.exp(-tl.abs(gate))  # never overflows
    out = gate * tl.where(gate < 0, small, 1.0) / (1.0 + small) * up
    tl.store(out_ptr + token * out_token + dims, out.to(out_ptr.dtype.element_ty), mask=known)
