"""How many blocks of one call are moved at one time."""

from __future__ import annotations


def with_a_tail(n: int, *, tail: int, most: int) -> list[int]:
    """Cuts n blocks into pieces of up to `most`, the last of which has no more than `tail` where
    there are several. So few calls are made, and little is left to do once the last bytes have
    come; what fits into one piece is one, since another call costs more than such a tail would
    save. Both limits are at least 1."""
    if n <= most:
        return [n] if n else []
    last = min(tail, most)
    front = n - last
    return [min(most, front - at) for at in range(0, front, most)] + [last]
