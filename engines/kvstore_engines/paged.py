"""KV pages: a page's bytes are a store block's bytes, so nothing is permuted on the way."""

from collections.abc import Sequence

import torch

from kvstore_engines.attention import CPU
from kvstore_engines.hostside import HostViews, Row, StagedRows


class OutOfPagesError(RuntimeError):
    """More pages were asked for than are free."""


class PagePool:
    """A pool of KV pages; one page holds one store block of `block_tokens` tokens.

    `storage` is [pages, *page_shape], contiguous, on the device. The page shape is the model's:
    grouped-query attention has [kv_heads, layers, 2, block_tokens, head_dim], which in memory is
    the store's block layout with one head per cell and all layers in one cell; a rank of several
    has its own heads, and so its own cells of the block. Latent attention has [layers,
    block_tokens, width].
    """

    def __init__(
        self,
        num_pages: int,
        page_shape: tuple[int, ...],
        layer_dim: int,
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> None:
        """`layer_dim` is the dimension of `storage` that counts layers."""
        self.storage = torch.zeros((num_pages, *page_shape), dtype=dtype, device=device)
        self.num_pages = num_pages
        self._layer_dim = layer_dim
        # The store knows bytes only, and numpy no bfloat16.
        pages = self.storage.view(num_pages, -1).view(torch.uint8)
        self._host = HostViews(pages) if device.type == "cpu" else StagedRows(pages)
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        """Pages not handed out."""
        return len(self._free)

    @property
    def page_nbytes(self) -> int:
        """Bytes in one page: a store block, or this rank's cells of one."""
        return self.storage[0].nbytes

    def layer(self, index: int) -> torch.Tensor:
        """A view of one layer: [pages, kv_heads, 2, block_tokens, head_dim], or for latent
        attention [pages, block_tokens, width]."""
        return self.storage.select(self._layer_dim, index)

    def rows_to_fill(self, pages: Sequence[int]) -> list[Row]:
        """Where the bytes of these pages may be written; `filled` says which were."""
        return self._host.rows_to_fill(pages)

    def filled(self, pages: Sequence[int]) -> None:
        """The rows of these pages, the first of those asked for last, are in the pages now."""
        self._host.filled(pages)

    def rows_of(self, pages: Sequence[int]) -> list[Row]:
        """The bytes of these pages, valid until the next call."""
        return self._host.rows_of(pages)

    def allocate(self, count: int) -> list[int]:
        """Take `count` pages; their old contents are left as they are."""
        if count > len(self._free):
            raise OutOfPagesError(f"{count} pages asked for, {len(self._free)} free")
        return [self._free.pop() for _ in range(count)]

    def release(self, pages: list[int]) -> None:
        """Give pages back."""
        self._free.extend(pages)
