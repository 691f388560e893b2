"""What tests of both latent attention kernels in Gluon have in common: a batch for the emulator,
and what holds for any list of items."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from hypothesis import strategies as st
from kernels.gluon_on_cpu import Boxes, launch

from kvstore_kernels import mla_gluon_parts as parts
from kvstore_kernels.mla_hopper import MlaHopperForm
from kvstore_kernels.mla_reference import RANK, WIDTH, mla_reference
from kvstore_kernels.worklist import (
    COUNTER,
    END,
    FIRST,
    GROUP,
    LENGTH,
    PART,
    PARTIAL,
    PARTS,
    SEQUENCE,
    WHOLE,
)

SCALE = 192**-0.5

Items = npt.NDArray[np.int32]
Substitutes = dict[Any, str | Callable[..., Any]]


class LatentCase:
    """A batch in random pages; all that must not be read is NaN, all that must be written too."""

    form_class: ClassVar[type[MlaHopperForm]]

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        heads: int,
        q_tokens: int = 1,
        workers: int = 2,
        page_tokens: int = 64,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)
        self.form = self.form_class(
            heads=heads, q_tokens=q_tokens, page_tokens=page_tokens, scale=SCALE
        )
        self.workers, self.lengths = workers, lengths
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
        self.out = torch.full((*shape, RANK), math.nan).bfloat16()

    def launch(
        self,
        kernel: Any,
        buffers: Sequence[torch.Tensor],
        more: Sequence[Any],
        *,
        seed: int,
        substitutes: Substitutes | None,
        slow: str | None = None,
    ) -> None:
        """As `mla_hopper.launch`, in the emulator; slow: see there."""
        form = self.form
        launch(
            kernel,
            self.workers,
            Boxes(self.q.flatten(1, 2)),
            Boxes(self.pages),
            self.table,
            *buffers,
            form.scale * math.log2(math.e),
            self.table.stride(0),
            form.page_tokens,
            form.rows,
            form.heads,
            form.q_tokens,
            *more,
            seed=seed,
            substitutes={
                parts.viewed: "viewed",
                parts.load_panel: "load_panel",
                parts.sync: "sync",
                **(substitutes or {}),
            },
            slow=slow,
        )

    def expected(self) -> torch.Tensor:
        return self.reference(self.q, self.pages)

    def reference(self, q: torch.Tensor, pages: torch.Tensor) -> torch.Tensor:
        table, lengths = self.table.clamp(min=0), torch.tensor(self.lengths)
        return mla_reference(q, pages.nan_to_num(), table, lengths, scale=SCALE)

    def check(self, *, of_largest: bool = False) -> None:
        """of_largest: results may be apart by a part of the largest, where that is over 1."""
        wanted = self.expected()
        atol = 0.01 * (max(1.0, float(wanted.abs().max())) if of_largest else 1.0)
        torch.testing.assert_close(self.out.double(), wanted, rtol=0.02, atol=atol)
        assert self.error() < 5e-3

    def error(self) -> float:
        wanted = self.expected()
        return float((self.out.double() - wanted).norm() / wanted.norm())


# ----------------------------------------------------------------------------------- results


def check_equal_bits(cases: Sequence[Any]) -> None:
    """Of equal cases, each run in another order of events."""
    outputs = [case.run(seed=seed).out for seed, case in enumerate(cases)]
    assert all(torch.equal(outputs[0], other) for other in outputs[1:])


def check_launches_in_a_row(case: Any) -> None:
    case.run(seed=0)
    case.out.fill_(math.nan)
    case.run(seed=1).check()


def check_wrong_pages(case: Any) -> None:
    """A page of the first of two sequences is outside of the pool."""
    expected = case.expected()
    case.table[0, 1] = 2**31 - 1
    case.run()
    assert not case.out.isnan().any()
    torch.testing.assert_close(case.out[1].double(), expected[1], rtol=0.02, atol=0.01)


def check_large_scores(case: Any) -> None:
    case.q *= 30
    case.run()
    assert case.error() < 5e-3


# ------------------------------------------------------------------------------------- items


def batches(most_groups: int, workers: Sequence[int]) -> st.SearchStrategy[Any]:
    """(lengths, groups of query rows, workers)."""
    lengths = st.one_of(st.integers(0, 300), st.integers(0, 140_000))
    return st.tuples(
        st.lists(lengths, min_size=1, max_size=40),
        st.integers(1, most_groups),
        st.sampled_from(workers),
    )


def check_every_token_once(items: Items, lengths: Sequence[int], groups: int, unit: int) -> None:
    """By every group of query rows; cuts are at multiples of the unit."""
    rows = iter(items[np.lexsort((items[:, PART], items[:, GROUP], items[:, SEQUENCE]))])
    for sequence, length in enumerate(lengths):
        for group in range(groups):
            at, part, count = 0, 0, 1
            while part < count:
                row = next(rows)
                count = row[PARTS]
                assert row[[SEQUENCE, GROUP, FIRST, PART, LENGTH]].tolist() == [
                    sequence, group, at, part, length,
                ]  # fmt: skip
                at, part = row[END], part + 1
                assert at == length or at % unit == 0
            assert at == length
    assert next(rows, None) is None


def check_numbers(items: Items, n_partials: int, n_counters: int) -> None:
    """Partial results and counters are numbered without gaps; whole sequences have none."""
    whole = items[:, PARTS] == 1
    assert (items[whole][:, [PARTIAL, COUNTER]] == WHOLE).all()
    cut = items[~whole]
    assert sorted(cut[:, PARTIAL]) == list(range(n_partials))
    meetings = {(*row[[SEQUENCE, GROUP]], row[COUNTER], row[PARTIAL] - row[PART]) for row in cut}
    assert sorted(meeting[2] for meeting in meetings) == list(range(n_counters))
