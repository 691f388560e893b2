"""Parts of decode kernels that rotate queries and keys, and write new tokens to the pages.

Arithmetic is that of `step_kernels`: float32, rounded once, the same products in the same order.
Only sums of squares are float64 here: of half-precision numbers they are then exact enough not to
depend on how a block's threads share a row.
"""

# ruff: noqa: PLR0917 - kernels are called by position
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendGeometry:
    """What a kernel that appends is compiled for.

    rows: new tokens of a sequence, up to a power of two. interleaved: pairs are neighbours, else a
    half apart. normed: heads are normed before rotation. eps: of the norm. All others are strides,
    in elements: of the tables of cosines and sines, of new keys, values, and of the part of latent
    attention's queries that is rotated.
    """

    rows: int
    interleaved: bool
    normed: bool
    eps: float
    angle_sequence: int
    angle_token: int
    k_sequence: int
    k_token: int
    k_head: int = 0
    v_sequence: int = 0
    v_token: int = 0
    v_head: int = 0
    q_sequence: int = 0
    q_token: int = 0
    q_head: int = 0


@triton.jit
def inverse_norm(squares, count: tl.constexpr, eps: tl.constexpr):
    """(rows, 1): 1 / sqrt(mean of `count` + eps), of (rows, any) squares in float32."""
    mean = tl.sum(squares.to(tl.float64), 1).to(tl.float32) * (1.0 / count)  # of a power of two
    return tl.rsqrt(mean + eps)[:, None]


@triton.jit
def _pairs(row_at, pair, real, half: tl.constexpr, n: tl.constexpr):
    """The two elements of each pair."""
    if n.interleaved:  # both in one word
        words = row_at.to(tl.pointer_type(tl.int32), bitcast=True)
        word = tl.load(words + pair, mask=real, other=0)
        kind = row_at.dtype.element_ty
        first = word.to(tl.int16).to(kind, bitcast=True)
        second = (word >> 16).to(tl.int16).to(kind, bitcast=True)
    else:
        first = tl.load(row_at + pair, mask=real, other=0.0)
        second = tl.load(row_at + pair + half, mask=real, other=0.0)
    return first, second


@triton.jit
def read_to_rotate(
    row_at,  # pointers, (rows, 1)
    real,  # (rows, 1): which rows there are; others are zeros
    cos_at,  # pointers, (rows, 1)
    sin_at,
    weight_ptr,  # of the norm, with normed
    dim: tl.constexpr,
    normed: tl.constexpr,
    n: tl.constexpr,
):
    """What `rotate` needs of rows of `dim`, in (rows, dim) each: loads only, nothing waits."""
    half: tl.constexpr = dim // 2
    pair = tl.arange(0, dim)[None, :] % half
    a, b = _pairs(row_at, pair, real, half, n)
    cos = tl.load(cos_at + pair, mask=real, other=0.0)
    sin = tl.load(sin_at + pair, mask=real, other=0.0)
    if normed:
        one = tl.full([1, 1], 1, tl.int1)
        weights = _pairs(weight_ptr + tl.zeros([1, 1], tl.int32), pair, one, half, n)
    else:
        weights = (a, b)
    return a, b, cos, sin, weights


@triton.jit
def rotate(read, dim: tl.constexpr, normed: tl.constexpr, n: tl.constexpr):
    """(rows, dim) float32: rows normed, if so, and rotated; pairs come out as halves."""
    a, b, cos, sin, weights = read
    a, b = a.to(tl.float32), b.to(tl.float32)
    cos, sin = cos.to(tl.float32), sin.to(tl.float32)
    if normed:
        scale = inverse_norm(a * a + b * b, 2 * dim, n.eps)  # each pair is there twice
        first, second = weights
        a *= scale * first.to(tl.float32)
        b *= scale * second.to(tl.float32)
    column = tl.arange(0, dim)[None, :]
    return tl.where(column < dim // 2, a * cos - b * sin, b * cos + a * sin)


@triton.jit
def new_places(
    page_ids_ptr,
    offsets_ptr,
    sequence,
    newest,  # position of the first of the new tokens
    end,  # those from there on are not the block's
    n_pages,
    q_tokens: tl.constexpr,
    page_tokens: tl.constexpr,
    n: tl.constexpr,
):
    """(which of the sequence's new tokens, whether it is the block's, page, offset in it), (n.rows,
    1) each; the page is -1 if there is no such place. Loads only, nothing waits."""
    at = tl.arange(0, n.rows)[:, None]
    held = (at < q_tokens) & (newest + at >= 0) & (newest + at < end)
    token = sequence * q_tokens + at
    page = tl.load(page_ids_ptr + token, mask=held, other=-1).to(tl.int64)
    offset = tl.load(offsets_ptr + token, mask=held, other=-1).to(tl.int64)
    there = (page < n_pages) & (offset >= 0) & (offset < page_tokens)
    return at, held, tl.where(there, page, -1), offset
