"""The pipeline's order of events, on streams that do their work at any time that is allowed."""

from __future__ import annotations

import contextlib
import ctypes
import random
import weakref
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from kvstore_kernels import transfer, transfer_rows
from kvstore_kernels.collate import Collator
from kvstore_kernels.cuda_runtime import (
    CudaCallFailedError,
    CudaRuntime,
    Registration,
    TransferError,
    cuda_runtime,
)
from kvstore_kernels.errors import KernelArgumentError
from kvstore_kernels.page_table import CellForm, PageTable
from kvstore_kernels.transfer import Transfers
from kvstore_kernels.transfer_ring import (
    Ring,
    Transfer,
    Turn,
    copies_of,
    pass_through,
    turn_sizes,
)
from kvstore_kernels.transfer_rows import HostRows, PinnedAhead, RunNumbers


class FakeGpu:
    """Streams whose work is done in an order that the seed chooses among those allowed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._eager = self._random.uniform(0, 0.7)
        self.streams: list[FakeStream] = []

    def stream(self) -> FakeStream:
        made = FakeStream(self, len(self.streams))
        self.streams.append(made)
        return made

    def step(self) -> bool:
        """Does one thing that may be done now; whether there was one."""
        ready = [stream for stream in self.streams if stream.is_ready()]
        if ready:
            self._random.choice(ready).work.pop(0)()
        return bool(ready)

    def some_steps(self) -> None:
        while self._random.random() < self._eager and self.step():
            pass

    def finish(self) -> None:
        while self.step():
            pass
        assert not any(stream.work for stream in self.streams), "waits for what never comes"


class FakeStream:
    def __init__(self, gpu: FakeGpu, number: int) -> None:
        self.gpu, self.cuda_stream = gpu, number
        self.work: list[Any] = []

    def give(self, work: Callable[[], None]) -> None:
        self.work.append(work)
        self.gpu.some_steps()

    def wait_event(self, event: FakeEvent | FakeRecord) -> None:
        self.work.append(event.last if isinstance(event, FakeRecord) else event)

    def wait_stream(self, other: FakeStream) -> None:
        self.wait_event(other.record_event())

    def synchronize(self) -> None:
        self.record_event().synchronize()

    def record_event(self) -> FakeEvent:
        event = FakeEvent(self.gpu)
        self.give(event.happen)
        return event

    def is_ready(self) -> bool:
        while self.work and isinstance(self.work[0], FakeEvent) and self.work[0].past:
            self.work.pop(0)
        return bool(self.work) and not isinstance(self.work[0], FakeEvent)


class FakeEvent:
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu, self.past = gpu, False

    def happen(self) -> None:
        self.past = True

    def query(self) -> bool:
        return self.past

    def synchronize(self) -> None:
        while not self.past:
            assert self.gpu.step(), "waits for what never comes"


class FakeRecord:
    """An event that is recorded again and again; one waits for what was the last until then."""

    def record(self, stream: FakeStream) -> None:
        self.last = stream.record_event()


class FakePipeline:
    """Numbers that pass through buffers, as blocks do; it sees when one is overwritten in use."""

    def __init__(self, seed: int, buffers: int, room: int) -> None:
        self.gpu = FakeGpu(seed)
        self.filling, self.draining = self.gpu.stream(), self.gpu.stream()
        self.ring, self.room = Ring(buffers), room
        self.small = 1 + seed % room  # blocks of the first turn
        self.buffers = [[-1] * room for _ in range(buffers)]

    def begin(self, source: list[int], target: list[int], fail_at: int | None = None) -> Transfer:
        def fill(turn: Turn) -> None:
            for at in range(turn.first, turn.end):  # in pieces, so that others come between them
                self.filling.give(lambda at=at, turn=turn: put(turn, at))

        def put(turn: Turn, at: int) -> None:
            self.buffers[turn.buffer][at - turn.first] = source[at]

        def drain(turn: Turn) -> None:
            for at in range(turn.first, turn.end):
                self.draining.give(lambda at=at, turn=turn: take(turn, at))
                if at == fail_at:
                    raise TransferError("no")

        def take(turn: Turn, at: int) -> None:
            target[at] = self.buffers[turn.buffer][at - turn.first]

        passed = pass_through(
            self.ring,
            self.ring.turns(turn_sizes(len(source), self.room, self.small)),
            filling=self.filling,
            draining=self.draining,
            fill=fill,
            drain=drain,
        )
        return Transfer(passed, (source, target))


@pytest.mark.parametrize("buffers", [1, 2, 3])
@pytest.mark.parametrize("blocks", [0, 1, 3, 4, 23])
def test_all_blocks_arrive_in_any_order_of_the_gpu_s_work(buffers: int, blocks: int) -> None:
    for seed in range(50):
        pipeline = FakePipeline(seed, buffers, room=3)
        source, target = list(range(blocks)), [-1] * blocks
        transfer = pipeline.begin(source, target)
        assert transfer.blocks == blocks
        pipeline.gpu.finish()
        assert target == source
        assert transfer.arrived() == blocks


def test_transfers_that_follow_each_other_share_the_buffers() -> None:
    for seed in range(50):
        pipeline = FakePipeline(seed, buffers=3, room=2)
        sources = [list(range(100 * n, 100 * n + 7)) for n in range(4)]
        targets = [[-1] * 7 for _ in sources]
        for source, target in zip(sources, targets, strict=True):
            pipeline.begin(source, target)
        pipeline.gpu.finish()
        assert targets == sources


def test_blocks_that_are_said_to_have_arrived_have() -> None:
    for seed in range(50):
        pipeline = FakePipeline(seed, buffers=2, room=3)
        source, target = list(range(20)), [-1] * 20
        transfer = pipeline.begin(source, target)
        seen = 0
        while seen < 20:
            arrived = transfer.arrived()
            assert arrived >= seen
            assert target[:arrived] == source[:arrived]
            seen = arrived
            pipeline.gpu.step()


@pytest.mark.parametrize("wanted", [0, 1, 3, 4, 20])
def test_waiting_for_leading_blocks(wanted: int) -> None:
    for seed in range(20):
        pipeline = FakePipeline(seed, buffers=2, room=3)
        source, target = list(range(20)), [-1] * 20
        pipeline.begin(source, target).wait(wanted)
        assert target[:wanted] == source[:wanted]


def test_waiting_for_all_of_them() -> None:
    pipeline = FakePipeline(0, buffers=2, room=3)
    source, target = list(range(20)), [-1] * 20
    pipeline.begin(source, target).wait()
    assert target == source


def test_the_source_may_be_written_once_it_was_read() -> None:
    for seed in range(50):
        pipeline = FakePipeline(seed, buffers=3, room=3)
        source, target = list(range(20)), [-1] * 20
        transfer = pipeline.begin(source, target)
        transfer.wait_source()
        source[:] = [-2] * 20
        pipeline.gpu.finish()
        assert target == list(range(20))


def test_another_stream_follows_a_transfer() -> None:
    for seed in range(50):
        pipeline = FakePipeline(seed, buffers=2, room=3)
        engine = pipeline.gpu.stream()
        source, target = list(range(10)), [-1] * 10
        seen: list[list[int]] = []
        transfer = pipeline.begin(source, target)
        transfer.follow_source(engine)
        engine.give(lambda source=source: source.__setitem__(slice(None), [-2] * 10))
        transfer.follow(engine)
        engine.give(lambda target=target, seen=seen: seen.append(list(target)))
        pipeline.gpu.finish()
        assert seen == [list(range(10))]


def test_nothing_is_waited_for_where_nothing_moves() -> None:
    gpu = FakeGpu(0)
    empty = Transfer([], None)
    empty.wait()
    empty.wait_source()
    stream = gpu.stream()
    empty.follow(stream)
    empty.follow_source(stream)
    assert not stream.work
    assert (empty.blocks, empty.arrived()) == (0, 0)


def test_a_transfer_that_fails_in_the_middle_spoils_no_later_one() -> None:
    for seed in range(50):
        pipeline = FakePipeline(seed, buffers=2, room=3)
        first, second = [-1] * 10, [-1] * 10
        with pytest.raises(TransferError):
            pipeline.begin(list(range(10)), first, fail_at=4)
        pipeline.begin(list(range(50, 60)), second)
        pipeline.gpu.finish()
        assert first[:5] == [0, 1, 2, 3, 4]
        assert second == list(range(50, 60))


def test_a_ring_without_the_wait_would_be_caught() -> None:
    """The fake finds what it is there for: a buffer that is filled again too early."""
    wrong = 0
    for seed in range(50):
        pipeline = FakePipeline(seed, buffers=2, room=3)
        pipeline.ring.free = lambda _buffer: None  # type: ignore[method-assign]
        source, target = list(range(20)), [-1] * 20
        pipeline.begin(source, target)
        pipeline.gpu.finish()
        wrong += target != source
    assert wrong


def test_turns_go_round_and_go_on_where_the_last_transfer_stopped() -> None:
    ring = Ring(3)
    assert list(ring.turns([2, 2, 1])) == [Turn(0, 0, 0, 2), Turn(1, 1, 2, 4), Turn(2, 2, 4, 5)]
    assert list(ring.turns([2])) == [Turn(3, 0, 0, 2)]
    assert list(ring.turns([2, 1])) == [Turn(4, 1, 0, 2), Turn(5, 2, 2, 3)]
    assert list(ring.turns([])) == []


@pytest.mark.parametrize(
    ("blocks", "room", "small", "sizes"),
    [
        (0, 8, 1, []),
        (1, 8, 2, [1]),
        (3, 8, 2, [2, 1]),
        (10, 8, 2, [2, 8]),
        (30, 12, 1, [1, 4, 12, 12, 1]),
        (99, 64, 2, [2, 8, 32, 57]),
        (5, 2, 7, [2, 2, 1]),  # no turn is larger than a buffer
        (3, 1, 1, [1, 1, 1]),
    ],
)
def test_the_first_turn_is_small_and_the_next_ones_grow(
    blocks: int, room: int, small: int, sizes: list[int]
) -> None:
    assert turn_sizes(blocks, room, small) == sizes


@pytest.mark.parametrize(
    ("there", "here", "copies"),
    [
        ([0], [1000], [(0, 1000, 8)]),
        ([0, 8, 16], [1000, 1008, 1016], [(0, 1000, 24)]),
        ([0, 8, 24, 32], [1000, 1008, 1016, 1024], [(0, 1000, 16), (24, 1016, 16)]),
        ([8, 0], [1000, 1008], [(8, 1000, 8), (0, 1008, 8)]),
        ([0, 8], [1000, 1016], [(0, 1000, 8), (8, 1016, 8)]),  # close on one side only
        ([0, 16], [1000, 1016], [(0, 1000, 8), (16, 1016, 8)]),  # what is between is not ours
        ([1 << 40, (1 << 40) + 8], [1000, 1008], [(1 << 40, 1000, 16)]),
    ],
)
def test_rows_that_follow_each_other_are_one_copy(
    there: list[int], here: list[int], copies: list[tuple[int, int, int]]
) -> None:
    made = copies_of(np.array(there), np.array(here), 8)
    assert list(zip(*(array.tolist() for array in made), strict=True)) == copies


@pytest.mark.parametrize(("distance", "dense"), [(8, True), (24, False)])
def test_rows_at_equal_distances(distance: int, dense: bool) -> None:
    host = torch.zeros(5 * distance, dtype=torch.uint8).view(5, distance)
    rows = HostRows(host, None, 8)
    wanted = [host.data_ptr() + row * distance for row in range(5)]
    assert [rows.start(row) for row in range(5)] == rows.starts.tolist() == wanted
    assert rows.dense == dense


@pytest.mark.parametrize(
    ("offsets", "dense"),
    [([0, 16, 32], True), ([32, 48], True), ([16, 0], False), ([0, 32], False), ([64], True)],
)
def test_rows_at_offsets(offsets: list[int], dense: bool) -> None:
    host = torch.zeros(80, dtype=torch.uint8)
    rows = HostRows(host, torch.tensor(offsets), 16)
    wanted = [host.data_ptr() + offset for offset in offsets]
    assert [rows.start(row) for row in range(len(offsets))] == rows.starts.tolist() == wanted
    assert rows.dense == dense


def test_one_row_is_dense_whatever_lies_behind_it() -> None:
    host = torch.zeros((2, 24), dtype=torch.uint8)
    assert HostRows(host[:1], None, 8).dense


class FakeLibrary:
    """A libcudart that copies in this process, at once."""

    def __init__(self, version: int, fails: dict[str, int] | None = None) -> None:
        self.version, self.fails = version, fails or {}
        self.calls: list[str] = []
        self.persisting = 50
        self.cudaGetErrorName = _NameOfError()

    def cudaGetLastError(self) -> int:
        self.calls.append("cudaGetLastError")
        return 0

    def cudaRuntimeGetVersion(self, version: Any) -> int:
        version._obj.value = self.version
        return self.fails.get("cudaRuntimeGetVersion", 0)

    def cudaDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
        value._obj.value = attribute + device
        return self.fails.get("cudaDeviceGetAttribute", 0)

    def cudaHostRegister(self, address: Any, size: Any, flags: int) -> int:
        self.calls.append(f"cudaHostRegister({size.value}, {flags})")
        return self.fails.get("cudaHostRegister", 0)

    def cudaHostUnregister(self, address: Any) -> int:
        self.calls.append("cudaHostUnregister")
        return 0

    def cudaMemcpyAsync(self, target: Any, source: Any, size: Any, kind: int, stream: Any) -> int:
        self.calls.append("cudaMemcpyAsync")
        assert (kind, stream.value) == (4, 7)
        if not self.fails.get("cudaMemcpyAsync"):
            ctypes.memmove(target, source, size.value)
        return self.fails.get("cudaMemcpyAsync", 0)

    def cudaMemcpyBatchAsync(self, *arguments: Any) -> int:
        self.calls.append("cudaMemcpyBatchAsync")
        targets, sources, sizes, count, attributes, first, n_attributes, *failed, stream = arguments
        assert len(failed) == (self.version < 13_000)
        assert (first._obj.value, n_attributes.value, stream.value) == (0, 1, 7)
        assert attributes._obj.source_order == 1
        pointers = ctypes.POINTER(ctypes.c_size_t)
        columns = [
            ctypes.cast(array, pointers)[: count.value] for array in (targets, sources, sizes)
        ]
        for target, source, size in zip(*columns, strict=True):
            ctypes.memmove(target, source, size)
        return self.fails.get("cudaMemcpyBatchAsync", 0)

    def cudaGetDevice(self, device: Any) -> int:
        device._obj.value = 2
        return 0

    def cudaDeviceGetLimit(self, value: Any, limit: int) -> int:
        assert limit == 6
        value._obj.value = self.persisting
        return self.fails.get("cudaDeviceGetLimit", 0)

    def cudaDeviceSetLimit(self, limit: int, value: Any) -> int:
        assert limit == 6
        self.calls.append(f"cudaDeviceSetLimit({value.value})")
        self.persisting = value.value
        return 0


class _NameOfError:
    restype: Any = None

    def __call__(self, code: int) -> bytes:
        return f"cudaError{code}".encode()


def copied(library: FakeLibrary, pieces: int, call: str = "copy") -> bool:
    """Whether so many pieces of 5 bytes arrive, in another order than they lie."""
    source = np.random.default_rng(0).integers(0, 256, 8 * pieces, dtype=np.uint8)
    target = np.zeros_like(source)
    order = np.random.default_rng(1).permutation(pieces) * 8
    getattr(CudaRuntime(library), call)(
        target.ctypes.data + order,
        source.ctypes.data + order[::1],
        np.full(pieces, 5, dtype=np.int64),
        7,
    )
    wanted = source.reshape(-1, 8).copy()
    wanted[:, 5:] = 0
    return bool((target == wanted.ravel()).all())


@pytest.mark.parametrize("version", [12_080, 13_000])
def test_many_pieces_are_one_call_where_the_runtime_has_it(version: int) -> None:
    library = FakeLibrary(version)
    assert copied(library, 100)
    assert library.calls == ["cudaMemcpyBatchAsync"]


def test_few_pieces_or_an_old_runtime_have_a_call_each() -> None:
    library = FakeLibrary(13_000)
    assert copied(library, 2)
    assert library.calls == ["cudaMemcpyAsync"] * 2
    library = FakeLibrary(12_060)
    assert copied(library, 100)
    assert library.calls == ["cudaMemcpyAsync"] * 100
    with pytest.raises(TransferError, match="no batched copies"):
        copied(library, 100, "copy_batch")


@pytest.mark.parametrize(("call", "pieces"), [("cudaMemcpyAsync", 1), ("cudaMemcpyBatchAsync", 9)])
def test_calls_that_fail_are_typed_and_leave_no_error_behind(call: str, pieces: int) -> None:
    library = FakeLibrary(13_000, {call: 700})
    with pytest.raises(CudaCallFailedError, match=f"{call} failed with cudaError700") as caught:
        copied(library, pieces)
    assert (caught.value.call, caught.value.code) == (call, 700)
    assert library.calls[-1] == "cudaGetLastError"


def test_attributes_are_asked_of_the_device() -> None:
    assert CudaRuntime(FakeLibrary(13_000)).device_attribute(100, 1) == 101
    with pytest.raises(CudaCallFailedError):
        CudaRuntime(FakeLibrary(13_000, {"cudaRuntimeGetVersion": 35}))


def test_what_may_persist_in_the_l2_only_grows() -> None:
    """Up to what there can be, which this device has 110 bytes of."""
    library = FakeLibrary(13_000)
    runtime = CudaRuntime(library)
    for nbytes in (70, 60, 70, 110, 1000):
        runtime.let_persist(nbytes)
    assert library.calls == ["cudaDeviceSetLimit(70)", "cudaDeviceSetLimit(110)"]
    with pytest.raises(CudaCallFailedError):
        CudaRuntime(FakeLibrary(13_000, {"cudaDeviceGetLimit": 1})).let_persist(70)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_numbers_of_runs(dtype: torch.dtype) -> None:
    """Those below 0 are too large, as they are for kernels."""
    runs = torch.tensor([[3, 1], [7, 0]], dtype=dtype)
    numbers = RunNumbers(runs, PinnedAhead())
    assert (numbers.blocks, numbers.nbytes, numbers.largest()) == (2, 4 * dtype.itemsize, 7)
    assert numbers.address(1) == runs.data_ptr() + 2 * dtype.itemsize
    numbers.are_at(1000)
    assert [numbers.address(block) for block in range(2)] == [1000, 1000 + 2 * dtype.itemsize]
    runs[0, 1] = -1
    assert numbers.largest() == 2 ** (8 * dtype.itemsize) - 1


@pytest.mark.parametrize(("read_only", "flags"), [(False, 3), (True, 11)])
def test_memory_is_registered_until_it_is_closed(read_only: bool, flags: int) -> None:
    library = FakeLibrary(13_000)
    memory = torch.zeros(6, dtype=torch.int16)
    with Registration(memory, read_only=read_only, runtime=CudaRuntime(library)) as held:
        assert library.calls == [f"cudaHostRegister(12, {flags})"]
        held.close()
    assert library.calls[1:] == ["cudaHostUnregister"]


def test_memory_that_cannot_be_registered() -> None:
    library = FakeLibrary(13_000, {"cudaHostRegister": 712})
    with pytest.raises(CudaCallFailedError) as caught:
        Registration(torch.zeros(6), runtime=CudaRuntime(library))
    assert caught.value.code == 712
    for memory in (torch.zeros(6, 2)[:, 0], torch.zeros(0), torch.zeros(2, device="meta")):
        with pytest.raises(KernelArgumentError):
            Registration(memory, runtime=CudaRuntime(library))


@pytest.mark.skipif(torch.cuda.is_available(), reason="about a machine without a GPU")
def test_without_a_gpu_there_is_no_runtime() -> None:
    with pytest.raises(TransferError):
        cuda_runtime()


def test_transfers_need_a_gpu() -> None:
    pages = torch.zeros(1, 3, 2, 1, 8, dtype=torch.float16)
    form = CellForm(
        layers=1, heads=1, head_dim=8, block_tokens=2, dtype=torch.float16, kinds=1
    )  # fmt: skip
    with pytest.raises(KernelArgumentError, match="on a GPU"):
        Transfers(Collator(PageTable.of(pages, "LPNHD"), form))


class FakeCuda:
    """All of a GPU that `Transfers` uses, with work done in any order that streams allow."""

    def __init__(self, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.gpu = FakeGpu(seed)
        self.current = self.gpu.stream()
        self.persisting = 0
        self._memory: list[torch.Tensor] = []
        cuda: dict[str, Any] = {
            "Stream": lambda *_, **__: self.gpu.stream(),
            "Event": FakeRecord,
            "stream": contextlib.nullcontext,
            "device": contextlib.nullcontext,
            "current_stream": lambda: self.current,
            "device_count": lambda: 1,
            "get_device_properties": lambda _: SimpleNamespace(multi_processor_count=2),
        }
        for name, fake in cuda.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        monkeypatch.setattr(torch.Tensor, "is_pinned", lambda _: True)
        monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        monkeypatch.setattr(torch, "empty", self._empty)  # torch's is another's in stream order
        active = SimpleNamespace(get_current_stream=lambda _: self.current.cuda_stream)
        mine: dict[str, Any] = {
            "require": lambda *_: None,  # pages would have to be on a GPU
            "driver": SimpleNamespace(active=active),
            "host_is_coherent": lambda _: False,
            "cuda_runtime": lambda: self,
            "BufferKernel": partial(FakeBufferKernel, self),
            "NumbersKernel": lambda _: SimpleNamespace(launch=self.copy_one_of),
        }
        for name, fake in mine.items():
            monkeypatch.setattr(transfer, name, fake)
        monkeypatch.setattr(transfer_rows, "_Pinned", FakePinned)

    def _empty(self, *shape: Any, empty: Any = torch.empty, **options: Any) -> torch.Tensor:
        self._memory.append(empty(*shape, **options))
        return self._memory[-1]

    def give(self, stream: int, work: Callable[[], object]) -> None:
        self.gpu.streams[stream].give(work)

    def let_persist(self, nbytes: int) -> None:
        self.persisting = nbytes

    def copy_one(self, target: int, source: int, nbytes: int, stream: int) -> None:
        self.give(stream, lambda: ctypes.memmove(target, source, nbytes))

    def copy_one_of(self, source: int, target: int, nbytes: int, stream: int) -> None:
        self.copy_one(target, source, nbytes, stream)

    def copy(self, targets: Any, sources: Any, sizes: Any, stream: int) -> None:
        for one in zip(targets.tolist(), sources.tolist(), sizes.tolist(), strict=True):
            self.copy_one(*one, stream)


class FakePinned:
    """Pinned memory that has other numbers as soon as nobody holds it."""

    never_freed: ClassVar[list[Any]] = []

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        memory = (ctypes.c_uint8 * nbytes)()
        self.address = ctypes.addressof(memory)
        weakref.finalize(self, ctypes.memset, self.address, 0x11, nbytes).atexit = False
        self.never_freed.append(memory)


class FakeBufferKernel:
    """Moves pages that are rows; numbers of runs are those there are when it comes to a block."""

    def __init__(
        self, cuda: FakeCuda, of: Collator, *, runs: torch.dtype, stride: int, out: bool, keep: bool
    ) -> None:
        self._cuda, self._size, self._out = cuda, of.form.nbytes, out
        self._stride, self._number_bytes = stride, runs.itemsize
        self._pages, self._count = of.table.views[0][0].data_ptr(), of.table.form.pages
        self.keep = keep

    def launch(
        self, runs: int, rows: int, blocks: int, stream: int, programs: int | None = None
    ) -> None:
        for block in range(blocks):
            self._cuda.give(stream, partial(self._move, runs, rows, block))

    def _move(self, runs: int, rows: int, block: int) -> None:
        place = runs + block * self._number_bytes
        number = int.from_bytes(ctypes.string_at(place, self._number_bytes), "little")
        if number < self._count:
            page, row = self._pages + number * self._size, rows + block * self._stride
            ctypes.memmove(*((row, page) if self._out else (page, row)), self._size)


N_PAGES = 24


@pytest.fixture(params=[24, 32], ids=["odd", "even"])
def paged(request: pytest.FixtureRequest) -> tuple[torch.Tensor, Collator]:
    """Pages of so many bytes, that are rows."""
    layers = request.param // 8
    generator = torch.Generator().manual_seed(7)
    shape = (N_PAGES, 1, layers, 1, 4)
    pages = torch.randint(0, 1 << 14, shape, dtype=torch.int16, generator=generator)
    form = CellForm(
        layers=layers, heads=1, head_dim=4, block_tokens=1, dtype=torch.float16, kinds=1
    )
    return pages.view(N_PAGES, -1), Collator(PageTable.of(pages.view(torch.float16), "PHLND"), form)


@pytest.mark.parametrize("gap", [0, 8])
@pytest.mark.parametrize("in_place", [False, True], ids=["turns", "in place"])
def test_transfers_in_any_order_of_the_gpu_s_work(
    monkeypatch: pytest.MonkeyPatch,
    paged: tuple[torch.Tensor, Collator],
    in_place: bool,
    gap: int,
) -> None:
    """Both ways at once, one after the other without a wait, while callers use again what is theirs
    by then."""
    pages, collator = paged
    before, nbytes = pages.clone(), collator.form.nbytes
    monkeypatch.setattr(transfer, "COPIED_IN_PLACE_FROM", 0 if in_place else 1 << 30)
    for name, rows in (
        *(("KEPT_BYTES", 3), ("BUFFER_BYTES", 4), ("IN_PLACE_BYTES", 5), ("SMALL_BYTES", 1)),
    ):
        monkeypatch.setattr(transfer, name, rows * 32)
    for seed in range(40):
        pages.copy_(before)
        random_, cuda = random.Random(seed), FakeCuda(seed, monkeypatch)
        transfers = Transfers(collator)
        sources, targets = list(range(N_PAGES // 2)), list(range(N_PAGES // 2, N_PAGES))
        moved: list[tuple[torch.Tensor, torch.Tensor]] = []
        wanted = before.clone()
        for _ in range(6):
            # Whatever is written twice has to be the same, since the order is not ours.
            count = random_.randint(1, N_PAGES // 2)
            runs = torch.tensor([random_.sample(sources, count)]).T.contiguous()
            host = torch.full((count, nbytes + gap), 0x22, dtype=torch.uint8)
            moved.append((host, before[runs[:, 0]]))
            transfers.to_host(runs, host)
            runs.fill_(-1)
            runs = torch.tensor([random_.sample(targets, count)], dtype=torch.int32).T.contiguous()
            host = torch.full((count, nbytes + gap), 0x33, dtype=torch.uint8)
            rows = (runs * torch.arange(1, nbytes // 2 + 1)).to(torch.int16)
            host[:, :nbytes] = rows.view(torch.uint8)
            wanted[runs[:, 0]] = rows
            transfers.to_pages(runs, host)
            runs.fill_(0)
        cuda.gpu.finish()
        assert torch.equal(pages, wanted)
        for host, rows in moved:
            assert torch.equal(host[:, :nbytes].contiguous().view(torch.int16), rows)
            assert bool((host[:, nbytes:] == 0x22).all())
        pages.copy_(before)


@pytest.mark.parametrize("in_place", [False, True], ids=["turns", "in place"])
@pytest.mark.parametrize("wrong", [-1, N_PAGES])
def test_what_is_refused_writes_nothing_in_any_order_of_the_gpu_s_work(
    monkeypatch: pytest.MonkeyPatch,
    paged: tuple[torch.Tensor, Collator],
    wrong: int,
    in_place: bool,
) -> None:
    pages, collator = paged
    before, nbytes = pages.clone(), collator.form.nbytes
    monkeypatch.setattr(transfer, "COPIED_IN_PLACE_FROM", 0 if in_place else 1 << 30)
    monkeypatch.setattr(transfer, "SMALL_BYTES", 64)
    for seed in range(20):
        cuda = FakeCuda(seed, monkeypatch)
        transfers = Transfers(collator)
        for move in (transfers.to_host, transfers.to_pages):
            host = torch.full((5, nbytes), 0x22, dtype=torch.uint8)
            with pytest.raises(KernelArgumentError, match="runs"):
                move(torch.tensor([[1], [2], [wrong], [3], [4]]), host)
            cuda.gpu.finish()
            assert bool((host == 0x22).all())
            assert torch.equal(pages, before)
        host = torch.full((3, nbytes), 0x22, dtype=torch.uint8)
        transfers.to_host(torch.tensor([[5], [7], [1]]), host).wait()
        assert torch.equal(host.view(torch.int16), before[[5, 7, 1]])


def test_a_call_that_fails_midway_leaves_nothing_under_way(
    monkeypatch: pytest.MonkeyPatch, paged: tuple[torch.Tensor, Collator]
) -> None:
    """Which would read memory that others have by then."""
    pages, collator = paged
    before, nbytes = pages.clone(), collator.form.nbytes
    monkeypatch.setattr(transfer, "SMALL_BYTES", 64)
    monkeypatch.setattr(transfer, "BUFFER_BYTES", 64)
    for seed in range(20):
        cuda = FakeCuda(seed, monkeypatch)
        transfers, left = Transfers(collator), iter(range(3))
        copy_one = cuda.copy_one

        def fails(*copied: int, left: Any = left, copy_one: Callable[..., None] = copy_one) -> None:
            if next(left, None) is None:
                raise CudaCallFailedError("cudaMemcpyAsync", 1, "no")
            copy_one(*copied)

        monkeypatch.setattr(cuda, "copy_one", fails)
        runs = torch.arange(10, 20)[:, None]
        with pytest.raises(CudaCallFailedError):
            transfers.to_pages(runs, torch.zeros((10, nbytes), dtype=torch.uint8))
        assert not any(stream.work for stream in cuda.gpu.streams)
        pages[10:20] = before[10:20]
        assert torch.equal(pages, before)


@pytest.mark.parametrize("in_place", [False, True], ids=["turns", "in place"])
def test_transfers_begin_after_what_the_current_stream_was_given(
    monkeypatch: pytest.MonkeyPatch, paged: tuple[torch.Tensor, Collator], in_place: bool
) -> None:
    """Which may write the pages that go, and read those that come, until then."""
    pages, collator = paged
    before, nbytes = pages.clone(), collator.form.nbytes
    monkeypatch.setattr(transfer, "COPIED_IN_PLACE_FROM", 0 if in_place else 1 << 30)
    for seed in range(20):
        pages.zero_()
        cuda = FakeCuda(seed, monkeypatch)
        transfers, seen = Transfers(collator), torch.zeros_like(pages)
        cuda.current.give(partial(pages.copy_, before))
        cuda.current.give(partial(seen.copy_, pages))
        away, home = (torch.zeros((5, nbytes), dtype=torch.uint8) for _ in range(2))
        transfers.to_host(torch.arange(5)[:, None], away)
        transfers.to_pages(torch.arange(10, 15)[:, None], home)
        cuda.gpu.finish()
        assert torch.equal(away.view(torch.int16), before[:5])
        assert torch.equal(seen, before)
        assert not pages[10:15].any()


def test_buffers_to_the_host_may_persist_unless_they_are_large(
    monkeypatch: pytest.MonkeyPatch, paged: tuple[torch.Tensor, Collator]
) -> None:
    _, collator = paged
    for buffer_bytes, direct, persisting in (
        (None, False, True), (1 << 10, False, True), (64 << 20, False, False), (None, True, False),
    ):  # fmt: skip
        cuda = FakeCuda(0, monkeypatch)
        Transfers(collator, buffers=3, buffer_bytes=buffer_bytes, direct=direct)
        room = (buffer_bytes or transfer.KEPT_BYTES) // 32 * 32
        assert cuda.persisting == (3 * room if persisting else 0)
