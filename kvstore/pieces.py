"""How many blocks are moved at one time."""

from __future__ import annotations


def growing(n: int, *, least: int, most: int, factor: int = 2) -> list[int]:
    """Cuts n blocks into pieces that begin with `least` and grow by `factor` up to `most`.

    So the first bytes move soon, and many blocks need few pieces. Reversed, what is left to do once
    the last bytes have come is little. Both limits are at least 1.
    """
    sizes, size = [], min(least, most)
    while n > 0:
        sizes.append(min(size, n))
        n -= size
        size = min(factor * size, most)
    return sizes
