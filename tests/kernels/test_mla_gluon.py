"""Latent attention in Gluon: schedules, and the kernels themselves run on the CPU in any order."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels.gluon_on_cpu import Boxes, DeadlockError, RaceError, launch
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma_wait

from kvstore_kernels import mla_gluon_parts as parts
from kvstore_kernels import mla_gluon_seesaw as seesaw
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.mla_gluon import (
    MlaTilesForm,
    MlaTilesWorkspace,
    _described,
    mla_decode_tiles,
    seesaw_kernel,
)
from kvstore_kernels.mla_gluon_parts import sync
from kvstore_kernels.mla_gluon_schedule import (
    LENGTH,
    NEXT,
    PAIR_TOKENS,
    most_partials,
    most_records,
    plan_tiles,
)
from kvstore_kernels.mla_reference import RANK, WIDTH, mla_reference
from kvstore_kernels.worklist import (
    COUNTER,
    END,
    FIRST,
    GROUP,
    NOBODY,
    PART,
    PARTIAL,
    PARTS,
    SEQUENCE,
    WHOLE,
)

SCALE = 192**-0.5

# ------------------------------------------------------------------------------ schedules

batches = st.tuples(
    st.lists(st.one_of(st.integers(0, 300), st.integers(0, 140_000)), min_size=1, max_size=40),
    st.integers(1, 8),
    st.sampled_from([8, 33, 132]),
)


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


@given(batches)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_every_token_of_every_tile_is_attended_to_once(batch):
    lengths, tiles, workers = batch
    items = items_of(plan_tiles(lengths, tiles=tiles, workers=workers))
    order = np.lexsort((items[:, PART], items[:, GROUP], items[:, SEQUENCE]))
    rows = iter(items[order])
    for sequence, length in enumerate(lengths):
        for tile in range(tiles):
            at, part, count = 0, 0, 1
            while part < count:
                row = next(rows)
                count = row[PARTS]
                assert row[[SEQUENCE, GROUP, FIRST, PART, LENGTH]].tolist() == [
                    sequence, tile, at, part, length,
                ]  # fmt: skip
                at, part = row[END], part + 1
                assert at == length or at % PAIR_TOKENS == 0
            assert at == length
    assert next(rows, None) is None


@given(batches)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_partials_and_counters_are_numbered_without_gaps_and_few(batch):
    lengths, tiles, workers = batch
    schedule = plan_tiles(lengths, tiles=tiles, workers=workers)
    items = items_of(schedule)
    whole = items[:, PARTS] == 1
    assert (items[whole][:, [PARTIAL, COUNTER]] == WHOLE).all()
    cut = items[~whole]
    assert sorted(cut[:, PARTIAL]) == list(range(schedule.n_partials))
    meetings = {(*row[[SEQUENCE, GROUP]], row[COUNTER], row[PARTIAL] - row[PART]) for row in cut}
    assert sorted(meeting[2] for meeting in meetings) == list(range(schedule.n_counters))
    assert schedule.n_partials <= most_partials(tiles, workers)
    assert len(schedule.records) <= most_records(len(lengths), tiles, workers)


@given(batches)
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
    assert loads.max() <= pairs.sum() / teams + 4


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


class Case:
    """A batch in random pages; all that must not be read is NaN, all that must be written too."""

    def __init__(self, lengths, *, heads=64, q_tokens=1, workers=2, page_tokens=64, seed=0):
        random = torch.Generator().manual_seed(seed)
        self.form = MlaTilesForm(
            heads=heads, q_tokens=q_tokens, page_tokens=page_tokens, scale=SCALE
        )
        self.workers, self.lengths = workers, lengths
        self.schedule = plan_tiles(lengths, tiles=self.form.tiles, workers=workers)
        used = [-(-length // page_tokens) for length in lengths]
        self.pages = torch.full((sum(used) + 2, page_tokens, WIDTH), math.nan).bfloat16()
        self.table = torch.full((len(lengths), max(*used, 1, 1)), -7, dtype=torch.int32)
        numbers = torch.randperm(len(self.pages), generator=random).int()
        for sequence, (length, count) in enumerate(zip(lengths, used, strict=True)):
            mine, numbers = numbers[:count], numbers[count:]
            self.table[sequence, :count] = mine
            tokens = torch.full((count * page_tokens, WIDTH), math.nan)
            tokens[:length] = torch.randn(length, WIDTH, generator=random)
            self.pages[mine] = tokens.view(count, page_tokens, WIDTH).bfloat16()
        shape = (len(lengths), q_tokens, heads)
        self.q = torch.randn(*shape, WIDTH, generator=random).bfloat16()
        partials = most_partials(self.form.tiles, workers)
        self.out = torch.full((*shape, RANK), math.nan).bfloat16()
        self.partials = torch.full((partials, 64, RANK), math.nan)
        self.lse = torch.full((partials, 2, 64), math.nan)
        self.counters = torch.zeros(partials, 2, dtype=torch.int32)

    def run(self, *, seed=0, substitutes=None):
        form = self.form
        launch(
            seesaw_kernel,
            self.workers,
            Boxes(self.q.flatten(1, 2)),
            Boxes(self.pages),
            self.table,
            torch.from_numpy(self.schedule.records),
            self.out,
            self.partials,
            self.lse,
            self.counters,
            form.scale * math.log2(math.e),
            self.table.stride(0),
            form.page_tokens,
            form.rows,
            form.heads,
            form.q_tokens,
            seed=seed,
            substitutes={
                parts.viewed: "viewed",
                parts.load_panel: "load_panel",
                parts.sync: "sync",
                **(substitutes or {}),
            },
        )
        return self

    def expected(self):
        return mla_reference(
            self.q,
            self.pages.nan_to_num(),
            self.table.clamp(min=0),
            torch.tensor(self.lengths),
            scale=SCALE,
        )

    def check(self):
        torch.testing.assert_close(self.out.double(), self.expected(), rtol=0.02, atol=0.01)
        error = (self.out.double() - self.expected()).norm() / self.expected().norm()
        assert error < 5e-3
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


def test_equal_inputs_give_equal_bits_in_any_order():
    outputs = [Case([900, 70], workers=5, seed=1).run(seed=seed).out for seed in range(4)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def test_launches_follow_each_other():
    case = Case([900], workers=4).run(seed=0)
    case.out.fill_(math.nan)
    case.run(seed=1).check()


def test_a_page_outside_of_the_pool_reads_as_zeros_for_its_sequence_alone():
    case = Case([200, 200], workers=2)
    expected = case.expected()
    case.table[0, 1] = 2**31 - 1
    case.run()
    assert not case.out.isnan().any()
    torch.testing.assert_close(case.out[1].double(), expected[1], rtol=0.02, atol=0.01)


def test_large_scores_keep_their_order():
    case = Case([150], workers=1)
    case.q *= 30
    case.run()
    assert (case.out.double() - case.expected()).norm() / case.expected().norm() < 5e-3


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


def arguments(**changes):
    form = MlaTilesForm(heads=64, scale=SCALE)
    workspace = MlaTilesWorkspace(form, max_sequences=2, device="cpu")
    workspace.load(workspace.plan([100, 64]))
    right = {
        "q": torch.zeros(2, 1, 64, WIDTH, dtype=torch.bfloat16),
        "pages": torch.zeros(4, 64, WIDTH, dtype=torch.bfloat16),
        "page_table": torch.zeros(2, 2, dtype=torch.int32),
        "workspace": workspace,
    }
    return {**right, **changes}


def bf16(*shape):
    return torch.zeros(*shape, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": bf16(3, 1, 64, WIDTH)}, "q must have shape"),
        ({"q": torch.zeros(2, 1, 64, WIDTH)}, "q must be bfloat16"),
        ({"q": bf16(2, 1, 64, WIDTH + 4)[..., :WIDTH]}, "q must have its address and strides"),
        ({"pages": bf16(4, 32, WIDTH)}, "pages must have shape"),
        ({"pages": bf16(0, 64, WIDTH)}, "pages must not be empty"),
        ({"pages": bf16(4, 64, WIDTH + 1)[..., 1:]}, "pages must have its address and strides"),
        ({"pages": bf16(4, WIDTH, 64).mT}, "pages must have neighbouring elements"),
        ({"page_table": torch.zeros(2, 2)}, "page_table must be int32"),
        ({"page_table": torch.zeros(2, 1).int()}, "page_table must have pages for 100 tokens"),
        ({"page_table": torch.full((2, 2), 4).int(), "check": True}, "page_table must have pages"),
        ({"out": bf16(2, 1, 64, WIDTH)}, "out must have shape"),
        ({"out": bf16(2, 1, 64, 1024)[..., :512]}, "out must be contiguous"),
        ({}, "q must be on a CUDA device, not cpu"),
    ],
)
def test_wrong_arguments_are_named(wrong, message):
    with pytest.raises(KernelArgumentError, match=message):
        mla_decode_tiles(**arguments(**wrong))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"heads": 0}, "heads must be"),
        ({"scale": 0.0}, "scale must be"),
        ({"q_tokens": 5}, "q_tokens must be 1 to 4"),
        ({"page_tokens": 96}, "page_tokens must be a multiple of 64"),
    ],
)
def test_wrong_forms_are_named(wrong, message):
    with pytest.raises(KernelArgumentError, match=message):
        MlaTilesForm(**{"heads": 64, "scale": SCALE, **wrong})


def test_a_workspace_is_for_so_many_sequences():
    workspace = arguments()["workspace"]
    with pytest.raises(KernelArgumentError, match="schedule must be for at most 2 sequences"):
        workspace.load(workspace.plan([1, 2, 3]))
    with pytest.raises(KernelArgumentError, match="max_sequences must be at least 1"):
        MlaTilesWorkspace(workspace.form, max_sequences=0, device="cpu")
    with pytest.raises(KernelArgumentError, match="workers must be 1 to"):
        MlaTilesWorkspace(workspace.form, max_sequences=1, device="cpu", workers=2)


def test_a_layer_of_a_pool_past_2_to_the_31_elements():
    pool = torch.empty(1500, 61, 64, WIDTH, dtype=torch.bfloat16)  # never touched
    assert pool.numel() > 2**31
    described = _described(pool[:, 60])
    assert list(described.shape) == [1500, 64, WIDTH]
    assert list(described.strides) == [61 * 64 * WIDTH, WIDTH, 1]
    assert described.base.data_ptr() == pool.data_ptr() + 60 * 64 * WIDTH * 2
