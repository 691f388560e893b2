"""How a few inner loops are compiled: by Numba, for the processor they run on.

The code that comes of it is kept in Numba's cache, beside the source or in the user's cache folder,
so that one process a machine waits for the compiler (some seconds), and others read a file. Numba
looks at the age of the file of the compiled function only: whoever changes what that function uses
from other files removes `__pycache__`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
from llvmlite.binding import ffi

# llvmlite's library makes a function of whatever attribute it is asked for. vLLM, for one, looks
# through all that modules hold, asks it for its `__dict__`, and fails on the function.
getattr(ffi.lib, "_fntab", {}).setdefault("__dict__", {})


def compiled(
    signature: Any, function: Callable[..., Any], *, unlocked: bool = False
) -> Callable[..., Any]:
    """`function` as machine code for arguments of one signature.

    unlocked: whether calls run without the interpreter's lock. ImportError where Numba is told not
    to compile: the loops use what it has no Python for.
    """
    if numba.config.DISABLE_JIT:
        raise ImportError("kvstore needs Numba's compiler: unset NUMBA_DISABLE_JIT")
    made: Callable[..., Any]
    try:
        made = numba.njit([signature], nogil=unlocked, cache=True)(function)
    except RuntimeError:
        # Neither the source's folder nor the user's own can be written: each process compiles anew.
        made = numba.njit([signature], nogil=unlocked)(function)
    return made
