"""`KVStoreClient`: a `LocalSession` over a daemon's memory on the same host."""

from __future__ import annotations

import os
from urllib.parse import urlparse

import numpy as np

from kvstore.errors import InvalidArgument
from kvstore.memory import Arena
from kvstore.session import LocalSession
from kvstore_client.port import ChannelPort


class KVStoreClient(LocalSession):
    """A client of the daemon at `target`, "unix:///path/to/kvstore.sock".

    timeout_s: the deadline of every call that names none. Raises `Unavailable` where no daemon
    answers, `InvalidArgument` for a target of another form.
    """

    def __init__(self, target: str, *, timeout_s: float = 5.0) -> None:
        url = urlparse(target)
        if url.scheme != "unix" or not url.path:
            raise InvalidArgument("target", f"{target!r}: expected unix:///path/to/kvstore.sock")
        if timeout_s <= 0:
            raise InvalidArgument("timeout_s", "a deadline lies in the future")
        self._channel = ChannelPort(url.path, timeout_s)
        pool, generations, index = self._channel.fds
        writable = bool(self._channel.welcome.writable)
        sizes = [os.fstat(fd).st_size for fd in self._channel.fds]
        self._mapped = [
            Arena(pool, sizes[0], writable=writable),
            Arena(generations, sizes[1], writable=False),
            Arena(index, sizes[2], writable=False),
        ]
        super().__init__(
            self._channel,
            pool=self._mapped[0].array,
            generations=self._mapped[1].array.view(np.uint64),
            index=self._mapped[2].array,
            timeout_s=timeout_s,
        )

    def close(self) -> None:
        """Ends the connection and unmaps; views must have been released."""
        self._channel.close()
        empty = np.empty(0, np.uint8)
        self._pool, self._generations = empty, empty.view(np.uint64)
        del self._reader
        for arena in self._mapped:
            arena.close()

    def __enter__(self) -> KVStoreClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
