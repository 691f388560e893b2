"""What clients have posted comes into the store, before the store looks at anything else.

A client writes the headers of what it posts: here they are read, and believed only where they fit
the row that was posted, the slot that the client holds, and the namespace.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.block import Headers, header_bytes, read_headers
from kvstore.commands import U32
from kvstore.errors import ProtocolError, StaleNamespace
from kvstore.index.boards import BoardKeeper, Boards
from kvstore.index.format import DRAM_TIER, W_CHECK, W_SPACE, Words, checks_of
from kvstore.index.reader import Lookup
from kvstore.store.namespaces import Namespace
from kvstore.store.publish import NO_ROW, Whole, WholeBlock, publish, publish_one
from kvstore.store.puts import Connection
from kvstore.store.shelf import Shelf
from kvstore.store.stock import Stock

_HALF = np.uint64(32)


class Adoption:
    """The boards of a store's clients. `who` is what a connection holds."""

    def __init__(self, shelf: Shelf, stock: Stock, boards: Boards | None) -> None:
        self._shelf, self._stock = shelf, stock
        self._keeper = BoardKeeper(boards) if boards else None

    def open_board(self) -> int | None:
        """The number of a new client's board; None where it has to do without."""
        return self._keeper.open() if self._keeper else None

    def close_board(self, who: Connection) -> None:
        """Nobody looks at what is posted there any more."""
        if self._keeper and who.board is not None:
            self._keeper.close(who.board)

    def free_board(self, who: Connection) -> None:
        """Another client may have the board: who holds no slot posts nothing."""
        if self._keeper and who.board is not None:
            self._keeper.free(who.board)

    def adopt(self, connections: Iterable[Connection]) -> None:
        """Takes over all that was posted by now."""
        keeper = self._keeper
        if keeper is None or not keeper.pending:
            return
        for who in connections:
            if who.board is None:
                continue
            try:
                rows = keeper.posted(who.board)
            except ProtocolError:  # closed, or written to by somebody who may not: nobody looks
                keeper.close(who.board)
                continue
            if len(rows):
                self._adopt_of(who, rows)
                keeper.move_on(who.board, len(rows))

    # -- inside ------------------------------------------------------------------------

    def _adopt_of(self, who: Connection, rows: Words) -> None:
        """Takes over blocks that a connection has posted: rows (n, 8) of its board. What is there
        already, or is not as its row and header say, is nobody's any more."""
        spaces = rows[:, W_SPACE] >> _HALF
        first = 0
        while first < len(rows):
            others = np.flatnonzero(spaces[first:] != spaces[first])
            end = first + int(others[0]) if len(others) else len(rows)
            self._adopt_in(who, int(spaces[first]), rows[first:end])
            first = end

    def _adopt_in(self, who: Connection, number: int, rows: Words) -> None:
        """`_adopt_of` of rows of one namespace."""
        named: dict[int, int] = {}  # slots of its stock, each once, and the row that names it
        for row, granule in enumerate(Lookup(rows).granules.tolist()):
            if granule in who.stock:
                named.setdefault(granule, row)
        if not named:
            return
        ids = self._stock.remove(who, list(named))
        granules, rows = np.array(list(named), np.uint32), rows[list(named.values())]
        shelf = self._shelf
        try:
            namespace = shelf.namespaces.get(number)
        except StaleNamespace:
            shelf.free(ids)
            return
        headers = self._headers_of(namespace, granules)
        sound = self._are_sound(namespace, Lookup(rows), headers)
        if not sound.all():
            shelf.free(ids[~sound])
            ids, granules, headers = ids[sound], granules[sound], headers.only(sound)
        if not len(ids):
            return
        show = _show_one if len(ids) == 1 else _show_many
        shown = show(shelf, namespace, headers, ids, granules)
        self._stock.stored(ids[shown])
        if not shown.all():
            keys = headers.fields["key"][~shown]
            found = shelf.catalog.find(namespace.id, keys)
            shelf.policy.touch(shelf.live(found))
            shelf.counters.dropped += int((found < 0).sum())
            shelf.free(ids[~shown])

    def _headers_of(self, namespace: Namespace, granules: U32) -> Headers:
        """Those that the slots' writer has made."""
        n_cells, pool = namespace.layout.n_cells, self._shelf.memory.pool
        slots = pool[: self._shelf.room.slabs.total_bytes].reshape(-1, limits.GRANULE_BYTES)
        return read_headers(slots[granules, : header_bytes(n_cells)], n_cells)

    def _are_sound(
        self, namespace: Namespace, posted: Lookup, headers: Headers
    ) -> npt.NDArray[np.bool_]:
        """Whether header, row and slot are of one block of the namespace: bool (n,)."""
        fields, granules, slabs = headers.fields, posted.granules, self._shelf.room.slabs
        length = namespace.layout.block_bytes
        sound = headers.sound & (checks_of(posted.rows) == posted.rows[:, W_CHECK])
        sound &= (fields["key"] == posted.rows.view(np.uint8)[:, : limits.KEY_BYTES]).all(axis=1)
        sound &= (fields["namespace"] == namespace.id) & (fields["length"] == length)
        sound &= (posted.lengths == length) & (posted.tiers == DRAM_TIER)
        sound &= posted.generations == self._shelf.memory.generations[granules]
        sizes = slabs.slot_sizes(slabs.slabs_of(granules.astype(np.uint32)))
        sound &= sizes * limits.GRANULE_BYTES == namespace.slot_bytes
        return np.asarray(sound, np.bool_)


def _show_one(
    shelf: Shelf,
    namespace: Namespace,
    headers: Headers,
    ids: U32,
    granules: U32,
) -> npt.NDArray[np.bool_]:
    """`_show_many` of one block: quicker."""
    fields = headers.fields[0]
    whole = WholeBlock(
        key=fields["key"].tobytes(),
        put_id=fields["put_id"].tobytes(),
        block=int(ids[0]),
        granule=int(granules[0]),
        checksums=headers.checksums[0],
        parent=fields["parent"].tobytes(),
        position=int(fields["position"]),
        ttl_ms=0,
        written=True,
    )
    return np.array([publish_one(shelf, namespace, whole)])


def _show_many(
    shelf: Shelf,
    namespace: Namespace,
    headers: Headers,
    ids: U32,
    granules: U32,
) -> npt.NDArray[np.bool_]:
    """Publishes blocks with these headers; which of them found a place: bool (n,)."""
    fields, n = headers.fields, len(ids)
    follows = np.zeros(n, np.bool_)
    follows[1:] = (fields["parent"][1:] == fields["key"][:-1]).all(axis=1)
    whole = Whole(
        keys=np.ascontiguousarray(fields["key"]),
        put_ids=fields["put_id"].tobytes(),
        ids=ids,
        granules=granules,
        checksums=headers.checksums,
        parents=np.ascontiguousarray(fields["parent"]),
        positions=np.ascontiguousarray(fields["position"]),
        ttl_ms=np.zeros(n, np.int64),
        before=np.where(follows, np.arange(n) - 1, NO_ROW),
        written=True,
    )
    return publish(shelf, namespace, whole)
