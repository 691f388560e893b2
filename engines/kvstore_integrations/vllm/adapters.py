"""Which weights a LoRA adapter is, as far as blocks are concerned: its name is not enough."""

from __future__ import annotations

import hashlib
import logging
import os
from pathlib import Path

_DIGEST_BYTES = 16
_MOST_KEPT = 4096
log = logging.getLogger(__name__)


class Adapters:
    """Tells adapters apart by their folder and the sizes and times of the files in it.

    Reading them would take too long here. An adapter that is changed in place while the engine has
    the old one in its memory counts as the old one, until the engine loads it anew.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, str], str | None] = {}

    def digest(self, name: str, number: int, path: str, *, again: bool = False) -> str | None:
        """32 digits for the adapter's weights; None where nothing tells which they are.

        number: the engine's for it. again: the engine reads it once more.
        """
        key = (name, number, path)
        if key not in self._known or again:
            if len(self._known) >= _MOST_KEPT:
                self._known.clear()
            self._known[key] = _digest(name, Path(path))
            if self._known[key] is None:
                log.warning(
                    "requests with the adapter %s are not cached: %s is no folder here, so nothing "
                    "tells its weights from others of that name",
                    name,
                    path,
                )
        return self._known[key]


def _digest(name: str, folder: Path) -> str | None:
    digest = hashlib.blake2b(f"{name}\0{folder.absolute()}\0".encode(), digest_size=_DIGEST_BYTES)
    try:
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda one: one.name):
                seen = entry.stat()
                digest.update(f"{entry.name}\0{seen.st_size}\0{seen.st_mtime_ns}\0".encode())
    except OSError:
        return None
    return digest.hexdigest()
