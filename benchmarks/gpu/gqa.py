"""Paged decode attention: microseconds per call, and how near that is to only reading the KV.

32 query heads, 8 KV heads of 128, bfloat16, pages of 16 tokens scattered at random over one pool.
Each call is timed in a graph of several that use other pages each, together eleven times as large
as the L2. The floor is a kernel that reads as many bytes that lie densely, and does nothing else,
in the same run; beside it is one that reads the same pages. `ring` is `gqa_decode_ring`.
FlashInfer is timed beside it where it is installed. Every row of both is checked against float64
before it counts. `--sweep` times several configurations.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name every torch program uses
import triton
import triton.language as tl
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.flashinfer_decode import BACKENDS, Pages, backends
from benchmarks.gpu.timing import graph_us, rotations
from kvstore_kernels.gqa_decode import gqa_decode
from kvstore_kernels.gqa_form import GqaConfig, GqaForm, GqaWorkspace, config_for
from kvstore_kernels.gqa_reference import gqa_reference
from kvstore_kernels.gqa_ring import GqaRingWorkspace, gqa_decode_ring

FORM = GqaForm(heads=32, kv_heads=8, head_dim=128, page_tokens=16)
LARGEST_TOKENS = 256 * 8192
MAX_ERROR = 5e-3
READ_BLOCK = 8192  # int32 that one program reads
READ_PAGES = 4  # pages, as many


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. flashinfer, cudnn: microseconds recorded on an H200, of version 0.7.2
    the best of four back-ends, and of cuDNN on dense KV."""

    name: str
    lengths: Sequence[int]
    flashinfer: float | None = None
    cudnn: float | None = None
    form: GqaForm = FORM

    @property
    def nbytes(self) -> int:
        return sum(self.lengths) * self.form.kv_heads * self.form.token_bytes


def rows() -> list[Row]:
    """The table, and forms that are its neighbours."""
    ragged = np.random.default_rng(63).integers(256, 16385, 64).tolist()  # 8190 on average
    skewed = np.random.default_rng(5).pareto(1.2, 30) * 1000
    return [
        Row("1 x 4096", [4096], 12.6, 11.7),
        Row("1 x 32768", [32768], 42.7, 39.2),
        Row("16 x 1024", [1024] * 16, 22.0, 19.5),
        Row("16 x 4096", [4096] * 16, 73.1, 64.0),
        Row("64 x 8192", [8192] * 64, 482, 478),
        Row("256 x 1024", [1024] * 256, 260, 246),
        Row("256 x 8192", [8192] * 256, 1931, 1921),
        Row("64 of 256..16384", ragged, 562),
        Row("4 ragged", [4641, 45118, 1730, 1696]),
        Row("9 x 8192", [8192] * 9),
        Row("20 x 3000", [3000] * 20),
        Row("30 of a Pareto", np.clip(skewed.astype(int) + 64, 64, 60_000).tolist()),
        Row("1 x 65536", [65_536]),
        Row("64 x 8192, float8", [8192] * 64, form=replace(FORM, kv_dtype=torch.float8_e4m3fn)),
        Row("16 x 4096, 4 new", [4096] * 16, form=replace(FORM, q_tokens=4)),
        Row("4 ragged, 4 new", [4641, 45118, 1730, 1696], form=replace(FORM, q_tokens=4)),
    ]


def configurations(form: GqaForm) -> dict[str, GqaConfig]:
    """What a sweep tries; the first is what the launcher takes by itself."""
    ours = config_for(form)
    tile = ours.tile_tokens
    return {
        "default": ours,
        "no overlap": replace(ours, overlap=False),
        "parts >= 128": replace(ours, min_tokens=128),
        "parts >= 256": replace(ours, min_tokens=256),
        "item costs 64": replace(ours, item_tokens=64, cut_tokens=64),
        "item costs 256": replace(ours, item_tokens=256, cut_tokens=256),
        "equal parts, item costs 64": replace(ours, item_tokens=64, cut_tokens=None),
        "1 block": replace(ours, blocks_per_sm=1),
        "3 blocks, 3 stages": replace(
            ours, blocks_per_sm=3, num_stages=3, merge_elements=ours.merge_elements // 2
        ),
        "4 warps, half tiles": replace(
            ours, tile_tokens=tile // 2, num_stages=4, num_warps=4, blocks_per_sm=2
        ),
    }


class Bench:
    """The pools, and what is timed over them."""

    def __init__(self) -> None:
        self.generator = torch.Generator("cuda").manual_seed(1)
        self.pools = {torch.bfloat16: self._pool(FORM, LARGEST_TOKENS)}
        self.sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def _pool(self, form: GqaForm, tokens: int) -> torch.Tensor:
        """[pages, kv_heads, 2, page_tokens, head_dim] of normal numbers."""
        pages = tokens // form.page_tokens
        shape = (pages, form.kv_heads, 2, form.page_tokens, form.head_dim)
        pool = torch.empty(shape, dtype=form.kv_dtype, device="cuda")
        for at in range(0, pages, 8192):  # float32 of all of it would not fit
            chunk = pool[at : at + 8192]
            numbers = torch.randn(chunk.shape, generator=self.generator, device="cuda")
            chunk.copy_(numbers)
        return pool

    def pool(self, form: GqaForm) -> torch.Tensor:
        if form.kv_dtype not in self.pools:
            self.pools[form.kv_dtype] = self._pool(form, LARGEST_TOKENS // 4)
        return self.pools[form.kv_dtype]

    def inputs(self, row: Row) -> list[torch.Tensor]:
        """Page tables, each of other pages where the pool has them."""
        needed = [-(-length // row.form.page_tokens) for length in row.lengths]
        pages = len(self.pool(row.form))
        fit = max(1, pages // sum(needed))
        order = torch.randperm(pages, generator=self.generator, device="cuda").int()
        return [
            self._table(needed, order[i * sum(needed) :])
            for i in range(min(fit, rotations(row.nbytes)))
        ]

    def _table(self, needed: list[int], order: torch.Tensor) -> torch.Tensor:
        table = torch.full((len(needed), max(needed)), -1, dtype=torch.int32, device="cuda")
        ends = list(itertools.accumulate(needed))
        for sequence, (count, end) in enumerate(zip(needed, ends, strict=True)):
            table[sequence, :count] = order[end - count : end]
        return table

    def ours(self, row: Row, config: GqaConfig) -> tuple[float, float]:
        """(microseconds, relative error) of `gqa_decode`."""
        k, v = self.pool(row.form).unbind(2)
        workspace = GqaWorkspace(
            row.form, max_sequences=len(row.lengths), device="cuda", config=config
        )
        workspace.load(workspace.plan(row.lengths))
        lengths = torch.tensor(row.lengths, dtype=torch.int32, device="cuda")

        def launch(q: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> object:
            return gqa_decode(q, k, v, table, lengths, workspace, out=out)

        return self._checked(row, launch)

    def ring(self, row: Row) -> tuple[float, float]:
        """The same of `gqa_decode_ring`. Raises KernelArgumentError for forms it does not take."""
        k, v = self.pool(row.form).unbind(2)
        workspace = GqaRingWorkspace(row.form, max_sequences=len(row.lengths), device="cuda")
        workspace.load(workspace.plan(row.lengths))

        def launch(q: torch.Tensor, table: torch.Tensor, out: torch.Tensor) -> object:
            return gqa_decode_ring(q, k, v, table, workspace, out=out)

        return self._checked(row, launch)

    def _checked(
        self, row: Row, launch: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], object]
    ) -> tuple[float, float]:
        """(microseconds, relative error). launch: with queries, a page table and an output."""
        form, pool = row.form, self.pool(row.form)
        k, v = pool.unbind(2)
        tables = self.inputs(row)
        shape = (len(row.lengths), form.q_tokens, form.heads, form.head_dim)
        queries = [self._queries(shape) for _ in tables]
        outs = [torch.full_like(q, torch.nan) for q in queries]
        micros = graph_us(
            [
                partial(launch, q, table, out)
                for q, table, out in zip(queries, tables, outs, strict=True)
            ]
        )
        error = 0.0
        for i in {0, len(tables) - 1}:
            want = gqa_reference(queries[i], k, v, tables[i], row.lengths, form)
            error = max(error, float((outs[i].double() - want).norm() / want.norm()))
        if not error <= MAX_ERROR:  # NaN too
            raise ArithmeticError(f"relative error {error:.1e}")
        return micros, error

    def _queries(self, shape: tuple[int, ...]) -> torch.Tensor:
        numbers = torch.randn(shape, generator=self.generator, device="cuda")
        return numbers.to(torch.bfloat16)

    def read_us(self, row: Row) -> float:
        """Time to read as many bytes, with the same rotation."""
        words = self.pool(row.form).view(-1).view(torch.int32)
        count = row.nbytes // 4
        fit = max(1, len(words) // count)
        parts = [words[i * count : (i + 1) * count] for i in range(min(fit, rotations(row.nbytes)))]
        grid = (triton.cdiv(count, READ_BLOCK),)
        sink = self.sink

        def call(part: torch.Tensor) -> Callable[[], object]:
            return lambda: read_kernel[grid](part, sink, count, READ_BLOCK, num_warps=4)

        return graph_us([call(part) for part in parts])

    def pages_us(self, row: Row) -> float:
        """Time to read the pages of as many sequences, scattered as for the others."""
        form, pool = row.form, self.pool(row.form).view(torch.int8).view(torch.int32)
        words = pool.stride(1)  # of a page and head
        sink = self.sink

        def call(table: torch.Tensor) -> Callable[[], object]:
            columns = triton.cdiv(table.shape[1], READ_PAGES)
            grid = (form.kv_heads, columns, len(table))
            return lambda: read_pages_kernel[grid](
                pool, table, sink, table.shape[1], form.kv_heads, READ_PAGES, words, num_warps=4
            )

        return graph_us([call(table) for table in self.inputs(row)])

    def dense_us(self, row: Row, backend: SDPBackend) -> float:
        """torch's attention over KV that lies densely, one token of each sequence."""
        form, batch, context = row.form, len(row.lengths), row.lengths[0]
        flat = self.pools[torch.bfloat16].view(-1)
        half, plane = len(flat) // 2, row.nbytes // 4
        shape = (batch, form.kv_heads, context, form.head_dim)
        q = self._queries((batch, form.heads, 1, form.head_dim))
        fit = min(half // plane, rotations(row.nbytes))

        def call(i: int) -> Callable[[], object]:
            k = flat[i * plane : (i + 1) * plane].view(shape)
            v = flat[half + i * plane : half + (i + 1) * plane].view(shape)
            return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        with sdpa_kernel(backend):
            return graph_us([call(i) for i in range(fit)])

    def flashinfer_us(self, row: Row, backend: str) -> float:
        """FlashInfer over the same pages, checked too. Raises ImportError without it."""
        make = backends()[backend]
        k, v = self.pool(row.form).unbind(2)
        tables = self.inputs(row)
        q = self._queries((len(row.lengths), row.form.heads, row.form.head_dim))
        calls = [make(q, Pages(row.form, k, v, table, row.lengths)) for table in tables]
        micros = graph_us(calls)
        for call, table in ((calls[0], tables[0]), (calls[-1], tables[-1])):
            got = call()[:, None].double()
            want = gqa_reference(q[:, None], k, v, table, row.lengths, row.form)
            error = float((got - want).norm() / want.norm())
            if not error <= MAX_ERROR:
                raise ArithmeticError(f"relative error {error:.1e}")
        return micros


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(words_ptr, sink_ptr, count, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Reads all words; stores only what keeps the compiler from leaving the loads out."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(words_ptr + at, mask=at < count, other=0))
    if total == 0x5EED5EED:
        tl.store(sink_ptr, total)


@triton.jit  # type: ignore[untyped-decorator]
def read_pages_kernel(  # type: ignore[no-untyped-def] # noqa: PLR0917
    pool_ptr,
    table_ptr,
    sink_ptr,
    columns,
    HEADS: tl.constexpr,  # noqa: N803
    PAGES: tl.constexpr,  # noqa: N803
    WORDS: tl.constexpr,  # noqa: N803
):
    """`read_kernel` of one head's words of some pages of a sequence."""
    column = tl.program_id(1) * PAGES + tl.arange(0, PAGES)
    at = table_ptr + tl.program_id(2) * columns + column
    page = tl.load(at, mask=column < columns, other=-1).to(tl.int64)[:, None]
    place = (page * HEADS + tl.program_id(0)) * WORDS + tl.arange(0, WORDS)[None, :]
    words = tl.load(pool_ptr + place, mask=page >= 0, other=0)
    total = tl.sum(tl.sum(words, 1), 0)
    if total == 0x5EED5EED:
        tl.store(sink_ptr, total)


def attempt(measure: Callable[[], float]) -> float | None:
    """None where there is no such competitor, or it fails."""
    try:
        return measure()
    except ImportError:
        return None
    except Exception as error:  # a competitor's failure says nothing of ours
        print(
            f"  a competitor failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )
        return None


def table(bench: Bench) -> list[str]:
    """Prints a line for each row; gives the names of those that failed."""
    print(
        f"{'us per call':22}{'ours':>8}{'ring':>8}{'GB/s':>7}{'floor':>8}{'of it':>7}{'pages':>8}"
        f"{'error':>9}{'cuDNN':>8}{'flash':>8}{'FlashInfer':>11}{'(recorded)':>11}"
        f"{'cuDNN (recorded)':>17}  FlashInfer's back-ends"
    )
    failed = []
    for row in rows():
        try:
            print(line(bench, row), flush=True)
        except Exception as error:  # the other rows are still worth their time
            failed.append(row.name)
            print(f"{row.name:22}FAILED: {type(error).__name__}: {error}", flush=True)
    return failed


def line(bench: Bench, row: Row) -> str:
    """One row, measured and checked."""
    micros, error = bench.ours(row, config_for(row.form, len(row.lengths)))
    floor = bench.read_us(row)
    ring = cudnn = flash = flashinfer = None
    tried: dict[str, float] = {}
    if row.form == FORM:
        ring = bench.ring(row)[0]
        for name in BACKENDS:
            found = attempt(partial(bench.flashinfer_us, row, name))
            if found is not None:
                tried[name] = found
        flashinfer = min(tried.values(), default=None)
        if len(set(row.lengths)) == 1:
            cudnn = attempt(lambda: bench.dense_us(row, SDPBackend.CUDNN_ATTENTION))
            flash = attempt(lambda: bench.dense_us(row, SDPBackend.FLASH_ATTENTION))
    others = zip(
        (cudnn, flash, flashinfer, row.flashinfer, row.cudnn), (8, 8, 11, 11, 17), strict=True
    )
    return (
        f"{row.name:22}{micros:8.1f}{'-' if ring is None else f'{ring:.1f}':>8}"
        f"{row.nbytes / micros / 1e3:7.0f}{floor:8.1f}"
        f"{floor / micros:7.1%}{bench.pages_us(row):8.1f}{error:9.1e}"
        + "".join(f"{'-' if us is None else f'{us:.1f}':>{width}}" for us, width in others)
        + "".join(f"  {name} {us:.1f}" for name, us in tried.items())
    )


def sweep(bench: Bench) -> list[str]:
    """Prints microseconds of each configuration and row, and each row's best; gives what failed."""
    failed = []
    best = []
    for row in rows():
        times = {}
        for name, config in configurations(row.form).items():
            try:
                times[name] = bench.ours(row, config)[0]
            except Exception as error:  # one configuration may not fit the GPU
                failed.append(f"{row.name}, {name}")
                print(f"{row.name}, {name}: {type(error).__name__}: {str(error)[:100]}")
        print(f"{row.name:22}" + ", ".join(f"{n} {us:.1f}" for n, us in times.items()), flush=True)
        if times:
            winner = min(times, key=lambda n: times[n])
            best.append(f"{row.name:22}{winner:24}{times[winner]:8.1f}")
    print("best", *best, sep="\n")
    return failed


def main() -> None:
    """Prints a table; exits with 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="time several configurations")
    arguments = parser.parse_args()
    begun = time.monotonic()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, Triton {triton.__version__}")
    bench = Bench()
    failed = sweep(bench) if arguments.sweep else table(bench)
    print(f"{time.monotonic() - begun:.0f} s")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
