"""How blocks of threads merge the parts of a ring of tiles: who waits for whom, who merges which
columns, and the sums."""

# A kernel's functions are inlined and their arguments have no Python types.
# ruff: noqa: N803, N806, PLR0917
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvstore_kernels.mla_gluon_parts import HIDDEN, NEVER, RANK
from kvstore_kernels.mla_ring_append import FEW
from kvstore_kernels.mla_ring_items import (
    COLUMNS,
    KEEPERS,
    LOW,
    PIECES,
    load_parts,
    load_span,
)

COMES, CLAIM, LEAVES = gl.constexpr(1 << 16), gl.constexpr(1 << 32), gl.constexpr(1 << 48)


@gluon.jit
def meet(out, partials, lse, counters, items, item, rows, patient, ARRIVE: gl.constexpr):
    """Merges the parts of an item's (sequence, group), together with all who keep one of these.

    Called once it has no more items by a block of threads that keeps one, and else, with ARRIVE,
    by each part once it is stored. patient: all blocks have started. They have all items then, and
    none waits before these are done, so it may wait for all parts. So may the last to come here.
    Whoever may not wait leaves the merging to others.

    A counter has arrivals, those who came here, claims of shares to merge, and those who left, in
    16 bits each. Who stays makes one claim in vain, so that the last to touch the counter knows
    that it is. It makes it zero again.
    """
    sequence, group, _, _ = load_span(items, item)
    partial, counter, parts, part = load_parts(items, item)
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
