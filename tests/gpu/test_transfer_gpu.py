"""Transfers on a GPU: the bytes that arrive, when they may be read, and what is refused."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from kvstore_kernels import transfer
from kvstore_kernels.collate import Collator
from kvstore_kernels.collate_reference import collate_reference
from kvstore_kernels.cuda_runtime import (
    CudaCallFailedError,
    Registration,
    cuda_runtime,
    host_is_coherent,
)
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.page_table import CellForm, PageTable
from kvstore_kernels.transfer import Transfers

POISON = 0xA5
TIMES = 100
LONG_WAIT = 50_000_000  # GPU cycles, some 30 ms
PAGES, BLOCKS = 130, 100
SHAPE = (4, 2, PAGES, 16, 8, 64)


@dataclass(frozen=True)
class Rig:
    """Pages with numbers, and the rows that some blocks of them are."""

    pages: torch.Tensor
    collator: Collator
    runs: torch.Tensor
    rows: torch.Tensor  # pinned

    def poisoned(self, gap: int = 0) -> torch.Tensor:
        """Memory for such rows."""
        shape = (BLOCKS, self.collator.form.nbytes + gap)
        return torch.full(shape, POISON, dtype=torch.uint8).pin_memory()


@pytest.fixture(scope="module", params=[False, True], ids=["bytes", "quantised"])
def rig(request: pytest.FixtureRequest, gpu: torch.device) -> Rig:
    generator = torch.Generator().manual_seed(5)
    numbers = torch.randn(SHAPE, generator=generator).to(torch.bfloat16)
    form = CellForm(
        layers=4, heads=8, head_dim=64, block_tokens=16,
        dtype=torch.float8_e4m3fn if request.param else torch.bfloat16, scaled=request.param,
    )  # fmt: skip
    pages = numbers.to(gpu)
    collator = Collator(PageTable.of(pages, "LKPNHD"), form)
    runs = torch.randperm(PAGES, generator=generator)[:BLOCKS, None]
    rows = torch.empty((BLOCKS, form.nbytes), dtype=torch.uint8)
    table = PageTable.of(numbers, "LKPNHD")
    collate_reference(table, collator.pairing, runs, rows)
    return Rig(pages, collator, runs, rows.pin_memory())


@pytest.fixture
def other(rig: Rig) -> Iterator[Rig]:
    """The same rows, and pages that have nothing yet."""
    pages = torch.zeros_like(rig.pages)
    collator = Collator(PageTable.of(pages, "LKPNHD"), rig.collator.form)
    yield Rig(pages, collator, rig.runs, rig.rows)
    torch.cuda.synchronize()


def rows_in(rig: Rig) -> torch.Tensor:
    """What is in the pages now, as rows on the CPU."""
    rows = torch.empty(rig.rows.shape, dtype=torch.uint8, device=rig.pages.device)
    Collator(rig.collator.table, rig.collator.form).collate(rig.runs, rows)
    return rows.cpu()


def same_pages(rig: Rig, original: Rig) -> bool:
    picked = rig.runs[:, 0].to(rig.pages.device)
    here, there = rig.pages[:, :, picked], original.pages[:, :, picked]
    if not rig.collator.form.scaled:
        return torch.equal(here, there)
    return torch.allclose(here.float(), there.float(), rtol=1 / 15, atol=1e-2)


BUFFERS = [
    (2, None, None),
    (3, 16 << 20, None),
    (3, 1 << 18, 7),
    (2, 1, 1),  # 1: room for one block
    (1, 1 << 18, None),
]


@pytest.mark.parametrize(("buffers", "buffer_bytes", "programs"), BUFFERS)
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("gap", [0, 16, 64])
def test_rows_and_pages_arrive(
    rig: Rig,
    other: Rig,
    buffers: int,
    buffer_bytes: int | None,
    programs: int | None,
    direct: bool,
    gap: int,
) -> None:
    """And nothing else is written."""
    options = {
        "buffers": buffers, "buffer_bytes": buffer_bytes, "programs": programs, "direct": direct,
    }  # fmt: skip
    host = rig.poisoned(gap)
    out = Transfers(rig.collator, **options).to_host(rig.runs, host)
    out.wait()
    assert out.arrived() == out.blocks == BLOCKS
    assert torch.equal(host[:, : rig.rows.shape[1]], rig.rows)
    assert bool((host[:, rig.rows.shape[1] :] == POISON).all())
    back = Transfers(other.collator, **options).to_pages(rig.runs, host)
    back.wait()
    assert same_pages(other, rig)
    unused = torch.ones(PAGES, dtype=torch.bool)
    unused[rig.runs[:, 0]] = False
    assert not other.pages[:, :, unused.to(other.pages.device)].any()


@pytest.mark.parametrize("gap", [0, 16])
@pytest.mark.parametrize("numbers", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_turns_of_several_sizes(
    rig: Rig,
    other: Rig,
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    numbers: str,
    gap: int,
) -> None:
    """Small ones and large ones, each way, in many transfers that follow each other."""
    monkeypatch.setattr(transfer, "SMALL_BYTES", 1 << 18)
    out, back = (
        Transfers(collator, buffer_bytes=2 << 20) for collator in (rig.collator, other.collator)
    )
    runs = rig.runs.to(dtype).to(numbers)
    host = rig.poisoned(gap)
    nbytes = rig.rows.shape[1]
    for _ in range(TIMES // 5):
        host.fill_(POISON)
        out.to_host(runs, host).wait()
        assert torch.equal(host[:, :nbytes], rig.rows)
        assert bool((host[:, nbytes:] == POISON).all())
        other.pages.zero_()
        back.to_pages(runs, host).wait()
        assert same_pages(other, rig)


@pytest.mark.parametrize("pinned", [False, True])
def test_numbers_of_runs_are_the_caller_s_again_when_the_call_returns(
    rig: Rig, other: Rig, pinned: bool
) -> None:
    """Though the kernels that read them have not begun by then."""
    out, back = Transfers(rig.collator), Transfers(other.collator)
    out.to_host(rig.runs, rig.poisoned()).wait()  # compiles
    back.to_pages(rig.runs, rig.rows).wait()
    other.pages.zero_()
    host = rig.poisoned()
    for move, rows in ((out.to_host, host), (back.to_pages, rig.rows)):
        runs = rig.runs.clone()
        runs = runs.pin_memory() if pinned else runs
        torch.cuda._sleep(LONG_WAIT)
        under_way = move(runs, rows)
        runs.fill_(0)
        under_way.wait()
    assert torch.equal(host, rig.rows)
    assert same_pages(other, rig)


def test_numbers_of_transfers_that_follow_each_other_are_kept_apart(
    rig: Rig, other: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have one place on the GPU, and the turns of each transfer read its own there."""
    monkeypatch.setattr(transfer, "SMALL_BYTES", 1)
    out, back = (Transfers(rig_.collator, buffer_bytes=1 << 18) for rig_ in (rig, other))
    orders = [
        torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(seed)) for seed in range(8)
    ]
    hosts = [rig.poisoned() for _ in orders]
    rows = [rig.rows[order].pin_memory() for order in orders]
    for _ in range(TIMES // 20):
        other.pages.zero_()
        torch.cuda._sleep(LONG_WAIT // 10)
        moves = []
        for order, host, row in zip(orders, hosts, rows, strict=True):
            moves += [out.to_host(rig.runs[order], host), back.to_pages(rig.runs[order], row)]
        for move in moves:
            move.wait()
        assert all(torch.equal(host, row) for host, row in zip(hosts, rows, strict=True))
        assert same_pages(other, rig)


def test_transfers_of_more_and_more_blocks(rig: Rig) -> None:
    """None waits for the one before it, whose numbers of runs are still read."""
    transfers = Transfers(rig.collator)
    torch.cuda._sleep(LONG_WAIT)
    under_way = []
    for blocks in (1, 2, 50, 100, 7, 100):
        host = rig.poisoned()[:blocks]
        under_way.append((transfers.to_host(rig.runs[:blocks], host), host))
    for moved, host in under_way:
        moved.wait()
        assert torch.equal(host, rig.rows[: len(host)])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-1, PAGES, PAGES + (1 << 30)])
def test_runs_that_do_not_exist_are_refused_and_nothing_is_written(
    rig: Rig, other: Rig, dtype: torch.dtype, wrong: int
) -> None:
    """Nor is the next transfer spoiled by what had begun."""
    host, runs = rig.poisoned(), rig.runs.to(dtype, copy=True)
    runs[BLOCKS // 2] = wrong
    out, back = Transfers(rig.collator), Transfers(other.collator)
    with pytest.raises(KernelArgumentError, match="runs"):
        out.to_host(runs, host)
    with pytest.raises(KernelArgumentError, match="runs"):
        back.to_pages(runs, rig.rows)
    torch.cuda.synchronize()
    assert bool((host == POISON).all())
    assert not other.pages.any()
    out.to_host(rig.runs.to(dtype), host).wait()
    assert torch.equal(host, rig.rows)
    back.to_pages(rig.runs.to(dtype), rig.rows).wait()
    assert same_pages(other, rig)


@pytest.mark.parametrize("direct", [False, True])
def test_rows_anywhere_in_a_pool(rig: Rig, other: Rig, direct: bool) -> None:
    nbytes = rig.collator.form.nbytes
    slot = -(-nbytes // 4096) * 4096
    order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(2))
    pool = torch.full((BLOCKS * slot,), POISON, dtype=torch.uint8).pin_memory()
    Transfers(rig.collator, direct=direct).to_host(rig.runs, pool, order * slot).wait()
    assert torch.equal(pool.view(BLOCKS, slot)[order, :nbytes], rig.rows)
    assert bool((pool.view(BLOCKS, slot)[:, nbytes:] == POISON).all())
    Transfers(other.collator, direct=direct).to_pages(rig.runs, pool, order * slot).wait()
    assert same_pages(other, rig)


@pytest.mark.parametrize("numbers", ["cpu", "cuda"])
@pytest.mark.parametrize("tokens", [16, 64, 256], ids=["small", "larger", "large"])
def test_pages_that_are_rows_are_copied_as_they_are(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tokens: int, numbers: str
) -> None:
    """By copies alone where they are large and the host knows the runs' numbers; else as others
    are. Some of them follow each other."""
    monkeypatch.setattr(transfer, "SMALL_BYTES", 1 << 20)
    generator = torch.Generator().manual_seed(4)
    shape = (PAGES, 4, 4, 2, tokens, 64)
    pages = torch.randint(-(1 << 15), 1 << 15, shape, dtype=torch.int16, generator=generator)
    form = CellForm(layers=4, heads=4, head_dim=64, block_tokens=tokens, dtype=torch.bfloat16)
    pools = [pages.to(gpu), torch.zeros_like(pages).to(gpu)]
    tables = [PageTable.of(pool.view(torch.bfloat16), "PHLKND") for pool in pools]
    out, back = (Transfers(Collator(table, form), buffer_bytes=tokens << 14) for table in tables)
    runs = torch.randperm(PAGES, generator=generator)[:BLOCKS, None]
    runs[BLOCKS // 2 :] = runs[BLOCKS // 2 :].sort(0).values
    host = torch.full((BLOCKS, form.nbytes), POISON, dtype=torch.uint8).pin_memory()
    for _ in range(3):
        out.to_host(runs.to(numbers), host).wait()
        assert torch.equal(host, pages[runs[:, 0]].view(torch.uint8).view(BLOCKS, -1))
        back.to_pages(runs.to(numbers), host).wait()
        assert torch.equal(pools[1][runs[:, 0].to(gpu)].cpu(), pages[runs[:, 0]])
        unused = torch.ones(PAGES, dtype=torch.bool)
        unused[runs[:, 0]] = False
        assert not pools[1][unused.to(gpu)].any()


@pytest.mark.parametrize("buffer_bytes", [1 << 19, None])
def test_a_hundred_transfers_share_buffers(rig: Rig, buffer_bytes: int | None) -> None:
    """None waits for the one before it, and every one is right."""
    transfers = Transfers(rig.collator, buffer_bytes=buffer_bytes)
    hosts = [rig.poisoned() for _ in range(10)]
    for _ in range(TIMES // 10):
        for host in hosts:
            host.fill_(POISON)
        under_way = [transfers.to_host(rig.runs, host) for host in hosts]
        for moved, host in zip(under_way, hosts, strict=True):
            moved.wait()
            assert torch.equal(host, rig.rows)


def test_both_ways_at_once(rig: Rig, other: Rig) -> None:
    out, back = Transfers(rig.collator), Transfers(other.collator)
    for _ in range(TIMES // 10):
        host = rig.poisoned()
        other.pages.zero_()
        moves = out.to_host(rig.runs, host), back.to_pages(rig.runs, rig.rows)
        for move in moves:
            move.wait()
        assert torch.equal(host, rig.rows)
        assert same_pages(other, rig)


def test_it_begins_after_what_the_stream_was_given_before(rig: Rig, other: Rig) -> None:
    """And the stream may write the pages again once they were read."""
    transfers = Transfers(other.collator)
    transfers.to_host(rig.runs, rig.poisoned()).wait()  # compiles
    host = rig.poisoned()
    torch.cuda._sleep(LONG_WAIT)
    other.pages.copy_(rig.pages)
    moved = transfers.to_host(rig.runs, host)
    moved.follow_source(torch.cuda.current_stream())
    other.pages.fill_(7)
    assert moved.arrived() == 0
    moved.wait()
    assert torch.equal(host, rig.rows)


def test_the_stream_reads_pages_once_they_arrived(rig: Rig, other: Rig) -> None:
    """And what it had read before is not overwritten too early."""
    transfers = Transfers(other.collator, buffer_bytes=1 << 19)
    transfers.to_pages(rig.runs, rig.rows).wait()  # compiles
    other.pages.fill_(3)
    torch.cuda._sleep(LONG_WAIT)
    before = other.pages.clone()
    transfers.to_pages(rig.runs, rig.rows).follow(torch.cuda.current_stream())
    after = other.pages.clone()
    torch.cuda.synchronize()
    assert bool((before == 3).all())
    picked = rig.runs[:, 0].to(after.device)
    assert torch.equal(after[:, :, picked], other.pages[:, :, picked])
    assert same_pages(other, rig)


def test_host_memory_may_be_written_again_once_it_was_read(rig: Rig, other: Rig) -> None:
    host = rig.poisoned()
    host.copy_(rig.rows)
    moved = Transfers(other.collator, buffer_bytes=1 << 19).to_pages(rig.runs, host)
    moved.wait_source()
    host.fill_(POISON)
    moved.wait()
    assert same_pages(other, rig)


def test_leading_blocks_arrive_first(rig: Rig) -> None:
    transfers = Transfers(rig.collator, buffers=2, buffer_bytes=1)
    host = rig.poisoned()
    moved = transfers.to_host(rig.runs, host)
    for wanted in (0, 1, 10, BLOCKS):
        moved.wait(wanted)
        arrived = moved.arrived()
        assert arrived >= wanted
        assert torch.equal(host[:arrived], rig.rows[:arrived])


def test_a_transfer_whose_caller_forgot_it_is_right(rig: Rig) -> None:
    """Its host memory and run numbers are not given to others before it is through."""
    transfers = Transfers(rig.collator, buffer_bytes=1 << 19)
    host = rig.poisoned()
    torch.cuda._sleep(LONG_WAIT)
    transfers.to_host(rig.runs, host)
    more = [torch.full_like(rig.rows, 1).pin_memory() for _ in range(3)]
    torch.cuda.synchronize()
    assert torch.equal(host, rig.rows)
    assert all(bool((memory == 1).all()) for memory in more)


def test_no_blocks_are_there_at_once(rig: Rig) -> None:
    moved = Transfers(rig.collator).to_host(rig.runs[:0], rig.rows[:0])
    moved.wait()
    assert (moved.blocks, moved.arrived()) == (0, 0)


def test_shared_memory_that_is_registered(rig: Rig, other: Rig) -> None:
    nbytes = rig.rows.numel()
    file = os.memfd_create("pool")
    os.ftruncate(file, nbytes)
    shared = np.frombuffer(mmap.mmap(file, nbytes), dtype=np.uint8)
    os.close(file)
    rows = torch.from_numpy(shared).view(rig.rows.shape)
    with pytest.raises(KernelArgumentError, match="pinned"):
        Transfers(rig.collator).to_host(rig.runs, rows)
    with Registration(rows):
        for direct in (False, True):
            rows.fill_(POISON)
            Transfers(rig.collator, direct=direct).to_host(rig.runs, rows).wait()
            assert torch.equal(rows, rig.rows)
        Transfers(other.collator).to_pages(rig.runs, rows).wait()
        assert same_pages(other, rig)
        with pytest.raises(CudaCallFailedError, match="cudaHostRegister"):
            Registration(rows)
    assert not rows.is_pinned()
    torch.zeros(8, device=rig.pages.device).sum().item()  # the failed call left no error behind


def test_wrong_arguments_begin_nothing(rig: Rig) -> None:
    transfers, host = Transfers(rig.collator), rig.poisoned()
    for arguments in (
        (rig.runs, host[:, :-1]),
        (rig.runs, host[1:]),
        (rig.runs + PAGES, host),
        (rig.runs, host.to(rig.pages.device)),
        (rig.runs, host.flatten(), torch.arange(BLOCKS)),
    ):
        with pytest.raises(KernelArgumentError):
            transfers.to_host(*arguments)
    torch.cuda.synchronize()
    assert bool((host == POISON).all())


@pytest.mark.parametrize("call", ["copy_each", "copy_batch"])
def test_pieces_are_copied_each_and_in_batches(gpu: torch.device, call: str) -> None:
    runtime = cuda_runtime()
    if call == "copy_batch" and not runtime.has_batches:
        pytest.skip("this CUDA runtime has no batched copies")
    generator = torch.Generator().manual_seed(1)
    source = torch.randint(0, 256, (500, 4096), dtype=torch.uint8, generator=generator).to(gpu)
    target = torch.full((500, 4096), POISON, dtype=torch.uint8).pin_memory()
    order = torch.randperm(500, generator=generator)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    getattr(runtime, call)(
        target.data_ptr() + order.numpy() * 4096,
        source.data_ptr() + np.arange(500) * 4096,
        np.full(500, 4000),
        stream.cuda_stream,
    )
    stream.synchronize()
    assert torch.equal(target[order, :4000], source[:, :4000].cpu())
    assert bool((target[:, 4000:] == POISON).all())


def test_a_call_that_fails_is_typed_and_leaves_no_error_behind(gpu: torch.device) -> None:
    with pytest.raises(CudaCallFailedError, match="cudaDeviceGetAttribute"):
        cuda_runtime().device_attribute(100, 99)
    torch.zeros(8, device=gpu).sum().item()


def test_the_l2_may_hold_what_waits_for_its_copy(rig: Rig) -> None:
    """And no less than it could before."""
    most = cuda_runtime().device_attribute(108, 0)  # cudaDevAttrMaxPersistingL2CacheSize
    for buffers in (1, 2, 1):
        before = cuda_runtime().persisting()
        Transfers(rig.collator, buffers=buffers)
        wanted = min(buffers * transfer.KEPT_BYTES // (1 << 20) << 20, most)
        assert cuda_runtime().persisting() >= max(before, wanted * 9 // 10)


def test_the_host_is_probed(gpu: torch.device) -> None:
    assert isinstance(host_is_coherent(gpu), bool)
    assert host_is_coherent(torch.device("cuda:0")) == host_is_coherent(gpu)
