"""What commands have to be like; `InvalidArgument` and `LayoutMismatch` name the wrong field."""

from __future__ import annotations

import numpy as np

from kvstore import commands as c
from kvstore import limits
from kvstore.block import PUT_ID_BYTES
from kvstore.errors import InvalidArgument, LayoutMismatch


def check_hashes(hashes: c.U8) -> None:
    """One to `limits.MAX_KEYS_PER_CALL` keys."""
    if hashes.ndim != 2 or hashes.shape[1] != limits.KEY_BYTES or hashes.dtype != np.uint8:
        raise InvalidArgument("hashes", "expected (n, 32) uint8")
    if not 0 < len(hashes) <= limits.MAX_KEYS_PER_CALL:
        raise InvalidArgument("hashes", f"1 to {limits.MAX_KEYS_PER_CALL} keys a call")


def check_put(put_id: bytes, hashes: c.U8) -> None:
    """What all commands of a put have in common."""
    if len(put_id) != PUT_ID_BYTES:
        raise InvalidArgument("put_id", f"expected {PUT_ID_BYTES} bytes, got {len(put_id)}")
    check_hashes(hashes)


def check_commit(command: c.Commit, n_cells: int) -> None:
    """A `Commit` of blocks of so many cells, but for whose its slots are."""
    _check_chain(command)
    n = len(command.hashes)
    if command.granules.shape != (n,):
        raise InvalidArgument("granules", "expected one for each hash")
    if command.checksums.shape != (n, n_cells):
        raise LayoutMismatch("checksums", f"expected ({n}, {n_cells}), one for each cell")
    if not 0 <= command.more <= limits.MAX_KEYS_PER_CALL:
        raise InvalidArgument("more", f"0 to {limits.MAX_KEYS_PER_CALL} slots, please")


def check_reserve(command: c.Reserve) -> None:
    """A `Reserve`, but for its cells."""
    _check_chain(command)


def _check_chain(command: c.Reserve | c.Commit) -> None:
    many = (
        isinstance(command, c.Commit) and len(command.put_id) == len(command.hashes) * PUT_ID_BYTES
    )
    check_put(command.put_id[:PUT_ID_BYTES] if many else command.put_id, command.hashes)
    if len(command.parent) not in (0, limits.KEY_BYTES):
        raise InvalidArgument("parent", f"expected {limits.KEY_BYTES} bytes or none")
    if not -1 <= command.position <= limits.MAX_POSITION - len(command.hashes):
        raise InvalidArgument("position", f"-1 to {limits.MAX_POSITION}, please")
    if not 0 <= command.ttl_ms <= limits.MAX_TTL_MS:
        raise InvalidArgument("ttl_ms", f"0 to {limits.MAX_TTL_MS} ms, please")


def cell_mask(cells: c.U32, n_cells: int) -> int:
    """A bit for each of the cells, of `n_cells`; of all of them where none is named."""
    if not len(cells):
        return (1 << n_cells) - 1
    if int(cells.max()) >= n_cells or len(np.unique(cells)) != len(cells):
        raise LayoutMismatch("cells", f"expected distinct cells below {n_cells}")
    return sum(1 << cell for cell in cells.tolist())
