"""In which range of addresses each piece lies, by one compiled loop."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numba import types

from kvstore.compiled import compiled
from kvstore.transfer.base import U64


def _find_each(starts, ends, addresses, nbytes, found):  # type: ignore[no-untyped-def] # compiled
    """Fills found (n,) with the number of the range that each piece lies in; whether all do."""
    number = 0
    for row in range(len(addresses)):
        address = addresses[row]
        # Most often it is in the range that the one before is in.
        if number >= len(starts) or address < starts[number] or address >= ends[number]:
            number = np.searchsorted(starts, address, "right") - 1
            if number < 0 or address > ends[number]:
                return False
        # No sum of an address and a length: it might overflow.
        if nbytes[row] > ends[number] - address:
            return False
        found[row] = number
    return True


_WORDS = types.uint64[::1]
_GIVEN = types.Array(types.uint64, 1, "A", readonly=True)
find: Callable[[U64, U64, U64, U64, U64], bool] = compiled(
    types.boolean(_WORDS, _WORDS, _GIVEN, _GIVEN, _WORDS), _find_each
)
