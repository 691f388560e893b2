"""What the ring of tiles does with new tokens: a warp norms, rotates and writes them to the pages.

Each block that is to read some of a sequence's new tokens writes these itself, and those before
them, the same bytes as others. So none has to wait for another; only the loads of the tiles that
have them wait for this warp. The same warp rotates the queries' rope part into shared memory.

Arithmetic is that of `fused_kernels`: float32, rounded once, sums of squares in float64.
"""

# A kernel's functions are inlined and their arguments have no Python types.
# ruff: noqa: PLR0917
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from kvstore_kernels.mla_gluon_parts import RANK, sync

PAIRS = gl.constexpr(32)  # of the rope part
FEW = gl.constexpr(16)  # query rows of an item

_LINE = gl.constexpr(gl.BlockedLayout([8], [32], [1], [0]))
_SHORT = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
_FACE = gl.constexpr(gl.BlockedLayout([1, 8], [8, 4], [1, 1], [1, 0]))


@gluon.jit
def fence_async_global():
    """Has this thread's stores so far come before what the copy engine reads after a barrier."""
    gl.inline_asm_elementwise(
        "{ fence.proxy.async.global; mov.u32 $0, 0; }",
        "=r,r",
        [gl.program_id(0)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _rotated(at, cos_at, sin_at, pair, real, apart, step):
    """(first, second) of all pairs, rotated."""
    a = gl.load(at + pair * step, mask=real, other=0.0).to(gl.float32)
    b = gl.load(at + pair * step + apart, mask=real, other=0.0).to(gl.float32)
    cos = gl.load(cos_at + pair, mask=real, other=0.0).to(gl.float32)
    sin = gl.load(sin_at + pair, mask=real, other=0.0).to(gl.float32)
    return a * cos - b * sin, b * cos + a * sin


@gluon.jit
def rotate_queries(new, strides, sequence, group, sizes, q):
    """The rope part of an item's queries, into its panel of shared memory."""
    q_rope, _, _, cos, sin, _, _ = new
    q_sequence, q_token, q_head, _, _, angle_sequence, angle_token, apart, step = strides
    rows, heads, _ = sizes
    row = group * FEW + gl.arange(0, FEW, gl.SliceLayout(1, _FACE))
    pair = gl.arange(0, PAIRS, gl.SliceLayout(0, _FACE))[None, :]
    token, head = row // heads, row % heads
    real = (row < rows)[:, None]
    start = sequence.to(gl.int64) * q_sequence
    at = q_rope + start + (token * q_token + head * q_head)[:, None]
    angle = sequence * angle_sequence + token[:, None] * angle_token
    first, second = _rotated(at, cos + angle, sin + angle, pair, real, apart, step)
    # Pairs come out as halves.
    halves = gl.join(first.to(gl.bfloat16), second.to(gl.bfloat16)).permute((0, 2, 1))
    q.index(8).store(halves.reshape([FEW, 2 * PAIRS]))
    fence_async_shared()
    sync()


@gluon.jit
def append_tokens(new, strides, pages, sequence, newest, end, q_tokens, eps):
    """Writes a sequence's new tokens before `end`; those without a place in the pool nowhere."""
    _, latents, norm, cos, sin, page_ids, offsets = new
    _, _, _, k_sequence, k_token, angle_sequence, angle_token, apart, step = strides
    pages_ptr, n_pages, page_tokens, page_stride, token_stride = pages
    column = gl.arange(0, RANK, _LINE)
    pair = gl.arange(0, PAIRS, _SHORT)
    weight = gl.load(norm + column).to(gl.float32)
    every = pair >= 0
    for at in range(gl.maximum(-newest, 0), gl.minimum(q_tokens, end - newest)):
        page = gl.load(page_ids + sequence * q_tokens + at).to(gl.int64)
        offset = gl.load(offsets + sequence * q_tokens + at).to(gl.int64)
        row = latents + sequence.to(gl.int64) * k_sequence + at * k_token
        latent = gl.load(row + column).to(gl.float32)
        squares = gl.sum((latent * latent).to(gl.float64), 0).to(gl.float32)
        latent = latent * (gl.rsqrt(squares * (1.0 / RANK) + eps) * weight)
        angle = sequence * angle_sequence + at * angle_token
        key = _rotated(row + RANK, cos + angle, sin + angle, pair, every, apart, step)
        there = (page >= 0) & (page < n_pages) & (offset >= 0) & (offset < page_tokens)
        to = pages_ptr + page * page_stride + offset * token_stride
        gl.store(to + column, latent.to(gl.bfloat16), mask=there & (column >= 0))
        gl.store(to + RANK + pair, key[0].to(gl.bfloat16), mask=there & every)
        gl.store(to + RANK + PAIRS + pair, key[1].to(gl.bfloat16), mask=there & every)
    fence_async_global()
    sync()
