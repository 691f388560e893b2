"""What a client of any system can do, as the worker drives it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Bytes1D = npt.NDArray[np.uint8]
Keys = Sequence[bytes]  # 32 bytes each; systems whose keys are text use their hexadecimal form


class Client(Protocol):
    """One client process's connection."""

    def buffers(self, n: int, nbytes: int) -> list[Bytes1D]:
        """n buffers of the kind that this system moves fastest, registered where it asks for it.

        The last call's stay valid until the next one, so n = 0 gives them back.
        """

    def put(self, keys: Keys, sources: Sequence[Bytes1D]) -> int:
        """Stores blocks; returns how many."""

    def get(self, keys: Keys, targets: Sequence[Bytes1D]) -> int:
        """Fetches blocks into the targets; returns how many were there."""

    def exists(self, keys: Keys) -> int:
        """How many of the keys are stored."""

    def drop(self, keys: Keys) -> None:
        """Forgets blocks."""

    def close(self) -> None:
        """Ends the connection."""
