"""Latent attention on the matrix units of Hopper: two warpgroups that take turns (Gluon).

One block of threads a multiprocessor attends with 64 query rows. Their output, 64 x 512 in float32,
fills half of the registers, so that no second tile fits whose products could hide this one's
softmax. So two warpgroups hold half of the columns each, and while one exponentiates, the other
multiplies: the *seesaw* of FlashMLA ("A Deep-Dive Into the New Flash MLA Kernel", DeepSeek, 2025),
in an order of our own.

    block   64 tokens. A pair has an even and an odd one, each with a buffer of 64 x 576: left half
            and right half (256 columns each; together the values), and tail (64, the rope part)
    even    the warpgroup which scores even blocks and holds the left half of the output
    odd     the warpgroup which scores odd blocks and holds the right half of the output
    loader  one warp, which brings tiles by tensor maps

For each pair:

    even                                          odd
    score the even block                          score the odd block
    softmax; weights into the even buffer's       wait for even's weights
      tail: once scored, the rope part is         out += even's weights * right half, started
      done with                                   softmax meanwhile; weights into the odd tail
    out += its weights * left half                free the even buffer's right half and tail
    free the even buffer's left half              out += its weights * right half
    wait for odd's weights                        free the odd buffer's right half
    out += odd's weights * left half
    free the odd buffer's left half and tail

Every block's weights go into both halves of the output in the order of the blocks, and one running
top of the scores passes from block to block: odd's softmax starts from even's top, and even's next
one from odd's. Each group scales its half down to the new top before it adds a block.

Barriers. Each 128 columns of a buffer, and its tail, have a full barrier, for which the buffer's
own group waits; the other group touches the buffer after the owner's weights are there. Each half
has one of being free (the tail goes with the half that its owner does not hold); then two of
weights, two of row sums, two for the queries. All complete a phase a pair, or an item for the last
four, so their parities alternate. No barrier runs two phases ahead of who waits for it: between two
arrivals, the one who arrives waits for something that the waiting side does after the first.
Weights in a tail are covered by the buffer's own barriers. Items have whole pairs, at least one,
blocks without tokens being zeros; so no step is ever left out.

Only the weights are written by threads and read by matrix units: fence, meeting of the group,
arrival. All else is ordered by barriers alone.

Registers: 240 a thread for the groups (128 output, 32 scores, 16 weights), 24 for the loader. The
output is scaled only where the warpgroup has no product in flight: anything else that touches
accumulators meanwhile makes the compiler wait for every product as soon as it is started.
"""

# A kernel's functions are inlined and their arguments have no Python types.
# ruff: noqa: N803, PLR0917
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
    HALF,
    NEVER,
    PAIR,
    first_record,
    load_half,
    load_queries,
    load_span,
    load_tail,
    locate,
    masked,
    merge_items,
    new_barrier,
    new_pair,
    new_tile,
    pairs_of,
    scaled,
    softmax_step,
    store_result,
    sync,
    tokens_seen,
    viewed,
)

THREADS_REGISTERS = 168  # 65,536 registers over 384 threads, before they are given out anew
CONSUMER_REGISTERS = gl.constexpr(240)
LOADER_REGISTERS = gl.constexpr(24)

SCORES = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
SCORE_ROWS = gl.constexpr(gl.SliceLayout(1, SCORES.value))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, OUTPUT.value, 2))


@gluon.jit
def _load_block(desc, page, row, buffer, full, free, FIRST: gl.constexpr, SECOND: gl.constexpr,
                parity):  # fmt: skip
    """A block into its buffer: the half that is freed first, the other one, the tail."""
    mbarrier.wait(free[FIRST], parity)
    load_half(desc, page, row, FIRST * HALF, full[FIRST], buffer[FIRST])
    mbarrier.wait(free[SECOND], parity)
    load_half(desc, page, row, SECOND * HALF, full[SECOND], buffer[SECOND])
    load_tail(desc, page, row, full[2], buffer[2])


@gluon.jit
def _loader(q_desc, kv_desc, page_table, records, row, table_stride, page_tokens, q, even, odd,
            bars):  # fmt: skip
    q_full, q_free, even_full, odd_full, even_free, odd_free, _, _ = bars
    items = 0
    pairs = 0
    while row >= 0:
        sequence, tile, first, end, row = load_span(records, row)
        mbarrier.wait(q_free, (items & 1) ^ 1)
        load_queries(q_desc, sequence, tile, q_full, q)
        items += 1
        table = page_table + sequence.to(gl.int64) * table_stride
        for pair in range(pairs_of(first, end)):
            token = first + pair * PAIR
            even_page, even_row = locate(table, token, end, page_tokens)
            odd_page, odd_row = locate(table, token + BLOCK, end, page_tokens)
            parity = (pairs & 1) ^ 1
            _load_block(kv_desc, even_page, even_row, even, even_full, even_free, 0, 1, parity)
            _load_block(kv_desc, odd_page, odd_row, odd, odd_full, odd_free, 1, 0, parity)
            pairs += 1


@gluon.jit
def _score_half(scores, q, keys, full, parity, zero, FRESH: gl.constexpr):
    for box in gl.static_range(2):
        mbarrier.wait(full[box], parity)
        # Addresses that depend on the loop are made in it; the compiler would keep all 70 of the
        # constant ones in registers, which there are not.
        scores = warpgroup_mma(
            q.index(box + zero),
            keys.index(box + zero).permute((1, 0)),
            scores,
            use_acc=not (FRESH and box == 0),
            is_async=True,
        )
    return scores


@gluon.jit
def _score(q, buffer, full, FIRST: gl.constexpr, SECOND: gl.constexpr, pairs):
    """Scores of a block, box by box as it comes in."""
    parity = pairs & 1
    zero = pairs >> 31
    scores = gl.full([64, 64], 0.0, gl.float32, SCORES)
    scores = _score_half(scores, q[FIRST], buffer[FIRST], full[FIRST], parity, zero, True)
    scores = _score_half(scores, q[SECOND], buffer[SECOND], full[SECOND], parity, zero, False)
    mbarrier.wait(full[2], parity)
    keys = buffer[2].index(zero).permute((1, 0))
    scores = warpgroup_mma(q[2].index(zero), keys, scores, is_async=True)
    return warpgroup_mma_wait(0, [scores])


@gluon.jit
def _weigh(scores, top, scale, first, end, edge, seen):
    """softmax_step of the block that begins at `first`; not all rows see tokens from `edge` on."""
    if first + BLOCK > edge:
        scores = masked(scores, first, end, seen, SCORES)
    return softmax_step(scores, top, scale)


@gluon.jit
def _publish(weights, top, tail, tops, ready):
    """Gives a block's weights and top to the other group."""
    tail.index(0).store(weights)
    tops.store(top)
    fence_async_shared()
    sync()
    mbarrier.arrive(ready)


@gluon.jit
def _add(acc, weights, values):
    """acc + weights * values, started. weights: in registers, or in a tail."""
    return warpgroup_mma(weights, viewed(values, [64, 256]), acc, is_async=True)


@gluon.jit
def _added(acc, free):
    """The sum, once it is there; what it was read from is free then."""
    acc = warpgroup_mma_wait(0, [acc])
    sync()
    mbarrier.arrive(free)
    return acc


@gluon.jit
def _total(own, mine, theirs, mine_ready, theirs_ready, parity):
    """Row sums of both groups' blocks."""
    mine.store(own)
    sync()
    mbarrier.arrive(mine_ready)
    mbarrier.wait(theirs_ready, parity)
    return own + theirs.load(SCORE_ROWS)


@gluon.jit
def _even_group(q, even, odd, bars, small, records, row, sizes, scale, results):
    q_full, q_free, even_full, _, even_free, odd_free, ready, summed = bars
    rows, heads, q_tokens = sizes
    out, partials, lse, counters = results
    start = row
    items = 0
    pairs = 0
    while row >= 0:
        sequence, tile, first, end, following = load_span(records, row)
        seen, least = tokens_seen(records, row, tile, heads, q_tokens, SCORE_ROWS)
        edge = gl.minimum(least, end)
        top = gl.full([64], NEVER, gl.float32, SCORE_ROWS)
        total = gl.full([64], 0.0, gl.float32, SCORE_ROWS)
        acc = gl.full([64, 256], 0.0, gl.float32, OUTPUT)
        mbarrier.wait(q_full, items & 1)
        count = pairs_of(first, end)
        for pair in range(count):
            scores = _score(q, even, even_full, 0, 1, pairs)
            sync()
            mbarrier.arrive(q_free, pred=pair == count - 1)
            weights, new_top = _weigh(scores, top, scale, first + pair * PAIR, end, edge, seen)
            fade = gl.exp2(top - new_top)
            total = total * fade + gl.sum(weights, 1)
            narrow = weights.to(gl.bfloat16)
            _publish(narrow, new_top, even[2], small[0], ready[0])
            acc = scaled(acc, fade, OUTPUT)
            acc = _add(acc, gl.convert_layout(narrow, WEIGHTS), even[0])
            acc = _added(acc, even_free[0])

            mbarrier.wait(ready[1], pairs & 1)
            top = small[1].load(SCORE_ROWS)
            fade = gl.exp2(new_top - top)
            total = total * fade
            acc = scaled(acc, fade, OUTPUT)
            acc = _add(acc, odd[2].index(pairs >> 31), odd[0])
            acc = _added(acc, odd_free[0])
            pairs += 1
        total = _total(total, small[2], small[3], summed[0], summed[1], items & 1)
        store_result(acc, top, total, out, partials, lse, counters, records, row, sequence, tile,
                     rows, 0, OUTPUT)  # fmt: skip
        items += 1
        row = following
    merge_items(out, partials, lse, counters, records, start, rows, 0)


@gluon.jit
def _odd_group(q, even, odd, bars, small, records, row, sizes, scale, results):
    q_full, q_free, _, odd_full, even_free, odd_free, ready, summed = bars
    rows, heads, q_tokens = sizes
    out, partials, lse, counters = results
    start = row
    items = 0
    pairs = 0
    while row >= 0:
        sequence, tile, first, end, following = load_span(records, row)
        seen, least = tokens_seen(records, row, tile, heads, q_tokens, SCORE_ROWS)
        edge = gl.minimum(least, end)
        top = gl.full([64], NEVER, gl.float32, SCORE_ROWS)
        total = gl.full([64], 0.0, gl.float32, SCORE_ROWS)
        acc = gl.full([64, 256], 0.0, gl.float32, OUTPUT)
        mbarrier.wait(q_full, items & 1)
        count = pairs_of(first, end)
        for pair in range(count):
            scores = _score(q, odd, odd_full, 1, 0, pairs)
            sync()
            mbarrier.arrive(q_free, pred=pair == count - 1)

            mbarrier.wait(ready[0], pairs & 1)
            even_top = small[0].load(SCORE_ROWS)
            fade = gl.exp2(top - even_top)
            total = total * fade
            acc = scaled(acc, fade, OUTPUT)
            acc = _add(acc, even[2].index(pairs >> 31), even[1])

            token = first + pair * PAIR + BLOCK
            weights, top = _weigh(scores, even_top, scale, token, end, edge, seen)
            fade = gl.exp2(even_top - top)
            total = total * fade + gl.sum(weights, 1)
            narrow = weights.to(gl.bfloat16)
            _publish(narrow, top, odd[2], small[1], ready[1])
            acc = _added(acc, even_free[1])
            acc = scaled(acc, fade, OUTPUT)
            acc = _add(acc, gl.convert_layout(narrow, WEIGHTS), odd[1])
            acc = _added(acc, odd_free[1])
            pairs += 1
        total = _total(total, small[3], small[2], summed[1], summed[0], items & 1)
        store_result(acc, top, total, out, partials, lse, counters, records, row, sequence, tile,
                     rows, 1, OUTPUT)  # fmt: skip
        items += 1
        row = following
    merge_items(out, partials, lse, counters, records, start, rows, 1)


@gluon.jit(do_not_specialize=["table_stride", "page_tokens", "rows", "heads", "q_tokens"])
def seesaw_kernel(
    q_desc,  # [batch, rows, 576] bfloat16 in boxes of [1, 64, 64]
    kv_desc,  # [pages, page_tokens, 576] likewise
    page_table,  # [batch, table_stride] int32
    records,  # [n, 16] int32: the schedule
    out,  # [batch, rows, 512] bfloat16
    partials,  # [n_partials, 64, 512] float32
    lse,  # [n_partials, 2, 64] float32
    counters,  # [n_counters, 2] int32, zeros, and zeros again afterwards
    scale,  # of the scores, times log2 e
    table_stride,
    page_tokens,
    rows,
    heads,
    q_tokens,
):
    q, even, odd = new_tile(), new_tile(), new_tile()
    # Tops of even and odd blocks, row sums of the even and the odd group.
    small = (
        gl.allocate_shared_memory(gl.float32, [64], FLAT),
        gl.allocate_shared_memory(gl.float32, [64], FLAT),
        gl.allocate_shared_memory(gl.float32, [64], FLAT),
        gl.allocate_shared_memory(gl.float32, [64], FLAT),
    )
    bars = (
        new_barrier(1),  # queries are there
        new_barrier(2),  # both groups are done with them
        (new_pair(), new_pair(), new_barrier(1)),  # even buffer full: left, right, tail
        (new_pair(), new_pair(), new_barrier(1)),  # odd buffer full
        new_pair(),  # even buffer: left, right and tail free
        new_pair(),  # odd buffer: left and tail, right free
        new_pair(),  # weights of the even, odd block are there
        new_pair(),  # row sums of the even, odd group are there
    )
    fence_async_shared()
    gdc_wait()
    gdc_launch_dependents()
    row = first_record(records, gl.program_id(0))
    sizes = (rows, heads, q_tokens)
    results = (out, partials, lse, counters)
    group = (q, even, odd, bars, small, records, row, sizes, scale, results)
    gl.warp_specialize(
        [
            (_even_group, group),
            (_odd_group, group),
            (
                _loader,
                (q_desc, kv_desc, page_table, records, row, table_stride, page_tokens, q, even,
                 odd, bars),
            ),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, LOADER_REGISTERS],
    )  # fmt: skip
