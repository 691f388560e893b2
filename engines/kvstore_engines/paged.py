"""KV pages: a page's bytes are a store block's bytes, so nothing is permuted on the way."""

import numpy as np
import torch
from numpy.typing import NDArray


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free."""


class PagePool:
    """A pool of KV pages; one page holds one store block of `block_tokens` tokens.

    `storage` is [pages, *page_shape], contiguous, on the CPU. The page shape is the model's:
    grouped-query attention has [kv_heads, layers, 2, block_tokens, head_dim], which in memory is
    the store's block layout with one head per cell and all layers in one cell; a rank of several
    has its own heads, and so its own cells of the block. Latent attention has [layers,
    block_tokens, width].
    """

    def __init__(
        self, num_pages: int, page_shape: tuple[int, ...], layer_dim: int, dtype: torch.dtype
    ) -> None:
        """`layer_dim` is the dimension of `storage` that counts layers."""
        self.storage = torch.zeros((num_pages, *page_shape), dtype=dtype)
        self.num_pages = num_pages
        self._layer_dim = layer_dim
        # numpy knows no bfloat16, so the bytes are exposed and not the values.
        self._bytes: NDArray[np.uint8] = self.storage.view(num_pages, -1).view(torch.uint8).numpy()
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """Pages not handed out."""
        return len(self._free)

    @property
    def page_nbytes(self) -> int:
        """Bytes in one page: a store block, or this rank's cells of one."""
        return int(self._bytes.shape[1])

    def layer(self, index: int) -> torch.Tensor:
        """A view of one layer: [pages, kv_heads, 2, block_tokens, head_dim], or for latent
        attention [pages, block_tokens, width]."""
        return self.storage.select(self._layer_dim, index)

    def page_bytes(self, page: int) -> NDArray[np.uint8]:
        """The page's memory as a writable 1-D uint8 view."""
        view: NDArray[np.uint8] = self._bytes[page]
        return view

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; their old contents are left as they are."""
        if count > len(self._free):
            raise OutOfPagesError(f"{count} pages asked for, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def release(self, pages: list[int]) -> None:
        """Give pages back."""
        self._free.extend(pages)
