"""Items of a ring of tiles: who has which, what they say, and how a block of threads' warps hear of
them, through a queue of two places."""

# A kernel's functions are inlined and their arguments have no Python types.
# ruff: noqa: N803
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kvstore_kernels import mla_ring_schedule as schedule
from kvstore_kernels.mla_gluon_parts import BARRIER, BLOCK, sync

HIGH = gl.constexpr(1 << 16)  # one, in the upper half of a word that holds two counters
LOW = gl.constexpr((1 << 16) - 1)

ONE_WARP = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
GROUP_WARPS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
COLUMNS = gl.constexpr(schedule.COLUMNS)
KEEPERS = gl.constexpr(schedule.KEEPERS)
KEEPS = gl.constexpr(schedule.KEEPS)
PIECES = gl.constexpr(schedule.PIECES)
AT_END = gl.constexpr(schedule.AT_END)
AT_ONCE = gl.constexpr(schedule.AT_ONCE)


@gluon.jit
def new_barriers(HOW_MANY: gl.constexpr, COUNT: gl.constexpr):
    """Each completes a phase with every COUNT arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [HOW_MANY, 1], BARRIER)
    for at in gl.static_range(HOW_MANY):
        mbarrier.init(bars.index(at), count=COUNT)
    return bars


@gluon.jit
def tiles_of(first, end):
    """At least one, so that all items take the same steps."""
    return gl.maximum((end - first + BLOCK - 1) // BLOCK, 1)


@gluon.jit
def load_span(items, item):
    """(sequence, group, first token, end)."""
    at = items + (1 + item) * COLUMNS
    return gl.load(at), gl.load(at + 1), gl.load(at + 2), gl.load(at + 3)


@gluon.jit
def load_parts(items, item):
    """(partial, counter, parts, part)."""
    at = items + (1 + item) * COLUMNS
    return gl.load(at + 4), gl.load(at + 5), gl.load(at + 6), gl.load(at + 7)


@gluon.jit
def first_new(items, item, q_tokens):
    """The position of the first of the sequence's last so many tokens."""
    return gl.load(items + (1 + item) * COLUMNS + 8) - q_tokens


@gluon.jit
def tell(item, line, number):
    """Gives all others the next item, or that there is none."""
    queue, told, heard = line
    mbarrier.wait(heard.index(number & 1), (number >> 1 & 1) ^ 1)
    queue.index(number & 1).store(gl.full([1], item, gl.int32, ONE_WARP))
    sync()
    mbarrier.arrive(told.index(number & 1))


@gluon.jit
def listen(line, number, LAYOUT: gl.constexpr):
    """The next item, or a negative number if there is none."""
    queue, told, _ = line
    mbarrier.wait(told.index(number & 1), number >> 1 & 1)
    item = gl.max(queue.index(number & 1).load(LAYOUT), 0)
    sync()
    return item


@gluon.jit
def hear(line, number, LAYOUT: gl.constexpr):
    """The same; what it was read from is free then."""
    item = listen(line, number, LAYOUT)
    heard = line[2]
    mbarrier.arrive(heard.index(number & 1))
    return item


@gluon.jit
def claim_item(items, claims, workers):
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
