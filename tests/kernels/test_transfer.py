"""The pipeline's order of events, on streams that do their work at any time that is allowed."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

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
from kvstore_kernels.transfer_graph import GraphForm
from kvstore_kernels.transfer_ring import (
    Ring,
    Transfer,
    Turn,
    copies_of,
    pass_through,
    turn_sizes,
)
from kvstore_kernels.transfer_rows import HostRows


class FakeGpu:
    """Streams whose work is done in an order that the seed chooses among those allowed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._eager = self._random.uniform(0, 0.7)
        self.streams: list[FakeStream] = []

    def stream(self) -> FakeStream:
        made = FakeStream(self)
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
    def __init__(self, gpu: FakeGpu) -> None:
        self.gpu = gpu
        self.work: list[Any] = []

    def give(self, work: Callable[[], None]) -> None:
        self.work.append(work)
        self.gpu.some_steps()

    def wait_event(self, event: FakeEvent) -> None:
        self.work.append(event)

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
        (30, 12, 1, [1, 12, 12, 5]),
        (5, 2, 7, [2, 2, 1]),  # no turn is larger than a buffer
        (3, 1, 1, [1, 1, 1]),
    ],
)
def test_the_first_turn_is_small(blocks: int, room: int, small: int, sizes: list[int]) -> None:
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
@pytest.mark.parametrize("done", [0, 1, 3])
def test_rows_at_equal_distances(distance: int, dense: bool, done: int) -> None:
    host = torch.zeros(5 * distance, dtype=torch.uint8).view(5, distance)
    rows = HostRows(host, None, 8).behind(done)
    wanted = [host.data_ptr() + row * distance for row in range(done, 5)]
    assert [rows.start(row) for row in range(5 - done)] == rows.starts.tolist() == wanted
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
    assert rows.behind(1).starts.tolist() == wanted[1:]


def test_one_row_is_dense_whatever_lies_behind_it() -> None:
    host = torch.zeros((2, 24), dtype=torch.uint8)
    assert HostRows(host[:1], None, 8).dense


class FakeLibrary:
    """A libcudart that copies in this process, at once."""

    def __init__(self, version: int, fails: dict[str, int] | None = None) -> None:
        self.version, self.fails = version, fails or {}
        self.calls: list[str] = []
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

    # A graph is number 50 and has a kernel, 60, and copies 61 and 62 to 1061 and 1062.

    def cudaStreamBeginCapture(self, stream: Any, mode: int) -> int:
        self.calls.append(f"cudaStreamBeginCapture({stream.value}, {mode})")
        return self.fails.get("cudaStreamBeginCapture", 0)

    def cudaStreamEndCapture(self, stream: Any, graph: Any) -> int:
        graph._obj.value = 50
        return self.fails.get("cudaStreamEndCapture", 0)

    def cudaGraphGetNodes(self, graph: Any, nodes: Any, count: Any) -> int:
        assert graph.value == 50
        count._obj.value = 3
        if nodes is not None:
            nodes[:] = [60, 61, 62]
        return self.fails.get("cudaGraphGetNodes", 0)

    def cudaGraphNodeGetType(self, node: Any, kind: Any) -> int:
        kind._obj.value = int(node.value > 60)
        return 0

    def cudaGraphMemcpyNodeGetParams(self, node: Any, parameters: Any) -> int:
        ctypes.cast(parameters, ctypes.POINTER(ctypes.c_size_t))[12] = 1000 + node.value
        return 0

    def cudaGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:
        assert (graph.value, flags.value) == (50, 0)
        executable._obj.value = 70
        return self.fails.get("cudaGraphInstantiateWithFlags", 0)

    def cudaGraphExecMemcpyNodeSetParams1D(self, executable: Any, *arguments: Any) -> int:
        *numbers, kind = arguments
        self.calls.append(f"set {executable.value}: {[n.value for n in numbers]}, {kind}")
        return self.fails.get("cudaGraphExecMemcpyNodeSetParams1D", 0)

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> int:
        self.calls.append(f"launch {executable.value} on {stream.value}")
        return 0

    def cudaGraphExecDestroy(self, executable: Any) -> int:
        self.calls.append(f"destroy {executable.value}")
        return 0

    def cudaGraphDestroy(self, graph: Any) -> int:
        self.calls.append(f"destroy {graph.value}")
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


def test_a_graph_s_copies_are_found_and_given_other_ends() -> None:
    library = FakeLibrary(13_000)
    runtime = CudaRuntime(library)
    runtime.begin_capture(7)
    graph = runtime.end_capture(7)
    nodes = runtime.copy_nodes(graph)
    assert {node: runtime.copy_target(node) for node in nodes} == {61: 1061, 62: 1062}
    executable = runtime.instantiate(graph)
    runtime.retarget_copies(executable, nodes, [1, 2], [3, 4], 5)
    runtime.launch_graph(executable, 7)
    runtime.destroy_executable(executable)
    runtime.destroy_graph(graph)
    assert library.calls == [
        "cudaStreamBeginCapture(7, 1)",
        "set 70: [61, 1, 3, 5], 4",
        "set 70: [62, 2, 4, 5], 4",
        "launch 70 on 7",
        "destroy 70",
        "destroy 50",
    ]


@pytest.mark.parametrize(
    ("call", "what"),
    [
        ("cudaStreamBeginCapture", CudaRuntime.begin_capture),
        ("cudaStreamEndCapture", CudaRuntime.end_capture),
        ("cudaGraphGetNodes", CudaRuntime.copy_nodes),
        ("cudaGraphInstantiateWithFlags", CudaRuntime.instantiate),
    ],
)
def test_graphs_that_cannot_be_made_are_typed_errors(
    call: str, what: Callable[[CudaRuntime, int], object]
) -> None:
    with pytest.raises(CudaCallFailedError) as caught:
        what(CudaRuntime(FakeLibrary(13_000, {call: 901})), 50)
    assert (caught.value.call, caught.value.code) == (call, 901)


@pytest.mark.parametrize(
    ("nbytes", "blocks"), [(1, 4 << 20), (4 << 20, 1), (64 << 20, 1), (3 << 20, 1), (2 << 20, 2)]
)
def test_a_graph_s_buffer_has_room_for_a_block(nbytes: int, blocks: int) -> None:
    assert GraphForm().blocks_per_turn(nbytes) == blocks


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
