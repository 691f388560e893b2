"""Pages collated, scattered and taken to host memory and back, beside what the hardware does.

`python -m benchmarks.gpu.collation`, on a machine with a GPU; `--sweep` tries other ways to cut the
work, `--only TEXT` measures the rows whose name has it, `--json FILE` writes what was measured.
Every result is compared with the reference, byte by byte, on memory that was poisoned before.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shlex
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import triton
import triton.language as tl

from benchmarks.gpu.timing import eager_us, graph_us
from kvstore_kernels.collate import Collator
from kvstore_kernels.collate_plan import QUANTISE_TUNING, Tuning
from kvstore_kernels.collate_reference import collate_reference, scatter_reference
from kvstore_kernels.cuda_runtime import cuda_runtime
from kvstore_kernels.gqa_decode import gqa_decode
from kvstore_kernels.gqa_form import GqaForm, GqaWorkspace
from kvstore_kernels.gqa_ring import GqaRingWorkspace, gqa_decode_ring
from kvstore_kernels.page_table import CellForm, PageTable, runs_of
from kvstore_kernels.transfer import KEPT_BYTES, PROGRAMS, Transfers

DEVICE = torch.device("cuda", 0)
MOVED_BYTES = 512 << 20  # by one gather or scatter
LINK_BYTES = 256 << 20  # by one transfer
LONG_BYTES = 1 << 30  # likewise
AGAIN_BYTES = 128 << 10  # of copies to one place
PIECE_BYTES = 4 << 10  # of what is written to places of its own
BURSTS = (4, 16, 64)  # MiB
LINK_RATE, CLOCK = 54e9, 1.98e9  # bytes and cycles a second, about
MOST_PIECES = 16_384  # that are copied one by one
POISON = 0xA5
ROUNDS = 21
SWEPT = [
    Tuning(tile_bytes=tile << 10, thread_bytes=thread, load_policy=policy)
    for tile, thread, policy in (
        (2, 64, ""), (2, 32, "evict_first"), (4, 32, ""), (4, 64, ""), (8, 32, ""), (8, 128, ""),
        (16, 128, ""), (32, 128, ""),
    )
]  # fmt: skip
SWEPT_KEPT = [replace(QUANTISE_TUNING, kept_bytes=kept << 10) for kept in (16, 40, 72)]
PLAIN_TILES, PLAIN_THREAD = (2 << 10, 4 << 10), 32  # bytes of pages, of a program and a thread


@dataclass(frozen=True)
class Work:
    """Pools in one form, twice as many pages as are moved, and the rows they become."""

    name: str
    dims: str = "LKPNHD"
    layers: int = 32
    heads: int = 8
    head_dim: int = 128
    page_tokens: int = 16
    block_tokens: int = 16
    row_heads: int | None = None  # of the whole row, where the pages have some of them
    cell_layers: int | None = None
    scaled: bool = False

    @property
    def kinds(self) -> int:
        return 2 if "K" in self.dims else 1

    @property
    def form(self) -> CellForm:
        return CellForm(
            layers=self.layers,
            heads=self.row_heads or self.heads,
            head_dim=self.head_dim,
            block_tokens=self.block_tokens,
            dtype=torch.float8_e4m3fn if self.scaled else torch.bfloat16,
            kinds=self.kinds,
            layers_per_cell=self.cell_layers,
            scaled=self.scaled,
        )

    @property
    def piece(self) -> int:
        """Bytes of one page of one plane."""
        return self.page_tokens * self.heads * self.head_dim * 2

    @property
    def together(self) -> int:
        """Bytes of a page that lie together."""
        sizes = {
            "L": self.layers, "K": self.kinds, "N": self.page_tokens, "H": self.heads,
            "D": self.head_dim,
        }  # fmt: skip
        _, within = self.dims.split("P")
        return 2 * math.prod(sizes[letter] for letter in within)

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in the pages."""
        return self.layers * self.kinds * self.block_tokens * self.heads * self.head_dim * 2

    @property
    def both_bytes(self) -> int:
        """Bytes of a block in the pages, and of what it becomes."""
        return self.block_bytes + self.form.nbytes * self.heads // self.form.heads


PIECES = [
    Work("4 KiB", heads=1),
    Work("16 KiB", heads=4),
    Work("32 KiB"),
    Work("64 KiB", page_tokens=32, block_tokens=32),
    Work("256 KiB", page_tokens=128, block_tokens=128),
]
LATENT = Work("latent", "LPND", layers=61, heads=1, head_dim=576, page_tokens=64, block_tokens=64)
QUANTISED = Work("to fp8", scaled=True)
STORED = Work("as in the store", "PHLKND")
QUANTISED_LATENT = replace(LATENT, name="latent to fp8", scaled=True)
FORMS = [
    Work("heads first", "LKPHND"),
    Work("2 of 8 heads", heads=2, row_heads=8),
    Work("8 layers a cell", cell_layers=8),
    STORED,
    Work("4 pages a block", block_tokens=64),
    Work("4 blocks a page", page_tokens=64),
    LATENT,
    QUANTISED,
    replace(QUANTISED, name="to fp8, heads first", dims="LKPHND"),
    QUANTISED_LATENT,
]
# Of an engine with few layers, or of one rank of several: too small to be copied in place.
STORED_SMALL = replace(STORED, name="as in the store, 256 KiB", layers=8, heads=4)
LINKED = [PIECES[0], PIECES[1], PIECES[3], PIECES[4], STORED, STORED_SMALL, QUANTISED]
LINKED_LONG = [PIECES[0], PIECES[1], PIECES[3]]
# Buffers, and MiB of each.
SWEPT_BUFFERS = [(2, 4), (2, 6), (2, 8), (3, 8), (2, 16), (2, 64)]
# Of a buffer, MiB, and programs of a kernel for each multiprocessor.
SWEPT_SIZES, SWEPT_PROGRAMS = (4, 6, 8, 32), (1, PROGRAMS, 4, 1000)
REPLAYS = 13  # of sixteen decodes


class Rig:
    """A work's pools, filled, and a choice of blocks in any order."""

    def __init__(self, work: Work, nbytes: int, tuning: Tuning | None = None) -> None:
        self.work, self.form = work, work.form
        self.blocks = nbytes // work.block_bytes
        self.pages = 2 * self.blocks * work.block_tokens // work.page_tokens
        self.pool = self._random() if work.scaled else self._bytes()
        self.table = PageTable.of(self.pool, work.dims)
        order = torch.randperm(self.pages, generator=torch.Generator().manual_seed(0))
        runs = runs_of(order, work.page_tokens, work.block_tokens)
        self.runs = runs[: self.blocks].contiguous().to(DEVICE)
        self.collator = Collator(self.table, self.form, tuning=tuning)

    def tuned(self, tuning: Tuning) -> Collator:
        return Collator(self.table, self.form, tuning=tuning)

    def rows(self) -> torch.Tensor:
        """Memory for the rows, poisoned."""
        shape = (self.blocks, -(-self.form.nbytes // 16) * 16)
        return torch.full(shape, POISON, dtype=torch.uint8, device=DEVICE)

    def poisoned(self) -> torch.Tensor:
        """Another pool of the same form."""
        return torch.full_like(self.pool.view(torch.uint8), POISON).view(torch.bfloat16)

    def _shape(self) -> list[int]:
        work = self.work
        sizes = {
            "L": work.layers, "K": 2, "P": self.pages, "N": work.page_tokens, "H": work.heads,
            "D": work.head_dim,
        }  # fmt: skip
        return [sizes[letter] for letter in work.dims]

    def _random(self) -> torch.Tensor:
        return torch.randn(self._shape(), dtype=torch.bfloat16, device=DEVICE)

    def _bytes(self) -> torch.Tensor:
        words = torch.randint(-(1 << 15), 1 << 15, self._shape(), dtype=torch.int16, device=DEVICE)
        return words.view(torch.bfloat16)


class Report:
    """Rows of results, printed as they come and once more at the end."""

    def __init__(self, command: str, only: str) -> None:
        """command: that measures all. only: what the names of the rows that are wanted have."""
        self._command, self._only = command, only
        self.lines: list[str] = []
        self.results: list[dict[str, Any]] = []
        self.failed: list[str] = []

    def row(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """A row that fails is told, and the others go on."""
        if self._only not in name:
            return
        command = f"{self._command} --only {shlex.quote(name)}"
        start = time.perf_counter()
        try:
            found = measure()
        except Exception as error:
            self.failed.append(name)
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}".splitlines()[0][:120]}
        seconds = time.perf_counter() - start
        self.results.append({"row": name, "command": command, **found})
        text = "  ".join(f"{key} {_text(value)}" for key, value in found.items())
        self.lines.append(f"{name:34s} {text}\n    {command}")
        print(f"{self.lines[-1]}   [{seconds:.1f} s]", flush=True)

    def end(self) -> None:
        print("\n" + "\n".join(self.lines))
        if self.failed:
            sys.exit(f"failed: {', '.join(self.failed)}")


def _text(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def copy_ceiling() -> dict[str, Any]:
    """What torch's own copy of as many bytes does, and of four times as many."""
    found: dict[str, Any] = {}
    for name, size in (("512 MiB", MOVED_BYTES), ("2 GiB", 4 * MOVED_BYTES)):
        source = torch.randint(-128, 127, (size,), dtype=torch.int8, device=DEVICE)
        target = torch.empty_like(source)
        found[f"{name}, TB/s"] = 2 * size / graph_us([partial(target.copy_, source)] * 2) / 1e6
    return found


@triton.jit  # type: ignore[untyped-decorator]
def plain_kernel(  # type: ignore[no-untyped-def] # noqa: PLR0917
    source_ptr,
    target_ptr,
    order_ptr,
    PIECE: tl.constexpr,  # noqa: N803 - elements
    TILE: tl.constexpr,  # noqa: N803
    SCATTERS: tl.constexpr,  # noqa: N803
):
    """Copies or converts pieces that are in some order on one side, and dense on the other."""
    piece = tl.program_id(0) // (PIECE // TILE)
    inside = tl.program_id(0) % (PIECE // TILE) * TILE + tl.arange(0, TILE)
    dense = piece.to(tl.int64) * PIECE + inside
    ordered = tl.load(order_ptr + piece).to(tl.int64) * PIECE + inside
    source = source_ptr + (dense if SCATTERS else ordered)
    target = target_ptr + (ordered if SCATTERS else dense)
    if source_ptr.dtype.element_ty == target_ptr.dtype.element_ty:
        tl.store(target, tl.load(source))
    else:  # eight elements a thread on both sides, as a thread has read them
        values = tl.load(tl.max_contiguous(source, [8])).to(tl.float32)
        tl.store(tl.max_contiguous(target, [8]), values.to(target_ptr.dtype.element_ty))


def plain_limits(work: Work) -> dict[str, float]:
    """TB/s of `plain_kernel` with as many bytes, pieces as long, and places as much in disorder:
    what the memory gives whoever finds no runs, heads and layers, and knows no scales."""
    page_type = torch.bfloat16 if work.scaled else torch.int32
    row_type = torch.float8_e4m3fn if work.scaled else torch.int32
    count, piece = MOVED_BYTES // work.together, work.together // page_type.itemsize
    words = torch.randn(2 * count * piece, dtype=torch.bfloat16, device=DEVICE)
    pages = words if work.scaled else words.repeat(2).view(page_type)
    rows = pages[: count * piece].to(row_type)
    order = torch.randperm(2 * count, device=DEVICE)[:count].int()
    nbytes = rows.numel() * (page_type.itemsize + row_type.itemsize)

    def rate(tile_bytes: int, *, scatters: bool) -> float:
        source, target = (rows, pages) if scatters else (pages, rows)
        tile = tile_bytes // page_type.itemsize
        warps = tile_bytes // (32 * PLAIN_THREAD)

        def call() -> None:
            grid = (rows.numel() // tile,)
            plain_kernel[grid](source, target, order, piece, tile, scatters, num_warps=warps)

        return nbytes / graph_us([call] * 2) / 1e6

    return {
        name: max(rate(tile, scatters=scatters) for tile in PLAIN_TILES)
        for name, scatters in (("plain gather", False), ("plain scatter", True))
    }


def measure_form(work: Work) -> dict[str, Any]:
    """TB/s, read and written, of gather and scatter, and of a plain kernel; by index_select where
    that is the same."""
    rig = Rig(work, MOVED_BYTES)
    rows = rig.rows()
    moved = rig.blocks * work.both_bytes
    gather = moved / graph_us([lambda: rig.collator.collate(rig.runs, rows)] * 2) / 1e6
    wrong = "" if gathered_right(rig, rows) else " WRONG"
    pool = rig.poisoned()
    back = Collator(PageTable.of(pool, work.dims), rig.form)
    scatter = moved / graph_us([lambda: back.scatter(rig.runs, rows)] * 2) / 1e6
    wrong += "" if scattered_right(rig, rows, pool) else " WRONG BACK"
    if wrong:
        raise AssertionError(f"gather {gather:.2f}, scatter {scatter:.2f} TB/s:{wrong}")
    found: dict[str, Any] = {"gather": gather, "scatter": scatter, **plain_limits(work)}
    if work in PIECES:
        found["index_select"] = moved / graph_us([index_select(rig, rows)] * 2) / 1e6
    return found


def gathered_right(rig: Rig, rows: torch.Tensor) -> bool:
    """Whether rows are the reference's, and what is between them is still poisoned."""
    rows.fill_(POISON)
    expected = rig.rows()
    rig.collator.collate(rig.runs, rows)
    collate_reference(rig.table, rig.collator.pairing, rig.runs, expected)
    return torch.equal(rows, expected)


def scattered_right(rig: Rig, rows: torch.Tensor, pool: torch.Tensor) -> bool:
    """Whether a pool is what the reference makes of it, other pages included."""
    expected = rig.poisoned()
    table = PageTable.of(expected, rig.work.dims)
    scatter_reference(table, rig.collator.pairing, rig.runs, rows)
    pool.view(torch.uint8).fill_(POISON)
    Collator(PageTable.of(pool, rig.work.dims), rig.form).scatter(rig.runs, rows)
    return torch.equal(pool.view(torch.uint8), expected.view(torch.uint8))


def index_select(rig: Rig, rows: torch.Tensor) -> Callable[[], None]:
    """The usual way: a call for each plane, into a tensor for each."""
    planes = [plane.flatten(1) for plane in itertools.chain(*rig.table.views)]
    there = rows.view(torch.bfloat16).view(len(planes), rig.blocks, -1)
    pages = rig.runs[:, 0].contiguous()

    def call() -> None:
        for plane, target in zip(planes, there, strict=True):
            torch.index_select(plane, 0, pages, out=target)

    return call


def sweep_form(work: Work, tunings: list[Tuning]) -> dict[str, Any]:
    """TB/s of gather / scatter by tuning, and the best of each."""
    rig = Rig(work, MOVED_BYTES)
    rows, moved = rig.rows(), rig.blocks * work.both_bytes
    found: dict[str, tuple[float, float]] = {}
    for tuning in (Tuning(), *tunings):
        collator = rig.tuned(tuning)
        calls = [partial(call, rig.runs, rows) for call in (collator.collate, collator.scatter)]
        gather, scatter = (moved / graph_us([call] * 2, 11) / 1e6 for call in calls)
        found[_name(tuning)] = (gather, scatter)
    best = [max(found, key=lambda name, way=way: found[name][way]) for way in range(2)]  # type: ignore[misc]
    shown = {name: f"{gather:.2f}/{scatter:.2f}" for name, (gather, scatter) in found.items()}
    return {**shown, "best gather": best[0], "best scatter": best[1]}


def _name(tuning: Tuning) -> str:
    changed = {
        key: value for key, value in asdict(tuning).items() if value != getattr(Tuning(), key)
    }
    return ",".join(f"{key}={value}" for key, value in changed.items()) or "default"


class LinkRig:
    """A work's pages, and pinned memory for their rows; what was moved is right."""

    def __init__(self, work: Work, host: torch.Tensor, nbytes: int = LINK_BYTES) -> None:
        self.rig = Rig(work, nbytes)
        self.runs = self.rig.runs.cpu()
        nbytes = self.rig.form.nbytes
        self.host, self.other = host[: 2 * self.rig.blocks * nbytes].view(2, -1, nbytes)
        self.pool = self.rig.poisoned()
        self.back = Collator(PageTable.of(self.pool, work.dims), self.rig.form)

    @property
    def nbytes(self) -> int:
        """That a transfer moves."""
        return int(self.host.numel())

    def check(self, out: Transfers, back: Transfers) -> None:
        """Raises AssertionError unless all bytes arrive both ways, on poisoned memory."""
        self.host.fill_(POISON)
        self.pool.view(torch.uint8).fill_(POISON)
        expected = self.rig.rows()
        self.rig.collator.collate(self.rig.runs, expected)
        out.to_host(self.runs, self.host).wait()
        assert torch.equal(self.host.to(DEVICE), expected), "other bytes on the host"
        wanted = self.rig.poisoned()
        form = self.rig.form
        Collator(PageTable.of(wanted, self.rig.work.dims), form).scatter(self.rig.runs, expected)
        back.to_pages(self.runs, self.host).wait()
        same = torch.equal(self.pool.view(torch.uint8), wanted.view(torch.uint8))
        assert same, "other bytes in the pages"
        self.other.copy_(self.host)

    def rate(self, *moves: Callable[[], Waits]) -> float:
        """GB/s of transfers that are begun together, until the last has arrived."""

        def call() -> None:
            for transfer in [move() for move in moves]:
                transfer.wait()

        return float(len(moves) * self.host.numel() / seconds_of(call) / 1e9)

    def rates(self, out: Transfers, back: Transfers) -> tuple[float, float]:
        """GB/s to the host, and to the pages; checked."""
        self.check(out, back)
        to_host = partial(out.to_host, self.runs, self.host)
        return self.rate(to_host), self.rate(partial(back.to_pages, self.runs, self.other))

    def limits(self) -> tuple[float, float]:
        """GB/s of one large copy of as many bytes, without a kernel, either way."""
        copies = copies_alone(self)
        return self.rate(copies["D2H"]), self.rate(copies["H2D"])


def _stream(priority: int = 0) -> torch.cuda.Stream:
    return torch.cuda.Stream(priority=priority)  # type: ignore[no-untyped-call]


def seconds_of(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Median time of a call that waits for its end; the first does not count."""
    times = []
    for _ in range(rounds + 1):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(statistics.median(times[1:]))


def link_ceiling(host: torch.Tensor) -> dict[str, Any]:
    """GB/s of one pinned copy, each way and both at once."""
    size = LINK_BYTES
    here = [torch.empty(size, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    there = host[: 2 * size].view(2, size)
    streams = [_stream() for _ in range(2)]

    def copy(*ways: int) -> None:
        for way in ways:
            with torch.cuda.stream(streams[way]):
                pair = (there[0], here[0]) if way == 0 else (here[1], there[1])
                pair[0].copy_(pair[1], non_blocking=True)
        torch.cuda.synchronize()

    names = {"D2H": (0,), "H2D": (1,), "both": (0, 1)}
    return {
        name: len(ways) * size / seconds_of(partial(copy, *ways)) / 1e9
        for name, ways in names.items()
    }


def measure_link(work: Work, host: torch.Tensor) -> dict[str, Any]:
    """GB/s by our pipeline, beside one copy of as many bytes; by batches of copies and by a copy of
    each piece."""
    link = LinkRig(work, host)
    out, back = Transfers(link.rig.collator), Transfers(link.back)
    found = _beside_limits(link, out, back)
    to_host = partial(out.to_host, link.runs, link.host)
    found["both"] = link.rate(to_host, partial(back.to_pages, link.runs, link.other))
    if work in (PIECES[0], PIECES[3]):
        out, back = Transfers(link.rig.collator, direct=True), Transfers(link.back, direct=True)
        found["zero-copy D2H"], found["zero-copy H2D"] = link.rates(out, back)
    return {**found, **(by_piece(link) if work in PIECES else {})}


def measure_long(work: Work, host: torch.Tensor) -> dict[str, Any]:
    """GB/s of transfers that are four times as long, where the beginning matters less."""
    link = LinkRig(work, host, LONG_BYTES)
    return _beside_limits(link, Transfers(link.rig.collator), Transfers(link.back))


def _beside_limits(link: LinkRig, out: Transfers, back: Transfers) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for way, ours, limit in zip(("D2H", "H2D"), link.rates(out, back), link.limits(), strict=True):
        found |= {way: ours, f"one copy {way}": limit, f"{way}, % of that": 100 * ours / limit}
    return found


def by_piece(link: LinkRig) -> dict[str, Any]:
    """GB/s of copies that know nothing of kernels: one batch, and one call each."""
    runtime, piece = cuda_runtime(), link.rig.work.piece
    pages = link.rig.runs[:, 0].cpu().numpy()
    planes = [plane.data_ptr() for plane in itertools.chain(*link.rig.table.views)]
    gpu = (np.array(planes)[:, None] + pages * piece).ravel()[:MOST_PIECES]
    cpu = link.host.data_ptr() + np.arange(len(gpu)) * piece
    sizes, stream = np.full(len(gpu), piece), _stream()

    def rate(copy: Callable[..., None], target: Any, source: Any, rounds: int) -> float:
        def call() -> None:
            copy(target, source, sizes, stream.cuda_stream)
            stream.synchronize()

        return float(sizes.sum() / seconds_of(call, rounds) / 1e9)

    found = {}
    if runtime.has_batches:
        found["batch D2H"] = rate(runtime.copy_batch, cpu, gpu, 3)
        found["batch H2D"] = rate(runtime.copy_batch, gpu, cpu, 3)
    found["each D2H"] = rate(runtime.copy_each, cpu, gpu, 2)
    found["each H2D"] = rate(runtime.copy_each, gpu, cpu, 2)
    return found


def sweep_link(work: Work, host: torch.Tensor) -> dict[str, Any]:
    """GB/s D2H / H2D by the buffers."""
    link = LinkRig(work, host)
    found: dict[str, Any] = {}
    for buffers, size in SWEPT_BUFFERS:
        out, back = (
            Transfers(collator, buffers=buffers, buffer_bytes=size << 20)
            for collator in (link.rig.collator, link.back)
        )
        away, home = link.rates(out, back)
        found[f"{buffers} x {size} MiB"] = f"{away:.1f}/{home:.1f}"
    return found


class Decodes:
    """GQA of 64 sequences of 8192 tokens, 2 GiB of KV: half a millisecond bound by memory."""

    def __init__(self) -> None:
        batch, length, tokens = 64, 8192, 16
        self.form = GqaForm(heads=32, kv_heads=8, head_dim=128, page_tokens=tokens)
        self.lengths = [length] * batch
        pages = length // tokens
        shape = (2, batch * pages, 8, tokens, 128)
        self.pool = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
        order = torch.randperm(batch * pages, dtype=torch.int32, device=DEVICE)
        self.table = order.view(batch, pages)
        self.q = torch.randn(batch, 1, 32, 128, dtype=torch.bfloat16, device=DEVICE)
        self.out = torch.empty_like(self.q)

    def gqa_decode(self) -> Callable[[], object]:
        """By the kernel that leaves room on a multiprocessor for others."""
        workspace = GqaWorkspace(self.form, max_sequences=len(self.lengths), device=DEVICE)
        workspace.load(workspace.plan(self.lengths))
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=DEVICE)
        return lambda: gqa_decode(
            self.q, self.pool[0], self.pool[1], self.table, lengths, workspace, out=self.out
        )

    def gqa_ring(self) -> Callable[[], object]:
        """By the kernel that `decode_attention` takes for them."""
        workspace = GqaRingWorkspace(self.form, max_sequences=len(self.lengths), device=DEVICE)
        workspace.load(workspace.plan(self.lengths))
        return lambda: gqa_decode_ring(
            self.q, self.pool[0], self.pool[1], self.table, workspace, out=self.out
        )


class Beside:
    """A decode, again and again without a pause, and what it loses to transfers meanwhile."""

    def __init__(self, decode: Callable[[], object]) -> None:
        self._decode = decode  # whose memory the graph uses
        self._graph = _graph_of(decode, 16)

    def alone_us(self) -> float:
        """Of one decode."""
        return eager_us(self._graph.replay) / 16

    def slowed(self, nbytes: int, move: Callable[[], Waits]) -> str:
        """By how much, and at which rate transfers of so many bytes follow each other."""
        before = eager_us(self._graph.replay, REPLAYS)
        slow, rate = _meanwhile(nbytes, move, self._graph)
        after = eager_us(self._graph.replay, REPLAYS)
        return f"{100 * (2 * slow / (before + after) - 1):.1f} % at {rate:.1f} GB/s"


def measure_slowdown(decode: str, work: Work, host: torch.Tensor) -> dict[str, Any]:
    """How much longer a memory-bound decode takes while pages move, in per cent."""
    beside, link = Beside(getattr(Decodes(), decode)()), LinkRig(work, host)
    found: dict[str, Any] = {"alone, us": beside.alone_us()}
    for direction, copy in copies_alone(link).items():
        found[f"one copy {direction}"] = beside.slowed(link.nbytes, copy)
    for way, direct in (("turns", False), ("zero-copy", True)):
        out, back = (Transfers(c, direct=direct) for c in (link.rig.collator, link.back))
        link.check(out, back)
        moves = {
            "D2H": partial(out.to_host, link.runs, link.host),
            "H2D": partial(back.to_pages, link.runs, link.other),
        }
        for direction, move in moves.items():
            found[f"{way} {direction}"] = beside.slowed(link.nbytes, move)
    return found


@triton.jit  # type: ignore[untyped-decorator]
def write_kernel(  # type: ignore[no-untyped-def]
    target_ptr,  # int32
    order_ptr,
    pieces,
    WORDS: tl.constexpr,  # noqa: N803
):
    """Writes pieces of so many words to the places of that order."""
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        place = tl.load(order_ptr + piece).to(tl.int64) * WORDS
        words = tl.arange(0, WORDS)
        tl.store(target_ptr + place + words, words + piece)


class Writes:
    """Writes of as many bytes as the link brings, at about its rate, without it."""

    def __init__(self) -> None:
        self._target = torch.empty(2 * LINK_BYTES // 4, dtype=torch.int32, device=DEVICE)
        self._order = torch.randperm(2 * LINK_BYTES // PIECE_BYTES, device=DEVICE).int()

    def ways(self) -> dict[str, Callable[[], Copied]]:
        """Each moves LINK_BYTES."""
        found = {"by one program": self._replays(partial(self._write, 0, LINK_BYTES, 1))}
        for size in BURSTS:
            found[f"{size} MiB at once"] = self._replays(partial(self._bursts, size << 20))
        return found

    def _replays(self, work: Callable[[], None]) -> Callable[[], Copied]:
        graph = _graph_of(work, 1, priority=-1)  # as transfers have

        def call() -> Copied:
            graph.replay()
            return Copied()

        return call

    def _write(self, first: int, size: int, programs: int) -> None:
        pieces = size // PIECE_BYTES
        order = self._order[first // PIECE_BYTES :]
        write_kernel[(programs,)](self._target, order, pieces, PIECE_BYTES // 4, num_warps=4)

    def _bursts(self, size: int) -> None:
        for first in range(0, LINK_BYTES, size):
            torch.cuda._sleep(int(size / LINK_RATE * CLOCK))  # type: ignore[no-untyped-call]
            self._write(first, size, size // PIECE_BYTES)


def measure_writes() -> dict[str, Any]:
    """How much longer a memory-bound kernel takes while memory is written, in per cent."""
    beside = Beside(Decodes().gqa_decode())
    return {name: beside.slowed(LINK_BYTES, move) for name, move in Writes().ways().items()}


def sweep_beside(decode: str, work: Work, host: torch.Tensor) -> dict[str, Any]:
    """What a decode loses, and at which rate, by MiB of a buffer and programs a multiprocessor."""
    beside, link = Beside(getattr(Decodes(), decode)()), LinkRig(work, host)
    multiprocessors = torch.cuda.get_device_properties(DEVICE).multi_processor_count
    found = {}
    for size, programs in itertools.product(SWEPT_SIZES, SWEPT_PROGRAMS):
        out, back = (
            Transfers(c, buffer_bytes=size << 20, programs=programs * multiprocessors)
            for c in (link.rig.collator, link.back)
        )
        link.check(out, back)
        if size << 20 <= KEPT_BYTES:
            move = partial(out.to_host, link.runs, link.host)
            found[f"D2H, {size} MiB, {programs}"] = beside.slowed(link.nbytes, move)
        move = partial(back.to_pages, link.runs, link.other)
        found[f"H2D, {size} MiB, {programs}"] = beside.slowed(link.nbytes, move)
    return found


class Copied:
    """A copy under way."""

    def __init__(self) -> None:
        self._done = torch.cuda.current_stream().record_event()

    def wait(self) -> None:
        self._done.synchronize()


def copies_alone(link: LinkRig) -> dict[str, Callable[[], Copied]]:
    """One large copy of as many bytes, without a kernel: the least that copies cost. And many to
    one small place, which the L2 could hold."""
    here = torch.empty_like(link.host, device=DEVICE)

    def copy(target: torch.Tensor, source: torch.Tensor) -> Copied:
        target.copy_(source, non_blocking=True)
        return Copied()

    sources = np.arange(link.nbytes // AGAIN_BYTES) * AGAIN_BYTES + link.host.data_ptr()
    targets, sizes = np.full_like(sources, here.data_ptr()), np.full_like(sources, AGAIN_BYTES)
    stream = _stream()

    def copy_again() -> Copied:
        stream.wait_stream(torch.cuda.current_stream())
        for part in np.split(np.arange(len(sources)), 4):
            cuda_runtime().copy_batch(targets[part], sources[part], sizes[part], stream.cuda_stream)
        torch.cuda.current_stream().wait_stream(stream)
        return Copied()

    return {
        "D2H": partial(copy, link.host, here),
        "H2D": partial(copy, here, link.host),
        "H2D to the same 128 KiB": copy_again,
    }


def _graph_of(call: Callable[[], object], times: int, *, priority: int = 0) -> torch.cuda.CUDAGraph:
    """priority: of its kernels."""
    stream = _stream(priority)
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(times):
            call()
    return graph


class Waits(Protocol):
    """What a move gives."""

    def wait(self) -> None:
        """Returns when all has arrived."""


class Mover(threading.Thread):
    """Moves pages without a pause until it is stopped."""

    def __init__(self, move: Callable[[], Waits]) -> None:
        super().__init__()
        self._move = move
        self._stop_asked = threading.Event()
        self.started = threading.Event()
        self.ends: list[float] = []  # of transfers, in seconds
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            # A stream of its own, or each transfer would wait for the work before it.
            with torch.cuda.device(DEVICE), torch.cuda.stream(_stream()):
                last = self._move()
                self.started.set()
                while not self._stop_asked.is_set():
                    following = self._move()
                    last.wait()
                    self.ends.append(time.perf_counter())
                    last = following
                last.wait()
        except Exception as error:
            self.error = error
        finally:
            self.started.set()

    def stop(self) -> None:
        """Waits for its end; raises what it has raised."""
        self._stop_asked.set()
        self.join()
        if self.error is not None:
            raise self.error


def _meanwhile(
    nbytes: int, move: Callable[[], Waits], graph: torch.cuda.CUDAGraph
) -> tuple[float, float]:
    """us of one replay while another thread moves pages, and at how many GB/s it does."""
    mover = Mover(move)
    mover.start()
    mover.started.wait()
    start = time.perf_counter()
    taken = eager_us(graph.replay, REPLAYS)
    end = time.perf_counter()
    mover.stop()
    torch.cuda.synchronize()
    ends = [at for at in mover.ends if start <= at <= end]
    rate = (len(ends) - 1) * nbytes / (ends[-1] - ends[0]) / 1e9 if len(ends) > 1 else 0.0
    return taken, rate


def rows_of(report: Report, host: torch.Tensor, *, sweep: bool) -> None:
    report.row("ceiling, HBM", copy_ceiling)
    report.row("ceiling, link, GB/s", partial(link_ceiling, host))
    if sweep:
        for work in (PIECES[0], PIECES[2], LATENT, QUANTISED):
            report.row(f"sweep, {work.name}", partial(sweep_form, work, SWEPT))
        report.row("sweep, kept", partial(sweep_form, QUANTISED_LATENT, SWEPT_KEPT))
        report.row("sweep, link, GB/s", partial(sweep_link, PIECES[2], host))
        for decode in ("gqa_decode", "gqa_ring"):
            report.row(f"sweep, {decode}", partial(sweep_beside, decode, PIECES[2], host))
        return
    for work in (*PIECES, *FORMS):
        kind = "pieces" if work in PIECES else "form"
        report.row(f"{kind}: {work.name}, TB/s", partial(measure_form, work))
    for work in LINKED:
        report.row(f"link: {work.name}, GB/s", partial(measure_link, work, host))
    for work in LINKED_LONG:
        report.row(f"link, 1 GiB: {work.name}, GB/s", partial(measure_long, work, host))
    for decode in ("gqa_decode", "gqa_ring"):
        for work in (PIECES[2], STORED_SMALL):
            row = f"slowdown of {decode}: {work.name}"
            report.row(row, partial(measure_slowdown, decode, work, host))
    report.row("slowdown by writing alone", measure_writes)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true", help="try other ways to cut the work")
    parser.add_argument("--only", default="", help="the rows whose name has it")
    parser.add_argument("--json", type=Path, help="where to write what was measured")
    options = parser.parse_args()
    print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    torch.manual_seed(0)
    host = torch.empty(2 * LONG_BYTES, dtype=torch.uint8, pin_memory=True)
    sweep = " --sweep" if options.sweep else ""
    report = Report(f"python -m benchmarks.gpu.collation{sweep}", options.only)
    rows_of(report, host, sweep=options.sweep)
    if options.json:
        options.json.write_text(json.dumps(report.results, indent=2))
    report.end()


if __name__ == "__main__":
    main()
