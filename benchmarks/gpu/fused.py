"""Decode with new tokens: rotated and written by a launch before, and by the decode kernel itself.

`python -m benchmarks.gpu.fused` prints a row for each kernel (`gqa_decode`, `mla_decode` and the
ring of tiles) and shape: microseconds of both ways, taken in turns, and what one launch saves. Each
timed call begins with a launch that writes the queries, keys and values, as a layer's projections
do, since it is behind such a launch that a decode step's next one starts; `producer` is that launch
alone. Calls are in a graph over page tables of their own, together several times as large as the
L2. A row counts only if its pages have the same bytes either way (of latents up to the last bit,
since their norm is summed in another order), its output agrees with float64, and a hundred launches
give the same bits.
"""

from __future__ import annotations

import statistics
import sys
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
import triton

from benchmarks.gpu.timing import graph_us, rotations
from kvstore_kernels.fused import NewLatents, NewTokens, rotate_first
from kvstore_kernels.gqa_decode import gqa_decode
from kvstore_kernels.gqa_form import GqaForm, GqaWorkspace, config_for
from kvstore_kernels.gqa_reference import gqa_reference
from kvstore_kernels.mla_decode import MlaForm, MlaWorkspace, mla_decode
from kvstore_kernels.mla_reference import RANK, WIDTH, mla_reference
from kvstore_kernels.mla_ring import MlaRingForm, MlaRingWorkspace, mla_decode_ring

GQA = GqaForm(heads=32, kv_heads=8, head_dim=128, page_tokens=16)
MLA = MlaForm(heads=16, scale=192**-0.5)
RING = MlaRingForm(heads=16, scale=192**-0.5)
POOL_TOKENS = 1 << 20
ROUNDS = 3
LEAST_CALLS = 4
REPEATS = 100
CHECKED = 4  # sequences that are compared with float64
MAX_ERROR = 5e-3
BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    name: str
    form: GqaForm | MlaForm | MlaRingForm
    lengths: tuple[int, ...]


def rows() -> list[Row]:
    """Small and imbalanced batches, where a launch counts, and large ones."""
    ragged = tuple(np.random.default_rng(63).integers(256, 16_385, 64).tolist())
    gqa = {
        "1 x 4096": (4096,),
        "1 x 32768": (32_768,),
        "4 ragged": (4641, 45_118, 1730, 1696),
        "16 x 1024": (1024,) * 16,
        "16 x 4096": (4096,) * 16,
        "32 x 4096": (4096,) * 32,
        "64 x 4096": (4096,) * 64,
        "64 ragged": ragged,
        "256 x 1024": (1024,) * 256,
    }
    mla = {
        "1 x 4096": (4096,),
        "1 x 65536": (65_536,),
        "4 ragged": (4641, 45_118, 1730, 1696),
        "16 x 4096": (4096,) * 16,
        "64 x 4096": (4096,) * 64,
        "64 x 16384": (16_384,) * 64,
        "64 ragged": ragged,
    }
    more = [
        Row("gqa 16 x 1024, 4 new", replace(GQA, q_tokens=4), gqa["16 x 1024"]),
        Row("gqa 16 x 4096, group of 8", replace(GQA, heads=64), gqa["16 x 4096"]),
        Row("mla 1 x 65536, 2 new", replace(MLA, q_tokens=2), mla["1 x 65536"]),
        Row("mla 16 x 4096, 2 new", replace(MLA, q_tokens=2), mla["16 x 4096"]),
        Row("mla 64 x 4096, 2 new", replace(MLA, q_tokens=2), mla["64 x 4096"]),
    ]
    return [
        *(Row(f"gqa {name}", GQA, lengths) for name, lengths in gqa.items()),
        *(Row(f"mla {name}", MLA, lengths) for name, lengths in mla.items()),
        *(Row(f"ring {name}", RING, lengths) for name, lengths in mla.items()),
        *more,
    ]


class Work(Protocol):
    """One row's inputs."""

    tables: list[torch.Tensor]

    def produce(self) -> object:
        """Writes the queries and the new tokens."""

    def decode(self, at: int, *, fused: bool) -> torch.Tensor:
        """With that page table; gives the output."""

    def written(self, at: int) -> torch.Tensor:
        """The new tokens' bits in the pages, (tokens, ...) int16."""

    def error(self, out: torch.Tensor) -> float:
        """Relative, against float64, with the first table, whose new tokens are in the pages."""


def tables_of(row: Row, page_tokens: int, nbytes: int) -> list[torch.Tensor]:
    """Page tables of so many batches that the L2 holds none of their pages from before."""
    used = [-(-length // page_tokens) for length in row.lengths]
    count = min(rotations(nbytes), POOL_TOKENS // page_tokens // sum(used))
    pages = np.random.default_rng(2).permutation(POOL_TOKENS // page_tokens)
    tables = np.zeros((max(count, 1), len(used), max(used)), np.int32)
    at = 0
    for table in tables:
        for line, needed in zip(table, used, strict=True):
            line[:needed] = pages[at : at + needed]
            at += needed
    return list(torch.from_numpy(tables).cuda())


class Common:
    """What both kinds of attention have."""

    def __init__(self, row: Row, nbytes: int) -> None:
        form = row.form
        self.row, self.shape = row, (len(row.lengths), form.q_tokens)
        self.tables = tables_of(row, form.page_tokens, nbytes)
        self.lengths = torch.tensor(row.lengths, dtype=torch.int32, device="cuda")
        position = self.lengths[:, None] - form.q_tokens + torch.arange(form.q_tokens).cuda()
        column = (position // form.page_tokens).long()
        self.page_ids = [table.gather(1, column).long() for table in self.tables]
        self.offsets = (position % form.page_tokens).long()
        chosen = np.unique(np.linspace(0, len(row.lengths) - 1, CHECKED).astype(int))
        self.chosen = torch.from_numpy(np.argsort(row.lengths, kind="stable")[chosen]).cuda()

    def relative(self, out: torch.Tensor, want: torch.Tensor) -> float:
        """Of the sequences that are checked."""
        return float((out[self.chosen].double() - want).norm() / want.norm())


class GqaWork(Common):
    """Of `gqa_decode`."""

    def __init__(self, row: Row, form: GqaForm, pool: torch.Tensor) -> None:
        super().__init__(row, sum(row.lengths) * form.kv_heads * form.token_bytes)
        self.form = form
        shape = (-1, form.kv_heads, 2, form.page_tokens, form.head_dim)
        self.k, self.v = pool.view(shape).unbind(2)
        heads = form.heads + 2 * form.kv_heads
        self.source = random(*self.shape, heads, form.head_dim)
        self.merged = torch.empty_like(self.source)
        self.cos, self.sin = random(2, *self.shape, form.head_dim // 2).unbind()
        self.workspace = GqaWorkspace(
            form,
            max_sequences=len(row.lengths),
            device="cuda",
            config=config_for(form, len(row.lengths)),
        )
        self.workspace.load(self.workspace.plan(row.lengths))
        self.out = torch.empty(*self.shape, form.heads, form.head_dim, dtype=BF16, device="cuda")

    def produce(self) -> object:
        return self.merged.copy_(self.source)

    def new(self, at: int) -> tuple[torch.Tensor, NewTokens]:
        sizes = [self.form.heads, self.form.kv_heads, self.form.kv_heads]
        q, k, v = self.merged.split_with_sizes(sizes, dim=2)
        return q, NewTokens(
            k=k,
            v=v,
            cos=self.cos,
            sin=self.sin,
            page_ids=self.page_ids[at],
            offsets=self.offsets,
        )

    def decode(self, at: int, *, fused: bool) -> torch.Tensor:
        q, new = self.new(at)
        if not fused:
            q = rotate_first(q, new, self.k, self.v)
        arguments = (q, self.k, self.v, self.tables[at], self.lengths, self.workspace)
        return gqa_decode(*arguments, append=new if fused else None, out=self.out)

    def written(self, at: int) -> torch.Tensor:
        places = (self.page_ids[at].flatten(), slice(None), self.offsets.flatten())
        return torch.cat([self.k[places], self.v[places]], 1).view(torch.int16)

    def error(self, out: torch.Tensor) -> float:
        q, new = self.new(0)
        q = rotate_first(q, new, self.k, self.v)[self.chosen]
        lengths = [self.row.lengths[at] for at in self.chosen.tolist()]
        table = self.tables[0][self.chosen]
        return self.relative(out, gqa_reference(q, self.k, self.v, table, lengths, self.form))


class LatentWork(Common, ABC):
    """What both kernels for latents have."""

    def __init__(self, row: Row, form: MlaForm | MlaRingForm, pool: torch.Tensor) -> None:
        super().__init__(row, sum(row.lengths) * WIDTH * BF16.itemsize)
        self.form = form
        pages = POOL_TOKENS // form.page_tokens
        shape = (pages, form.page_tokens, WIDTH)
        self.pages = pool[: pages * form.page_tokens * WIDTH].view(shape)
        self.source = random(*self.shape, form.heads + 1, WIDTH)
        self.merged = torch.empty_like(self.source)
        self.q_rope = random(*self.shape, form.heads, WIDTH - RANK)
        self.cos, self.sin = random(2, *self.shape, (WIDTH - RANK) // 2).unbind()
        self.norm = random(RANK)
        self.out = torch.empty(*self.shape, form.heads, RANK, dtype=BF16, device="cuda")

    def produce(self) -> object:
        return self.merged.copy_(self.source)

    def new(self, at: int) -> tuple[torch.Tensor, NewLatents]:
        return self.merged[:, :, :-1], NewLatents(
            q_rope=self.q_rope,
            latents=self.merged[:, :, -1],
            norm=self.norm,
            cos=self.cos,
            sin=self.sin,
            page_ids=self.page_ids[at],
            offsets=self.offsets,
        )

    def decode(self, at: int, *, fused: bool) -> torch.Tensor:
        q, new = self.new(at)
        if not fused:
            q = rotate_first(q, new, self.pages, None)
        return self.attend(q, at, new if fused else None)

    @abstractmethod
    def attend(self, q: torch.Tensor, at: int, append: NewLatents | None) -> torch.Tensor:
        """By the kernel."""

    def written(self, at: int) -> torch.Tensor:
        return self.pages[self.page_ids[at].flatten(), self.offsets.flatten()].view(torch.int16)

    def error(self, out: torch.Tensor) -> float:
        q, new = self.new(0)
        q = rotate_first(q, new, self.pages, None)[self.chosen]
        table, lengths = self.tables[0][self.chosen], self.lengths[self.chosen]
        want = mla_reference(q, self.pages, table, lengths, scale=self.form.scale)
        return self.relative(out, want)


class MlaWork(LatentWork):
    """Of `mla_decode`."""

    def __init__(self, row: Row, form: MlaForm, pool: torch.Tensor) -> None:
        super().__init__(row, form, pool)
        self.workspace = MlaWorkspace(form, max_sequences=len(row.lengths), device="cuda")
        self.workspace.load(self.workspace.plan(row.lengths))

    def attend(self, q: torch.Tensor, at: int, append: NewLatents | None) -> torch.Tensor:
        arguments = (q, self.pages, self.tables[at], self.lengths, self.workspace)
        return mla_decode(*arguments, append=append, out=self.out)


class RingWork(LatentWork):
    """Of `mla_decode_ring`."""

    def __init__(self, row: Row, form: MlaRingForm, pool: torch.Tensor) -> None:
        super().__init__(row, form, pool)
        self.workspace = MlaRingWorkspace(form, max_sequences=len(row.lengths), device="cuda")
        self.workspace.load(self.workspace.plan(row.lengths))

    def attend(self, q: torch.Tensor, at: int, append: NewLatents | None) -> torch.Tensor:
        arguments = (q, self.pages, self.tables[at], self.workspace)
        return mla_decode_ring(*arguments, append=append, out=self.out)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=BF16)


def check(work: Work) -> float:
    """The error; raises ArithmeticError where something is wrong."""
    work.produce()
    work.decode(0, fused=False)
    expected = work.written(0).clone()
    work.produce()
    first = work.decode(0, fused=True).clone()
    written = work.written(0).clone()
    # Neighbours in bfloat16 are neighbours as integers.
    apart = (written.int() - expected.int()).abs()
    last_bits = isinstance(work, LatentWork)
    if int(apart.max()) > int(last_bits) or (apart > 0).float().mean() > 1e-2:
        raise ArithmeticError(f"pages differ in {int((apart > 0).sum())} places")
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        differ += (work.decode(0, fused=True) != first).sum()
        differ += (work.written(0) != written).sum()
    work.produce()
    error = work.error(first)
    if int(differ) or not error <= MAX_ERROR:  # NaN too
        raise ArithmeticError(f"relative error {error:.1e}, {int(differ)} bits differ")
    return error


def line(work: Work, name: str) -> str:
    """Both ways in turns; the median of each."""
    error = check(work)
    # Also where one batch is larger than the L2 a graph has several calls.
    count = [*range(len(work.tables))] * -(-LEAST_CALLS // len(work.tables))

    def two(at: int) -> Callable[[], object]:
        return lambda: (work.produce(), work.decode(at, fused=False))

    def one(at: int) -> Callable[[], object]:
        return lambda: (work.produce(), work.decode(at, fused=True))

    before, after = [], []
    for _ in range(ROUNDS):
        before.append(graph_us([two(at) for at in count]))
        after.append(graph_us([one(at) for at in count]))
    alone = graph_us([work.produce for _ in count])
    two_us, one_us = statistics.median(before), statistics.median(after)
    return (
        f"{name:28}{two_us:10.2f}{one_us:10.2f}{two_us - one_us:8.2f}{1 - one_us / two_us:8.1%}"
        f"{alone:10.2f}{error:10.1e}"
    )


def main() -> None:
    """Prints a table; exits with 1 where a row failed."""
    begun = time.monotonic()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}")
    print(f"{'us with the producer':28}{'two':>10}{'one':>10}{'saved':>8}{'':8}{'producer':>10}")
    torch.manual_seed(1)
    pool = torch.empty(POOL_TOKENS * GQA.kv_heads * GQA.token_bytes // 2, device="cuda", dtype=BF16)
    for at in range(0, len(pool), 1 << 27):
        pool[at : at + (1 << 27)].normal_()
    failed = []
    for row in rows():
        try:
            print(line(work_of(row, pool), row.name), flush=True)
        except Exception:  # the other rows are still worth their time
            traceback.print_exc(limit=4)
            failed.append(row.name)
    print(f"{time.monotonic() - begun:.0f} s")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


def work_of(row: Row, pool: torch.Tensor) -> Work:
    """Its inputs over that pool."""
    if isinstance(row.form, GqaForm):
        return GqaWork(row, row.form, pool)
    if isinstance(row.form, MlaRingForm):
        return RingWork(row, row.form, pool)
    return MlaWork(row, row.form, pool)


if __name__ == "__main__":
    main()
