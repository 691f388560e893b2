"""Runs Gluon kernels for Hopper on the CPU: finds deadlocks, races and wrong results without a GPU.

The functions are the kernels' own, executed as Python with another `gl`: tensors are torch's,
layouts are ignored, each partition of a block of threads is a thread of which one runs at a time.
Who runs next, when a tensor-map copy arrives and when a product is computed are drawn at random
from a seed, so that any order that the hardware may take can come up. Shared memory is kept in
swizzled panels, 64 columns wide; what a copy is about to overwrite becomes NaN at once.

Checked on the way (`RaceError`): every access to shared memory is ordered, by barriers, after all
accesses that it conflicts with; what threads wrote is fenced before matrix units or copies touch
it; a partition's threads meet between touching memory and telling others; accumulators in flight
are left alone; nothing outside of a tensor is accessed. `DeadlockError`: nobody can go on. What is
not modelled: layouts, registers, and the order of accesses to global memory.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from types import FunctionType
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as real_gl
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia import hopper as real_hopper
from triton.language.extra import cuda

MAX_STEPS = 2_000_000

# The newest access to a region that somebody is ordered after, by (region, kind of access).
View = dict[Any, int]


class RaceError(AssertionError):
    """An access to shared memory that nothing orders, or that the hardware does not allow."""


class DeadlockError(AssertionError):
    """All partitions wait, and no copy or product is under way."""


def launch(
    kernel: Any,
    grid: int,
    *args: Any,
    seed: int = 0,
    substitutes: dict[Any, str | Callable[..., Any]] | None = None,
    slow: str | None = None,
) -> None:
    """Runs a kernel; tensors become pointers, `Boxes` are tensor maps.

    substitutes: what is called in place of a function that the kernels use: another function, or a
    method of `Language` by its name. slow: the function of a partition that goes on only where
    nothing else does.
    """
    machine = Machine(seed, grid, slow)
    python = _Python(machine, substitutes or {})
    run = python.function(kernel)
    python.complete()
    passed = [Pointer(a.view(-1)) if isinstance(a, torch.Tensor) else a for a in args]
    for block in range(grid):
        machine.spawn(Block(machine, block), None, lambda: run(*passed), "")
    machine.run()


# ------------------------------------------------------------------------------ scheduling


class Partition:
    """A thread which runs only when the machine says so.

    met: whether its threads have met since they last touched memory. unfenced: what they wrote.
    """

    def __init__(
        self, block: Block, parent: Partition | None, body: Callable[[], None], name: str
    ) -> None:
        self.block, self.body, self.name = block, body, name
        self.view: View = dict(parent.view) if parent else {}
        self.products: list[Product] = []  # not computed
        self.in_flight: list[Product] = []  # not waited for
        self.unfenced: set[Region] = set()
        self.met = True
        self.ready: Callable[[], bool] = lambda: True
        self.waits_for = ""
        self.done = False
        self.go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._main, daemon=True)
        self.failure: BaseException | None = None

    def _main(self) -> None:
        self.go.acquire()
        try:
            if not self.block.machine.stopped:
                self.body()
        except (Exception, SystemExit) as failure:
            self.failure = failure
        self.done = True
        self.block.machine.back.release()


class Block:
    """A block of threads: its number and its shared memory."""

    def __init__(self, machine: Machine, number: int) -> None:
        self.machine, self.number = machine, number


class Machine:
    """All partitions of all blocks, and what is under way."""

    def __init__(self, seed: int, grid: int, slow: str | None) -> None:
        self.random = random.Random(seed)
        self.grid, self.slow = grid, slow
        self.partitions: list[Partition] = []
        self.copies: list[Copy] = []
        self.back = threading.Semaphore(0)
        self.running: Partition | None = None
        self.stopped = False

    def spawn(
        self, block: Block, parent: Partition | None, body: Callable[[], None], name: str
    ) -> Partition:
        partition = Partition(block, parent, body, name)
        self.partitions.append(partition)
        partition.thread.start()
        return partition

    def run(self) -> None:
        try:
            for _ in range(MAX_STEPS):
                if not self.partitions:
                    return
                self._step()
            raise DeadlockError("no end after so many steps: " + self._waits())
        finally:
            self._stop()

    def pause(self, ready: Callable[[], bool] = lambda: True, waits_for: str = "") -> None:
        """Called by the running partition: lets others run, until `ready`."""
        partition = self.running
        assert partition is not None
        partition.ready, partition.waits_for = ready, waits_for
        self.back.release()
        partition.go.acquire()
        if self.stopped:
            raise SystemExit

    def _step(self) -> None:
        products = [p.products[0] for p in self.partitions if p.products]
        able = [p for p in self.partitions if p.ready()]
        quick = [p for p in able if p.name != self.slow]
        choices: list[Any] = [*quick, *self.copies, *products] or able
        if not choices:
            raise DeadlockError(self._waits())
        chosen = self.random.choice(choices)
        if isinstance(chosen, Partition):
            self._resume(chosen)
        elif isinstance(chosen, Copy):
            self.copies.remove(chosen)
            chosen.arrive()
        else:
            chosen.partition.products.pop(0).compute()

    def _resume(self, partition: Partition) -> None:
        self.running = partition
        partition.go.release()
        self.back.acquire()
        if partition.done:
            self.partitions.remove(partition)
            partition.thread.join()
            if partition.failure is not None:
                raise partition.failure

    def _waits(self) -> str:
        return "; ".join(f"block {p.block.number} {p.waits_for}" for p in self.partitions)

    def _stop(self) -> None:
        self.stopped = True
        for partition in self.partitions:
            partition.go.release()
            partition.thread.join()


def merge(into: View, view: View) -> None:
    for key, time in view.items():
        if into.get(key, 0) < time:
            into[key] = time


# --------------------------------------------------------------------------- shared memory


class Region:
    """Memory which is accessed as one, a panel or a small array: its bytes and last accesses."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values
        self.times: View = {}  # by reader, or "write"

    def write(self, view: View) -> None:
        """By one who is ordered after `view`, which then has this write too."""
        for kind, time in self.times.items():
            if view.get((self, kind), 0) < time:
                raise RaceError(f"written while {kind} may not be done")
        self.times["write"] = self.times.get("write", 0) + 1
        view[self, "write"] = self.times["write"]

    def begin_read(self, partition: Partition) -> None:
        if partition.view.get((self, "write"), 0) < self.times.get("write", 0):
            raise RaceError("read before what was written may be there")
        self.times[partition] = self.times.get(partition, 0) + 1

    def end_read(self, partition: Partition) -> None:
        partition.view[self, partition] = self.times[partition]


class Shared:
    """A shared memory descriptor: some panels in a shape. A matrix is panels side by side."""

    def __init__(self, language: Language, regions: Sequence[Region], shape: Sequence[int]) -> None:
        self.language, self.regions, self.shape = language, list(regions), list(shape)
        self.turned = False

    def index(self, number: Any) -> Shared:
        number, size = int(number), len(self.regions) // self.shape[0]
        if not 0 <= number < self.shape[0]:
            raise RaceError(f"index {number} of {self.shape[0]}")
        return self.viewed(self.shape[1:], self.regions[number * size : (number + 1) * size])

    def permute(self, order: Sequence[int]) -> Shared:
        assert tuple(order) == (1, 0)
        found = self.viewed(self.shape[::-1])
        found.turned = not self.turned
        return found

    def viewed(self, shape: Sequence[int], regions: Sequence[Region] | None = None) -> Shared:
        found = Shared(self.language, self.regions if regions is None else regions, shape)
        assert torch.Size(shape).numel() == sum(r.values.numel() for r in found.regions)
        return found

    def store(self, value: torch.Tensor) -> None:
        (region,) = self.regions
        self.language.write(region, value, asynchronous=True)

    def matrix(self) -> torch.Tensor:
        whole = torch.cat([region.values for region in self.regions], dim=-1)
        return whole.T if self.turned else whole


class Copy:
    """A box on its way from global to shared memory."""

    def __init__(self, boxes: Boxes, at: Sequence[Any], bar: Barrier, region: Region) -> None:
        self.boxes, self.at, self.bar, self.region = boxes, [int(a) for a in at], bar, region
        self.view: View = {}

    def arrive(self) -> None:
        self.region.values.copy_(self.boxes.box(*self.at, len(self.region.values)))
        merge(self.bar.arrived, self.view)
        self.bar.add(bytes_left=-self.region.values.nbytes)


class Product:
    """Matrix units at work: accumulators in flight until the partition waits for them."""

    def __init__(self, partition: Partition, a: Any, b: Shared, acc: Any, use_acc: bool) -> None:
        self.partition, self.a, self.b, self.acc, self.use_acc = partition, a, b, acc, use_acc
        self.regions = [*b.regions, *(a.regions if isinstance(a, Shared) else [])]
        self.value = torch.empty(0)
        self.done = False

    def compute(self) -> None:
        a = self.a.matrix() if isinstance(self.a, Shared) else self.a
        value = a.float() @ self.b.matrix().float()
        if self.use_acc:
            value = value + (self.acc.value if isinstance(self.acc, Product) else self.acc)
        self.value, self.done = value, True


class Barrier:
    """An mbarrier. arrived, seen: views of who arrived in this phase, and up to the last one."""

    def __init__(self, count: int) -> None:
        self.count = self.left = count
        self.bytes_left = 0
        self.phase = 0
        self.arrived: View = {}
        self.seen: View = {}

    def add(self, *, arrivals: int = 0, bytes_left: int = 0) -> None:
        self.left -= arrivals
        self.bytes_left += bytes_left
        if self.left < 0:
            raise RaceError("more arrivals than a barrier counts")
        if self.left == 0 and self.bytes_left == 0:
            self.phase += 1
            self.left = self.count
            merge(self.seen, self.arrived)

    def passed(self, parity: int) -> bool:
        return self.phase % 2 != parity


class Several:
    """Barriers, each of which `init` makes, or small arrays, in one allocation."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def index(self, number: Any) -> Any:
        return self.parts[int(number)]


# --------------------------------------------------------------------------- global memory


class Pointer:
    """Elements of a flat tensor."""

    def __init__(self, values: torch.Tensor, at: Any = 0) -> None:
        self.values, self.at = values, at

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.values, self.at + offset)

    def places(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(indices, mask) of one shape."""
        at, mask = torch.as_tensor(self.at), torch.as_tensor(mask)
        shape = np.broadcast_shapes(at.shape, mask.shape)
        at, mask = at.expand(shape), mask.expand(shape)
        if bool((mask & ((at < 0) | (at >= len(self.values)))).any()):
            raise RaceError("an access outside of a tensor")
        return at, mask


class Boxes:
    """A tensor map over (outer, rows, columns) in boxes as high as what they are copied to, and 64
    columns wide; zeros are outside."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def box(self, outer: int, row: int, column: int, height: int) -> torch.Tensor:
        result = torch.zeros(height, 64, dtype=self.tensor.dtype)
        if 0 <= outer < self.tensor.shape[0]:
            low, high = max(row, 0), min(row + height, self.tensor.shape[1])
            if low < high:
                part = self.tensor[outer, low:high, column : column + 64]
                result[low - row : high - row] = part
        return result


# ------------------------------------------------------------------------------- language


def _nothing() -> None:
    """Launches do not overlap here."""


class _Python:
    """A kernel's functions as Python functions, with the language below in place of Gluon's."""

    def __init__(self, machine: Machine, substitutes: dict[Any, str | Callable[..., Any]]) -> None:
        language = Language(machine)
        self.unnamed: list[tuple[dict[str, Any], dict[str, Any]]] = []
        self.known: dict[Any, Any] = {
            real_gl: language,
            real_hopper.mbarrier: language,
            real_hopper.fence_async_shared: language.fence_async_shared,
            real_hopper.warpgroup_mma: language.warpgroup_mma,
            real_hopper.warpgroup_mma_wait: language.warpgroup_mma_wait,
            cuda.gdc_wait: _nothing,
            cuda.gdc_launch_dependents: _nothing,
        }
        for real, other in substitutes.items():
            self.known[real] = (
                getattr(language, other) if isinstance(other, str) else self.function(other)
            )

    def function(self, fn: Any) -> Any:
        if fn not in self.known:
            plain = fn.fn if isinstance(fn, GluonJITFunction) else fn
            names: dict[str, Any] = {}
            self.known[fn] = FunctionType(plain.__code__, names, fn.__name__, plain.__defaults__)
            self.unnamed.append((names, plain.__globals__))
        return self.known[fn]

    def complete(self) -> None:
        """Gives all functions their globals, which may make more functions."""
        while self.unnamed:
            names, originals = self.unnamed.pop()
            names.update({name: self._value(value) for name, value in originals.items()})

    def _value(self, value: Any) -> Any:
        if isinstance(value, GluonJITFunction):
            return self.function(value)
        if isinstance(value, real_gl.constexpr):
            return value.value
        return self.known.get(value, value) if isinstance(value, Hashable) else value


class Language:
    """Of Gluon, what the kernels use."""

    int32, int64 = torch.int32, torch.int64
    float32, float64, bfloat16 = torch.float32, torch.float64, torch.bfloat16
    static_range = staticmethod(range)
    exp2 = staticmethod(torch.exp2)
    log2 = staticmethod(torch.log2)
    rsqrt = staticmethod(torch.rsqrt)
    constexpr = None

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    # layouts: ignored

    SliceLayout = BlockedLayout = staticmethod(lambda *_: None)

    @staticmethod
    def convert_layout(value: Any, _layout: Any) -> Any:
        return value

    # tensors

    @staticmethod
    def arange(start: int, end: int, _layout: Any) -> torch.Tensor:
        return torch.arange(start, end, dtype=torch.int32)

    @staticmethod
    def full(shape: Sequence[int], value: Any, dtype: torch.dtype, _layout: Any) -> torch.Tensor:
        return torch.as_tensor(value, dtype=dtype).expand(tuple(shape))

    @staticmethod
    def join(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.stack((a, b), dim=-1)

    @staticmethod
    def maximum(a: Any, b: Any) -> torch.Tensor:
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b))

    @staticmethod
    def minimum(a: Any, b: Any) -> torch.Tensor:
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> torch.Tensor:
        return torch.where(torch.as_tensor(condition), a, b)

    @staticmethod
    def max(value: torch.Tensor, axis: int) -> torch.Tensor:
        return value.amax(axis)

    @staticmethod
    def sum(value: torch.Tensor, axis: int) -> torch.Tensor:
        return value.sum(axis)

    # global memory

    @staticmethod
    def load(pointer: Pointer, mask: Any = True, other: Any = 0, cache_modifier: str = "") -> Any:
        at, mask = pointer.places(mask)
        found = pointer.values[torch.where(mask, at, 0).long()]
        return torch.where(mask, found, torch.as_tensor(other, dtype=found.dtype))

    def store(
        self, pointer: Pointer, value: Any, mask: Any = True, eviction_policy: str = ""
    ) -> None:
        at, mask = pointer.places(mask)
        value = torch.as_tensor(value, dtype=pointer.values.dtype).expand(at.shape)
        pointer.values[at[mask].long()] = value[mask]
        self._me.met = False

    def atomic_add(self, pointer: Pointer, value: int, sem: str, scope: str) -> torch.Tensor:
        self.machine.pause()
        assert scope == "gpu"
        if sem == "release" and not self._me.met:
            raise RaceError("told others before all threads were done")
        before = pointer.values[int(pointer.at)].clone()
        pointer.values[int(pointer.at)] += value
        return before

    # shared memory

    def allocate_shared_memory(self, dtype: Any, shape: Sequence[int], _layout: Any) -> Any:
        if dtype == torch.int64:
            return [None] if len(shape) == 1 else Several([[None] for _ in range(shape[0])])
        if len(shape) == 1:
            return SmallShared(self, torch.full(tuple(shape), torch.nan, dtype=dtype))
        if dtype == torch.int32:
            return Several([SmallShared(self, torch.zeros(shape[1:])) for _ in range(shape[0])])
        panel = (shape[-2], min(shape[-1], 64))
        panels = torch.Size(shape).numel() // torch.Size(panel).numel()
        regions = [Region(torch.full(panel, torch.nan, dtype=dtype)) for _ in range(panels)]
        return Shared(self, regions, shape)

    @staticmethod
    def viewed(memory: Shared, shape: Sequence[int]) -> Shared:
        return memory.viewed(shape)

    def load_panel(self, boxes: Boxes, at: Sequence[Any], bar: Any, memory: Shared) -> None:
        self.machine.pause()
        assert memory.shape[1:] == [64]
        (region,) = memory.regions
        self._require_fenced(region)
        copy = Copy(boxes, at, bar[0], region)
        region.write(self._me.view)
        region.values.fill_(torch.nan)
        copy.view = dict(self._me.view)
        # Its issuer does not know when it is there.
        self._me.view[region, "write"] -= 1
        self.machine.copies.append(copy)

    def write(self, region: Region, value: torch.Tensor, asynchronous: bool) -> None:
        self.machine.pause()
        region.write(self._me.view)
        region.values.copy_(value)
        self._me.met = False
        if asynchronous:
            self._me.unfenced.add(region)

    def read(self, region: Region) -> torch.Tensor:
        self.machine.pause()
        region.begin_read(self._me)
        region.end_read(self._me)
        self._me.met = False
        return region.values.clone()

    def _require_fenced(self, region: Region) -> None:
        if any(region in p.unfenced for p in self.machine.partitions):
            raise RaceError("matrix units or a copy touch what threads wrote without a fence")

    def fence_async_shared(self) -> None:
        self._me.unfenced.clear()

    def sync(self) -> None:
        self._me.met = True

    # barriers

    @staticmethod
    def init(bar: Any, count: int) -> None:
        bar[0] = Barrier(count)

    @staticmethod
    def expect(bar: Any, nbytes: int) -> None:
        bar[0].bytes_left += nbytes
        bar[0].add(arrivals=1)

    def arrive(self, bar: Any, pred: Any = True) -> None:
        self.machine.pause()
        if not pred:
            return
        if not self._me.met:
            raise RaceError("told others before all threads were done")
        merge(bar[0].arrived, self._me.view)
        bar[0].add(arrivals=1)

    def wait(self, bar: Any, parity: Any) -> None:
        parity = int(parity)
        self.machine.pause(lambda: bar[0].passed(parity), f"waits for parity {parity}")
        merge(self._me.view, bar[0].seen)

    # matrix units

    def warpgroup_mma(
        self, a: Any, b: Shared, acc: Any, *, use_acc: bool = True, is_async: bool = False
    ) -> Product:
        self.machine.pause()
        assert is_async
        assert a.shape[0] % 64 == 0
        assert a.shape[1] == b.shape[0]
        product = Product(self._me, a, b, acc, use_acc)
        for region in product.regions:
            self._require_fenced(region)
            region.begin_read(self._me)
        self._me.products.append(product)
        self._me.in_flight.append(product)
        return product

    def warpgroup_mma_wait(self, outstanding: int, deps: Sequence[Product]) -> torch.Tensor:
        me = self._me
        count = len(me.in_flight) - outstanding
        finished, me.in_flight = me.in_flight[:count], me.in_flight[count:]
        self.machine.pause(lambda: all(p.done for p in finished), "waits for products")
        for region in {region for product in finished for region in product.regions}:
            region.end_read(me)
        me.met = False
        (product,) = deps
        if product in me.in_flight:
            raise RaceError("accumulators used in flight")
        return product.value

    # blocks

    def program_id(self, _axis: int) -> torch.Tensor:
        return torch.tensor(self._me.block.number, dtype=torch.int32)

    def num_programs(self, _axis: int) -> int:
        return self.machine.grid

    def warp_specialize(
        self, functions: Sequence[Any], warps: Sequence[int], registers: Sequence[int]
    ) -> None:
        assert len(warps) == len(registers) == len(functions) - 1
        me = self._me
        others = [
            self.machine.spawn(me.block, me, partial(run, *args), run.__name__)
            for run, args in functions[1:]
        ]
        run, args = functions[0]
        run(*args)
        self.machine.pause(lambda: all(p.done for p in others), "waits for partitions")

    @property
    def _me(self) -> Partition:
        assert self.machine.running is not None
        return self.machine.running


class SmallShared:
    """Shared memory of threads alone."""

    def __init__(self, language: Language, values: torch.Tensor) -> None:
        self.language, self.region = language, Region(values)

    def store(self, value: torch.Tensor) -> None:
        self.language.write(self.region, value, asynchronous=False)

    def load(self, _layout: Any) -> torch.Tensor:
        return self.language.read(self.region)
