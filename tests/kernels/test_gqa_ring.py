"""Grouped-query decode by a ring of tiles: lists of items for any lengths, and the kernel run on
the CPU in any order of events, beside the reference."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.gluon_on_cpu import Copy, DeadlockError, RaceError, launch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kvstore_kernels import gqa_ring_kernel as ring
from kvstore_kernels import mla_gluon_parts as parts
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.gqa_form import GqaForm
from kvstore_kernels.gqa_reference import gqa_reference
from kvstore_kernels.gqa_ring import GqaRingWorkspace, gqa_decode_ring
from kvstore_kernels.gqa_ring_schedule import (
    CHUNK,
    CLAIMS,
    LEAST_LOAD,
    TILE_TOKENS,
    plan_gqa_ring,
)
from kvstore_kernels.mla_ring_schedule import most_items, most_partials
from kvstore_kernels.worklist import COUNTER, END, FIRST, GROUP, PART, PARTIAL, PARTS, SEQUENCE

LOG2_E = math.log2(math.e)

# ------------------------------------------------------------------------------------ lists

lengths_of = st.lists(st.integers(0, 40_000), max_size=40)


@given(lengths_of, st.integers(1, 3), st.integers(1, 140))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_all_tokens_are_in_one_item(lengths, groups, workers):
    found = plan_gqa_ring(lengths, groups=groups, workers=workers)
    items = found.items[1:]
    assert found.items[0, 0] == len(items) <= most_items(len(lengths), groups, workers)
    assert found.n_partials <= most_partials(workers)
    tokens = items[:, END] - items[:, FIRST]
    assert (np.diff(np.maximum(-(-tokens // TILE_TOKENS), 1)) <= 0).all()
    partials, counters = [], set()
    for sequence, group in itertools.product(range(len(lengths)), range(groups)):
        mine = items[(items[:, SEQUENCE] == sequence) & (items[:, GROUP] == group)]
        mine = mine[np.argsort(mine[:, PART])]
        assert mine[:, PART].tolist() == list(range(len(mine)))
        assert (mine[:, PARTS] == len(mine)).all()
        edges = [0, *mine[:, END].tolist()]
        assert edges[:-1] == mine[:, FIRST].tolist()
        assert edges[-1] == lengths[sequence]
        assert (mine[1:, FIRST] % TILE_TOKENS == 0).all()
        if len(mine) > 1:
            assert (np.diff(mine[:, PARTIAL]) == 1).all()
            partials += mine[:, PARTIAL].tolist()
            counters |= set(mine[:, COUNTER].tolist())
    assert sorted(partials) == list(range(found.n_partials))
    assert counters == set(range(found.n_counters))


@pytest.mark.parametrize(
    ("lengths", "most", "how_many", "least"),
    [
        ([8192] * 64, 223, 128, 8),
        ([1024] * 256, 64, 132, 8),
        ([4096] * 16, 32, 128, 32),  # little to read: a part each
        ([0, 0, 5], 1, 3, 1),
    ],
)
def test_workers_are_filled_and_the_rest_is_claimed(lengths, most, how_many, least):
    tiles = _tiles(plan_gqa_ring(lengths, groups=1, workers=132))
    assert (tiles.max(), (tiles == most).sum(), tiles.min()) == (most, how_many, least)


def test_claimed_parts_are_a_share_of_what_is_left():
    tiles = _tiles(plan_gqa_ring([8192] * 64, groups=1, workers=132))
    claimed = tiles[128:]
    left = claimed[::-1].cumsum()[::-1]
    assert (claimed <= np.maximum(left / CLAIMS * 1.5, 1.5 * CHUNK)).all()


def _tiles(found):
    """Of each item."""
    items = found.items[1:]
    return np.maximum(-(-(items[:, END] - items[:, FIRST]) // TILE_TOKENS), 1)


def test_the_rest_is_cut_less_finely_where_partial_results_would_not_fit():
    lengths = [TILE_TOKENS * LEAST_LOAD * 8] * 90
    found = plan_gqa_ring(lengths, groups=4, workers=8)
    assert found.n_partials <= most_partials(8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lengths": [-1]}, "lengths must not be negative"),
        ({"lengths": [[1]]}, "lengths must have one dimension"),
        ({"groups": 0}, "groups must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
    ],
)
def test_wrong_lists_are_named(wrong, message):
    asked = {"lengths": [5], "groups": 1, "workers": 2} | wrong
    with pytest.raises(KernelArgumentError, match=message):
        plan_gqa_ring(asked.pop("lengths"), **asked)


# ------------------------------------------------------------------------------------ kernel


class Blocks:
    """A tensor map: boxes of a tensor, with zeros outside."""

    def __init__(self, tensor, box):
        self.tensor, self.box = tensor, box

    def at(self, start):
        result = torch.zeros(self.box, dtype=self.tensor.dtype)
        low = [max(int(s), 0) for s in start]
        high = [
            min(int(s) + n, size)
            for s, n, size in zip(start, self.box, self.tensor.shape, strict=True)
        ]
        if all(a < b for a, b in zip(low, high, strict=True)):
            here = tuple(
                slice(a - int(s), b - int(s)) for a, b, s in zip(low, high, start, strict=True)
            )
            result[here] = self.tensor[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        return result


class Panel:
    """One panel of a box, for the emulator's copies."""

    def __init__(self, blocks, start, take):
        self.blocks, self.start, self.take = blocks, start, take

    def box(self, _height):
        return self.take(self.blocks.at(self.start))


# What follows stands for what the kernel does, and runs with the emulator in place of `gl`.


def _load_block(blocks, start, bar, memory):
    """A box of keys or values, whose panels are halves of heads, or of queries."""
    gl.machine.pause()
    halves = blocks.box[-1] == 64
    for number, region in enumerate(memory.regions):

        def take(box, number=number):
            if halves:
                return box[0, number // 2, number % 2]
            return box[0, number // 2, :, number % 2 * 64 : (number % 2 + 1) * 64]

        copy = Copy(Panel(blocks, start, take), [], bar[0], region)
        region.write(gl._me.view)
        region.values.fill_(torch.nan)
        copy.view = dict(gl._me.view)
        gl._me.view[region, "write"] -= 1
        gl.machine.copies.append(copy)


def _read_heads(memory):
    """(heads, tokens or rows, columns)."""
    panels = [gl.read(region) for region in memory.regions]
    pairs = zip(panels[::2], panels[1::2], strict=True)
    return torch.stack([torch.cat(pair, dim=1) for pair in pairs])


def _read_turned(memory):
    return _read_heads(memory).transpose(1, 2)


def _multiply(a, b, acc):
    return acc + a.float() @ b.float()


def _nothing(*_):
    pass


def _forget(start, lines):
    """What the L2 drops may be anything from then on."""
    start.values[start.at : start.at + lines * 32] = torch.nan


SUBSTITUTES = {
    parts.load_panel: _load_block,
    parts.sync: "sync",
    mbarrier.init: "init",
    ring.call_up: _nothing,
    ring.forget: _forget,
    ring.load_keys: _read_heads,
    ring.load_values: _read_turned,
    ring.load_queries: _read_turned,
    ring.mma_v2: _multiply,
}


class Case:
    """A batch in random pages; all that must not be read is NaN, all that must be written too."""

    def __init__(self, lengths, *, heads=16, kv_heads=8, page_tokens=16, workers=2, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.form = GqaForm(heads=heads, kv_heads=kv_heads, head_dim=128, page_tokens=page_tokens)
        self.lengths, self.workers = lengths, workers
        used = [-(-length // page_tokens) for length in lengths]
        pool = torch.full((sum(used) + 2, kv_heads, 2, page_tokens, 128), torch.nan).bfloat16()
        self.table = torch.full((len(lengths), max(*used, 1, 1)), -7, dtype=torch.int32)
        order = torch.randperm(len(pool), generator=random).int()
        for sequence, (length, count) in enumerate(zip(lengths, used, strict=True)):
            self.table[sequence, :count] = order[sum(used[:sequence]) :][:count]
            for at in range(length):
                page = int(self.table[sequence, at // page_tokens])
                pool[page, :, :, at % page_tokens] = torch.randn(
                    kv_heads, 2, 128, generator=random
                ).bfloat16()
        self.k, self.v = pool.unbind(2)
        self.q = torch.randn(len(lengths), 1, heads, 128, generator=random).bfloat16()
        self.out = torch.full(self.q.shape, torch.nan).bfloat16()
        self.found = plan_gqa_ring(lengths, groups=kv_heads // 8, workers=workers)
        partials = most_partials(workers)
        self.partials = torch.full((partials, 8, 128, 8), torch.nan)
        self.lse = torch.full((partials, 8, 8), torch.nan)
        self.counters = torch.zeros(partials, dtype=torch.int32)
        self.claims = torch.zeros(1, dtype=torch.int32)

    def run(self, *, seed=0, substitutes=None, slow=None):
        form = self.form
        boxes = [
            Blocks(pages.unflatten(3, (2, 64)).transpose(2, 3), (1, 8, 2, 16, 64))
            for pages in (self.k, self.v)
        ]
        queries = self.q.view(len(self.q), form.kv_heads, form.group, 128)
        launch(
            ring.gqa_ring_kernel,
            self.workers,
            *boxes,
            Blocks(queries, (1, 8, 8, 128)),
            self.table,
            torch.from_numpy(self.found.items),
            self.out,
            self.partials,
            self.lse,
            self.counters,
            self.claims,
            128**-0.5 * LOG2_E,
            self.table.stride(0),
            form.page_tokens,
            form.group,
            self.out.stride(0),
            self.out.stride(2),
            seed=seed,
            slow=slow,
            substitutes={**SUBSTITUTES, **(substitutes or {})},
        )
        return self

    def check(self):
        wanted = gqa_reference(
            self.q, self.k, self.v, self.table.clamp(min=0), self.lengths, self.form
        )
        assert (self.out.double() - wanted).abs().max() <= 1e-2 * wanted.abs().max()
        assert not self.counters.any()
        assert not self.claims.any()


@pytest.mark.parametrize(("tiles", "short"), [(1, 0), (1, 15), (2, 1), (3, 0), (4, 15), (9, 7)])
def test_any_number_of_tiles(tiles, short):
    Case([16 * tiles - short], workers=1, seed=tiles).run(seed=short).check()


BATCHES = {
    "parts of one sequence": {"lengths": [200], "workers": 4},
    "more parts than are merged at a time": {"lengths": [260], "workers": 8},
    "sequences one after the other": {"lengths": [33, 16, 70, 1, 17], "workers": 1},
    "claimed": {"lengths": [25, 5, 75, 16, 1, 33, 50], "workers": 2},
    "one without tokens": {"lengths": [0, 110, 0], "workers": 3},
    "more workers than items": {"lengths": [5, 50], "workers": 6},
    "sixteen KV heads": {"lengths": [70, 35], "heads": 16, "kv_heads": 16, "workers": 4},
    "eight query heads each": {"lengths": [70, 5], "heads": 64, "workers": 4},
    "three query heads each": {"lengths": [70, 5], "heads": 24, "workers": 3},
    "pages of more tiles": {"lengths": [100, 33], "page_tokens": 48, "workers": 3},
    "more than 32 tiles": {"lengths": [16 * 33 + 3], "workers": 1},
}


@pytest.mark.parametrize("name", BATCHES)
def test_results_in_any_order_of_events(name):
    Case(**BATCHES[name], seed=1).run(seed=len(name)).check()


@pytest.mark.parametrize("slow", ["_tiles", "_scout", "_queries", "_announce"])
def test_a_warp_that_comes_last_misses_nothing(slow):
    """Also where all others go on as far as they can without it, over items of one tile each."""
    Case([16, 1, 30, 16, 100, 5, 16], workers=1, seed=3).run(slow=slow).check()
    Case([100, 16, 16, 60], workers=2, seed=4).run(slow=slow).check()


@pytest.mark.parametrize("seed", range(2))
def test_what_is_left_of_long_sequences_is_claimed(monkeypatch, seed):
    monkeypatch.setattr("kvstore_kernels.gqa_ring_schedule.LEAST_LOAD", 0)
    monkeypatch.setattr("kvstore_kernels.gqa_ring_schedule.CHUNK", 2)
    monkeypatch.setattr("kvstore_kernels.gqa_ring_schedule.SHARE", 0.6)
    case = Case([200, 30, 200], workers=3, seed=seed)
    assert case.found.items[0, 0] > 5
    case.run(seed=seed).check()


def test_equal_inputs_give_equal_bits_in_any_order():
    outs = [Case([100, 25], workers=4, seed=1).run(seed=seed).out for seed in range(3)]
    assert all(torch.equal(out, outs[0]) for out in outs)


def test_launches_follow_each_other():
    case = Case([150, 20, 3], workers=2)
    for seed in range(3):
        case.out.fill_(torch.nan)
        case.run(seed=seed).check()


@pytest.mark.parametrize("page", [-1, 1000, 2**31 - 1])
def test_a_page_outside_of_the_pool_reads_as_zeros_for_its_sequence_alone(page):
    case = Case([40, 40], workers=2)
    case.table[0, 1] = page
    case.run()
    wanted = gqa_reference(case.q[1:], case.k, case.v, case.table[1:], [40], case.form)
    assert (case.out[1:].double() - wanted).abs().max() <= 1e-2 * wanted.abs().max()
    assert not case.out.isnan().any()


def test_large_scores_keep_their_order():
    case = Case([50], workers=1)
    case.q *= 100
    case.run().check()


# What is found when a step of the protocol is missing.


def _deaf(line, number, _layout):
    """Hears of nothing but the first item."""
    fields, _, told, _ = line
    mbarrier.wait(told.index(0), 0)
    return gl.max(fields.index(0).load(None), 0).int() - (number > 0) * 1000


@pytest.mark.parametrize(
    ("part", "other", "error"),
    [
        (parts.sync, _nothing, RaceError),
        (ring._next, _deaf, DeadlockError),
    ],
)
def test_a_missing_step_is_noticed(part, other, error):
    case = Case([100, 40, 16, 16, 16], workers=2)
    with pytest.raises(error):
        case.run(substitutes={part: other})


def test_parts_are_merged_by_nobody_else():
    case = Case([200], workers=4).run(substitutes={ring._heed: _nothing})
    assert case.out.isnan().all()


# --------------------------------------------------------------------------------- launcher


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head_dim": 64}, "head_dim must be 128"),
        ({"q_tokens": 2}, "q_tokens must be 1"),
        ({"heads": 128}, "heads must be at most 8"),
        ({"heads": 16, "kv_heads": 4}, "kv_heads must be a multiple of 8"),
        ({"page_tokens": 24}, "page_tokens must be a multiple of 16"),
        ({"dtype": torch.float16, "kv_dtype": torch.float16}, "dtype must be bfloat16"),
        ({"kv_dtype": torch.float8_e4m3fn}, "kv_dtype must be bfloat16"),
        ({"softcap": 5.0}, "softcap must be None"),
        ({"window": 5}, "window must be None"),
    ],
)
def test_forms_that_it_does_not_take_are_named(wrong, message):
    asked = {"heads": 32, "kv_heads": 8, "head_dim": 128, "page_tokens": 16} | wrong
    with pytest.raises(KernelArgumentError, match=message):
        GqaRingWorkspace(GqaForm(**asked), max_sequences=2, device="cpu")


def _call():
    case = Case([20, 5])
    workspace = GqaRingWorkspace(case.form, max_sequences=2, device="cpu")
    workspace.load(workspace.plan(case.lengths))
    return case, {
        "q": case.q,
        "k_pages": case.k,
        "v_pages": case.v,
        "page_table": case.table,
        "workspace": workspace,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {"q": a["q"][:1]}, "q must have shape"),
        (lambda a: {"q": a["q"].half()}, "q must be bfloat16"),
        (lambda a: {"k_pages": a["k_pages"][..., :64]}, "k_pages must have shape"),
        (lambda a: {"v_pages": a["v_pages"][:1]}, "v_pages must be as many as k_pages"),
        (lambda a: {"k_pages": a["k_pages"][:0], "v_pages": a["v_pages"][:0]}, "and some"),
        (lambda a: {"page_table": a["page_table"].long()}, "page_table must be int32"),
        (lambda a: {"page_table": a["page_table"][:, :1]}, "page_table must have pages for 20"),
        (lambda a: {"out": a["q"][:, :, :8]}, "out must have shape"),
        (lambda a: {"check": True, "page_table": a["page_table"] + 99}, "page_table must have"),
        (lambda _: {}, "q must be on a CUDA device"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    _, arguments = _call()
    with pytest.raises(KernelArgumentError, match=message):
        gqa_decode_ring(**(arguments | change(arguments)))


def test_strides_of_part_of_16_bytes_are_refused():
    case, arguments = _call()
    wide = torch.zeros(len(case.k), 8, 16, 132, dtype=torch.bfloat16)
    with pytest.raises(KernelArgumentError, match="v_pages must have its address and strides"):
        gqa_decode_ring(**(arguments | {"v_pages": wide[..., :128]}))


def test_a_workspace_wants_a_list_that_fits():
    workspace = GqaRingWorkspace(Case([5]).form, max_sequences=2, device="cpu")
    with pytest.raises(KernelArgumentError, match="planned must be for at most 2 sequences"):
        workspace.load(workspace.plan([5, 5, 5]))
    with pytest.raises(KernelArgumentError, match="max_sequences must be at least 1"):
        GqaRingWorkspace(workspace.form, max_sequences=0, device="cpu")
