"""Latent attention in Gluon: schedules, and the kernels themselves run on the CPU in any order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from kvstore_kernels import mla_gluon_parts as parts
from kvstore_kernels import mla_gluon_seesaw as seesaw
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.mla_gluon import MlaTilesForm, MlaTilesWorkspace, seesaw_kernel
from kvstore_kernels.mla_gluon_parts import sync
from kvstore_kernels.mla_gluon_schedule import (
    NEXT,
    PAIR_TOKENS,
    most_partials,
    most_records,
    plan_tiles,
)
from kvstore_kernels.mla_reference import RANK
from kvstore_kernels.worklist import END, FIRST, NOBODY, SEQUENCE

# ------------------------------------------------------------------------------ schedules

lists = batches(8, [8, 33, 132])


def items_of(schedule):
    records = schedule.records
    return records[records[:, SEQUENCE] != NOBODY]


def loads_of(schedule, workers):
    """Pairs of each worker, along its chain; every record is in one chain."""
    records = schedule.records
    loads, visited = [], 0
    for worker in range(workers):
        row, load = worker, 0
        while row >= 0 and records[row, SEQUENCE] != NOBODY:
            load += max(-(-(records[row, END] - records[row, FIRST]) // PAIR_TOKENS), 1)
            visited += 1
            row = records[row, NEXT]
        loads.append(load)
    assert visited == len(items_of(schedule))
    return np.array(loads)


@given(lists)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_token_of_every_tile_is_attended_to_once(batch):
    lengths, tiles, workers = batch
    items = items_of(plan_tiles(lengths, tiles=tiles, workers=workers))
    check_every_token_once(items, lengths, tiles, PAIR_TOKENS)


@given(lists)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_partials_and_counters_are_numbered_without_gaps_and_few(batch):
    lengths, tiles, workers = batch
    schedule = plan_tiles(lengths, tiles=tiles, workers=workers)
    check_numbers(items_of(schedule), schedule.n_partials, schedule.n_counters)
    assert schedule.n_partials <= most_partials(tiles, workers)
    assert len(schedule.records) <= most_records(len(lengths), tiles, workers)


@given(lists)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_no_team_has_much_more_than_the_mean_and_members_have_the_same(batch):
    lengths, tiles, workers = batch
    loads = loads_of(plan_tiles(lengths, tiles=tiles, workers=workers), workers)
    teams = workers // tiles
    assert (loads[teams * tiles :] == 0).all()
    loads = loads[: teams * tiles].reshape(teams, tiles)
    assert (loads == loads[:, :1]).all()
    # What an item costs beside its tokens is shared out too, a pair each.
    pairs = np.maximum(-(-np.array(lengths) // PAIR_TOKENS), 1) + 1
    # Of 20,000 random batches the worst has 1.12 times the mean, and few pairs more.
    assert loads.max() <= 1.15 * pairs.sum() / teams + 4


@pytest.mark.parametrize(
    ("lengths", "partials", "longest"),
    [
        ([4096] * 64, 0, 32),  # 64 of 66 teams have one each
        ([16384] * 64, 0, 128),
        ([4096], 64, 1),  # a pair each for 64 of 132 workers
        ([131_072], 128, 16),
        ([4096] * 16, 128, 8),  # four equal parts each
    ],
)
def test_sequences_are_cut_where_it_pays(lengths, partials, longest):
    schedule = plan_tiles(lengths, tiles=2, workers=132)
    assert schedule.n_partials == partials
    assert loads_of(schedule, 132).max() == longest
    assert schedule.pairs.sum() == 2 * sum(lengths) // PAIR_TOKENS


def test_no_sequences_no_items():
    schedule = plan_tiles([], tiles=2, workers=4)
    assert not len(items_of(schedule))
    assert (schedule.n_partials, schedule.n_counters) == (0, 0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lengths": [-1]}, "lengths must not be negative"),
        ({"lengths": [2**31 - 1]}, "lengths must fit in 32 bits"),
        ({"lengths": [[1]]}, "lengths must have one dimension"),
        ({"tiles": 5}, "workers must be at least the 5 tiles"),
        ({"tiles": 0}, "workers must be at least"),
    ],
)
def test_wrong_schedules_are_named(wrong, message):
    with pytest.raises(KernelArgumentError, match=message):
        plan_tiles(**{"lengths": [5], "tiles": 2, "workers": 4, **wrong})


# -------------------------------------------------------------------------------- kernels


class Case(LatentCase):
    """For `seesaw_kernel`."""

    form_class = MlaTilesForm

    def __init__(self, lengths, *, heads=64, **options):
        super().__init__(lengths, heads=heads, **options)
        tiles, workers = self.form.tiles, self.workers
        self.schedule = plan_tiles(lengths, tiles=tiles, workers=workers)
        partials = most_partials(tiles, workers)
        self.partials = torch.full((partials, 64, RANK), torch.nan)
        self.lse = torch.full((partials, 2, 64), torch.nan)
        self.counters = torch.zeros(partials, 2, dtype=torch.int32)

    def run(self, *, seed=0, substitutes=None, slow=None):
        records = torch.from_numpy(self.schedule.records)
        buffers = [records, self.out, self.partials, self.lse, self.counters]
        self.launch(seesaw_kernel, buffers, [], seed=seed, substitutes=substitutes, slow=slow)
        return self

    def check(self):
        super().check()
        assert not self.counters.any()


@pytest.mark.parametrize("blocks", range(1, 8))
def test_any_number_of_blocks(blocks):
    for short in (0, 1, 63):
        Case([64 * blocks - short], workers=1, seed=blocks).run(seed=short).check()


BATCHES = {
    "parts of one sequence": {"lengths": [900], "workers": 4},
    "more parts than are merged at a time": {"lengths": [1300], "workers": 11},
    "sequences one after the other": {"lengths": [129, 64, 300, 1, 17], "workers": 1},
    "one without tokens": {"lengths": [0, 450, 0], "workers": 3},
    "two tiles": {"lengths": [700, 130], "heads": 128, "workers": 6},
    "half a tile left": {"lengths": [333, 5], "heads": 96, "workers": 4},
    "tokens in the middle of a tile": {"lengths": [260], "heads": 96, "q_tokens": 2, "workers": 3},
    "four new tokens": {"lengths": [515, 200], "q_tokens": 4, "workers": 9},
    "more new tokens than tokens": {"lengths": [2, 65], "q_tokens": 4, "workers": 4},
    "pages of more blocks": {"lengths": [400, 129], "page_tokens": 192, "workers": 3},
    "few heads": {"lengths": [200], "heads": 16, "workers": 1},
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", BATCHES)
def test_results_in_any_order_of_events(name, seed):
    Case(**BATCHES[name], seed=seed).run(seed=seed).check()


@pytest.mark.parametrize("slow", ["_odd_group", "_loader"])
def test_who_comes_last_misses_nothing(slow):
    """Also where all others go on as far as they can without it."""
    Case([64, 1, 200, 65], workers=1, seed=3).run(slow=slow).check()


def test_equal_inputs_give_equal_bits_in_any_order():
    check_equal_bits([Case([900, 70], workers=5, seed=1) for _ in range(4)])


def test_launches_follow_each_other():
    check_launches_in_a_row(Case([900], workers=4))


def test_a_page_outside_of_the_pool_reads_as_zeros_for_its_sequence_alone():
    check_wrong_pages(Case([200, 200], workers=2))


def test_large_scores_keep_their_order():
    check_large_scores(Case([150], workers=1))


# What is found when a step of the protocol is missing.


def _nothing(*_):
    pass


def _freed_too_early(acc, free):
    sync()
    mbarrier.arrive(free)
    return warpgroup_mma_wait(0, [acc])


def _never_freed(acc, _free):
    return warpgroup_mma_wait(0, [acc])


def _not_waited_for(acc, free):
    sync()
    mbarrier.arrive(free)
    return acc.value


@pytest.mark.parametrize(
    ("part", "other", "error"),
    [
        (parts.sync, _nothing, RaceError),
        (seesaw.fence_async_shared, _nothing, RaceError),
        (seesaw._added, _freed_too_early, RaceError),
        (seesaw._added, _not_waited_for, RaceError),
        (seesaw._added, _never_freed, DeadlockError),
    ],
)
def test_a_missing_step_is_noticed(part, other, error):
    case = Case([500], workers=1)
    with pytest.raises(error):
        case.run(substitutes={part: other})


# ------------------------------------------------------------------------------- launcher


def test_no_more_blocks_wait_for_each_other_than_run_at_once():
    form = MlaTilesForm(heads=64, scale=0.1)
    with pytest.raises(KernelArgumentError, match="workers must be 1 to"):
        MlaTilesWorkspace(form, max_sequences=1, device="cpu", workers=2)
