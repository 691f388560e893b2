"""The board that a client has: where its threads show what they have written."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from kvstore.index.boards import Boards
from kvstore.index.format import Words


class Board:
    """One of a daemon's boards, as long as its connection lasts; thread-safe."""

    def __init__(self, boards: Boards, number: int) -> None:
        self._boards, self._number = boards, number
        self._lock = threading.Lock()
        self._closed = False

    def post(
        self,
        namespace: int,
        keys: Words,
        *,
        length: int,
        granules: npt.NDArray[np.uint32],
        generations: Words,
    ) -> bool:
        """See `Boards.post`; False once this was closed."""
        with self._lock:
            return not self._closed and self._boards.post(
                *(self._number, namespace, keys),
                length=length,
                granules=granules,
                generations=generations,
            )

    def close(self) -> None:
        """Nothing is posted any more when this returns: the board may be another client's soon."""
        with self._lock:
            self._closed = True
