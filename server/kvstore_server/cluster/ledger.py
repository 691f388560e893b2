"""What a node remembers: one small file, whole or absent."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


class FileLedger:
    """`Ledger` in the data folder, of the node of that name."""

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = folder / f"node-{name}.json"

    def load(self) -> bytes:
        """See `Ledger.load`."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""

    def save(self, data: bytes) -> None:
        """See `Ledger.save`."""
        folder = self._path.parent
        fd, temporary = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=folder)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except BaseException:
            os.unlink(temporary)
            raise
        at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(at)
        finally:
            os.close(at)
