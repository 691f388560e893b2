"""The thread that a cluster's session has its loop in."""

from __future__ import annotations

import asyncio
import threading

from kvstore_client.cluster.loop import LoopThread

WAIT_S = 10.0


def test_what_still_runs_comes_to_its_end_before_the_loop_does() -> None:
    """A pipe's follower gives its own thread back there."""
    begun, ended = threading.Event(), threading.Event()

    async def for_ever() -> None:
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            ended.set()

    thread = LoopThread("kvstore-cluster")
    thread.begin(for_ever())
    assert begun.wait(WAIT_S)
    thread.close()
    assert ended.is_set()
