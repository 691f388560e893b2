"""What tests of both latent attention kernels in Gluon have in common on a GPU: a batch, its
reference, and what is asked of either kernel."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.mla_reference import RANK, WIDTH, mla_reference

TIMES = 100
SCALE = 192**-0.5
RAGGED = tuple(int(n) for n in np.random.default_rng(0).integers(256, 16_385, 64))
SECONDS = 90  # for a first launch, compilation included


class LatentCase:
    """A batch in random pages; all that must not be read is NaN, all that must be written too."""

    form_class: ClassVar[Any]
    workspace_class: ClassVar[Any]
    decode: ClassVar[Callable[..., torch.Tensor]]
    most_error: ClassVar[float]

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        heads: int,
        q_tokens: int = 1,
        page_tokens: int = 64,
        layers: int = 1,
    ) -> None:
        self.lengths = list(lengths)
        self.form = self.form_class(
            heads=heads, q_tokens=q_tokens, page_tokens=page_tokens, scale=SCALE
        )
        used = [-(-length // page_tokens) for length in lengths]
        shape = (sum(used) + 2, layers, page_tokens, WIDTH)
        pool = torch.full(shape, math.nan, device="cuda", dtype=torch.bfloat16)
        self.pages = pool[:, layers - 1]
        table = np.full((len(used), max(*used, 1, 1)), -7, np.int32)
        order = np.random.default_rng(1).permutation(len(pool))
        at, generator = 0, torch.Generator("cuda").manual_seed(1)
        for sequence, (length, count) in enumerate(zip(lengths, used, strict=True)):
            table[sequence, :count] = order[at : at + count]
            at += count
            tokens = torch.randn(count * page_tokens, WIDTH, generator=generator, device="cuda")
            tokens[length:] = math.nan
            mine = torch.from_numpy(table[sequence, :count]).cuda().long()
            self.pages[mine] = tokens.bfloat16().view(count, page_tokens, WIDTH)
        self.table = torch.from_numpy(table).cuda()
        self.shape = (len(used), q_tokens, heads)
        self.q = torch.randn(*self.shape, WIDTH, generator=generator, device="cuda").bfloat16()
        self.workspace = self.planned()
        self.out = torch.full((*self.shape, RANK), math.nan, device="cuda", dtype=torch.bfloat16)

    def planned(self, **options: int) -> Any:
        """A workspace with this batch's plan."""
        workspace = self.workspace_class(
            self.form, max_sequences=len(self.lengths), device="cuda", **options
        )
        workspace.partials.fill_(math.nan)
        workspace.lse.fill_(math.nan)
        workspace.load(workspace.plan(self.lengths))
        return workspace

    def launch(self, **options: Any) -> torch.Tensor:
        options = {"out": self.out, "workspace": self.workspace, "q": self.q} | options
        return type(self).decode(
            options.pop("q"), self.pages, self.table, options.pop("workspace"), **options
        )

    def check(self, most: int = 8, pages: torch.Tensor | None = None) -> None:
        """Of some sequences, the longest and the shortest among them."""
        order = np.argsort(self.lengths, kind="stable")
        chosen = order[np.unique(np.linspace(0, len(order) - 1, most).astype(int))].tolist()
        assert not self.out.isnan().any()
        for at in chosen:
            expected = mla_reference(
                self.q[at : at + 1],
                self.pages if pages is None else pages,
                self.table[at : at + 1].clamp(min=0),
                torch.tensor([self.lengths[at]]),
                scale=SCALE,
            )[0]
            difference = (self.out[at].double() - expected).norm()
            assert difference <= self.most_error * expected.norm(), (at, self.lengths[at])
        self.check_words()

    def check_words(self) -> None:
        """What launches count in is zero again."""
        assert not self.workspace.counters.any()

    def move_far(self) -> None:
        """Has the batch at the end of a pool past 2 to the 31 elements."""
        pages = 60_000  # 2.2 milliards of elements, 4.4 GB
        pool = torch.empty(pages, 64, WIDTH, device="cuda", dtype=torch.bfloat16)
        assert pool.numel() > 2**31
        there = self.table >= 0
        moved = torch.where(there, pages - 1 - self.table, self.table)
        pool[moved[there].long()] = self.pages[self.table[there].long()]
        self.pages, self.table = pool, moved.int()


def ends(file: str) -> None:
    """The kernel ends: its first launch is in a process which is ended when it takes long."""
    try:
        subprocess.run([sys.executable, file], timeout=SECONDS, check=True)
    except subprocess.TimeoutExpired:
        pytest.fail(f"the first launch did not end in {SECONDS} s")


def check_equal_bits(case: LatentCase) -> None:
    """Of a hundred launches."""
    first = case.launch().clone()
    case.check()
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(TIMES):
        case.out.fill_(math.nan)
        differ += (case.launch() != first).sum()
    assert int(differ) == 0
    case.check_words()


def check_replays(case: LatentCase, *others: list[int]) -> None:
    """Of one graph: with the lengths that it was captured with, and with others."""
    case.launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.launch()
    for lengths in (case.lengths, *others):
        case.lengths = lengths
        case.workspace.load(case.workspace.plan(lengths))
        case.out.fill_(math.nan)
        graph.replay()
        case.check()


def check_wrong_pages(case: LatentCase) -> None:
    """Page numbers outside of the pool, of the first of two sequences."""
    good = case.launch().clone()
    for wrong in (-1, len(case.pages), 2**31 - 1, -(2**31)):
        case.table[0, 1] = wrong
        with pytest.raises(KernelArgumentError, match="page_table"):
            case.launch(check=True)
        assert torch.equal(case.launch()[1], good[1])
        assert not case.out.isnan().any()
