"""Who goes first where a processor is short: clients that tell the core something and go on.

A message wakes the core, on a virtual machine mostly on the sender's own processor, even where
another one is idle; and who has slept for long is put in front of who runs. So a client that only
tells that it has put something would stand still for as long as the core is busy with that. A
thread of the kernel's batch policy takes no processor from who woke it, and begins at once where
that one waits for an answer.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_PLAIN = os.sched_param(0)


def let_wakers_go_on() -> None:
    """Gives this thread, and those that it starts, the batch policy, unless somebody has given it
    another one than the usual."""
    with contextlib.suppress(OSError):  # forbidden to some containers; then it is slower
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, _PLAIN)


@contextlib.contextmanager
def as_usual() -> Iterator[None]:
    """A process that is started meanwhile does not inherit the batch policy."""
    batch = False
    with contextlib.suppress(OSError):
        batch = os.sched_getscheduler(0) == os.SCHED_BATCH
        if batch:
            os.sched_setscheduler(0, os.SCHED_OTHER, _PLAIN)
    try:
        yield
    finally:
        if batch:
            with contextlib.suppress(OSError):
                os.sched_setscheduler(0, os.SCHED_BATCH, _PLAIN)
