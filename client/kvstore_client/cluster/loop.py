"""A loop in a thread of its own, and how other threads have coroutines run there."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from kvstore.errors import DeadlineExceeded, Unavailable

T = TypeVar("T")
_CANCEL_S = 5.0
SLACK_S = 0.05  # beyond a call's deadline, for its own way to end


class LoopThread:
    """Runs until `close`; thread-safe."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._closed = False
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Starts it. `Unavailable` after `refuse`."""
        if self._closed:
            work.close()
            raise Unavailable("the session is closed")
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def end(self, running: Future[T], timeout_s: float) -> T:
        """Waits for what `begin` started. `DeadlineExceeded`, and whatever it raises."""
        try:
            return running.result(max(timeout_s, 1e-3) + SLACK_S)
        except TimeoutError:
            running.cancel()
            raise DeadlineExceeded(f"no answer within {timeout_s:.3f} s") from None
        except BaseException:
            running.cancel()  # after Ctrl-C nobody takes what comes of it
            raise

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float) -> T:
        """`begin` and `end`."""
        return self.end(self.begin(work), timeout_s)

    def refuse(self) -> None:
        """Nothing else is begun, but for `finish`."""
        self._closed = True

    def finish(self, work: Coroutine[Any, Any, None], timeout_s: float) -> None:
        """Runs one of the last things."""
        asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        """Ends what still runs, and the thread."""
        with contextlib.suppress(TimeoutError):
            self.finish(_cancel_the_rest(), _CANCEL_S)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


async def _cancel_the_rest() -> None:
    """A task that is only dropped with its loop never gets to what it does at its end."""
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest)
