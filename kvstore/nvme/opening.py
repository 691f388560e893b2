"""Volumes as they are found or made when a store starts."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from kvstore import limits
from kvstore.errors import Corrupted, InvalidArgument, KVStoreError, ProtocolError
from kvstore.nvme.disk import FileDisk, MakeEngine, Pread, WaryDisk
from kvstore.nvme.format import VOLUME_ID_BYTES, Disk, Geometry, Superblock, pack_superblock
from kvstore.nvme.nixl import NixlEngine
from kvstore.nvme.superblock import read_superblock
from kvstore.nvme.volume import Volume
from kvstore.sizes import format_size

_MIN_SEGMENT_BYTES, _MAX_SEGMENT_BYTES = 4 << 20, 256 << 20
_SEGMENTS_WANTED = 64
EngineName = Literal["pread", "nixl"]
_ENGINES: dict[EngineName, MakeEngine] = {"pread": Pread, "nixl": NixlEngine}
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Location:
    """A directory or block device for a volume of so many bytes, and what moves them."""

    path: Path
    nbytes: int
    engine: EngineName = "pread"

    def __post_init__(self) -> None:
        """`InvalidArgument` for an engine that is none."""
        if self.engine not in _ENGINES:
            raise InvalidArgument(
                "nvme_engine", f"{self.engine!r} is none of {', '.join(_ENGINES)}"
            )

    def __str__(self) -> str:
        return f"{self.path}:{format_size(self.nbytes)}"

    def share(self, n: int) -> Location:
        """An n-th of it, in whole granules."""
        unit = limits.GRANULE_BYTES
        return replace(self, nbytes=self.nbytes // n // unit * unit)


@dataclass(frozen=True, slots=True, eq=False)
class OpenVolume:
    """A disk, and what is on it."""

    disk: Disk
    superblock: Superblock
    close: Callable[[], None]


@dataclass(frozen=True, slots=True, eq=False)
class Opened:
    """The volumes that can be used, and why others cannot."""

    volumes: tuple[OpenVolume, ...] = ()
    problems: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of all volumes."""
        return sum(opened.superblock.geometry.nbytes for opened in self.volumes)

    def books(self) -> list[Volume]:
        """Empty books for each, as a store wants them."""
        books, base = [], 0
        for number, opened in enumerate(self.volumes):
            geometry = opened.superblock.geometry
            books.append(Volume(number, base, geometry, opened.superblock.volume_id))
            base += geometry.n_segments
        return books

    def close(self) -> None:
        """Closes the disks."""
        for opened in self.volumes:
            opened.close()


def open_all(locations: Sequence[Location], *, name: str) -> Opened:
    """Opens each volume, or notes what keeps it from being used: the store goes on without it.

    name: of the file in a directory. Each problem is logged as well.
    """
    volumes, problems = [], []
    for location in locations:
        try:
            volumes.append(_open(location, name))
        except (KVStoreError, OSError) as error:
            problem = f"{location.path} is not used: {error}"
            log.error("no NVMe tier there: %s", problem)
            problems.append(problem)
    return Opened(tuple(volumes), tuple(problems))


def segment_bytes_for(nbytes: int) -> int:
    """The size of segments in a volume of so many bytes: about 1/64, a power of two."""
    share = max(1, nbytes // _SEGMENTS_WANTED)
    return min(max(1 << (share.bit_length() - 1), _MIN_SEGMENT_BYTES), _MAX_SEGMENT_BYTES)


def prepared(disk: Disk, nbytes: int, *, room: int = 0) -> Superblock:
    """What is on the disk; a blank one is made a volume first. room, and errors: see
    `read_superblock`."""
    found = read_superblock(disk, room=room)
    if found is None:
        geometry = Geometry.for_volume(nbytes=nbytes, segment_bytes=segment_bytes_for(nbytes))
        found = Superblock(volume_id=secrets.token_bytes(VOLUME_ID_BYTES), geometry=geometry)
        write_superblock(disk, found)
    return found


def write_superblock(disk: Disk, superblock: Superblock) -> None:
    """Both copies, one after the other, so that one is always whole."""
    packed = pack_superblock(superblock)
    for copy in range(2):
        disk.write(copy * limits.GRANULE_BYTES, [packed])
        disk.sync()


def _open(location: Location, name: str) -> OpenVolume:
    disk = FileDisk.open(
        location.path, location.nbytes, name=name, engine=_ENGINES[location.engine]
    )
    try:
        if not disk.direct:
            log.warning("%s has no O_DIRECT: reads and writes go through memory", disk.path)
        superblock = _grown(disk, _checked(disk, location), location)
    except BaseException:
        disk.close()
        raise
    return OpenVolume(WaryDisk(disk), superblock, disk.close)


def _checked(disk: FileDisk, location: Location) -> Superblock:
    try:
        found = prepared(disk, min(disk.nbytes, location.nbytes), room=disk.file_bytes)
    except ProtocolError as error:
        raise InvalidArgument(
            "nvme",
            f"{disk.path} is no volume of ours, or of a version that is not known here ({error}):"
            " move it away, or start the version that wrote it",
        ) from error
    except Corrupted as error:
        raise InvalidArgument(
            "nvme", f"{disk.path} is damaged ({error}): move it away to begin anew"
        ) from error
    if found.geometry.nbytes > disk.nbytes:  # on a device, of which less is asked than it holds
        disk.resize(found.geometry.nbytes)
    return found


def _grown(disk: FileDisk, found: Superblock, location: Location) -> Superblock:
    """The volume in the size that is asked for, where that is more than it had."""
    old = found.geometry
    unit = limits.GRANULE_BYTES
    wanted = Geometry.for_volume(
        nbytes=max(location.nbytes, old.nbytes),
        segment_bytes=old.segment_granules * unit,
        log_granules=old.log_granules,
    )
    if location.nbytes < disk.nbytes and disk.file_bytes:
        log.warning(
            "%s keeps its %s, though %s are asked for: remove it, or wipe the device, to begin a"
            " smaller one",
            disk.path,
            format_size(disk.nbytes),
            format_size(location.nbytes),
        )
    if wanted.n_segments <= old.n_segments:
        return found
    if location.nbytes > disk.nbytes:
        disk.resize(location.nbytes)
    grown = Superblock(volume_id=found.volume_id, geometry=wanted)
    write_superblock(disk, grown)
    log.info("%s has grown to %s", disk.path, format_size(location.nbytes))
    return grown
