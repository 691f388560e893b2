"""What a fork does to a session: the child has neither its threads nor its mapped memory."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable

from kvstore.errors import Unavailable


class ForkGuard:
    """Knows whether this process is still the one that made it.

    Arenas are not inherited (a child that wrote to the pool could not be told from its parent),
    so a child that used them would be killed; it gets a typed error instead.
    """

    def __init__(self, on_fork: Callable[[], None] | None = None) -> None:
        """on_fork: called in the child, right after the fork; must not block."""
        self.forked = False
        self._on_fork = on_fork
        _guards.add(self)

    def check(self) -> None:
        """`Unavailable` in a child of the process that made this."""
        if self.forked:
            raise Unavailable("the store was opened before this process forked: open it again here")

    def after_fork(self) -> None:
        """In the child: from now on `check` raises."""
        self.forked = True
        if self._on_fork:
            self._on_fork()


_guards: weakref.WeakSet[ForkGuard] = weakref.WeakSet()


def _in_child() -> None:
    for guard in list(_guards):
        guard.after_fork()


os.register_at_fork(after_in_child=_in_child)
