"""What all tests rely on."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator

import pytest

# Who starts the tests in the background of a shell has them ignore Ctrl-C, and their children with
# them; tests that send it need what a user's terminal gives.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

OURS = re.compile("kvstore-(?!copy)")  # the copies' thread lasts as long as its process


@pytest.fixture(scope="module", autouse=True)
def no_thread_of_ours_is_left() -> Iterator[None]:
    """A session that a test did not close goes on reaching for its daemon, in other tests' time."""
    before = set(threading.enumerate())
    yield
    left = set(threading.enumerate()) - before
    ours = [thread for thread in left if OURS.match(thread.name)]
    for thread in ours:
        thread.join(5.0)  # some end a moment after whoever started them
    still = [thread.name for thread in ours if thread.is_alive()]
    assert not still, f"not closed by a test of this module: {still}"
