"""The board that a client has: where its threads show what they have written."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt

from kvstore.index.boards import Boards
from kvstore.index.format import Words
from kvstore.index.reader import IndexReader
from kvstore.session.base import NamespaceHandle
from kvstore.session.parts import Part
from kvstore.session.single import UNSEEN, Single, put_one


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
        single: Single,
        granule: int,
        slot: int,
        *,
        key: object,
        source: object,
        put_id: bytes,
        parent: bytes,
        position: int,
        found: Words,
    ) -> int:
        """Looks a key up, and where it is not there puts its block and posts it: `FOUND`, with its
        row in `found` (1, 8), `POSTED`, or `UNSEEN` where the board has no room, is closed, or the
        index has another epoch of namespaces, and where key or source are of no plain form.

        granule: of an empty slot, which lies at the address `slot`. key: 32 bytes, or (1, 32)
        uint8. source: the block's bytes. put_id: 16 bytes. parent: 32, or none. Other threads wait
        meanwhile, so let it be small.
        """
        with self._lock:
            if self._closed:
                return UNSEEN
            return put_one(
                *(*single.common, granule, slot, id(key), id(source), id(put_id)),
                *(id(parent) if parent else 0, position, found),
            )

    def single(
        self,
        namespace: NamespaceHandle,
        number: int,
        part: Part,
        *,
        index: IndexReader,
        generations: Words,
        epoch: int,
    ) -> Single:
        """What puts here have in common, of whole blocks, as `part`, in a namespace."""
        return Single.of(
            *(namespace, number, part),
            index=index,
            boards=self._boards,
            board=self._number,
            generations=generations,
            epoch=epoch,
        )

    def close(self) -> None:
        """Nothing is posted any more when this returns: the board may be another client's soon."""
        with self._lock:
            self._closed = True
