"""Byte counts as people write and read them: `8GiB`."""

from __future__ import annotations

import re

_UNITS = ("", "K", "M", "G", "T")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", re.IGNORECASE)


def parse_size(value: object) -> int:
    """Bytes of "8GiB", "512MiB", "1G" (units of 1024) or a plain number; ValueError otherwise."""
    found = _SIZE.fullmatch(str(value))
    if not found:
        raise ValueError(f"{value!r} is no size: write 8GiB, 512MiB or a number of bytes")
    number, unit = found[1], 1024 ** _UNITS.index(found[2].upper())
    # A float has 53 bits: whole numbers stay exact only if they never become one.
    return int(float(number) * unit) if "." in number else int(number) * unit


def format_size(nbytes: int) -> str:
    """The largest unit that is not below one, to at most one decimal: "8 GiB", "1.5 MiB"."""
    exponent = 0
    while exponent + 1 < len(_UNITS) and nbytes >= 1024 ** (exponent + 1):
        exponent += 1
    unit = f"{_UNITS[exponent]}iB" if exponent else "bytes"
    return f"{nbytes / 1024**exponent:.1f} {unit}".replace(".0 ", " ")
