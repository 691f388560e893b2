"""What a process of ours imports lives as long as it does, so nobody need look for garbage there.

A module that is run as a process pauses the collector before its imports, and calls `settle` once
they are done. Passes over them, a hundred thousand and more, would be a third of the time that a
daemon takes to start and to end; and while it serves, each full pass would go over them again.
"""

from __future__ import annotations

import gc


def settle() -> None:
    """The collector runs from now on, and leaves alone what is there already."""
    gc.freeze()
    gc.enable()
