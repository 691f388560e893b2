"""How a volume is told from what else a disk may hold: reads its superblock, from either copy."""

from __future__ import annotations

from kvstore import limits
from kvstore.errors import Corrupted, KVStoreError, ProtocolError
from kvstore.nvme.format import SUPERBLOCKS, Disk, Superblock, aligned, unpack_superblock

_UNIT = limits.GRANULE_BYTES


def read_superblock(disk: Disk, *, room: int = 0) -> Superblock | None:
    """What the volume is, from either copy; None if it was never formatted (both are zeros).

    room: bytes that the disk may be resized to, where that is more than it has.

    Raises ProtocolError for other contents or a version that is not ours, Corrupted for two damaged
    copies or a volume that was cut short, OSError where no copy is sound and one cannot be read.
    """
    if disk.nbytes < SUPERBLOCKS * _UNIT:
        return None
    failures: list[OSError | KVStoreError] = []
    raw = aligned(_UNIT)
    for copy in range(SUPERBLOCKS):
        try:
            disk.read(copy * _UNIT, [raw])
            if not raw.any():
                continue
            found = unpack_superblock(raw)
        except (OSError, Corrupted, ProtocolError) as error:
            failures.append(error)
            continue
        most = max(disk.nbytes, room)
        if found.geometry.nbytes > most:
            raise Corrupted(f"the volume has {found.geometry.nbytes} bytes, its disk only {most}")
        return found
    # What cannot be read could be sound; what fails its checksum once was; the rest never was.
    for kind in (OSError, Corrupted, ProtocolError):
        for failure in failures:
            if isinstance(failure, kind):
                raise failure
    return None
