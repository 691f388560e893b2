"""Host memory as SGLang's pools lay it out, for tests that load no SGLang."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

U8 = npt.NDArray[np.uint8]


@dataclass
class HostPool:
    """A pool of `size` tokens, all of them bytes of `memory`.

    layout: layer_first has a piece a layer for keys and for values; page_first and its like two
    pieces; of MLA (latent: bytes a token and layer) these are one piece a layer, or one.
    """

    size: int
    page_size: int = 16
    layer_num: int = 4
    head_num: int = 2
    head_dim: int = 64
    v_head_dim: int = 64
    itemsize: int = 4
    dtype: str = "torch.float32"
    layout: str = "page_first"
    latent: int = 0
    start_layer: int = 0
    end_layer: int = 4
    memory: U8 = field(init=False)

    def __post_init__(self) -> None:
        self.memory = np.zeros(self.size * self.layer_num * sum(self._kinds), np.uint8)

    @property
    def _kinds(self) -> tuple[int, ...]:
        """Bytes a token and layer, of keys and of values."""
        if self.latent:
            return (self.latent,)
        return tuple(self.head_num * n * self.itemsize for n in (self.head_dim, self.v_head_dim))

    @property
    def pieces(self) -> tuple[int, ...]:
        """Bytes of each of a page's pieces."""
        if self.layout == "layer_first":
            return tuple(n * self.page_size for _ in range(self.layer_num) for n in self._kinds)
        return tuple(n * self.page_size * self.layer_num for n in self._kinds)

    def addresses(self, pages: list[int]) -> list[int]:
        """Of the pages' pieces."""
        starts = np.cumsum((0, *self._kinds))[:-1] * self.size * self.layer_num
        start = self.memory.ctypes.data
        found = []
        for page in pages:
            token = page * self.page_size
            layers = range(self.layer_num) if self.layout == "layer_first" else (None,)
            for layer in layers:
                for kind, nbytes in zip(starts.tolist(), self._kinds, strict=True):
                    row = token * self.layer_num if layer is None else layer * self.size + token
                    found.append(start + kind + row * nbytes)
        return found

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        """See SGLang's pools; indices: of tokens."""
        if self.layout not in ("layer_first", "page_first", "page_first_direct", "page_head"):
            raise ValueError(f"Unsupported layout: {self.layout}")
        pages = [int(token) // self.page_size for token in indices[:: self.page_size]]
        return self.addresses(pages), list(self.pieces) * len(pages)

    def page(self, number: int) -> bytes:
        """A page's bytes, piece by piece."""
        start = self.memory.ctypes.data
        places = zip(self.addresses([number]), self.pieces, strict=True)
        return b"".join(self.memory[at - start : at - start + n].tobytes() for at, n in places)

    def fill(self, seed: int) -> None:
        """Bytes that are nowhere alike."""
        rng = np.random.default_rng(seed)
        self.memory[:] = rng.integers(0, 256, len(self.memory), np.uint8)
