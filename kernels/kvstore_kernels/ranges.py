"""Names for stretches of time, as Nsight Systems, Nsight Compute and torch's profiler show them.

Without a GPU they cost and do nothing. With one, and no profiler, about 2 us each: for steps and
calls, not for what is inside of them. `docs/profiling.md` says how they are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

GET = "get"  # blocks from the store, into pages
PUT = "put"  # blocks of pages, to the store
PREFILL = "prefill"  # the tokens of one prompt
DECODE = "decode"  # one token of each running sequence


@contextmanager
def span(name: str) -> Iterator[None]:
    """The body, or the function that it decorates, has this name in a profile.

    It is as long as the host is busy with it. What the GPU does for it, later, is put under the
    same name by the profilers.
    """
    if not _seen_by_profilers():
        yield
        return
    torch.cuda.nvtx.range_push(name)  # type: ignore[no-untyped-call]
    try:
        with torch.profiler.record_function(name):
            yield
    finally:
        torch.cuda.nvtx.range_pop()  # type: ignore[no-untyped-call]


@cache
def _seen_by_profilers() -> bool:
    return torch.cuda.is_available()
