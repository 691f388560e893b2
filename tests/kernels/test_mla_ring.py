"""The ring of tiles: who attends to what, and the kernel itself run on the CPU in any order."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.gluon_on_cpu import DeadlockError, RaceError
from kernels.latents import (
    LatentCase,
    batches,
    check_equal_bits,
    check_every_token_once,
    check_large_scores,
    check_launches_in_a_row,
    check_numbers,
    check_wrong_pages,
)
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from kvstore_kernels import mla_gluon_parts as parts
from kvstore_kernels import mla_ring_append as appending
from kvstore_kernels import mla_ring_items as ring_items
from kvstore_kernels import mla_ring_kernel as ring
from kvstore_kernels import mla_ring_schedule as schedule
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.fused import NewLatents, latent_geometry, rotate_first
from kvstore_kernels.mla_reference import RANK, WIDTH
from kvstore_kernels.mla_ring import MlaRingForm, MlaRingWorkspace
from kvstore_kernels.mla_ring_schedule import (
    AT_END,
    AT_ONCE,
    KEEPERS,
    KEEPS,
    TILE_TOKENS,
    most_items,
    most_partials,
    plan_ring,
)
from kvstore_kernels.worklist import COUNTER, END, FIRST, LENGTH, PART, PARTS, SEQUENCE

# ------------------------------------------------------------------------------------ lists

lists = batches(4, [1, 8, 33, 132])


def items_of(found):
    assert found.items[0, 0] == len(found.items) - 1
    return found.items[1:]


def tiles_of(items):
    return np.maximum(-(-(items[:, END] - items[:, FIRST]) // TILE_TOKENS), 1)


@given(lists)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_token_of_every_group_is_attended_to_once(batch):
    lengths, groups, workers = batch
    items = items_of(plan_ring(lengths, groups=groups, workers=workers))
    check_every_token_once(items, lengths, groups, TILE_TOKENS)


@given(lists)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_partials_and_counters_are_numbered_without_gaps_and_few(batch):
    lengths, groups, workers = batch
    found = plan_ring(lengths, groups=groups, workers=workers)
    items = items_of(found)
    check_numbers(items, found.n_partials, found.n_counters)
    assert not items[items[:, PARTS] == 1][:, [KEEPERS, KEEPS]].any()
    assert len(items) <= most_items(len(lengths), groups, workers)
    assert found.n_partials <= most_partials(workers)


@given(lists)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_whoever_merges_is_known_to_all(batch):
    lengths, groups, workers = batch
    found = plan_ring(lengths, groups=groups, workers=workers)
    items = items_of(found)
    for counter in range(found.n_counters):
        at = np.flatnonzero(items[:, COUNTER] == counter)
        mine, first = items[at], at < workers
        if first.any():
            assert (mine[:, KEEPS] == np.where(first, AT_END, 0)).all()
            assert (mine[:, KEEPERS] == first.sum()).all()
        else:
            assert (mine[:, KEEPS] == AT_ONCE).all()
            assert (mine[:, KEEPERS] == mine[:, PARTS]).all()


@given(lists)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_items_are_claimed_the_longest_first_and_end_together(batch):
    lengths, groups, workers = batch
    items = items_of(plan_ring(lengths, groups=groups, workers=workers))
    tiles = tiles_of(items)
    assert (np.diff(tiles) <= 0).all()
    loads = np.zeros(workers)
    for size in tiles:
        loads[loads.argmin()] += size
    mean, whole = tiles.sum() / workers, tiles[items[:, PARTS] == 1].max(initial=0)
    assert loads.max() <= mean + max(0.3 * mean + 3, whole)


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([4096], {2: 32}),  # no part is shorter
        ([65_536], {8: 128}),
        ([4096] * 64, {32: 128}),  # even parts, as good as it gets
        ([16_384] * 64, {111: 128, 17: 128}),  # the rest is claimed
        ([1024] * 256, {16: 256}),  # nothing is cut
        ([2048] * 128, {32: 128}),
    ],
)
def test_sequences_are_cut_where_it_pays(lengths, sizes):
    tiles = tiles_of(items_of(plan_ring(lengths, groups=1, workers=132)))
    assert dict(zip(*np.unique(tiles, return_counts=True), strict=True)) == sizes


@given(lists, st.integers(1, 9))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_sequences_without_tokens_change_nothing_for_the_others(batch, more):
    lengths, groups, workers = batch
    lengths = [length + 1 for length in lengths]
    cut = [FIRST, END, PARTS, PART]
    alone = items_of(plan_ring(lengths, groups=groups, workers=workers))
    found = items_of(plan_ring(lengths + [0] * more, groups=groups, workers=workers))
    beside = found[found[:, LENGTH] > 0]
    assert len(found) == len(beside) + more * groups
    for sequence in range(len(lengths)):
        rows = [items[items[:, SEQUENCE] == sequence][:, cut] for items in (alone, beside)]
        assert np.array_equal(*(row[np.lexsort(row.T)] for row in rows))


def test_no_sequences_no_items():
    found = plan_ring([], groups=2, workers=4)
    assert not len(items_of(found))
    assert (found.n_partials, found.n_counters) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lengths": [-1]}, "lengths must not be negative"),
        ({"lengths": [2**31 - 1]}, "lengths must fit in 32 bits"),
        ({"lengths": [[1]]}, "lengths must have one dimension"),
        ({"groups": 0}, "groups must be at least 1, not 0"),
        ({"workers": 0}, "workers must be at least 1, not 0"),
    ],
)
def test_wrong_lists_are_named(wrong, message):
    with pytest.raises(KernelArgumentError, match=message):
        plan_ring(**{"lengths": [5], "groups": 2, "workers": 4, **wrong})


# ----------------------------------------------------------------------------------- kernel


class Case(LatentCase):
    """For `ring_kernel`."""

    form_class = MlaRingForm

    def __init__(self, lengths, *, heads=16, **options):
        super().__init__(lengths, heads=heads, **options)
        self.found = plan_ring(lengths, groups=self.form.groups, workers=self.workers)
        partials = most_partials(self.workers)
        self.partials = torch.full((partials, RANK, 16), torch.nan)
        self.lse = torch.full((partials, 16), torch.nan)
        self.counters = torch.zeros(partials, dtype=torch.int64)
        self.claims = torch.zeros(1, dtype=torch.int32)
        self.new = None

    def with_new_tokens(self, *, interleaved=True, seed=7):
        """The newest tokens are no longer in the pages."""
        random = torch.Generator().manual_seed(seed)
        form, shape = self.form, self.q.shape[:3]

        def numbers(*size):
            return torch.randn(*size, generator=random).bfloat16()

        position = torch.tensor(self.lengths)[:, None] + torch.arange(-form.q_tokens, 0)
        column = (position // form.page_tokens).clamp(min=0)
        page_ids = torch.where(position >= 0, self.table.gather(1, column), -1).long()
        offsets = position % form.page_tokens
        self.places = page_ids[position >= 0], offsets[position >= 0]
        self.pages[self.places] = torch.nan
        cos, sin = numbers(2, *shape[:2], 32)
        self.new = NewLatents(
            q_rope=numbers(*shape, 192)[..., 128:],
            latents=numbers(*shape[:2], 1536 + WIDTH)[..., 1536:],
            norm=numbers(RANK),
            cos=cos,
            sin=sin,
            page_ids=page_ids,
            offsets=offsets,
            interleaved=interleaved,
        )
        self.before = self.pages.clone()
        return self

    def run(self, *, seed=0, substitutes=None, slow=None):
        new = [None] * 12
        if self.new is not None:
            some = self.new
            new = [some.q_rope, some.latents, some.norm, some.cos, some.sin]
            # Strides count from a view's first element on.
            new = [t.as_strided((_reach(t),), (1,)) for t in new]
            strides = self.pages.stride()[:2]
            new += [some.page_ids, some.offsets, self.pages, len(self.pages), *strides]
            new.append(latent_geometry(some))
        items = torch.from_numpy(self.found.items)
        self.launch(
            ring.ring_kernel,
            [items, self.out, self.partials, self.lse, self.counters, self.claims],
            new,
            seed=seed,
            slow=slow,
            substitutes={appending.fence_async_global: _nothing, **(substitutes or {})},
        )
        return self

    def expected(self):
        if self.new is None:
            return super().expected()
        q, pages = self.q.clone(), self.before.clone()
        rotate_first(q, self.new, pages, None)
        return self.reference(q, pages)

    def check(self):
        super().check(of_largest=True)
        assert not self.counters.any()
        assert not self.claims.any()


def _reach(tensor):
    return 1 + sum((size - 1) * s for size, s in zip(tensor.shape, tensor.stride(), strict=True))


def _nothing(*_):
    pass


@pytest.mark.parametrize(("tiles", "short"), [(1, 0), (1, 63), (2, 1), (3, 0), (4, 63), (5, 7)])
def test_any_number_of_tiles(tiles, short):
    Case([64 * tiles - short], workers=1, seed=tiles).run(seed=short).check()


BATCHES = {
    "parts of one sequence": {"lengths": [600], "workers": 4},
    "more parts than are merged at a time": {"lengths": [4300], "workers": 34},
    "sequences one after the other": {"lengths": [129, 64, 300, 1, 17], "workers": 1},
    "claimed": {"lengths": [100, 20, 300, 64, 1, 129, 200], "workers": 2},
    "one without tokens": {"lengths": [0, 450, 0], "workers": 3},
    "more workers than items": {"lengths": [5, 200], "workers": 6},
    "two groups": {"lengths": [250, 130], "heads": 32, "workers": 6},
    "few heads": {"lengths": [333, 5], "heads": 5, "workers": 4},
    "tokens in the middle of a group": {"lengths": [260], "heads": 6, "q_tokens": 4, "workers": 3},
    "more new tokens than tokens": {"lengths": [2, 65], "heads": 4, "q_tokens": 4, "workers": 4},
    "pages of more tiles": {"lengths": [400, 129], "page_tokens": 192, "workers": 3},
}


@pytest.mark.parametrize("name", BATCHES)
def test_results_in_any_order_of_events(name):
    Case(**BATCHES[name], seed=1).run(seed=len(name)).check()


@pytest.mark.parametrize("slow", ["load_tiles", "load_sides", "announce"])
def test_a_warp_that_comes_last_misses_nothing(slow):
    """Also where all others go on as far as they can without it, over items of one tile each."""
    Case([64, 1, 30, 64, 300, 5, 64], workers=1, seed=3).run(slow=slow).check()
    Case([300, 64, 64, 200], workers=2, seed=4).run(slow=slow).check()


@pytest.mark.parametrize("slow", ["load_tiles", "load_sides", "announce", "write_tokens"])
def test_a_warp_that_comes_last_misses_nothing_where_new_tokens_are_written(slow):
    case = Case([64, 1, 30, 200], workers=1, seed=5).with_new_tokens(interleaved=True)
    case.run(slow=slow).check()


@pytest.mark.parametrize("seed", range(2))
def test_what_is_left_of_long_sequences_is_claimed(monkeypatch, seed):
    monkeypatch.setattr(schedule, "CLAIMS_TILES", -100)
    monkeypatch.setattr(schedule, "SHARE", 0.6)
    case = Case([700, 90, 700], workers=3, seed=seed)
    items = items_of(case.found)
    assert len(items) > 5
    assert set(items[:, KEEPS]) >= {0, AT_END}
    case.run(seed=seed).check()


@pytest.mark.parametrize("seed", range(2))
def test_parts_that_nobody_keeps_are_merged_by_the_last(seed):
    case = Case([1000], workers=1, seed=seed)
    cut = plan_ring([1000], groups=1, workers=4).items
    cut[1:, [KEEPERS, KEEPS]] = cut[0, 0], AT_ONCE
    case.found = replace(case.found, items=cut)
    case.run(seed=seed).check()


def test_nobody_waits_who_does_not_know_that_all_have_started():
    """But for the last of those who keep a part."""

    def claim(items, claims, workers):
        claimed = int(claims.values[0]) % (1 << 16)
        claims.values[0] += 1
        count = int(items.values[0])
        if claimed + 1 == max(count, workers):
            claims.values[0] = 0
        item = workers + claimed
        return torch.tensor(item if item < count else -2)

    case = Case([450, 300], workers=4)
    case.run(substitutes={ring_items.claim_item: claim}).check()


@pytest.mark.parametrize(
    ("batch", "interleaved"),
    [
        ({"lengths": [450, 64, 65, 1]}, True),
        ({"lengths": [200, 30, 129]}, False),
        ({"lengths": [130, 300, 2], "heads": 5, "q_tokens": 3}, True),
        ({"lengths": [64, 300], "heads": 8, "q_tokens": 2, "page_tokens": 128}, True),
    ],
)
def test_new_tokens_are_written_by_who_reads_them(batch, interleaved):
    case = Case(**batch, workers=3).with_new_tokens(interleaved=interleaved)
    case.run(seed=1).check()
    wanted = case.before.clone()
    rotate_first(case.q.clone(), case.new, wanted, None)
    bits = case.pages.view(torch.int16).int(), wanted.view(torch.int16).int()
    assert int((bits[0] - bits[1]).abs().max()) <= 1  # the norm's sum is in another order
    case.pages[case.places] = case.before[case.places]
    assert torch.equal(case.pages.view(torch.int16), case.before.view(torch.int16))


def test_equal_inputs_give_equal_bits_in_any_order():
    check_equal_bits([Case([300, 70], workers=4, seed=1) for _ in range(3)])


def test_launches_follow_each_other():
    check_launches_in_a_row(Case([900, 70, 3], workers=2))


def test_a_page_outside_of_the_pool_reads_as_zeros_for_its_sequence_alone():
    check_wrong_pages(Case([200, 200], workers=2))


def test_large_scores_keep_their_order():
    check_large_scores(Case([150], workers=1))


# What is found when a step of the protocol is missing.


def _never_heard(line, number, _layout):
    queue, told, _ = line
    mbarrier.wait(told.index(number & 1), number >> 1 & 1)
    return queue.index(number & 1).load(None).max()


@pytest.mark.parametrize(
    ("part", "other", "error"),
    [
        (parts.sync, _nothing, RaceError),
        (ring.fence_async_shared, _nothing, RaceError),
        (ring_items.hear, _never_heard, DeadlockError),
    ],
)
def test_a_missing_step_is_noticed(part, other, error):
    case = Case([500, 200, 64, 64, 64], workers=1)
    with pytest.raises(error):
        case.run(substitutes={part: other})


# --------------------------------------------------------------------------------- launcher


def test_a_workspace_is_for_so_many_items():
    form = MlaRingForm(heads=16, scale=0.1)
    with pytest.raises(KernelArgumentError, match="max_sequences must make at most 65535 items"):
        MlaRingWorkspace(form, max_sequences=1 << 16, device="cpu")
