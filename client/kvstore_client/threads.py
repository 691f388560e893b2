"""Blocking calls awaited from asyncio."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

from kvstore.errors import Unavailable
from kvstore.session import View
from kvstore.session.base import Bytes1D

P = ParamSpec("P")
R = TypeVar("R")


class Threads:
    """A few threads of one client."""

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, "kvstore-async")
        self._closed = False

    async def run(self, work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """The call's result. A cancellation goes on only when the call is over.

        Raises what the call raises, and `Unavailable` once closed.
        """
        if self._closed:
            raise Unavailable("the session is closed")
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

    async def close(self, last: Callable[[], None]) -> None:
        """Does `last` in a thread and ends them all; a second time, nothing."""
        if self._closed:
            return
        try:
            await self.run(last)
        finally:
            self.end()

    def end(self) -> None:
        """Ends the threads, without waiting for work that is under way."""
        self._closed = True
        self._pool.shutdown(wait=False)


class AsyncView:
    """A `View` for asyncio: `async with await client.view(...) as view: view.blocks`."""

    def __init__(self, view: View, threads: Threads) -> None:
        self._view, self._threads = view, threads

    @property
    def blocks(self) -> list[Bytes1D]:
        """The blocks while the view is held, read-only uint8 arrays; none afterwards."""
        return self._view.blocks

    async def release(self) -> None:
        """Ends the hold; the arrays must not be used afterwards. Safe to call twice."""
        with contextlib.suppress(Unavailable):  # a session that is closed holds nothing any more
            await self._threads.run(self._view.release)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        await self.release()


def _discard(future: asyncio.Future[R]) -> None:
    """Nobody gets the result any more; one that holds something has to let go of it."""
    if future.exception() is None:
        result = future.result()
        if isinstance(result, contextlib.AbstractContextManager):
            with result:
                pass
