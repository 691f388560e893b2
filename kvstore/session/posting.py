"""The board that a client has: where its threads show what they have written."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from kvstore.index.boards import Boards
from kvstore.index.format import Words
from kvstore.index.reader import IndexReader
from kvstore.session.parts import Part
from kvstore.session.single import UNSEEN, put_one


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

    def put_one(
        self,
        index: IndexReader,
        namespace: int,
        key: Words,
        *,
        epoch: int,
        granule: int,
        generations: Words,
        slot: int,
        source: int,
        fixed: Words,
        part: Part,
        found: Words,
    ) -> int:
        """Looks a key (1, 4) up, and where it is not there puts its block and posts it: `FOUND`,
        with its row in `found` (1, 8), `POSTED`, or `UNSEEN` where the board has no room, is
        closed, or the index has another epoch of namespaces.

        granule: of an empty slot, which lies at the address `slot`. source: the address of the
        bytes, as `part`, of all cells, has them. fixed: as of `block.fixed_part`. Other threads
        wait meanwhile, so let it be small.
        """
        with self._lock:
            if self._closed:
                return UNSEEN
            return put_one(
                *(index.view.header, index.view.rows, key, namespace, epoch, index.bound),
                *(self._number, self._boards.words, self._boards.rows, granule, generations),
                *(slot, source, fixed, part.payload_at // 8, part.cell_words, part.nbytes, found),
            )

    def close(self) -> None:
        """Nothing is posted any more when this returns: the board may be another client's soon."""
        with self._lock:
            self._closed = True
