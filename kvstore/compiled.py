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
from llvmlite import ir
from llvmlite.binding import ffi
from numba import types
from numba.extending import intrinsic

# llvmlite's library makes a function of whatever attribute it is asked for. vLLM, for one, looks
# through all that modules hold, asks it for its `__dict__`, and fails on the function.
getattr(ffi.lib, "_fntab", {}).setdefault("__dict__", {})


@intrinsic
def word_at(_typing: Any, _address: Any) -> Any:
    """The 8 bytes at an address, uint64, in a compiled function."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return builder.load(pointer, align=1)

    return types.uint64(types.uintp), generate


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
