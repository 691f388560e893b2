"""What a kernel's launcher raises before anything is launched or written.

KernelArgumentError (a ValueError)   an argument is wrong; the message names it and the fault
"""

from __future__ import annotations


class KernelArgumentError(ValueError):
    """An argument has a shape, stride, dtype, device or value that the kernel cannot take."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument} {problem}")
        self.argument = argument
