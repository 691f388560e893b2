"""A daemon's pool as another process may come to spoil it, for tests of what is served then."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from daemon import Daemon
from kvstore import limits
from kvstore.block import MAGIC, header_bytes, unpack

Bytes = npt.NDArray[np.uint8]


def spoil(server: Daemon, change: Callable[[Bytes], Bytes]) -> int:
    """Replaces the bytes of each block in the pool, headers and all else stay; returns how many.

    Blocks of one cell; those that are no longer in the index are spoiled too.
    """
    done = 0
    with _pool_of(server).open("r+b", buffering=0) as memory:
        pool = np.frombuffer(memory.read(), np.uint8)
        rows = pool.reshape(-1, limits.GRANULE_BYTES)
        starts = np.flatnonzero((rows[:, :4] == np.frombuffer(MAGIC, np.uint8)).all(axis=1))
        for row in starts.tolist():
            header = unpack(rows[row].tobytes())
            at = row * limits.GRANULE_BYTES + header_bytes(1)
            memory.seek(at)
            memory.write(change(pool[at : at + header.length]).tobytes())
            done += 1
    return done


def zeros(block: Bytes) -> Bytes:
    """Nothing of it is left."""
    return np.zeros_like(block)


def one_bit_off(block: Bytes) -> Bytes:
    """As little as can be wrong."""
    changed = block.copy()
    changed[len(block) // 2] ^= 1
    return changed


def _pool_of(server: Daemon) -> Path:
    for link in Path(f"/proc/{server.process.pid}/fd").iterdir():
        if "memfd:kvstore-pool" in str(link.readlink()):
            return link
    raise AssertionError("the daemon has no pool")
