"""Copy-in: the daemon takes blocks out of a client's staging memory and hashes what it took.

A client that may not write the pool cannot change a byte after its checksum was made: both are
made here, in one pass.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.channel import wire
from kvstore.errors import InvalidArgument
from kvstore.memory import Arena, open_sealed
from kvstore.session.base import Bytes1D
from kvstore.session.copies import groups_of, in_parallel
from kvstore.session.parts import Part

_MOST_BYTES = max(limits.STAGING_BYTES, limits.MAX_BLOCK_BYTES)


class StagingArea:
    """A client's staging memory, mapped for reading."""

    def __init__(self, fd: int, nbytes: int) -> None:
        """Takes the descriptor over; `InvalidArgument` unless it is sealed to its size.

        Bounded, because pages that the client never wrote become this process's when it reads
        them.
        """
        if nbytes > _MOST_BYTES:
            os.close(fd)
            raise InvalidArgument("staging", f"at most {_MOST_BYTES} bytes, got {nbytes}")
        self.nbytes = nbytes
        self._arena: Arena = open_sealed(fd, nbytes)

    def cut(self, offset: int, nbytes: int) -> Bytes1D:
        """The bytes at an offset that the client named; `InvalidArgument` for one outside."""
        if offset + nbytes > self._arena.nbytes:
            raise InvalidArgument("offsets", f"{offset} + {nbytes} bytes lie outside the staging")
        return self._arena.array[offset : offset + nbytes]

    def close(self) -> None:
        """Unmaps it."""
        self._arena.close()


@dataclass(frozen=True, slots=True, eq=False)
class Copy:
    """Staged blocks on their way to their slots. `checksums`: (n, cells), in the hashes' order.

    Blocks that were not granted have no payload: nothing is copied, and the seal drops them.
    """

    record: wire.SealStaged
    part: Part
    sources: Sequence[Bytes1D]
    payloads: Sequence[Bytes1D | None]

    def run(self) -> c.Seal:
        """Copies and hashes; returns the seal of what arrived. Safe in any thread."""
        width = len(self.part.bounds) - 1
        checksums = np.zeros((len(self.sources), width), np.uint64)

        granted = [i for i, payload in enumerate(self.payloads) if payload is not None]
        sources = _addresses([self.sources[i] for i in granted])
        targets = _addresses([each for each in self.payloads if each is not None])

        def copy(first: int, end: int) -> None:
            rows = granted[first:end]
            checksums[rows] = self.part.copy_in(sources[first:end], targets[first:end])

        groups = groups_of(len(granted), self.part.nbytes)
        in_parallel(copy, groups, self.part.nbytes * len(granted), math.inf)
        return c.Seal(
            namespace=self.record.namespace,
            put_id=self.record.put_id,
            hashes=self.record.hashes,
            checksums=checksums,
        )


def _addresses(arrays: Sequence[Bytes1D]) -> c.U64:
    return np.array([array.__array_interface__["data"][0] for array in arrays], np.uint64)
