"""How a client that may not write the pool hands blocks over: through memory of its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvstore import commands as c
from kvstore.channel import wire
from kvstore.channel.port import ChannelPort
from kvstore.errors import DeadlineExceeded
from kvstore.memory import Arena
from kvstore.session.control import Deadline
from kvstore.session.copies import copy_in_parallel, pieces_of
from kvstore.session.link import Granted


class Staging:
    """A memfd of this client's, sealed to its size so that the daemon can map it safely."""

    def __init__(self, nbytes: int) -> None:
        self._arena = Arena.create("staging", nbytes)
        self.nbytes = nbytes

    @property
    def fd(self) -> int:
        """The descriptor to hand over."""
        return self._arena.fd

    def fill(self, port: ChannelPort, granted: Granted, sources: c.U64, deadline: Deadline) -> c.U8:
        """See `Link.fill`: as many blocks at a time as the memory holds."""
        statuses = [
            self._fill_slice(port, granted, part, sources, deadline)
            for part in self._slices(len(sources), granted.part.nbytes)
        ]
        return np.concatenate(statuses)

    def close(self) -> None:
        """Gives the memory back."""
        self._arena.close()

    def _slices(self, n: int, nbytes: int) -> Iterator[slice]:
        step = max(1, self.nbytes // nbytes)
        return (slice(at, min(at + step, n)) for at in range(0, n, step))

    def _fill_slice(
        self,
        port: ChannelPort,
        granted: Granted,
        part: slice,
        sources: c.U64,
        deadline: Deadline,
    ) -> c.U8:
        nbytes = granted.part.nbytes
        offsets = np.arange(part.stop - part.start, dtype=np.uint64) * np.uint64(nbytes)
        area = self._arena.array  # held, so that it stays mapped whoever closes the connection
        targets = offsets + np.uint64(area.__array_interface__["data"][0])
        runs = [(own, own, size) for own, size in pieces_of(nbytes)]
        if copy_in_parallel(targets, sources[part], runs, deadline.end_s) < len(offsets):
            raise DeadlineExceeded("the blocks were not staged in time")
        record = wire.SealStaged(
            namespace=granted.namespace,
            put_id=granted.put_id,
            hashes=granted.hashes[part],
            offsets=offsets,
        )
        return port.seal_staged(record, deadline.left_s).status
