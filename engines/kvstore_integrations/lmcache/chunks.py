"""The chunks of an engine in the store: whole ones, and the shorter ones that end a prompt.

Whether a chunk is whole, its name does not say. So a shorter one is stored in a block of one of a
few sizes, with its length at the end: that costs one copy more and an eighth of a chunk at most,
where a namespace for each length would use them all up. Knows nothing of LMCache's classes:
`remote.py` translates.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np

from kvstore_integrations.lmcache.names import Kind
from kvstore_integrations.lmcache.objects import U8, Objects

_SIZES = 8  # of the blocks that hold shorter chunks
_LENGTH_BYTES = 8
log = logging.getLogger(__name__)


class ChunkStore:
    """Chunks of `whole` and, with `parts`, of any fewer tokens; thread-safe, each call waits.

    names: 32 bytes each, in the order of their chain. Rows are uint8.
    """

    def __init__(self, objects: Objects, whole: Kind, *, parts: bool) -> None:
        self._objects, self._whole = objects, whole
        self._token_bytes = whole.nbytes // whole.tokens
        self.parts = _parts_of(whole) if parts and self._token_bytes >= _LENGTH_BYTES else []
        self._warned = False

    def put(self, names: Sequence[bytes], rows: Sequence[U8]) -> None:
        """Stores chunks that nobody changes meanwhile, as far as there is room."""
        whole = [i for i, row in enumerate(rows) if len(row) == self._whole.nbytes]
        if whole:
            self._objects.put(self._whole, [names[i] for i in whole], [rows[i] for i in whole])
        for name, row in zip(names, rows, strict=True):
            if len(row) != self._whole.nbytes:
                self._put_part(name, row)

    def find(self, names: Sequence[bytes]) -> list[bool]:
        """Which ones are stored."""
        found = self._objects.find(self._whole, names)
        for i, hit in enumerate(found):
            found[i] = hit or self._is_part(names[i])
        return found

    def count(self, names: Sequence[bytes]) -> int:
        """How many of the first ones are stored."""
        count = self._objects.count(self._whole, names)
        return count + (count < len(names) and self._is_part(names[count]))

    def get(self, names: Sequence[bytes], rows: Sequence[U8]) -> list[int]:
        """Copies chunks into rows of a whole one's length; how many bytes came of each."""
        came = self._objects.get(self._whole, names, rows)
        return [
            self._whole.nbytes if hit else self._get_part(name, row)
            for name, row, hit in zip(names, rows, came, strict=True)
        ]

    def drop(self, name: bytes) -> bool:
        """Forgets a chunk; whether it was there."""
        kinds = (self._whole, *self.parts)
        return sum(self._objects.drop(kind, [name]) for kind in kinds) > 0

    # -- inside ------------------------------------------------------------------------

    def _put_part(self, name: bytes, row: U8) -> None:
        fits = [kind for kind in self.parts if len(row) + _LENGTH_BYTES <= kind.nbytes]
        if not fits or len(row) % self._token_bytes:
            if not self._warned:
                self._warned = True
                log.error("chunks of %d bytes are not stored; one of %s", len(row), self._whole)
            return
        block = np.zeros(fits[0].nbytes, np.uint8)
        block[: len(row)] = row
        block[-_LENGTH_BYTES:] = np.frombuffer(len(row).to_bytes(_LENGTH_BYTES, "little"), np.uint8)
        self._objects.put(fits[0], [name], [block])

    def _is_part(self, name: bytes) -> bool:
        return any(self._objects.count(kind, [name]) for kind in self.parts)

    def _get_part(self, name: bytes, row: U8) -> int:
        for kind in self.parts:
            block = row[: kind.nbytes]
            if self._objects.count(kind, [name]) and self._objects.get(kind, [name], [block])[0]:
                return int.from_bytes(block[-_LENGTH_BYTES:].tobytes(), "little")
        return 0


def _parts_of(whole: Kind) -> list[Kind]:
    """The kinds of blocks for shorter chunks, the smallest first. None is larger than a whole."""
    token_bytes, step = whole.nbytes // whole.tokens, -(-whole.tokens // _SIZES)
    kinds = []
    for tokens in range(step, whole.tokens + step, step):
        nbytes = min(tokens * token_bytes + _LENGTH_BYTES, whole.nbytes)
        form = f"{whole.form}, a part of at most {nbytes} bytes with its length"
        kinds.append(dataclasses.replace(whole, nbytes=nbytes, form=form))
    return kinds
