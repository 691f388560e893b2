"""What engines leave in shared memory when they end, or are ended: files that no process has."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

SHARED = Path("/dev/shm")


@contextlib.contextmanager
def nothing_left_in(folder: Path = SHARED) -> Iterator[None]:
    """In the end removes the files of ours in `folder` that are new and in no process's hands."""
    before = set(os.listdir(folder))
    try:
        yield
    finally:
        held = _held()
        for name in set(os.listdir(folder)) - before:
            with contextlib.suppress(FileNotFoundError):
                found = (folder / name).stat()
                if found.st_uid == os.geteuid() and (found.st_dev, found.st_ino) not in held:
                    (folder / name).unlink()


def _held() -> set[tuple[int, int]]:
    """Device and inode of all that any process maps or has open."""
    held = set()
    for process in Path("/proc").glob("[0-9]*"):
        for kind in ("map_files", "fd"):
            # Processes end meanwhile; those of others are not to be seen.
            with contextlib.suppress(OSError):
                for each in os.scandir(process / kind):
                    with contextlib.suppress(OSError):
                        found = os.stat(each.path)
                        held.add((found.st_dev, found.st_ino))
    return held
