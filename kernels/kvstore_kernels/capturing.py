"""What a capture of a CUDA graph needs besides torch, in a process where more goes on than that.

Two things break a capture that nobody would look for. The garbage collector may run in the middle
of it and end another graph. And torch has 32 streams, which it gives out again and again: the
stream of a capture may be one that another thread copies on.
"""

from __future__ import annotations

import functools
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from kvstore_kernels.cuda_runtime import cuda_runtime

_one_capture = threading.RLock()  # torch can do no two at a time
_counting = threading.Lock()
_captures = 0
_collects = False  # whether it did before the first of these


@contextmanager
def captured(graph: torch.cuda.CUDAGraph, device: torch.device) -> Iterator[None]:
    """What the body launches on that device is written into the graph.

    Other threads may go on with the GPU meanwhile, and other captures wait. A body that fails, or
    waits for the GPU, which raises, leaves the stream that was current before the current one.
    """
    stream = own_stream(torch.empty(0, device=device).device)  # with its index
    capture = torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local")
    # Of a capture that fails torch would leave the stream behind as the current one.
    before = torch.cuda.stream(torch.cuda.current_stream(device))
    with before, undisturbed(), capture:
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """One capture: others wait, and nothing is collected meanwhile."""
    with _one_capture, uncollected():
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Keeps the garbage collector from ending GPU objects (graphs, events, memory) in the middle of
    a capture. Several threads may be inside."""
    global _captures, _collects  # noqa: PLW0603 - as is the collector
    with _counting:
        if not _captures:
            _collects = gc.isenabled()
            gc.disable()
        _captures += 1
    try:
        yield
    finally:
        with _counting:
            _captures -= 1
            if _collects and not _captures:
                gc.enable()


@functools.cache
def own_stream(device: torch.device, number: int = 0) -> torch.cuda.Stream:
    """A stream for captures that `torch.cuda.Stream` gives to nobody; lasts as long as the process.

    device: with its index. number: another one for each, for captures that need several.
    """
    del number
    with torch.cuda.device(device):
        stream = cuda_runtime().create_stream()
        return torch.cuda.ExternalStream(stream, device)  # type: ignore[no-untyped-call]
