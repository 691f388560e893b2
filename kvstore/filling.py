"""One block into its slot: bytes, checksums and header, by one call of a compiled loop.

A put of one small block takes as long as its Python does, so all that a slot gets is one call here.
What it writes is what `block.pack_many` and `streaming.copy_and_hash_rows` make of many blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from kvstore.block import NO_PARENT, fixed_part
from kvstore.compiled import compiled
from kvstore.streaming import copied_and_hashed, fence, hashed

U64 = npt.NDArray[np.uint64]

_U = np.uint64
_WORD_BYTES = _U(8)


@intrinsic
def set_word(_typing: Any, _address: Any, _word: Any) -> Any:
    """Writes a uint64 to an address, in a compiled function."""

    def generate(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        at = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        builder.store(arguments[1], at, align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uint64), generate


def _fill(slot: int, source: int, fixed: U64, room: int, cells: U64, sums: U64) -> None:
    state, header = np.empty(8, np.uint64), np.zeros(room, np.uint64)
    payload = slot + _U(room) * _WORD_BYTES
    for cell in range(len(cells)):
        at, own, nbytes = cells[cell, 0], cells[cell, 1], cells[cell, 2]
        sums[0, cell] = copied_and_hashed(payload + at, source + own, nbytes, state)
    fence()
    for word in range(len(fixed)):
        header[word] = fixed[word]
    for cell in range(len(cells)):
        header[len(fixed) + cell] = sums[0, cell]
    end = len(fixed) + len(cells)
    header[end] = hashed(_U(header.ctypes.data), _U(end) * _WORD_BYTES, state)
    for word in range(room):
        set_word(slot + _U(word) * _WORD_BYTES, header[word])


_WORD = types.uint64
fill_now: Callable[[int, int, U64, int, U64, U64], None] = compiled(
    types.void(
        *(_WORD, _WORD, types.Array(_WORD, 1, "C", readonly=True), types.int64),
        *(types.Array(_WORD, 2, "C", readonly=True), types.Array(_WORD, 2, "C")),
    ),
    _fill,
    unlocked=True,
)


def fill_slot(
    slot: int,
    source: int,
    *,
    cells: U64,
    header_bytes: int,
    namespace: int,
    key: bytes,
    put_id: bytes,
    length: int,
    parent: bytes = b"",
    position: int = -1,
) -> U64:
    """Copies a block from an address to the slot at another, and writes its header there.

    cells: uint64 (k, 3), where each cell lies in the payload and in the source, and its bytes, at
    least 1. header_bytes: from the slot's beginning to the payload, as of `block.header_bytes`. The
    header's fields as of `block.pack_parts`, no parent where it is unknown. Returns the cells'
    checksums as they were stored, uint64 (1, k). Checks nothing: the addresses must be of mapped
    memory, the slot's aligned to 8 bytes.
    """
    sums = np.empty((1, len(cells)), np.uint64)
    fixed = fixed_words(
        namespace=namespace,
        key=key,
        put_id=put_id,
        length=length,
        n_cells=len(cells),
        parent=parent,
        position=position,
    )
    fill_now(slot, source, fixed, header_bytes // 8, cells, sums)
    return sums


def fixed_words(
    *,
    namespace: int,
    key: bytes,
    put_id: bytes,
    length: int,
    n_cells: int,
    parent: bytes,
    position: int,
) -> U64:
    """`block.fixed_part` as uint64 (13,); no parent where it is unknown."""
    fixed = fixed_part(
        namespace=namespace,
        key=key,
        put_id=put_id,
        length=length,
        n_cells=n_cells,
        parent=parent or NO_PARENT,
        position=position,
    )
    return np.frombuffer(fixed, np.uint64)
