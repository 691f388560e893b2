"""An engine's KV memory as rows of bytes, and back: torch alone, on a CPU or on a GPU.

A row is one block: its page of each layer, one after another, each with its elements in the order
of the tensor's indices. What they mean is the engine's business.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvstore_integrations.settings import ConfigurationError

Wait = Callable[[], object]
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)  # copied as, the widest first
_SCRATCH_BYTES = 64 << 20  # of GPU memory, each way
_ALIGNED = 64


@dataclass(frozen=True, slots=True)
class _Span:
    """Layers whose pages lie at equal distances: (layers, blocks, *page), and where in a row."""

    pages: torch.Tensor
    first: int
    end: int


class Pages:
    """The blocks of one cache group.

    layers: (blocks, ...) each, of any strides but a dense last dimension. Where the engine divides
    blocks further, the first dimension is a multiple of `blocks`. `ConfigurationError` for others.
    """

    def __init__(self, layers: Sequence[torch.Tensor], blocks: int) -> None:
        whole = [_by_block(layer, blocks) for layer in layers]
        self.dtype = next(dtype for dtype in _INTEGERS if all(_fits(dtype, t) for t in whole))
        self.spans = list(_spans([layer.view(self.dtype) for layer in whole]))
        self.block_bytes = self.spans[-1].end * self.dtype.itemsize
        self.device = whole[0].device

    def in_rows(self, span: _Span, rows: torch.Tensor) -> torch.Tensor:
        """The span's part of rows (n, block_bytes) uint8, as (layers, n, *page)."""
        part = rows.view(self.dtype)[:, span.first : span.end]
        layers, _, *page = span.pages.shape
        return part.view(len(rows), layers, *page).movedim(1, 0)


class Mover(Protocol):
    """Copies between KV memory and rows (n, block_bytes) uint8 of host memory that it has made."""

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """(nbytes,) uint8 of host memory, made for these copies."""

    def mark(self) -> Any:
        """This moment in the engine's work: what it has begun so far."""

    def gather(self, pages: Pages, blocks: npt.NDArray[np.int64], rows: torch.Tensor) -> Wait:
        """Begins to copy blocks into rows, once what the engine has begun is done.

        What the engine begins later does not change what arrives. Returns what waits for it.
        """

    def scatter(
        self, pages: Pages, rows: torch.Tensor, blocks: npt.NDArray[np.int64], after: Any
    ) -> None:
        """Copies rows into blocks, not before the mark `after`; waits until they are there.

        Called on a thread of its own.
        """


def mover_for(every: Sequence[Pages]) -> Mover:
    """The one for the device that the KV memory is on; `ConfigurationError` where there is none."""
    device = every[0].device
    if device.type == "cpu":
        return CpuMover()
    if device.type == "cuda":
        return CudaMover(device, max(pages.block_bytes for pages in every))
    raise ConfigurationError(f"KV memory on {device} cannot be copied; it must be on a CPU or GPU")


class CpuMover:
    """Copies with numpy: a strided copy of all layers for each run of blocks."""

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """See `Mover`; touched now, so that no step has to map its pages."""
        return torch.empty(nbytes, dtype=torch.uint8).zero_()

    def mark(self) -> None:
        """See `Mover`; on a CPU what has begun is done."""

    def gather(self, pages: Pages, blocks: npt.NDArray[np.int64], rows: torch.Tensor) -> Wait:
        """See `Mover`; copies at once."""
        for there, here in _pairs(pages, blocks, rows):
            here[...] = there
        return _nothing

    def scatter(
        self,
        pages: Pages,
        rows: torch.Tensor,
        blocks: npt.NDArray[np.int64],
        after: None,  # noqa: ARG002
    ) -> None:
        """See `Mover`."""
        for there, here in _pairs(pages, blocks, rows):
            there[...] = here


class CudaMover:
    """Copies by way of a little GPU memory, which is gathered and scattered by index.

    Blocks are gathered on the engine's own stream, so that they are what the forward pass left
    there, whatever comes next; only the way to the host is a stream of its own. What is loaded
    travels on a third.
    """

    def __init__(self, device: torch.device, block_bytes: int) -> None:
        """block_bytes: of the largest block that it will copy."""
        self._out = _Lane(device, block_bytes)
        self._in = _Lane(device, block_bytes)

    def host_memory(self, nbytes: int) -> torch.Tensor:
        """See `Mover`; pinned, so that copies need no thread."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def mark(self) -> torch.cuda.Event:
        """See `Mover`."""
        event: torch.cuda.Event = torch.cuda.current_stream(self._out.device).record_event()
        return event

    @torch.inference_mode()  # as the engine's own memory was made
    def gather(self, pages: Pages, blocks: npt.NDArray[np.int64], rows: torch.Tensor) -> Wait:
        """See `Mover`; at most waits on the GPU for earlier blocks to be out of the way."""
        engine = torch.cuda.current_stream(self._out.device)
        for first, end, scratch, free in self._out.pieces(pages, len(blocks)):
            engine.wait_event(free)
            index = self._out.index(blocks[first:end])
            for span in pages.spans:
                torch.index_select(span.pages, 1, index, out=pages.in_rows(span, scratch))
            self._out.stream.wait_event(engine.record_event())
            with torch.cuda.stream(self._out.stream):
                rows[first:end].copy_(scratch, non_blocking=True)
                free.record(self._out.stream)
        done: torch.cuda.Event = self._out.stream.record_event()
        return done.synchronize

    @torch.inference_mode()
    def scatter(
        self,
        pages: Pages,
        rows: torch.Tensor,
        blocks: npt.NDArray[np.int64],
        after: torch.cuda.Event,
    ) -> None:
        """See `Mover`."""
        with torch.cuda.stream(self._in.stream):
            self._in.stream.wait_event(after)
            for first, end, scratch, _ in self._in.pieces(pages, len(blocks)):
                scratch.copy_(rows[first:end], non_blocking=True)
                index = self._in.index(blocks[first:end])
                for span in pages.spans:
                    span.pages.index_copy_(1, index, pages.in_rows(span, scratch))
        self._in.stream.synchronize()


class _Lane:
    """A stream, and scratch memory in two halves that take turns."""

    def __init__(self, device: torch.device, block_bytes: int) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        half = max(_SCRATCH_BYTES // 2, block_bytes)
        halves = [torch.empty(half, dtype=torch.uint8, device=device) for _ in range(2)]
        self._turns = itertools.cycle([(memory, _event()) for memory in halves])

    def index(self, blocks: npt.NDArray[np.int64]) -> torch.Tensor:
        """The blocks' numbers on the GPU, by way of pinned memory: else the copy would wait."""
        return torch.from_numpy(blocks).pin_memory().to(self.device, non_blocking=True)

    def pieces(
        self, pages: Pages, count: int
    ) -> Iterator[tuple[int, int, torch.Tensor, torch.cuda.Event]]:
        """For blocks [first, end) of `count`: rows of scratch memory, and when they are free."""
        first = 0
        while first < count:
            memory, free = next(self._turns)
            end = min(first + len(memory) // pages.block_bytes, count)
            rows = memory[: (end - first) * pages.block_bytes].view(-1, pages.block_bytes)
            yield first, end, rows, free
            first = end


class Ring:
    """Memory that is lent in pieces, in order, and comes back in any.

    Calls are made by one thread.
    """

    def __init__(self, memory: torch.Tensor) -> None:
        """memory: (n,) uint8."""
        self._memory = memory
        self._lent: list[
            tuple[int, int]
        ] = []  # [start, end) of each, in the order of their lending
        self._back: set[int] = set()  # starts of those that came back before earlier ones

    def take(self, unit: int, most: int) -> tuple[int, torch.Tensor] | None:
        """Up to `most` rows of `unit` bytes, (n, unit), and the ticket that gives them back."""
        size = len(self._memory)
        start = -(-self._lent[-1][1] // _ALIGNED) * _ALIGNED if self._lent else 0
        first = self._lent[0][0] if self._lent else size
        if self._lent and self._lent[-1][0] >= first:  # what is lent does not wrap around
            if size - start >= unit:
                return self._lend(start, min(most, (size - start) // unit), unit)
            start = 0
        n = min(most, (first - start) // unit)
        return self._lend(start, n, unit) if n > 0 else None

    def give_back(self, ticket: int) -> None:
        """The piece may be lent again."""
        self._back.add(ticket)
        while self._lent and self._lent[0][0] in self._back:
            self._back.remove(self._lent.pop(0)[0])

    def _lend(self, start: int, n: int, unit: int) -> tuple[int, torch.Tensor]:
        end = start + n * unit
        self._lent.append((start, end))
        return start, self._memory[start:end].view(n, unit)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]


def _by_block(layer: torch.Tensor, blocks: int) -> torch.Tensor:
    if layer.shape[0] % blocks or layer.stride(-1) != 1:
        raise ConfigurationError(
            f"a layer's KV memory of shape {tuple(layer.shape)} and strides {layer.stride()} does "
            f"not divide into {blocks} blocks. Choose another attention backend."
        )
    divided = layer.shape[0] // blocks
    return layer if divided == 1 else layer.view(blocks, divided, *layer.shape[1:])


def _fits(dtype: torch.dtype, layer: torch.Tensor) -> bool:
    """Whether the layer's elements can be copied as such integers."""
    try:
        layer.view(dtype)
    except RuntimeError:
        return False
    return layer.data_ptr() % dtype.itemsize == 0


def _spans(layers: Sequence[torch.Tensor]) -> Iterator[_Span]:
    """The layers in order, those together that one strided tensor can show."""
    first = begin = 0
    while begin < len(layers):
        end = begin + 1
        step = _distance(layers[begin], layers[end]) if end < len(layers) else None
        while step is not None and end < len(layers):
            if _distance(layers[end - 1], layers[end]) != step:
                break
            end += 1
        one = layers[begin]
        count = end - begin
        pages = one.as_strided(
            (count, *one.shape), (step or 0, *one.stride()), one.storage_offset()
        )
        nelements = count * one[0].numel()
        yield _Span(_flat(pages), first, first + nelements)
        first += nelements
        begin = end


def _distance(one: torch.Tensor, next_one: torch.Tensor) -> int | None:
    """How far apart two layers of one memory and form are, in elements, the second behind."""
    same = (
        one.untyped_storage().data_ptr() == next_one.untyped_storage().data_ptr()
        and one.shape == next_one.shape
        and one.stride() == next_one.stride()
    )
    step = int(next_one.storage_offset()) - int(one.storage_offset())
    return step if same and step > 0 else None


def _flat(pages: torch.Tensor) -> torch.Tensor:
    """(layers, blocks, page) where a page is dense, which copies faster."""
    try:
        return pages.view(*pages.shape[:2], -1)
    except RuntimeError:
        return pages


def _pairs(
    pages: Pages, blocks: npt.NDArray[np.int64], rows: torch.Tensor
) -> Iterator[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """KV memory and rows of the same bytes, for each run of blocks that follow each other."""
    edges = np.flatnonzero(np.diff(blocks) != 1) + 1
    bounds = [0, *edges.tolist(), len(blocks)]
    numbers = blocks.tolist()
    for span in pages.spans:
        memory, part = span.pages.numpy(), pages.in_rows(span, rows).numpy()
        for first, end in itertools.pairwise(bounds):
            at = numbers[first]
            yield memory[:, at : at + end - first], part[:, first:end]


def _nothing() -> None:
    """What waits for a copy that is done."""
