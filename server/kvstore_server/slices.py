"""How long a thread may run before the kernel lets another one have its turn.

From Linux 6.12 on a thread that wakes interrupts one that has longer slices. So the core, which
runs for a moment and is waited for, asks for short ones, and the gateway, whose callers have been
through a network's software already, for long ones: clients on this host then wait for neither.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

SHORT_S = 100e-6  # the kernel's least
LONG_S = 10e-3  # longer than what kernels give by themselves, 0.7 to 3 ms

# Of `struct sched_attr`: size, policy, flags, nice, priority, runtime, deadline, period.
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")
_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}  # the system call's number


def set_slice(seconds: float) -> None:
    """For the calling thread and those that it starts from now on. A kernel that knows no slices
    keeps its own, and a thread that somebody has put under another policy is left alone."""
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    attributes = _ATTRIBUTES.pack(
        *(_ATTRIBUTES.size, os.SCHED_OTHER, 0, nice, 0, round(1e9 * seconds), 0, 0)
    )
    ctypes.CDLL(None).syscall(number, 0, ctypes.c_char_p(attributes), 0)
