"""Latent attention (MLA) over pages on a GPU: all of our kernels, checked, beside the floor.

`python -m benchmarks.gpu.mla` prints a table. A time is that of one launch in a graph which has
many, over page tables of its own each, together several times as large as the L2. The floor is the
larger of bytes over the GPU's read rate and FLOPs over its matrix rate; beside it is the time of a
kernel that only reads the pages. All of that, and FlashInfer where it is installed, in this run.
What FlashMLA, FlashInfer and ThunderMLA took was recorded on an H200 before.

`--sweep` times several configurations of `mla_decode` and says which was best. `--rows NAME` takes
only the rows whose names contain NAME. `--json FILE` also writes what was measured.

Each kernel has a process of its own with a limit on its time, so that one which never ends costs no
more; its rows up to there are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import queue
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from benchmarks.gpu.flashinfer_mla import BACKENDS, Latents, Run, backends
from benchmarks.gpu.timing import Ceilings, ceilings, graph_us, rotations
from kvstore_kernels.mla_decode import MlaConfig, MlaForm, MlaWorkspace, config_for, mla_decode
from kvstore_kernels.mla_reference import RANK, WIDTH, mla_reference

SECONDS = {
    "decode": 50,
    "tiles": 40,
    "ring": 40,
    "flashinfer": 240,
    "sweep": 85,
}  # that a kernel's process has
PAGE_TOKENS = 64
POOL_PAGES = 32_768 + 64  # 2.4 GB, enough for the largest row
SCALE = 192**-0.5
REPEATS = 20  # of which every result must have the same bits
CHECKED = 4  # sequences of a row
MOST_ERROR = 6e-3
TILE_ROWS = 64  # from which on `mla_gluon` is made for it
RING_ROWS = 16  # up to which `mla_ring` is
PIECES, PIECE_WORDS = 18, 1024  # of a page, by which it is only read

RANDOM = tuple(int(n) for n in np.random.default_rng(0).integers(256, 16_385, 64))


@dataclass(frozen=True, kw_only=True)
class Row:
    """A batch. All others: microseconds on an H200, recorded before; target: what ours must."""

    name: str
    lengths: tuple[int, ...]
    heads: int = 128
    q_tokens: int = 1
    flashmla: float | None = None
    flashinfer: float | None = None
    thundermla: float | None = None
    draft: float | None = None
    target: float | None = None

    @property
    def rows(self) -> int:
        """Query rows of a sequence."""
        return self.heads * self.q_tokens

    @property
    def flops(self) -> float:
        """Of both products."""
        return 2.0 * self.rows * sum(self.lengths) * (WIDTH + RANK)

    @property
    def nbytes(self) -> int:
        """Of the tokens attended to."""
        return 2 * WIDTH * sum(self.lengths)

    def floor_us(self, limits: Ceilings) -> float:
        """What no kernel can beat on this GPU."""
        return 1e6 * max(self.nbytes / limits.read_bytes, self.flops / limits.matmul_flops)


ROWS = (
    Row(name="16, 1 x 65536", heads=16, lengths=(65_536,), flashmla=53, flashinfer=57,
        thundermla=40.5, draft=39.6, target=39),
    Row(name="16, 64 x 4096", heads=16, lengths=(4096,) * 64, flashmla=82, flashinfer=81.7,
        target=82),
    Row(name="16, 64 x 16384", heads=16, lengths=(16_384,) * 64, flashmla=285, flashinfer=284,
        draft=291, target=284),
    Row(name="16 x 4 new, 4 ragged", heads=16, q_tokens=4, lengths=(4641, 45_118, 1730, 1696),
        flashmla=49, flashinfer=48, thundermla=38.8, target=38.8),
    Row(name="16, 64 random", heads=16, lengths=RANDOM),
    Row(name="128, 1 x 4096", lengths=(4096,), flashmla=19.4, flashinfer=18.4, draft=21.7),
    Row(name="128, 1 x 131072", lengths=(131_072,), flashmla=78, flashinfer=85, draft=148),
    Row(name="128, 16 x 4096", lengths=(4096,) * 16, flashmla=43, flashinfer=46, draft=82),
    Row(name="128, 64 x 4096", lengths=(4096,) * 64, flashmla=117, flashinfer=131, draft=165),
    Row(name="128, 64 x 16384", lengths=(16_384,) * 64, flashmla=448, flashinfer=540, draft=605),
    Row(name="128, 128 x 16384", lengths=(16_384,) * 128, flashmla=868, flashinfer=962, draft=1252),
    Row(name="128, 64 random", lengths=RANDOM, flashmla=258, flashinfer=412),
)  # fmt: skip


def configurations(form: MlaForm) -> dict[str, MlaConfig]:
    """Those that a sweep tries; the first is the one in use."""
    used = config_for(form)
    found = {
        "as used": used,
        "not ahead" if used.ahead else "ahead": replace(used, ahead=not used.ahead),
        "long items": replace(used, min_tokens=512, item_tokens=256),
        "one block": replace(used, blocks_per_sm=1),
        "two stages": replace(used, num_stages=2, blocks_per_sm=1),
    }
    if form.rows > 32:  # which reads the pages once for all rows, with spilled registers
        one = MlaConfig(rows=64, num_warps=8, blocks_per_sm=1, merge_elements=16384)
        found |= {"64 rows": one, "64 rows, two stages": replace(one, num_stages=2)}
    return found


# --------------------------------------------------------------------- a kernel's process


class Pool:
    """Pages of random latents, and tables over them."""

    def __init__(self) -> None:
        generator = torch.Generator("cuda").manual_seed(1)
        shape = (POOL_PAGES, PAGE_TOKENS, WIDTH)
        self.pages = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        for at in range(0, POOL_PAGES, 4096):
            self.pages[at : at + 4096].normal_(generator=generator)

    def tables(self, row: Row) -> list[torch.Tensor]:
        """Page tables of so many batches that the L2 holds none of their pages from before."""
        used = [-(-length // PAGE_TOKENS) for length in row.lengths]
        count = rotations(row.nbytes)
        random = np.random.default_rng(2)
        orders = -(-count * sum(used) // POOL_PAGES)
        numbers = np.concatenate([random.permutation(POOL_PAGES) for _ in range(orders)])
        tables = np.zeros((count, len(used), max(used)), np.int32)
        at = 0
        for table in tables:
            for line, pages in zip(table, used, strict=True):
                line[:pages] = numbers[at : at + pages]
                at += pages
        return list(torch.from_numpy(tables).cuda())


class Batch:
    """One row's inputs, and a place for its output."""

    def __init__(self, row: Row, pool: Pool) -> None:
        self.row, self.pages, self.tables = row, pool.pages, pool.tables(row)
        generator = torch.Generator("cuda").manual_seed(4)
        shape = (len(row.lengths), row.q_tokens, row.heads)
        self.q = torch.randn(*shape, WIDTH, generator=generator, device="cuda").bfloat16()
        self.lengths = torch.tensor(row.lengths, dtype=torch.int32, device="cuda")
        self.out = torch.full((*shape, RANK), math.nan, device="cuda", dtype=torch.bfloat16)

    def error(self) -> float:
        """Of what a launch with the first table has written, relative; some sequences."""
        order = np.argsort(self.row.lengths, kind="stable")
        chosen = order[np.unique(np.linspace(0, len(order) - 1, CHECKED).astype(int))].tolist()
        table = self.tables[0][chosen]
        want = mla_reference(self.q[chosen], self.pages, table, self.lengths[chosen], scale=SCALE)
        return float((self.out[chosen].double() - want).norm() / want.norm())


Launch = Callable[[torch.Tensor], object]  # with a page table


def decode_launch(batch: Batch, config: MlaConfig | None = None) -> Launch:
    """Of `mla_decode`."""
    row = batch.row
    form = MlaForm(heads=row.heads, q_tokens=row.q_tokens, scale=SCALE, page_tokens=PAGE_TOKENS)
    workspace = MlaWorkspace(
        form, max_sequences=len(row.lengths), device="cuda", config=config or config_for(form)
    )
    workspace.load(workspace.plan(row.lengths))
    return lambda table: mla_decode(
        batch.q, batch.pages, table, batch.lengths, workspace, out=batch.out
    )


def tiles_launch(batch: Batch) -> Launch:
    """Of `mla_gluon`."""
    from kvstore_kernels.mla_gluon import MlaTilesForm, MlaTilesWorkspace, mla_decode_tiles

    row = batch.row
    form = MlaTilesForm(heads=row.heads, q_tokens=row.q_tokens, scale=SCALE)
    workspace = MlaTilesWorkspace(form, max_sequences=len(row.lengths), device="cuda")
    workspace.load(workspace.plan(row.lengths))
    return lambda table: mla_decode_tiles(batch.q, batch.pages, table, workspace, out=batch.out)


def ring_launch(batch: Batch) -> Launch:
    """Of `mla_ring`."""
    from kvstore_kernels.mla_ring import MlaRingForm, MlaRingWorkspace, mla_decode_ring

    row = batch.row
    form = MlaRingForm(heads=row.heads, q_tokens=row.q_tokens, scale=SCALE)
    workspace = MlaRingWorkspace(form, max_sequences=len(row.lengths), device="cuda")
    workspace.load(workspace.plan(row.lengths))
    return lambda table: mla_decode_ring(batch.q, batch.pages, table, workspace, out=batch.out)


def flashinfer_launch(batch: Batch, make: Callable[[Latents], Run]) -> Launch:
    """Of FlashInfer, planned for each table."""
    lengths, scale, out = batch.row.lengths, SCALE, batch.out
    runs = {
        table.data_ptr(): make(
            Latents(
                q=batch.q, pages=batch.pages, table=table, lengths=lengths, scale=scale, out=out
            )
        )
        for table in batch.tables
    }
    return lambda table: runs[table.data_ptr()]()


@triton.jit  # type: ignore[untyped-decorator]
def read_kernel(pages_ptr, numbers_ptr, sink_ptr, PIECES: tl.constexpr, WORDS: tl.constexpr):  # type: ignore[no-untyped-def] # noqa: N803
    """Reads all words of some pages; stores only what keeps the loads from being left out."""
    at = tl.program_id(0)
    page = tl.load(numbers_ptr + at // PIECES).to(tl.int64)
    place = (page * PIECES + at % PIECES) * WORDS + tl.arange(0, WORDS)
    total = tl.sum(tl.load(pages_ptr + place))
    if total == 0x5EED5EED:
        tl.store(sink_ptr, total)


def read_us(batch: Batch) -> float:
    """Time to read the row's pages, whole, and do nothing else."""
    used = [-(-length // PAGE_TOKENS) for length in batch.row.lengths]
    words = batch.pages.view(-1).view(torch.int32)
    sink = torch.zeros(1, dtype=torch.int32, device="cuda")

    def call(table: torch.Tensor) -> Callable[[], object]:
        numbers = torch.cat([line[:n] for line, n in zip(table, used, strict=True)])
        grid = (len(numbers) * PIECES,)
        return lambda: read_kernel[grid](words, numbers, sink, PIECES, PIECE_WORDS, num_warps=4)

    return graph_us([call(table) for table in batch.tables])


@dataclass(frozen=True)
class Result:
    """Of one row, kernel and configuration. us: of a launch. error: against float64, relative."""

    row: str
    kernel: str
    config: str = ""
    us: float = math.nan
    error: float = math.nan
    same_bits: bool = False
    failure: str = ""

    @property
    def right(self) -> bool:
        return self.same_bits and self.error < MOST_ERROR


def measure(batch: Batch, launch: Launch, kernel: str, config: str) -> Result:
    """Checks, then times."""
    batch.out.fill_(math.nan)
    launch(batch.tables[0])
    error = batch.error()
    first, differ = batch.out.clone(), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(REPEATS):
        batch.out.fill_(math.nan)
        launch(batch.tables[0])
        differ += (batch.out != first).sum()
    us = graph_us([lambda table=table: launch(table) for table in batch.tables])  # type: ignore[misc]
    return Result(batch.row.name, kernel, config, us, error, not int(differ))


def attempt(batch: Batch, make: Callable[[], Launch], kernel: str, config: str = "") -> Result:
    """A failure is a result, so that the other rows are measured all the same."""
    try:
        return measure(batch, make(), kernel, config)
    except Exception as failure:
        traceback.print_exc()
        lines = str(failure).splitlines() or [type(failure).__name__]
        return Result(batch.row.name, kernel, config, failure=lines[0][:200])


def work(part: str, wanted: str) -> None:
    """A process's whole work: prints a line of JSON for each result, the ceilings before."""
    if part == "flashinfer" and find_spec("flashinfer") is None:
        return
    if part == "decode":
        print(json.dumps({"ceilings": dataclasses.asdict(ceilings())}), flush=True)
    pool = Pool()
    for row in (row for row in ROWS if wanted in row.name):
        for result in results(part, Batch(row, pool)):
            print(json.dumps(dataclasses.asdict(result)), flush=True)


def results(part: str, batch: Batch) -> Iterator[Result]:
    """Of one row."""
    row = batch.row
    if part == "decode":
        yield Result(row.name, "read", us=read_us(batch), error=0.0, same_bits=True)
        yield attempt(batch, lambda: decode_launch(batch), kernel=part)
    elif part == "ring" and row.rows <= RING_ROWS:
        yield attempt(batch, lambda: ring_launch(batch), kernel=part)
    elif part == "flashinfer":
        for name, plan in backends().items():
            yield attempt(batch, partial(flashinfer_launch, batch, plan), kernel=part, config=name)
    elif part == "tiles" and row.rows >= TILE_ROWS:
        yield attempt(batch, lambda: tiles_launch(batch), kernel=part)
    elif part == "sweep" and row.heads == 16:
        form = MlaForm(heads=row.heads, q_tokens=row.q_tokens, scale=SCALE)
        for name, config in configurations(form).items():
            make = lambda config=config: decode_launch(batch, config)  # noqa: E731
            yield attempt(batch, make, kernel=part, config=name)


# --------------------------------------------------------------------- the process that prints


def collect(part: str, wanted: str) -> Iterator[dict[str, Any]]:
    """What a process with that part prints, until it ends or its time is over."""
    command = [sys.executable, "-m", "benchmarks.gpu.mla", "--part", part, "--rows", wanted]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_pass_on, args=(child, lines), daemon=True).start()
    end = time.monotonic() + SECONDS[part]
    try:
        while line := lines.get(timeout=max(0.0, end - time.monotonic())):
            yield json.loads(line)
    except queue.Empty:
        print(f"{part}: ended after {SECONDS[part]} s", flush=True)
    finally:
        child.kill()
        child.wait()


def _pass_on(child: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            lines.put(line)
    lines.put("")


def _fixed(number: float, width: int, digits: int = 1) -> str:
    return f"{'-' if math.isnan(number) else f'{number:.{digits}f}':>{width}}"


class Report:
    """All results, and what to print of them."""

    def __init__(self) -> None:
        self.results: list[Result] = []
        self.limits: Ceilings | None = None

    def gather(self, part: str, wanted: str) -> None:
        """Runs a part."""
        for found in collect(part, wanted):
            if "ceilings" in found:
                self.limits = Ceilings(**found["ceilings"])
            else:
                self.results.append(Result(**found))

    def of(self, row: Row, part: str, config: str = "") -> Result:
        """That configuration's result; one of a failure where there is none."""
        wanted = (row.name, part, config)
        made = (r for r in self.results if (r.row, r.kernel, r.config) == wanted)
        return next(made, Result(row.name, part, failure="was not run"))

    def table(self, wanted: str) -> list[str]:
        """Prints a line for each row; gives the names of those that failed."""
        if self.limits:
            read, flops = self.limits.read_bytes / 1e12, self.limits.matmul_flops / 1e12
            print(f"this GPU reads {read:.2f} TB/s and multiplies {flops:.0f} TFLOP/s in bfloat16")
        print(
            f"{'':40}{'mla_decode':^24}{'mla_ring':^24}{'mla_gluon':^25}{'FlashInfer':^16}"
            f"{'recorded on an H200':^42}"
        )
        print(
            f"{'us per call':24}{'floor':>8}{'read':>8}"
            + f"{'us':>8}{'GB/s':>7}{'error':>9}" * 2
            + f"{'us':>8}{'TFLOP/s':>8}{'error':>9}"
            + "".join(f"{name:>8}" for name in BACKENDS)
            + f"{'FlashMLA':>10}{'FlashInfer':>11}{'Thunder':>8}{'drafts':>7}{'target':>7}"
        )
        failed = []
        for row in (row for row in ROWS if wanted in row.name):
            parts = ["decode"]
            parts += ["tiles"] * (row.rows >= TILE_ROWS) + ["ring"] * (row.rows <= RING_ROWS)
            wrong = [part for part in parts if not self.of(row, part).right]
            failed += [f"{row.name} ({part})" for part in wrong]
            print(self._line(row) + "".join(f"  {part} FAILED" for part in wrong), flush=True)
        return failed

    def _line(self, row: Row) -> str:
        tiles = self.of(row, "tiles")
        floor = row.floor_us(self.limits) if self.limits else math.nan
        reading = "".join(
            f"{_fixed(found.us, 8)}{_fixed(row.nbytes / found.us / 1e3, 7, 0)}{found.error:9.1e}"
            for found in (self.of(row, "decode"), self.of(row, "ring"))
        )
        theirs = [self.of(row, "flashinfer", name) for name in BACKENDS]
        recorded = zip(
            (row.flashmla, row.flashinfer, row.thundermla, row.draft, row.target),
            (10, 11, 8, 7, 7),
            strict=True,
        )
        return (
            f"{row.name:24}{_fixed(floor, 8)}{_fixed(self.of(row, 'read').us, 8)}{reading}"
            f"{_fixed(tiles.us, 8)}{_fixed(row.flops / tiles.us / 1e6, 8, 0)}{tiles.error:9.1e}"
            + "".join(_fixed(their.us if their.right else math.nan, 8) for their in theirs)
            + "".join(f"{'-' if us is None else us:>{width}}" for us, width in recorded)
        )

    def bests(self) -> list[str]:
        """Prints the times of each row's configurations and its best; gives what failed."""
        for row in ROWS:
            mine = [r for r in self.results if r.row == row.name]
            times = {r.config: r.us for r in mine if r.right}
            if times:
                best = min(times, key=lambda name: times[name])
                listed = ", ".join(f"{name} {us:.1f}" for name, us in times.items())
                print(f"{row.name:24}best: {best}, {times[best]:.1f} us   ({listed})")
        return [f"{r.row}, {r.config}: {r.failure or r}" for r in self.results if not r.right]


def main() -> None:
    """Prints a table; exits with 1 where a row failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="time several configurations")
    parser.add_argument("--rows", default="", help="only those with this in their names")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        work(arguments.part, arguments.rows)
        return
    begun = time.monotonic()
    report = Report()
    for part in ("sweep",) if arguments.sweep else ("decode", "ring", "tiles", "flashinfer"):
        report.gather(part, arguments.rows)
    failed = report.bests() if arguments.sweep else report.table(arguments.rows)
    print(f"{torch.cuda.get_device_name()}, {time.monotonic() - begun:.0f} s")
    if arguments.json:
        listed = [dataclasses.asdict(result) for result in report.results]
        arguments.json.write_text(json.dumps(listed, indent=2))
    if failed:
        sys.exit("failed: " + "; ".join(failed))


if __name__ == "__main__":
    main()
