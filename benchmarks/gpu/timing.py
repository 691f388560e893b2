"""Time on the GPU: replays of a captured graph over rotating inputs, and the GPU's own limits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

REPLAYS = 21


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the GPU does, measured: bytes read and written a second, bytes read, and FLOP/s."""

    copy_bytes: float
    read_bytes: float
    matmul_flops: float


def eager_us(call: Callable[[], object], repeats: int = REPLAYS) -> float:
    """Median time of one call, by events around it; for what cannot be captured in a graph."""
    call()
    torch.cuda.synchronize()
    return _median_us(call, repeats)


def graph_us(calls: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """Median time of one call in a graph that has all of them, one after the other.

    calls: the same work on inputs of its own each, together several times as large as the L2, so
    that none finds its inputs there.
    """
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles, tunes and fills workspaces outside of the graph
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    return _median_us(graph.replay, replays) / len(calls)


def rotations(nbytes: int, *, most: int = 64) -> int:
    """How many inputs of that size are together eleven times as large as the L2."""
    l2: int = torch.cuda.get_device_properties(0).L2_cache_size
    return max(2, min(most, -(-11 * l2 // nbytes)))


def ceilings() -> Ceilings:
    """Measured now, on the current GPU; takes about a second."""
    size = 1 << 31
    source = torch.randint(-128, 127, (size,), dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * size / eager_us(lambda: target.copy_(source))
    words = source.view(torch.int64)
    read = size / eager_us(lambda: torch.sum(words))
    n = 8192
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * n**3 / eager_us(lambda: a @ b)
    return Ceilings(copy * 1e6, read * 1e6, flops * 1e6)


def _median_us(call: Callable[[], object], repeats: int) -> float:
    times: list[float] = []
    for _ in range(repeats):
        start, end = _event(), _event()
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
