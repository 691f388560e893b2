"""Times of calls, and what is told of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


def random_keys(rng: np.random.Generator, n: int) -> npt.NDArray[np.uint8]:
    """Keys (n, 32) that nobody else has."""
    return rng.integers(0, 1 << 64, (n, 4), np.uint64, endpoint=False).view(np.uint8)


def timed(work: Callable[[T], object], arguments: Iterable[T], expected: object) -> list[float]:
    """Seconds of each call; AssertionError where one returns anything but what is expected."""
    seconds = []
    for argument in arguments:
        begin = time.perf_counter()
        result = work(argument)
        seconds.append(time.perf_counter() - begin)
        if result != expected:
            raise AssertionError(f"{result} instead of {expected}")
    return seconds


def summary(seconds: list[float], amount: int = 1) -> dict[str, float]:
    """Microseconds, and what `amount` a call makes a second at the median."""
    p50, p99, p999 = np.quantile(seconds, (0.5, 0.99, 0.999))
    return {
        "rate": float(amount / p50),
        "p50_us": float(1e6 * p50),
        "p99_us": float(1e6 * p99),
        "p999_us": float(1e6 * p999),
    }
