"""A block as it lies in a slot, in memory and on NVMe: header, payload, zeros."""

from __future__ import annotations

import dataclasses
import itertools
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvstore import limits
from kvstore.block import (
    BlockHeader,
    copied_headers,
    header_bytes,
    pack,
    read_headers,
    unpack,
    verify,
)
from kvstore.errors import Corrupted, InvalidArgument, ProtocolError
from kvstore.layout import Layout
from kvstore.streaming import hash_rows

U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]

# As in kvstore.block: where the number of cells is, and where their checksums begin, behind which
# the header's own one follows.
_CELLS = struct.Struct("<I")
_CELLS_AT = 8
_NAMESPACE_AT = 16
_SUMS_AT = 104
_SUM_BYTES = 8


def check_slot(slot: U8, key: bytes, stamp: int, layout: Layout) -> BlockHeader:
    """The header of a slot that holds just this block, all of it sound; else raises Corrupted.

    slot: contiguous, of at least the layout's header and payload (InvalidArgument). stamp: the
    header's own checksum. The namespace's number is that of the run which wrote it, and not
    compared.
    """
    start = header_bytes(layout.n_cells)
    if slot.ndim != 1 or len(slot) < start + layout.block_bytes:
        raise InvalidArgument("slot", f"{slot.shape} has no room for {layout.block_bytes} bytes")
    try:
        header = unpack(slot)
    except ProtocolError as error:  # no header at all: the slot was never written, or torn
        raise Corrupted(str(error)) from error
    if stamp_of(slot) != stamp:
        raise Corrupted("slot holds another block: its header has another checksum")
    if header.key != key:
        raise Corrupted("slot holds a block of another key")
    if (len(header.checksums), header.length) != (layout.n_cells, layout.block_bytes):
        raise Corrupted(
            f"slot holds {len(header.checksums)} cells, {header.length} bytes; "
            f"the layout says {layout.n_cells}, {layout.block_bytes}"
        )
    verify(header, slot[start : start + header.length], layout.cell_bounds)
    return header


def holds(slots: Sequence[U8], keys: U8, stamps: U64, layout: Layout) -> npt.NDArray[np.bool_]:
    """Of which slots `check_slot` finds nothing wrong: bool (n,). keys: (n, 32), stamps: (n,).

    A header whose own checksum is the stamp is the one that was written.
    """
    at = np.array([slot.__array_interface__["data"][0] for slot in slots], np.uint64)
    headers = read_headers(copied_headers(at, layout.n_cells), layout.n_cells)
    sound: npt.NDArray[np.bool_] = headers.sound & (headers.own == stamps)
    sound &= (headers.fields["key"] == keys).all(axis=1)
    sound &= headers.fields["length"] == layout.block_bytes
    at += np.uint64(header_bytes(layout.n_cells))
    for cell, (first, last) in enumerate(itertools.pairwise(layout.cell_bounds.tolist())):
        sound &= hash_rows(at + np.uint64(first), last - first) == headers.checksums[:, cell]
    return sound


def stamp_of(slot: U8) -> int:
    """The own checksum of the header at the start of `slot`, not verified. Raises Corrupted."""
    n_cells = int(_CELLS.unpack_from(slot.data, _CELLS_AT)[0]) if len(slot) >= _SUMS_AT else 0
    end = _SUMS_AT + n_cells * _SUM_BYTES
    if not 1 <= n_cells <= limits.MAX_CELLS or len(slot) < end + _SUM_BYTES:
        raise Corrupted(f"slot of {len(slot)} bytes holds no header of {n_cells} cells")
    return int.from_bytes(slot[end : end + _SUM_BYTES].tobytes(), "little")


def stamps_of(headers: U8) -> npt.NDArray[np.uint64]:
    """The own checksums of headers (n, header_bytes): (n,) uint64, a copy.

    Rows may be longer, and lie apart in memory. Nothing is verified: of a damaged header comes some
    number, for which `check_slot` then finds no match.
    """
    n, width = headers.shape
    if width < _SUMS_AT + 2 * _SUM_BYTES:
        raise InvalidArgument("headers", f"{headers.shape} has no room for a header")
    n_cells = headers[:, _CELLS_AT : _CELLS_AT + _CELLS.size].copy().view("<u4")
    at = np.minimum(_SUMS_AT + n_cells.astype(np.int64) * _SUM_BYTES, width - _SUM_BYTES)
    own = np.take_along_axis(headers, at + np.arange(_SUM_BYTES), axis=1)
    return own.view("<u8").reshape(n).astype(np.uint64, copy=False)


def namespace_of(slot: U8) -> int:
    """The namespace number in the header at the start of `slot`, which is not verified."""
    return int(_CELLS.unpack_from(slot.data, _NAMESPACE_AT)[0])


def renumber(slot: U8, namespace: int) -> int:
    """Gives the header in `slot`, in place, another namespace number; returns its new stamp.

    Only bytes of the header change. Raises what `block.unpack` does for a header that is not
    sound; then nothing changes.
    """
    packed = pack(dataclasses.replace(unpack(slot), namespace=namespace))
    slot[: len(packed)] = np.frombuffer(packed, np.uint8)
    return stamp_of(slot)
