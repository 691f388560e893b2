"""Blocking calls awaited from asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Threads:
    """A few threads of one client."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "kvstore-async")

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The call's result. A cancellation goes on only when the call is over."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._pool, lambda: work(*args, **kwargs))
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # The call may be writing to the caller's buffers: nobody may use them before its end.
            while not future.done():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.wait([future])
            _discard(future)
            raise

    def close(self) -> None:
        """Ends the threads; none has work any more."""
        self._pool.shutdown()


def _discard(future: asyncio.Future[R]) -> None:
    """Nobody gets the result any more; one that holds something has to let go of it."""
    if future.exception() is None:
        result = future.result()
        if isinstance(result, contextlib.AbstractContextManager):
            with result:
                pass
